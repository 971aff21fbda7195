"""Learning: gradients of sparse attention, the indexer's losses, and the loss over the vocabulary.

Twins are compared on sampled queries: the gradients that come in, or the queries' weights, are zero for all others.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.inputs import Shape, Sizes, draw, pooled_lists
from benchmarks.measure import FAILURES, Case, Peer, Report, Work, compare_all, must_equal
from openkeye.kernels import reference, reference_learning
from openkeye.kernels.attention_lse import attention_lse
from openkeye.kernels.cross_entropy import cross_entropy
from openkeye.kernels.indexer_loss import dense_indexer_loss, selected_probabilities, sparse_indexer_loss
from openkeye.kernels.sparse_attention import sparse_attention_with_lse
from openkeye.kernels.sparse_attention_backward import Gradients, sparse_attention_backward
from openkeye.kernels.unions import TILE, build_unions

BACKWARD_GOAL, BACKWARD_TFLOPS = 20.0, 200.0
WARM_UP_RATIO = 3.0
# to a backward pass of dense attention over the same pairs


def gradients_of(loss: Callable[..., tuple[Tensor, Tensor]], leaves: list[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    """Divergences and the gradients of the leaves, the same values in dtype (None: as they come)."""
    own = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in leaves]
    total, divergence = loss(*own)
    return [divergence, *torch.autograd.grad(total, own)]


def dense_backward(report: Report, sizes: Sizes) -> tuple[Peer, float]:
    """torch's backward pass of causal attention over a square of the warm-up's length, the faster back end; and its pairs."""
    length = sizes.warm_up_length
    pairs = Shape(length, length, 1).causal_pairs
    found = [Peer("no backward of SDPA")]
    if report.mode != "time":
        return found[0], pairs
    shape = (1, sizes.heads, length, sizes.width)
    heads = [draw(report.device, torch.bfloat16, *shape, seed=number).requires_grad_() for number in range(3)]
    gradient = torch.randn_like(heads[0])
    for back_end, name in ((SDPBackend.CUDNN_ATTENTION, "cuDNN"), (SDPBackend.FLASH_ATTENTION, "flash")):
        try:
            with sdpa_kernel(back_end):
                output = F.scaled_dot_product_attention(*heads, is_causal=True)
        except FAILURES as error:
            report.fail(f"SDPA by {name}", error)
            continue
        work = partial(torch.autograd.grad, output, heads, gradient, retain_graph=True)
        found.append(report.peer(f"backward of SDPA by {name}, {length} x {length}", work))
    return min(found, key=lambda peer: peer.milliseconds if peer.milliseconds == peer.milliseconds else float("inf")), pairs


class Attention:
    """Backward of sparse attention, and the sparse loss of the indexer, on pooled lists."""

    def __init__(self, report: Report, sizes: Sizes) -> None:
        device, num_keys = report.device, sizes.learning_context
        self.report, self.sizes = report, sizes
        self.shape = Shape(num_keys, min(sizes.num_queries, num_keys // 2), sizes.top_k)
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.tolerance = 1.2e-2 if device == "cuda" else 1e-4
        num_queries = self.shape.num_queries
        self.query = draw(device, dtype, num_queries, sizes.heads, sizes.width, seed=1)
        self.key, self.value = (draw(device, dtype, num_keys, sizes.groups, sizes.width, seed=seed) for seed in (2, 3))
        self.gradient = draw(device, dtype, num_queries, sizes.heads, sizes.width, seed=4)
        gates = draw(device, torch.float32, num_queries, sizes.index_heads, seed=6) * sizes.index_width**-0.5
        index_query = draw(device, dtype, num_queries, sizes.index_heads, sizes.index_width, seed=5)
        self.index = [index_query, gates, draw(device, dtype, num_keys, sizes.index_width, seed=7)]
        self.rows = torch.linspace(0, num_queries - 1, sizes.num_checked, device=device).long()
        self.lists = pooled_lists(self.shape, device)
        self.scale = sizes.width**-0.5
        self.unions = build_unions(self.lists, num_keys)
        self.keys = float(self.unions.counts_N.sum())
        arguments = (self.query, self.key, self.value, self.lists, self.scale, self.unions)
        self.output, self.lse = sparse_attention_with_lse(*arguments)
        self.name = f"{self.shape.name}, {self.keys / self.unions.counts_N.shape[0]:.0f} keys a union"

    def backward(self, gradient: Tensor, is_deterministic: bool, has_probabilities: bool) -> Gradients:
        tensors = (self.query, self.key, self.value, self.unions, self.output, self.lse, gradient, self.scale)
        top_k = self.shape.top_k if has_probabilities else None
        return sparse_attention_backward(*tensors, is_deterministic=is_deterministic, top_k=top_k)

    def backward_cases(self, square: Peer, square_pairs: float) -> None:
        """As it is, with the indexer's target, and with the same bits on every run."""
        sizes, pairs = self.sizes, self.shape.causal_pairs
        peer = Peer(f"{square.name}, scaled by pairs", square.milliseconds * pairs / square_pairs)
        work = Work(
            flops=10 * sizes.width * sizes.heads * TILE * self.keys,
            # Keys' and values' gradients in float32.
            added_bytes=8 * sizes.width * sizes.groups * self.keys,
        )
        for is_deterministic, has_probabilities in ((False, False), (False, True), (True, False)):
            kind = ", deterministic" if is_deterministic else ", with probabilities" if has_probabilities else ""
            is_plain = not kind
            case = Case(
                f"sparse_attention_backward{kind}",
                self.name,
                (partial(self.backward, self.gradient, is_deterministic, has_probabilities),),
                partial(self.check_backward, is_deterministic, has_probabilities),
                work,
                peer=peer,
                goal=BACKWARD_GOAL if is_plain else None,
                goal_tflops=BACKWARD_TFLOPS if is_plain else None,
            )
            self.report.case(case)

    def check_backward(self, is_deterministic: bool, has_probabilities: bool) -> None:
        rows, gradient = self.rows, torch.zeros_like(self.gradient)
        gradient[rows] = self.gradient[rows]
        made = self.backward(gradient, is_deterministic, has_probabilities)
        leaves = [x.detach().float().requires_grad_() for x in (self.query[rows], self.key, self.value)]
        twin = reference.sparse_attention(*leaves, self.lists[rows], self.scale)
        expected = torch.autograd.grad(twin, leaves, gradient[rows].float())
        found = (made.query_THD[rows], made.key_SGD, made.value_SGD)
        compare_all("backward", list(zip(("dQ", "dK", "dV"), found, expected, strict=True)), self.tolerance)
        if made.probabilities_TK is not None:
            target = reference_learning.selected_probabilities(self.query[rows], self.key, self.lists[rows], self.scale)
            compare_all("backward", [("probabilities", made.probabilities_TK[rows], target)], self.tolerance)
        if is_deterministic:
            again = self.backward(gradient, True, False)
            for name, one, other in zip(("dQ", "dK", "dV"), made[:3], again[:3], strict=True):
                must_equal(f"backward once more, {name}", other, one)

    def loss_case(self) -> None:
        """The indexer's loss on the selected keys, forward and backward."""
        report, lists, rows = self.report, self.lists, self.rows
        target = selected_probabilities(self.query, self.key, lists, self.scale, unions=self.unions, lse_TH=self.lse)
        weights = torch.zeros(self.shape.num_queries, device=report.device)
        weights[rows] = 1.0

        def loss(*leaves: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
            return sparse_indexer_loss(target, *leaves, lists, weights, self.unions)

        def twin(*leaves: Tensor) -> tuple[Tensor, Tensor]:
            index_query, gates, index_key = leaves
            plain = reference_learning.sparse_indexer_loss
            return plain(target[rows], index_query, gates, index_key, lists[rows], weights[rows])

        def check() -> None:
            found = gradients_of(partial(loss, weights=weights), self.index, None)
            expected = gradients_of(twin, [self.index[0][rows], self.index[1][rows], self.index[2]], torch.float32)
            made = [found[0][rows], found[1][rows], found[2][rows], found[3]]
            names = ("divergence", "d query", "d gates", "d key")
            compare_all("sparse_indexer_loss", list(zip(names, made, expected, strict=True)), self.tolerance)

        flops = 2 * self.index[0][0].numel() * TILE * self.keys
        # Scores, then scores again and two products.
        case = Case(
            "sparse_indexer_loss, forward + backward",
            self.name,
            (partial(gradients_of, loss, self.index, None),),
            check,
            Work(flops=4 * flops, added_bytes=4 * self.sizes.index_width * self.keys),
        )
        report.case(case)


def warm_up_cases(report: Report, sizes: Sizes, square: Peer) -> None:
    """The indexer's loss on all keys, forward and backward, with and without the attention's log-sum-exp at hand."""
    device, length = report.device, sizes.warm_up_length
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    query = draw(device, dtype, length, sizes.heads, sizes.width, seed=1)
    key = draw(device, dtype, length, sizes.groups, sizes.width, seed=2)
    gates = draw(device, torch.float32, length, sizes.index_heads, seed=6) * sizes.index_width**-0.5
    index_query = draw(device, dtype, length, sizes.index_heads, sizes.index_width, seed=5)
    index = [index_query, gates, draw(device, dtype, length, sizes.index_width, seed=7)]
    positions, scale = torch.arange(length, device=device), sizes.width**-0.5
    rows = torch.linspace(0, length - 1, sizes.num_checked, device=device).long()
    weights = torch.zeros(length, device=device)
    weights[rows] = 1.0
    lse = attention_lse(query, key, positions, scale)

    def loss(*leaves: Tensor, weights: Tensor | None = None, lse: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return dense_indexer_loss(query, key, *leaves, positions, scale, None, weights, lse)

    def twin(*leaves: Tensor) -> tuple[Tensor, Tensor]:
        plain = reference_learning.dense_indexer_loss
        return plain(query[rows], key, *leaves, positions[rows], scale, None, weights[rows])

    def check(lse: Tensor | None) -> None:
        found = gradients_of(partial(loss, weights=weights, lse=lse), index, None)
        expected = gradients_of(twin, [index[0][rows], index[1][rows], index[2]], torch.float32)
        made = [found[0][rows], found[1][rows], found[2][rows], found[3]]
        names = ("divergence", "d query", "d gates", "d key")
        tolerance = 1.2e-2 if device == "cuda" else 1e-4
        compare_all("dense_indexer_loss", list(zip(names, made, expected, strict=True)), tolerance)

    pairs = Shape(length, length, 1).causal_pairs
    index_flops = 4 * 2 * sizes.index_heads * sizes.index_width * pairs
    for is_given in (False, True):
        its_lse = lse if is_given else None
        products = 1 if is_given else 2
        case = Case(
            "dense_indexer_loss, forward + backward" + (", log-sum-exp given" if is_given else ""),
            f"{length} x {length}",
            (partial(gradients_of, partial(loss, lse=its_lse), index, None),),
            partial(check, its_lse),
            Work(flops=index_flops + products * 2 * sizes.heads * sizes.width * pairs),
            peer=square,
            goal=WARM_UP_RATIO * square.milliseconds if square.milliseconds == square.milliseconds and not is_given else None,
        )
        report.case(case)


def cross_entropy_cases(report: Report, sizes: Sizes) -> None:
    """The loss over the vocabulary, beside torch's on all logits."""
    device, num_tokens = report.device, sizes.num_tokens
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    hidden = draw(device, dtype, num_tokens, sizes.model_width, seed=1).requires_grad_()
    weight = (draw(device, torch.float32, sizes.vocabulary, sizes.model_width, seed=2) * sizes.model_width**-0.5).to(dtype)
    leaves = (hidden, weight.requires_grad_())
    labels = torch.arange(num_tokens, device=device) * 7919 % sizes.vocabulary
    rows = torch.linspace(0, num_tokens - 1, sizes.num_checked, device=device).long()

    def loss(learns: bool) -> object:
        if not learns:
            with torch.no_grad():
                return cross_entropy(*leaves, labels)
        return torch.autograd.grad(cross_entropy(*leaves, labels).loss_T.mean(), leaves)

    def plain(learns: bool) -> object:
        with torch.set_grad_enabled(learns):
            total = F.cross_entropy(hidden @ weight.t(), labels)
        return torch.autograd.grad(total, leaves) if learns else total

    def check(learns: bool) -> None:
        found = cross_entropy(*leaves, labels)
        own = [hidden.detach()[rows].float().requires_grad_(), weight.detach().float().requires_grad_()]
        expected = reference_learning.cross_entropy(*own, labels[rows], None, 8 << 30)
        names = ("loss", "log-probability", "lse", "entropy")
        pairs = [(name, one[rows], other) for name, one, other in zip(names, found[:4], expected[:4], strict=True)]
        compare_all("cross_entropy", pairs, 1e-4)
        if learns:
            gradient = torch.zeros(num_tokens, device=device)
            gradient[rows] = 1.0
            mine = torch.autograd.grad(found.loss_T, leaves, gradient)
            theirs = torch.autograd.grad(expected.loss_T, own, gradient[rows])
            tolerance = 1e-2 if device == "cuda" else 1e-4
            compare_all("cross_entropy", [("dh", mine[0][rows], theirs[0]), ("dW", mine[1], theirs[1])], tolerance)

    product = Work(flops=2 * num_tokens * sizes.vocabulary * sizes.model_width)
    for learns in (False, True):
        case = Case(
            "cross_entropy, forward" + (" + backward" if learns else ""),
            f"{num_tokens} x {sizes.vocabulary}",
            (partial(loss, learns),),
            partial(check, learns),
            # Going back logits are made anew: four products, of which three would do.
            Work(flops=(4 if learns else 1) * product.flops),
            (3 if learns else 1) * product.floor(report.ceilings),
            report.peer("F.cross_entropy on all logits in bf16", partial(plain, learns)),
        )
        report.case(case)


def run(report: Report, sizes: Sizes, device: str) -> None:
    """One table."""
    report.begin("Learning")
    square, square_pairs = dense_backward(report, sizes)
    attention = Attention(report, sizes)
    attention.backward_cases(square, square_pairs)
    attention.loss_case()
    del attention
    warm_up_cases(report, sizes, square)
    cross_entropy_cases(report, sizes)
    if device == "cuda":
        torch.cuda.empty_cache()
