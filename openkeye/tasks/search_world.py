"""Small worlds of people, places, schools and works, made up for each seed, as pages; and questions that lead through several.

A fact stands on the page of its subject alone, so that a chain of facts has to be walked page by page, and the pages that prove
an answer are known. No name is of our world: nothing can be answered from memory.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from openkeye.agents.search import MONTHS, Page


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


STARTS = _words(
    "bal cor dru fen gal hes ilm jor kel lan mor nol or pel quin ras sel tor ul vel wen yar zem bri cla dre stra thu"
)
MIDDLES = _words("a e i o u ae ia eo ar en il on ur")
ENDS = _words("dan beth ric mund nor vik sa tha lin mar dos pel wyn ga ros")
TOWN_ENDS = _words("burg ham stead ford holm wick mouth dale haven gate")
PROFESSIONS = _words("composer novelist painter architect botanist astronomer engineer playwright physician historian")
WORK_KINDS = _words("novel opera painting poem symphony film play treatise")
SCHOOL_KINDS = ("University", "Academy", "Conservatory", "Institute")
ADJECTIVES = _words(
    "silent golden broken distant hollow scarlet northern forgotten crystal burning velvet iron wandering second"
)
NOUNS = _words("lantern harbour orchard mirror staircase garden winter compass river engine letter cathedral sparrow island")


@dataclass(frozen=True)
class Thing:
    """A person, town, country, school or work, with its facts."""

    id: str
    kind: str
    name: str
    links: Mapping[str, str]
    # id of another thing by relation
    values: Mapping[str, str]
    # plain facts by name


@dataclass(frozen=True)
class Relation:
    """A step from a thing to another, in words."""

    kind: str
    target: str
    phrase: str
    # "the town where {} was born"
    sentence: str
    # of the subject's page


RELATIONS = {
    "author": Relation("work", "person", "the author of {}", "It was made by {}."),
    "setting": Relation("work", "town", "the town that {} is about", "Its subject is everyday life in {}."),
    "birthplace": Relation("person", "town", "the town where {} was born", "{} is the place of birth."),
    "teacher": Relation("person", "person", "the teacher of {}", "The decisive years were spent as a pupil of {}."),
    "spouse": Relation("person", "person", "the person whom {} married", "A marriage to {} followed."),
    "school": Relation("person", "school", "the school where {} studied", "Studies led to {}."),
    "seat": Relation("school", "town", "the town where {} stands", "Its buildings stand in {}."),
    "founder": Relation("school", "person", "the founder of {}", "It owes its existence to {}, who gave the money."),
    "country": Relation("town", "country", "the country that {} belongs to", "It belongs to {}."),
    "twin": Relation("town", "town", "the twin town of {}", "Since long ago it has been twinned with {}."),
    "capital": Relation("country", "town", "the capital of {}", "The government sits in {}."),
}


@dataclass(frozen=True)
class Value:
    """A plain fact at the end of a chain."""

    kind: str
    question: str
    sentence: str


VALUES = {
    "birth_date": Value("person", "When was {} born?", "The date of birth is {}."),
    "profession": Value("person", "What was the profession of {}?", "The profession in the registers is {}."),
    "founded": Value("town", "In which year was {} founded?", "The town was founded in {}."),
    "river": Value("town", "Which river runs through {}?", "The river {} runs through it."),
    "population": Value("town", "How many inhabitants does {} have?", "At the last count it had {} inhabitants."),
    "opened": Value("school", "In which year was {} opened?", "Its doors opened in {}."),
    "year": Value("work", "In which year was {} finished?", "It was finished in {}."),
    "currency": Value("country", "What is the currency of {}?", "One pays with the {}."),
}


@dataclass(frozen=True)
class Question:
    """A question over a world."""

    text: str
    answers: tuple[str, ...]
    evidence: tuple[str, ...]
    # ids of the pages that prove it, in the order of the chain
    num_hops: int


class World:
    """The things of one seed."""

    def __init__(self, seed: str, num_people: int = 36, num_towns: int = 14, num_works: int = 30, num_schools: int = 8) -> None:
        self.rng = random.Random(f"openkeye search world {seed}")
        self.things: dict[str, Thing] = {}
        self._names: set[str] = set()
        ids = {
            "country": [f"country-{number}" for number in range(4)],
            "town": [f"town-{number}" for number in range(num_towns)],
            "person": [f"person-{number}" for number in range(num_people)],
            "school": [f"school-{number}" for number in range(num_schools)],
            "work": [f"work-{number}" for number in range(num_works)],
        }
        # Ids say nothing of what a page is about.
        numbers = self.rng.sample(range(1000, 10_000), sum(map(len, ids.values())))
        self.ids = {kind: [f"p{numbers.pop()}" for _ in known] for kind, known in ids.items()}
        makers: dict[str, Callable[[], tuple[str, dict[str, str]]]] = {
            "country": self._country,
            "town": self._town,
            "person": self._person,
            "school": self._school,
            "work": self._work,
        }
        for kind, known in self.ids.items():
            for id in known:
                name, values = makers[kind]()
                self.things[id] = Thing(id, kind, name, self._links(kind, id), values)

    def _links(self, kind: str, id: str) -> dict[str, str]:
        relations = {name: relation for name, relation in RELATIONS.items() if relation.kind == kind}
        return {
            name: self.rng.choice([other for other in self.ids[relation.target] if other != id])
            for name, relation in relations.items()
        }

    def _new(self, make: Callable[[], str]) -> str:
        while True:
            name = make()
            if name.casefold() not in self._names:
                self._names.add(name.casefold())
                return name

    def _word(self, ends: Sequence[str]) -> str:
        return (self.rng.choice(STARTS) + self.rng.choice(MIDDLES) + self.rng.choice(ends)).capitalize()

    def _country(self) -> tuple[str, dict[str, str]]:
        return self._new(lambda: self._word(["nia", "land", "ria", "stan"])), {
            "currency": self._new(lambda: self._word(["t", "l", "ner", "x"]).lower())
        }

    def _town(self) -> tuple[str, dict[str, str]]:
        return self._new(lambda: self._word(TOWN_ENDS)), {
            "founded": str(self.rng.randint(700, 1650)),
            "river": self._new(lambda: self._word(["ne", "ra", "ve", "ss"])),
            "population": f"{self.rng.randint(4_000, 900_000):,}",
        }

    def _person(self) -> tuple[str, dict[str, str]]:
        date = f"{self.rng.randint(1, 28)} {self.rng.choice(MONTHS).capitalize()} {self.rng.randint(1780, 1930)}"
        name = self._new(lambda: f"{self._word(ENDS)} {self._word(ENDS)}")
        return name, {"birth_date": date, "profession": self.rng.choice(PROFESSIONS)}

    def _school(self) -> tuple[str, dict[str, str]]:
        name = self._new(lambda: f"the {self._word(ENDS)} {self.rng.choice(SCHOOL_KINDS)}")
        return name, {"opened": str(self.rng.randint(1700, 1900))}

    def _work(self) -> tuple[str, dict[str, str]]:
        name = self._new(lambda: f"The {self.rng.choice(ADJECTIVES).capitalize()} {self.rng.choice(NOUNS).capitalize()}")
        kind = self.rng.choice(WORK_KINDS)
        return f"the {kind} {name}", {"year": str(self.rng.randint(1800, 1960))}

    def pages(self) -> list[Page]:
        """A page of each thing, in an order that tells nothing."""
        pages = [Page(thing.id, _title(thing), self._text(thing)) for thing in self.things.values()]
        self.rng.shuffle(pages)
        return pages

    def _text(self, thing: Thing) -> str:
        sentences = [RELATIONS[name].sentence.format(self.things[id].name) for name, id in thing.links.items()]
        sentences += [VALUES[name].sentence.format(value) for name, value in thing.values.items()]
        self.rng.shuffle(sentences)
        first = f"{_title(thing)} is a {thing.kind}." if thing.kind != "work" else f"{_title(thing)}: {thing.name.split()[1]}."
        return " ".join([first, *(sentence[0].upper() + sentence[1:] for sentence in sentences)])

    def question(self, number: int, num_hops: int) -> Question:
        """A question through `num_hops` pages; every third compares the ends of two chains."""
        rng = random.Random(f"{number} {num_hops} {sorted(self.things)[0]}")
        if number % 3 == 2 and num_hops >= 2:
            return self._comparison(rng, num_hops)
        name = rng.choice([name for name, value in VALUES.items() if num_hops == 1 or value.kind != "work"])
        phrase, chain = self._chain(rng, VALUES[name].kind, num_hops)
        answer = self.things[chain[-1]].values[name]
        return Question(VALUES[name].question.format(phrase), (answer,), tuple(chain), num_hops)

    def _comparison(self, rng: random.Random, num_hops: int) -> Question:
        """Which of two towns was founded earlier, each told by a chain of half the hops."""
        while True:
            first, first_chain = self._chain(rng, "town", max(1, num_hops // 2))
            second, second_chain = self._chain(rng, "town", max(1, num_hops - num_hops // 2))
            towns = [self.things[first_chain[-1]], self.things[second_chain[-1]]]
            years = [int(town.values["founded"]) for town in towns]
            if years[0] != years[1]:
                break
        text = f"Which was founded earlier, {first} or {second}? Give the name of the town."
        evidence = tuple(dict.fromkeys([*first_chain, *second_chain]))
        return Question(text, (towns[years.index(min(years))].name,), evidence, len(evidence))

    def _chain(self, rng: random.Random, kind: str, num_hops: int) -> tuple[str, list[str]]:
        """(words for a thing of a kind, ids of the pages from the one that is named to the thing itself): no page twice."""
        while True:
            kinds: list[str] = [kind]
            names: list[str] = []
            for left in range(num_hops - 1, 0, -1):
                # Nothing leads to works: a chain can only begin with one.
                into = [
                    name
                    for name, relation in RELATIONS.items()
                    if relation.target == kinds[0] and (left == 1 or relation.kind != "work")
                ]
                names.insert(0, rng.choice(into))
                kinds.insert(0, RELATIONS[names[0]].kind)
            chain = [rng.choice(self.ids[kinds[0]])]
            phrase = self.things[chain[0]].name
            for name in names:
                chain.append(self.things[chain[-1]].links[name])
                phrase = RELATIONS[name].phrase.format(phrase)
            if len(set(chain)) == len(chain):
                return phrase, chain


def _title(thing: Thing) -> str:
    if thing.kind == "work":
        return " ".join(thing.name.split()[2:])
    return thing.name[:1].upper() + thing.name[1:]
