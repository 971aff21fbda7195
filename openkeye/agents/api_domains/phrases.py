"""Actions, rows and answers in plain English, in an episode's labels."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from openkeye.agents.api_domains.schema import CREATES, Action, Domain
from openkeye.agents.api_domains.values import show


@dataclass(frozen=True)
class Phrases:
    """Sentences about one domain."""

    domain: Domain
    labels: Mapping[str, str]

    def label(self, name: str) -> str:
        return self.labels.get(name, name).replace("_", " ")

    def describe(self, action: Action) -> str:
        """What a tool does, as its description says it."""
        entity, field, verb = self.label(action.entity), self.label(action.field), action.verb
        if action.kind == "get":
            return f"get {article(entity)}"
        if action.kind == "find":
            return f"find {plural(entity)} by {_list([self.label(name) for name in action.filters], 'or')}"
        if action.kind == "total":
            by = f" by {_list([self.label(name) for name in action.filters], 'or')}" if action.filters else ""
            return f"count {plural(entity)}{by}" if verb == "count" else f"{verb} {field} of {plural(entity)}{by}"
        if action.kind == "update":
            return f"set the {field} of {article(entity)}"
        if action.kind == "add":
            return f"{verb} to the {field} of {article(entity)}"
        if action.kind == "take":
            return f"{verb} from the {field} of {article(entity)}"
        if action.kind == "transfer":
            return f"{verb} {field} from {article(entity)} to another"
        if action.kind == "link":
            return f"{verb} {article(entity)}: {field}"
        if action.kind == "unlink":
            return f"{verb} the {field} of {article(entity)}"
        return f"{verb} {article(entity)}"

    def demand(self, action: Action, arguments: Mapping[str, Any], mention: Callable[[str, str], str], hidden: str = "") -> str:
        """The action as a user asks for it: "set the price of room r3 to 80".

        Args:
            arguments: as tools take them.
            mention: (entity, id) to words.
            hidden: an argument that is not told.
        """
        entity, verb = self.label(action.entity), action.verb
        words = {
            item.name: mention(item.field.target, arguments[item.name]) if item.field.target else str(arguments[item.name])
            for item in self.domain.parameters(action)
            if item.name in arguments and item.name != hidden
        }
        row, field, amount = words.get("id", ""), self.label(action.field), words.get("amount", "some")
        if action.kind in CREATES:
            told = [self._told(action, name, text) for name, text in words.items()]
            return f"{verb} {article(entity)}" + (f": {', '.join(told)}" if told else "")
        if action.kind == "update":
            return f"set the {field} of {row}" + ("" if hidden else f" to {words[action.field]}")
        if action.kind == "add":
            return f"{verb} {amount} to the {field} of {row}"
        if action.kind == "take":
            return f"{verb} {amount} from the {field} of {row}"
        if action.kind == "transfer":
            return f"{verb} {amount} of {field} from {words.get('source')} to {words.get('target')}"
        if action.kind == "link":
            return f"{verb} {row}" if hidden else f"{verb} {row}: {self._told(action, action.field, words[action.field])}"
        if action.kind == "unlink":
            return f"{verb} the {field} of {row}"
        return f"{verb} {row}"

    def _told(self, action: Action, name: str, text: str) -> str:
        """A field and its value; a reference whose words begin with the field's own name is enough by itself."""
        label, cell = self.label(name), self.domain.entities[action.entity].fields[name]
        return text if cell.target and text.startswith(f"{label} ") else f"{label} {text}"

    def question(self, action: Action, arguments: Mapping[str, Any]) -> str:
        """A total as a user asks for it."""
        entity = plural(self.label(action.entity))
        which = self.clause(action.entity, arguments)
        if action.verb == "count":
            return f"how many {entity}{which} are there"
        superlative = {"sum": "sum of the", "highest": "highest", "lowest": "lowest"}[action.verb]
        return f"what is the {superlative} {self.label(action.field)} of the {entity}{which}"

    def clause(self, entity: str, arguments: Mapping[str, Any]) -> str:
        """ " with kind suite and floor 3"; empty without arguments."""
        parts = [f"{self.label(name)} {value}" for name, value in arguments.items()]
        return f" with {_list(parts, 'and')}" if parts else ""

    def mention(self, entity: str, key: str) -> str:
        """A row by its id."""
        return f"{self.label(entity)} {key}"

    def described(self, entity: str, arguments: Mapping[str, Any]) -> str:
        """A row by what it alone has."""
        return f"the {self.label(entity)}{self.clause(entity, arguments)}"

    def row(self, entity: str, key: str, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row as tools show it."""
        fields = self.domain.entities[entity].fields
        return {"id": key} | {self.labels.get(name, name): show(fields[name], value) for name, value in row.items()}


def plural(word: str) -> str:
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return f"{word}es"
    if word.endswith("y") and word[-2:-1] not in "aeiou":
        return f"{word[:-1]}ies"
    return f"{word}s"


def article(word: str) -> str:
    return f"an {word}" if word[:1] in "aeiou" else f"a {word}"


def sentence(text: str, end: str = ".") -> str:
    return text[:1].upper() + text[1:] + end


def _list(parts: list[str], word: str) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} {word} {parts[-1]}"
