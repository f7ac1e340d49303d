"""One conversation, written in each of the public forms, packs to one sample."""

from __future__ import annotations

import base64
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.data.sources.row_files import ROW_FILES
from llavamod_offline.data.tars.tar_index import TarSource, index_tars
from tests.llavamod_offline.data.parse.packed_rows import IMAGES, pack
from tests.llavamod_offline.data.sources.source_files import write_rows
from tests.llavamod_offline.data.tars.foreign_tars import write_tar
from tests.llavamod_offline.data.tars.test_tar_index import read_all

EXTENSIONS = {"a.jpg": "jpg", "sub/b.png": "png", "c.webp": "webp"}

words = st.text(st.characters(blacklist_categories=["Cs", "Cc"], blacklist_characters="<\0"), min_size=1, max_size=12)
answers = words.filter(lambda text: bool(text.strip()))


@dataclass(frozen=True)
class Talk:
    """A conversation: its turns, possibly starting with a system turn, and the names of its images in order."""

    turns: tuple[Turn, ...]
    names: tuple[str, ...]

    @property
    def sample(self) -> Sample:
        kinds = tuple(EXTENSIONS[name] for name in self.names)
        return Sample("k", self.turns, tuple(IMAGES[name] for name in self.names), kinds, source="rows")


@st.composite
def talks(draw: st.DrawFn, *, system: bool = True, first_only: bool = False) -> Talk:
    """Conversations; `first_only`: all images before the first text, as in sets whose texts do not place them."""
    turns, names = [], []
    if system and draw(st.booleans()):
        turns.append(Turn("system", draw(words)))
    for number in range(draw(st.integers(1, 3))):
        shown = draw(st.lists(st.sampled_from(sorted(IMAGES)), max_size=2 if number == 0 or not first_only else 0))
        names += shown
        question = "<image>\n" * len(shown) + draw(words.filter(lambda text: not text[0].isspace()))
        if not first_only and draw(st.booleans()):
            question += " then <image> and more"
            names.append("c.webp")
        turns += [Turn("user", question), Turn("assistant", draw(answers))]
    return Talk(tuple(turns), tuple(names))


def _messages(talk: Talk, content: Callable[[str], Any] = str) -> list[dict[str, Any]]:
    return [{"role": turn.role, "content": content(turn.text)} for turn in talk.turns]


def _spoken(talk: Talk) -> list[dict[str, str]]:
    speakers = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": speakers[turn.role], "value": turn.text} for turn in talk.turns]


def _parts(text: str, images: list[dict[str, Any]], *, newlines: bool) -> list[dict[str, Any]]:
    """The parts of a text; without `newlines`, line breaks beside an image are left to the reader to add."""
    text = text if newlines else text.replace("<image>\n", "<image>")
    pieces = [piece for piece in re.split("(<image>)", text) if piece]
    return [images.pop(0) if piece == "<image>" else {"type": "text", "text": piece} for piece in pieces]


def _with_parts(talk: Talk, part: Callable[[str], dict[str, Any]], *, newlines: bool = True) -> dict[str, Any]:
    images = [part(name) for name in talk.names]
    return {"messages": _messages(talk, lambda text: _parts(text, images, newlines=newlines))}


def _data_url(name: str) -> str:
    return "data:image/png;base64," + base64.b64encode(IMAGES[name]).decode()


def _without_system(row: dict[str, Any], talk: Talk) -> dict[str, Any]:
    """Move the system turn to a field of its own."""
    if talk.turns[0].role != "system":
        return row
    name = "conversations" if "conversations" in row else "messages"
    return row | {name: row[name][1:], "system": talk.turns[0].text}


JSON_FORMS: dict[str, Callable[[Talk], dict[str, Any]]] = {
    "LLaVA": lambda talk: {"conversations": _spoken(talk), "image": list(talk.names)},
    "ShareGPT with images": lambda talk: {"conversations": _spoken(talk), "images": list(talk.names)},
    "roles in conversations": lambda talk: {"conversations": _messages(talk), "images": list(talk.names)},
    "messages": lambda talk: {"messages": _messages(talk), "images": list(talk.names)},
    "paths in structs": lambda talk: {
        "messages": _messages(talk), "images": [{"path": name, "bytes": None} for name in talk.names]
    },
    "system in a field": lambda talk: _without_system({"messages": _messages(talk), "images": list(talk.names)}, talk),
    "parts": lambda talk: _with_parts(talk, lambda name: {"type": "image"}) | {"images": list(talk.names)},
    "parts without newlines": lambda talk: (
        _with_parts(talk, lambda name: {"type": "image"}, newlines=False) | {"images": list(talk.names)}
    ),
    "parts with paths": lambda talk: _with_parts(talk, lambda name: {"type": "image", "image": name}),
    "parts with file URLs": lambda talk: _with_parts(talk, lambda name: {"type": "image", "path": name, "text": None}),
    "OpenAI": lambda talk: _with_parts(talk, lambda name: {"type": "image_url", "image_url": {"url": _data_url(name)}}),
    "base64": lambda talk: _with_parts(
        talk, lambda name: {"type": "image", "base64": base64.b64encode(IMAGES[name]).decode()}
    ),
}  # fmt: skip


@settings(max_examples=30)
@given(talk=talks())
@pytest.mark.parametrize("form", JSON_FORMS)
def test_forms_of_json(images: Path, form: str, talk: Talk) -> None:
    file = write_rows(images / "rows.jsonl", [JSON_FORMS[form](talk) | {"id": "k"}])
    assert pack(file, images) == [talk.sample]


def _split(talk: Talk) -> tuple[list[dict[str, Any]], str]:
    """A conversation's messages without the last answer, and that answer."""
    *before, last = _messages(talk)
    return before, str(last["content"])


def _said(text: str) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def _prompted(talk: Talk, *, parts: bool) -> tuple[list[dict[str, Any]], str]:
    before, last = _split(talk)
    if not parts:
        return before, last
    images = [{"type": "image"} for _ in talk.names]
    return [turn | {"content": _parts(turn["content"], images, newlines=True)} for turn in before], last


PREFERENCE_FORMS: dict[str, Callable[[Talk, str, bool], dict[str, Any]]] = {
    "prompt of messages": lambda talk, other, parts: {
        "prompt": (asked := _prompted(talk, parts=parts))[0], "chosen": _said(asked[1]), "rejected": _said(other)
    },
    "whole conversations": lambda talk, other, parts: {
        "chosen": (asked := _prompted(talk, parts=parts))[0] + _said(asked[1]), "rejected": asked[0] + _said(other)
    },
    "texts after messages": lambda talk, other, parts: {
        "messages": (asked := _prompted(talk, parts=parts))[0], "chosen": asked[1], "rejected": other
    },
    "ms-swift": lambda talk, other, parts: {
        "messages": (asked := _prompted(talk, parts=parts))[0] + _said(asked[1]), "rejected_response": other
    },
}  # fmt: skip
UNPAIRED_FORMS: dict[str, Callable[[Talk, bool], dict[str, Any]]] = {
    "completion": lambda talk, parts: {
        "prompt": (asked := _prompted(talk, parts=parts))[0], "completion": asked[1]
    },
    "completion of messages": lambda talk, parts: {
        "prompt": (asked := _prompted(talk, parts=parts))[0], "completion": _said(asked[1])
    },
    "messages": lambda talk, parts: {"messages": (asked := _prompted(talk, parts=parts))[0] + _said(asked[1])},
}  # fmt: skip


@settings(max_examples=20)
@given(talk=talks(), other=answers, parts=st.booleans())
@pytest.mark.parametrize("form", PREFERENCE_FORMS)
def test_forms_of_preferences(images: Path, form: str, talk: Talk, other: str, parts: bool) -> None:
    """With any number of turns and images; the assistant's earlier answers are part of the prompt."""
    chosen = talk.turns[-1].text
    row = PREFERENCE_FORMS[form](talk, other, parts) | {"id": "k", "images": list(talk.names)}
    found = pack(write_rows(images / "rows.jsonl", [row]), images)
    if chosen.strip() == other.strip():
        assert found == ["identical answers: the chosen and the rejected answer are the same"]
    else:
        assert found == [replace(talk.sample, turns=talk.turns[:-1], chosen=chosen, rejected=other)]


@settings(max_examples=20)
@given(talk=talks(), parts=st.booleans(), label=st.booleans())
@pytest.mark.parametrize("form", UNPAIRED_FORMS)
def test_forms_of_unpaired_answers(images: Path, form: str, talk: Talk, parts: bool, label: bool) -> None:
    row = UNPAIRED_FORMS[form](talk, parts) | {"id": "k", "images": list(talk.names), "label": label}
    answer = {"chosen" if label else "rejected": talk.turns[-1].text}
    expected = replace(talk.sample, turns=talk.turns[:-1], **answer)  # type: ignore[arg-type]
    assert pack(write_rows(images / "rows.jsonl", [row]), images) == [expected]


@settings(max_examples=20)
@given(talk=talks())
@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_tables_hold_what_text_holds(images: Path, suffix: str, talk: Talk) -> None:
    """Also in worker processes, which receive a table's rows as Arrow."""
    row = {"id": "k", "messages": _messages(talk), "images": [{"bytes": IMAGES[n], "path": n} for n in talk.names]}
    table = pa.Table.from_pylist([row] * 3)
    if suffix == "parquet":
        pq.write_table(table, images / "rows.parquet")
    else:
        with pa.OSFile(str(images / "rows.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    for rows in ROW_FILES[f".{suffix}"].rows(images / f"rows.{suffix}", lambda size: None, 2):
        assert pickle.loads(pickle.dumps(rows)).listed() == rows.listed()
        ((number, content),) = rows.listed()
        assert (number, content["id"]) == (2, "k")
    assert pack(images / f"rows.{suffix}") == [talk.sample] * 3


@settings(max_examples=30)
@given(talk=talks(system=False, first_only=True))
def test_pairs(images: Path, talk: Talk) -> None:
    """FineVision's texts do not place their images; these come before the first text."""
    said = [turn.text.replace("<image>\n", "") for turn in talk.turns]
    pairs = [{"user": ask, "assistant": answer} for ask, answer in zip(said[::2], said[1::2], strict=True)]
    row = {"id": "k", "texts": pairs, "images": list(talk.names), "source": "x"}
    assert pack(write_rows(images / "rows.json", [row]), images) == [talk.sample]


@settings(max_examples=20)
@given(talk=talks(), other=talks())
@pytest.mark.parametrize("form", ["messages", "parts", "conversations", "bytes"])
def test_parquet(images: Path, form: str, talk: Talk, other: Talk) -> None:
    """In parquet, every row of a column has the fields of all rows, null where it has none itself."""

    def row(each: Talk, key: str) -> dict[str, Any]:
        held = [{"bytes": IMAGES[name], "path": name} for name in each.names]
        if form == "parts":
            fields = _with_parts(each, lambda name: {"type": "image"})
        else:
            fields = {"conversations": _spoken(each)} if form == "conversations" else {"messages": _messages(each)}
        return {"id": key, **fields, "images": [image["bytes"] for image in held] if form == "bytes" else held}

    pq.write_table(pa.Table.from_pylist([row(talk, "k"), row(other, "l")]), images / "rows.parquet")
    found = pack(images / "rows.parquet")
    assert found[0] == talk.sample
    assert isinstance(found[1], Sample)
    assert (found[1].turns, found[1].images) == (other.turns, other.sample.images)


@settings(max_examples=20)
@given(talk=talks())
@pytest.mark.parametrize("form", ["LLaVA", "messages", "parts"])
def test_tars(tmp_path_factory: pytest.TempPathFactory, form: str, talk: Talk) -> None:
    folder = tmp_path_factory.mktemp("tar")
    row = JSON_FORMS[form](talk)
    files = [(f"k.{number}.{EXTENSIONS[name]}", IMAGES[name]) for number, name in enumerate(talk.names)]
    for fields in (row, {name: value for name, value in row.items() if name not in ("image", "images")}):
        write_tar(folder / "x.tar", [("k.json", json.dumps(fields).encode()), *files])
        index_tars([TarSource(folder / "x.tar", "rows")], folder / "set", overwrite=True)
        assert read_all(folder / "set") == [talk.sample]
