"""Capturing some rows of a set: samples → requests → an engine → records and rejections, in the order of the set."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from llavamod_offline.errors import DataError
from teacher_cache.engines.protocol import Engine, Request
from teacher_cache.job import Job
from teacher_cache.sequences import SequenceRecord
from teacher_cache.store import Rejection


def capture_rows(
    job: Job,
    engine: Engine,
    rows: Iterable[int],
    progress: Callable[[int, int], None] = lambda samples, positions: None,
) -> tuple[list[SequenceRecord], list[Rejection]]:
    """Capture some rows of the set, such as a shard's; both lists are in their order, roles in that of the sample."""
    requests: list[Request] = []
    captured: list[SequenceRecord] = []
    rejected: list[Rejection] = []
    order: dict[tuple[str, str], int] = {}
    for row in rows:
        sample = job.samples.read(row, verify=True)
        sequences = []
        for role in sample.roles:
            order[sample.key, role] = len(order)
            try:
                sequences.append(job.encode(sample, role))
            except DataError as error:
                rejected.append(Rejection(sample.key, role, str(error)))
        if sequences:
            requests.append(Request(row, sample.key, sample.content_hash, tuple(sequences)))
        else:
            progress(1, 0)
    left = {request.key: len(request.sequences) for request in requests}
    for outcome in engine.capture(requests, job.samples.read):
        left[outcome.key] -= 1
        if isinstance(outcome, Rejection):
            rejected.append(outcome)
            progress(left[outcome.key] == 0, 0)
        else:
            captured.append(outcome)
            progress(left[outcome.key] == 0, len(outcome.records))
    captured.sort(key=lambda item: order[item.key, item.role])
    rejected.sort(key=lambda item: order[item.key, item.role])
    return captured, rejected
