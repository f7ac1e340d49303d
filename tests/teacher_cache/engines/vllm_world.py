"""A checkpoint in vLLM and in transformers side by side, and what it means for their records to be the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llavamod_offline.data.sample import Sample
from llavamod_offline.families import Family, open_family
from llavamod_offline.vllm.session import Session
from llavamod_offline.vllm.settings import VllmSettings
from teacher_cache.engines.hf import HfCaptureEngine
from teacher_cache.engines.protocol import CaptureEngine, Request
from teacher_cache.engines.vllm import plugin as recording
from teacher_cache.engines.vllm.engine import PooledRecords, VllmCaptureEngine
from teacher_cache.format.record import Records, RecordSettings
from teacher_cache.format.rejection import Rejection
from teacher_cache.format.sequences import SequenceRecord
from tests.vllm_cpu import SETTINGS

KEPT = RecordSettings(1.0, 12, 8, 40.0, (2.0, 4.0), (1,))
TOLERANCE = 1e-4
GAP = 1e-3
HEAD_OF_32 = 128  # hidden size of a tiny LLaVA with attention heads of dimension 32, which vLLM needs on a CPU

Captured = dict[tuple[str, str], SequenceRecord]


@dataclasses.dataclass(frozen=True)
class World:
    """An opened checkpoint, and vLLM running on it."""

    teacher: Family
    session: Session

    @property
    def vocab_size(self) -> int:
        return min(len(self.teacher.encoder.tokenizer), self.teacher.head_rows)

    def vllm(self, **settings: Any) -> VllmCaptureEngine:
        return VllmCaptureEngine(
            self.session,
            settings.pop("channel", PooledRecords()),
            self.teacher,
            settings.pop("kept", KEPT),
            vocab_size=self.vocab_size,
            seed=0,
            dtype=torch.float32,
            **settings,
        )

    def hf(self, **settings: Any) -> HfCaptureEngine:
        return HfCaptureEngine(
            self.teacher.load(torch.float32),
            self.teacher,
            settings.pop("kept", KEPT),
            vocab_size=self.vocab_size,
            seed=0,
            batch_size=8,
            **settings,
        )

    def requests(self, samples: Sequence[Sample]) -> list[Request]:
        return [
            Request(row, s, tuple(self.teacher.encode(s, role) for role in s.roles)) for row, s in enumerate(samples)
        ]

    def outcomes(self, engine: CaptureEngine, samples: Sequence[Sample]) -> list[SequenceRecord | Rejection]:
        return list(engine.capture(self.requests(samples)))

    def capture(self, engine: CaptureEngine, samples: Sequence[Sample]) -> Captured:
        outcomes = self.outcomes(engine, samples)
        assert not [outcome for outcome in outcomes if isinstance(outcome, Rejection)]
        found = {(o.key, o.role): o for o in outcomes if isinstance(o, SequenceRecord)}
        assert len(found) == len(outcomes)
        return found


def start_world(
    folder: Path, settings: VllmSettings = SETTINGS, *, models: Any = recording, template: str = "qwen", **options: Any
) -> World:
    """Open a checkpoint and start vLLM on it with the model classes of the module `models`."""
    teacher = open_family(folder, template, image_aspect="auto", max_length=512)
    session = Session(
        folder,
        settings,
        prefix=models.PREFIX,
        register=models.register,
        dtype="float32",
        device="cpu",
        max_length=512,
        **{"runner": "pooling", **options},
    )
    return World(teacher, session)


def assert_same(
    left: Mapping[tuple[str, str], SequenceRecord], right: Mapping[tuple[str, str], SequenceRecord]
) -> None:
    """Assert all numbers within `TOLERANCE`, and equal head ids wherever a log-prob is `GAP` from its neighbours."""
    assert left.keys() == right.keys()
    odd = drawn = 0
    for name, one in left.items():
        other = right[name]
        for field in ("key", "role", "target_hash", "content_hash", "n_tokens"):
            assert getattr(one, field) == getattr(other, field), (name, field)
        for number, (mine, theirs) in enumerate(zip(_rows(one.records), _rows(other.records), strict=True)):
            _assert_row(mine, theirs, where=(*name, number))
            odd += len(set(mine.tail_ids_D.tolist()) ^ set(theirs.tail_ids_D.tolist()))
            drawn += len(mine.tail_ids_D)
    # A tail sample is another id only where a point lies within rounding of an interval's edge.
    assert odd <= 0.01 * drawn + 2


def with_limits(record: SequenceRecord, other: SequenceRecord) -> SequenceRecord:
    """The record with another one's entropy and tail mass, which records of listed ids know less precisely."""
    columns = {name: getattr(other.records, name) for name in ("entropy_N", "tail_log_mass_N")}
    return dataclasses.replace(record, records=dataclasses.replace(record.records, **columns))


def assert_listed(expected: Captured, found: Captured) -> None:
    """Records of only the most likely ids equal those of full distributions, except that the tail is one bucket."""
    assert_same(expected, {name: with_limits(record, expected[name]) for name, record in found.items()})
    for name, record in found.items():
        mine, theirs = record.records, expected[name].records
        assert (mine.entropy_N <= theirs.entropy_N + TOLERANCE).all()
        # The remainder of 1 has an absolute accuracy, not a relative one, so compare masses, not log masses.
        assert np.allclose(np.exp(mine.tail_log_mass_N), np.exp(theirs.tail_log_mass_N), rtol=0, atol=1e-5)


def _rows(records: Records) -> list[Records]:
    return records.split([1] * len(records))


def _assert_row(mine: Records, theirs: Records, *, where: tuple[str, str, int]) -> None:
    for field in ("target_log_probs_N", "entropy_N", "tail_log_mass_N", "log_normalisers_NS", "topk_log_probs_H"):
        left, right = getattr(mine, field), getattr(theirs, field)
        assert left.shape == right.shape, (where, field)
        assert np.allclose(left, right, rtol=0, atol=TOLERANCE), (where, field, left, right)
    for field in ("target_ids_N", "topk_counts_N", "tail_counts_N"):
        assert np.array_equal(getattr(mine, field), getattr(theirs, field)), (where, field)
    # The id after the last kept one is unknown, so whether the last one was kept may also be a matter of rounding.
    cut = -np.inf if np.isneginf(mine.tail_log_mass_N).all() else mine.topk_log_probs_H[-1]
    steps = -np.diff(mine.topk_log_probs_H, prepend=np.inf, append=cut)
    alone = (np.abs(steps[:-1]) > GAP) & (np.abs(steps[1:]) > GAP)
    assert np.array_equal(mine.topk_ids_H[alone], theirs.topk_ids_H[alone]), where


Start = Callable[..., World]
