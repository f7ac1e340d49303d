"""Columns and their arrays: what is written is what is read, within the stated error, and byte for byte the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llavamod_offline.errors import CacheError
from teacher_cache.codec import COLUMN_AXES, Codec, narrowest
from teacher_cache.columns import ColumnFile, write_columns
from teacher_cache.draws import sequence_uniforms
from teacher_cache.manifest import file_entries
from teacher_cache.record import Records, RecordSettings, concatenate_records, make_records


def _records(rows: int, width: int, seed: int, temperatures: tuple[float, ...] = (2.0,)) -> Records:
    logits = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 4
    settings_ = RecordSettings(0.95, 20, 9, 50.0, temperatures)
    uniforms = torch.from_numpy(sequence_uniforms(seed, "k", "response", rows))
    return make_records(logits, torch.arange(rows) % width, uniforms, settings_)[0]


def _codec(width: int, log_probs: str = "float32", temperatures: tuple[float, ...] = (2.0,)) -> Codec:
    return Codec(width, temperatures, "float16" if log_probs == "float16" else "float32", 20, 9)


def _read_back(folder: Path) -> Records:
    file = ColumnFile(folder)
    return file.codec.decode({name: file.read(name, 0, file.length(axis)) for name, axis in COLUMN_AXES.items()})


@settings(max_examples=15, deadline=None)
@given(rows=st.integers(0, 60), width=st.sampled_from([25, 300, 70_000]), seed=st.integers(0, 999))
def test_float32_comes_back_exactly(rows: int, width: int, seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("columns") / "columns.zarr"
    records = _records(rows, width, seed)
    write_columns(folder, _codec(width).encode(records), _codec(width))
    assert ColumnFile(folder).codec == _codec(width)
    back = _read_back(folder)
    for field in dataclasses.fields(Records):
        assert np.array_equal(getattr(back, field.name), getattr(records, field.name)), field.name
        assert getattr(back, field.name).dtype == getattr(records, field.name).dtype


def test_more_than_a_chunk_is_read_by_slices(tmp_path: Path) -> None:
    records = concatenate_records([_records(1500, 90, seed) for seed in range(12)])
    write_columns(tmp_path / "c", _codec(90).encode(records), _codec(90))
    file = ColumnFile(tmp_path / "c")
    assert file.length("position") == 18000
    for start, stop in [(0, 1), (8000, 8400), (17999, 18000), (100, 100)]:
        assert np.array_equal(file.read("entropy", start, stop), records.entropy_N[start:stop])


def test_float16_keeps_its_stated_error_and_the_mass_is_one() -> None:
    records = _records(800, 500, 3)
    codec = _codec(500, "float16")
    encoded = codec.encode(records)
    assert encoded["head_log_probs"].dtype == np.float16
    raw = np.abs(encoded["head_log_probs"].astype(np.float32) - records.head_log_probs_H)
    assert np.all(raw <= 2.0**-11 * np.abs(records.head_log_probs_H) + 2.0**-25)
    back = codec.decode(encoded)
    for row, (old, new) in enumerate(zip(records.split([1] * 800), back.split([1] * 800), strict=True)):
        size = np.abs(old.head_log_probs_H)
        mean = np.sum(np.exp(-size) * size) / np.sum(np.exp(-size))
        bound = 2.0**-11 * (size + mean) * 1.001 + 1e-6
        assert np.all(np.abs(new.head_log_probs_H - old.head_log_probs_H) <= bound), row
        mass = np.exp(new.head_log_probs_H.astype(np.float64)).sum() + np.exp(float(new.tail_log_mass_N[0]))
        assert mass == pytest.approx(1.0, abs=1e-6)
    for name in ("target_log_probs_N", "entropy_N", "tail_log_mass_N", "log_normalisers_NS", "draw_ids_D"):
        assert np.array_equal(getattr(back, name), getattr(records, name))


def test_equal_records_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_columns(tmp_path / name, _codec(300).encode(_records(900, 300, 1)), _codec(300))
    assert file_entries(tmp_path / "a") == file_entries(tmp_path / "b")


def test_no_temperatures_need_no_array(tmp_path: Path) -> None:
    codec = _codec(40, temperatures=())
    write_columns(tmp_path / "c", codec.encode(_records(7, 40, 2, ())), codec)
    assert not (tmp_path / "c" / "log_normalisers").exists()
    assert _read_back(tmp_path / "c").log_normalisers_NS.shape == (7, 0)


@pytest.mark.parametrize(("largest", "kind"), [(0, "|u1"), (255, "|u1"), (256, "<u2"), (65535, "<u2"), (65536, "<u4")])
def test_ids_take_the_narrowest_type_that_holds_them(largest: int, kind: str) -> None:
    assert narrowest(largest) == kind


@pytest.mark.parametrize("field", ["head_ids_H", "target_ids_N", "draw_ids_D"])
@pytest.mark.parametrize("value", [40, -1, 131_072])
def test_an_id_beyond_the_vocabulary_is_refused(field: str, value: int) -> None:
    records = _records(5, 40, 0)
    ids = getattr(records, field).copy()
    ids[-1] = value
    with pytest.raises(CacheError, match=field[:-2]):
        _codec(40).encode(dataclasses.replace(records, **{field: ids}))


def test_a_foreign_codec_is_refused_by_name() -> None:
    with pytest.raises(CacheError, match="'entropic' 7, this reads 'plain' 1"):
        Codec.from_attributes({"codec": "entropic", "codec_version": 7}, where="x")
    attributes = _codec(40).attributes()
    del attributes["log_probs"]
    with pytest.raises(CacheError, match="log_probs"):
        Codec.from_attributes(attributes, where="x")
