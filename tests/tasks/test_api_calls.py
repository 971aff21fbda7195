"""The task over the worlds: determinism, split, levels, wording, and scoring of transcripts."""

import asyncio
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from openkeye.agents.api_domains.catalogue import split
from openkeye.common.checks import InputError
from openkeye.data.convert import DocumentLimits, to_document
from openkeye.data.sample import Sample
from openkeye.inputs.processor import Processor
from openkeye.tasks.api_calls import LEVELS, ApiCalls, reference_conversation, reference_conversations
from openkeye.tasks.task import Response

TOKENIZER = Path(__file__).parents[2] / "openkeye" / "checkpoints" / "openkeye-tiny" / "tokenizer.json"


def score(task: ApiCalls, number: int, response: Response) -> dict[str, float]:
    return dict(asyncio.run(task.score(task.read(number), response)))


def test_a_number_gives_the_same_example_in_every_process():
    code = (
        "import hashlib, pickle; from openkeye.tasks.api_calls import ApiCalls;"
        "print([(e.facts, e.environment.opening()) for e in map(ApiCalls(seed=4).read, range(30))])"
    )
    told = {
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment).stdout
        for environment in ({"PYTHONHASHSEED": "1", **paths()}, {"PYTHONHASHSEED": "2", **paths()})
    }
    assert len(told) == 1 and len(told.pop()) > 1000


def paths() -> dict[str, str]:
    return {"PYTHONPATH": str(Path(__file__).parents[2])}


def test_held_out_examples_are_of_other_worlds():
    train, held_out = (
        {task.read(number).facts["domain"] for number in range(200)} for task in (ApiCalls(), ApiCalls("held_out"))
    )
    assert len(train) == 120 and held_out == {domain.name for domain in split("held_out")} and not train & held_out


def test_numbers_and_seeds_give_different_examples():
    task = ApiCalls()
    assert task.read(0).facts["domain"] == task.read(120).facts["domain"]
    requests = {
        tuple(turn.request for turn in given.read(number).environment.goal.turns)
        for given in (task, ApiCalls(seed=1))
        for number in (0, 120)
    }
    assert len(requests) == 4


@pytest.mark.parametrize("level", LEVELS)
def test_levels_ask_for_so_many_calls_and_their_references_score_one(level):
    for wording in ("plain", "full"):
        task = ApiCalls(level=level, wording=wording)
        for number in range(20):
            example = task.read(number)
            assert LEVELS[level]["min_calls"] <= example.facts["num_calls"] <= LEVELS[level]["max_calls"]
            assert len(example.environment.tools) <= LEVELS[level]["num_distractors"] + LEVELS[level]["max_calls"]
            messages, _ = reference_conversation(example)
            transcript = messages[len(example.environment.opening().messages) :]
            rewards = score(task, number, Response(messages[-1]["content"], transcript=transcript))
            assert rewards["outcome"] == 1 and rewards["excess_calls"] == 0


def test_scoring_is_of_the_transcript_and_leaves_the_example_alone():
    task = ApiCalls(level=3)
    example = task.read(8)
    before = pickle.dumps(example.environment)
    messages, _ = reference_conversation(example)
    mute = {"role": "assistant", "content": None}
    for transcript in ((), (mute,), messages[-1:]):
        rewards = asyncio.run(task.score(example, Response("done", transcript=transcript)))
        assert rewards["outcome"] == 0
    assert pickle.dumps(example.environment) == before


def test_plain_references_are_learnt_with_the_smallest_models_template():
    processor = Processor.load(str(TOKENIZER.parent))
    task = ApiCalls(level=3, wording="plain")
    for number, (messages, tools) in enumerate(reference_conversations(task, range(12))):
        sample = Sample(f"api_calls:{number}", messages, tools=tools, task="api_calls")
        document = to_document(sample, processor, DocumentLimits(context=2048))
        learnt = processor.tokenizer.decode(document.input_ids[document.is_learnt].tolist())
        # Every call and every answer is learnt, and nothing that a tool or the user said.
        said = [message["content"] for message in messages if message["role"] == "assistant"]
        assert learnt.replace("<|im_end|>", "") == "".join(said)


def test_plain_prompts_are_short_in_the_smallest_models_tokens():
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    for level, most in ((1, 180), (2, 250), (3, 300), (4, 400)):
        task = ApiCalls(level=level, wording="plain")
        for messages, tools in reference_conversations(task, range(60)):
            text = messages[0]["content"]
            ids = tokenizer.encode(text).ids
            assert not tools and len(ids) <= most, (level, len(ids), text)
            # Bytes stand in where a word is not known: nothing is lost.
            assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "settings",
    [
        {"split": "test"},
        {"wording": "short"},
        {"min_calls": 0},
        {"min_calls": 3, "max_calls": 2},
        {"max_calls": 6},
        {"kinds": ()},
        {"kinds": ("act", "sing")},
        {"num_distractors": -1},
    ],
)
def test_a_wrong_setting_is_told(settings):
    with pytest.raises(InputError, match=r"api_calls: .*give"):
        ApiCalls(**settings)
    with pytest.raises(InputError, match="level is 9; give one of 1, 2"):
        ApiCalls(level=9)
