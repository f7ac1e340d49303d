"""Keys from ids: valid, readable, one to one."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavamod_offline.data.keys import key_from_id, row_key, stored_key


def decode(key: str) -> str:
    """Undo the escapes, from left to right."""
    content = b"".join(
        bytes([int(piece[2:], 16)]) if re.fullmatch("_x[0-9A-F]{2}", piece) else piece.encode()
        for piece in re.findall("_x[0-9A-F]{2}|.", key)
    )
    return content.decode("utf-8", "surrogatepass")


@settings(deadline=None)
@given(st.one_of(st.text(), st.text(alphabet="_x5Fa/", max_size=8), st.text(alphabet=st.characters(categories=["Cs"]))))
def test_every_id_can_be_read_back(identity: str) -> None:
    key = key_from_id(identity)
    assert re.fullmatch(r"[A-Za-z0-9_\-]*", key)
    assert decode(key) == identity


@pytest.mark.parametrize(
    ("identity", "key"),
    [
        ("000000033471", "000000033471"),
        (17, "17"),
        (-3, "-3"),
        ("wgByO4Y_0", "wgByO4Y_0"),
        ("coco/a.jpg", "coco_x2Fa_x2Ejpg"),
        ("a_x", "a_x5Fx"),
        ("a_x2F", "a_x5Fx2F"),
        ("ü", "_xC3_xBC"),
    ],
)
def test_examples(identity: str | int, key: str) -> None:
    assert key_from_id(identity) == key


def test_a_key_may_be_given_as_it_is_stored_or_as_the_id() -> None:
    stored = {"coco_x2Fa_x2Ejpg", "plain", "a_x5Fx", "a_x"}
    for asked, found in (
        ("coco/a.jpg", "coco_x2Fa_x2Ejpg"),
        ("coco_x2Fa_x2Ejpg", "coco_x2Fa_x2Ejpg"),
        ("plain", "plain"),
        ("a_x", "a_x"),  # a stored key takes precedence over an id
        ("no/where", "no/where"),
    ):
        assert stored_key(asked, stored.__contains__) == found


def test_row_keys() -> None:
    assert row_key("chat", 0) == "chat-000000000"
    assert row_key("v1.5 mix", 665_297) == "v1_x2E5_x20mix-000665297"
