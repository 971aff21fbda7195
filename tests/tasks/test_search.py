"""Multi-hop questions: the evidence proves the answer, and a searcher that walks it is told from one that guesses."""

import asyncio
import itertools
import json
import pickle
import re

import pytest

from openkeye.agents.loop import run_agent
from openkeye.agents.search import Corpus, Page
from openkeye.common.checks import InputError
from openkeye.tasks.search import CorpusSearchTask, WorldSearchTask, read_questions
from openkeye.tasks.search_world import World
from openkeye.tasks.task import Response
from tests.agents.scripted import Scripted, call, say


def run(task, number, replies):
    example = task.read(number)
    episode = asyncio.run(run_agent(Scripted(replies), example.environment))
    return example, episode


def test_walking_the_evidence_earns_everything():
    task = WorldSearchTask()
    for number in range(6):
        facts = task.read(number).facts
        replies = [call("open", id=id) for id in facts["evidence"]] + [say(f"Answer: {facts['answers'][0]}")]
        example, episode = run(task, number, replies)
        assert episode.finish == "done" and episode.rewards["outcome"] == episode.rewards["evidence_opened"] == 1.0
        # From the transcript alone, in a process that has not seen the episode.
        fresh = pickle.loads(pickle.dumps(task.read(number)))
        response = Response(episode.answer, transcript=episode.transcript)
        assert asyncio.run(task.score(fresh, response)) == asyncio.run(task.score(example, response)) == episode.rewards


def test_guessing_is_seen():
    task = WorldSearchTask()
    answer = task.read(0).facts["answers"][0]
    _, guessed = run(task, 0, [say(f"Answer: {answer}")])
    assert guessed.rewards["outcome"] == 1.0 and guessed.rewards["evidence_opened"] == 0.0
    _, wrong = run(task, 0, [say("Answer: nobody")])
    assert wrong.rewards["outcome"] == 0.0
    _, hedged = run(task, 0, [say(f"Answer: {answer} or nobody")])
    assert hedged.rewards["outcome"] == 0.0


def test_an_answer_beside_a_call_is_none():
    task = WorldSearchTask(max_turns=1)
    answer = task.read(0).facts["answers"][0]
    replies = [pickle.loads(pickle.dumps(call("search", query="x")))]
    object.__setattr__(replies[0], "text", f"Answer: {answer}")
    assert run(task, 0, replies)[1].rewards["outcome"] == 0.0


def test_each_page_of_the_evidence_names_the_next_one():
    for seed in ("a", "b"):
        world = World(seed)
        for number in range(40):
            question = world.question(number, 2 + number % 3)
            if number % 3 == 2:
                continue
            chain = [world.things[id] for id in question.evidence]
            assert len(chain) == question.num_hops and chain[0].name in question.text
            pages = {page.id: page for page in world.pages()}
            for first, second in itertools.pairwise(chain):
                assert second.name.casefold() in pages[first.id].text.casefold()
                assert second.name not in question.text
            assert question.answers[0].casefold() in pages[chain[-1].id].text.casefold()


def test_comparisons_are_right():
    world = World("c")
    for number in range(2, 40, 3):
        question = world.question(number, 4)
        if len(question.evidence) < 4:
            continue
        texts = {page.id: page.text for page in world.pages()}
        ends = [question.evidence[1], question.evidence[3]]
        years = {int(re.search(r"founded in (\d+)", texts[id])[1]): world.things[id].name for id in ends}
        assert question.answers == (years[min(years)],)


def test_a_searcher_finds_its_way_by_searching():
    """The first page is found by the name in the question, as a model would."""
    task = WorldSearchTask(hops=(2,))
    num_found = 0
    for number in range(12):
        example = task.read(number)
        hits = example.environment.corpus.search(example.facts["text"], 5)
        num_found += example.facts["evidence"][0] in [hit.id for hit in hits]
    assert num_found >= 10


def test_worlds_repeat_and_differ():
    assert WorldSearchTask().read(5).facts == WorldSearchTask().read(5).facts
    assert WorldSearchTask("x").read(5).facts != WorldSearchTask("y").read(5).facts
    names = [{thing.name for thing in World(seed).things.values() if thing.kind == "person"} for seed in "ab"]
    assert len(names[0]) == 36 and len(names[0] & names[1]) <= 1
    with pytest.raises(InputError, match="hops"):
        WorldSearchTask(hops=(0,))


def test_own_pages_and_questions(tmp_path):
    corpus = Corpus([Page("a", "A", "x is in b"), Page("b", "B", "y")])
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"question": "What?", "answer": "Y", "evidence": ["a", "b"]}))
    task = CorpusSearchTask(read_questions(path, corpus), corpus)
    _, episode = run(task, 0, [call("search", query="x"), call("open", id="b"), call("open", id="q"), say("y")])
    assert episode.rewards == {"valid_calls": 2 / 3, "outcome": 1.0, "evidence_opened": 0.5, "evidence_found": 1.0}
    for broken in ("{", "[]", '{"question": "a"}', '{"question": "a", "answer": "b", "evidence": ["z"]}'):
        path.write_text(broken)
        with pytest.raises(InputError, match=r"questions\.jsonl:1"):
            read_questions(path, corpus)
