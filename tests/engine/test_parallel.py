"""Several ranks answer as one does, and end together."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from openkeye.common.checks import InputError
from openkeye.engine.batch import Batch, Segment
from openkeye.engine.loop import Engine
from openkeye.engine.parallel import LeadingRunner
from openkeye.engine.ranks import End, Ranks, RanksError
from openkeye.inputs.processor import resolve_model_dir
from openkeye.model.config import KeyeConfig
from openkeye.model.keye import KeyeModel
from openkeye.model.sharding import Shard
from openkeye.model.weights import load_model, save_model
from tests.engine.answers_of_ranks import work
from tests.rank_processes import ROOT, run_ranks, started

DEMO = ROOT / "openkeye" / "media" / "demo.mp4"
QUESTION = "When is the red circle visible?"
COMMAND = "openkeye.apps.commands"


@pytest.fixture(scope="module")
def four_groups(tmp_path_factory) -> Path:
    """openkeye-tiny with four KV heads, each two of them nearly alike."""
    folder = tmp_path_factory.mktemp("four")
    tiny = resolve_model_dir("openkeye-tiny")
    shutil.copytree(tiny, folder, dirs_exist_ok=True)
    raw = json.loads((tiny / "config.json").read_text()) | {"num_key_value_heads": 4}
    whole = load_model(tiny, dtype=torch.float32).state_dict()
    model = KeyeModel(KeyeConfig.from_dict(raw))
    generator = torch.Generator().manual_seed(0)
    for name, tensor in whole.items():
        if name.startswith("model.") and name.endswith((".self_attn.k_proj.weight", ".self_attn.v_proj.weight")):
            twice = tensor.unflatten(0, (2, -1)).repeat_interleave(2, dim=0).flatten(0, 1)
            whole[name] = twice + 0.1 * twice.std() * torch.randn(twice.shape, generator=generator)
    model.load_state_dict(whole)
    save_model(model, folder)
    return folder


@pytest.mark.parametrize(
    ("model", "size", "extent"),
    [
        ("openkeye-tiny", 2, "whole"),
        ("openkeye-tiny", 2, "replayed"),
        ("four_groups", 4, "brief"),
        ("openkeye-tiny", 4, "brief"),
    ],
)
def test_ranks_answer_as_one_does(model, size, extent, tmp_path, request):
    folder = str(request.getfixturevalue(model) if model == "four_groups" else model)
    statuses = run_ranks(size, "tests.engine.answers_of_ranks", folder, extent, tmp_path / "out.pt")
    assert all(status == 0 and not errors for status, _, errors in statuses), statuses
    found, expected = torch.load(tmp_path / "out.pt"), work(folder, extent)
    assert found.keys() == expected.keys()
    for name, result in expected.items():
        assert found[name]["tokens"] == result["tokens"], name
        torch.testing.assert_close(found[name]["logprobs"], result["logprobs"], atol=1e-5, rtol=1e-5)
        for key in ("num_preemptions", "num_cached"):
            assert found[name].get(key) == result.get(key)
    assert extent != "whole" or found["fixed"]["is_invariant"]
    assert expected["reused"]["num_cached"][0] > 192 and (extent == "brief" or expected["preempted"]["num_preemptions"])


def test_torchrun_asks_and_one_rank_answers():
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        COMMAND,
        "ask",
        str(DEMO),
        QUESTION,
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0 and result.stdout == "From 5.7 to 8.3 seconds.\n", result.stderr


@pytest.mark.parametrize(
    ("size", "arguments", "said"),
    [
        (
            3,
            (DEMO, QUESTION),
            "3 ranks cannot share this model (query heads 8, experts 8, key-value heads 2); start one of 1, 2, 4",
        ),
        (2, (DEMO, " "), "the question is empty"),
        (2, ("nope.mp4", QUESTION), "nope.mp4: no such file"),
    ],
)
def test_wrong_input_gets_one_line_and_ends_all(size, arguments, said):
    with started(size, COMMAND, "ask", *arguments) as processes:
        _, errors = processes[0].communicate(timeout=60)
        assert processes[0].returncode == 2 and said in errors and errors.count("\n") == 1
        if "nope" in said:
            # Nobody has met yet: the others wait for rank 0, and torchrun ends them.
            processes[1].terminate()
            assert processes[1].wait(timeout=20) == -signal.SIGTERM
            return
        for process in processes[1:]:
            assert process.wait(timeout=20) == 0 and process.stderr.read() == ""


def test_what_only_a_follower_finds_wrong_is_told_by_the_leader(tmp_path):
    """A checkpoint of experts one by one, of which one is missing that rank 0 does not need."""
    tiny = resolve_model_dir("openkeye-tiny")
    shutil.copytree(tiny, tmp_path / "m")
    tensors = load_file(tiny / "model.safetensors")
    fused = tensors.pop("model.layers.2.mlp.experts.down_proj")
    for expert in range(7):
        tensors[f"model.layers.2.mlp.experts.{expert}.down_proj.weight"] = fused[expert].t().contiguous()
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    results = run_ranks(2, COMMAND, "ask", DEMO, QUESTION, "--model", tmp_path / "m")
    assert results[0][0] == 2 and "rank 1: " in results[0][2] and "experts.7.down_proj.weight" in results[0][2]
    assert results[0][2].count("\n") == 1 and results[1] == (0, "", "")


def wait_for_answering(processes: list[subprocess.Popen]) -> None:
    """Until tokens come."""
    assert processes[0].stdout.read(1)


LONG = ("--temperature", "30", "--max-tokens", "2000")
# tokens at random, which hardly ever end


@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_that_is_killed_ends_the_others(victim, four_groups):
    with started(4, COMMAND, "ask", DEMO, QUESTION, "--model", four_groups, *LONG) as processes:
        wait_for_answering(processes)
        processes[victim].kill()
        start = time.monotonic()
        for number, process in enumerate(processes):
            process.communicate(timeout=20)
            assert number == victim or process.returncode == 1, number
        assert time.monotonic() - start < 10


def test_ctrl_c_ends_all_ranks():
    with started(2, COMMAND, "ask", DEMO, QUESTION, *LONG) as processes:
        wait_for_answering(processes)
        # A terminal sends it to all of them.
        for process in processes:
            process.send_signal(signal.SIGINT)
        _, errors = processes[0].communicate(timeout=20)
        assert processes[0].returncode == 130 and errors.endswith("interrupted\n") and "Traceback" not in errors
        _, errors = processes[1].communicate(timeout=20)
        assert processes[1].returncode == 0 and errors == ""


def test_ranks_that_parted_do_not_go_on():
    ours, theirs = Pipe()
    ranks = Ranks(Shard(0, 2), {1: ours})
    with ranks.in_step():
        ranks.tell_later("first")
        ranks.tell("second")
    assert (theirs.recv(), theirs.recv()) == ("first", "second")
    with pytest.raises(ZeroDivisionError), ranks.in_step():
        1 / 0  # noqa: B018
    with pytest.raises(RanksError, match="a step over several ranks failed before; start all ranks again"), ranks.in_step():
        pass
    goodbye = threading.Thread(target=ranks.end)
    goodbye.start()
    assert theirs.recv() == End(is_now=True)
    theirs.close()
    goodbye.join(5)
    assert not goodbye.is_alive()
    with pytest.raises(RanksError, match="rank 1 has ended; start all ranks again"):
        ranks.tell("anybody?")


def test_followers_are_told_new_pages_only_and_all_of_them_after_a_preemption():
    leader = LeadingRunner.__new__(LeadingRunner)
    leader._pages_told = {}
    one, two = (SimpleNamespace(pages=pages, evidence=None, num_known=1) for pages in ([3, 4], [7]))

    def told(*requests: SimpleNamespace) -> list[tuple[int, list[int]]]:
        orders = leader._segments(Batch([Segment(request, 0, 1, torch.empty(0)) for request in requests]))
        assert [order.pages.key for order in orders] == [id(request) for request in requests]
        return [(order.pages.num_known, order.pages.new) for order in orders]

    assert told(one, two) == [(0, [3, 4]), (0, [7])]
    one.pages += [9]
    assert told(two, one) == [(1, []), (2, [9])]
    two.pages = [5, 6]
    assert told(two) == [(0, [5, 6])]
    assert told(one, two) == [(0, [3, 4, 9]), (2, [])], "whoever was not in the batch before is forgotten"


def test_an_engine_on_a_follower_says_what_to_do(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(InputError, match=r"rank 1 of 2 follows rank 0; call openkeye\.engine\.parallel\.follow\(\) there"):
        Engine()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InputError, match="2 ranks were started on several machines"):
        Engine()
