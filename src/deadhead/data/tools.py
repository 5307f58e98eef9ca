"""Tools that a conversation may call, and their calls, as chat templates expect them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from deadhead.errors import InputError


def tools_of(value: Any, label: str) -> list[Any] | None:
    """Return the tools of a conversation, which may be given as JSON text, as a list; None if there are none.

    Raises:
        InputError: they are not a list of objects; the message names the conversation by its label.
    """
    tools = _parsed(value) if isinstance(value, str) else value
    if value is None or value == "" or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise InputError(
            f"A list of tools was expected in {label}, but got {str(value)[:60]!r}; give a list of objects that each "
            "describe a tool, or the JSON text of one."
        )
    return tools


def with_mappings(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message whose tool calls have their arguments as mappings instead of JSON text."""
    calls = message.get("tool_calls")
    return {**message, **({"tool_calls": list(map(_with_mapping, calls))} if isinstance(calls, list) else {})}


def _with_mapping(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    changed = {"function": _with_mapping(call["function"])} if "function" in call else {}
    arguments = call.get("arguments")
    if isinstance(arguments, str) and isinstance(parsed := _parsed(arguments), dict):
        changed["arguments"] = parsed
    return {**call, **changed}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
