"""`field=value` words: what they change, what they refuse, and that `describe` writes what `with_fields` reads."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openkeye.common.checks import InputError
from openkeye.common.fields import describe, parse_value, with_fields


@dataclass(frozen=True)
class Part:
    source: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise ValueError(f"weight {self.weight} must be a number from 0 on")


@dataclass(frozen=True)
class Origin:
    reader: str
    path: str = ""
    options: Mapping[str, str | int | float | bool] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    name: str
    num_steps: int
    mixture: tuple[Part, ...] = ()
    trains: tuple[str, ...] = ("decoder",)
    rates: Mapping[str, float] = field(default_factory=dict)
    budget: int | None = None
    rate: float = 1e-4
    is_sparse: bool = False


@dataclass(frozen=True)
class Run:
    seed: int
    origins: Mapping[str, Origin]
    stages: tuple[Stage, ...]


RUN = Run(
    0,
    {"clips": Origin("folder", "a", {"share": 0.1})},
    (Stage("warm-up", 5, (Part("clips"), Part("text"))), Stage("adapt", 9, (Part("clips"),), rates={"indexer": 1e-3})),
)


def test_words_reach_every_kind_of_place():
    words = [
        "seed=3",
        "stages.0.num_steps=20",
        "stages.adapt.is_sparse=yes",
        "stages.*.rate=1e-5",
        "stages.0.mixture.1.weight=2",
    ]
    words += ["stages.0.mixture.clips.weight=3", "stages.adapt.rates.decoder=2e-5", "stages.0.trains=projector,indexer"]
    words += ["origins.clips.path=/x", "origins.clips.options.fps=2", "stages.0.budget=24e3"]
    run = with_fields(RUN, words)
    assert run.seed == 3 and [stage.rate for stage in run.stages] == [1e-5, 1e-5]
    assert run.stages[0] == Stage(
        "warm-up", 20, (Part("clips", 3.0), Part("text", 2.0)), ("projector", "indexer"), budget=24000, rate=1e-5
    )
    assert run.stages[1] == replace(RUN.stages[1], is_sparse=True, rate=1e-5, rates={"indexer": 1e-3, "decoder": 2e-5})
    assert run.origins == {"clips": Origin("folder", "/x", {"share": 0.1, "fps": 2})}
    assert RUN.seed == 0 and RUN.stages[0].num_steps == 5


def test_a_later_word_wins():
    assert [stage.rate for stage in with_fields(RUN, ["stages.*.rate=1", "stages.0.rate=2"]).stages] == [2.0, 1.0]
    assert [stage.rate for stage in with_fields(RUN, ["stages.0.rate=2", "stages.*.rate=1"]).stages] == [1.0, 1.0]


def test_new_records_and_keys_in_any_order():
    run = with_fields(RUN, ["origins.mine.path=/x", "origins.mine.reader=folder", "stages.1.mixture.1.source=mine"])
    assert run.origins["mine"] == Origin("folder", "/x") and run.stages[1].mixture == (Part("clips"), Part("mine"))
    with pytest.raises(InputError, match=r"origins\.mine is new and lacks reader; give origins\.mine\.reader=VALUE"):
        with_fields(RUN, ["origins.mine.path=/x"])


def test_an_empty_value_empties():
    run = with_fields(RUN, ["stages.0.mixture=", "stages.0.trains=", "stages.1.rates="])
    assert run.stages[0].mixture == () and run.stages[0].trains == () and run.stages[1].rates == {}


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("sead=3", "field 'sead' is unknown; did you mean seed\\? \\(known: seed, origins, stages\\)"),
        (
            "stages.warmup.rate=1",
            "'warmup' is unknown; did you mean warm-up\\? \\(known: warm-up, adapt, numbers up to 1, \\*\\)",
        ),
        ("stages.0.ratez=1", "stages.0.ratez: field 'ratez' is unknown; did you mean rate"),
        ("stages.7.rate=1", "record '7' is unknown"),
        ("seed=x", "seed=x: expected a whole number"),
        ("seed=1.5", "seed=1.5: expected a whole number"),
        ("seed=inf", "seed=inf: expected a whole number"),
        ("stages.0.rate=nan", "expected a number"),
        ("stages.0.is_sparse=perhaps", "expected true or false"),
        ("stages.0.budget=few", "expected a whole number or none"),
        ("stages.0.mixture.0.weight=-1", r"stages\.0\.mixture\.0: weight -1\.0 must be a number from 0 on"),
        ("stages=3", r"stages is not one value; give fields of its records, for example stages\.0\.FIELD=VALUE"),
        ("origins.clips=3", r"give its fields: origins\.clips\.reader"),
        ("origins=3", r"give origins\.NAME=VALUE"),
        ("seed.more=3", "seed is one value and has no fields; give seed=VALUE"),
        ("seed", "'seed': expected field=value"),
        ("=3", "'=3': expected field=value"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_mend(word, said):
    with pytest.raises(InputError, match=said):
        with_fields(RUN, [word])


@pytest.mark.parametrize(
    ("text", "annotation", "value"),
    [
        ("7", int | None, 7),
        ("None", int | None, None),
        ("none", str, "none"),
        ("1", str | int | float | bool, 1),
        ("1e3", str | int | float | bool, 1000.0),
        ("true", str | int | float | bool, True),
        ("a=b", str | int | float | bool, "a=b"),
        ("1_000", int, 1000),
        ("1e3", int, 1000),
        ("inf", float, float("inf")),
        ("off", bool, False),
        ("1, 2", tuple[int, ...], (1, 2)),
    ],
)
def test_values_take_the_type_of_their_field(text, annotation, value):
    parsed = parse_value(text, annotation, "x")
    assert parsed == value and type(parsed) is type(value)


def test_stages_of_one_name_are_told_apart_by_number():
    run = replace(RUN, stages=(Stage("same", 1), Stage("same", 2)))
    assert "stages.1.num_steps=2" in describe(run) and with_fields(run, describe(run)) == run
    with pytest.raises(InputError, match="known: 0, 1, numbers"):
        with_fields(run, ["stages.same.num_steps=3"])


names = st.text("abcdefgh-_ ", min_size=1, max_size=6).map(lambda text: f"x{text.strip()}")
numbers = st.floats(0, 1e9, allow_nan=False)
parts = st.builds(Part, names, numbers)
stages = st.builds(
    Stage,
    names,
    st.integers(0, 10**9),
    st.lists(parts, max_size=3).map(tuple),
    st.lists(names, max_size=3).map(tuple),
    st.dictionaries(names, numbers, max_size=2),
    st.none() | st.integers(0, 10**6),
    numbers,
    st.booleans(),
)
options = st.dictionaries(names, st.integers() | st.booleans() | numbers | names, max_size=3)
runs = st.builds(
    Run,
    st.integers(),
    st.dictionaries(names, st.builds(Origin, names, names, options), max_size=2),
    st.lists(stages, max_size=3).map(tuple),
)


@given(runs)
def test_described_settings_are_read_back(run):
    assert with_fields(run, describe(run)) == run


def test_a_description_shows_what_a_person_would_write():
    lines = describe(RUN)
    assert lines[0] == "seed=0" and "origins.clips.options.share=0.1" in lines and "stages.adapt.rates.indexer=0.001" in lines
    assert "stages.warm-up.mixture.text.weight=1.0" in lines and "stages.warm-up.budget=none" in lines
