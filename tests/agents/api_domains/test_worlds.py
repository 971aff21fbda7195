"""Every world, several seeds: the reference solution passes and what differs from it does not."""

import asyncio
from collections import Counter
from random import Random

import pytest

from openkeye.agents.api_domains.catalogue import domains, split
from openkeye.agents.api_domains.database import changes
from openkeye.agents.api_domains.environment import ApiEnvironment
from openkeye.agents.api_domains.goals import GoalDrawer
from openkeye.agents.api_domains.phrases import Phrases
from openkeye.agents.api_domains.rows import draw_database
from openkeye.agents.api_domains.schema import Domain
from openkeye.agents.api_domains.simulator import run_call
from openkeye.agents.api_domains.values import draw, show
from tests.agents.api_domains.episodes import Step, make, play_async, reference

SEEDS = range(3)
PERFECT = {"outcome": 1.0, "post_conditions": 1.0, "call_validity": 1.0, "argument_consistency": 1.0, "excess_calls": 0.0}


def episodes() -> list[ApiEnvironment]:
    """One of each world and seed: 1, 2 or 4 calls, half of them renamed, a third in plain wording."""
    return [
        make(
            domain,
            f"{seed} {domain.name}",
            (1, 2, 4)[(seed + number) % 3],
            is_renamed=(seed + number) % 2 == 0,
            is_plain=seed == 0,
        )
        for number, domain in enumerate(domains().values())
        for seed in SEEDS
    ]


@pytest.fixture(scope="module")
def made() -> list[ApiEnvironment]:
    return episodes()


def needed(world: ApiEnvironment, step: Step) -> bool:
    """Whether it is a call that changes rows or must be refused."""
    return not isinstance(step, str) and not world.worlds[0].actions[step[0]].is_read


def each(made: list[ApiEnvironment], check) -> None:
    async def run() -> None:
        for world in made:
            await check(world)

    asyncio.run(run())


def test_there_are_150_worlds_of_different_structure():
    assert len(domains()) >= 150
    exact = Counter(domain.signature for domain in domains().values())
    assert len(exact) == len(domains())
    # Without the order of tables and what refers to what: how many tables, fields and actions of each kind.
    rough = Counter(
        (
            len(domain.entities),
            tuple(sorted(Counter(cell.kind for table in domain.entities.values() for cell in table.fields.values()).items())),
            tuple(sorted(Counter(action.kind for action in domain.actions.values()).items())),
        )
        for domain in domains().values()
    )
    assert len(rough) >= 0.95 * len(domains()), rough.most_common(5)
    machines = {
        cell.moves for domain in domains().values() for table in domain.entities.values() for cell in table.fields.values()
    }
    assert len(machines) > 120


def test_splits_share_no_world():
    train, held_out = split("train"), split("held_out")
    assert len(train) == 120 and len(held_out) >= 30
    assert not {domain.name for domain in train} & {domain.name for domain in held_out}
    assert len(split("all")) == len(train) + len(held_out) == len(domains())
    # Known names, so that nobody moves the line unseen.
    assert [domain.name for domain in train[:3]] == ["neighbourhood_garden", "tax_office", "waste_collection"]


def test_every_action_can_be_done_in_some_state():
    dead = {}
    for domain in domains().values():
        left = {action.name for action in domain.actions.values() if not action.is_read}
        for seed in range(40):
            left -= {name for name in left if can_be_done(domain, name, seed)}
        if left:
            dead[domain.name] = left
    assert not dead


def can_be_done(domain: Domain, name: str, seed: int) -> bool:
    database = draw_database(domain, Random(seed))
    drawer = GoalDrawer(domain, database, Phrases(domain, {}), Random(seed))
    for _ in range(10):
        arguments, draft = drawer.draw_arguments(domain.actions[name]), database.copy()
        if arguments is not None:
            outcome = run_call(domain, draft, domain.actions[name], arguments)
            # (what the schema offers is never of a wrong type)
            assert outcome.fault in ("", "refused"), (domain.name, name, outcome)
            assert outcome.is_done or draft == database
            if outcome.is_done and changes(database, draft):
                return True
    return False


def test_reference_solutions_pass(made):
    async def check(world: ApiEnvironment) -> None:
        assert await play_async(world, reference(world)) == PERFECT, (world.worlds[0].name, world.goal)

    each(made, check)


def test_pickling_between_steps_changes_nothing(made):
    async def check(world: ApiEnvironment) -> None:
        assert await play_async(world, reference(world), is_pickled=True) == PERFECT, world.worlds[0].name

    each(made[::3], check)


def test_doing_nothing_fails(made):
    async def check(world: ApiEnvironment) -> None:
        for words in ("", "done", "refused", *(turn.last_words for turn in world.goal.turns)):
            rewards = await play_async(world, [words] * len(world.goal.turns))
            # Not even the right words count where nothing was read or tried.
            assert rewards["outcome"] == rewards["post_conditions"] == rewards["call_validity"] == 0, (world.goal, rewards)

    each(made, check)


def test_leaving_a_needed_call_out_fails(made):
    num_checked = 0

    async def check(world: ApiEnvironment) -> None:
        nonlocal num_checked
        steps = reference(world)
        for number, step in enumerate(steps):
            if needed(world, step):
                num_checked += 1
                rewards = await play_async(world, steps[:number] + steps[number + 1 :])
                assert rewards["outcome"] == 0, (world.worlds[0].name, world.goal, step)

    each(made, check)
    assert num_checked > 400


def test_a_wrong_argument_fails(made):
    num_checked = 0

    async def check(world: ApiEnvironment) -> None:
        nonlocal num_checked
        steps, domain, rng = reference(world), world.worlds[0], Random(1)
        for number, step in enumerate(steps):
            if not needed(world, step):
                continue
            action, arguments = step
            for item in domain.parameters(domain.actions[action]):
                ids = list(world.firsts[0].tables.get(item.field.target, ()))
                other = show(item.field, draw(item.field, rng, ids, world.is_plain))
                if other != arguments[item.name]:
                    num_checked += 1
                    wrong = (action, {**arguments, item.name: other})
                    rewards = await play_async(world, [*steps[:number], wrong, *steps[number + 1 :]])
                    assert rewards["outcome"] == 0 and rewards["argument_consistency"] < 1, (domain.name, world.goal, wrong)

    each(made, check)
    assert num_checked > 700


def test_undoing_a_change_or_changing_more_fails(made):
    async def check(world: ApiEnvironment) -> None:
        await play_async(world, reference(world))
        first, state, domain = world.firsts[0], world.databases[0], world.worlds[0]
        for entity, key, name, value in changes(first, state):
            if not name or key not in first.tables[entity]:
                continue
            state.tables[entity][key][name] = first.tables[entity][key][name]
            assert (await world.score())["outcome"] == 0, (domain.name, entity, key, name)
            state.tables[entity][key][name] = value
        assert (await world.score())["outcome"] == 1
        rng = Random(2)
        for entity, table in domain.entities.items():
            for name, field in table.fields.items():
                key = rng.choice(list(state.tables[entity]) or [""])
                ids = list(state.tables.get(field.target, ()))
                value = draw(field, rng, ids, world.is_plain)
                if key and value != state.tables[entity][key][name]:
                    old, state.tables[entity][key][name] = state.tables[entity][key][name], value
                    assert (await world.score())["outcome"] == 0, (domain.name, entity, key, name)
                    state.tables[entity][key][name] = old

    each(made[1::3], check)


def test_one_row_too_many_or_too_few_fails(made):
    async def check(world: ApiEnvironment) -> None:
        await play_async(world, reference(world))
        for entity, table in world.databases[0].tables.items():
            key, row = next(iter(table.items()))
            table["extra"] = dict(row)
            assert (await world.score())["outcome"] == 0, (world.worlds[0].name, entity)
            del table["extra"], table[key]
            assert (await world.score())["outcome"] == 0, (world.worlds[0].name, entity)
            table[key] = row

    each(made[2::3], check)


def test_renaming_changes_no_score():
    async def run() -> None:
        for number, domain in enumerate(domains().values()):
            seed, num_calls = f"{number} names", (1, 3)[number % 2]
            own, other = (make(domain, seed, num_calls, is_renamed=is_renamed) for is_renamed in (False, True))
            assert own.goal.calls == other.goal.calls and own.firsts == other.firsts
            steps = reference(own)
            for played in (steps, steps[1:], steps[:-1], [*steps[:1], *steps]):
                assert await play_async(own, played) == await play_async(other, played), domain.name

    asyncio.run(run())
