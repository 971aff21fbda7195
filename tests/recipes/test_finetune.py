"""The fine-tune's settings from real clips: lengths, steps, rates, what is held out."""

import json

import pytest

from openkeye.common.checks import InputError
from openkeye.data.convert import DocumentLimits, to_document
from openkeye.data.sources.folder import Folder
from openkeye.frameforge.writer import film, make_clip
from openkeye.inputs.processor import Processor
from openkeye.recipes.finetune import finetune, num_tokens
from openkeye.recipes.smoke import smoke


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five clips of 4 and 5 seconds; the first has one question, the others two."""
    folder = tmp_path_factory.mktemp("clips")
    lines = []
    for number in range(5):
        clip = make_clip(3, number, seconds=(4.0, 5.0))
        film(clip, folder / clip.name)
        questions = clip.questions[: 2 if number else 1]
        lines += [{"video": clip.name, "question": one.text, "answer": one.answer} for one in questions]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_steps_follow_from_lengths_and_epochs(folder):
    config = finetune(str(folder), num_epochs=50)
    (stage,) = config.stages
    counts = [num_tokens(Folder(folder, part="train").read(n), Processor.load("openkeye-tiny")) for n in range(4)]
    assert stage.context % 256 == 0 and stage.context - 256 < max(counts) <= stage.context
    assert stage.num_steps == pytest.approx(50 * sum(counts) / (0.85 * stage.context), abs=1)
    assert finetune(str(folder), num_epochs=1, min_steps=7).stages[0].num_steps == 7
    assert stage.attention == "sparse" and stage.trains == ("projector", "decoder", "indexer")
    assert stage.indexer_target == "selected" and config.run_dir == "finetuned-run"


def test_counted_tokens_are_those_of_the_documents_or_a_few_more(folder):
    processor, source = Processor.load("openkeye-tiny"), Folder(folder)
    for number in range(source.num_samples):
        sample = source.read(number)
        document = to_document(sample, processor, DocumentLimits(context=4096))
        assert document.num_tokens <= num_tokens(sample, processor) <= document.num_tokens + 12 * (1 + len(sample.branches))


def test_one_video_is_held_out_and_none_on_request(folder):
    config = finetune(str(folder))
    assert config.evaluates == ("held_out",)
    counts = [Folder(folder, **config.sources[name].options).num_samples for name in ("folder", "held_out")]
    assert counts == [4, 1]
    everything = finetune(str(folder), held_out_share=0.0)
    assert everything.evaluates == () and set(everything.sources) == {"folder"}


def test_fewer_frames_make_shorter_documents(folder):
    assert finetune(str(folder), fps=0.5).stages[0].context < finetune(str(folder)).stages[0].context


def test_what_trains_and_how_fast_can_be_chosen(folder):
    stage = finetune(str(folder), trains=("projector",), rate=1e-3).stages[0]
    assert stage.trains == ("projector",) and stage.rate == 1e-3 and stage.indexer_target == "none"


def test_refusals(folder, tmp_path):
    with pytest.raises(InputError, match="out_dir is 'openkeye-tiny'"):
        finetune(str(folder), out_dir="openkeye-tiny")
    (tmp_path / "a.mp4").write_bytes(b"no video")
    (tmp_path / "a.txt").write_text("A dog.")
    with pytest.raises(InputError, match=r"a\.mp4: .*not a readable video"):
        finetune(str(tmp_path))


def test_smoke_has_every_stage(folder):
    config = smoke(str(folder))
    names = ["stage-0", "stage-1", "stage-2", "stage-3", "warm-up", "adaptation", "sft"]
    assert [stage.name for stage in config.stages] == names and config.num_steps == 14
