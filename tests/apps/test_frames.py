import argparse
import json

import numpy as np
import PIL.Image
import pytest

from openkeye.apps import frames
from openkeye.common.checks import InputError
from tests.inputs.checkpoint import write_checkpoint
from tests.inputs.clips import even_times, make_clip, read_barcode


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", even_times(90, 30))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_checkpoint(tmp_path_factory.mktemp("model")))


def run(*words):
    parser = argparse.ArgumentParser()
    frames.add_arguments(parser)
    return frames.run(parser.parse_args([str(word) for word in words]))


def test_json_lists_every_png_with_its_own_time(clip, model, tmp_path, capsys):
    assert run(clip.path, "--out", tmp_path / "new" / "folder", "--model", model, "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert len(listed) == 6 and all(set(entry) == {"time_seconds", "file"} for entry in listed)
    for entry in listed:
        picture = np.asarray(PIL.Image.open(entry["file"]))
        assert picture.shape == (96, 160, 3), "original size by default"
        assert abs(clip.times_seconds[read_barcode(picture)] - entry["time_seconds"]) <= 1e-3


def test_model_size_rate_and_part_are_obeyed(clip, model, tmp_path, capsys):
    words = ("--size", "model", "--fps", 5, "--start", 1, "--end", 2)
    run(clip.path, "--out", tmp_path, "--model", model, "--json", *words)
    listed = json.loads(capsys.readouterr().out)
    assert len(listed) == 5
    assert listed[0]["time_seconds"] == pytest.approx(1.0, abs=1e-3)
    assert PIL.Image.open(listed[0]["file"]).size == (140, 84)


def test_without_json_a_person_reads_a_table(clip, model, tmp_path, capsys):
    run(clip.path, "--out", tmp_path, "--model", model)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("6 frames of 160x96 pixels") and len(lines) == 7


def test_bad_input_is_one_line(clip, model, tmp_path):
    with pytest.raises(InputError, match="no such file"):
        run(tmp_path / "no.mp4", "--out", tmp_path, "--model", model)
    (tmp_path / "taken").write_text("")
    with pytest.raises(InputError, match="choose another --out"):
        run(clip.path, "--out", tmp_path / "taken", "--model", model)
    with pytest.raises(InputError, match="fps"):
        run(clip.path, "--out", tmp_path, "--model", model, "--fps", -1)
