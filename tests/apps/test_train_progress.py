"""What people see of a run: lines and bars, TensorBoard's files, curves from the log."""

import io
import json
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
from rich.console import Console

from openkeye.apps import train_progress
from openkeye.apps.curves import draw_curves, read_log
from openkeye.apps.train_progress import TrainProgress, duration_text, figures_text
from openkeye.data.config import Share, SourceConfig
from openkeye.train.config import RunConfig, StageConfig


@pytest.fixture
def config(tmp_path):
    stages = tuple(StageConfig(name, 20, 512, (Share("clips"),)) for name in ("first", "second"))
    return RunConfig("openkeye-tiny", str(tmp_path / "run"), "out", {"clips": SourceConfig("folder", "x")}, stages)


def record(step, **figures):
    first = {"step": step, "stage": "first" if step <= 20 else "second", "step_in_stage": step if step <= 20 else step - 20}
    return first | {"loss": 4.0 / step, "tokens_per_second": 12345.0, "memory_bytes": 3 * 2**30, "seconds_left": 95.0} | figures


def shown(config, is_terminal, records, every=0.0, clock=None, monkeypatch=None):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=is_terminal, width=150, highlight=False)
    if clock is not None:
        monkeypatch.setattr(train_progress.time, "monotonic", lambda: clock[0])
    with TrainProgress(config, every, console) as progress:
        progress.stage("first", 20)
        for seconds, one in records:
            if clock is not None:
                clock[0] = seconds
            progress.step(one)
        progress.say("done [bold]")
    return stream.getvalue(), progress


def test_lines_where_there_is_no_terminal(config):
    text, progress = shown(config, False, [(0, record(5, peak_share=0.342)), (0, record(10, indexer_recall=0.876))])
    assert text.splitlines() == [
        "stage first: 20 steps",
        "step 5 of 40  first  loss 0.8  12.3K tokens/s  34% of peak  3.0 GiB  1 min left",
        "step 10 of 40  first  loss 0.4  recall 0.88  12.3K tokens/s  3.0 GiB  1 min left",
        "done [bold]",
    ]
    assert progress.step_number == 10 and progress.num_steps == 40


def test_a_line_every_so_many_seconds_and_one_at_the_end_of_a_stage(config, monkeypatch):
    records = [(100.0, record(1)), (101.0, record(2)), (109.9, record(3)), (110.0, record(4)), (111.0, record(20))]
    text, _ = shown(config, False, records, every=10.0, clock=[0.0], monkeypatch=monkeypatch)
    assert [line.split()[1] for line in text.splitlines() if line.startswith("step")] == ["1", "4", "20"]


def test_a_bar_on_a_terminal(config):
    text, _ = shown(config, True, [(0, record(5)), (0, record(20))])
    assert "first" in text and "20/20" in text and "12.3K tokens/s" in text and "━" in text and "step 5 of" not in text


def test_tensorboard_reads_what_was_written(config, tmp_path):
    shown(config, False, [(0, record(5)), (0, record(10, **{"loss/counting": 0.25}))])
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [
        (5, pytest.approx(0.8)),
        (10, pytest.approx(0.4)),
    ]
    assert [event.step for event in events.Scalars("loss/counting")] == [10]
    assert "step" not in events.Tags()["scalars"] and "stage" not in events.Tags()["scalars"]


def test_events_need_neither_tensorflow_nor_torch(tmp_path):
    code = (
        "import sys; from tensorboard.summary.writer.event_file_writer import EventFileWriter\n"
        f"EventFileWriter({str(tmp_path)!r}).close()\n"
        "print(sorted({'torch', 'tensorflow'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "[]", result.stderr


def test_without_tensorboard_a_line_says_so(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.event_file_writer", None)
    text, _ = shown(config, False, [(0, record(20))])
    assert text.splitlines()[0].startswith("no TensorBoard files: it is not installed (pip install")
    assert "step 20 of 40" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.0, "59 s"),
        (60.0, "1 min"),
        (3599.0, "59 min"),
        (3600.0, "1 h"),
        (7 * 3600.0 + 1800, "7 h 30 min"),
        (28 * 3600.0, "1 d 4 h"),
    ],
)
def test_durations_in_words(seconds, text):
    assert duration_text(seconds) == text


def test_figures_leave_out_what_a_record_lacks():
    assert figures_text({"step": 3}) == "" and figures_text({"loss": 2, "tokens_per_second": 99.0}) == "loss 2  99 tokens/s"


def write_log(run_dir, records, rest=""):
    run_dir.mkdir(exist_ok=True)
    (run_dir / "log.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records) + rest)


def test_the_log_of_a_killed_run_is_read_as_it_went_on(tmp_path):
    write_log(tmp_path, [record(5), record(10), record(15, loss=9.0), record(10, loss=7.0)], '{"step": 20, "lo')
    assert [(one["step"], one["loss"]) for one in read_log(tmp_path)] == [(5, 0.8), (10, 7.0), (15, 9.0)]
    assert read_log(tmp_path / "nowhere") == [] and draw_curves(tmp_path / "nowhere") is None


def test_curves_of_every_kind_are_drawn_with_stage_borders(tmp_path):
    layers = {f"indexer_{kind}/{layer}": 0.5 + layer / 100 for kind in ("recall", "mass") for layer in range(12)}
    tasks = {"answer_loss": 2.0, "loss/counting": 1.0, "rate/decoder": 1e-4, "rate/projector": 1e-4, "indexer_kl": 0.1}
    plain = [record(step, **tasks) for step in range(1, 41)]
    write_log(tmp_path, plain)
    few = PIL.Image.open(draw_curves(tmp_path)).convert("RGB")
    write_log(tmp_path, [one | layers | {"indexer_recall": 0.6} for one in plain])
    many = PIL.Image.open(draw_curves(tmp_path)).convert("RGB")
    assert few.width == many.width >= 1000 and many.height > few.height * 1.3, "recall and mass have panels of their own"
    # A border is a column of dashes; without a second stage there is none.
    write_log(tmp_path, [one | layers | {"indexer_recall": 0.6, "stage": "first"} for one in plain])
    alone = PIL.Image.open(draw_curves(tmp_path)).convert("RGB")
    grey = [np.abs(np.asarray(picture).astype(int) - 128).max(axis=2) < 8 for picture in (many, alone)]
    assert grey[0].sum(axis=0).max() > grey[1].sum(axis=0).max() + 200
