"""Who serves: the plain twins on a CPU and in float64, the kernels on a GPU, and the plain twins again, aloud, where none fits.

Without a GPU the kernels run in Triton's interpreter, as if the CPU's tensors lay on a GPU.
"""

import warnings

import pytest
import torch
from torch import Tensor

from openkeye.engine.batch import Batch, PagedPast, Segment
from openkeye.engine.config import EngineConfig
from openkeye.engine.pages import PagedCaches
from openkeye.kernels import dispatch, reference
from openkeye.model.config import KeyeConfig
from openkeye.model.past import CachedIndex, IndexerOutput, PlainPast
from tests.engine.paged_sequences import write_tokens
from tests.model.naive_keye import make_config

SHAPES = {"head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
TOP_K = 8


@pytest.fixture
def on_gpu(monkeypatch):
    """Tensors of the CPU count as a GPU's; what was said before is forgotten."""
    monkeypatch.setattr(dispatch, "can_be_fast", lambda x: x.dtype != torch.float64)
    monkeypatch.setattr(dispatch, "_operations_told", set())


@pytest.fixture
def quiet():
    """A warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def cases(device: str, width: int = 64, dtype: torch.dtype = torch.float32) -> dict[str, tuple]:
    """A call of every operation that has kernels, over 20 tokens."""

    def make(*shape: int, seed: int = 0) -> Tensor:
        return draw(*shape, seed=seed, dtype=dtype, device=device)

    angles = draw(20, width // 2, device=device).repeat(1, 2)
    tables = (angles.cos(), angles.sin())
    query, key, value = make(20, 4, width), make(20, 2, width, seed=1), make(20, 2, width, seed=2)
    positions = torch.arange(20, device=device)
    indices = torch.stack([positions - shift for shift in range(5)], dim=1).clamp_min(-1).int()
    weights, ids = make(20, 2, seed=3).abs(), torch.stack([positions % 3, 3 + positions % 2], dim=1)
    heads = (make(20, 4 * width), make(20, 2 * width, seed=1), make(width, seed=2), make(width, seed=3))
    index = (make(20, 4 * width + 4), make(20, width, seed=1), *(make(width, seed=seed) for seed in (2, 3, 4)))
    return {
        "rms_norm": (make(20, 48), make(48, seed=1), 1e-6),
        "add_rms_norm": (make(20, 48), make(20, 48, seed=2), make(48, seed=1), 1e-6),
        "route": (make(20, 5), 2, True),
        "norm_rotary": (*heads, *tables, 1e-6),
        "index_norm_rotary": (*index, *tables, 1e-6),
        "indexer_select": (query, make(20, 4, seed=5), value[:, 0], TOP_K, positions),
        "sparse_attention": (query, key, value, indices, 0.2),
        "experts": (make(20, 32), make(5, 32, 48, seed=1), make(5, 24, 32, seed=2), weights, ids),
    }


def flat(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("operation", cases("cpu"))
def test_a_cpu_and_float64_get_the_plain_twin_bit_for_bit(operation, quiet, device):
    plain = getattr(reference, operation)
    for where, dtype in (("cpu", torch.float32), (device, torch.float64)):
        arguments = cases(where, dtype=dtype)[operation]
        for ours, theirs in zip(flat(getattr(dispatch, operation)(*arguments)), flat(plain(*arguments)), strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("operation", cases("cpu"))
def test_a_gpu_gets_the_kernels(operation, quiet, on_gpu, device, monkeypatch):
    arguments = cases(device)[operation]
    expected = flat(getattr(reference, operation)(*arguments))
    # Whatever is left to the plain twin would fail now.
    monkeypatch.setattr(reference, operation, None)
    for ours, theirs in zip(flat(getattr(dispatch, operation)(*arguments)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("operation", ["rms_norm", "norm_rotary", "index_norm_rotary", "sparse_attention", "experts"])
def test_learning_gets_gradients(operation, quiet, on_gpu, device):
    gradients = []
    for serve in (getattr(dispatch, operation), getattr(reference, operation)):
        arguments = cases(device)[operation]
        learnt = [x.requires_grad_() for x in arguments[:3] if isinstance(x, Tensor)]
        sum((y * (1 + torch.arange(y.shape[-1], device=device) % 3)).sum() for y in flat(serve(*arguments))).backward()
        gradients.append([x.grad for x in learnt])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_regions_that_torch_compiles_learn_through_the_experts(on_gpu, device):
    x, gate_up, down, weights, ids = cases(device)["experts"]
    learnt = [tensor.requires_grad_() for tensor in (x, gate_up, down)]

    def region(x_TD: Tensor) -> Tensor:
        return dispatch.experts(1.5 * x_TD, gate_up, down, weights, ids).sin()

    plain = torch.autograd.grad(region(x).sum(), learnt)
    compiled = torch.autograd.grad(torch.compile(region, backend="aot_eager", dynamic=True)(x).sum(), learnt)
    for ours, theirs in zip(compiled, plain, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_what_no_kernel_serves_is_said_once_and_runs_all_the_same(on_gpu, device):
    arguments = cases(device, width=48)
    for operation in ("sparse_attention", "norm_rotary", "indexer_select"):
        if operation == "norm_rotary":
            with pytest.warns(UserWarning, match=r"norm_rotary .* heads of one of \(16, 32, 64, 128, 256\)"):
                dispatch.norm_rotary(*arguments[operation])
            continue
        with pytest.warns(UserWarning, match=f"{operation} runs in plain PyTorch: kernels serve .* and got .*48"):
            first = getattr(dispatch, operation)(*arguments[operation])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            second = getattr(dispatch, operation)(*arguments[operation])
        assert torch.equal(first, getattr(reference, operation)(*arguments[operation])) and torch.equal(first, second)
    mixed = [arguments["experts"][0].half(), *arguments["experts"][1:]]
    with pytest.warns(UserWarning, match=r"experts .*torch.float16 \[20, 32\], torch.float32"):
        dispatch.experts(*mixed)


class Conversation:
    """Three requests of different lengths whose pages lie in disorder, decoding one token each."""

    def __init__(self, device: str, page_size: int, dense_up_to: int | None = None) -> None:
        self.model = make_model_config()
        config = EngineConfig(page_size=page_size, cache_tokens=8 * 32)
        self.caches = PagedCaches(self.model, config, torch.device(device), torch.float32)
        # Slots that nobody owns hold what must never be read.
        for cache in (self.caches.keys, self.caches.values, self.caches.index_keys):
            cache.fill_(torch.nan)
        order = torch.randperm(256 // page_size, generator=torch.Generator().manual_seed(1)).tolist()
        self.segments, self.contexts = [], []
        for number, length in enumerate((1, 21, 50)):
            num_pages = -(-length // page_size)
            pages, order = torch.tensor(order[:num_pages], device=device), order[num_pages:]
            slots = (pages[:, None] * page_size + torch.arange(page_size, device=device)).flatten()[:length]
            self.segments.append(Segment(None, length - 1, 1, slots))
            self.contexts.append(self._tokens(length, number, device))
            key, value, index = self.contexts[-1][1:]
            write_tokens(self.caches, 0, slots, key, value, index.key_TI)
        self.past = PagedPast(Batch(self.segments), self.caches, "sparse", TOP_K, dense_up_to)

    def _tokens(self, count: int, seed: int, device: str) -> tuple[Tensor, Tensor, Tensor, IndexerOutput]:
        heads, groups, width = self.model.num_attention_heads, self.model.num_key_value_heads, self.model.head_dim
        shapes = ((heads, width), (groups, width), (groups, width), (4, 32), (4,), (32,))
        made = [draw(count, *shape, seed=10 * seed + number, device=device) for number, shape in enumerate(shapes)]
        return made[0], made[1], made[2], IndexerOutput(*made[3:])

    def attend(self) -> Tensor:
        """[requests, H, D] of the last tokens."""
        last = [(query[-1:], index.query_TJI[-1:], index.gates_TJ[-1:]) for query, _, _, index in self.contexts]
        query, *index = (torch.cat(column) for column in zip(*last, strict=True))
        return self.past.attend(0, query, CachedIndex(*index))

    def attend_plainly(self, attention: str = "sparse") -> Tensor:
        """The same without pages."""
        contexts = [(*tensors, index if attention == "sparse" else None) for *tensors, index in self.contexts]
        return torch.cat([PlainPast(TOP_K).attend(0, *context)[-1:] for context in contexts])


def make_model_config() -> KeyeConfig:
    """Of heads that the kernels serve."""
    indexer = {"indexer_num_heads": 4, "indexer_head_dim": 32, "topk": TOP_K}
    rope = {"rope_scaling": {"rope_type": "default", "mrope_section": [8, 12, 12]}}
    return KeyeConfig.from_dict(make_config(**SHAPES, **rope, sa_config=indexer))


def test_decoding_reads_the_pages_in_place(on_gpu, quiet, device, monkeypatch):
    conversation = Conversation(device, page_size=16)
    expected = conversation.attend_plainly()
    monkeypatch.setattr("openkeye.engine.batch.indexer_select", None)
    torch.testing.assert_close(conversation.attend(), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:dense_attention runs in plain PyTorch")
def test_decoding_in_pages_leaves_the_requests_of_a_dense_limit_out(on_gpu, device, monkeypatch):
    conversation = Conversation(device, page_size=16, dense_up_to=21)
    sparse, dense = conversation.attend_plainly(), conversation.attend_plainly("dense")
    monkeypatch.setattr("openkeye.engine.batch.indexer_select", None)
    attended = conversation.attend()
    for row, expected in enumerate((sparse, dense, sparse)):
        torch.testing.assert_close(attended[row], expected[row], atol=1e-4, rtol=1e-4)


def test_decoding_on_other_pages_selects_request_by_request(on_gpu, device):
    conversation = Conversation(device, page_size=8)
    with pytest.warns(UserWarning, match="decode_in_pages .* pages of a multiple of 16 tokens"):
        attended = conversation.attend()
    torch.testing.assert_close(attended, conversation.attend_plainly(), atol=1e-4, rtol=1e-4)
