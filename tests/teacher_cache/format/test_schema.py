"""Records ↔ columns on disk: what is read is what was written, within the stated error, and bytes are reproducible."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llavamod_offline.data.encode.tokenize import NO_TARGET
from llavamod_offline.errors import CacheError
from teacher_cache.engines.make_records import make_records
from teacher_cache.engines.tail_samples import sequence_uniforms
from teacher_cache.format import columns as columns_module
from teacher_cache.format.columns import ColumnFile, write_columns
from teacher_cache.format.manifest import file_entries
from teacher_cache.format.quantise import log_prob_bound
from teacher_cache.format.record import Records, RecordSettings, concatenate_records
from teacher_cache.format.schema import Codec, PrecisionName, narrowest

EXACT_FIELDS = ("target_ids_N", "topk_counts_N", "topk_ids_H", "tail_counts_N")


def _records(
    rows: int, width: int, seed: int, temperatures: tuple[float, ...] = (2.0,), forced: tuple[int, ...] = ()
) -> Records:
    logits = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 4
    settings_ = RecordSettings(0.95, 20, 9, 50.0, temperatures, forced)
    uniforms = torch.from_numpy(sequence_uniforms(seed, "k", "response", rows))
    return make_records(logits, torch.arange(rows) % width, uniforms, settings_)[0]


def _codec(
    width: int,
    precision: PrecisionName = "exact",
    temperatures: tuple[float, ...] = (2.0,),
    forced: tuple[int, ...] = (),
) -> Codec:
    return Codec(width, temperatures, precision, 20 + len(forced), 9, forced)


def _there_and_back(folder: Path, records: Records, codec: Codec) -> Records:
    write_columns(folder, records, codec)
    file = ColumnFile(folder)
    assert file.codec == codec
    assert file.positions == len(records)
    return concatenate_records(file.records(0, file.blocks), len(codec.temperatures))


def _sorted_tail_ids(records: Records) -> list[list[int]]:
    return [sorted(piece.tail_ids_D.tolist()) for piece in records.split([1] * len(records))]


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 60),
    width=st.sampled_from([25, 300, 70_000]),
    forced=st.sampled_from([(), (3, 1, 20)]),
    seed=st.integers(0, 999),
    block=st.sampled_from([7, 32768]),
)
def test_exact_comes_back_exactly(
    rows: int, width: int, forced: tuple[int, ...], seed: int, block: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    records = _records(rows, width, seed, forced=forced)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns_module, "BLOCK_POSITIONS", block)
        back = _there_and_back(tmp_path_factory.mktemp("c") / "columns.zarr", records, _codec(width, forced=forced))
    for field in dataclasses.fields(Records):
        if field.name != "tail_ids_D":
            assert np.array_equal(getattr(back, field.name), getattr(records, field.name)), field.name
            assert getattr(back, field.name).dtype == getattr(records, field.name).dtype
    assert _sorted_tail_ids(back) == _sorted_tail_ids(records)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 60),
    width=st.sampled_from([25, 300, 70_000]),
    precision=st.sampled_from(["coarse", "fine"]),
    forced=st.sampled_from([(), (3, 1, 20)]),
    temperatures=st.sampled_from([(), (2.0,), (1.5, 2.0, 4.0), (0.5, 3.0)]),
    seed=st.integers(0, 999),
)
def test_rounded_numbers_keep_their_bounds_and_the_mass_is_one(
    rows: int,
    width: int,
    precision: PrecisionName,
    forced: tuple[int, ...],
    temperatures: tuple[float, ...],
    seed: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    records = _records(rows, width, seed, temperatures, forced)
    codec = _codec(width, precision, temperatures, forced)
    back = _there_and_back(tmp_path_factory.mktemp("c") / "columns.zarr", records, codec)
    numbers = codec.numbers
    assert numbers is not None
    for name in EXACT_FIELDS:
        assert np.array_equal(getattr(back, name), getattr(records, name)), name
    assert _sorted_tail_ids(back) == _sorted_tail_ids(records)
    assert np.all(np.abs(back.entropy_N - records.entropy_N) <= 0.5 / numbers.entropy_steps + 1e-6)
    share_step = np.pi / numbers.share_levels / 4
    tails = [np.exp(each.tail_log_mass_N.astype(np.float64)) for each in (records, back)]
    angles = [np.arcsin(np.sqrt(tail)) for tail in tails]
    assert np.all(np.abs(angles[0] - angles[1]) <= 3 * share_step + 1e-6)
    assert np.array_equal(np.isneginf(records.tail_log_mass_N), np.isneginf(back.tail_log_mass_N))
    # A head is shifted as a whole, by no more than the errors of head and tail allow; its codes keep their distances.
    for old, new in zip(records.split([1] * rows), back.split([1] * rows), strict=True):
        bounds = log_prob_bound(old.topk_log_probs_H, numbers)
        shift = new.topk_log_probs_H - old.topk_log_probs_H
        mass = np.exp(new.topk_log_probs_H.astype(np.float64)).sum() + np.exp(float(new.tail_log_mass_N[0]))
        assert mass == pytest.approx(1.0, abs=1e-5)
        assert shift.max() - shift.min() <= 2 * bounds.max() + 1e-4
        for column, temperature in enumerate(temperatures):
            head = np.exp(new.topk_log_probs_H.astype(np.float64) / temperature).sum()
            share = 1 - head / np.exp(float(new.log_normalisers_NS[0, column]))
            dense = 1 - np.exp(old.topk_log_probs_H.astype(np.float64) / temperature).sum() / np.exp(
                float(old.log_normalisers_NS[0, column])
            )
            angles_T = [np.arcsin(np.sqrt(np.clip(value, 0, 1))) for value in (share, dense)]
            assert abs(angles_T[0] - angles_T[1]) <= 3 * share_step + 2e-3


def test_a_position_without_a_target_has_none(tmp_path: Path) -> None:
    records = _records(9, 40, 1)
    records.target_ids_N[4], records.target_log_probs_N[4] = NO_TARGET, 0.0
    back = _there_and_back(tmp_path / "c", records, _codec(40, "fine"))
    assert np.array_equal(back.target_ids_N, records.target_ids_N)
    assert back.target_log_probs_N[4] == 0.0


def test_some_blocks_and_some_temperatures_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns_module, "BLOCK_POSITIONS", 100)
    records = _records(950, 90, 3, (1.5, 2.0))
    write_columns(tmp_path / "c", records, _codec(90, temperatures=(1.5, 2.0)))
    file = ColumnFile(tmp_path / "c")
    assert file.blocks == 10
    part = concatenate_records(file.records(7, 10, (2.0,)))
    assert np.array_equal(part.entropy_N, records.entropy_N[700:])
    assert np.array_equal(part.log_normalisers_NS, records.log_normalisers_NS[700:, 1:])


def test_equal_records_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_columns(tmp_path / name, _records(900, 300, 1), _codec(300, "fine"))
    assert file_entries(tmp_path / "a") == file_entries(tmp_path / "b")


def test_no_temperatures_and_no_forced_ids_need_no_arrays(tmp_path: Path) -> None:
    codec = _codec(40, temperatures=())
    assert _there_and_back(tmp_path / "c", _records(7, 40, 2, ()), codec).log_normalisers_NS.shape == (7, 0)
    assert not (tmp_path / "c" / "log_normalisers").exists()


def test_the_profile_is_the_mean_of_the_draws(tmp_path: Path) -> None:
    records = _records(800, 60, 5)
    write_columns(tmp_path / "c", records, _codec(60))
    file = ColumnFile(tmp_path / "c")
    wanted = np.zeros(60)
    row = np.repeat(np.arange(800), records.tail_counts_N)
    np.add.at(wanted, records.tail_ids_D, (np.exp(records.tail_log_mass_N) / records.tail_counts_N)[row] / 800)
    frequent = file.frequent_ids_F
    assert len(frequent) == 50
    profile = file.tail_profile()
    assert np.allclose(profile[frequent], wanted[frequent], rtol=1e-5)
    others = np.setdiff1d(np.arange(60), frequent)
    assert np.allclose(profile[others], wanted[others].sum() / 10, rtol=1e-4)
    assert profile.sum() == pytest.approx(np.exp(records.tail_log_mass_N).mean(), rel=1e-5)


@pytest.mark.parametrize(("largest", "kind"), [(0, "|u1"), (255, "|u1"), (256, "<u2"), (65535, "<u2"), (65536, "<u4")])
def test_counts_take_the_narrowest_type_that_holds_them(largest: int, kind: str) -> None:
    assert narrowest(largest) == kind


@pytest.mark.parametrize("field", ["topk_ids_H", "target_ids_N", "tail_ids_D"])
@pytest.mark.parametrize("value", [40, -2, 131_072])
def test_an_id_beyond_the_vocabulary_is_refused(field: str, value: int, tmp_path: Path) -> None:
    records = _records(5, 40, 0)
    ids = getattr(records, field).copy()
    ids[-1] = value
    with pytest.raises(CacheError, match=field[:-2]):
        write_columns(tmp_path / "c", dataclasses.replace(records, **{field: ids}), _codec(40))


def test_a_head_without_a_forced_id_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match="forced"):
        write_columns(tmp_path / "c", _records(5, 300, 0), _codec(300, "fine", forced=(299,)))


def test_a_foreign_codec_is_refused_by_name() -> None:
    with pytest.raises(CacheError, match="'entropic' 7, not 'ranked' 1"):
        Codec.from_attributes({"codec": "entropic", "codec_version": 7}, where="x")
    attributes = _codec(40).attributes()
    del attributes["precision"]
    with pytest.raises(CacheError, match="precision"):
        Codec.from_attributes(attributes, where="x")
