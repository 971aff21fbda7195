"""Settings of the engine."""

from dataclasses import dataclass

MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 20


@dataclass(frozen=True)
class EngineConfig:
    """How much memory the caches take and how work is cut."""

    page_size: int = 64
    # tokens of one cache page
    cache_tokens: int | None = None
    # Tokens whose keys, values and index keys the pages hold in all. None: 65,536 on a CPU; on a GPU as many as fit beside the
    # weights with `work_bytes` to spare.
    work_bytes: int = 4 << 30
    # of a GPU that are kept for activations and scratch where `cache_tokens` is None
    kv_cache: str = "auto"
    # format of keys and values: "auto" is the model's dtype; "e4m3" halves it, with a scale a token and KV head
    index_cache: str = "auto"
    # format of index keys: "model", "e4m3" with a scale a token as published, or "auto": e4m3 on a GPU in half precision
    experts: str = "auto"
    # format of the experts' weights: "auto" is the model's dtype; "e4m3" halves it, with a scale an output column
    has_graphs: bool | None = None
    # Decoding is captured in CUDA graphs, a graph for every few numbers of answers under way. None: on one GPU it is; over
    # several, whose sums a graph would hold too, only where True asks for it: that has never run over NCCL.
    prefill_chunk_tokens: int = 2048
    # prompt tokens of a batch, of one prompt or several; answers under way add one each
    vision_slice_pictures: int = 16
    # pictures that the vision tower takes at once; results do not depend on it
    vision_cache_bytes: int = 256 << 20
    # encoded pictures kept for the next question
    decode_ahead_bytes: int = 16 << 20
    # pixels of one prompt's videos that may wait for the engine; decoding pauses there
    num_decoders: int = 2
    # videos that are decoded at the same time
    max_batch_requests: int = 32
    # requests that run together
    dense_up_to: int | None = None
    # Tokens whose sequence up to and with them has at most this many attend to all of it and not to selected keys. None: the
    # model's top-k, up to which both are the same; more is a superset of what the model was trained to see, fewer only slower.

    is_batch_invariant: bool = False
    # A request's tokens and log-probabilities are the same to the last bit, whatever runs beside it: every model call then has
    # the shape of the largest, and a prompt's chunks begin where they would alone. It costs speed.

    records_routes: bool = False
    # Which experts every token was sent to is kept beside its keys, two bytes a layer and expert: a rollout's routes.
    records_picks_every: int | None = None
    # Of every so-manieth step the keys that attention selected for each token that chose the next one are kept, four bytes a
    # layer and key: what a learner's own selection is compared with. Such a step is not captured. None: of none.

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if type(value) is int and name != "dense_up_to" and value < 1:
                raise ValueError(f"EngineConfig.{name} is {value}; give at least 1")
        formats = {"kv_cache": ("auto", "e4m3"), "index_cache": ("auto", "model", "e4m3"), "experts": ("auto", "e4m3")}
        for name, choices in formats.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"EngineConfig.{name} is {getattr(self, name)!r}; give {' or '.join(choices)}")
        if self.dense_up_to is not None and (type(self.dense_up_to) is not int or self.dense_up_to < 0):
            raise ValueError(
                f"EngineConfig.dense_up_to is {self.dense_up_to!r}; give a whole number of tokens from 0 on, or None for the "
                "model's top-k"
            )
        if self.cache_tokens is not None and self.cache_tokens % self.page_size:
            raise ValueError(f"cache_tokens {self.cache_tokens} must be a multiple of page_size {self.page_size}")


@dataclass(frozen=True)
class SamplingParameters:
    """How the next token is chosen."""

    temperature: float = 0.0
    # 0 takes the likeliest token
    top_p: float = 1.0
    top_k: int = 0
    # 0 keeps every token
    seed: int = 0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    # the text ends before the first of them that it completes
    logprobs: int | None = None
    # How many of the likeliest tokens to report beside each new one, with natural logarithms of their probabilities; 0 reports
    # the new one alone, None nothing. They are of the model's own logits in float32: no temperature, top-p or top-k.

    def __post_init__(self) -> None:
        is_usable = 0 <= self.temperature < float("inf") and 0 < self.top_p <= 1
        if not is_usable or self.top_k < 0 or self.max_new_tokens < 1:
            raise ValueError(
                f"sampling needs temperature >= 0, 0 < top_p <= 1, top_k >= 0 and max_new_tokens >= 1, got temperature "
                f"{self.temperature}, top_p {self.top_p}, top_k {self.top_k}, max_new_tokens {self.max_new_tokens}"
            )
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; give a whole number of at most 64 bits")
        is_text = isinstance(self.stop, tuple) and all(isinstance(text, str) and text for text in self.stop)
        if not is_text or len(self.stop) > MAX_STOP_STRINGS:
            raise ValueError(
                f"stop is {self.stop!r:.80}; give a tuple of at most {MAX_STOP_STRINGS} strings, none of them empty"
            )
        if self.logprobs is not None and (type(self.logprobs) is not int or not 0 <= self.logprobs <= MAX_LOGPROBS):
            raise ValueError(f"logprobs is {self.logprobs!r}; give a whole number from 0 to {MAX_LOGPROBS}, or None")
