"""`PackedPast` on a GPU's kernels at the shapes that train, against the plain twins in double precision."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from openkeye.train.packed_past import PackedPast, Teaching
from tests.train.packs import Projections, draw, make_layout

pytestmark = pytest.mark.gpu


@dataclass(frozen=True)
class Shape:
    """A pack and the heads of a layer."""

    documents: tuple[tuple[int, tuple[int, ...]], ...]
    heads: int
    groups: int
    width: int
    index_heads: int
    index_width: int
    top_k: int


CLIPS = Shape(((5000, (50,) * 20), (400, (41, 60, 1)), (1, ()), (900, (45,) * 8), (700, ())), 8, 2, 32, 4, 32, 192)
TEXT = Shape(((8192, ()),), 9, 3, 64, 4, 64, 256)
SEVERAL = Shape(((1500, ()), (3, ()), (2100, ()), (640, ())), 9, 3, 64, 4, 64, 256)
PUBLISHED = Shape(((1200, (50,) * 4), (300, ())), 32, 4, 128, 16, 64, 128)
SHAPES = {"clips": CLIPS, "text": TEXT, "several": SEVERAL, "published": PUBLISHED}
ALLOWED = {torch.bfloat16: 2e-2, torch.float32: 2e-3}
# of the norm; in bfloat16 what rounding the output and the gradients once costs
ALLOWED_AT_THE_BORDER = 1e-2
# in float32 with selection: index scores are multiplied in tf32, so that a few rows pick another of two keys that score alike


def project(shape: Shape, dtype: torch.dtype) -> Projections:
    layout = make_layout(*shape.documents)
    heads = (shape.heads, shape.groups, shape.width, shape.index_heads, shape.index_width)
    return draw(layout.num_tokens, *heads).moved("cuda", dtype)


def run(
    shape: Shape, given: Projections, attention: str, target: str | None, is_e4m3: bool = False, wants_metrics: bool = True
):
    """Output, figures and all gradients of attention and of 0.3 times the indexer's loss."""
    layout = make_layout(*shape.documents)
    num_tokens = layout.num_tokens
    wide = torch.float64 if given.query.dtype == torch.float64 else torch.float32
    generator = torch.Generator("cuda").manual_seed(1)
    weights = torch.rand(num_tokens, generator=generator, device="cuda", dtype=torch.float32).to(wide) / num_tokens
    # Rounded alike for every precision.
    direction = torch.randn(given.query.shape, generator=generator, device="cuda", dtype=torch.bfloat16).to(given.query.dtype)
    teaching = None if target is None else Teaching(target, weights)
    past = PackedPast(layout, shape.top_k, attention, teaching, wants_metrics, is_e4m3)
    output = past.attend(0, *given.trunk, given.index if past.needs_index else None)
    loss = (output * direction).to(wide).sum()
    if target is not None:
        loss = loss + 0.3 * past.indexer_loss
    loss.backward()
    leaves = given.trunk if target is None else (*given.trunk, *given.indexer)
    return output.detach(), past.report(), [leaf.grad for leaf in leaves]


def assert_near(mine: Tensor, expected: Tensor, allowed: float, name: str) -> None:
    error = float((mine.double() - expected.double()).norm() / expected.double().norm())
    assert error <= allowed, f"{name}: {error:.2e} of the norm, {allowed:.0e} allowed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize(
    ("attention", "target"),
    [("dense", None), ("dense", "dense"), ("sparse", "selected"), ("sparse", "selected_dense"), ("sparse", None)],
)
def test_kernels_equal_the_plain_twins_in_double_precision(name, attention, target, dtype):
    shape = SHAPES[name]
    given = project(shape, dtype)
    other = given.moved("cuda", torch.float64)
    allowed = max(ALLOWED[dtype], ALLOWED_AT_THE_BORDER) if attention == "sparse" else ALLOWED[dtype]
    output, report, gradients = run(shape, given, attention, target)
    expected, its_report, its_gradients = run(shape, other, attention, target)
    assert_near(output, expected, allowed, "output")
    assert report.keys() == its_report.keys()
    for figure, value in report.items():
        wanted = float(its_report[figure])
        assert abs(float(value) - wanted) <= 5e-3 * abs(wanted), figure
    names = ("query", "key", "value", "index query", "gates", "index key")
    for leaf, mine, its in zip(names, gradients, its_gradients, strict=False):
        assert_near(mine, its, allowed, leaf)


@pytest.mark.parametrize("is_e4m3", [False, True])
@pytest.mark.parametrize(("attention", "target"), [("dense", None), ("dense", "dense"), ("sparse", "selected")])
def test_no_step_waits_for_the_device(attention, target, is_e4m3):
    run(CLIPS, project(CLIPS, torch.bfloat16), attention, target, is_e4m3)
    given = project(CLIPS, torch.bfloat16)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(CLIPS, given, attention, target, is_e4m3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_grows_with_tokens_and_not_with_their_square():
    shape = Shape(((26_000, (50,) * 16),), 8, 2, 32, 4, 32, 192)
    for attention, target in (("dense", "dense"), ("sparse", "selected"), ("sparse", "selected_dense")):
        given = project(shape, torch.bfloat16)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(shape, given, attention, target, wants_metrics=False)
        # The scores of one head alone would be 2.9 GB in float32.
        assert torch.cuda.max_memory_allocated() - before < 2 << 30, (attention, target)
