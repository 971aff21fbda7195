"""`openkeye evaluate text` on a small random model, its figures against the network run plainly."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from openkeye.apps.commands import main
from openkeye.inputs.processor import Processor
from openkeye.model.config import IndexerConfig
from openkeye.model.convert import convert_checkpoint
from openkeye.model.past import PlainPast
from openkeye.model.weights import load_model
from openkeye.train.text_evaluation import Mode, ask_needle, bootstrap, cut_documents, make_needles, token_losses
from tests.model.other_families import write_source

WORDS = (
    "the red circle appears when a user asks the system and an assistant says so again".split()  # noqa: SIM905
)


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> tuple[Path, Path]:
    """A converted model and a file of text."""
    folder = tmp_path_factory.mktemp("evaluate")
    source, _ = write_source(folder / "source", max_position_embeddings=512)
    convert_checkpoint(source, folder / "keye", IndexerConfig(num_heads=2, head_dim=16, top_k=8))
    generator = random.Random(0)
    (folder / "text.txt").write_text(" ".join(generator.choice(WORDS) for _ in range(1500)))
    return folder / "keye", folder / "text.txt"


def plain_losses(model, ids: torch.Tensor, past: PlainPast) -> torch.Tensor:
    with torch.inference_mode():
        hidden = model(model.embed(ids, None, None), torch.arange(len(ids)).expand(3, -1), past)
        return -model.logits(hidden).log_softmax(-1)[:-1].gather(1, ids[1:, None])[:, 0]


def test_the_report_holds_every_figure(given, capsys):
    keye, text = given
    options = ["--context", "64", "--documents", "3", "--k", "8", "64", "--oracle", "--needles", "1", "--lengths", "320"]
    assert main(["evaluate", "text", "--model", str(keye), "--files", str(text), "--device", "cpu", "--json", *options]) == 0
    report = json.loads(capsys.readouterr().out)
    perplexity = report["perplexity"]
    assert list(perplexity) == ["dense", "sparse 8", "sparse 64", "oracle 8", "oracle 64"]
    model, processor = load_model(keye), Processor.load(keye)
    documents = cut_documents([text.read_text()], processor, 64, 3)
    expected = torch.stack([plain_losses(model, ids, PlainPast(8)) for ids in documents])
    assert perplexity["sparse 8"]["whole"]["value"] == pytest.approx(float(expected.mean().exp()), rel=1e-4)
    assert perplexity["sparse 8"]["last_half"]["value"] == pytest.approx(float(expected[:, 31:].mean().exp()), rel=1e-4)
    # A selection of everything loses nothing; one of eight keys does.
    assert perplexity["sparse 64"]["whole"]["increase"] == pytest.approx(0, abs=1e-4)
    assert abs(perplexity["sparse 8"]["whole"]["increase"]) > 1e-3
    assert list(report["selection"]) == ["8"] and len(report["selection"]["8"]["recall"]["by_layer"]) == 2
    recall, mass, best = (report["selection"]["8"][name]["value"] for name in ("recall", "mass", "best_mass"))
    assert 0 < recall < 1 and 0 < mass < best < 1
    assert report["needles"]["320"]["num_needles"] == 5 and set(report["needles"]["320"]) == {"num_needles", *perplexity}
    assert main(["evaluate", "text", "--model", str(keye), "--files", str(text), "--device", "cpu", *options]) == 0
    assert "oracle 64" in capsys.readouterr().out


@pytest.mark.parametrize("mode", [Mode("dense"), Mode("sparse", 16)])
def test_a_needle_is_judged_as_answer_by_answer(given, mode):
    keye, text = given
    model, processor = load_model(keye), Processor.load(keye)
    needles = list(make_needles([text.read_text()], processor, 300, 1, seed=4))
    assert [needle.depth for needle in needles] == [0.1, 0.3, 0.5, 0.7, 0.9]
    for needle in needles:
        assert 280 <= len(needle.ids) + len(needle.answers[0]) <= 300
        said = processor.decode(needle.ids.tolist())
        number = processor.decode(list(needle.answers[0])).strip()
        place = said.index("The magic number of ")
        assert f" is {number}. " in said and abs(place / len(said) - needle.depth) < 0.25
        totals = []
        for answer in needle.answers:
            ids = torch.cat([needle.ids, torch.tensor(answer)])
            totals.append(float(plain_losses(model, ids, PlainPast(mode.top_k, mode.attention))[len(needle.ids) - 1 :].sum()))
        assert len({round(total, 3) for total in totals}) > 5
        # The order of the answers decides nothing but which of them is right.
        best = int(np.argmin(totals))
        swapped = (needle.answers[best], *needle.answers[:best], *needle.answers[best + 1 :])
        right, _ = ask_needle(model, type(needle)(needle.ids, swapped, needle.depth), mode)
        assert right and ask_needle(model, needle, mode)[0] == (best == 0)


def test_exact_means_that_greedy_decoding_writes_it(given):
    keye, text = given
    model, processor = load_model(keye), Processor.load(keye)
    needle = next(make_needles([text.read_text()], processor, 300, 1, seed=4))
    ids = needle.ids.tolist()
    for _ in range(3):
        with torch.inference_mode():
            embeds = model.embed(torch.tensor(ids), None, None)
            hidden = model(embeds, torch.arange(len(ids)).expand(3, -1), PlainPast(16))
            ids.append(int(model.logits(hidden[-1:]).argmax()))
    written = tuple(ids[-3:])
    other = (*written[:2], (written[2] + 1) % 300)
    for answer, is_exact in ((written, True), (other, False)):
        asked = type(needle)(needle.ids, (answer, *needle.answers[1:]), needle.depth)
        assert ask_needle(model, asked, Mode("sparse", 16))[1] is is_exact


def test_documents_in_parts_score_alike_and_intervals_hold_the_mean(given):
    keye, text = given
    model, processor = load_model(keye), Processor.load(keye)
    documents = cut_documents([text.read_text()], processor, 64, 5)
    assert documents.shape == (5, 64) and len({tuple(one.tolist()) for one in documents}) == 5
    whole = token_losses(model, documents, Mode("sparse", 8))
    parts = token_losses(model, documents, Mode("sparse", 8), max_tokens=128)
    np.testing.assert_allclose(whole, parts, atol=1e-5)
    low, high = bootstrap(whole.mean(axis=1), np.exp)
    assert low < np.exp(whole.mean()) < high


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--context", "1024"], "--context is 1024; give 2 to 512"),
        (["--k", "0"], "--k and --documents must be at least 1"),
        (["--lengths", "700"], "beyond the model's 512 positions"),
        (["--context", "512", "--files", "nothing.txt"], "nothing.txt: no such file"),
        (["--context", "64", "--needles", "1", "--lengths", "90"], "hold no text beside the question"),
    ],
)
def test_wrong_options_are_told_in_one_line(given, options, told, capsys):
    keye, text = given
    files = [] if "--files" in options else ["--files", str(text)]
    assert main(["evaluate", "text", "--model", str(keye), "--device", "cpu", *files, *options]) == 2
    assert told in capsys.readouterr().err
