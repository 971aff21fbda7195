import argparse
import json

import pytest

from openkeye.apps import budget
from openkeye.common.checks import InputError
from tests.inputs.checkpoint import write_checkpoint


def run(capsys, *words):
    parser = argparse.ArgumentParser()
    budget.add_arguments(parser)
    assert budget.run(parser.parse_args([str(word) for word in words])) == 0
    return capsys.readouterr().out


HOUR = ("--height", 1080, "--width", 1920, "--frames", 43200, "--fps", 12)


def test_an_hour_at_the_published_limits(capsys):
    assert json.loads(run(capsys, *HOUR, "--json")) == {
        "num_frames": 2880,
        "height": 168,
        "width": 280,
        "tokens_per_frame": 60,
        "tokens": 172_800,
        "budget": 184_320,
        "seconds_between_frames": pytest.approx(43199 / 2879 / 12, abs=1e-6),
    }


def test_several_videos_and_the_tables(capsys):
    assert json.loads(run(capsys, *HOUR, "--json", "--videos", 2))["num_frames"] == 1440
    minute = ("--height", 1080, "--width", 1920, "--frames", 1800, "--fps", 30, "--json")
    assert json.loads(run(capsys, *minute, "--adaptive", "release"))["tokens"] == 14_400
    assert json.loads(run(capsys, *minute, "--adaptive", "paper"))["budget"] == 23_040
    assert json.loads(run(capsys, *minute, "--sample-fps", 1))["num_frames"] == 60


def test_another_checkpoints_limits(capsys, tmp_path):
    folder = write_checkpoint(tmp_path)
    plan = json.loads(run(capsys, *HOUR, "--model", folder, "--json"))
    assert (plan["num_frames"], plan["budget"]) == (640, 10_240) and plan["tokens_per_frame"] <= 16


def test_without_json_a_person_reads_a_table(capsys):
    assert "172,800" in run(capsys, *HOUR)


@pytest.mark.parametrize("words", [("--videos", 0), ("--frames", 0), ("--fps", 0), ("--height", 0), ("--width", 999_999)])
def test_nonsense_is_one_line(capsys, words):
    with pytest.raises(InputError) as caught:
        run(capsys, *HOUR, *words)
    assert "\n" not in str(caught.value)
