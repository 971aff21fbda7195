"""Settings of the engine."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineConfig:
    """How much memory the caches take and how work is cut."""

    page_size: int = 64
    # tokens of one cache page
    cache_tokens: int = 65536
    # keys, values and index keys that the pages hold in all
    prefill_chunk_tokens: int = 2048
    vision_slice_pictures: int = 16
    # pictures that the vision tower takes at once; results do not depend on it
    vision_cache_bytes: int = 256 << 20
    # encoded pictures kept for the next question
    max_batch_requests: int = 32
    # requests that decode together
    dense_up_to: int | None = None
    # Tokens whose sequence up to and with them has at most this many attend to all of it and not to selected keys. None: the
    # model's top-k, up to which both are the same; more is a superset of what the model was trained to see, fewer only slower.

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "dense_up_to" and value < 1:
                raise ValueError(f"EngineConfig.{name} is {value}; give at least 1")
        if self.dense_up_to is not None and (type(self.dense_up_to) is not int or self.dense_up_to < 0):
            raise ValueError(
                f"EngineConfig.dense_up_to is {self.dense_up_to!r}; give a whole number of tokens from 0 on, or None for the "
                "model's top-k"
            )
        if self.cache_tokens % self.page_size:
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

    def __post_init__(self) -> None:
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.top_k < 0 or self.max_new_tokens < 1:
            raise ValueError(
                f"sampling needs temperature >= 0, 0 < top_p <= 1, top_k >= 0 and max_new_tokens >= 1, got temperature "
                f"{self.temperature}, top_p {self.top_p}, top_k {self.top_k}, max_new_tokens {self.max_new_tokens}"
            )
