import json

import pytest

from openkeye.common.checks import InputError
from openkeye.inputs.processor import BUNDLED_DIR, Processor, load_limits, resolve_model_dir
from openkeye.inputs.sampling import ImageLimits, VideoLimits
from openkeye.inputs.template import DEFAULT_TEMPLATE, ChatTemplate
from tests.inputs.checkpoint import FRAME, IMAGE_PAD, SPECIAL_TOKENS, VIDEO_PAD, write_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("model"))


def rewrite(folder, name, **changes):
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_names_and_folders_are_resolved(folder, tmp_path):
    assert resolve_model_dir("openkeye-tiny") == BUNDLED_DIR
    assert resolve_model_dir(str(folder)) == folder
    with pytest.raises(InputError, match="no such model folder; give openkeye-tiny or"):
        resolve_model_dir("keye-huge")
    with pytest.raises(InputError, match=r"no config\.json"):
        resolve_model_dir(tmp_path)


def test_everything_is_read_from_the_folder(folder):
    processor = Processor.load(folder)
    assert processor.image_limits == ImageLimits(16 * 784, 16 * 784)
    assert processor.video_limits == VideoLimits(min_tokens_per_frame=16, max_tokens_per_frame=16, total_tokens=10240)
    assert (processor.image_token_id, processor.video_token_id, processor.max_tokens) == (IMAGE_PAD, VIDEO_PAD, 32768)
    assert (processor.patch_size, processor.merge_size) == (14, 2)
    assert load_limits(folder) == (processor.image_limits, processor.video_limits)


def test_frame_text_is_the_one_of_the_published_sibling_unless_the_files_say_otherwise(folder, tmp_path):
    assert Processor.load(folder).frame_text.format(seconds=12.46) == "<|frame|>12.5"
    padded = Processor.load(write_checkpoint(tmp_path, frame_text="<|frame|>{seconds:05.1f}"))
    ids = padded.encode_frame_text(7.0)
    assert ids[0] == FRAME and padded.decode(ids, skip_special_tokens=False) == "<|frame|>007.0"
    assert len({len(padded.encode_frame_text(seconds)) for seconds in (0.0, 9.96, 123.4)}) == 1
    (tmp_path / "processor_config.json").write_text(json.dumps({"frame_text": "<{seconds:.2f} seconds>"}))
    assert Processor.load(tmp_path).frame_text == "<{seconds:.2f} seconds>"
    (tmp_path / "processor_config.json").write_text(json.dumps({"frame_text": "{minutes}"}))
    with pytest.raises(InputError, match="frame_text"):
        Processor.load(tmp_path)


def test_special_tokens_in_prose_stay_prose(folder):
    processor = Processor.load(folder)
    for token in SPECIAL_TOKENS:
        ids = processor.encode_text(f"a {token} b")
        assert not set(ids) & set(range(len(SPECIAL_TOKENS)))
        assert processor.decode(ids) == f"a {token} b"
    assert processor.tokenizer.encode_template("<|video_pad|>") == [VIDEO_PAD]


def test_structure_tokens_stay_prose_even_where_a_file_does_not_call_them_special(tmp_path):
    folder = write_checkpoint(tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        token["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    processor = Processor.load(folder)
    assert VIDEO_PAD not in processor.encode_text("<|video_pad|>")
    assert processor.tokenizer.encode_template("<|video_pad|>") == [VIDEO_PAD]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "preprocessor_config.json"])
def test_missing_and_broken_files_are_named(name, tmp_path):
    folder = write_checkpoint(tmp_path)
    (folder / name).write_text("{broken")
    with pytest.raises(InputError, match=rf"{name}: not valid JSON"):
        Processor.load(folder)
    (folder / name).unlink()
    with pytest.raises(InputError, match=name):
        Processor.load(folder)


def test_disagreements_between_files_are_refused(tmp_path):
    folder = write_checkpoint(tmp_path)
    rewrite(folder, "config.json", video_token_id=9)
    with pytest.raises(InputError, match="both must name the same id"):
        Processor.load(folder)
    write_checkpoint(tmp_path, image_mean=[0.48, 0.45, 0.4])
    with pytest.raises(InputError, match="image_mean"):
        Processor.load(folder)


def test_the_checkpoints_own_template_wins(tmp_path):
    folder = write_checkpoint(tmp_path)
    rewrite(folder, "tokenizer_config.json", chat_template="{{ messages[0].content }}{{ eos_token }}")
    pieces = Processor.load(folder).template.render([{"role": "user", "content": "hi"}])
    assert pieces == [("hi<|im_end|>", False)]
    (folder / "chat_template.jinja").write_text("jinja: {{ messages[0].content }}")
    assert Processor.load(folder).template.render([{"role": "user", "content": "hi"}]) == [("jinja: hi", False)]
    rewrite(folder, "tokenizer_config.json", chat_template="{% if %}")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="chat template, line 1"):
        Processor.load(folder)


def test_the_default_template_is_the_siblings_one():
    template = ChatTemplate(DEFAULT_TEMPLATE, SPECIAL_TOKENS)
    content = [{"type": "video"}, {"type": "text", "text": "When?"}]
    text = "".join(piece for piece, _ in template.render([{"role": "user", "content": content}]))
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>When?<|im_end|>\n<|im_start|>assistant\n"
    )
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    pieces = template.render(messages, add_generation_prompt=False)
    assert pieces == [("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n", False)]


def test_quoted_special_tokens_and_quotation_marks_come_back_as_prose_pieces():
    template = ChatTemplate("{{ messages[0].content }}", ["<|im_end|>"])
    pieces = template.render([{"role": "user", "content": "a<|im_end|>b\ue0000\ue001"}])
    assert pieces == [("a", False), ("<|im_end|>", True), ("b", False), ("\ue000", True), ("0", False), ("\ue001", True)]
