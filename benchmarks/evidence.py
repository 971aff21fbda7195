"""How well the evidence of an answer points at what was asked for, and what keeping it costs.

    python -m benchmarks.evidence [--clips 100] [--seed 0] [--tier standard]

Draws clips of FrameForge that training never saw, asks openkeye-tiny when things are visible, and looks at the frame with the
most attention and at the one picked most often: is the thing in it? Beside them, a frame chosen blindly. Intervals are of 95%,
over clips drawn again and again; where every clip agrees they have no width, and the number of clips says how sure that is.
"""

import argparse
import time
from collections.abc import Iterator

import numpy as np

from openkeye.engine.answer import Answer
from openkeye.engine.loop import Conversation, Engine
from openkeye.frameforge.questions import Question
from openkeye.frameforge.render import render, scene_job
from openkeye.frameforge.writer import SAMPLED_FPS, TIERS, make_clip
from openkeye.inputs.video import Frames

SIDE = 112
# pixels: the size at which openkeye-tiny looks at videos
NUM_RESAMPLES = 2000
NUM_WARM = 2
NUM_TIMED = 20


def conversations(arguments: argparse.Namespace, engine: Engine) -> Iterator[tuple[Conversation, list[Question]]]:
    """Every clip with its questions about when something is visible."""
    for index in range(arguments.clips):
        clip = make_clip(arguments.seed, index, arguments.tier)
        num_frames = max(2, int(clip.duration_seconds * SAMPLED_FPS))
        times = np.linspace(0, clip.duration_seconds - 1 / clip.tier.fps, num_frames)
        pixels = render(scene_job(clip.scene, times), SIDE, "cpu").numpy()
        frames = Frames(pixels, times.tolist(), clip.name, clip.duration_seconds)
        yield engine.open(frames), [question for question in clip.questions if question.kind == "intervals"]


def score(answer: Answer, question: Question) -> tuple[float, float, float, float]:
    """Of the thing asked for: is it in the frame of most attention, of most picks; its part of the frames, and of attention."""
    assert answer.evidence is not None
    moments = answer.evidence[0].moments
    is_shown = np.array(
        [any(m.start_seconds < last and first < m.end_seconds for first, last in question.intervals) for m in moments]
    )
    weights, shares = np.array([m.weight for m in moments]), np.array([m.share for m in moments])
    in_event = weights[is_shown].sum() / weights.sum()
    return float(is_shown[weights.argmax()]), float(is_shown[shares.argmax()]), float(is_shown.mean()), float(in_event)


def interval(clips: list[list[float]]) -> str:
    """Mean of all questions and its interval, from clips drawn again and again."""
    rng = np.random.default_rng(0)
    sums, counts = np.array([sum(clip) for clip in clips]), np.array([len(clip) for clip in clips])
    drawn = rng.integers(len(clips), size=(NUM_RESAMPLES, len(clips)))
    low, high = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), [0.025, 0.975])
    return f"{100 * sums.sum() / counts.sum():.1f}% ({100 * low:.1f}-{100 * high:.1f})"


def cost(conversation: Conversation, question: Question) -> tuple[float, float]:
    """Median milliseconds for each token of an answer, without evidence and with it, asked in turn."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for number in range(2 * (NUM_WARM + NUM_TIMED)):
        keeps = bool(number % 2)
        start = time.monotonic()
        answer = conversation.ask(question.text, evidence=keeps)
        if number >= 2 * NUM_WARM:
            seconds[keeps].append((time.monotonic() - start) / answer.num_generated_tokens)
    return 1e3 * float(np.median(seconds[False])), 1e3 * float(np.median(seconds[True]))


def main() -> None:
    """Ask, score, print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evidence", description="does evidence point at what was asked for"
    )
    parser.add_argument("--clips", type=int, default=100, help="number of clips")
    parser.add_argument("--seed", type=int, default=0, help="of the clips")
    parser.add_argument("--tier", choices=sorted(TIERS), default="standard", help="8-30 s or 1-5 min")
    arguments = parser.parse_args()
    engine = Engine()
    scores: list[list[tuple[float, float, float, float]]] = []
    costs = (0.0, 0.0)
    for conversation, questions in conversations(arguments, engine):
        answers = conversation.ask_many([question.text for question in questions], evidence=True)
        scores.append([score(answer, question) for answer, question in zip(answers, questions, strict=True)])
        costs = cost(conversation, questions[0]) if len(scores) == 1 else costs
    num_questions = sum(map(len, scores))
    print(f"{num_questions} questions about {len(scores)} clips, tier {arguments.tier}, seed {arguments.seed}, {engine.device}")
    names = (
        "frame of most attention shows it",
        "frame picked most often shows it",
        "a frame chosen blindly does",
        "its part of attention",
    )
    for place, name in enumerate(names):
        print(f"{name}: {interval([[row[place] for row in clip] for clip in scores])}")
    print(f"a token of an answer: {costs[0]:.2f} ms, with evidence {costs[1]:.2f} ms")


if __name__ == "__main__":
    main()
