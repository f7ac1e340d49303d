"""One conversation with tools, written in each public format, packs to one and the same sample."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavamod_offline.data.parse.row_formats import row_to_sample
from llavamod_offline.data.rows import RowError
from llavamod_offline.data.sample import Sample, Turn, sample_from_json, sample_to_json
from llavamod_offline.data.tools import calls_turn, result_turn, tools_turn

words = st.text(st.characters(blacklist_categories=["Cs", "Cc"], blacklist_characters="<\0"), min_size=1, max_size=9)
spoken = words.filter(lambda text: bool(text.strip()))
functions = st.lists(
    st.fixed_dictionaries({"name": spoken, "description": words, "parameters": st.just({"type": "object"})}), max_size=2
)
calls = st.lists(
    st.fixed_dictionaries({"name": spoken, "arguments": st.dictionaries(words, words | st.integers(), max_size=2)}),
    min_size=1,
    max_size=2,
)


@st.composite
def talks(draw: st.DrawFn) -> tuple[Turn, ...]:
    turns = [tools_turn(tools)] if (tools := draw(functions)) else []
    if draw(st.booleans()):
        turns.append(Turn("system", draw(spoken)))
    for _ in range(draw(st.integers(1, 2))):
        turns.append(Turn("user", draw(words)))
        for _ in range(draw(st.integers(0, 2))):
            made = draw(calls)
            turns.append(calls_turn(made))
            turns += [result_turn(draw(words)) for _ in made]
        turns.append(Turn("assistant", draw(spoken)))
    return tuple(turns)


def _row(turns: tuple[Turn, ...], name: str, message: Callable[[Turn], list[dict[str, Any]]]) -> dict[str, Any]:
    tools = json.loads(turns[0].text) if turns[0].role == "tools" else []
    spelled = [one for turn in turns if turn.role != "tools" for one in message(turn)]
    return {name: spelled, "tools": tools}


def openai(turn: Turn) -> list[dict[str, Any]]:
    if turn.role == "tool_calls":
        made = [
            {"type": "function", "function": {**call, "arguments": json.dumps(call["arguments"])}}
            for call in json.loads(turn.text)["calls"]
        ]
        return [{"role": "assistant", "content": None, "tool_calls": made}]
    text = json.loads(turn.text)["content"] if turn.role == "tool" else turn.text
    return [{"role": turn.role, "content": text}]


def trl(turn: Turn) -> list[dict[str, Any]]:
    if turn.role == "tool_calls":
        made = [{"type": "function", "function": call} for call in json.loads(turn.text)["calls"]]
        return [{"role": "assistant", "tool_calls": made}]
    return openai(turn)


def ms_swift(turn: Turn) -> list[dict[str, Any]]:
    if turn.role == "tool_calls":
        return [{"role": "tool_call", "content": json.dumps(call)} for call in json.loads(turn.text)["calls"]]
    if turn.role == "tool":
        return [{"role": "tool_response", "content": json.loads(turn.text)["content"]}]
    return openai(turn)


def sharegpt(turn: Turn) -> list[dict[str, Any]]:
    if turn.role == "tool_calls":
        return [{"from": "function_call", "value": json.dumps(json.loads(turn.text)["calls"])}]
    speaker = {"user": "human", "assistant": "gpt", "tool": "observation", "system": "system"}[turn.role]
    return [{"from": speaker, "value": openai(turn)[0]["content"]}]


def llama_factory(turns: tuple[Turn, ...]) -> dict[str, Any]:
    row = _row(turns, "conversations", sharegpt)
    return row | {"tools": json.dumps([tool["function"] for tool in row["tools"]])}


FORMS: dict[str, Callable[[tuple[Turn, ...]], dict[str, Any]]] = {
    "OpenAI": lambda turns: _row(turns, "messages", openai),
    "TRL": lambda turns: _row(turns, "messages", trl),
    "ms-swift": lambda turns: _row(turns, "messages", ms_swift),
    "tools as text": lambda turns: (row := _row(turns, "messages", openai)) | {"tools": json.dumps(row["tools"])},
    "ShareGPT": lambda turns: _row(turns, "conversations", sharegpt),
    "LlamaFactory": llama_factory,
}


def read(row: dict[str, Any]) -> Sample:
    return row_to_sample(row, key="k", source="rows", read_image=lambda _: b"")


@pytest.mark.parametrize("form", FORMS)
@given(turns=talks())
def test_each_spelling_gives_the_same_sample(form: str, turns: tuple[Turn, ...]) -> None:
    sample = read(FORMS[form](turns))
    assert sample == Sample("k", turns, source="rows")
    assert sample_from_json("k", sample_to_json(sample), ()) == sample


def test_ids_and_names_of_calls_and_what_is_said_before_them_are_kept() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "Let me look.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "name": "look", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    calls, result = read({"messages": messages}).turns[1:3]
    assert calls == calls_turn([{"id": "c1", "name": "look", "arguments": {}}], "Let me look.")
    assert result == result_turn("b", name="look", tool_call_id="c1")


def test_the_prompt_of_a_preference_may_have_tools() -> None:
    asked = [{"role": "user", "content": "a"}, {"role": "tool_call", "content": '{"name": "f", "arguments": {}}'}]
    sample = read({"prompt": [*asked, {"role": "tool", "content": "b"}], "chosen": "c", "rejected": "d"})
    assert [turn.role for turn in sample.turns] == ["user", "tool_calls", "tool"]
    assert (sample.chosen, sample.rejected) == ("c", "d")


ASK, CALL, SAID = (
    {"role": "user", "content": "a"},
    {"role": "tool_call", "content": '{"name": "f", "arguments": {}}'},
    {"role": "assistant", "content": "c"},
)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [ASK, CALL]}, "the last turn is by 'tool_calls'"),
        ({"messages": [ASK, CALL, SAID]}, "turn 2 is by 'assistant', expected 'tool'"),
        ({"messages": [ASK, {"role": "tool", "content": "b"}, SAID]}, "turn 1 is by 'tool'"),
        ({"messages": [ASK, CALL, {"role": "tool", "content": "b"}, ASK, SAID]}, "turn 3 is by 'user'"),
        ({"messages": [ASK, CALL, {"role": "tool", "content": "<image>"}, SAID]}, "is in the tool turn"),
        ({"messages": [ASK, CALL, {"role": "tool", "content": [{"type": "image"}]}, SAID]}, "turn 2: a tool's result"),
        ({"messages": [ASK, {"role": "tool_call", "content": "f()"}, SAID]}, "turn 1: a tool call must have a 'name'"),
        ({"messages": [ASK, SAID | {"tool_calls": [{"id": 1}]}]}, "turn 1: a tool call must have a 'name'"),
        ({"messages": [ASK, SAID], "tools": "[{}]"}, "field 'tools' must be a list of functions"),
        ({"messages": [ASK, SAID], "tools": [{"type": "function"}]}, "field 'tools' must be a list of functions"),
        ({"messages": [ASK, SAID], "tools": "look"}, "field 'tools' must be a list of functions"),
    ],
)
def test_what_cannot_be_worded_is_rejected_by_name(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError) as caught:
        read(row)
    assert reason in str(caught.value)
