"""The corpus and its index, and answers that are the same though written otherwise."""

import json
import pickle

import pytest

from openkeye.agents.search import Corpus, Page, final_answer, is_same_answer, read_pages, write_index
from openkeye.common.checks import InputError

PAGES = [
    Page("a", "Harbours", "Ships lie in harbours. The lantern of the harbour burns at night."),
    Page("b", "The lantern", "A light in a case of glass."),
    Page("c", "Café", "People drink coffee, and a lantern hangs outside."),
    Page("d", "Storms", "Wind and rain."),
]


def test_search_ranks_and_stems():
    corpus = Corpus(PAGES)
    assert corpus.search("lanterns")[0].id == "b", "a word counts more in a title"
    assert {hit.id for hit in corpus.search("lanterns")} == {"a", "b", "c"}
    assert [hit.id for hit in corpus.search("cafe")] == ["c"] and "lantern" in corpus.search("harbour", 1)[0].snippet
    assert len(corpus.search("lantern", 2)) == 2


def test_queries_are_words_whatever_stands_in_them():
    corpus = Corpus(PAGES)
    for query in ('"', "AND OR NOT", "NEAR(", "title:x", "* - ^", "storms' --", "\ud800", ""):
        assert {hit.id for hit in corpus.search(query)} <= {"a", "b", "c", "d"}
    assert corpus.search('"storms" AND (')[0].id == "d"
    assert corpus.open("a' OR 1=1") is None and corpus.open("d") == PAGES[3]


def test_a_corpus_is_pickled_with_its_pages_or_its_file(tmp_path):
    corpus = Corpus(PAGES)
    hits = corpus.search("lantern")
    assert pickle.loads(pickle.dumps(corpus)).search("lantern") == hits
    assert write_index(PAGES, tmp_path / "index") == 4
    stored = Corpus(path=tmp_path / "index")
    stored.search("x")
    assert len(pickle.dumps(stored)) < 1000 and pickle.loads(pickle.dumps(stored)).search("lantern") == hits
    stored.close()
    assert stored.search("lantern") == hits
    with pytest.raises(InputError, match="there already"):
        write_index(PAGES, tmp_path / "index")
    with pytest.raises(InputError, match="write_index"):
        Corpus(path=tmp_path / "missing")
    with pytest.raises(InputError, match="'a' comes twice"):
        write_index([PAGES[0]] * 2, tmp_path / "twice")
    assert not (tmp_path / "twice").exists()


def test_pages_are_read_from_lines(tmp_path):
    path = tmp_path / "pages.jsonl"
    path.write_text(json.dumps({"id": 1, "text": "x"}) + "\n\n" + json.dumps({"id": "b", "title": "B", "text": "y"}))
    assert list(read_pages(path)) == [Page("1", "1", "x"), Page("b", "B", "y")]
    for broken in ("{", "[]", '{"id": "a"}', '{"text": "a"}'):
        path.write_text(broken)
        with pytest.raises(InputError, match=r"pages\.jsonl:1"):
            list(read_pages(path))


@pytest.mark.parametrize(
    ("answer", "truth"),
    [
        ("the Golden  lantern.", "Golden Lantern"),
        ("12,345", "12345"),
        ("March 4th, 1871", "4 March 1871"),
        ("1871-03-04", "4 March 1871"),
        ("Müller", "muller"),
    ],
)
def test_same_answers(answer, truth):
    assert is_same_answer(answer, ["other", truth])


@pytest.mark.parametrize(
    ("answer", "truth"), [("Anna or Berta", "Anna"), ("", "Anna"), ("4 May 1871", "4 March 1871"), ("5", "15")]
)
def test_other_answers(answer, truth):
    assert not is_same_answer(answer, [truth])
    assert not is_same_answer("", [""])


def test_the_answer_is_what_stands_behind_the_word():
    assert final_answer("I think so.\n**Answer:** Anna\n") == "Anna"
    assert final_answer("Answer: x\nFinal answer: y") == "y"
    assert final_answer(" Anna ") == "Anna"
