"""Tools as a model sees them: JSON schemas or short lines of text, and what calls give back."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from openkeye.agents.api_domains.database import Database
from openkeye.agents.api_domains.naming import Naming, tool_key
from openkeye.agents.api_domains.phrases import Phrases, sentence
from openkeye.agents.api_domains.schema import CREATES, DAYS, Action, Domain, Field
from openkeye.agents.api_domains.simulator import Outcome
from openkeye.agents.api_domains.values import show

MAX_ROWS_FULL, MAX_ROWS_PLAIN = 10, 3
# that one result shows
CALL_FORM = '<tool_call>{"name": ..., "arguments": {...}}</tool_call>'


def tool_schema(domain: Domain, action: Action, naming: Naming) -> dict[str, Any]:
    """The tool in OpenAI's form."""
    key, phrases = tool_key(domain, action), Phrases(domain, naming.labels[domain.name])
    properties, required = {}, []
    for item in domain.parameters(action):
        shown = naming.arguments[key][item.name]
        properties[shown] = {**_type(item.field), "description": _meaning(action, item.name, item.field, phrases)}
        if item.is_required:
            required.append(shown)
    return {
        "type": "function",
        "function": {
            "name": naming.tools[key],
            "description": sentence(f"{phrases.describe(action)}, in {domain.title}"),
            "parameters": {"type": "object", "properties": properties, "required": required},
        },
    }


def tool_line(domain: Domain, action: Action, naming: Naming) -> str:
    """The tool as one short line: `goat3(id, price): set the price of a room`."""
    key, phrases = tool_key(domain, action), Phrases(domain, naming.labels[domain.name])
    names = ", ".join(naming.arguments[key].values())
    return f"{naming.tools[key]}({names}): {phrases.describe(action)}"


def tools_in_words(tools: Sequence[tuple[Domain, Action]], naming: Naming) -> str:
    """All tools for a prompt whose chat template has no place for them."""
    lines = [tool_line(domain, action, naming) for domain, action in tools]
    return "\n".join(["Tools:", *lines, f"Call: {CALL_FORM}", ""])


def call_in_words(name: str, arguments: Mapping[str, Any]) -> str:
    """A call as text, as chat templates write it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': dict(arguments)}, ensure_ascii=False)}\n</tool_call>"


def result_text(
    domain: Domain, action: Action, outcome: Outcome, database: Database, labels: Mapping[str, str], is_plain: bool
) -> str:
    """What the tool answers: JSON, or in plain wording a line of words."""
    phrases = Phrases(domain, labels)
    if not outcome.is_done:
        return error_text(outcome.fault, outcome.error, is_plain)
    if outcome.is_total:
        cell = domain.entities[action.entity].fields[action.field] if action.field else Field("number")
        amount = show(cell, outcome.amount)
        return str(amount) if is_plain else json.dumps({"result": amount})
    rows = [
        phrases.row(entity, key, row) for entity, key in outcome.rows if (row := database.tables[entity].get(key)) is not None
    ]
    if is_plain:
        return _plain_rows(action, rows)
    if action.kind == "find":
        return json.dumps({"rows": rows[:MAX_ROWS_FULL], "num_rows": len(rows)}, ensure_ascii=False)
    if action.kind == "get":
        return json.dumps(rows[0], ensure_ascii=False)
    return json.dumps({"done": True, "rows": rows}, ensure_ascii=False)


def error_text(fault: str, error: str, is_plain: bool) -> str:
    """A call that was not done."""
    word = "refused" if fault == "refused" else "error"
    return f"{word}: {error}" if is_plain else json.dumps({word: error}, ensure_ascii=False)


def _plain_rows(action: Action, rows: Sequence[Mapping[str, Any]]) -> str:
    if not action.is_read:
        return "done" + (f": {rows[0]['id']}" if action.kind in CREATES else "")
    told = [
        f"{row['id']}: " + ", ".join(f"{name} {row[name]}" for name in row if name != "id") for row in rows[:MAX_ROWS_PLAIN]
    ]
    if len(rows) > MAX_ROWS_PLAIN:
        told.append(f"and {len(rows) - MAX_ROWS_PLAIN} more")
    return "\n".join(told) or "none"


def _type(field: Field) -> dict[str, Any]:
    if field.kind == "number":
        return {"type": "integer", "minimum": field.low, "maximum": field.high}
    if field.kind == "money":
        return {"type": "number", "minimum": 0}
    if field.kind in ("choice", "state", "day"):
        return {"type": "string", "enum": list(DAYS if field.kind == "day" else field.options)}
    return {"type": "string"}


def _meaning(action: Action, name: str, field: Field, phrases: Phrases) -> str:
    """A parameter's description, in labels."""
    if name in ("id", "source", "target") and field.target == action.entity:
        role = {"id": "", "source": ", from which", "target": ", to which"}[name]
        return f"id of the {phrases.label(action.entity)}{role}"
    if name == "amount":
        return f"how much {phrases.label(action.field)}"
    if field.target:
        return f"the {phrases.label(name)}: id of a {phrases.label(field.target)}"
    return f"the {phrases.label(name)}" + (', such as "14:00"' if field.kind == "hour" else "")
