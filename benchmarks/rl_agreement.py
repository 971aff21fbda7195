"""How far the learner's log-probabilities are from those that its rollouts were sampled with, by length and number format.

    python -m benchmarks.rl_agreement [--rollouts 8] [--frames 0 16 60 240] [--tokens 64] [--device cpu] [--dtypes float32]

openkeye-tiny samples answers to questions about FrameForge clips (0 frames: plain text), and the learner reads the same tokens
with the experts of the rollout replayed and with experts of its own choice. Nothing is learnt: the rate is 0. "Elsewhere" are
tokens with a layer that the learner would have sent to other experts.
"""

import argparse
import asyncio
import dataclasses
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.rl_samples import ALGORITHM, samples_of
from openkeye.common.checks import InputError
from openkeye.engine.config import EngineConfig, SamplingParameters
from openkeye.engine.loop import Engine
from openkeye.frameforge.questions import make_questions
from openkeye.frameforge.render import render, scene_job
from openkeye.frameforge.scene import make_scene
from openkeye.inputs.video import Frames
from openkeye.rl.config import LearnerConfig
from openkeye.rl.learner import opened_learner
from openkeye.rl.learner_pack import LearnerSample
from openkeye.rl.policy_engine import PolicyEngine
from openkeye.rl.rollout import RolloutId

MODEL = "openkeye-tiny"
SIDE = 112
# pixels of a clip's frames
FRAMES_A_SECOND = 2
GROUP = 4
TEXTS = ("Where is Paris?", "Count from one to twenty.", "What colours does a rainbow have?", "Tell me about the sea.")
TASK = "agreement"


def questions(num_frames: int, number: int) -> Iterator[list[dict[str, Any]]]:
    """Messages about one scene after another, or plain text."""
    for seed in range(number):
        if not num_frames:
            yield [{"role": "user", "content": TEXTS[seed % len(TEXTS)]}]
            continue
        rng = np.random.default_rng([seed, num_frames])
        times = np.arange(num_frames) / FRAMES_A_SECOND
        seconds = num_frames / FRAMES_A_SECOND
        scene = make_scene(rng, 0.0, seconds)
        pixels = render(scene_job(scene, times), SIDE, "cpu").numpy()
        asked = make_questions(scene, rng, times)
        text = asked[seed % len(asked)].text
        video = Frames(pixels, times.tolist(), "drawn", seconds)
        yield [{"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": text}]}]


def sampled(engine: Engine, num_frames: int, num_rollouts: int, num_tokens: int) -> list[LearnerSample]:
    """Groups of answers at temperature 1."""
    policy = PolicyEngine(engine)
    sampling = SamplingParameters(temperature=1.0, max_new_tokens=num_tokens)

    async def sample() -> list[LearnerSample]:
        samples = []
        for number, messages in enumerate(questions(num_frames, -(-num_rollouts // GROUP))):
            prompt = await policy.lay_out(messages)
            ids = [RolloutId(TASK, number, num_frames, member) for member in range(GROUP)]
            turns = await asyncio.gather(*(policy.sample(prompt, sampling, id) for id in ids))
            samples += samples_of(prompt, turns, ids[0], engine.processor.patch_size)
        return samples

    try:
        return asyncio.run(sample())
    finally:
        policy.close()


def compare(options: argparse.Namespace, dtype: torch.dtype, folder: Path) -> Iterator[str]:
    """Rows of one number format."""
    device, name = torch.device(options.device), str(dtype).removeprefix("torch.")
    engine = Engine(MODEL, device, dtype, config=EngineConfig(records_routes=True))
    config = LearnerConfig(
        MODEL,
        str(folder / name),
        rate=0.0,
        compute_dtype=name,
        # As the engine keeps its index keys in half precision on a GPU.
        emulates_e4m3=device.type == "cuda" and dtype == torch.bfloat16,
    )
    with opened_learner(config, ALGORITHM, device) as learner:
        for num_frames in options.frames:
            samples = sampled(engine, num_frames, options.rollouts, options.tokens)
            num_prompt = round(np.mean([one.num_prompt for one in samples]))
            num_tokens = sum(len(one.rollout.output_ids) for one in samples)
            for replays in (True, False):
                told = samples if replays else [without_routes(one) for one in samples]
                (record,) = learner.update(told)
                elsewhere = f"{record['route_disagreement_tokens']:.2%}" if replays else ""
                cells = [name, f"{num_frames}", f"{num_prompt:,}", f"{num_tokens:,}", "replayed" if replays else "live"]
                cells += [f"{record[key]:.2e}" for key in ("mismatch/mean_abs", "mismatch/max_abs", "mismatch/k3")]
                yield "| " + " | ".join([*cells, elsewhere]) + " |"


def without_routes(sample: LearnerSample) -> LearnerSample:
    """The same, for a learner that sends tokens where it would itself."""
    return dataclasses.replace(sample, rollout=dataclasses.replace(sample.rollout, routes=None))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=8, help="of each length; a multiple of 4")
    parser.add_argument("--frames", type=int, nargs="+", default=[0, 16, 60, 240])
    parser.add_argument("--tokens", type=int, default=64, help="of an answer, at most")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    options = parser.parse_args(arguments)
    print("| format | frames | prompt | sampled | experts | mean abs(delta log p) | largest | k3 | elsewhere |", flush=True)
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            for name in options.dtypes:
                for row in compare(options, getattr(torch, name), Path(folder)):
                    print(row, flush=True)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
