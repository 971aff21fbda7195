"""What tools, arguments, tables and fields are called in one episode: drawn anew each time, so that no name can be learnt.

Descriptions, requests and results speak the same labels; only tools (and, in full wording, arguments) have names beside them.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from random import Random

from openkeye.agents.api_domains.schema import Action, Domain
from openkeye.agents.api_domains.values import PLAIN_WORDS

VERBS = {
    "find": ("search", "list", "query", "look_up", "filter"),
    "get": ("read", "fetch", "show", "view", "open"),
    "count": ("number_of", "tally", "how_many"),
    "sum": ("total", "add_up"),
    "highest": ("maximum", "top"),
    "lowest": ("minimum", "least"),
    "create": ("add", "new", "make", "insert", "register"),
    "reserve": ("book", "claim", "take_up"),
    "schedule": ("plan", "put_down", "arrange"),
    "update": ("set", "change", "edit", "write"),
    "add": ("increase", "put_in", "raise"),
    "take": ("decrease", "take_out", "lower"),
    "move": ("mark", "advance", "turn", "process"),
    "delete": ("remove", "drop", "erase"),
    "transfer": ("shift", "pass_on", "carry_over"),
    "link": ("assign", "attach", "connect"),
    "unlink": ("release", "detach", "clear"),
}
LABELS = {
    "name": ("title", "label", "caption"),
    "title": ("name", "heading", "label"),
    "price": ("cost", "rate", "charge"),
    "fee": ("charge", "price", "dues"),
    "balance": ("credit", "funds", "purse"),
    "budget": ("funds", "means", "allowance"),
    "stock": ("supply", "on_hand", "store"),
    "status": ("stage", "phase", "condition"),
    "kind": ("type", "sort", "category"),
    "day": ("weekday", "date"),
    "start": ("begin", "from_hour", "time"),
    "hours": ("length", "duration"),
    "places": ("capacity", "room_for", "limit"),
    "seats": ("places", "spots"),
    "size": ("format", "measure"),
    "level": ("grade", "degree"),
    "customer": ("client", "buyer", "patron"),
    "guest": ("visitor", "lodger"),
    "member": ("subscriber", "participant"),
    "driver": ("chauffeur", "operator"),
    "worker": ("employee", "hand"),
    "order": ("purchase", "request"),
    "booking": ("reservation", "hold"),
    "room": ("chamber", "unit"),
    "city": ("town", "place"),
    "site": ("location", "spot"),
}
ARGUMENTS = {
    "id": ("key", "ref", "which", "code", "handle"),
    "source": ("origin", "giver", "start_key"),
    "target": ("destination", "receiver", "end_key"),
    "amount": ("quantity", "how_much", "value", "units"),
}
NEUTRAL_TOOLS = ("tool", "action", "op", "function", "call", "step", "service", "command")
NEUTRAL_ARGUMENTS = ("arg", "field", "param", "input", "slot", "x")
# with a number behind
MORE_PLAIN_WORDS = (
    "circle",
    "square",
    "heart",
    "star",
    "triangle",
    "cross",
    "screen",
    "video",
    "word",
    "moment",
    "digit",
    "move",
)
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass(frozen=True)
class Naming:
    """Names of one episode."""

    tools: Mapping[str, str]
    # by `tool_key`
    arguments: Mapping[str, Mapping[str, str]]
    # by `tool_key`, then by parameter
    labels: Mapping[str, Mapping[str, str]]
    # by domain, then by entity or field

    def spoken(self, domain: str, name: str) -> str:
        """An entity or field in a sentence."""
        return self.labels[domain].get(name, name).replace("_", " ")


def tool_key(domain: Domain, action: Action) -> str:
    """Names an action among several domains."""
    return f"{domain.name}.{action.name}"


def own_naming(domains: Iterable[Domain]) -> Naming:
    """Everything under the name that the domain gives it."""
    domains = list(domains)
    keys = [(tool_key(domain, action), domain, action) for domain in domains for action in domain.actions.values()]
    taken: set[str] = set()
    tools = {key: _first_free((action.name, key.replace(".", "_")), taken) for key, _, action in keys}
    arguments = {key: {item.name: item.name for item in domain.parameters(action)} for key, domain, action in keys}
    return Naming(tools, arguments, {domain.name: {name: name for name in _words(domain)} for domain in domains})


def draw_naming(domains: Sequence[Domain], rng: Random, is_plain: bool = False) -> Naming:
    """Other names for everything: synonyms, invented and neutral words; in plain wording words of a small vocabulary."""
    taken: set[str] = set()
    plain = list(PLAIN_WORDS + MORE_PLAIN_WORDS)
    rng.shuffle(plain)
    tools: dict[str, str] = {}
    arguments: dict[str, dict[str, str]] = {}
    labels: dict[str, dict[str, str]] = {}
    for domain in domains:
        used: set[str] = set()
        labels[domain.name] = {
            name: _first_free(_label_choices(name, rng, plain if is_plain else []), used) for name in _words(domain)
        }
        for action in domain.actions.values():
            key, words = tool_key(domain, action), labels[domain.name]
            tools[key] = _first_free(_plain_tools(rng) if is_plain else _tool_choices(action, words, rng), taken)
            names: set[str] = set()
            arguments[key] = {
                item.name: words.get(item.name, item.name)
                if is_plain
                else _first_free(_argument_choices(item.name, words, rng), names)
                for item in domain.parameters(action)
            }
    return Naming(tools, arguments, labels)


def invented_word(rng: Random) -> str:
    """Two syllables that mean nothing."""
    parts = [rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(2)]
    return "".join(parts) + rng.choice(CONSONANTS)


def _words(domain: Domain) -> list[str]:
    """Names of its entities and fields, each once."""
    names = [name for entity in domain.entities.values() for name in (entity.name, *entity.fields)]
    return list(dict.fromkeys(names))


def _first_free(choices: Iterable[str], taken: set[str]) -> str:
    name = next(choice for choice in choices if choice not in taken)
    taken.add(name)
    return name


def _label_choices(name: str, rng: Random, plain: list[str]) -> Iterable[str]:
    if plain:
        yield from plain
    elif rng.random() < 0.3:
        yield name
    synonyms = list(LABELS.get(name, ()))
    rng.shuffle(synonyms)
    if rng.random() < 0.7:
        yield from synonyms
    while True:
        yield invented_word(rng)


def _plain_tools(rng: Random) -> Iterable[str]:
    words = list(PLAIN_WORDS)
    rng.shuffle(words)
    while True:
        yield f"{rng.choice(words)}{rng.randint(1, 9)}"


def _tool_choices(action: Action, labels: Mapping[str, str], rng: Random) -> Iterable[str]:
    verb_pool = VERBS.get(action.verb, VERBS.get(action.kind, ()))
    while True:
        shape, entity = rng.random(), labels[action.entity]
        verb = rng.choice((*verb_pool, action.verb.replace(" ", "_")))
        if shape < 0.4:
            yield f"{verb}_{entity}"
        elif shape < 0.55:
            yield f"{entity}.{verb}".replace(".", "_")
        elif shape < 0.7:
            yield f"{rng.choice(NEUTRAL_TOOLS)}_{rng.randint(1, 99)}"
        elif shape < 0.85:
            yield "".join(part.capitalize() for part in f"{verb}_{entity}".split("_"))
        else:
            yield f"{invented_word(rng)}_{verb}"


def _argument_choices(name: str, labels: Mapping[str, str], rng: Random) -> Iterable[str]:
    label = labels.get(name, name)
    if rng.random() < 0.5:
        yield label
    synonyms = list(ARGUMENTS.get(name, LABELS.get(name, ())))
    rng.shuffle(synonyms)
    if rng.random() < 0.6:
        yield from synonyms
    while True:
        yield rng.choice(
            (f"{rng.choice(NEUTRAL_ARGUMENTS)}_{rng.randint(1, 9)}", invented_word(rng), f"{label}_{rng.randint(1, 9)}")
        )
