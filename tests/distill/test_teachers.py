import asyncio
from pathlib import Path

import numpy as np
import pytest

from openkeye.common.checks import InputError
from openkeye.distill.scored import ModelScorer, Scored
from openkeye.distill.teacher_weights import write_delta
from openkeye.distill.teachers import ModelSeat, ScoreCache, TeacherPool, TeacherRoutes, score_key
from openkeye.model.weights import load_model
from tests.distill.toy_teachers import picture_prompt, response, text_prompt, write_descendant, write_model

PROMPT = text_prompt(1, 2, 3)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    """A base as the teacher "teacher_model", two that are deltas of it, and one name more for the second one's weights."""
    base = write_model(tmp_path / "base")
    for number, name in enumerate(("maths", "code")):
        write_delta(base, write_descendant(base, tmp_path / f"{name}_whole", number), tmp_path / name)
    names = {"teacher_model": "base", "maths": "maths", "code": "code", "tools": "code_whole"}
    return {name: str(tmp_path / folder) for name, folder in names.items()}


def opened(folders: dict[str, str]) -> TeacherPool:
    return TeacherPool(folders, ModelSeat(folders["teacher_model"]))


def told(folder: str, ids: np.ndarray) -> np.ndarray:
    """What a teacher by itself says of a response."""
    whole = folder if not folder.endswith(("maths", "code")) else f"{folder}_whole"
    return ModelScorer(load_model(whole)).score(PROMPT, ids, None, 4).logprobs


def test_routes_lead_to_names_and_unknown_labels_are_errors():
    teachers = {"teacher_model": "a", "maths": "b"}
    routes = TeacherRoutes({"text/gsm": "maths", "video/*": "teacher_model", "video/tg": "maths"}, teachers)
    assert routes.teacher_of("text", "gsm") == routes.teacher_of("video", "tg") == "maths"
    assert routes.teacher_of("video", "caption") == "teacher_model"
    for label in (("text", "gsm8"), ("image", "gsm")):
        with pytest.raises(InputError, match=r"is unknown.*known: text/gsm, video/\*, video/tg"):
            routes.teacher_of(*label)
    with pytest.raises(InputError, match="did you mean maths"):
        TeacherRoutes({"text/gsm": "math"}, teachers)
    for wrong in ("gsm", "text/", "a/b/c"):
        with pytest.raises(InputError, match="MODALITY/TASK"):
            TeacherRoutes({wrong: "maths"}, teachers)


def test_every_teacher_is_brought_in_once_a_step_however_responses_arrive(folders):
    async def step(pool: TeacherPool, order: list[str]) -> list[Scored]:
        pool.begin_step({name: order.count(name) for name in set(order)})

        async def later(number: int, name: str) -> Scored:
            await asyncio.sleep(0.004 * number)
            return await pool.score(name, PROMPT, response(number + 100 * (len(order) == 9)), None, 4)

        return await asyncio.gather(*(later(number, name) for number, name in enumerate(order)))

    async def run() -> None:
        pool = opened(folders)
        order = ["maths", "code", "teacher_model", "tools"] * 3
        found = await step(pool, order)
        for number, (name, scored) in enumerate(zip(order, found, strict=True)):
            assert np.array_equal(scored.logprobs, told(folders[name], response(number))), (number, name)
        figures = pool.take_figures()
        # "tools" has the very weights of "code", under another name and as a whole checkpoint.
        assert pool.hashes["tools"] == pool.hashes["code"] and figures.num_turns == 3
        assert (figures.num_loads, figures.num_swaps, figures.num_scored) == (1, 2, 12)
        assert figures.load_seconds > 0 < figures.score_seconds
        # The teacher that is there begins the next step.
        await step(pool, ["maths", "code", "teacher_model"] * 3)
        assert pool.take_figures().num_turns == 2
        await pool.close()

    asyncio.run(run())


def test_without_a_plan_a_pool_changes_over_only_when_nothing_waits(folders):
    async def run() -> None:
        pool = opened(folders)
        order = ["maths", "code"] * 4
        await asyncio.gather(*(pool.score(name, PROMPT, response(n), None, 2) for n, name in enumerate(order)))
        assert pool.take_figures().num_turns == 2
        await pool.close()

    asyncio.run(run())


def test_scoring_begins_before_the_last_response_has_come(folders):
    async def run() -> None:
        pool = opened(folders)
        pool.begin_step({"maths": 2, "code": 1})
        first = await pool.score("maths", PROMPT, response(0), None, 2)
        assert len(first.logprobs) == 9
        # It keeps its turn for the one that is still to come...
        other = asyncio.create_task(pool.score("code", PROMPT, response(1), None, 2))
        await asyncio.sleep(0.1)
        assert not other.done()
        # ...until that is said not to come at all.
        pool.withdraw("maths")
        await asyncio.wait_for(other, 5)
        await pool.close()

    asyncio.run(run())


def test_what_is_known_is_not_computed_again(folders):
    async def run() -> None:
        pool = opened(folders)
        chosen = np.array([[1, 2]] * 9)
        first = await pool.score("maths", PROMPT, response(0), chosen, 2)
        again = await pool.score("maths", PROMPT, response(0), chosen, 2)
        assert again is first
        for name, prompt, ids, asked, top_k in (
            ("code", PROMPT, response(0), chosen, 2),
            ("maths", text_prompt(1, 2, 4), response(0), chosen, 2),
            ("maths", PROMPT, response(1), chosen, 2),
            ("maths", PROMPT, response(0), chosen + 1, 2),
            ("maths", PROMPT, response(0), None, 2),
            ("maths", PROMPT, response(0), chosen, 3),
        ):
            assert await pool.score(name, prompt, ids, asked, top_k) is not first
        tools = await pool.score("tools", PROMPT, response(0), chosen, 2)
        assert tools is await pool.score("code", PROMPT, response(0), chosen, 2), "the same weights by another name"
        figures = pool.take_figures()
        assert (figures.num_cached, figures.num_scored) == (3, 7)
        await pool.close()

    asyncio.run(run())


def test_a_seat_that_scores_several_at_once_is_kept_busy_and_changes_hands_when_it_is_idle(folders):
    class SlowSeat(ModelSeat):
        num_slots = 3

        def __init__(self) -> None:
            super().__init__(folders["teacher_model"])
            self.now, self.most, self.folders = 0, 0, []

        async def use(self, folder: str) -> None:
            assert self.now == 0, "somebody is still being scored"
            self.folders.append(folder)
            await super().use(folder)

        async def score(self, *arguments) -> Scored:
            self.now += 1
            self.most = max(self.most, self.now)
            await asyncio.sleep(0.01)
            self.now -= 1
            return await super().score(*arguments)

    async def run() -> None:
        seat = SlowSeat()
        pool = TeacherPool(folders, seat)
        pool.begin_step({"maths": 5, "code": 5})
        order = ["maths", "code"] * 5
        found = await asyncio.gather(*(pool.score(name, PROMPT, response(n), None, 4) for n, name in enumerate(order)))
        for number, (name, scored) in enumerate(zip(order, found, strict=True)):
            assert np.array_equal(scored.logprobs, told(folders[name], response(number)))
        assert seat.most == 3 and len(seat.folders) == 2
        await pool.close()

    asyncio.run(run())


def test_pictures_are_part_of_what_is_known():
    keys = {score_key("w", picture_prompt(seed), response(0), None, 2) for seed in (0, 1, 0)}
    assert len(keys) == 2


def test_cache_keeps_what_was_used_last_and_no_more_than_its_bytes():
    scored = Scored(
        np.zeros(5, np.float32), np.zeros((5, 1), np.float32), np.zeros((5, 2), np.int32), np.zeros((5, 2), np.float32)
    )
    cache = ScoreCache(3 * scored.num_bytes)
    for key in (b"a", b"b", b"c"):
        cache.keep(key, scored)
    assert cache.find(b"a") is scored
    cache.keep(b"d", scored)
    assert cache.find(b"b") is None and cache.find(b"a") is cache.find(b"c") is scored
    assert cache.num_bytes == 3 * scored.num_bytes
    small = ScoreCache(scored.num_bytes - 1)
    small.keep(b"a", scored)
    assert small.find(b"a") is None and small.num_bytes == 0


def test_whoever_asks_hears_of_a_failure_and_the_pool_goes_on(folders, tmp_path):
    async def run() -> None:
        pool = opened(folders)
        (Path(folders["code"]) / "delta.safetensors").write_bytes(b"broken")
        with pytest.raises(InputError, match="safetensors"):
            await pool.score("code", PROMPT, response(0), None, 2)
        with pytest.raises(InputError, match="known: teacher_model, maths"):
            await pool.score("physics", PROMPT, response(0), None, 2)
        with pytest.raises(InputError, match="known"):
            pool.begin_step({"physics": 1})
        scored = await pool.score("maths", PROMPT, response(0), None, 4)
        assert np.array_equal(scored.logprobs, told(folders["maths"], response(0)))
        gone = asyncio.create_task(pool.score("maths", PROMPT, response(7), None, 2))
        await asyncio.sleep(0)
        gone.cancel()
        assert len((await pool.score("maths", PROMPT, response(8), None, 2)).logprobs) == 9
        await pool.close()

    asyncio.run(run())
