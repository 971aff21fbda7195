"""`field=value` words for nested frozen dataclasses: `stages.warm-up.num_steps=20`, `sources.mine.path=/videos`."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from openkeye.common.checks import InputError

T = TypeVar("T")
WORDS_OF_TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
ALL = "*"


def with_fields(config: T, words: Sequence[str]) -> T:
    """The same settings with some fields changed, in the order of the words, so that a later word wins.

    A step into a tuple is a number, the `name` (or `source`) of one of its records, or `*` for all of them; the number after
    the last one appends a record. A step into a mapping is a key, which may be new. The records are made, and check
    themselves, after the last word.

    Raises:
        InputError: a name that is not known, a value of another type, or a record that refuses its values.
    """
    draft = _Draft.of(type(config), config)
    for word in words:
        path, has_value, text = word.partition("=")
        if not has_value or not path:
            raise InputError(f"{word!r}: expected field=value, for example seed=3 or stages.0.context=8192")
        draft.change(path.split("."), text, path)
    return draft.built("")


def with_options(config: T, options: Mapping[str, Any]) -> T:
    """The same settings with some fields changed, given by their paths; values as they would be written."""
    return with_fields(config, [f"{name}={value}" for name, value in options.items()])


def describe(config: Any) -> list[str]:
    """Every field with its value, as words that `with_fields` reads."""
    return list(_words(_Draft.of(type(config), config), ""))


def parse_value(text: str, annotation: Any, name: str) -> Any:
    """A word as a value of an annotated type: numbers, truth, text, tuples of them ("a,b"), unions, and None as "none".

    Raises:
        InputError: the text is no such value; names `name` and what was expected.
    """
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return _parse_union(text, typing.get_args(annotation), name)
    if typing.get_origin(annotation) is tuple and not _is_records(annotation):
        element = typing.get_args(annotation)[0]
        return tuple(parse_value(part.strip(), element, name) for part in text.split(",")) if text.strip() else ()
    if annotation in PARSERS:
        try:
            return PARSERS[annotation](text)
        except (ValueError, OverflowError):
            raise InputError(f"{name}={text}: expected {expected(annotation)}") from None
    raise InputError(f"{name}={text}: {name} is not one value; {_mend(annotation, name)}")


def unknown(what: str, name: str, known: Iterable[str]) -> InputError:
    """The error for a name that nobody knows, with the nearest one that somebody does."""
    names = [str(one) for one in known]
    near = difflib.get_close_matches(name, names, 1)
    guess = f"; did you mean {near[0]}?" if near else ""
    return InputError(f"{what} {name!r} is unknown{guess} (known: {', '.join(names) or 'none'})")


def expected(annotation: Any) -> str:
    """A type in words."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return " or ".join(expected(one) for one in typing.get_args(annotation))
    return EXPECTED.get(annotation, str(annotation))


def _parse_int(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        number = float(text)  # "1e6"
        if number != int(number):
            raise
        return int(number)


def _parse_float(text: str) -> float:
    number = float(text)
    if math.isnan(number):
        raise ValueError(text)
    return number


def _parse_bool(text: str) -> bool:
    if text.lower() not in WORDS_OF_TRUTH:
        raise ValueError(text)
    return WORDS_OF_TRUTH[text.lower()]


def _parse_none(text: str) -> None:
    if text.lower() != "none":
        raise ValueError(text)


PARSERS: dict[Any, Callable[[str], Any]] = {
    type(None): _parse_none,
    int: _parse_int,
    float: _parse_float,
    bool: _parse_bool,
    str: str,
}
EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "none"}


def _parse_union(text: str, choices: Sequence[Any], name: str) -> Any:
    """The first type that fits; text is the last resort, and 1 is a number before it is a truth."""
    order = [type(None), int, float, bool]
    ranked = sorted(choices, key=lambda choice: order.index(choice) if choice in order else len(order) + (choice is str))
    for choice in ranked:
        try:
            # A whole number that is only whole by its exponent stays what the union's float makes of it.
            if choice is int and float in choices and not text.strip().lstrip("+-").replace("_", "").isdigit():
                continue
            return parse_value(text, choice, name)
        except InputError:
            continue
    raise InputError(f"{name}={text}: expected {' or '.join(expected(choice) for choice in choices)}")


def _mend(annotation: Any, name: str) -> str:
    if typing.get_origin(annotation) is tuple:
        return f"give fields of its records, for example {name}.0.FIELD=VALUE"
    if dataclasses.is_dataclass(annotation):
        return f"give its fields: {', '.join(f'{name}.{field.name}' for field in dataclasses.fields(annotation))}"
    return f"give {name}.NAME=VALUE"


class _Draft:
    """A dataclass, tuple of dataclasses or mapping while it is being changed; everything else is a leaf, kept as it is."""

    def __init__(self, annotation: Any, parts: dict[Any, Any]) -> None:
        self.annotation = annotation
        self.parts = parts
        # by field name, number or key: drafts and leaves

    @classmethod
    def of(cls, annotation: Any, value: Any) -> Any:
        """A draft of a value; the value itself where it is a leaf."""
        if dataclasses.is_dataclass(annotation):
            hints = typing.get_type_hints(annotation)
            parts = {
                field.name: cls.of(hints[field.name], getattr(value, field.name)) for field in dataclasses.fields(annotation)
            }
            return cls(annotation, parts)
        if _is_mapping(annotation):
            element = typing.get_args(annotation)[1]
            return cls(annotation, {key: cls.of(element, part) for key, part in value.items()})
        if _is_records(annotation):
            element = typing.get_args(annotation)[0]
            return cls(annotation, {number: cls.of(element, part) for number, part in enumerate(value)})
        return value

    def change(self, steps: list[str], text: str, path: str) -> None:
        """Set what the steps lead to."""
        for key in self._keys(steps[0], path):
            element = self._element(key)
            if len(steps) > 1:
                if key not in self.parts and isinstance(empty := _empty(element), _Draft):
                    self.parts[key] = empty
                if not isinstance(self.parts.get(key), _Draft):
                    raise InputError(f"{path}: {steps[0]} is one value and has no fields; give {_until(path, steps)}=VALUE")
                self.parts[key].change(steps[1:], text, path)
            elif text == "" and (_is_mapping(element) or _is_records(element)):
                self.parts[key] = _empty(element)
            else:
                self.parts[key] = parse_value(text, element, path)

    def built(self, path: str) -> Any:
        """The value; records check themselves here."""
        values = {key: part.built(f"{path}{key}.") if isinstance(part, _Draft) else part for key, part in self.parts.items()}
        if _is_mapping(self.annotation):
            return values
        if _is_records(self.annotation):
            return tuple(values.values())
        missing = [
            field.name
            for field in dataclasses.fields(self.annotation)
            if field.name not in values and field.default is field.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise InputError(f"{path.rstrip('.')} is new and lacks {', '.join(missing)}; give {path}{missing[0]}=VALUE as well")
        try:
            return self.annotation(**values)
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"{path.rstrip('.') or self.annotation.__name__}: {error}") from error

    def named(self) -> dict[str, Any]:
        """Keys by what people call them: records by their own name where no two share it."""
        if not _is_records(self.annotation):
            return {str(key): key for key in self.parts}
        names = [part.parts.get("name", part.parts.get("source")) for part in self.parts.values()]
        return {
            name if isinstance(name, str) and names.count(name) == 1 and _is_plain(name) else str(key): key
            for key, name in zip(self.parts, names, strict=True)
        }

    def _keys(self, step: str, path: str) -> list[Any]:
        if dataclasses.is_dataclass(self.annotation):
            names = [field.name for field in dataclasses.fields(self.annotation)]
            if step not in names:
                raise unknown("field" if "." not in path else f"{path}: field", step, names)
            return [step]
        if step == ALL:
            return list(self.parts)
        if _is_mapping(self.annotation):
            return [step]
        if step.isdigit() and int(step) <= len(self.parts):
            return [int(step)]
        if step in (named := self.named()):
            return [named[step]]
        raise unknown(f"{path}: record", step, [*named, f"numbers up to {len(self.parts) - 1}", ALL])

    def _element(self, key: Any) -> Any:
        if dataclasses.is_dataclass(self.annotation):
            return typing.get_type_hints(self.annotation)[key]
        arguments = typing.get_args(self.annotation)
        return arguments[1] if _is_mapping(self.annotation) else arguments[0]


def _words(draft: _Draft, prefix: str) -> Iterable[str]:
    for name, key in draft.named().items():
        part = draft.parts[key]
        if isinstance(part, _Draft) and part.parts:
            yield from _words(part, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}={'' if isinstance(part, _Draft) else _text(part)}"


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(_text(part) for part in value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _is_mapping(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (Mapping, dict)


def _is_records(annotation: Any) -> bool:
    return typing.get_origin(annotation) is tuple and dataclasses.is_dataclass(typing.get_args(annotation)[0])


def _is_plain(name: str) -> bool:
    """Whether a name can be a step: no dots and equals signs, and no number or star, which mean something else."""
    return bool(name) and not set(name) & set(".=*") and not name.isdigit()


def _empty(annotation: Any) -> Any:
    """What a new key of a mapping, or a new record, begins as: its fields' defaults come when it is built."""
    if dataclasses.is_dataclass(annotation) or _is_mapping(annotation) or _is_records(annotation):
        draft = _Draft(annotation, {})
        if dataclasses.is_dataclass(annotation):
            hints = typing.get_type_hints(annotation)
            for field in dataclasses.fields(annotation):
                if field.default_factory is not dataclasses.MISSING:
                    draft.parts[field.name] = _Draft.of(hints[field.name], field.default_factory())
        return draft
    return None


def _until(path: str, steps: list[str]) -> str:
    """The path up to the step that turned out to be a leaf."""
    return ".".join(path.split(".")[: -len(steps) + 1])
