"""What a pass says of its tokens: log-probabilities, entropies, supports, routes; however rollouts are laid out."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import openkeye.rl.policy_model
from openkeye.kernels.reference import route
from openkeye.kernels.reference_learning import route_as
from openkeye.model.keye import KeyeModel
from openkeye.model.past import PlainPast
from openkeye.rl.learner_pack import LearnerPack, LearnerSample, join_groups, make_packs
from openkeye.rl.policy_model import LogitsAt, PolicyModel, PolicyOutput, PolicyPass
from openkeye.train.initialise import initialise
from tests.rl.toy_rollouts import toy_group, with_routes
from tests.train.toy_runs import TOY, VOCABULARY

EXPERTS = (TOY.num_experts, TOY.num_experts_per_tok)


@pytest.fixture
def policy() -> PolicyModel:
    keye = KeyeModel(TOY)
    initialise(keye, seed=3)
    for name, parameter in keye.named_parameters():
        if name.endswith("mlp.gate.weight"):
            # Routers that tell experts apart.
            torch.nn.init.normal_(parameter, std=0.5, generator=torch.Generator().manual_seed(1))
    return PolicyModel(keye)


def packed(samples: Sequence[LearnerSample], joins: bool = True, max_tokens: int = 1000) -> list[LearnerPack]:
    return make_packs(join_groups(samples, max_tokens, joins), max_tokens, TOY.indexer.top_k, TOY.num_hidden_layers, EXPERTS)


def run(policy: PolicyModel, pack: LearnerPack, attention: str = "sparse", support: Tensor | None = None) -> PolicyOutput:
    return policy(pack.batch, PolicyPass(attention, keeps_vectors=True), support, pack.routes)


def by_rollout(pack: LearnerPack, values: Tensor) -> dict[str, list[float]]:
    return {
        str(member.rollout.id): values[pack.tokens.segments == number].tolist() for number, member in enumerate(pack.members)
    }


def all_logprobs(policy: PolicyModel, packs: Sequence[LearnerPack], attention: str = "sparse") -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for pack in packs:
        found |= by_rollout(pack, run(policy, pack, attention).logprobs.detach())
    return found


def logits_alone(policy: PolicyModel, sample: LearnerSample, attention: str = "sparse") -> Tensor:
    """[T, V] of the whole rollout by the plain walk: one sequence, all logits."""
    keye, document = policy.keye, sample.document
    embeds = keye.model.embed_tokens(document.input_ids)
    if document.pictures:
        vectors = keye.encode_patches(document.pictures[0].patches("cpu"))
        embeds = torch.cat([vectors, embeds[len(vectors) :]])
    return keye.logits(keye(embeds, document.position_ids, PlainPast(TOY.indexer.top_k, attention)))


@pytest.mark.parametrize("attention", ["sparse", "dense"])
@pytest.mark.parametrize("has_picture", [True, False])
def test_log_probabilities_are_those_of_each_rollout_alone(policy: PolicyModel, attention: str, has_picture: bool):
    samples = [*toy_group(0, has_picture=has_picture), *toy_group(1, num_prompt=9)]
    (pack,) = packed(samples)
    assert len(pack.batch.layout.spans) == 2 and len(pack.batch.layout.spans[0].branches) == 4
    output = run(policy, pack, attention)
    found, entropies = by_rollout(pack, output.logprobs.detach()), by_rollout(pack, output.entropy)
    for sample in samples:
        first = sample.num_prompt - 1
        logprobs = logits_alone(policy, sample, attention)[first:-1].log_softmax(-1).detach()
        ids = torch.from_numpy(sample.rollout.output_ids).long()
        name = str(sample.rollout.id)
        assert found[name] == pytest.approx(logprobs.gather(1, ids[:, None])[:, 0].tolist(), abs=2e-6)
        assert entropies[name] == pytest.approx(-(logprobs.exp() * logprobs).sum(-1).numpy(), abs=2e-5)


def test_joining_and_packing_change_nothing(policy: PolicyModel):
    samples = [with_routes(one, 1) for number in range(3) for one in toy_group(number, has_picture=number == 1)]
    joined = all_logprobs(policy, packed(samples))
    apart = all_logprobs(policy, packed(samples, joins=False))
    small = packed(samples, max_tokens=40)
    assert len(small) > 1 and joined.keys() == apart.keys()
    for other in (apart, all_logprobs(policy, small)):
        assert all(other[name] == pytest.approx(joined[name], abs=2e-6) for name in joined)


def test_a_prompt_is_computed_once(policy: PolicyModel):
    samples = toy_group(0, size=5, num_prompt=20, num_output=4)
    (pack,) = packed(samples)
    assert pack.batch.num_tokens == 19 + 5 * 5
    # Branches do not begin before the trunk's last token, and their positions go on from it.
    span = pack.batch.layout.spans[0]
    assert span.trunk_end == 19 and [pack.batch.position_ids[0, start].item() for start in span.branches] == [19] * 5


def test_prompts_that_differ_are_not_joined():
    first, second = toy_group(0, size=2)
    other = replace(second.rollout, prompt_ids=second.rollout.prompt_ids[::-1].copy())
    ids = torch.from_numpy(np.concatenate([other.prompt_ids, other.output_ids]).astype(np.int64))
    second = replace(second, rollout=other, document=replace(second.document, input_ids=ids))
    assert len(join_groups([first, second], 1000)) == 2


def test_supports_are_log_probabilities_of_their_tokens_with_gradients(policy: PolicyModel, monkeypatch: pytest.MonkeyPatch):
    # Slabs of two rows.
    monkeypatch.setattr(openkeye.rl.policy_model, "SLAB_BYTES", 2 * 4 * 3 * TOY.hidden_size)
    samples = toy_group(0, size=2, num_output=7)
    (pack,) = packed(samples)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (14, 3), generator=generator)
    ids[5, 1:], ids[6] = -1, -1
    output = run(policy, pack, support=ids)
    assert output.support is not None
    direction = torch.randn(14, 3, generator=generator)
    names = ("lm_head.weight", "model.norm.weight", "model.layers.0.mlp.gate.weight")
    parameters = [policy.keye.get_parameter(name) for name in names]
    gradients = torch.autograd.grad((output.support * direction).sum(), parameters)
    logprobs = torch.cat([logits_alone(policy, sample)[sample.num_prompt - 1 : -1].log_softmax(-1) for sample in samples])
    expected = torch.where(ids < 0, 0.0, logprobs.gather(1, ids.clamp_min(0)))
    assert torch.allclose(output.support, expected, atol=2e-6)
    assert not bool(output.support[6].any()) and not bool(output.support[5, 1:].any())
    for found, known in zip(gradients, torch.autograd.grad((expected * direction).sum(), parameters), strict=True):
        assert torch.allclose(found, known, atol=1e-5), float((found - known).abs().max())


def test_logits_at_ids_in_double_precision():
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(5, 6, generator=generator, dtype=torch.float64).requires_grad_()
    head = torch.randn(9, 6, generator=generator, dtype=torch.float64).requires_grad_()
    ids = torch.tensor([[0, 3], [3, 3], [-1, 8], [1, 2], [-1, -1]])
    assert torch.autograd.gradcheck(lambda h, w: LogitsAt.apply(h, w, ids), (hidden, head))


def test_the_label_of_a_support_has_the_log_probability_of_the_label(policy: PolicyModel):
    (pack,) = packed(toy_group(0))
    labels = pack.batch.labels[pack.batch.learnt_positions][:, None]
    output = run(policy, pack, support=labels)
    assert output.support is not None and torch.allclose(output.support[:, 0], output.logprobs, atol=1e-6)


def test_pictures_once_encoded_need_not_be_encoded_again(policy: PolicyModel, monkeypatch: pytest.MonkeyPatch):
    (pack,) = packed(toy_group(0, has_picture=True))
    first = run(policy, pack)
    monkeypatch.setattr(policy.keye, "encode_patches", None)
    again = policy(pack.batch, PolicyPass("sparse"), vectors_MD=first.vectors)
    assert torch.equal(first.logprobs, again.logprobs) and again.vectors is None


# Routes


def test_replaying_ones_own_choice_changes_no_bit():
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(2))
    weights, ids = route(logits, 3, True)
    again, same = route_as(logits, ids.to(torch.int16), True)
    assert torch.equal(weights, again) and torch.equal(ids, same)
    live, own = route_as(logits, torch.full((50, 3), -1, dtype=torch.int16), True)
    assert torch.equal(weights, live) and torch.equal(ids, own)


def test_gates_of_replayed_experts_come_from_the_whole_softmax():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    weights, ids = route_as(logits, torch.tensor([[3, 1]]), True)
    assert ids.tolist() == [[3, 1]]
    assert weights[0].tolist() == pytest.approx([1 / (1 + np.exp(2)), 1 / (1 + np.exp(-2))])
    whole, _ = route_as(logits, torch.tensor([[3, 1]]), False)
    assert whole[0].tolist() == pytest.approx(logits.softmax(-1)[0, [3, 1]].tolist())
    # An expert that these logits would not choose learns all the same.
    weights[0, 0].backward()
    assert logits.grad is not None and abs(float(logits.grad[0, 3])) > 0.1


def live_routes(policy: PolicyModel, sample: LearnerSample) -> np.ndarray:
    """[T, L, K]: where the policy sends a rollout's tokens, by the plain walk."""
    chosen = []
    hooks = [
        mixture.gate.register_forward_hook(lambda _, __, logits: chosen.append(route(logits, EXPERTS[1], True)[1]))
        for mixture in policy.mixtures()
    ]
    logits_alone(policy, sample)
    for hook in hooks:
        hook.remove()
    return torch.stack(chosen, dim=1).numpy().astype(np.int16)


def test_a_replay_of_live_routes_changes_nothing_and_any_other_is_told(policy: PolicyModel):
    samples = toy_group(0)
    live = [replace(one, rollout=replace(one.rollout, routes=live_routes(policy, one))) for one in samples]
    (plain,), (replayed,), (odd,) = (
        packed(samples),
        packed(live),
        packed([with_routes(one, 7, live_share=0.3) for one in samples]),
    )
    first, again, other = run(policy, plain), run(policy, replayed), run(policy, odd)
    assert torch.allclose(first.logprobs, again.logprobs, atol=1e-6) and again.num_rerouted.tolist() == [0, 0]
    assert float((first.logprobs - other.logprobs).detach().abs().max()) > 1e-3
    pairs, tokens = odd.num_replayed
    assert replayed.num_replayed == (2 * plain.batch.num_tokens, plain.batch.num_tokens)
    assert 0 < pairs < 2 * odd.batch.num_tokens and tokens <= odd.batch.num_tokens
    assert 0 < other.num_rerouted[0] <= pairs and 0 < other.num_rerouted[1] <= tokens
    # The next pass is live again.
    assert torch.equal(run(policy, plain).logprobs, first.logprobs)


def test_layers_computed_again_go_the_way_of_their_own_pass(policy: PolicyModel):
    packs = [packed([with_routes(one, seed) for one in toy_group(0)])[0] for seed in (1, 2)]
    assert not torch.equal(packs[0].routes, packs[1].routes)
    gradients = []
    for recomputes in (False, True):
        policy.recompute(recomputes, ("decoder",))
        policy.zero_grad()
        # Both forward passes come first, so that what a layer remembers is of the second.
        losses = [run(policy, pack).logprobs.sum() * weight for pack, weight in zip(packs, (1.0, -0.3), strict=True)]
        for loss in losses:
            loss.backward()
        gradients.append({name: p.grad.clone() for name, p in policy.keye.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and "model.layers.1.mlp.gate.weight" in gradients[0]
    assert all(torch.allclose(gradients[0][name], gradients[1][name], atol=1e-6) for name in gradients[0])


@pytest.mark.parametrize(
    ("row", "told"), [([1, 1], "different"), ([0, 4], "below 4"), ([-1, 2], "-1 throughout"), ([-2, -2], "different")]
)
def test_routes_that_cannot_be_are_refused(row: list[int], told: str):
    sample = with_routes(toy_group(0)[0], 1)
    assert sample.rollout.routes is not None
    routes = sample.rollout.routes.copy()
    routes[3, 1] = row
    with pytest.raises(ValueError, match=r"token 3 .* layer 1") as error:
        packed([replace(sample, rollout=replace(sample.rollout, routes=routes))])
    assert told in str(error.value)
    with pytest.raises(ValueError, match=r"expected \[2, 2\]"):
        packed([replace(sample, rollout=replace(sample.rollout, routes=routes[:, :1]))])
