"""Records against a slow dense float64 reference, one position at a time."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llavamod_offline.errors import ConfigError
from teacher_cache.engines import make_records as records_module
from teacher_cache.engines.make_records import make_records
from teacher_cache.engines.tail_samples import sequence_uniforms
from teacher_cache.format.record import Records, RecordSettings, concatenate_records
from tests.nothing_asked import NothingAsked

SETTINGS = RecordSettings(
    top_p=0.9,
    top_k=12,
    tail_samples_max=10,
    tail_samples_per_mass=60.0,
    temperatures=(1.5, 2.0, 4.0),
    forced_ids=(3, 17),
)


def _logits(rows: int, width: int, seed: int, spread: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * spread


def _make(logits: torch.Tensor, chosen: RecordSettings, key: str = "k") -> Records:
    targets = torch.arange(len(logits)) % logits.shape[1]
    uniforms = torch.from_numpy(sequence_uniforms(0, key, "response", len(logits)))
    records, finite = make_records(logits, targets, uniforms, chosen)
    assert finite.all()
    return records


def _check_row(records: Records, logits: np.ndarray, target: int, chosen: RecordSettings) -> None:
    """Compare one position with the dense distribution in float64."""
    log_probs = logits.astype(np.float64) - np.logaddexp.reduce(logits.astype(np.float64))
    probs = np.exp(log_probs)
    order = np.argsort(-log_probs, kind="stable")
    head: list[int] = []
    for token in order[: chosen.top_k]:
        if head and probs[token] < chosen.min_prob:
            break
        head.append(int(token))
        if chosen.top_p < 1.0 and probs[head].sum() >= chosen.top_p:
            break
    head += [token for token in chosen.forced_ids if token not in head]
    assert records.topk_ids_H.tolist() == head
    assert np.allclose(records.topk_log_probs_H, log_probs[head], atol=1e-6, rtol=5e-7)
    tail = np.setdiff1d(np.arange(len(probs)), head)
    tail_mass = probs[tail].sum()
    if len(tail):
        assert math.isclose(records.tail_log_mass_N[0], math.log(tail_mass), abs_tol=2e-6, rel_tol=5e-7)
        wanted_tail_samples = min(chosen.tail_samples_max, max(1, math.ceil(tail_mass * chosen.tail_samples_per_mass)))
    else:
        assert records.tail_log_mass_N[0] == -np.inf
        wanted_tail_samples = 0
    assert abs(len(records.tail_ids_D) - wanted_tail_samples) <= (
        0.01 < tail_mass * chosen.tail_samples_per_mass % 1 > 0.99
    )
    assert set(records.tail_ids_D.tolist()) <= set(tail.tolist())
    assert math.isclose(records.target_log_probs_N[0], log_probs[target], abs_tol=1e-6, rel_tol=5e-7)
    assert math.isclose(records.entropy_N[0], -(probs * log_probs).sum(), abs_tol=1e-5)
    for column, temperature in enumerate(chosen.temperatures):
        wanted = np.logaddexp.reduce(log_probs / temperature)
        assert math.isclose(records.log_normalisers_NS[0, column], wanted, abs_tol=3e-6)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    width=st.integers(20, 400),
    spread=st.sampled_from([0.01, 1.0, 4.0, 30.0]),
    top_p=st.sampled_from([0.0, 0.5, 0.97, 1.0]),
    top_k=st.integers(1, 30),
    forced=st.sets(st.integers(0, 19), max_size=3),
    min_prob=st.sampled_from([0.0, 0.003, 0.2]),
)
def test_every_number_agrees_with_the_dense_distribution(
    seed: int, width: int, spread: float, top_p: float, top_k: int, forced: set[int], min_prob: float
) -> None:
    chosen = RecordSettings(top_p, top_k, 9, 50.0, (1.5, 2.0, 4.0), tuple(sorted(forced)), min_prob)
    logits = _logits(6, width, seed, spread)
    rows = _make(logits, chosen).split([1] * 6)
    for row, record in enumerate(rows):
        _check_row(record, logits[row].numpy(), row % width, chosen)


def test_chunks_change_nothing() -> None:
    logits = _logits(700, 9000, 0)  # 1 M values per chunk: seven chunks
    whole = _make(logits, SETTINGS)
    targets = torch.arange(700)
    uniforms = torch.from_numpy(sequence_uniforms(0, "k", "response", 700))
    pieces = [
        make_records(logits[i : i + 70], targets[i : i + 70], uniforms[i : i + 70], SETTINGS)[0]
        for i in range(0, 700, 70)
    ]
    _assert_equal(whole, concatenate_records(pieces))
    _assert_equal(whole, concatenate_records(whole.split([100, 0, 599, 1])))


def test_a_tiny_tail_keeps_its_mass_and_is_still_drawn_from() -> None:
    """1 − Σp would be 0 or negative here; the log mass must be computed from the tail itself."""
    logits = torch.full((1, 50), -40.0)
    logits[0, 7], logits[0, 30] = 40.0, -30.0
    record = _make(logits, dataclasses.replace(SETTINGS, forced_ids=()))
    assert record.topk_ids_H.tolist() == [7]
    beside_others = _make(torch.cat([logits, _logits(3, 50, seed=0)]), dataclasses.replace(SETTINGS, forced_ids=()))
    _assert_equal(beside_others.split([1, 3])[0], record)
    wanted = np.logaddexp.reduce([-70.0] + [-80.0] * 48)
    assert record.tail_log_mass_N[0] == pytest.approx(wanted, abs=1e-4)
    assert record.tail_ids_D.tolist() == [30]
    assert 0 < record.entropy_N[0] < 1e-25


def test_a_tail_below_the_range_of_float32_keeps_its_mass_and_is_still_drawn_from() -> None:
    logits = torch.full((1, 50), -40.0)
    logits[0, 7], logits[0, 30] = 100.0, -30.0
    record = _make(logits, dataclasses.replace(SETTINGS, forced_ids=()))
    wanted = np.logaddexp.reduce([-130.0] + [-140.0] * 48)
    assert record.tail_log_mass_N[0] == pytest.approx(wanted, abs=1e-4)
    assert record.tail_ids_D.tolist() == [30]


def test_equal_log_probs_are_ordered_by_id_and_forced_ids_come_last() -> None:
    logits = torch.zeros(1, 64)
    logits[0, [50, 9, 33, 2]] = 6.0
    record = _make(logits, dataclasses.replace(SETTINGS, top_p=0.95, top_k=4, forced_ids=(40, 20)))
    assert record.topk_ids_H.tolist() == [2, 9, 33, 50, 40, 20]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    width=st.integers(20, 1000),
    spacing=st.sampled_from([0.125, 0.5, 2.0, 100.0]),
    top_p=st.sampled_from([0.0, 0.493, 0.907, 1.0]),
    top_k=st.integers(1, 40),
    forced=st.sets(st.integers(0, 19), max_size=3),
    min_prob=st.sampled_from([0.0, 0.003, 0.2]),
)
def test_ties_are_broken_by_id_also_across_the_bound(
    seed: int, width: int, spacing: float, top_p: float, top_k: int, forced: set[int], min_prob: float
) -> None:
    """Logits with few distinct values, as in bfloat16; with the largest spacing all are equal.

    No multiple of 1 / width reaches `top_p`, so that rounding decides nothing.
    """
    chosen = RecordSettings(top_p, top_k, 9, 50.0, (2.0,), tuple(sorted(forced)), min_prob)
    logits = (_logits(6, width, seed) / spacing).round() * spacing
    rows = _make(logits, chosen).split([1] * 6)
    for row, record in enumerate(rows):
        _check_row(record, logits[row].numpy(), row % width, chosen)


def test_bfloat16_logits_of_a_large_vocabulary_keep_the_smallest_ids() -> None:
    """Of many equally likely ids that do not all fit, the smallest are kept, whatever order topk returns them in."""
    logits = (_logits(64, 40_000, 1) * 4).bfloat16().float()
    records = _make(logits, dataclasses.replace(SETTINGS, top_p=1.0, top_k=48, forced_ids=())).split([1] * 64)
    crossed = 0
    for row, record in zip(logits, records, strict=True):
        order = torch.argsort(row, descending=True, stable=True)
        assert record.topk_ids_H.tolist() == order[:48].tolist()
        crossed += int(row[order[47]] == row[order[48]])
    assert crossed > 10


def test_exhaustive_keeps_every_id_and_has_no_tail() -> None:
    logits = _logits(5, 300, 3, spread=20.0)
    records = _make(logits, RecordSettings(1.0, 300, 10, 60.0, (2.0,), (5,)))
    assert records.topk_counts_N.tolist() == [300] * 5
    assert np.all(np.isneginf(records.tail_log_mass_N))
    assert len(records.tail_ids_D) == 0
    dense = logits.log_softmax(-1).numpy()
    for row, record in enumerate(records.split([1] * 5)):
        assert np.array_equal(np.sort(record.topk_ids_H), np.arange(300))
        assert np.allclose(record.topk_log_probs_H, dense[row][record.topk_ids_H], atol=3e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_rows_that_are_not_finite_are_named_and_spoil_no_other(bad: float) -> None:
    logits = _logits(4, 100, 5)
    fine = _make(logits, SETTINGS)
    logits[2, 60] = bad
    uniforms = torch.from_numpy(sequence_uniforms(0, "k", "response", 4))
    records, finite = make_records(logits, torch.arange(4), uniforms, SETTINGS)
    assert finite.tolist() == [True, True, False, True]
    for row in (0, 1, 3):
        _assert_equal(records.split([1] * 4)[row], fine.split([1] * 4)[row])


def test_head_plus_draws_are_an_unbiased_picture_of_the_whole() -> None:
    """Over many seeds the reconstructed distribution converges to the true one as 1/√n."""
    logits = _logits(1, 200, 11, spread=1.5)
    truth = logits.double().softmax(-1)[0].numpy()
    chosen = RecordSettings(0.6, 8, 4, 20.0, ())
    errors = []
    for replicas in (500, 8000):
        uniforms = torch.from_numpy(np.stack([sequence_uniforms(i, "k", "response", 1)[0] for i in range(replicas)]))
        records, _ = make_records(
            logits.expand(replicas, -1), torch.zeros(replicas, dtype=torch.long), uniforms, chosen
        )
        mean = np.zeros(200)
        np.add.at(mean, records.topk_ids_H, np.exp(records.topk_log_probs_H.astype(np.float64)) / replicas)
        row_D = np.repeat(np.arange(replicas), records.tail_counts_N)
        share_D = 1 / records.tail_counts_N[row_D]
        mass_D = np.exp(records.tail_log_mass_N.astype(np.float64))[row_D]
        np.add.at(mean, records.tail_ids_D, share_D * mass_D / replicas)
        errors.append(np.abs(mean - truth).sum())
    assert errors[1] < errors[0] / 2.5  # √16 = 4, allowing for the noise of one trial
    assert errors[1] < 0.04


@pytest.mark.parametrize("chosen", [SETTINGS, dataclasses.replace(SETTINGS, tail_samples_max=0, temperature=2.0)])
def test_a_device_that_is_not_waited_for_gives_the_same_records(
    chosen: RecordSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ties inside the top-k, ties across its end, and a row that is not finite."""
    logits = _logits(40, 200, 3).mul(2).round().div(2)  # many are equal
    logits[:8] = _logits(8, 200, 4)
    logits[5, 7] = float("nan")
    targets, uniforms = torch.arange(40), torch.from_numpy(sequence_uniforms(0, "k", "response", 40))
    expected, finite_N = make_records(logits, targets, uniforms, chosen)
    monkeypatch.setattr(records_module, "_stalls", lambda device: True)
    monkeypatch.setitem(records_module._CHUNK_VALUES, "cpu", 8 * 200)
    found, also_finite_N = make_records(logits, targets, uniforms, chosen)
    assert np.array_equal(finite_N, also_finite_N)
    assert not finite_N[5]
    for row, (one, other) in enumerate(zip(found.split([1] * 40), expected.split([1] * 40), strict=True)):
        if row != 5:
            _assert_equal(one, other)


def test_a_device_that_would_stall_is_asked_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records_module, "_stalls", lambda device: True)
    logits, uniforms = _logits(9, 200, 3), torch.from_numpy(sequence_uniforms(0, "k", "response", 9))
    arguments: dict[str, Any] = {"logits_of": torch.Tensor.float, "vocab_size": 200}
    with NothingAsked():
        begun = records_module.RecordsInFlight(logits, torch.arange(9), uniforms, SETTINGS, **arguments)
    _assert_equal(begun.result()[0], _make(logits, SETTINGS))


def test_no_rows_give_no_records() -> None:
    records, finite = make_records(
        torch.zeros(0, 50), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.float64), SETTINGS
    )
    assert len(records) == len(finite) == 0
    assert records.log_normalisers_NS.shape == (0, 3)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"top_p": 1.5}, "top_p"),
        ({"min_prob": 1.0}, "min_prob"),
        ({"top_k": 0}, "top_k"),
        ({"tail_samples_max": -1}, "tail_samples_max"),
        ({"tail_samples_per_mass": 0.0}, "tail_samples_per_mass"),
        ({"temperatures": (2.0, 1.0)}, "temperatures"),
        ({"temperatures": (2.0, 2.0)}, "temperatures"),
        ({"forced_ids": (2, 2)}, "forced"),
    ],
)
def test_settings_out_of_range_are_named(change: dict[str, object], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        dataclasses.replace(SETTINGS, **change)  # type: ignore[arg-type]


def _assert_equal(left: Records, right: Records) -> None:
    for field in dataclasses.fields(Records):
        assert np.array_equal(getattr(left, field.name), getattr(right, field.name)), field.name


@pytest.mark.parametrize("temperature", [0.5, 2.0, 4.0])
def test_a_declared_temperature_chooses_as_one_of_the_scaled_logits_would(temperature: float) -> None:
    """Ids, samples and entropy are those of logits / T at temperature 1; log-probs and tail mass stay those at 1."""
    chosen = dataclasses.replace(SETTINGS, temperatures=(temperature,), min_prob=0.004, top_p=0.9, forced_ids=())
    logits = _logits(40, 300, 5)
    found = _make(logits, dataclasses.replace(chosen, temperature=temperature))
    scaled, plain = _make(logits / temperature, chosen), _make(logits, chosen)
    for name in ("topk_counts_N", "topk_ids_H", "tail_counts_N", "tail_ids_D"):
        assert getattr(found, name).tolist() == getattr(scaled, name).tolist(), name
    assert found.tail_ids_D.tolist() != plain.tail_ids_D.tolist()
    assert np.allclose(found.entropy_N, scaled.entropy_N, atol=1e-5)
    assert np.array_equal(found.target_log_probs_N, plain.target_log_probs_N)
    log_probs = logits.double().log_softmax(-1).numpy()
    for row, one in enumerate(found.split([1] * len(found))):
        assert np.allclose(one.topk_log_probs_H, log_probs[row, one.topk_ids_H], atol=1e-6)
        tail = np.setdiff1d(np.arange(300), one.topk_ids_H)
        assert math.isclose(one.tail_log_mass_N[0], np.logaddexp.reduce(log_probs[row, tail]), abs_tol=1e-5)


def test_a_declared_temperature_has_its_normaliser() -> None:
    with pytest.raises(ConfigError, match=r"capture\.temperature is 2: must be 1 or one of capture\.temperatures"):
        dataclasses.replace(SETTINGS, temperatures=(1.5,), temperature=2.0)
