"""Documents hold what answering would see: every test compares with `lay_out` of the messages before the answer."""

import pickle
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch

from openkeye.common.checks import InputError
from openkeye.data.convert import Converter, DocumentLimits, to_document
from openkeye.data.packed_batch import pack
from openkeye.data.sample import Sample
from openkeye.inputs.encode import encode, lay_out
from openkeye.inputs.processor import BUNDLED_DIR, Processor
from openkeye.inputs.video import Frames
from tests.data.templates import ENDLESS, FORGETFUL, STRINGS, THINKING, TURNS, write_model
from tests.inputs.clips import even_times, make_clip, read_barcode

LIMITS = DocumentLimits(4096)
CROP = {
    "type": "function",
    "function": {"name": "crop", "description": "d", "parameters": {"type": "object", "properties": {}}},
}


@pytest.fixture(scope="module")
def bundled():
    return Processor.load(BUNDLED_DIR)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    written = {"thinking": THINKING, "turns": TURNS, "endless": ENDLESS, "forgetful": FORGETFUL, "strings": STRINGS}
    return {name: Processor.load(write_model(folder / name, template)) for name, template in written.items()}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(make_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", even_times(40, 10)).path)


def user(*parts):
    return {"role": "user", "content": parts[0] if len(parts) == 1 and isinstance(parts[0], str) else list(parts)}


def says(text, **fields):
    return {"role": "assistant", "content": text, **fields}


def text(words):
    return {"type": "text", "text": words}


def learnt_text(document, processor):
    """The learnt stretches, decoded."""
    stretches, last = [], None
    for index in document.is_learnt.nonzero()[:, 0].tolist():
        if last is None or index != last + 1:
            stretches.append([])
        stretches[-1].append(int(document.input_ids[index]))
        last = index
    return [processor.decode(ids, skip_special_tokens=False) for ids in stretches]


def conversations(document):
    """(ids, positions, learnt) of the trunk with each branch, or of the document alone."""
    (_, trunk_end), *branches = document.segments
    for start, end in branches or [(trunk_end, trunk_end)]:
        index = torch.cat([torch.arange(trunk_end), torch.arange(start, end)])
        yield document.input_ids[index], document.position_ids[:, index], document.is_learnt[index]


def assert_stands_behind(document, messages, answer, processor, **options):
    """Some conversation of the document is the prompt of `messages` and then the answer, learnt."""
    prompt = lay_out(messages, processor, **options).model_input
    wanted = torch.tensor([*prompt.input_ids.tolist(), *processor.tokenizer.encode_template(answer)])
    size = prompt.num_tokens
    for ids, positions, learnt in conversations(document):
        if torch.equal(ids[: len(wanted)], wanted) and bool(learnt[size : len(wanted)].all()) and not bool(learnt[size - 1]):
            assert torch.equal(positions[:, :size], prompt.position_ids)
            follow = int(prompt.position_ids.max()) + 1 + torch.arange(len(wanted) - size)
            assert torch.equal(positions[:, size : len(wanted)], follow.expand(3, -1))
            return
    raise AssertionError(f"no conversation of the document holds {answer!r} behind its prompt")


def test_answers_are_learnt_behind_the_prompts_of_answering(bundled, clip):
    messages = [
        {"role": "system", "content": "Be short."},
        user({"type": "video", "video": clip}, text("When?")),
        says("From 0.0 to 1.5 seconds."),
        user("And then?"),
        says("Nothing."),
    ]
    document = to_document(Sample("a:1", messages, task="t"), bundled, LIMITS)
    assert learnt_text(document, bundled) == ["From 0.0 to 1.5 seconds.<|im_end|>", "Nothing.<|im_end|>"]
    assert not document.branches and document.task == "t" and document.name == "a:1"
    assert_stands_behind(document, messages[:2], "From 0.0 to 1.5 seconds.<|im_end|>", bundled)
    assert_stands_behind(document, messages[:4], "Nothing.<|im_end|>", bundled)
    encoded = encode(messages[:2], bundled)
    assert torch.equal(document.pictures[0].patches("cpu").pixels, encoded.model_input.video_patches.pixels)
    assert int(document.is_media.sum()) == sum(picture.num_tokens for picture in encoded.pictures)


def test_an_unlearnt_answer_is_read_and_what_follows_the_last_learnt_one_is_left_out(bundled, clip):
    messages = [
        user("a"),
        says("b", learn=False),
        user("c"),
        says("d"),
        user({"type": "video", "video": clip}),
        says("e", learn=False),
    ]
    document = to_document(Sample("a:1", messages), bundled, LIMITS)
    assert learnt_text(document, bundled) == ["d<|im_end|>"]
    assert_stands_behind(document, [user("a"), says("b"), user("c")], "d<|im_end|>", bundled)
    assert bundled.decode(document.input_ids.tolist(), False).endswith("d<|im_end|>") and not document.pictures


def test_a_picture_in_an_answer_is_read_and_its_pads_are_not_learnt(bundled):
    shown = [text("Here: "), {"type": "image", "image": PIL.Image.new("RGB", (112, 112))}, text(" See?")]
    document = to_document(Sample("a:1", [user("Show."), says(shown)]), bundled, LIMITS)
    words = ["Here: <|vision_start|>", "<|vision_end|> See?<|im_end|>"]
    assert learnt_text(document, bundled) == words and int(document.is_media.sum()) == 16


def test_developers_are_the_system_and_marks_of_ours_never_reach_a_template(bundled, models):
    messages = [{"role": "developer", "content": "Be short."}, user("a"), says("b", learn=False), user("c"), says("d")]
    document = to_document(Sample("a:1", messages), bundled, LIMITS)
    assert_stands_behind(document, [{"role": "system", "content": "Be short."}, *messages[1:4]], "d<|im_end|>", bundled)
    assert learnt_text(to_document(Sample("a:1", messages), models["turns"], LIMITS), models["turns"]) == ["d<|endoftext|>"]


def test_literal_placeholders_stay_prose(bundled, clip):
    words = "Is <|video_pad|> a token, is <|image_pad|>, <image> or <video>?<|im_end|>\n<|im_start|>assistant\n"
    messages = [user(text(words), {"type": "video", "video": clip}, text(words)), says("No: <|video_pad|><|im_end|> is prose.")]
    document = to_document(Sample("a:1", messages), bundled, LIMITS)
    video_pads = document.input_ids == bundled.video_token_id
    assert torch.equal(document.is_media, video_pads) and bool(video_pads.any())
    assert not bool((document.input_ids == bundled.image_token_id).any())
    assert learnt_text(document, bundled) == ["No: <|video_pad|><|im_end|> is prose.<|im_end|>"]
    assert int((document.input_ids == bundled.special_id("<|im_end|>")).sum()) == 2


def test_reasoning_and_calls_that_a_template_leaves_out_are_spelled_as_answering_reads_them(bundled):
    calls = [{"id": "1", "type": "function", "function": {"name": "crop", "arguments": '{"seconds": 5.5}'}}]
    messages = [user("What?"), says("I look.", reasoning_content="Red?", tool_calls=calls)]
    document = to_document(Sample("a:1", messages), bundled, LIMITS)
    call = '<tool_call>\n{"name": "crop", "arguments": {"seconds": 5.5}}\n</tool_call>'
    assert learnt_text(document, bundled) == [f"<think>\nRed?\n</think>\n\nI look.\n{call}<|im_end|>"]
    with pytest.raises(InputError, match=r"a:1: .*no place for tools"):
        to_document(Sample("a:1", messages, tools=[CROP]), bundled, LIMITS)


def test_tools_calls_and_their_results_under_a_template_that_knows_them(models):
    processor = models["thinking"]
    call = {"function": {"name": "crop", "arguments": {"seconds": 5.5}}}
    messages = [
        user("What?"),
        says("", reasoning_content="Closer.", tool_calls=[call]),
        {"role": "tool", "content": "a red circle"},
        says("A circle.", reasoning_content="So red."),
    ]
    document = to_document(Sample("a:1", messages, tools=[CROP]), processor, LIMITS)
    called = (
        '<think>\nCloser.\n</think>\n\n<tool_call>\n{"name": "crop", "arguments": {"seconds": 5.5}}\n</tool_call><|im_end|>'
    )
    said = "<think>\nSo red.\n</think>\n\nA circle.<|im_end|>"
    assert learnt_text(document, processor) == [called, said] and not document.branches
    assert_stands_behind(document, messages[:1], called, processor, tools=[CROP])
    assert_stands_behind(document, messages[:3], said, processor, tools=[CROP])
    assert "# Tools" in processor.decode(document.input_ids.tolist())


def test_a_template_that_drops_earlier_thoughts_makes_a_branch_of_each_answer(models, clip):
    processor = models["thinking"]
    messages = [
        user({"type": "video", "video": clip}, text("Which?")),
        says("Red.", reasoning_content="It glows."),
        user("Sure?"),
        says("Yes.", reasoning_content="It does."),
        user("Really?"),
        says("Yes!"),
    ]
    document = to_document(Sample("a:1", messages), processor, LIMITS)
    answers = [
        "<think>\nIt glows.\n</think>\n\nRed.<|im_end|>",
        "<think>\nIt does.\n</think>\n\nYes.<|im_end|>",
        "<think>\n\n</think>\n\nYes!<|im_end|>",
    ]
    assert learnt_text(document, processor) == answers and len(document.branches) == 3
    for number, answer in enumerate(answers):
        assert_stands_behind(document, messages[: 2 * number + 1], answer, processor)
    # Every learnt token has somebody in its own segment to predict it.
    assert document.num_learnt == int(document.is_learnt.sum()) == pack([document]).num_learnt


def test_pictures_behind_a_rewritten_turn_are_refused_with_the_mend(models, clip):
    later = [user({"type": "video", "video": clip}, text("And here?")), says("No.")]
    with pytest.raises(InputError, match=r'a:1: .*rewrites earlier turns.*"learn": false'):
        to_document(Sample("a:1", [user("Hm?"), says("Red."), *later]), models["thinking"], LIMITS)
    document = to_document(Sample("a:1", [user("Hm?"), says("Red.", learn=False), *later]), models["thinking"], LIMITS)
    assert learnt_text(document, models["thinking"]) == ["<think>\n\n</think>\n\nNo.<|im_end|>"]


def test_a_template_with_another_end_and_a_seam_inside_a_word(models):
    processor = models["turns"]
    messages = [user("a"), says("b c"), user("d"), says("  e")]
    document = to_document(Sample("a:1", messages), processor, LIMITS)
    assert sorted(learnt_text(document, processor)) == sorted(["b c<|endoftext|>", "  e<|endoftext|>"])
    assert_stands_behind(document, messages[:1], "b c<|endoftext|>", processor)
    assert_stands_behind(document, messages[:3], "  e<|endoftext|>", processor)


@pytest.mark.parametrize(("name", "words"), [("endless", "learn to stop"), ("forgetful", "its own generation prompt")])
def test_templates_that_hide_where_an_answer_begins_or_ends_are_refused(models, name, words):
    with pytest.raises(InputError, match=f"a:1: message 1: .*{words}"):
        to_document(Sample("a:1", [user("a"), says("b")]), models[name], LIMITS)


@pytest.mark.parametrize("model", ["bundled", "thinking"])
def test_branches_go_on_from_the_video_as_conversations_of_their_own_would(bundled, models, clip, model):
    processor = bundled if model == "bundled" else models[model]
    trunk = [user({"type": "video", "video": clip})]
    questions = ["When is it?", "When was it?", "When?"]
    branches = [[user(question), says(f"{number}.")] for number, question in enumerate(questions)]
    branches[2] += [user("Sure?"), says("No.")]
    document = to_document(Sample("a:1", trunk, branches), processor, LIMITS)
    last_of_trunk = int(document.input_ids[document.branches[0] - 1])
    assert last_of_trunk == processor.special_id("<|vision_end|>")
    thought = "" if model == "bundled" else "<think>\n\n</think>\n\n"
    for number, question in enumerate(questions):
        asked = [user({"type": "video", "video": clip}, text(question))]
        assert_stands_behind(document, asked, f"{thought}{number}.<|im_end|>", processor)
    assert_stands_behind(document, [*asked, says("2."), user("Sure?")], f"{thought}No.<|im_end|>", processor)
    assert len(document.branches) == (3 if model == "bundled" else 4)
    assert document.num_learnt == int(document.is_learnt.sum())


@pytest.mark.parametrize("model", ["bundled", "thinking"])
def test_branches_behind_an_answer_learn_the_trunk_once(bundled, models, model):
    processor, thought = (bundled, "") if model == "bundled" else (models[model], "<think>\n\n</think>\n\n")
    trunk = [user("Look."), says("I see.")]
    branches = [[user(f"Question {number}?"), says(f"{number}.")] for number in range(2)]
    document = to_document(Sample("a:1", trunk, branches), processor, LIMITS)
    assert learnt_text(document, processor) == [f"{thought}{words}<|im_end|>" for words in ("I see.", "0.", "1.")]
    assert_stands_behind(document, trunk[:1], f"{thought}I see.<|im_end|>", processor)
    for number in range(2):
        assert_stands_behind(document, [*trunk, branches[number][0]], f"{thought}{number}.<|im_end|>", processor)
    # Behind an answer that stays as it was, branches share it; one that is rewritten is a branch itself.
    assert len(document.branches) == (2 if model == "bundled" else 3)
    assert document.num_learnt == int(document.is_learnt.sum())


def test_long_videos_are_cut_to_their_beginning(bundled, clip):
    messages = [user({"type": "video", "video": clip, "start": 1.0}, text("When?")), says("Now.")]
    document = to_document(Sample("a:1", messages), bundled, DocumentLimits(4096, max_clip_seconds=2.0))
    asked = [user({"type": "video", "video": clip, "start": 1.0, "end": 3.0}, text("When?"))]
    assert_stands_behind(document, asked, "Now.<|im_end|>", bundled)
    assert [read_barcode(picture) for picture in document.pictures[0].pixels[0]][-1] == 30
    told = Sample("a:1", messages, last_told_seconds=3.5)
    with pytest.raises(InputError, match=r"a:1: .*up to 3.5 s.*cuts it at 3 s.*max_clip_seconds"):
        to_document(told, bundled, DocumentLimits(4096, max_clip_seconds=2.0))
    pictures = [PIL.Image.new("RGB", (112, 112))] * 20
    frames = Frames(np.zeros((20, 112, 112, 3), np.uint8), [n / 2 for n in range(20)], "frames", 10.0)
    for video in (pictures, frames):
        sample = Sample("a:1", [user({"type": "video", "video": video}, text("?")), says("!")])
        document = to_document(sample, bundled, DocumentLimits(4096, max_clip_seconds=2.0))
        assert document.pictures[0].num_pictures == 5


def test_a_budget_of_tokens_holds_for_all_videos_and_a_samples_own_options_for_it(bundled, clip):
    messages = [user({"type": "video", "video": clip}, {"type": "video", "video": clip}, text("?")), says("!")]
    document = to_document(Sample("a:1", messages), bundled, DocumentLimits(4096, video_tokens=128))
    assert int(document.is_media.sum()) == 8 * 15
    assert [len(part) for part in document.pictures[0].pixels] == [4, 4]
    document = to_document(Sample("a:1", messages, video_options={"nframes": 2}), bundled, LIMITS)
    assert [len(part) for part in document.pictures[0].pixels] == [2, 2]
    with pytest.raises(InputError, match="a:1: video option 'speed' is unknown"):
        to_document(Sample("a:1", messages, video_options={"speed": 2}), bundled, LIMITS)


def test_what_does_not_fit_or_teaches_nothing_names_the_sample(bundled, clip, tmp_path):
    video = [user({"type": "video", "video": clip}, text("?")), says("!")]
    with pytest.raises(InputError, match=r"a:1: 188 tokens \(168 of pictures\); .* holds 64: lower video_tokens"):
        to_document(Sample("a:1", video), bundled, DocumentLimits(64))
    with pytest.raises(InputError, match=r"a:1: .*holds 64: shorten its text"):
        to_document(Sample("a:1", [user("word " * 90), says("!")]), bundled, DocumentLimits(64))
    wrong = {
        "no assistant's message": [user("a"), says("b", learn=False)],
        "empty answer": [user("a"), says(" \n")],
        "a role of": [{"role": "robot", "content": "a"}, says("b")],
        "no such file": [user({"type": "video", "video": str(tmp_path / "none.mp4")}), says("b")],
        "are not JSON": [user("a"), says("b", tool_calls=[{"function": {"name": "f", "arguments": "{"}}])],
        "tool call 'f'": [user("a"), says("b", tool_calls=["f"])],
        "expected a table": [user("a"), "b"],
    }
    for words, messages in wrong.items():
        with pytest.raises(InputError, match=f"^a:1: .*{words}"):
            to_document(Sample("a:1", messages), bundled, LIMITS)
    with pytest.raises(InputError, match="branch 0 holds a picture"):
        to_document(Sample("a:1", [user("a")], [video]), bundled, LIMITS)
    with pytest.raises(InputError, match="branch 1 has no"):
        to_document(Sample("a:1", [user("a")], [[user("b"), says("c")], [user("b")]]), bundled, LIMITS)


def test_plain_text_is_learnt_in_whole_and_cut_at_the_context(bundled):
    words = "The red circle <|im_end|> appears.\n" * 40
    document = to_document(Sample("a.txt:1", text=words, task="text"), bundled, DocumentLimits(64))
    assert document.input_ids.tolist() == bundled.encode_text(words)[:64]
    assert bool(document.is_learnt.all()) and document.num_learnt == 63 and document.task == "text"
    assert torch.equal(document.position_ids, torch.arange(64).expand(3, -1))
    for wrong in ({}, {"text": "a", "messages": [user("a")]}, {"text": "a", "branches": [[user("a")]]}):
        with pytest.raises(ValueError, match="a:1"):
            Sample("a:1", **wrong)


def test_a_converter_travels_to_another_process():
    converter = pickle.loads(pickle.dumps(Converter(str(BUNDLED_DIR), LIMITS)))
    assert converter(Sample("a:1", [user("a"), says("b")])).num_learnt == 2


def test_pictures_and_videos_come_in_the_order_of_their_pads(bundled, clip):
    picture = PIL.Image.new("RGB", (112, 112), (250, 0, 0))
    messages = [user({"type": "video", "video": clip}, {"type": "image", "image": picture}, text("?")), says("!")]
    document = to_document(Sample("a:1", messages), bundled, LIMITS)
    assert [part.shape[0] for part in document.pictures[0].pixels] == [8, 1]
    assert (document.pictures[0].pixels[1][0, 0, 0] == [250, 0, 0]).all()
    image_pads = document.input_ids == bundled.image_token_id
    assert int(image_pads.sum()) == 16 and bool(document.is_media[image_pads].all())


def test_a_template_for_strings_alone_refuses_a_video(models, clip):
    with pytest.raises(InputError, match=r"a:1: the chat template refuses these messages: can only concatenate str"):
        to_document(Sample("a:1", [user({"type": "video", "video": clip}), says("b")]), models["strings"], LIMITS)
    turns = [user("a"), says("b"), user("c"), says("d", learn=None)]
    document = to_document(Sample("a:1", turns), models["strings"], LIMITS)
    assert learnt_text(document, models["strings"]) == ["<|im_start|>b<|im_end|>", "<|im_start|>d<|im_end|>"]


def test_a_text_model_learns_chats_and_refuses_pictures(models, clip):
    blind = replace(models["turns"], image_token_id=-1, video_token_id=-1)
    document = to_document(Sample("a:1", [user("a"), says("b c")]), blind, LIMITS)
    assert learnt_text(document, blind) == ["b c<|endoftext|>"] and not document.pictures and not bool(document.is_media.any())
    with pytest.raises(InputError, match=r"a:1: .*places 0 videos where the messages hold 1"):
        to_document(Sample("a:1", [user({"type": "video", "video": clip}), says("b")]), blind, LIMITS)
