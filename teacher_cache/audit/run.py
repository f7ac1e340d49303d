"""`cache-teacher audit`: run the teacher again over random sequences and compare with the cache.

Each comparison comes with a control, the same teacher in batches of another shape, and with the largest error of the
cache's encoding (`error_bounds.py`). Limits apply to what exceeds that error.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llavamod_offline.models.device import pick_device
from llavamod_offline.progress import ProgressBar
from teacher_cache.audit.preconditions import captured_as, check_contents, check_engine, check_settings, draw_rows
from teacher_cache.audit.record_diff import FIGURES, Differences, RecordDifference, beyond, compare, join, measure
from teacher_cache.capture.shard import capture_rows
from teacher_cache.capture_setup import CaptureSetup, follow_template, prepare_capture
from teacher_cache.config import CacheTeacherConfig
from teacher_cache.engines.protocol import CaptureEngine
from teacher_cache.format.record import Records, RecordSettings
from teacher_cache.read.reader import TeacherCache


@dataclass(frozen=True)
class Limits:
    """What passes: the largest and the mean difference beyond the encoding's error, and the smallest share of positions
    with equal most likely ids. Log-probs and entropy in nats, tail mass as a probability."""

    largest: float
    mean: float
    agreement: float


# float32: sums are taken in another order. float16 and bfloat16: every layer rounds, which reaches the logits.
LIMITS = {
    "float32": Limits(1e-3, 1e-4, 0.995),
    "float16": Limits(0.25, 0.02, 0.98),
    "bfloat16": Limits(1.5, 0.1, 0.9),
}


@dataclass(frozen=True)
class FigureAudit:
    """One figure of one role: the cache against the teacher, the teacher against itself, the encoding's largest error,
    and by how much the first exceeds it."""

    role: str
    figure: str
    cache: RecordDifference
    control: RecordDifference
    allowed: RecordDifference
    beyond: RecordDifference


@dataclass(frozen=True)
class AgreementAudit:
    """The share of a role's positions with equal most likely ids."""

    role: str
    sequences: int
    positions: int
    cache: float
    control: float


@dataclass(frozen=True)
class Audit:
    """What an audit found; `failures` lists what exceeds the limits, `notes` explains the result."""

    ok: bool
    cache: str
    engine: dict[str, Any]
    captured_with: dict[str, Any]
    precision: str
    limits: Limits
    figures: list[FigureAudit]
    agreement: list[AgreementAudit]
    failures: list[str]
    notes: list[str]


def audit_cache(
    cache: TeacherCache,
    config: CacheTeacherConfig,
    *,
    sequences: int = 64,
    seed: int = 0,
    largest: float | None = None,
    mean: float | None = None,
    agreement: float | None = None,
    allow: Sequence[str] = (),
) -> Audit:
    """Compare about `sequences` random sequences, evenly over the shards, with the teacher that `config` names.

    A limit of None takes its default for the data types. Errors: `CacheError` if set, teacher, tokenizer, template or
    a sequence's content differ from the cache's (fields, or sections, named in `allow` may differ); `TargetError` if
    its supervised ids do; others as for a run.
    """
    pick_device(config.device)
    check_engine(cache, config.engine.kind)
    values = dataclasses.replace(config, capture=captured_as(cache)).setup_values
    job = prepare_capture(**follow_template(values, cache.fingerprint))
    job = dataclasses.replace(job, settings=RecordSettings.from_stored(cache.fingerprint["capture"]))
    notes = check_settings(cache, job, allow)
    rows = draw_rows(cache, job, sequences, seed)
    check_contents(cache, job, rows)
    if job.batch_size == 1:
        notes.append("batch_size is 1, so the control used the same shapes: raise it for a real control")
    given = {"largest": largest, "mean": mean, "agreement": agreement}
    limits = dataclasses.replace(
        LIMITS[_coarser(cache.fingerprint["engine"], job.fingerprint["engine"])],
        **{name: value for name, value in given.items() if value is not None},
    )
    found, counts, failures = _compared(cache, job, job.load(), rows)
    figures, agreements = _summary(found, counts)
    bounded = any(side["engine"].get("limits") for side in (cache.fingerprint, job.fingerprint))
    if bounded:
        notes.append("entropy is not checked: one of the engines gives only a lower bound")
    unjudged = ("entropy",) if bounded else ()
    failures += _failures(figures, agreements, limits, unjudged)
    return Audit(
        ok=not failures,
        cache=cache.path,
        engine=job.fingerprint["engine"],
        captured_with=cache.fingerprint["engine"],
        precision=str(cache.fingerprint["capture"]["precision"]),
        limits=limits,
        figures=figures,
        agreement=agreements,
        failures=failures,
        notes=notes,
    )


def _compared(
    cache: TeacherCache, job: CaptureSetup, engine: CaptureEngine, rows: Sequence[int]
) -> tuple[dict[str, list[tuple[Differences, Differences]]], dict[str, int], list[str]]:
    """By role: cache against teacher, and teacher against itself; the numbers of sequences; the failures."""
    found: dict[str, list[tuple[Differences, Differences]]] = {}
    counts: dict[str, int] = {}
    failures: list[str] = []
    with ProgressBar("audit", len(rows), "sample") as bar:
        for start in range(0, len(rows), job.batch_size):
            batch = rows[start : start + job.batch_size]
            together, rejected = capture_rows(job, engine, batch)
            alone: dict[tuple[str, str], Records] = {}
            for row in batch:
                captured, more = capture_rows(job, engine, [row])
                alone |= {(item.key, item.role): item.records for item in captured}
                rejected += more
                bar.advance()
            lost = {(item.key, item.role): item.reason for item in rejected if (item.key, item.role) in cache}
            failures += [f"{key} ({role}): rejected by the teacher: {reason}" for (key, role), reason in lost.items()]
            for item in together:
                place = (item.key, item.role)
                if place not in cache or place in lost:
                    continue
                counts[item.role] = counts.get(item.role, 0) + 1
                pair = (
                    compare(item.records, cache.records([place]), job.codec.numbers),
                    compare(item.records, alone[place], None),
                )
                found.setdefault(item.role, []).append(pair)
    return found, counts, failures


def _summary(
    found: dict[str, list[tuple[Differences, Differences]]], counts: dict[str, int]
) -> tuple[list[FigureAudit], list[AgreementAudit]]:
    figures, agreements = [], []
    for role, pairs in found.items():
        cached, control = (join(parts) for parts in zip(*pairs, strict=True))
        for name in FIGURES:
            values, bounds = cached.values[name], cached.bounds[name]
            parts = (values, control.values[name], bounds, beyond(values, bounds))
            figures.append(FigureAudit(role, name, *map(measure, parts)))
        positions = len(cached.same_first_N)
        shares = [float(each.same_first_N.mean()) if positions else 1.0 for each in (cached, control)]
        agreements.append(AgreementAudit(role, counts[role], positions, *shares))
    return figures, agreements


def _failures(
    figures: Sequence[FigureAudit], agreements: Sequence[AgreementAudit], limits: Limits, unjudged: Sequence[str]
) -> list[str]:
    failures = []
    for each in figures:
        if each.figure in unjudged:
            continue
        for name, value, limit in (
            ("largest difference", each.beyond.max, limits.largest),
            ("mean difference", each.beyond.mean, limits.mean),
        ):
            if not value <= limit:  # NaN does not pass
                what = f"{each.role}, {each.figure}: {name} beyond the encoding"
                failures.append(f"{what} {value:.3g}, more than {limit:g}")
    for agreed in agreements:
        if agreed.cache < limits.agreement:
            share = f"{agreed.cache:.2%}, less than {limits.agreement:.2%}"
            failures.append(f"{agreed.role}: equal most likely ids at {share}")
    return failures


def _coarser(*engines: dict[str, Any]) -> str:
    """The coarsest data type; merged caches may have several, and a server's unknown one counts as the coarsest."""
    found = [engine["dtype"] for engine in engines]
    kinds: list[str] = [kind for each in found for kind in (each if isinstance(each, list) else [each])]
    order = list(LIMITS)
    return max((kind if kind in order else order[-1] for kind in kinds), key=order.index)
