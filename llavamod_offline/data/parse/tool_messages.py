"""Messages about tools, as found in rows → turns.

    OpenAI, TRL             assistant with `tool_calls` (or `function_call`); role `tool` or `function`
    ms-swift                roles `tool_call` and `tool_response`
    ShareGPT, LlamaFactory  `function_call` and `observation`

A row's `tools` is a list of functions, or that list as JSON text. Arguments are an object, or that object as JSON text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llavamod_offline.data.rows import RowError
from llavamod_offline.data.sample import Turn
from llavamod_offline.data.tools import calls_turn, result_turn, tools_turn

_CALLS = ("tool_call", "function_call")
_RESULTS = ("tool", "tool_response", "function", "observation", "ipython")


def read_tools(value: Any) -> Turn | None:
    """The turn of a row's `tools`; None if it has none, even if other rows have some. Errors: `RowError`."""
    tools = _parsed(value)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) and _function(tool) for tool in tools):
        raise RowError("malformed row", "field 'tools' must be a list of functions with a 'name', or such JSON text")
    return tools_turn(tools)


def tool_turn(speaker: str, message: Mapping[str, Any], content: Any, where: str) -> Turn | None:
    """The turn of a message that calls tools or has a result; None for any other. Errors: `RowError`."""
    if speaker in _RESULTS:
        if not isinstance(content, str):
            raise RowError("malformed row", f"{where}: a tool's result must be a text")
        about = {name: message[name] for name in ("name", "tool_call_id") if isinstance(message.get(name), str)}
        return result_turn(content, **about)
    if speaker in _CALLS:
        calls = _parsed(content)
        return calls_turn(_calls(calls if isinstance(calls, list) else [calls], where))
    calls = message.get("tool_calls") or message.get("function_call")
    if not calls:
        return None
    if not isinstance(content, str | None):
        raise RowError("malformed row", f"{where}: the content beside tool calls must be a text")
    return calls_turn(_calls(calls if isinstance(calls, list) else [calls], where), content or "")


def _calls(calls: list[Any], where: str) -> list[dict[str, Any]]:
    found = []
    for call in calls:
        function = _function(call) if isinstance(call, Mapping) else None
        arguments = _parsed(function["arguments"]) if function and "arguments" in function else None
        if not function or not isinstance(arguments, Mapping):
            reason = "a tool call must have a 'name' and 'arguments', an object or its JSON text"
            raise RowError("malformed row", f"{where}: {reason}")
        own = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        found.append(own | {"name": function["name"], "arguments": arguments})
    return found


def _function(value: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The function of a tool or a call, nested or bare; None if it has no name."""
    function = value.get("function", value)
    return function if isinstance(function, Mapping) and isinstance(function.get("name"), str) else None


def _parsed(value: Any) -> Any:
    """The value of JSON text; anything else, including other text, unchanged."""
    try:
        return json.loads(value) if isinstance(value, str) and value.strip() else value
    except (ValueError, RecursionError):
        return value
