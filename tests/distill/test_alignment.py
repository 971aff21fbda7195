"""Students and teachers with real processors of their own: what is let through, what is dropped and why."""

import asyncio
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch

from openkeye.agents.environment import Opening
from openkeye.common.checks import InputError
from openkeye.distill.alignment import (
    ProcessorReader,
    TokenizerIdentity,
    check_lengths,
    find_mismatch,
    is_finite,
    is_own_prompt,
    modality_runs,
)
from openkeye.distill.scored import ModelScorer, Scored, prompt_document
from openkeye.inputs.processor import BUNDLED_DIR, Processor
from openkeye.inputs.prompt import Prompt
from openkeye.inputs.video import Frames
from openkeye.model.past import PlainPast
from openkeye.model.weights import load_model
from openkeye.rl.rollout import Rollout, RolloutId
from openkeye.tasks.task import Example
from tests.inputs.checkpoint import write_checkpoint

TEACHERS_TEMPLATE = "You teach.\n{% for message in messages %}<|im_start|>{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}<|im_start|>"  # noqa: E501


def frames(*times: float, seed: int = 0) -> Frames:
    pixels = np.random.default_rng(seed).integers(0, 256, (len(times), 112, 112, 3), dtype=np.uint8)
    return Frames(pixels, list(times), "made", 10.0)


def example(*parts: object) -> Example:
    content = [
        {"type": "text", "text": part} if isinstance(part, str)
        else {"type": "video", "video": part} if isinstance(part, Frames)
        else {"type": "image", "image": part}
        for part in parts
    ]  # fmt: skip
    return Example("t", 0, "video", ({"role": "user", "content": content},))


PICTURE = PIL.Image.effect_noise((112, 112), 50).convert("RGB")
SHOWN = example(PICTURE, "and", frames(0.0, 0.5, 1.0), "when?")


@pytest.fixture(scope="module")
def student(tmp_path_factory) -> ProcessorReader:
    return ProcessorReader(Processor.load(write_checkpoint(tmp_path_factory.mktemp("student"))))


def read(reader: ProcessorReader, asked: Example = SHOWN) -> Prompt:
    return asyncio.run(reader.read(asked))


def mismatch(student: ProcessorReader, teacher: ProcessorReader, asked: Example = SHOWN, others: Example | None = None):
    prompts = read(student, asked), read(teacher, others or asked)
    return find_mismatch(*prompts, student.identity, teacher.identity)


def test_the_same_files_read_the_same(student, tmp_path):
    twin = ProcessorReader(Processor.load(write_checkpoint(tmp_path / "twin")))
    assert twin.identity == student.identity and mismatch(student, twin) is None
    assert read(student).num_tokens == read(twin).num_tokens


def test_another_template_and_other_frame_texts_are_let_through(student, tmp_path):
    folder = write_checkpoint(tmp_path / "teacher", frame_text="<|frame|>at {seconds:.2f}")
    (folder / "chat_template.jinja").write_text(TEACHERS_TEMPLATE)
    teacher = ProcessorReader(Processor.load(folder))
    assert read(teacher).num_tokens != read(student).num_tokens
    assert mismatch(student, teacher) is None


def test_other_tokens_and_other_special_tokens_are_told_apart(student, tmp_path):
    folder = write_checkpoint(tmp_path / "teacher", frame_text="{seconds}")
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"<|frame|>"', '"<|moment|>"'))
    assert mismatch(student, ProcessorReader(Processor.load(folder))) == "vocabulary"
    special = replace(student.identity, special_tokens="others")
    prompt = read(student)
    assert find_mismatch(prompt, prompt, student.identity, special) == "special_tokens"
    processor = Processor.load(write_checkpoint(tmp_path / "twin"))
    moved = TokenizerIdentity.of(replace(processor, image_token_id=processor.video_token_id))
    assert moved.vocabulary == student.identity.vocabulary and moved.special_tokens != student.identity.special_tokens


@pytest.mark.parametrize(
    ("others", "reason"),
    [
        (example("and", frames(0.0, 0.5, 1.0), "when?"), "pictures"),
        (example(PICTURE, "and", frames(0.0, 0.5), "when?"), "pictures"),
        (example(PICTURE, "and", frames(0.0, 0.5, 1.5), "when?"), "frame_times"),
        (example(frames(0.0, 0.5, 1.0), "and", PICTURE, "when?"), "modality_boundaries"),
    ],
)
def test_other_pictures_are_dropped(student, others, reason):
    assert mismatch(student, student, others=others) == reason


def test_other_sizes_are_dropped(student, tmp_path):
    settings = {"min_pixels": 4 * 784, "max_pixels": 4 * 784}
    teacher = ProcessorReader(Processor.load(write_checkpoint(tmp_path / "teacher", **settings)))
    assert mismatch(student, teacher) == "tokens_per_picture"


def test_other_positions_are_dropped(student):
    prompt = read(student)
    own = prompt.model_input
    flat = torch.arange(own.num_tokens).expand(3, -1)
    changed = replace(prompt, model_input=replace(own, position_ids=flat))
    assert find_mismatch(prompt, changed, student.identity, student.identity) == "positions"
    # Text that goes on one too late behind everything.
    late = own.position_ids.clone()
    late[:, prompt.pictures[-1].end_token :] += 1
    changed = replace(prompt, model_input=replace(own, position_ids=late))
    assert find_mismatch(prompt, changed, student.identity, student.identity) == "positions"
    # Rows and columns exchanged: the same room, another picture.
    picture = prompt.pictures[0]
    turned = own.position_ids.clone()
    turned[1:, picture.first_token : picture.end_token] = turned[[2, 1], picture.first_token : picture.end_token]
    changed = replace(prompt, model_input=replace(own, position_ids=turned))
    assert find_mismatch(prompt, changed, student.identity, student.identity) == "positions"


def test_runs_of_modalities_by_hand(student):
    assert modality_runs(read(student)) == ["text", "image", "text", "frame", "text", "frame", "text", "frame", "text"]
    assert modality_runs(read(student, example("only words"))) == ["text"]


def rollout_of(prompt_ids: np.ndarray, output_ids: list[int]) -> Rollout:
    count = len(output_ids)
    return Rollout(
        RolloutId("t", 0, 0, 0), prompt_ids.astype(np.int32), np.array(output_ids, np.int32), np.ones(count, bool),
        np.zeros(count, np.float32), np.zeros(count, np.int32),
    )  # fmt: skip


def test_own_prompts_are_known_by_their_ids(student):
    prompt = read(student)
    ids = prompt.model_input.input_ids.numpy()
    assert is_own_prompt(prompt, rollout_of(ids, [1])) and not is_own_prompt(prompt, rollout_of(ids[:-1], [1]))


def test_scores_of_other_lengths_or_places_never_pass():
    rollout = rollout_of(np.array([1]), [5, 6, 7])
    top = np.array([[-0.1, -3.0]] * 3, np.float32)
    scored = Scored(np.array([-0.1, -2.0, -4.0], np.float32), np.zeros((3, 2), np.float32), np.zeros((3, 2), np.int32), top)
    check_lengths(scored, rollout, 2)
    late = replace(scored, top_logprobs=np.array([[-3.0, -3.5]] * 3, np.float32))
    for wrong in (replace(scored, logprobs=scored.logprobs[1:]), replace(scored, top_ids=scored.top_ids[:2]), late):
        with pytest.raises(AssertionError):
            check_lengths(wrong, rollout, 2)
    with pytest.raises(AssertionError):
        check_lengths(scored, rollout, 3)
    assert is_finite(scored) and not is_finite(replace(scored, chosen=np.full((3, 2), np.nan, np.float32)))


def test_a_teacher_with_a_longer_prompt_scores_the_same_response_at_its_own_places(tmp_path):
    """The shift by one and by the teacher's prompt, through openkeye-tiny: against the plain pass over joined ids."""
    model = load_model(BUNDLED_DIR, dtype=torch.float32)
    processor = Processor.load(BUNDLED_DIR)
    reader = ProcessorReader(processor)
    asked = Example("t", 0, "text", ({"role": "user", "content": "when?"},))
    longer = replace(asked, messages=({"role": "system", "content": "You are a strict teacher of time."}, *asked.messages))
    response = np.array(processor.encode_text("from 0:05 to 0:07"), np.int32)
    first, second = read(reader, asked), read(reader, longer)
    assert second.num_tokens > first.num_tokens
    for prompt in (first, second):
        scored = ModelScorer(model).score(prompt, response, None, 3)
        check_lengths(scored, rollout_of(np.array([1]), response.tolist()), 0)
        document = prompt_document(prompt, response)
        hidden = model(
            model.model.embed_tokens(document.input_ids), document.position_ids, PlainPast(model.config.indexer.top_k)
        )
        log = model.logits(hidden).log_softmax(dim=-1)
        for place, token in enumerate(response.tolist()):
            assert scored.logprobs[place] == pytest.approx(float(log[prompt.num_tokens - 1 + place, token]), abs=2e-4)


def test_what_the_teacher_cannot_read_is_told(student, tmp_path):
    with pytest.raises(InputError, match="missing"):
        read(student, example(tmp_path / "missing.png", "?"))


def test_an_episodes_opening_comes_from_its_world(student):
    class World:
        num_resets = 0

        async def reset(self):
            self.num_resets += 1
            return Opening(({"role": "user", "content": f"turn {self.num_resets}"},))

    world = World()
    asked = Example("t", 0, "text", (), environment=world)
    assert "turn 1" in read(student, asked).text and world.num_resets == 1
