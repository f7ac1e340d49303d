"""Repeated keys are noticed at once, however many keys there are, in little memory."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavamod_offline.data.pack import key_register
from llavamod_offline.data.pack.key_register import KeyRegister
from llavamod_offline.errors import DataError


@given(keys=st.lists(st.integers(0, 60), max_size=80), fresh=st.integers(1, 9))
def test_as_a_dictionary_would(keys: list[int], fresh: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(key_register, "_FRESH", fresh)
        register, seen = KeyRegister("rename it"), dict[int, int]()
        for row, key in enumerate(keys):
            if key not in seen:
                register.claim(f"k{key}", f"{row % 3}.json", row)
                seen[key] = row
                continue
            first = seen[key]
            refusal = f"duplicate key 'k{key}': {first % 3}.json row {first} and x.json row {row}: rename it"
            with pytest.raises(DataError) as caught:
                register.claim(f"k{key}", "x.json", row)
            assert str(caught.value) == refusal


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Far less than a dictionary of the keys would take, 250 bytes each."""
    monkeypatch.setattr(key_register, "_FRESH", 1000)
    register = KeyRegister("")
    tracemalloc.start()
    for row in range(50_000):
        register.claim(f"sample-{row:09d}", "rows.parquet", row)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 50_000 * 40 + 2**17
