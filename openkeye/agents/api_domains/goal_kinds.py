"""The kinds of goals, and how one is drawn with a given number of calls."""

from collections.abc import Callable
from random import Random

from openkeye.agents.api_domains.database import Database, changes, compare_states
from openkeye.agents.api_domains.goals import Call, Goal, GoalDrawer, NoGoal, Turn, withheld
from openkeye.agents.api_domains.phrases import Phrases, sentence
from openkeye.agents.api_domains.rules import Effect
from openkeye.agents.api_domains.schema import Domain
from openkeye.agents.api_domains.simulator import run_call
from openkeye.agents.api_domains.values import show

MAX_CALLS = 5
POLITE = ("{}.", "please {}.", "I need you to {}.", "could you {}?", "I would like you to {}.")
ANSWER_ALONE = "Answer with the value alone."


def act(drawer: GoalDrawer, num_calls: int) -> Goal:
    """Some actions, one after the other; some rows are described and must be found first."""
    texts = _acts(drawer, num_calls)
    return Goal("act", (Turn(_request(drawer, texts), drawer.take_calls()),))


def read(drawer: GoalDrawer, num_calls: int) -> Goal:
    """A cell of a row, over as many references as calls allow."""
    for _ in range(20):
        entity, key, name = drawer.row_with_field()
        words = drawer.phrases.mention(entity, key)
        getters = {action.entity: action for action in drawer.domain.actions.values() if action.kind == "get"}
        road: list[tuple[str, str]] = [(entity, key)]
        while len(road) < num_calls:
            fields = drawer.domain.entities[entity].fields
            row = drawer.database.tables[entity][key]
            hops = [
                hop
                for hop, cell in fields.items()
                if cell.target in getters and row[hop] and (cell.target, row[hop]) not in road
            ]
            if not hops:
                break
            hop = drawer.rng.choice(hops)
            entity, key = fields[hop].target, str(row[hop])
            road.append((entity, key))
            words = f"the {drawer.phrases.label(hop)} of {words}"
        names = [name for name, value in drawer.database.tables[entity][key].items() if value is not None]
        if len(road) == num_calls and names:
            name = drawer.rng.choice(names)
            for step in road:
                drawer.run(getters[step[0]], {"id": step[1]})
            request = f"{sentence(f'what is the {drawer.phrases.label(name)} of {words}', '?')} {ANSWER_ALONE}"
            return _answered("read", drawer, request, drawer.shown(entity, key, name))
    raise NoGoal


def find(drawer: GoalDrawer, num_calls: int) -> Goal:
    """A cell of a row that is described."""
    if num_calls != 1:
        raise NoGoal
    for _ in range(20):
        entity, key, name = drawer.row_with_field(("find",))
        found = drawer.lookup(entity, key)
        if found and name not in found[1]:
            drawer.run(*found)
            words = drawer.phrases.described(entity, found[1])
            request = f"{sentence(f'what is the {drawer.phrases.label(name)} of {words}', '?')} {ANSWER_ALONE}"
            return _answered("find", drawer, request, drawer.shown(entity, key, name))
    raise NoGoal


def total(drawer: GoalDrawer, num_calls: int) -> Goal:
    """A count, sum or extreme; with more calls, after actions that change it perhaps."""
    actions = [action for action in drawer.domain.actions.values() if action.kind == "total"]
    if not actions:
        raise NoGoal
    texts = _acts(drawer, num_calls - 1)
    for _ in range(20):
        action = drawer.rng.choice(actions)
        cells = drawer.domain.entities[action.entity].fields
        rows = list(drawer.database.tables[action.entity].values())
        if not rows:
            continue
        row = drawer.rng.choice(rows)
        names = [name for name in action.filters if row[name] is not None and drawer.rng.random() < 0.7]
        arguments = {name: show(cells[name], row[name]) for name in names}
        outcome = drawer.run(action, arguments)
        assert outcome.amount is not None, "the filters leave the row that they were read from"
        answer = str(outcome.amount if action.verb == "count" else show(cells[action.field], outcome.amount))
        question = f"{sentence(drawer.phrases.question(action, arguments), '?')} {ANSWER_ALONE}"
        return _answered("total", drawer, f"{_request(drawer, texts)} {question}" if texts else question, answer)
    raise NoGoal


def compare(drawer: GoalDrawer, num_calls: int) -> Goal:
    """Which of two rows has more of something; then actions."""
    if num_calls < 2:
        raise NoGoal
    texts = _acts(drawer, num_calls - 2)
    getters = {action.entity: action for action in drawer.domain.actions.values() if action.kind == "get"}
    choices = [
        (entity, name)
        for entity in getters
        for name, cell in drawer.domain.entities[entity].fields.items()
        if cell.is_quantity and len(drawer.database.tables[entity]) > 1
    ]
    for _ in range(20 if choices else 0):
        entity, name = drawer.rng.choice(choices)
        table = drawer.database.tables[entity]
        pair = drawer.rng.sample(list(table), 2)
        cells = [table[key][name] for key in pair]
        if not isinstance(cells[0], int) or not isinstance(cells[1], int) or cells[0] == cells[1]:
            continue
        for key in pair:
            drawer.run(getters[entity], {"id": key})
        mentions = " or ".join(drawer.phrases.mention(entity, key) for key in pair)
        question = (
            f"{sentence(f'which has the higher {drawer.phrases.label(name)}, {mentions}', '?')} Answer with its id alone."
        )
        request = f"{_request(drawer, texts)} {question}" if texts else question
        return _answered("compare", drawer, request, pair[cells[0] < cells[1]])
    raise NoGoal


def condition(drawer: GoalDrawer, num_calls: int) -> Goal:
    """One action or another, by what a row says."""
    if num_calls < 2:
        raise NoGoal
    entity, key, name = drawer.row_with_field()
    getter = next(action for action in drawer.domain.actions.values() if action.kind == "get" and action.entity == entity)
    cell, value = drawer.domain.entities[entity].fields[name], drawer.database.tables[entity][key][name]
    is_true = drawer.rng.random() < 0.5
    if cell.is_quantity and isinstance(value, int):
        unit = 100 if cell.kind == "money" else 1
        bound = max(value // unit + drawer.rng.choice((-3, -2, -1) if is_true else (0, 1, 2, 3)), 0)
        is_true, test = value > bound * unit, f"is above {bound}"
    elif cell.kind in ("choice", "state"):
        others = [option for option in cell.options if option != value]
        test = f"is {value if is_true or not others else drawer.rng.choice(others)}"
        is_true = test == f"is {value}"
    else:
        raise NoGoal
    plain_words = drawer.phrases.mention
    other = drawer.draw_doable()
    where = f"if the {drawer.phrases.label(name)} of {plain_words(entity, key)} {test}"
    drawer.run(getter, {"id": key})
    chosen = drawer.draw_doable()
    if chosen == other:
        raise NoGoal
    other_text = drawer.phrases.demand(*other, plain_words)
    text = drawer.do(*chosen)
    branches = (text, other_text) if is_true else (other_text, text)
    request = f"{sentence(where, '')}, {branches[0]}; otherwise {branches[1]}."
    evidence = tuple(drawer.evidence)
    texts = _acts(drawer, num_calls - 2)
    request = f"{request} {_request(drawer, texts, is_later=True)}" if texts else request
    return Goal("condition", (Turn(request, drawer.take_calls()),), evidence)


def recover(drawer: GoalDrawer, num_calls: int) -> Goal:
    """One action, and another if a rule forbids the first; now and then it does not."""
    if num_calls < 2:
        raise NoGoal
    is_refused = drawer.rng.random() < 0.7
    first = drawer.draw_refused() if is_refused else drawer.draw_doable()
    second = drawer.draw_doable()
    if first == second:
        raise NoGoal
    first_text = drawer.phrases.demand(*first, drawer.phrases.mention)
    second_text = drawer.phrases.demand(*second, drawer.phrases.mention)
    drawer.run(*first)
    if is_refused:
        drawer.run(*second)
    request = f"{sentence(first_text)} If that is refused, {second_text}."
    texts = _acts(drawer, num_calls - 1 - is_refused)
    request = f"{request} {_request(drawer, texts, is_later=True)}" if texts else request
    return Goal("recover", (Turn(request, drawer.take_calls()),), tuple(drawer.evidence))


def attempt(drawer: GoalDrawer, num_calls: int) -> Goal:
    """Actions, the last of which a rule may forbid, and word of it."""
    texts = _acts(drawer, num_calls - 1)
    is_refused = drawer.rng.random() < 0.6
    last = drawer.draw_refused() if is_refused else drawer.draw_doable()
    texts.append(drawer.phrases.demand(*last, drawer.mention(0)))
    drawer.run(*last)
    request = f"{_request(drawer, texts)} Answer done or refused."
    return _answered("attempt", drawer, request, "refused" if is_refused else "done")


def ask(drawer: GoalDrawer, num_calls: int) -> Goal:
    """A request that leaves something out; the user tells it when asked."""
    texts = _acts(drawer, num_calls - 1)
    for _ in range(20):
        action, arguments = drawer.draw_doable()
        hidden = withheld(drawer.domain, action, drawer.rng)
        if not hidden:
            continue
        cell = next(item.field for item in drawer.domain.parameters(action) if item.name == hidden)
        value = arguments[hidden]
        if cell.target and value not in drawer.first.tables[cell.target]:
            continue
        calls = drawer.take_calls()
        texts.append(drawer.do(action, arguments, hidden=hidden))
        name = drawer.phrases.label(hidden)
        request = _request(drawer, texts)
        if drawer.is_plain or drawer.rng.random() < 0.5:
            request += f" Ask me for the {name} first."
        # What is asked for comes before anything is done: earlier actions belong to the second turn too.
        second = Turn(sentence(f"the {name} is {value}"), (*calls, *drawer.take_calls()))
        return Goal("ask", (Turn(request, reply=f"What is the {name}?"), second))
    raise NoGoal


def follow(drawer: GoalDrawer, num_calls: int) -> Goal:
    """A second request after the first is done; it may be a question."""
    if num_calls < 2:
        raise NoGoal
    first = drawer.rng.randint(1, num_calls - 1)
    turns = [Turn(_request(drawer, _acts(drawer, first)), drawer.take_calls())]
    if drawer.rng.random() < 0.4 and num_calls - first == 1:
        question = drawer.rng.choice((read, total))(drawer, 1)
        return Goal("follow", (*turns, *question.turns), question.evidence)
    turns.append(Turn(_request(drawer, _acts(drawer, num_calls - first)), drawer.take_calls()))
    return Goal("follow", tuple(turns))


KINDS: dict[str, Callable[[GoalDrawer, int], Goal]] = {
    "act": act, "read": read, "find": find, "total": total, "compare": compare, "condition": condition, "recover": recover,
    "attempt": attempt, "ask": ask, "follow": follow,
}  # fmt: skip


def draw_goal(
    domain: Domain, first: Database, phrases: Phrases, seed: str, num_calls: int, kinds: tuple[str, ...], is_plain: bool = False
) -> Goal:
    """A goal of one of the kinds with exactly so many calls; where none can be drawn in this world, plain actions.

    Raises:
        NoGoal: this world has no `num_calls` actions that can be done one after the other.
    """
    rng = Random(f"{seed} kind")
    order = rng.sample(kinds, len(kinds))
    for number, kind in enumerate([*order, *order, *["act"] * 20]):
        drawer = GoalDrawer(domain, first, phrases, Random(f"{seed} {number}"), is_plain)
        try:
            goal = KINDS[kind](drawer, num_calls)
        except NoGoal:
            continue
        if len(goal.calls) == num_calls and _is_minimal(domain, first, goal):
            return goal
    raise NoGoal


def _is_minimal(domain: Domain, first: Database, goal: Goal) -> bool:
    """Whether every call that changes something is needed, with all it says: the world would end in another state."""
    wanted = _end(domain, first, goal.calls)
    if not changes(first, wanted) and not any(turn.answer for turn in goal.turns):
        return False
    if _tells_twice(domain, first, goal.calls):
        return False
    for number, call in enumerate(goal.calls):
        if domain.actions[call.action].is_read:
            continue
        without = _end(domain, first, goal.calls[:number] + goal.calls[number + 1 :])
        is_refused = not changes(_end(domain, first, goal.calls[:number]), _end(domain, first, goal.calls[: number + 1]))
        if not is_refused and compare_states(first, wanted, without)[2]:
            return False
    return True


def _tells_twice(domain: Domain, first: Database, calls: tuple[Call, ...]) -> bool:
    """Whether a later call sets or deletes what an earlier one had set, so that the earlier word no longer shows."""
    state, told = first.copy(), set()
    for call in calls:
        action = domain.actions[call.action]
        outcome = run_call(domain, state, action, call.arguments)
        if action.is_read or not outcome.is_done:
            continue
        names = [
            rule.path[0] for rule in action.rules if isinstance(rule, Effect) and rule.change == "=" and len(rule.path) == 1
        ]
        names += [name for name in call.arguments if name in domain.entities[action.entity].fields]
        if action.kind == "unlink":
            names.append(action.field)
        for _, key in outcome.rows[:1]:
            if any((key, name) in told for name in names):
                return True
            told |= {(key, name) for name in names}
            if action.kind == "delete" and any(row == key for row, _ in told):
                return True
    return False


def _end(domain: Domain, first: Database, calls: tuple[Call, ...]) -> Database:
    state = first.copy()
    for call in calls:
        run_call(domain, state, domain.actions[call.action], call.arguments)
    return state


def _acts(drawer: GoalDrawer, num_calls: int) -> list[str]:
    """Actions and lookups that together make so many calls; what the user says of each action."""
    texts: list[str] = []
    left = num_calls
    while left > 0:
        before = len(drawer.calls)
        num_lookups = drawer.rng.randint(0, min(left - 1, 2))
        texts.append(drawer.act(num_lookups, is_linked=bool(texts) and drawer.rng.random() < 0.6))
        left -= len(drawer.calls) - before
    return texts


def _request(drawer: GoalDrawer, texts: list[str], is_later: bool = False) -> str:
    """One or more demands as a user says them."""
    if not texts:
        return ""
    if drawer.is_plain:
        parts = [f"then {text}" if number or is_later else text for number, text in enumerate(texts)]
        return " ".join(sentence(part) for part in parts)
    pattern = drawer.rng.choice(POLITE)
    joined = texts[0] + "".join(f", {drawer.rng.choice(('then', 'and then', 'after that'))} {text}" for text in texts[1:])
    return sentence(("after that, " if is_later else "") + pattern.format(joined), "")


def _answered(kind: str, drawer: GoalDrawer, request: str, answer: str) -> Goal:
    return Goal(kind, (Turn(request, drawer.take_calls(), answer),), tuple(drawer.evidence))
