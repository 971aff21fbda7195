"""A distillation over real engines and the real learner, on openkeye-tiny: two teachers, a clip and a text, two steps."""

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from openkeye.common.checks import InputError
from openkeye.distill.config import DistillConfig, DistillRun
from openkeye.distill.engine_parts import learner_config, open_engine_parts
from openkeye.distill.estimator_config import EstimatorConfig
from openkeye.distill.loop import distill
from openkeye.distill.scored import ModelScorer
from openkeye.distill.teacher_weights import write_delta
from openkeye.engine.config import EngineConfig
from openkeye.inputs.processor import BUNDLED_DIR
from openkeye.inputs.video import Frames
from openkeye.model.weights import load_model, save_model
from openkeye.tasks.task import Example, Response

ENGINE = EngineConfig(cache_tokens=8192)


class Questions:
    """Of one modality."""

    num_examples = 8

    def __init__(self, name: str, modality: str) -> None:
        self.name, self._modality = name, modality

    def read(self, number: int) -> Example:
        """See `Task.read`."""
        content: list = [{"type": "text", "text": f"Count to {number}."}]
        if self._modality == "video":
            pixels = np.random.default_rng(number).integers(0, 256, (2, 112, 112, 3), dtype=np.uint8)
            content.insert(0, {"type": "video", "video": Frames(pixels, [0.0, 0.5], "drawn", 1.0)})
        return Example(self.name, number, self._modality, ({"role": "user", "content": content},))

    async def score(self, example: Example, response: Response) -> dict[str, float]:
        """Nobody looks at it."""
        return {"outcome": 0.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Deltas of openkeye-tiny: other heads for some tokens."""
    folder = tmp_path_factory.mktemp("teachers")
    for number, name in enumerate(("clips", "words")):
        model = load_model(BUNDLED_DIR)
        rows = torch.randperm(model.config.vocab_size, generator=torch.Generator().manual_seed(number))[:40]
        model.lm_head.weight[rows] *= 0.5
        save_model(model, folder / f"{name}_whole")
        for path in BUNDLED_DIR.iterdir():
            if "safetensors" not in path.name and path.name != "config.json":
                (folder / f"{name}_whole" / path.name).write_bytes(path.read_bytes())
        write_delta(BUNDLED_DIR, folder / f"{name}_whole", folder / name)
    return {name: str(folder / name) for name in ("clips", "words")}


def run_of(folder: Path, folders: dict[str, str], **changes) -> DistillRun:
    config = DistillConfig(folders, {"video/*": "clips", "text/*": "words"}, str(BUNDLED_DIR), EstimatorConfig(top_k=8))
    run = DistillRun(
        "openkeye-tiny", str(folder / "run"), str(folder / "out"), config, {"watch": 1.0, "read": 1.0}, 2, "a:b",
        rollouts_per_step=4, max_tokens=6, learner={"rate": 1e-4, "compute_dtype": "float32"}, has_tensorboard=False,
    )  # fmt: skip
    return replace(run, **changes)


def tasks() -> dict[str, Questions]:
    return {"watch": Questions("watch", "video"), "read": Questions("read", "text")}


def test_engines_and_learner_distil_and_go_on_where_they_stopped(folders, tmp_path):
    run = run_of(tmp_path, folders)
    records: list[dict] = []
    asked = iter([False, True])
    parts = open_engine_parts(run, tasks(), ENGINE)
    assert not asyncio.run(distill(run, parts, records.append, lambda: next(asked)))
    parts = open_engine_parts(run, tasks(), ENGINE)
    assert parts.learner.version == 1
    assert asyncio.run(distill(run, parts, records.append))
    assert [record["step"] for record in records] == [1, 2]
    assert all(record["num_samples"] == 4 and record["teachers/num_turns"] <= 2 for record in records)
    assert all(np.isfinite(value) for record in records for value in record.values() if isinstance(value, float))
    assert records[0]["mismatch/mean_abs"] < 1e-5, "engine and learner are one policy"
    assert records[0]["kl_abs"] > 0 and 0.5 < records[0]["overlap_ratio"] <= 1
    before, after = (load_model(folder).state_dict() for folder in (BUNDLED_DIR, run.out_dir))
    assert any(not torch.equal(before[name].float(), after[name].float()) for name in before)


def test_the_engines_seat_says_what_the_plain_scorer_says(folders, tmp_path):
    run = run_of(tmp_path, folders)
    parts = open_engine_parts(run, tasks(), ENGINE)
    ids = np.array([40, 41, 99, 300, 2], np.int32)
    chosen = np.array([[1, -1, 5]] * 5)

    async def ask() -> None:
        for name in ("clips", "words", "clips"):
            for task in parts.tasks.values():
                prompt = await parts.student_reader.read(task.read(0))
                found = await parts.pool.score(name, prompt, ids, chosen, 8)
                plain = ModelScorer(load_model(f"{folders[name]}_whole", dtype=torch.float32)).score(prompt, ids, chosen, 8)
                for field in ("logprobs", "chosen", "top_logprobs"):
                    assert np.allclose(getattr(found, field), getattr(plain, field), atol=1e-4), (name, task.name, field)
        await parts.pool.close()

    try:
        asyncio.run(ask())
    finally:
        parts.close()


def test_settings_of_the_learner_are_known_by_name(folders, tmp_path):
    assert learner_config(run_of(tmp_path, folders, learner={"trains": "decoder,projector"})).trains == ("decoder", "projector")
    with pytest.raises(InputError, match="did you mean rate"):
        learner_config(run_of(tmp_path, folders, learner={"rat": 1.0}))
