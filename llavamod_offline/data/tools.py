"""Tools in conversations: the JSON of their turns, and the messages that chat templates take.

tools         the list of tools that the assistant may call: `[{"type": "function", "function": {…}}]`
tool_calls    `{"content": text, "calls": [{"name", "arguments"}]}`, a call with its `id` if the row has one
tool          `{"content": text}`, what a tool returned, with `name` and `tool_call_id` if the row has them
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llavamod_offline.data.sample import Turn


def tools_turn(tools: Sequence[Mapping[str, Any]]) -> Turn:
    """The turn of a list of tools; a bare function, as in LlamaFactory, gets the form that chat templates expect."""
    whole = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return Turn("tools", json.dumps(whole, ensure_ascii=False))


def calls_turn(calls: Sequence[Mapping[str, Any]], content: str = "") -> Turn:
    """The turn of the assistant's calls, and what it says before them."""
    ordered = [{name: call[name] for name in ("id", "name", "arguments") if name in call} for call in calls]
    return Turn("tool_calls", json.dumps({"content": content, "calls": ordered}, ensure_ascii=False))


def result_turn(content: str, **about: str) -> Turn:
    """The turn of what a tool returned."""
    return Turn("tool", json.dumps({"content": content, **about}, ensure_ascii=False))


def joined_calls(first: Turn, second: Turn) -> Turn:
    """Join calls that a row holds in two consecutive messages."""
    one, two = json.loads(first.text), json.loads(second.text)
    return calls_turn(one["calls"] + two["calls"], "\n".join(filter(None, (one["content"], two["content"]))))


def to_message(turn: Turn) -> dict[str, Any]:
    """A turn of calls or a result as a message for transformers' `apply_chat_template`."""
    content = json.loads(turn.text)
    if turn.role == "tool":
        return {"role": "tool", **content}
    calls = [
        {key: call[key] for key in ("id",) if key in call}
        | {"type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
        for call in content["calls"]
    ]
    return {"role": "assistant", "content": content["content"], "tool_calls": calls}
