"""Identities of the estimators, in float64 over whole distributions: expectations are sums, so nothing here is noise."""

from functools import partial

import pytest
import torch
from torch import Tensor

from openkeye.common.checks import InputError
from openkeye.distill.divergence import (
    NO_TOKEN,
    OVERLAP_FIGURES,
    TokenInputs,
    choose_support,
    full_kl,
    is_among,
    overlap_figures,
    sampled_losses,
    support_terms,
    token_losses,
)
from openkeye.distill.estimator_config import ESTIMATORS, EstimatorConfig

V, TOP_K = 50, 8
PLAIN = {"has_rest": False, "is_mass_weighted": False, "fallback_mass": 0.0}


class State:
    """One state: a student's logits with gradient, a teacher's distribution, and every token as the sampled one."""

    def __init__(self, seed: int, likeness: float = 0.7, dtype: torch.dtype = torch.float64, support: str = "overlap") -> None:
        generator = torch.Generator().manual_seed(seed)
        self.logits_V = 2 * torch.randn(V, generator=generator, dtype=dtype)
        noise = 2 * torch.randn(V, generator=generator, dtype=dtype)
        self.teacher_V = (likeness * self.logits_V + (1 - likeness) * noise).log_softmax(dim=-1)
        self.logits_V.requires_grad_()
        self.student_V = self.logits_V.log_softmax(dim=-1)
        student_ids, teacher_ids = (x.detach().topk(TOP_K).indices[None] for x in (self.student_V, self.teacher_V))
        self.ids_K = choose_support(support, student_ids, teacher_ids)[0]

    def every_token(self) -> TokenInputs:
        """V rows, row y with token y sampled."""
        ids_VK = self.ids_K.expand(V, -1)
        places = ids_VK.clamp(min=0)
        return TokenInputs(
            self.student_V,
            self.student_V.detach(),
            self.teacher_V,
            torch.arange(V),
            ids_VK,
            self.student_V.expand(V, -1).gather(1, places),
            self.teacher_V.expand(V, -1).gather(1, places),
        )

    def gradient(self, loss: Tensor) -> Tensor:
        """Of a loss, by the student's logits."""
        (gradient,) = torch.autograd.grad(loss, self.logits_V, retain_graph=True)
        return gradient

    def expected_gradient(self, config: EstimatorConfig) -> Tensor:
        """Over tokens sampled from the student."""
        return self.gradient((self.student_V.detach().exp() * token_losses(config, self.every_token())).sum())


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


@pytest.mark.parametrize("support", ["overlap", "student", "teacher"])
def test_literal_form_has_no_expected_gradient(support):
    for seed in range(5):
        state = State(seed, support=support)
        config = EstimatorConfig("keye_literal", support)
        tokens = state.every_token()
        assert float(support_terms(*_support(state)).advantage_n[0].abs()) > 1e-3
        assert state.expected_gradient(config).abs().max() < 1e-15
        # One token's own gradient is far from zero: pure noise.
        assert state.gradient(token_losses(config, tokens)[3]).abs().max() > 1e-4


def test_literal_form_pushes_what_is_weighted_up_down_whatever_the_teacher_says():
    state = State(1)
    weights = torch.ones(V, dtype=torch.float64)
    weights[3] = 2.0
    losses = token_losses(EstimatorConfig("keye_literal"), state.every_token())
    gradient = state.gradient((state.student_V.detach().exp() * weights * losses).sum())
    advantage = support_terms(*_support(state)).advantage_n[0]
    assert advantage < 0 < gradient[3], "descent lowers the logit of the token that counts double"


def _support(state: State) -> tuple[Tensor, Tensor, Tensor]:
    tokens = state.every_token()
    return tokens.student_nK[:1], tokens.teacher_nK[:1], tokens.support_ids_nK[:1] != NO_TOKEN


@pytest.mark.parametrize("support", ["overlap", "student", "teacher"])
def test_in_support_form_is_the_renormalised_divergence(support):
    for seed in range(5):
        state = State(seed, support=support)
        student, teacher, is_used = _support(state)
        terms = support_terms(student, teacher, is_used)
        own, given = student[is_used].log_softmax(-1), teacher[is_used].log_softmax(-1)
        plain = (own.exp() * (own - given)).sum()
        assert torch.allclose(terms.kl_n[0], plain, rtol=0, atol=1e-14)
        assert (state.gradient(terms.kl_n[0]) - state.gradient(plain)).abs().max() < 1e-15
        share = own.exp()
        direct = -(share * (teacher - student)[is_used].detach()).sum()
        assert (state.gradient(terms.kl_n[0]) - state.gradient(direct)).abs().max() < 1e-15
        assert torch.allclose(terms.advantage_n[0], -direct.detach(), atol=1e-14)
        assert torch.allclose(terms.student_mass_n[0], student[is_used].exp().sum())
        assert torch.allclose(terms.teacher_mass_n[0], teacher[is_used].exp().sum())


def test_sampled_token_against_the_baseline_goes_where_the_in_support_form_goes():
    for seed in range(5):
        state = State(seed)
        sampled = state.expected_gradient(EstimatorConfig("sampled", has_baseline=True))
        terms = support_terms(*_support(state))
        inside = state.gradient(terms.kl_n[0])
        assert cosine(sampled, inside) > 1 - 1e-12
        # The mass on the support is what they differ by, so that the weighted form is the same in size too.
        assert (sampled - terms.student_mass_n[0] * inside).abs().max() < 1e-15
        weighted = state.expected_gradient(EstimatorConfig("overlap_kl", fallback_mass=0.0, has_rest=False))
        assert (sampled - weighted).abs().max() < 1e-15
        masked = token_losses(EstimatorConfig("sampled"), state.every_token()) * torch.isin(torch.arange(V), state.ids_K)
        assert cosine(state.gradient((state.student_V.detach().exp() * masked).sum()), inside) < 0.999, "the baseline matters"


def test_sampled_and_full_have_the_gradient_of_the_whole_divergence():
    state = State(3)
    whole = (state.student_V.exp() * (state.student_V - state.teacher_V)).sum()
    expected = state.gradient(whole)
    assert (state.expected_gradient(EstimatorConfig("sampled")) - expected).abs().max() < 1e-14
    everything = torch.ones(1, V, dtype=torch.bool)
    terms = support_terms(state.student_V[None], state.teacher_V[None], everything)
    assert torch.allclose(terms.kl_n[0], whole) and (state.gradient(terms.kl_n[0]) - expected).abs().max() < 1e-14
    state.ids_K = torch.arange(V)
    assert (state.expected_gradient(EstimatorConfig("full")) - expected).abs().max() < 1e-14


@pytest.mark.parametrize("support", ["overlap", "student", "teacher"])
def test_with_the_rest_as_one_token_mass_moves_in_and_out_of_the_support(support):
    for seed in range(5):
        state = State(seed, support=support)
        used = state.ids_K[state.ids_K >= 0]

        def coarse(log_V: Tensor, used: Tensor = used) -> Tensor:
            inside = log_V[used].exp()
            return torch.cat([inside, 1 - inside.sum(dim=0, keepdim=True)])

        own, given = coarse(state.student_V), coarse(state.teacher_V)
        plain = (own * (own.log() - given.log())).sum()
        config = EstimatorConfig(support=support, fallback_mass=0.0)
        losses = token_losses(config, state.every_token())
        assert torch.allclose(losses[0], plain, rtol=0, atol=1e-13)
        assert (state.gradient(losses[0]) - state.gradient(plain)).abs().max() < 1e-14
        # The chain rule: the part inside, and the masses, which the form without the rest has no gradient of.
        terms = support_terms(*_support(state))
        masses = coarse(state.student_V)[-1], coarse(state.teacher_V)[-1]
        between = sum(a * (a / b).log() for a, b in (masses, (1 - masses[0], 1 - masses[1])))
        assert torch.allclose(plain, terms.student_mass_n[0] * terms.kl_n[0] + between, atol=1e-13)
        outside = [token for token in range(V) if token not in used]
        without = token_losses(EstimatorConfig(support=support, fallback_mass=0.0, has_rest=False), state.every_token())
        assert state.gradient(without[0])[outside].abs().max() < 1e-15 < state.gradient(losses[0])[outside].abs().max()


def test_only_with_the_rest_does_descent_bring_the_whole_divergence_down():
    """Over the student's own top k, again and again: what it takes from there has to go to where its teacher has it."""
    ends: dict[bool, list[float]] = {True: [], False: []}
    for has_rest in ends:
        for seed in range(4):
            state = State(seed, likeness=0.6)
            logits, teacher = state.logits_V.detach().clone().requires_grad_(), state.teacher_V
            config = EstimatorConfig(fallback_mass=0.0, has_rest=has_rest)
            for _ in range(200):
                own = logits.log_softmax(-1)
                ids = choose_support("student", own.detach().topk(TOP_K).indices[None], teacher.topk(TOP_K).indices[None])
                places = ids.clamp(min=0)
                row = TokenInputs(own[:1], own[:1].detach(), teacher[:1], torch.zeros(1, dtype=torch.long), ids,
                                  own[None].gather(1, places), teacher[None].gather(1, places))  # fmt: skip
                (gradient,) = torch.autograd.grad(token_losses(config, row).sum(), logits)
                logits = (logits - 2.0 * gradient).detach().requires_grad_()
            own = logits.detach().log_softmax(-1)
            before = state.student_V.detach()
            divergences = [float((log.exp() * (log - teacher)).sum()) for log in (own, before)]
            ends[has_rest].append(divergences[0] / divergences[1])
    print(ends)
    assert max(ends[True]) < 0.6 and sum(ends[True]) < 0.7 * sum(ends[False]), ends


def test_the_fallback_is_the_whole_divergences_gradient_with_less_noise():
    for seed in range(5):
        state = State(seed, likeness=0.3)
        whole = state.gradient((state.student_V.exp() * (state.student_V - state.teacher_V)).sum())
        noise = []
        for has_rest in (True, False):
            config = EstimatorConfig(fallback_mass=1.0, has_rest=has_rest)
            assert (state.expected_gradient(config) - whole).abs().max() < 1e-14
            losses = token_losses(config, state.every_token())
            each = torch.stack([state.gradient(losses[token]) for token in range(V)])
            noise.append(float((state.student_V.detach().exp() * (each - whole).square().sum(dim=1)).sum()))
        assert noise[0] < noise[1]


def test_near_the_teacher_the_overlap_form_points_where_the_whole_divergence_does():
    means = []
    for likeness in (0.97, 0.0):
        cosines = []
        for state in (State(seed, likeness) for seed in range(10)):
            whole = (state.student_V.exp() * (state.student_V - state.teacher_V)).sum()
            cosines.append(cosine(state.expected_gradient(EstimatorConfig(**PLAIN)), state.gradient(whole)))
        means.append(sum(cosines) / len(cosines))
    assert means[0] > 0.8 > 0.4 > means[1], means


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_teacher_that_is_the_student_gives_exactly_nothing_in_float32(name):
    state = State(5, likeness=1.0, dtype=torch.float32)
    state.teacher_V = state.student_V.detach().clone()
    for config in (EstimatorConfig(name), EstimatorConfig(name, **PLAIN), EstimatorConfig(name, fallback_mass=1.0)):
        losses = token_losses(config, state.every_token())
        assert bool((losses == 0).all()), losses
        assert bool((state.gradient(losses.sum()) == 0).all())


def test_empty_support_gives_nothing_and_no_nan():
    state = State(6)
    state.ids_K = torch.full((TOP_K,), NO_TOKEN)
    for name in ("keye_literal", "overlap_kl"):
        losses = token_losses(EstimatorConfig(name, **PLAIN), state.every_token())
        assert bool((losses == 0).all())
        assert bool((state.gradient(losses.sum()) == 0).all())
    # Unless the sampled token stands in for it.
    fallen = token_losses(EstimatorConfig("overlap_kl", fallback_mass=0.2), state.every_token())
    assert torch.equal(fallen, token_losses(EstimatorConfig("sampled"), state.every_token()))


def test_what_stands_outside_of_the_support_is_never_read():
    student = torch.randn(4, 6, dtype=torch.float64).log_softmax(-1).requires_grad_()
    teacher = torch.randn(4, 6, dtype=torch.float64).log_softmax(-1)
    is_used = torch.tensor([[True, False, True, True, False, False]] * 3 + [[False] * 6])
    terms = support_terms(student, teacher, is_used)
    broken = [x.detach().masked_fill(~is_used, torch.nan) for x in (student, teacher)]
    again = broken[0].requires_grad_()
    others = support_terms(again, broken[1], is_used)
    assert torch.equal(terms.kl_n, others.kl_n) and torch.equal(terms.advantage_n, others.advantage_n)
    others.kl_n.sum().backward()
    terms.kl_n.sum().backward()
    assert torch.equal(again.grad, student.grad)


def test_mass_weight_and_fallback_are_switches():
    state = State(7)
    tokens = state.every_token()
    terms = support_terms(tokens.student_nK, tokens.teacher_nK, tokens.support_ids_nK != NO_TOKEN)
    mass = float(terms.student_mass_n[0])
    assert 0.1 < mass < 0.95
    assert torch.equal(token_losses(EstimatorConfig(**PLAIN), tokens), terms.kl_n)
    inside = partial(EstimatorConfig, has_rest=False)
    assert torch.equal(token_losses(inside(fallback_mass=0.0), tokens), terms.kl_n * terms.student_mass_n)
    assert torch.equal(token_losses(inside(fallback_mass=mass - 0.01), tokens), terms.kl_n * terms.student_mass_n)
    sampled = token_losses(EstimatorConfig("sampled"), tokens)
    assert torch.equal(token_losses(inside(fallback_mass=mass + 0.01), tokens), sampled)
    assert torch.equal(token_losses(EstimatorConfig(fallback_mass=mass - 0.01), tokens), terms.coarse_kl_n)
    assert not torch.equal(token_losses(EstimatorConfig(fallback_mass=mass + 0.01), tokens), sampled)


def test_importance_window_leaves_out_tokens_that_have_moved():
    now = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64, requires_grad=True)
    then = torch.tensor([-1.0, -3.0, -1.5], dtype=torch.float64)
    teacher = torch.tensor([-0.5, -0.5, -30.0], dtype=torch.float64)
    config = EstimatorConfig("sampled", low_ratio=0.5, high_ratio=2.0, max_advantage=20.0)
    sampled_losses(config, now, teacher, then).sum().backward()
    ratio = torch.exp(torch.tensor(0.5, dtype=torch.float64))
    assert torch.allclose(now.grad, torch.tensor([-0.5, 0.0, 20.0 * float(ratio)], dtype=torch.float64))


@pytest.mark.parametrize("slab_rows", [1, 3, 100])
def test_full_divergence_in_slabs_is_the_whole_one(slab_rows):
    torch.manual_seed(0)
    hidden, head = torch.randn(7, 5, dtype=torch.float64, requires_grad=True), torch.randn(11, 5, dtype=torch.float64)
    head.requires_grad_()
    given, given_head = torch.randn(7, 4, dtype=torch.float64), torch.randn(11, 4, dtype=torch.float64)
    own, teacher = (hidden @ head.T).log_softmax(-1), (given @ given_head.T).log_softmax(-1)
    plain = (own.exp() * (own - teacher)).sum(-1)
    losses = full_kl(hidden, head, given, given_head, slab_rows)
    weights = torch.rand(7, dtype=torch.float64)
    assert torch.allclose(losses, plain)
    for one in (hidden, head):
        (a,), (b,) = (torch.autograd.grad((weights * x).sum(), one, retain_graph=True) for x in (losses, plain))
        assert torch.allclose(a, b, atol=1e-14)


def test_full_divergence_keeps_no_logits_for_the_backward_pass():
    hidden, head = torch.randn(64, 4, requires_grad=True), torch.randn(500, 4)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        full_kl(hidden, head, torch.randn(64, 4), torch.randn(500, 4), slab_rows=8)
    assert max(sizes) < 8 * 500


def test_overlap_of_two_rows_by_hand():
    student = torch.tensor([[4, 2, 9], [1, 2, 3]])
    teacher = torch.tensor([[9, 7, 4], [5, 6, 7]])
    assert choose_support("overlap", student, teacher).tolist() == [[4, -1, 9], [-1, -1, -1]]
    assert choose_support("teacher", student, teacher) is teacher and choose_support("student", student, teacher) is student
    assert is_among(student, teacher).tolist() == [[True, False, True], [False] * 3]
    own = torch.tensor([[0.5, 0.2, 0.1], [0.3, 0.3, 0.3]]).log()
    given = torch.tensor([[0.4, 0.1, 0.3], [0.1, 0.1, 0.1]]).log()
    sums = dict(zip(OVERLAP_FIGURES, overlap_figures(student, own, teacher, given).tolist(), strict=True))
    advantage = (0.5 * torch.tensor(0.8).log() + 0.1 * torch.tensor(3.0).log()) / 0.6
    wanted = {"overlap_ratio": 2 / 3, "overlap_token_advantage": float(advantage), "student_mass": 0.6, "teacher_mass": 0.7}
    assert sums == pytest.approx(wanted | {"empty_overlap": 1.0})


def test_wrong_settings_are_told():
    for words, told in (
        ({"name": "kl"}, "overlap_kl"),
        ({"support": "both"}, "teacher"),
        ({"top_k": 0}, "top_k"),
        ({"fallback_mass": 2.0}, "probability"),
        ({"low_ratio": 2.0, "high_ratio": 1.0}, "window"),
        ({"max_advantage": 0.0}, "above 0"),
    ):
        with pytest.raises(InputError, match=told):
            EstimatorConfig(**words)
    with pytest.raises(ValueError, match="supports"):
        token_losses(EstimatorConfig(), TokenInputs(torch.zeros(1), torch.zeros(1), torch.zeros(1)))
