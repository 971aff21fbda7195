"""Calls on a small library: what is checked, what is refused, and that a call that is not done leaves no trace."""

import pickle
from random import Random

import pytest

from openkeye.agents.api_domains.database import Database, changes, compare_states
from openkeye.agents.api_domains.rows import draw_database
from openkeye.agents.api_domains.rules import parse_rule
from openkeye.agents.api_domains.schema import (
    create,
    day,
    delete,
    domain,
    find,
    get,
    hour,
    link,
    maybe,
    money,
    move,
    number,
    one_of,
    person,
    ref,
    states,
    table,
    take,
    total,
    transfer,
    unlink,
    update,
)
from openkeye.agents.api_domains.simulator import Outcome, run_call

CLUB = domain(
    "club",
    "a rowing club",
    table("boat", 3, seats=number(1, 8), kind=one_of("wood", "steel"), state=states("dry>wet>dry", "dry>broken")),
    table("member", 3, name=person, purse=money(0, 50), boat=maybe("boat")),
    table("trip", 3, boat=ref("boat"), day=day, start=hour(8, 18), hours=number(1, 4), people=number(1, 8), fee=money(1, 9)),
    find("boat", "kind", "seats"),
    get("member"),
    total("member", "sum", "purse"),
    total("boat", "count", "", "kind"),
    create("trip", "plan", "free boat", "boat.state != broken", "fits people in boat.seats", "fee = people * $2"),
    move("boat", "launch", "dry>wet"),
    take("member", "charge", "purse"),
    transfer("member", "send", "purse"),
    link("member", "seat", "boat", "most 2 boat", "purse >= $5", "purse -= $5"),
    unlink("member", "land", "boat"),
    update("boat", "seats"),
    delete("boat", "sell"),
)


@pytest.fixture
def state() -> Database:
    boats = {"b1": {"seats": 4, "kind": "wood", "state": "dry"}, "b2": {"seats": 2, "kind": "steel", "state": "broken"}}
    members = {
        "m1": {"name": "Ada", "purse": 1250, "boat": None},
        "m2": {"name": "Bo", "purse": 400, "boat": "b1"},
        "m3": {"name": "Cy", "purse": 900, "boat": None},
    }
    trips = {"t1": {"boat": "b1", "day": "monday", "start": 10, "hours": 3, "people": 2, "fee": 400}}
    return Database({"boat": boats, "member": members, "trip": trips}, 100)


def call(state: Database, action: str, **arguments: object) -> Outcome:
    return run_call(CLUB, state, CLUB.actions[action], arguments)


PLAN = {"boat": "b1", "day": "monday", "start": "14:00", "hours": 2, "people": 2}


@pytest.mark.parametrize(
    ("action", "arguments", "fault", "words"),
    [
        ("plan_trip", {**PLAN, "people": "2"}, "argument", "expected a number, got '2'"),
        ("plan_trip", {**PLAN, "people": True}, "argument", "expected a number"),
        ("plan_trip", {**PLAN, "people": 2.5}, "argument", "whole number"),
        ("plan_trip", {**PLAN, "people": 9}, "argument", "expected 1 to 8"),
        ("plan_trip", {**PLAN, "people": float("nan")}, "argument", "below a billion"),
        ("plan_trip", {**PLAN, "day": "Monday"}, "argument", "expected one of monday"),
        ("plan_trip", {**PLAN, "start": 14}, "argument", "expected text"),
        ("plan_trip", {**PLAN, "start": "14:30"}, "argument", "expected an hour from 8:00 to 18:00"),
        ("plan_trip", {**PLAN, "start": "19:00"}, "argument", "expected an hour from 8:00 to 18:00"),
        ("plan_trip", {**PLAN, "boat": "b9"}, "reference", "there is no boat b9"),
        ("plan_trip", {**PLAN, "boat": "m1"}, "reference", "there is no boat m1"),
        ("plan_trip", {**PLAN, "boat": ["b1"]}, "argument", "expected text"),
        ("plan_trip", {**PLAN, "fee": 3}, "argument", "no argument fee"),
        ("plan_trip", {"boat": "b1"}, "argument", "day is missing"),
        ("find_boat_by_kind", {}, "argument", "give at least one of kind, seats"),
        ("charge_member", {"id": "m1", "amount": 1.005}, "argument", "at most two decimals"),
        ("charge_member", {"id": "m1", "amount": -1}, "argument", "from 0 on"),
        ("plan_trip", {**PLAN, "start": "12:00"}, "refused", "boat b1 is taken at that time"),
        ("plan_trip", {**PLAN, "people": 3}, "refused", "seats of boat b1 leaves only 2"),
        ("plan_trip", {**PLAN, "boat": "b2"}, "refused", "state of boat is broken and must be not broken"),
        ("launch_boat", {"id": "b2"}, "refused", "state is broken, not dry"),
        ("charge_member", {"id": "m2", "amount": 4.01}, "refused", "purse is 4 and cannot fall below 0"),
        ("send_member", {"source": "m2", "target": "m1", "amount": 5}, "refused", "cannot fall below 0"),
        ("send_member", {"source": "m1", "target": "m1", "amount": 5}, "refused", "must differ"),
        ("seat_member", {"id": "m2", "boat": "b1"}, "refused", "boat is b1 already"),
        ("land_member", {"id": "m1"}, "refused", "boat is none already"),
        ("sell_boat", {"id": "b1"}, "refused", "still refers to it"),
    ],
)
def test_a_wrong_call_says_why_and_changes_nothing(state, action, arguments, fault, words):
    before = pickle.dumps(state)
    outcome = call(state, action, **arguments)
    assert (outcome.fault, outcome.is_done) == (fault, False) and words in outcome.error, outcome
    assert pickle.dumps(state) == before


def test_effects_follow_the_action(state):
    outcome = call(state, "plan_trip", **PLAN)
    assert outcome.rows == (("trip", "t100"),)
    assert state.tables["trip"]["t100"] == {"boat": "b1", "day": "monday", "start": 14, "hours": 2, "people": 2, "fee": 400}
    assert call(state, "seat_member", id="m1", boat="b1").is_done
    assert state.tables["member"]["m1"] == {"name": "Ada", "purse": 750, "boat": "b1"}
    assert call(state, "send_member", source="m1", target="m2", amount=2.5).is_done
    assert [state.tables["member"][key]["purse"] for key in ("m1", "m2")] == [500, 650]


def test_an_effect_that_fails_takes_the_whole_call_back(state):
    # The link itself would do; a third member in the boat does not, and the five that were paid come back.
    assert call(state, "seat_member", id="m1", boat="b1").is_done
    before = pickle.dumps(state)
    outcome = call(state, "seat_member", id="m3", boat="b1")
    assert outcome.fault == "refused" and "at most 2" in outcome.error
    assert pickle.dumps(state) == before


def test_trips_side_by_side_do_not_overlap(state):
    assert call(state, "plan_trip", **{**PLAN, "start": "13:00"}).is_done
    assert call(state, "plan_trip", **{**PLAN, "start": "14:00"}).fault == "refused"
    assert call(state, "plan_trip", **{**PLAN, "start": "8:00", "hours": 3}).fault == "refused"


def test_reads(state):
    assert call(state, "find_boat_by_kind", kind="steel").rows == (("boat", "b2"),)
    assert call(state, "find_boat_by_kind", kind="steel", seats=5).rows == ()
    assert call(state, "sum_purse_member").amount == 2550
    assert call(state, "count_boat", kind="wood").amount == 1


def test_created_rows_count_under_any_id(state):
    wanted, got = state.copy(), state.copy()
    for order, where in (((0, 1), wanted), ((1, 0), got)):
        for which in order:
            assert call(where, "plan_trip", **{**PLAN, "day": ("friday", "sunday")[which], "people": 1}).is_done
    assert wanted != got
    assert compare_states(state, wanted, got)[2]
    got.tables["trip"]["t100"]["hours"] = 1
    held, demanded, is_same = compare_states(state, wanted, got)
    assert (held, demanded, is_same) == (13, 14, False)
    # (two rows of a table of six fields: each is made, and each field set)
    assert len(changes(state, wanted)) == 14


def test_first_rows_obey_the_rules():
    for seed in range(50):
        state = draw_database(CLUB, Random(seed))
        assert draw_database(CLUB, Random(seed)) == state
        for trip in state.tables["trip"].values():
            same = [other for other in state.tables["trip"].values() if other["boat"] == trip["boat"]]
            assert sum(other["people"] for other in same) <= state.tables["boat"][trip["boat"]]["seats"]


@pytest.mark.parametrize("text", ["boat.state is dry", "fits people", "a == b c", "once"])
def test_what_is_no_rule_is_told_where_it_is_written(text):
    with pytest.raises((AssertionError, IndexError)):
        parsed = parse_rule(text)
        assert parsed.fields, "a limit of nothing"


@pytest.mark.parametrize(
    "part",
    [
        update("cat", "age"),
        update("boat", "length"),
        move("boat", "sink", "dry>sunk"),
        update("boat", "seats", "state == sunk"),
        update("boat", "seats", "owner.purse >= 3"),
        create("boat", "build", "free kind"),
    ],
)
def test_a_world_that_speaks_of_what_it_lacks_is_not_made(part):
    with pytest.raises((AssertionError, KeyError)):
        domain("bad", "a bad world", CLUB.entities["boat"], part)
