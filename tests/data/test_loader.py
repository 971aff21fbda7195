"""The loader in one process: the same samples on any number of ranks, resumed anywhere, bad ones left out."""

import json
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from openkeye.common.checks import InputError
from openkeye.data.config import LoaderConfig, Share
from openkeye.data.document import Document
from openkeye.data.lane import LOOKAHEAD_PACKS, NUM_AHEAD
from openkeye.data.loader import Loader, merge_states
from openkeye.data.sample import Sample
from tests.data.loader_process import make_config, make_sources
from tests.data.small_sources import FinishedSource, TextSource, convert, document

CONFIG = make_config()
Names = list[list[tuple[str, ...]]]


def quiet(name: str, reason: str) -> None:
    """Says nothing."""


def load(num_ranks: int = 1, state: dict | None = None, num: int | None = None) -> tuple[Names, dict]:
    """The names of each step's lanes by all ranks together, and the merged state at the end (or after `num` steps)."""
    loaders = [Loader(make_sources(), CONFIG, convert, rank, num_ranks, state, quiet) for rank in range(num_ranks)]
    names: Names = []
    while num is None or len(names) < num:
        step = [next(loader, None) for loader in loaders]
        if step[0] is None:
            break
        packs = [step[lane % num_ranks][lane // num_ranks] for lane in range(CONFIG.packs_per_step)]
        names.append([pack.names for pack in packs])
    merged = merge_states([loader.state() for loader in loaders])
    for loader in loaders:
        loader.close()
    return names, json.loads(json.dumps(merged))


@pytest.fixture(scope="module")
def whole() -> Names:
    """Never interrupted, one rank."""
    return load()[0]


def simple(num_steps: int = 10, **changes) -> LoaderConfig:
    """One source `a`, one lane."""
    common = {"context": 20, "tokens_per_pack": 20, "packs_per_step": 1, "shares": (Share("a"),), "num_workers": 0}
    return LoaderConfig(**{**common, "num_steps": num_steps, **changes})


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_a_step_has_the_same_samples_on_any_number_of_ranks(whole, num_ranks):
    names, _ = load(num_ranks)
    assert len(names) == CONFIG.num_steps
    assert names == whole


def test_ranks_that_do_not_divide_the_packs_are_refused_with_the_mend():
    with pytest.raises(
        InputError, match="4 packs a step do not divide among 3 ranks: set packs_per_step to a multiple of 3, such as 6"
    ):
        Loader(make_sources(), CONFIG, convert, 0, 3)
    with pytest.raises(InputError, match="rank 2 of 2"):
        Loader(make_sources(), CONFIG, convert, 2, 2)


@pytest.mark.parametrize("num_before", [0, 1, 2, 7, 19, 38, 39, 40])
def test_a_resumed_run_goes_on_as_if_it_never_stopped(whole, num_before):
    ranks = {0: 1, 1: 2, 2: 4}
    before, state = load(ranks[num_before % 3], num=num_before)
    assert state["step"] == num_before
    after, end = load(ranks[(num_before + 1) % 3], state)
    assert before + after == whole
    assert end == load()[1]


def test_state_is_of_what_was_handed_out():
    with Loader(make_sources(), CONFIG, convert, on_bad=quiet) as loader:
        states = []
        for _ in range(3):
            next(loader)
            wait_until(lambda: all(future.done() for future in loader._steps))
            states.append(loader.state())
    again = Loader(make_sources(), CONFIG, convert, on_bad=quiet)
    for state in states:
        next(again)
        assert again.state() == state
    again.close()


def test_a_state_is_small():
    _, state = load(num=20)
    waiting = [lane["waiting"] for lane in state["lanes"].values()]
    assert all(0 < len(entries) <= LOOKAHEAD_PACKS * CONFIG.tokens_per_pack for entries in waiting)
    assert all(len(lane["ahead"]) == NUM_AHEAD for lane in state["lanes"].values())
    assert len(json.dumps(state)) < 1000 * CONFIG.packs_per_step + 200


def test_every_sample_is_handed_out_once_in_an_epoch_or_counted_bad(whole):
    # 60 samples, every ninth unreadable, those above the context of 22 tokens too long.
    lengths = {index: convert(TextSource("a", 60).read(index)).num_tokens for index in range(60) if index % 9}
    good = {f"a:{index}" for index, length in lengths.items() if length <= 22}
    counts = Counter(name for step in whole for lane in step for name in lane if name.startswith("a:"))
    assert 0 < len(good) < len(lengths)
    assert set(counts) == good
    assert max(counts.values()) - min(counts.values()) <= 3
    # (the lanes' epochs end at different times, and some documents still wait)


def test_no_document_waits_long():
    config = simple(200, tokens_per_pack=40)
    source = TextSource("a", None, spread=17)
    with Loader({"a": source}, config, convert) as loader:
        step_of = {name: step for step, packs in enumerate(loader) for name in packs[0].names}
    handed_out = [int(name.split(":")[1]) for name in step_of]
    steps = [step_of[f"a:{index}"] for index in range(max(handed_out) - 100)]
    # In the order of drawing, each is in a pack soon after those before it: what waits is at most the lookahead's documents.
    latest = 0
    for step in steps:
        assert step >= latest - 2 * LOOKAHEAD_PACKS * config.tokens_per_pack // 3
        latest = max(latest, step)
    assert len(set(handed_out)) == len(handed_out)


def test_packs_hold_what_their_documents_say():
    with Loader(make_sources(), CONFIG, convert, 1, 2, on_bad=quiet) as loader:
        packs = next(loader)
    assert len(packs) == 2
    for pack in packs:
        assert pack.num_tokens <= CONFIG.tokens_per_pack and pack.device.type == "cpu"
        for name, span in zip(pack.names, pack.layout.spans, strict=True):
            alone = document(name, span.num_tokens)
            assert torch.equal(pack.input_ids[span.start : span.end], alone.input_ids)


def test_finished_documents_are_not_converted():
    with Loader({"a": FinishedSource("a", 5)}, simple(3), refuse) as loader:
        assert [packs[0].tasks for packs in loader] == [("a", "a")] * 3


def refuse(sample: Sample) -> Document:
    """A convert that nobody may call."""
    raise AssertionError(sample.name)


@pytest.mark.parametrize("length", [20, 5])
def test_weights_change_with_the_steps(length):
    # One document a pack, where 32 draws ahead are half of the stage; and four.
    config = simple(80, shares=(Share("a", 1, 0), Share("b", 0, 1)), tokens_per_pack=20)
    sources = {name: FinishedSource(name, None, length) for name in "ab"}
    with Loader(sources, config, convert) as loader:
        tasks = [packs[0].tasks for packs in loader]
    thirds = [Counter(task for step in tasks[begin : begin + 20] for task in step) for begin in (0, 30, 60)]
    share = [counts["b"] / counts.total() for counts in thirds]
    assert share[0] < 0.25 < share[1] < 0.7 < share[2], share


def test_figures_count_what_was_handed_out():
    config = simple(30, tokens_per_pack=40, shares=(Share("a"), Share("b")), max_bad_share=0.9)
    sources = {"a": TextSource("a", None, spread=30, bad_every=3), "b": FinishedSource("b", 7, 9)}
    told: list[tuple[str, str]] = []
    tokens, documents = Counter(), 0
    with Loader(sources, config, convert, on_bad=lambda name, reason: told.append((name, reason))) as loader:
        for packs in loader:
            documents += len(packs[0].names)
            for name, span in zip(packs[0].names, packs[0].layout.spans, strict=True):
                tokens[name.split(":")[0]] += span.num_tokens
            figures = loader.figures()
            assert figures.tokens_by_source == tokens
            assert figures.num_bad + figures.num_too_long == len(told)
    waiting = loader.state()["lanes"]["0"]["waiting"]
    assert figures.num_read == documents + len(told) + len(waiting)
    assert figures.fill_share == tokens.total() / (30 * 40) and 0.8 < figures.fill_share <= 1
    assert figures.num_bad == sum("ends early" in reason for _, reason in told) > 0
    assert figures.num_too_long == sum("context is 20" in reason for _, reason in told) > 0
    assert figures.num_steps == 30 and 0 < figures.wait_seconds < 30
    assert told[0][0].startswith("a, sample ") or told[0][0].startswith("a:")


def test_bad_samples_past_the_share_end_the_run_by_name():
    told = []
    source = TextSource("a", 1000, spread=10, bad_every=4)
    loader = Loader({"a": source}, simple(500, max_bad_share=0.2), convert, on_bad=lambda name, reason: told.append(name))
    with loader, pytest.raises(InputError, match=r"\d+ of \d+ samples cannot be used, more than max_bad_share=0.2") as caught:
        for _ in loader:
            pass
    assert all(name in str(caught.value) for name in told[-5:]) and len(told) >= 5
    with Loader({"a": source}, simple(100, max_bad_share=0.4), convert, on_bad=quiet) as loader:
        assert len(list(loader)) == 100


@pytest.mark.parametrize(
    ("spread", "bad_every", "words"),
    [(10, 1, "20 of 20 samples cannot be used"), (10**6, 0, "20 of 20 samples are too long for the stage, more than half")],
)
def test_where_nothing_is_good_the_run_ends(spread, bad_every, words):
    with (
        Loader({"a": TextSource("a", 10**6, spread, bad_every)}, simple(max_bad_share=0.95), convert, on_bad=quiet) as loader,
        pytest.raises(InputError, match=words),
    ):
        next(loader)


def test_few_samples_prove_nothing():
    # The first of all is bad, which is more than 5% of 12.
    source = TextSource("a", None, spread=0, bad_every=10**6)
    with Loader({"a": source}, simple(1), convert, on_bad=quiet) as loader:
        assert len(list(loader)) == 1
        assert loader.figures().num_bad == 1


def test_a_mistake_in_code_is_no_bad_sample():
    with Loader({"a": TextSource("a", 50)}, simple(), refuse) as loader:
        for _ in range(2):
            with pytest.raises(AssertionError, match="a:"):
                next(loader)


@dataclass(frozen=True)
class CountingSource:
    """Notes what was read."""

    reads: list[int]
    num_samples: int | None = None

    def read(self, index: int) -> Document:
        self.reads.append(index)
        return document(f"n:{index}", 20)


def test_two_steps_are_made_ahead_and_no_more():
    source = CountingSource([])
    with Loader({"a": source}, simple(50), convert) as loader:
        expected = LOOKAHEAD_PACKS + 1
        # documents as long as packs: the first two steps, and what waits behind them
        wait_until(lambda: len(source.reads) >= expected)
        next(loader)
        wait_until(lambda: len(source.reads) >= expected + 1)
        time.sleep(0.1)
        assert len(source.reads) == expected + 1


def test_close_ends_the_thread_and_may_come_twice():
    before = threading.active_count()
    loader = Loader(make_sources(), CONFIG, convert, on_bad=quiet)
    next(loader)
    assert threading.active_count() > before
    loader.close()
    loader.close()
    assert threading.active_count() == before


def test_states_that_do_not_fit_are_refused():
    _, state = load(num=2)
    for change, words in (
        ({"seed": 12}, "seed 11, the settings say 12"),
        ({"stage": "other"}, "stage 'vision'"),
        ({"packs_per_step": 8}, "packs_per_step 4"),
    ):
        with pytest.raises(InputError, match=words):
            Loader(make_sources(), replace(CONFIG, **change), convert, state=state)
    with pytest.raises(InputError, match=r"sources \{'a': 60"):
        Loader({**make_sources(), "a": TextSource("a", 61)}, CONFIG, convert, state=state)


def test_a_rank_alone_has_half_a_state():
    loaders = [Loader(make_sources(), CONFIG, convert, rank, 2, on_bad=quiet) for rank in range(2)]
    for loader in loaders:
        next(loader)
    first, second = (loader.state() for loader in loaders)
    with pytest.raises(InputError, match=r"lacks lanes \[1, 3\]"):
        Loader(make_sources(), CONFIG, convert, state=first)
    Loader(make_sources(), CONFIG, convert, 0, 2, state=first).close()
    assert list(merge_states([second, first])["lanes"]) == ["0", "1", "2", "3"]
    assert merge_states([merge_states([second, first])]) == merge_states([first, second])
    for wrong, words in (([], "no state"), ([first], "expected each of 0 to 3"), ([first, second, second], "expected each")):
        with pytest.raises(InputError, match=words):
            merge_states(wrong)
    next(loaders[1])
    with pytest.raises(InputError, match=r"steps \[1, 2\]"):
        merge_states([first, loaders[1].state()])
    for loader in loaders:
        loader.close()


def test_a_waiting_document_that_is_gone_after_a_restart_is_left_out(tmp_path):
    source = FileSource(str(tmp_path))
    for index in range(40):
        (tmp_path / str(index)).write_text("x" * (5 + index % 9))
    config = simple(8)
    with Loader({"a": source}, config, convert) as loader:
        next(loader)
        state = loader.state()
    _, lost = state["lanes"]["0"]["waiting"][0]
    (tmp_path / str(lost)).unlink()
    told = []
    with Loader({"a": source}, config, convert, state=state, on_bad=lambda name, reason: told.append(name)) as loader:
        names = [name for packs in loader for name in packs[0].names]
    assert told == [f"a, sample {lost}"] and f"f:{lost}" not in names


@dataclass(frozen=True)
class FileSource:
    """Texts in files that people may remove."""

    folder: str
    num_samples: int = 40

    def read(self, index: int) -> Sample:
        path = Path(self.folder) / str(index)
        if not path.exists():
            raise InputError(f"{path} is not there")
        return Sample(f"f:{index}", [{"role": "user", "content": path.read_text()}])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens_per_pack": 19}, "a pack of 19 tokens does not hold a document of 20"),
        ({"packs_per_step": 0}, "packs_per_step is 0"),
        ({"num_steps": 0}, "num_steps is 0"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"max_bad_share": 1.0}, "max_bad_share is 1.0"),
        ({"max_read_seconds": 0.0}, "max_read_seconds is 0.0"),
    ],
)
def test_wrong_settings_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        simple(**changes)


def wait_until(is_so, seconds: float = 20.0) -> None:
    """Fails where it does not become so."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.01)
