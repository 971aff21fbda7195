"""Jobs are done once, in order, and bad ones are counted, named and tried again."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from openkeye.common.checks import InputError
from openkeye.data.makers.captioner import CaptionerError, ask_captioner
from openkeye.data.makers.made_sample import MadeSample, assistant, job_rng, text_part, user
from openkeye.data.makers.media_folder import VIDEO_ENDINGS, find_media
from openkeye.data.makers.output import OutputFolder
from openkeye.data.makers.run import make_data


@dataclass
class Counted:
    """A recipe that remembers what it was asked for, and fails where it is told to."""

    num_jobs: int
    fails: dict[str, Exception] = field(default_factory=dict)
    before: Callable[[str], None] = lambda job: None
    made: list[str] = field(default_factory=list)

    name = "counted"
    settings: dict = field(default_factory=dict)

    def jobs(self) -> list[str]:
        return [f"{number:02d}" for number in range(self.num_jobs)]

    def make(self, job: str) -> list[MadeSample]:
        self.before(job)
        self.made.append(job)
        if job in self.fails:
            raise self.fails[job]
        return [MadeSample([user(text_part("?")), assistant(job)], "t")]


def answers(folder: Path) -> list[str]:
    return [json.loads(line)["messages"][-1]["content"] for line in (folder / "data.jsonl").read_text().splitlines()]


def run(recipe: Counted, folder: Path, share: float = 0.5, **options: object):
    with OutputFolder(folder, recipe.name, recipe.settings) as output:
        return make_data(recipe, output, share, **options)


def test_bad_jobs_are_skipped_named_and_tried_again(tmp_path: Path):
    said: list[str] = []
    report = run(Counted(5, {"03": InputError("03.mp4: damaged")}), tmp_path, on_skip=said.append)
    assert report.skipped == {"03": "03.mp4: damaged"} and said == ["skipped 03: 03.mp4: damaged"]
    assert (report.num_done, report.num_samples) == (4, 4)
    again = Counted(5)
    report = run(again, tmp_path)
    assert again.made == ["03"] and report.num_done_before == 4
    assert answers(tmp_path) == ["00", "01", "02", "04", "03"]


def test_too_many_bad_jobs_end_the_run_and_keep_what_is_made(tmp_path: Path):
    recipe = Counted(10, {f"{number:02d}": InputError("bad") for number in (2, 4, 6, 8)})
    with pytest.raises(InputError, match=r"3 of 10 jobs cannot be used, more than the share 0\.2; the last is 06 \(bad\)"):
        run(recipe, tmp_path, 0.2)
    assert answers(tmp_path) == ["00", "01", "03", "05"]
    assert "09" not in recipe.made
    assert run(Counted(10, recipe.fails), tmp_path, 0.4).num_samples == 2


def test_a_silent_captioner_ends_the_run(tmp_path: Path):
    with pytest.raises(CaptionerError):
        run(Counted(4, {"02": CaptionerError("gone")}), tmp_path, 1.0)
    assert answers(tmp_path) == ["00", "01"]


def test_ctrl_c_keeps_what_is_done(tmp_path: Path):
    def interrupt(done: int, total: int) -> None:
        assert total == 50
        if done == 3:
            raise KeyboardInterrupt

    recipe = Counted(50)
    stops: list[None] = []
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path, on_job=interrupt, on_stop=lambda: stops.append(None))
    assert len(stops) == 1
    assert answers(tmp_path) == ["00", "01", "02"]
    assert len(recipe.made) < 10
    rest = Counted(50)
    assert run(rest, tmp_path, on_stop=lambda: stops.append(None)).num_samples == 47
    assert len(stops) == 1, "a run that comes to its end stops nobody"
    assert answers(tmp_path) == rest.jobs()


def test_workers_are_at_once_and_results_in_order(tmp_path: Path):
    meeting = threading.Barrier(4, timeout=10)

    def meet(job: str) -> None:
        if int(job) < 4:
            meeting.wait()
        time.sleep(0.02 if int(job) % 2 else 0.0)

    run(Counted(20, before=meet), tmp_path, num_workers=4)
    assert answers(tmp_path) == Counted(20).jobs()


@pytest.mark.parametrize(("share", "workers", "word"), [(1.5, 1, "share"), (0.1, 0, "workers")])
def test_options_that_make_no_sense_are_refused(tmp_path: Path, share: float, workers: int, word: str):
    with pytest.raises(InputError, match=word):
        run(Counted(1), tmp_path, share, num_workers=workers)


def test_chance_depends_on_seed_and_job_alone():
    draw = [int(job_rng(seed, job).integers(1 << 40)) for seed, job in ((0, "a"), (0, "a"), (1, "a"), (0, "b"))]
    assert draw[0] == draw[1] and len(set(draw)) == 3


def test_media_are_found_below_a_folder(tmp_path: Path):
    for name in ("b.MP4", "sub/a.webm", "notes.txt", ".hidden/c.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert find_media(tmp_path, VIDEO_ENDINGS) == ["b.MP4", "sub/a.webm"]
    with pytest.raises(InputError, match="holds no file"):
        find_media(tmp_path, (".png",))
    with pytest.raises(InputError, match="no such folder"):
        find_media(tmp_path / "none", VIDEO_ENDINGS)


class Says:
    """A captioner of one answer."""

    name = "says"

    def __init__(self, text: str) -> None:
        self.text = text

    def caption(self, messages: object) -> str:
        return self.text

    def stop(self) -> None:
        """It never waits."""


@pytest.mark.parametrize("text", ["", " \n", "<think>\nhm\n</think>\n", "<think>\nhm"])
def test_a_captioner_that_says_nothing_is_an_error(text: str):
    with pytest.raises(InputError, match=r"a\.mp4: the captioner says said nothing"):
        ask_captioner(Says(text), [], "a.mp4")


def test_reasoning_is_no_caption():
    assert ask_captioner(Says("<think>\nA dog?\n</think>\n\nA cat.\n"), [], "a.mp4") == "A cat."
