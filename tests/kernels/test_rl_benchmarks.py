"""The benchmarks of reinforcement learning run at a size for a CPU: every phase is there, and what they count is right."""

import dataclasses

import pytest
import torch

from benchmarks import rl_agreement, rl_step
from benchmarks.measure import Disagreement
from benchmarks.random_model import shape_30b
from benchmarks.rl_plan import CONTEXT_BYTES, Counts, Machine, StepShape, Work, check_memory
from benchmarks.rl_published import PUBLISHED
from openkeye.common.checks import InputError

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs them at full size")

PUBLICATIONS = ("whole, in process", "whole, file", "deltas, in process", "deltas, file")


def shape(**changes: int) -> StepShape:
    config = dataclasses.replace(shape_30b(), num_hidden_layers=4, vision=None)
    sizes = {"prompt_tokens": 2048, "response_tokens": 512, "tokens_per_pack": 8192, "chunk_tokens": 8192, "top_k": 64}
    return StepShape(config, **{"num_groups": 16, "group_size": 8, **sizes, **changes})


def rows_of(printed: str) -> dict[str, list[str]]:
    """Cells by phase."""
    table = printed[printed.index(rl_step.TABLE) + len(rl_step.TABLE) :].split("\n\n")[0]
    return {
        cells[1].strip(): [cell.strip() for cell in cells[2:]] for line in table.split("\n") if (cells := line.split("|"))[1:]
    }


def test_every_phase_of_a_step_is_told(tmp_path, capsys):
    assert rl_step.main(["--tiny", "--folder", str(tmp_path), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    rows = rows_of(printed)
    assert {"rollout: prefill", "rollout: decode", "score", "update"} <= set(rows)
    assert {f"publish: {name}" for name in PUBLICATIONS} <= set(rows)
    assert all(float(cells[0].replace(",", "")) > 0 for cells in rows.values())
    # No answer ends before its time.
    assert rows["rollout: decode"][6].startswith("32 tokens; 80% of prompts from the cache")
    for name in ("replayed", "live"):
        note = rows[f"agreement: experts {name}"][6]
        assert float(note.split("mean ")[1].split(",")[0]) <= 1e-6, note
    assert float(rows["score"][6].split()[-1]) <= 1e-6
    assert "not measured here" in printed and all(row[2] in printed for row in PUBLISHED)
    # Nothing is left behind.
    assert not list(tmp_path.iterdir())


def test_a_phase_alone_has_a_table_of_its_own(tmp_path, capsys):
    assert rl_step.main(["--tiny", "--folder", str(tmp_path), "--device", "cpu", "--only", "agreement", "update"]) == 0
    rows = rows_of(capsys.readouterr().out)
    # The first round's update is published before the second one's rollouts.
    assert list(rows) == ["agreement: experts replayed", "agreement: experts live", "update"]
    assert float(rows["agreement: experts live"][6].split("mean ")[1].split(",")[0]) <= 1e-6


def test_weights_that_did_not_arrive_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(rl_step, "changes_between", lambda old, new: {})
    with pytest.raises(Disagreement, match="does not hold what was published"):
        rl_step.main(["--tiny", "--folder", str(tmp_path), "--device", "cpu", "--only", "publish"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--device", "cpu"], "the 30B shape needs a GPU; --tiny runs on a CPU"),
        (
            ["--device", "cpu", "--tiny", "--group-size", "1"],
            "group_size is 1; a group of one has no advantages: give at least 2",
        ),
        (["--device", "cpu", "--tiny", "--pack", "20"], "a rollout of 48 tokens is longer than a pack of 20; raise --pack"),
    ],
)
def test_what_cannot_run_is_refused_in_one_line(arguments, told, capsys):
    assert rl_step.main(arguments) == 2
    assert capsys.readouterr().err == told + "\n"


def test_parameters_and_tokens_are_those_of_the_shape():
    counts = Counts(shape())
    experts = 3 * 2048 * 768
    attention = 2048 * (2 * 32 + 2 * 4) * 128
    # Queries of 16 heads with their gates, and one key.
    indexer = 2048 * (16 * 64 + 16 + 64)
    norms = 2 * 2048 + 2 * 128
    assert counts.active == pytest.approx(4 * (attention + indexer + norms + 2048 * 128 + 8 * experts), rel=1e-3)
    assert counts.layers - counts.active == 4 * 120 * experts
    assert counts.total - counts.layers == 2 * 151936 * 2048 + 2048
    assert counts.shape.update_tokens == 16 * (2047 + 8 * 513) and counts.shape.num_packs == 16
    assert counts.shape.pack_tokens == 2047 + 8 * 513 and shape(tokens_per_pack=16384).num_packs == 8
    # Up to 2,048 keys all are attended to; behind, as many.
    per_key = 4 * 4 * 32 * 128
    assert counts.attention_flops(0, 2048) == per_key * 2048 * 2049 / 2
    behind = sum(range(2049, 2561))
    assert counts.attention_flops(2048, 512) == per_key * 512 * 2048 + 4 * 2 * 16 * 64 * behind


def test_a_step_that_does_not_fit_is_refused_with_its_mend():
    counts = Counts(shape())
    parts = counts.learner_memory(by_layer=True)
    total = sum(parts.values()) + CONTEXT_BYTES
    assert total < sum(counts.learner_memory(by_layer=False).values()) + CONTEXT_BYTES
    lines = check_memory(parts, total, "cuda:0", "give fewer --layers")
    assert len(lines) == len(parts) + 2 and lines[-1].endswith(f"| {total / 1e9:.2f} |")
    with pytest.raises(InputError, match=r"^cuda:0: the step needs .* GB and .* are free; give fewer --layers$"):
        check_memory(parts, total - 1, "cuda:0", "give fewer --layers")


def test_the_slower_of_products_and_bytes_is_the_floor():
    machine = Machine(matrix_tflops=800, memory_tbps=3)
    assert machine.seconds(800e12, 0) == machine.seconds(0, 3e12) == 1
    line = rl_step.Row("update", 2.0, Work(989e12, 0), tokens=10, moved_bytes=4 * 10**9).line(machine)
    assert line == "| update | 2.00 | 1.24 | 5 | 50.0% | 4 | 2.00 |  |"


def agreement_rows(capsys, *arguments: str) -> list[list[str]]:
    assert rl_agreement.main(["--device", "cpu", "--rollouts", "4", *arguments]) == 0
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()[2:]]


def test_agreement_is_told_by_length(capsys):
    rows = agreement_rows(capsys, "--dtypes", "float32", "--frames", "0", "14", "--tokens", "6")
    assert [(row[1], row[4]) for row in rows] == [(n, experts) for n in ("0", "14") for experts in ("replayed", "live")]
    # A clip of 14 frames is longer than what attention selects.
    assert int(rows[2][2]) > 192
    assert all(float(row[5]) <= 1e-6 and float(row[6]) <= 2e-5 for row in rows)
    assert all(row[8].endswith("%") == (row[4] == "replayed") for row in rows)


def test_bfloat16_disagrees_and_is_told_apart(capsys):
    rows = agreement_rows(capsys, "--dtypes", "bfloat16", "--frames", "0", "--tokens", "6")
    assert [row[0] for row in rows] == ["bfloat16"] * 2
    assert all(1e-6 < float(row[5]) < 0.1 for row in rows), rows
