"""The whole story at a size for a CPU: every stage of both runs, and the shell script that goes through them in pieces."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from openkeye.inputs.processor import Processor
from openkeye.model.config import KeyeConfig
from openkeye.train.loop import Trainer
from openkeye.train.reporter import SilentReporter
from recipes import whole_story

ROOT = Path(__file__).parents[2]


def test_contexts_grow_and_every_part_learns_where_the_report_says():
    dense, sparse = whole_story.pretraining(), whole_story.sparse()
    contexts = [stage.context for stage in dense.stages]
    assert contexts == sorted(contexts) and contexts[-1] == 16 * contexts[0]
    assert [stage.trains for stage in dense.stages] == [("projector",), *[whole_story.ALL] * 3]
    assert dense.fresh == ("indexer",) and not sparse.fresh
    assert [stage.attention for stage in sparse.stages] == ["dense", "sparse", "sparse", "sparse"]
    assert sparse.stages[0].trains == ("indexer",) and sparse.stages[-1].rate_end_share == 0
    seeds = {source.options["seed"] for config in (dense, sparse) for source in config.sources.values()}
    assert seeds == {dense.seed, sparse.seed} and dense.seed != sparse.seed


def test_scale_changes_the_steps_alone():
    whole, half = whole_story.pretraining(), whole_story.pretraining(scale=0.5)
    assert [2 * stage.num_steps for stage in half.stages] == [stage.num_steps for stage in whole.stages]
    assert [stage.mixture for stage in half.stages] == [stage.mixture for stage in whole.stages]


@pytest.mark.timeout(240)
def test_the_smoke_run_goes_through_every_stage(tmp_path):
    whole_story.widen("openkeye-tiny", str(tmp_path / "start"))
    config = whole_story.smoke(
        str(tmp_path / "start"), run_dir=str(tmp_path / "run"), out_dir=str(tmp_path / "model"), num_steps=1
    )
    assert [stage.name for stage in config.stages] == [
        stage.name for run in (whole_story.pretraining(), whole_story.sparse()) for stage in run.stages
    ]
    assert Trainer(config, SilentReporter()).run()
    assert KeyeConfig.load(tmp_path / "model").max_position_embeddings == 262_144


def test_the_script_stops_after_its_piece_and_skips_what_is_done(tmp_path):
    """With a stand-in for `openkeye` that notes its words: what is asked for in which order, and when."""
    notes = tmp_path / "notes"
    command = tmp_path / "openkeye.py"
    command.write_text(
        "import pathlib, sys\n"
        f"open({str(notes)!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
        "for word in sys.argv:\n"
        "    if word.startswith('out_dir='):\n"
        "        folder = pathlib.Path(word.removeprefix('out_dir='))\n"
        "        folder.mkdir(parents=True)\n"
        "        (folder / 'config.json').write_text('{}')\n"
    )
    variables = {
        "RUN": str(tmp_path / "run"),
        "OPENKEYE": f"{sys.executable} {command}",
        "CLIPS": "30",
        "PIECE": "0",
        "PYTHON": sys.executable,
    }

    def run(**changed: str) -> int:
        environment = {**os.environ, **variables, **changed}
        return subprocess.run(["bash", "recipes/whole_story.sh"], cwd=ROOT, env=environment, check=False).returncode

    assert run() == 3 and not notes.exists()
    assert run(PIECE="1000") == 0
    words = [line.split() for line in notes.read_text().splitlines()]
    assert [line[:2] for line in words] == [
        ["train", "recipes/whole_story.py:pretraining"],
        ["train", "recipes/whole_story.py:sparse"],
        *[["evaluate", "frameforge"]] * 3,
    ]
    assert [line[line.index("--num") + 1] for line in words[2:]] == ["30", "30", "3"]
    assert Processor.load(tmp_path / "run" / "start").video_limits.total_tokens == 16 * 7200 + 15_872
    assert (tmp_path / "run" / "hour.json").is_file()
    notes.unlink()
    assert run(CLIPS="0") == 0 and not notes.exists()
