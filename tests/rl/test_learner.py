"""Steps of the learner on the toy network, in this process: what they teach, tell, save and publish."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from openkeye.common.checks import InputError
from openkeye.model.weights import load_model
from openkeye.rl.advantage import imitation_streams
from openkeye.rl.config import AlgorithmConfig
from openkeye.rl.learner import Learner, opened_learner
from openkeye.rl.learner_figures import repetition_share
from openkeye.rl.learner_pack import LearnerSample, share_out
from openkeye.rl.rollout import Rollout, TokenStreams
from openkeye.train import shard
from openkeye.train.checkpoint import Checkpoints, Place
from tests.rank_processes import ROOT
from tests.rl.toy_rollouts import samples_of, toy_config, toy_document, toy_group, toy_rollout, with_routes
from tests.train.toy_runs import CPU, VOCABULARY, write_toy_model

ON_POLICY = AlgorithmConfig("grpo", correction="none")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_model(tmp_path_factory.mktemp("learner"))


@pytest.fixture
def run_dir(folder: Path, tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "model").symlink_to(folder / "model")
    yield tmp_path


def parameters_of(learner: Learner) -> dict[str, torch.Tensor]:
    return dict(learner.weights(is_whole=True))


def sampled(learner: Learner, samples: Sequence[LearnerSample]) -> list[LearnerSample]:
    """The same as if the learner's policy had sampled them just now."""
    rollouts = [
        replace(one.rollout, logprobs=logprobs, versions=np.full(len(logprobs), learner.version))
        for one, logprobs in zip(samples, learner.logprobs(samples), strict=True)
    ]
    return [replace(one, rollout=rollout) for one, rollout in zip(samples, rollouts, strict=True)]


def test_a_reward_for_a_token_makes_it_likely(run_dir: Path):
    """Real sampling from the policy's own logits: ten steps raise what is rewarded."""
    generator = np.random.default_rng(0)
    wanted = 17
    prompt = toy_rollout(0, 0).prompt_ids
    one_token = [
        replace(toy_rollout(0, token, num_output=1), output_ids=np.array([token], dtype=np.int32))
        for token in range(VOCABULARY)
    ]
    every = samples_of([replace(one, rewards={"outcome": float(n == 0)}) for n, one in enumerate(one_token)], ON_POLICY)
    with opened_learner(toy_config(run_dir, rate=1e-2), ON_POLICY, CPU) as learner:
        shares = []
        for group in range(10):
            logprobs = np.concatenate(learner.logprobs(every))
            probabilities = np.exp(logprobs.astype(np.float64))
            assert probabilities.sum() == pytest.approx(1, abs=1e-4)
            shares.append(probabilities[wanted])
            chosen = generator.choice(VOCABULARY, size=64, p=probabilities / probabilities.sum())
            rollouts = [
                replace(
                    toy_rollout(0, number, num_output=1),
                    prompt_ids=prompt,
                    output_ids=np.array([token], dtype=np.int32),
                    logprobs=logprobs[[token]],
                    versions=np.array([learner.version], dtype=np.int32),
                    rewards={"outcome": float(token == wanted)},
                )
                for number, token in enumerate(chosen)
            ]
            record = learner.step(samples_of(rollouts, ON_POLICY))
            assert record["mismatch/max_abs"] < 1e-5 and record["version"] == group + 1
        assert shares[0] < 0.05 < 0.5 < shares[-1], shares


def test_a_large_network_is_gathered_by_layer_and_learns_the_same(run_dir: Path, monkeypatch: pytest.MonkeyPatch):
    records, weights = [], []
    for most in (shard.GATHERED_PARAMETERS, 0):
        monkeypatch.setattr(shard, "GATHERED_PARAMETERS", most)
        with opened_learner(toy_config(run_dir, recomputes=True), ON_POLICY, CPU) as learner:
            # Two layers, their indexers, and the rest.
            assert len(shard.units(learner.policy)) == (5 if most == 0 else 1)
            samples = sampled(learner, toy_group(0, algorithm=ON_POLICY, has_picture=True))
            records.append([learner.step(samples) for _ in range(2)][-1])
            weights.append(parameters_of(learner))
    assert records[0] == pytest.approx(records[1], rel=1e-5, abs=1e-7)
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", ["gspo", "grpo", "dr_grpo", "dapo", "cispo"])
def test_every_objective_raises_what_is_better_than_its_group(run_dir: Path, objective: str):
    algorithm = AlgorithmConfig(objective, max_tokens=12)
    with opened_learner(toy_config(run_dir), algorithm, CPU) as learner:
        samples = sampled(learner, [*toy_group(0, algorithm=algorithm), *toy_group(1, algorithm=algorithm, has_picture=True)])
        before = [own.sum() for own in learner.logprobs(samples)]
        learner.step(samples)
        gains = [own.sum() - old for own, old in zip(learner.logprobs(samples), before, strict=True)]
    advantages = [sample.streams.advantages[0] for sample in samples]
    assert np.corrcoef(gains, advantages)[0, 1] > 0.5


def test_imitation_and_divergence_have_streams_of_their_own(run_dir: Path):
    rollout = toy_rollout(0, 0)
    with opened_learner(toy_config(run_dir), ON_POLICY, CPU) as learner:
        told = LearnerSample(toy_document(rollout), rollout, imitation_streams(rollout))
        (before,) = learner.logprobs([told])
        record = learner.step([told])
        assert record["loss/ce"] == pytest.approx(-before.mean(), rel=1e-5) and record["loss/rl"] == 0
        assert learner.logprobs([told])[0].sum() > before.sum()
        # A reference that says what the policy says itself is no loss at all, by either road.
        (own,) = learner.logprobs([told])
        nothing = np.zeros_like(own)
        towards = TokenStreams(nothing, nothing, nothing, np.ones_like(own), ref_logprobs=own)
        record = learner.step([replace(told, streams=towards)])
        assert abs(record["loss/ref_kl"]) < 1e-10 and record["gradient_norm"] < 1e-5
        # The moments of the first step have moved the policy on.
        (own,) = learner.logprobs([told])
        lower = replace(towards, ref_logprobs=own - 1)
        assert learner.step([replace(told, streams=lower)])["loss/ref_kl"] == pytest.approx(0.5, rel=1e-4)
        assert learner.logprobs([told])[0].sum() < own.sum()


def test_a_teacher_on_a_support_is_drawn_near(run_dir: Path):
    rollout = toy_rollout(0, 0, num_output=6)
    ids = np.tile(np.array([[11, 12, 13, -1]], dtype=np.int32), (6, 1))
    teacher = np.log(np.tile(np.array([[0.7, 0.2, 0.1, 1.0]], dtype=np.float32), (6, 1)))
    nothing = np.zeros(6, dtype=np.float32)
    streams = TokenStreams(nothing, nothing, nothing, nothing + 1, support_ids=ids, support_logprobs=teacher)
    sample = LearnerSample(toy_document(rollout), rollout, streams)
    with opened_learner(toy_config(run_dir, rate=3e-3), ON_POLICY, CPU) as learner:
        records = [learner.step([sample]) for _ in range(12)]
    losses = [record["loss/ref_kl"] for record in records]
    assert losses[0] > 0.05 and losses[-1] < 0.1 * losses[0]
    assert records[0]["support/teacher_mass"] == pytest.approx(1) and records[0]["support/empty_share"] == 0
    assert 0 < records[0]["support/student_mass"] < 0.5


def test_minibatches_are_clipped_against_the_policy_before_the_first(run_dir: Path):
    algorithm = AlgorithmConfig("grpo", clip_low=0.01, clip_high=0.01, correction="none")
    with opened_learner(toy_config(run_dir, num_minibatches=4, rate=1e-2), algorithm, CPU) as learner:
        groups = [one for number in range(4) for one in toy_group(number, algorithm=algorithm, has_picture=number < 2)]
        samples = sampled(learner, groups)
        expected = learner.logprobs(samples)
        records = learner.update(samples)
        assert len(records) == 4 and learner.num_steps == 4 and learner.version == 1
        # The trainer's log-probabilities that figures and ratios go by are those before the first step.
        assert all(record["mismatch/max_abs"] < 1e-5 for record in records)
        assert records[0]["update/k3"] < 1e-9 and records[0]["clip_low_share"] == records[0]["clip_high_share"] == 0
        assert records[3]["update/k3"] > 1e-4 and records[3]["clip_low_share"] + records[3]["clip_high_share"] > 0.2
        assert any(abs(now - old).max() > 0.01 for now, old in zip(learner.logprobs(samples), expected, strict=True))


def test_ratios_may_be_to_the_log_probabilities_of_sampling(run_dir: Path):
    algorithm = AlgorithmConfig("grpo", proximal="rollout", correction="none")
    with opened_learner(toy_config(run_dir, num_minibatches=2), algorithm, CPU) as learner:
        samples = toy_group(0, algorithm=algorithm)
        ratio = np.exp(
            np.concatenate([own - one.rollout.logprobs for own, one in zip(learner.logprobs(samples), samples, strict=True)])
        )
        better = np.concatenate([one.streams.advantages > 0 for one in samples])
        (record,) = learner.update(samples)
    assert record["clip_high_share"] == pytest.approx(((better & (ratio > 1.2)) | (~better & (ratio > 3))).mean())
    assert record["clip_low_share"] == pytest.approx((~better & (ratio < 0.8)).mean())
    assert 0 < record["clip_high_share"] < 1 and 0 < record["clip_low_share"] < 1 and record["masked_share"] == 0


def test_one_minibatch_is_one_step(run_dir: Path, tmp_path: Path):
    samples = [*toy_group(0), *toy_group(1)]
    found = []
    for way in ("step", "update"):
        with opened_learner(toy_config(run_dir, run_dir=str(tmp_path / way)), AlgorithmConfig(), CPU) as learner:
            learner.step(samples) if way == "step" else learner.update(samples)
            found.append(parameters_of(learner))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_what_is_frozen_stays(run_dir: Path):
    with opened_learner(toy_config(run_dir, trains=("decoder",)), AlgorithmConfig(), CPU) as learner:
        before = parameters_of(learner)
        learner.step(toy_group(0, has_picture=True))
        after = parameters_of(learner)
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        published = {name for name, _ in learner.weights()}
    assert changed <= published
    assert not any(name.startswith(("visual", "mlp_AR")) or "sa_indexer" in name for name in published)
    assert "lm_head.weight" in changed and "model.layers.0.mlp.experts.gate_up_proj" in changed


def test_the_indexer_may_learn_by_its_divergence(run_dir: Path):
    config = toy_config(run_dir, trains=("decoder", "indexer"), indexer_target="selected")
    with opened_learner(config, AlgorithmConfig(), CPU) as learner:
        before = parameters_of(learner)
        record = learner.step(toy_group(0, num_prompt=12))
        after = parameters_of(learner)
    assert record["indexer_kl"] > 0
    assert any("sa_indexer" in name and not torch.equal(before[name], after[name]) for name in before)


def test_the_record_tells_what_is_always_logged(run_dir: Path):
    rollouts = [
        replace(
            one.rollout,
            versions=np.full(len(one.rollout.output_ids), -2 - number),
            rewards={"outcome": number % 2, "format": 1.0},
        )
        for number, one in enumerate(toy_group(0))
    ]
    rollouts[1] = replace(rollouts[1], finish_reason="length")
    samples = [with_routes(one, 3) for one in samples_of(rollouts, AlgorithmConfig())]
    with opened_learner(toy_config(run_dir), AlgorithmConfig(correction="icepop", correction_low=0.5), CPU) as learner:
        logprobs = learner.logprobs(samples)
        record = learner.step(samples)
    difference = np.concatenate([own - one.rollout.logprobs for own, one in zip(logprobs, samples, strict=True)])
    ratio = np.exp(difference.astype(np.float64))
    expected = {
        "mismatch/mean_abs": np.abs(difference).mean(),
        "mismatch/max_abs": np.abs(difference).max(),
        "mismatch/k3": (ratio - 1 - np.log(ratio)).mean(),
        "mismatch/chi_square": (ratio**2).mean() - 1,
        "effective_sample_size": ratio.sum() ** 2 / (len(ratio) * (ratio**2).sum()),
        "masked_share": ((ratio < 0.5) | (ratio > 2)).mean(),
        "clip_low_share": 0.0,
        "length": np.mean([len(one.output_ids) for one in rollouts]),
        "length_max": max(len(one.output_ids) for one in rollouts),
        "cut_share": 0.25,
        "repetition_share": 0.0,
        "reward/outcome": 0.5,
        "reward/format": 1.0,
        "age": np.mean([2, 3, 4, 5]),
        "age_max": 5,
        "num_skipped": 0,
    }
    for name, value in expected.items():
        assert record[name] == pytest.approx(value, rel=2e-4, abs=1e-7), name
    assert 0 < record["masked_share"] < 1 and 0 < record["route_disagreement"] < 1
    assert record["route_disagreement_tokens"] >= record["route_disagreement"]
    assert 0 < record["entropy"] <= np.log(VOCABULARY) and record["gradient_norm"] > 0 and record["rate/decoder"] == 1e-3


def test_repetition():
    assert repetition_share(np.arange(30)) == 0 and repetition_share(np.arange(5)) == 0
    assert repetition_share(np.tile(np.arange(10), 4)) == pytest.approx(1 - 10 / 33)


def test_nothing_to_learn_is_said_and_changes_nothing(run_dir: Path):
    samples = toy_group(0)
    silent = [replace(one, streams=replace(one.streams, rl_weights=0 * one.streams.rl_weights)) for one in samples]
    with opened_learner(toy_config(run_dir, weight_decay=0.1), AlgorithmConfig(), CPU) as learner:
        before = parameters_of(learner)
        for learn in (learner.step, learner.update):
            with pytest.raises(InputError, match="nothing to learn"):
                learn(silent)
        with pytest.raises(InputError, match="tokens_per_pack"):
            learner.step([*samples, *toy_group(1, num_prompt=120)])
        after = parameters_of(learner)
        assert learner.version == 0 and all(torch.equal(before[name], after[name]) for name in before)


def test_a_sample_is_checked_where_it_is_made():
    rollout = toy_rollout(0, 0)
    document, streams = toy_document(rollout), imitation_streams(rollout)
    other = replace(document, input_ids=document.input_ids.flip(0))
    masked = replace(rollout, is_policy=np.zeros(len(rollout.output_ids), dtype=bool))
    wrong: list[tuple[Any, Rollout, TokenStreams, str]] = [
        (other, rollout, streams, "document"),
        (document, rollout, replace(streams, ce_weights=np.ones(1)), "every stream"),
        (document, masked, replace(streams, rl_weights=streams.ce_weights), "did not sample"),
        (document, rollout, replace(streams, ref_kl_weights=streams.ce_weights), "reference"),
    ]
    for bad_document, bad_rollout, bad_streams, told in wrong:
        with pytest.raises(ValueError, match=told):
            LearnerSample(bad_document, bad_rollout, bad_streams)


def test_groups_are_shared_out_whole():
    rollouts = [toy_rollout(number, member, num_output=5) for number, size in enumerate((2, 5, 3, 4)) for member in range(size)]
    shares = share_out(rollouts, 2)
    assert sorted(number for share in shares for number in share) == list(range(14))
    assert [len(share) for share in shares] == [7, 7]
    groups = [{rollouts[number].id.group for number in share} for share in shares]
    assert not groups[0] & groups[1]
    assert share_out(rollouts[:2], 3) == [[0, 1], [], []]


# Checkpoints


def test_a_policy_goes_on_from_its_checkpoint_with_its_version(run_dir: Path, tmp_path: Path):
    config = toy_config(run_dir, run_dir=str(tmp_path / "policy"))
    groups = [toy_group(number) for number in range(3)]
    with opened_learner(config, AlgorithmConfig(), CPU) as learner:
        learner.step(groups[0])
        learner.save({"journal": 41})
        learner.step(groups[1])
        learner.save({"journal": 42}, waits=False)
        # Written as it was, however the training goes on.
        learner.step(groups[2])
        expected = parameters_of(learner)
    with opened_learner(config, AlgorithmConfig(), CPU) as learner:
        assert (learner.version, learner.num_steps, learner.notes) == (2, 2, {"journal": 42})
        learner.step(groups[2])
        found = parameters_of(learner)
        # Two checkpoints of one step do not take one another's place.
        learner.save()
        learner.save({"journal": 43})
        assert learner.checkpoints.latest is not None and learner.checkpoints.latest.name == "step-4"
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_learner_that_was_asked_may_be_put_back(run_dir: Path):
    samples = toy_group(0)
    with opened_learner(toy_config(run_dir), AlgorithmConfig(), CPU) as learner:
        learner.save()
        expected, weights = learner.logprobs(samples), parameters_of(learner)
        learner.step(samples)
        assert any(abs(now - old).max() > 1e-3 for now, old in zip(learner.logprobs(samples), expected, strict=True))
        # What the last pass has gathered must not stand in the way of what is loaded.
        assert learner.load() and learner.version == 0
        found = parameters_of(learner)
        assert all(torch.equal(weights[name], found[name]) for name in weights)
        assert all(np.array_equal(now, old) for now, old in zip(learner.logprobs(samples), expected, strict=True))
        masters = {type(parameter).__name__ for parameter in learner.keye.parameters()}
        assert masters == {"DTensor"}


def test_a_kill_leaves_the_last_good_checkpoint(run_dir: Path):
    """A process that saves again and again is killed; whatever version is found has its very weights."""
    command = [sys.executable, "-m", "tests.rl.saving_learner", str(run_dir)]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as process:
        assert process.stdout is not None
        lines = []
        while len(lines) < 3:
            lines.append(process.stdout.readline())
            assert lines[-1], "the learner ended by itself"
        process.send_signal(signal.SIGKILL)
        lines += process.stdout.readlines()
    sums = {int(line.split()[0]): float(line.split()[1]) for line in lines if line.endswith("\n")}
    with opened_learner(toy_config(run_dir), AlgorithmConfig(), CPU) as learner:
        assert learner.version >= 3 and learner.notes == {"journal": learner.version}
        if learner.version in sums:
            assert float(sum(tensor.double().sum() for tensor in parameters_of(learner).values())) == sums[learner.version]


def test_the_policy_is_written_as_a_model(run_dir: Path, tmp_path: Path):
    with opened_learner(toy_config(run_dir), AlgorithmConfig(), CPU) as learner:
        learner.step(toy_group(0))
        learner.write_model(tmp_path / "out")
        expected = parameters_of(learner)
    written = load_model(tmp_path / "out").state_dict()
    assert expected.keys() == written.keys()
    assert all(torch.equal(expected[name], written[name]) for name in expected)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_run_of_another_kind_is_not_taken_for_a_policy(run_dir: Path):
    with opened_learner(toy_config(run_dir), AlgorithmConfig(), CPU) as learner:
        other = Checkpoints(run_dir / "other", learner.ranks)
        other.save(Place(step=1, stage=0, step_in_stage=0), {"x": torch.zeros(1)})
        other.wait()
    with (
        pytest.raises(InputError, match="openkeye train"),
        opened_learner(toy_config(run_dir, run_dir=str(run_dir / "other")), AlgorithmConfig(), CPU),
    ):
        pass
