import numpy as np
import pytest
import torch

from openkeye.distill.divergence import NO_TOKEN, TokenInputs, choose_support, token_losses
from openkeye.distill.estimator_config import ESTIMATORS, EstimatorConfig
from openkeye.distill.scored import ModelScorer, prompt_document, response_hidden
from openkeye.inputs.encode import encode
from openkeye.inputs.model_input import ModelInput
from openkeye.inputs.positions import position_ids
from openkeye.inputs.processor import BUNDLED_DIR, Processor
from openkeye.inputs.prompt import Picture, Prompt
from openkeye.model.keye import KeyeModel
from openkeye.model.past import PlainPast
from openkeye.model.weights import load_model
from tests.distill.toy_teachers import picture_prompt, response, text_prompt, write_model
from tests.train.toy_runs import TOY, VOCABULARY


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> KeyeModel:
    return load_model(write_model(tmp_path_factory.mktemp("toy") / "model", config=TOY))


def plain_logprobs(model: KeyeModel, prompt, output_ids: np.ndarray) -> torch.Tensor:
    """[T, V], all at once, by the one-shot past."""
    document = prompt_document(prompt, output_ids)
    embeds = model.model.embed_tokens(document.input_ids)
    if document.pictures:
        embeds[document.is_media] = model.encode_patches(document.pictures[0].patches("cpu"))
    hidden = model(embeds, document.position_ids, PlainPast(model.config.indexer.top_k))
    return model.logits(hidden[prompt.num_tokens - 1 : -1]).log_softmax(dim=-1)


@pytest.mark.parametrize("prompt", [text_prompt(1, 2, 3), picture_prompt()], ids=["text", "picture"])
@pytest.mark.parametrize("slab_rows", [1, 4, 256])
def test_scores_are_those_of_the_plain_pass(toy, prompt, slab_rows):
    ids = response(3)
    # In a response the pad's token is no picture.
    ids[2] = TOY.image_token_id
    chosen = np.random.default_rng(1).integers(-1, VOCABULARY, (len(ids), 5))
    scored = ModelScorer(toy, slab_rows=slab_rows).score(prompt, ids, chosen, 6)
    expected = plain_logprobs(toy, prompt, ids).numpy()
    rows = np.arange(len(ids))
    assert np.allclose(scored.logprobs, expected[rows, ids], atol=1e-5)
    assert np.allclose(scored.chosen, np.where(chosen < 0, 0, expected[rows[:, None], chosen]), atol=1e-5)
    assert np.allclose(scored.top_logprobs, -np.sort(-expected, axis=1)[:, :6], atol=1e-5)
    assert np.allclose(np.take_along_axis(expected, scored.top_ids.astype(np.int64), 1), scored.top_logprobs, atol=1e-5)
    assert scored.num_bytes == 4 * len(ids) * (1 + 5 + 6 + 6)


def test_a_response_goes_on_at_the_place_behind_its_pictures():
    """A picture of two by two takes four tokens and room for two."""
    grid = torch.tensor([[1, 4, 4]])
    ids = torch.tensor([3, *[TOY.image_token_id] * 4, 5])
    positions = position_ids(torch.cat([ids, torch.tensor([10, 11])]), grid, None, TOY.image_token_id, TOY.video_token_id)
    pixels = np.zeros((56, 56, 3), np.uint8)
    prompt = Prompt(ModelInput(ids, positions[:, :6]), "", (pixels,), (Picture(0, 1, 4, False),))
    document = prompt_document(prompt, np.array([10, 11]))
    assert torch.equal(document.position_ids, positions) and document.position_ids[0, 6] == 4
    assert document.is_media.tolist() == [False, True, True, True, True, False, False, False]
    assert document.is_learnt.tolist() == [False] * 6 + [True] * 2


def test_top_k_wider_than_the_vocabulary_is_all_of_it(toy):
    scored = ModelScorer(toy).score(text_prompt(1, 2), response(1, 3), None, 10_000)
    assert scored.top_ids.shape == (3, VOCABULARY) and scored.chosen.shape == (3, 0)
    with pytest.raises(ValueError, match="without tokens"):
        ModelScorer(toy).score(text_prompt(1, 2), response(1, 0), None, 3)


def own_tokens(model: KeyeModel, prompt, output_ids: np.ndarray, support: str) -> TokenInputs:
    """A student with gradient, scored by itself."""
    hidden = response_hidden(model, prompt_document(prompt, output_ids), prompt.num_tokens)
    logits = model.logits(hidden).float()
    lse = logits.logsumexp(dim=-1, keepdim=True)
    first = ModelScorer(model).score(prompt, output_ids, None, 8)
    scored = ModelScorer(model).score(prompt, output_ids, first.top_ids, 8)
    ids = choose_support(support, torch.from_numpy(first.top_ids).long(), torch.from_numpy(scored.top_ids).long())
    sampled = torch.from_numpy(output_ids).long()
    own = (logits.gather(1, sampled[:, None]) - lse)[:, 0]
    student = logits.gather(1, ids.clamp(min=0)) - lse
    given = torch.from_numpy(scored.chosen if support != "teacher" else scored.top_logprobs)
    assert bool((ids != NO_TOKEN).all())
    return TokenInputs(own, own.detach(), torch.from_numpy(scored.logprobs), sampled, ids, student, given)


def check_self_distillation(model: KeyeModel, prompt, output_ids: np.ndarray) -> None:
    """Exactly nothing to learn from oneself."""
    model.requires_grad_()
    for support in ("overlap", "student", "teacher"):
        for name in ESTIMATORS:
            losses = token_losses(EstimatorConfig(name, support), own_tokens(model, prompt, output_ids, support))
            assert bool((losses == 0).all()), (name, support, losses)
            losses.sum().backward()
            assert all(not one.grad.any() for one in model.parameters() if one.grad is not None)
    model.requires_grad_(False)


def test_a_toy_learns_nothing_from_itself(toy):
    for prompt in (text_prompt(1, 2, 3), picture_prompt()):
        check_self_distillation(toy, prompt, response(5))


def test_openkeye_tiny_learns_nothing_from_itself():
    model = load_model(BUNDLED_DIR, dtype=torch.float32)
    prompt = encode([{"role": "user", "content": "when does the red circle appear?"}], Processor.load(BUNDLED_DIR))
    check_self_distillation(model, prompt, np.array([40, 41, 99, 300, 2]))
