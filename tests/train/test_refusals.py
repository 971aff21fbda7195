"""Bad settings are refused before the first step, in one line with the mend."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from openkeye.common.checks import InputError
from openkeye.data.config import Share
from openkeye.train.loop import Trainer
from openkeye.train.refusals import check_run, claim_run_dir
from openkeye.train.reporter import SilentReporter
from tests.train.toy_runs import ADAPTATION, TOY, WARM_UP, run_here, toy_loader, toy_run, toy_stage, write_toy_model

STAGES_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"trains": ()}, "trains nothing.*name some of vision"),
    ({"trains": ("decoder", "vison")}, "trains names vison; the parts are"),
    ({**WARM_UP, "indexer_target": "none"}, "indexer would learn nothing from indexer_target 'none'.*choose one of dense"),
    ({**WARM_UP, "indexer_weight": 0.0}, "indexer would learn nothing.*a weight above 0"),
    ({"answer_weight": 0.0}, "vision, projector, decoder would learn nothing with answer_weight 0; raise it"),
    ({**ADAPTATION, "answer_weight": 0.0, "indexer_weight": 0.0}, "would learn nothing with answer_weight 0"),
    ({"indexer_target": "dense"}, "add it to trains"),
    ({**WARM_UP, "indexer_target": "selected"}, "needs attention 'sparse'"),
    ({"trains": ("projector",), "balance_weight": 0.1}, "decoder does not train; set it to 0"),
    ({"rates": {"indexer": 1e-3}}, "rates has indexer, which trains does not name"),
    ({"rates": {"decoder": -1.0}}, "the rate of decoder is -1.0; give a number from 0 on"),
    ({"rate": float("nan")}, "rate is nan"),
    ({"mixture": (Share("toy", 0.0), Share("text", 0.0))}, "mixture sums to zero at its beginning; give at least one"),
    ({"mixture": (Share("toy", 1.0, weight_end=0.0),)}, "mixture sums to zero at its end"),
    ({"mixture": ()}, "mixture sums to zero"),
    ({"tokens_per_pack": 31}, "tokens_per_pack 31 is below context 32; give at least 32, or 0"),
    ({"num_steps": 0}, "num_steps is 0; give at least 1"),
    ({"num_warmup_steps": 5}, "num_warmup_steps 5 exceeds num_steps 4"),
    ({"rate_end_share": 1.5}, "share from 0 to 1"),
    ({"attention": "spars"}, "attention is 'spars'; choose one of dense, sparse"),
    ({"indexer_target": "all"}, "indexer_target is 'all'; choose one of none"),
    ({"stop_at_recall": 0.9}, "stop_at_recall needs .* a stage that trains the indexer"),
]


@pytest.mark.parametrize(("changes", "told"), STAGES_REFUSED)
def test_a_stage_that_contradicts_itself(changes: dict[str, Any], told: str):
    with pytest.raises(InputError, match=told) as refusal:
        toy_stage("odd", **changes)
    assert "\n" not in str(refusal.value) and "odd" in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"stages": ()}, "no stages"),
        ({"stages": (toy_stage(), toy_stage())}, "share the name first"),
        ({"stages": (toy_stage(mixture=(Share("toys"),)),)}, "mixture names toys; sources has toy, text: add it there"),
        ({"fresh": ("head",)}, "fresh names head; the parts are"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; choose one of adamw, muon"),
        ({"compute_dtype": "fp8"}, "compute_dtype is 'fp8'"),
        ({"clip": 0.0}, "clip is 0.0; give the largest gradient norm"),
        ({"log_every": 0}, "log_every is 0; give at least 1"),
    ],
)
def test_a_run_that_contradicts_itself(tmp_path: Path, changes: dict[str, Any], told: str):
    with pytest.raises(InputError, match=told):
        replace(toy_run(tmp_path), **changes)


def test_what_does_not_fit_the_model_or_the_ranks(tmp_path: Path):
    config = toy_run(tmp_path, toy_stage(context=600, tokens_per_pack=600))
    with pytest.raises(InputError, match="context 600 exceeds the model's 512 positions; give at most 512"):
        check_run(config, TOY, 1)
    with pytest.raises(InputError, match="trains names vision, projector, and the model has no vision tower; take them out"):
        check_run(toy_run(tmp_path), replace(TOY, vision=None), 1)
    with pytest.raises(
        InputError, match="2 packs a step do not divide among 4 ranks; set packs_per_step to a multiple, such as 4"
    ):
        check_run(toy_run(tmp_path), TOY, 4)
    with pytest.raises(InputError, match="num_shards 3 does not divide 4 ranks"):
        check_run(toy_run(tmp_path, num_shards=3), TOY, 4)
    assert check_run(toy_run(tmp_path), TOY, 2) == []


def test_sparse_attention_by_a_fresh_indexer_is_allowed_and_said(tmp_path: Path):
    warm_up, adaptation = toy_stage("warm-up", **WARM_UP), toy_stage("adaptation", **ADAPTATION)
    (notice,) = check_run(toy_run(tmp_path, adaptation, fresh=("indexer",)), TOY, 1)
    assert "stage 'adaptation' attends where a fresh indexer points" in notice and "indexer_target 'dense'" in notice
    assert check_run(toy_run(tmp_path, warm_up, adaptation, fresh=("indexer",)), TOY, 1) == []
    assert check_run(toy_run(tmp_path, adaptation), TOY, 1) == []


def test_a_folder_of_another_run(tmp_path: Path):
    write_toy_model(tmp_path)
    config = toy_run(tmp_path)
    claim_run_dir(config)
    # How it is computed may change, what is learnt may not.
    Trainer(replace(config, num_workers=3, save_every_seconds=1.0, num_shards=1), SilentReporter(), toy_loader)
    for changed, told in (
        (replace(config, seed=7), "seed was 0 and is 7"),
        (replace(config, stages=(toy_stage(rate=0.5),)), "rate of stage 'first' was 0.003 and is 0.5"),
        (replace(config, stages=(toy_stage("other"),)), "stages were first and are other"),
    ):
        with pytest.raises(
            InputError, match=f"belongs to a run with other settings .*{re.escape(told)}.*; give another run_dir"
        ):
            Trainer(changed, SilentReporter(), toy_loader)


def test_refused_before_anything_is_written(tmp_path: Path):
    write_toy_model(tmp_path)
    config = toy_run(tmp_path, toy_stage(context=600, tokens_per_pack=600))
    with pytest.raises(InputError):
        run_here(config)
    assert not Path(config.run_dir).exists()
