"""Labels for ids, and tokens as running text: characters split over tokens, special tokens, no tokenizer."""

from __future__ import annotations

import pytest

from llavamod_offline.models.checkpoint import load_tokenizer
from teacher_cache.inspection.token_labels import TokenNames
from tests.teacher_cache.conftest import World

TEXT = " The star is 中文 and 😀é.\nYes"


@pytest.fixture(scope="module")
def names(world: World) -> TokenNames:
    return TokenNames(world.teacher)


def test_running_text_is_the_text(world: World, names: TokenNames) -> None:
    ids = load_tokenizer(world.teacher)(TEXT, add_special_tokens=False)["input_ids"]
    pieces = names.pieces(ids)
    assert len(pieces) == len(ids)
    assert "".join(piece.text for piece in pieces if piece.kind != "part") == TEXT
    assert {piece.kind for piece in pieces} == {"text", "part"}
    smile = next(number for number, piece in enumerate(pieces) if piece.text == "😀")
    assert [piece.text for piece in pieces[smile + 1 : smile + 4]] == ["·"] * 3


def test_half_a_character_is_told_apart_by_its_bytes(world: World, names: TokenNames) -> None:
    ids = load_tokenizer(world.teacher)("中", add_special_tokens=False)["input_ids"]
    pieces = names.pieces(ids[:2])
    assert [piece.kind for piece in pieces] == ["name", "name"]
    assert pieces[0].text != pieces[1].text
    assert [piece.text for piece in pieces] == [names.label(number) for number in ids[:2]]
    assert names.label(ids[0]).startswith("<")


def test_special_tokens_and_what_has_no_token(world: World, names: TokenNames) -> None:
    end = load_tokenizer(world.teacher).convert_tokens_to_ids("<|endoftext|>")
    assert (names.pieces([end])[0].kind, names.pieces([end])[0].text) == ("special", "<|endoftext|>")
    assert names.label(-1) == "none"
    assert names.pieces([]) == []
    plain = TokenNames(None)
    assert [piece.text for piece in plain.pieces([5, 7])] == ["#5", "#7"]
