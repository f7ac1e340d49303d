"""Capturing some rows of a set: samples → requests → an engine → records and rejections, in the order of the set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from llavamod_offline.data.sample import Sample
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import DataError
from teacher_cache.capture_setup import CaptureSetup
from teacher_cache.engines.protocol import CaptureEngine, Request
from teacher_cache.format.rejection import Rejection
from teacher_cache.format.sequences import SequenceRecord
from teacher_cache.images.pool import THREADS
from teacher_cache.visual.second_pass import blank_requests, drop_images, targets_alone, with_advantages

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PreparedRows:
    """Rows that are ready for an engine: their requests, what could not be tokenized, and the order of all roles.

    `rows`: by key. The requests hold encoded images, each read once; only a few batches are decoded at a time. `bare`:
    for visual advantages, the requests with images again, without what these show; None if none are captured.
    """

    requests: list[Request]
    rejected: list[Rejection]
    order: dict[tuple[str, str], int]
    rows: dict[str, int]
    bare: list[Request] | None = None


def capture_rows(
    setup: CaptureSetup,
    engine: CaptureEngine,
    rows: Iterable[int],
    progress: Progress = lambda samples, positions: None,
) -> tuple[list[SequenceRecord], list[Rejection]]:
    """Capture some rows of the set, such as a shard's; both lists are in the order of rows and roles."""
    return capture_prepared(setup, engine, prepare_rows(setup, rows), progress)


def prepare_rows(setup: CaptureSetup, rows: Iterable[int]) -> PreparedRows:
    """Read and tokenize some rows. Errors: `DataError` if they differ from what was packed."""
    return prepare_samples(setup, ((row, setup.samples.read(row, verify=True)) for row in rows))


def prepare_samples(setup: CaptureSetup, samples: Iterable[tuple[int, Sample]]) -> PreparedRows:
    """Tokenize samples, given with their rows in the set."""
    requests: list[Request] = []
    rejected: list[Rejection] = []
    order: dict[tuple[str, str], int] = {}
    rows: dict[str, int] = {}
    for row, sample in samples:
        rows[sample.key] = row
        sequences = []
        for role in sample.roles:
            order[sample.key, role] = len(order)
            try:
                sequences.append(setup.encode(sample, role))
            except DataError as error:
                rejected.append(Rejection(sample.key, role, str(error)))
        if sequences:
            requests.append(Request(row, sample, tuple(sequences)))
    prepared = PreparedRows(requests, rejected, order, rows)
    if setup.without_image == "blank":
        return replace(prepared, bare=blank_requests(requests, THREADS))
    return prepared if setup.without_image is None else _without_images(setup, prepared)


def _without_images(setup: CaptureSetup, prepared: PreparedRows) -> PreparedRows:
    """Add the requests without images; a sequence that cannot be run without them is rejected altogether."""
    bare, rejected = [], list(prepared.rejected)
    for request in prepared.requests:
        if request.sample.images:
            other, refused = drop_images(request, setup.encode)
            bare.append(other)
            rejected += refused
    refused_items = {(item.key, item.role) for item in rejected}
    kept = [
        replace(request, sequences=tuple(s for s in request.sequences if (s.key, s.role) not in refused_items))
        for request in prepared.requests
    ]
    return replace(
        prepared,
        requests=[request for request in kept if request.sequences],
        rejected=rejected,
        bare=[request for request in bare if request.sequences],
    )


def capture_prepared(
    setup: CaptureSetup, engine: CaptureEngine, prepared: PreparedRows, progress: Progress
) -> tuple[list[SequenceRecord], list[Rejection]]:
    """Run the engine over prepared rows; reports finished samples and positions to `progress`."""
    captured: list[SequenceRecord] = []
    rejected = list(prepared.rejected)
    progress(len(prepared.rows) - len(prepared.requests), 0)
    left = Counter({request.sample.key: len(request.sequences) for request in prepared.requests})
    left.update({request.sample.key: len(request.sequences) for request in prepared.bare or ()})
    for outcome in engine.capture(prepared.requests):
        left[outcome.key] -= 1
        if isinstance(outcome, Rejection):
            rejected.append(outcome)
            progress(left[outcome.key] == 0, 0)
        else:
            captured.append(outcome)
            progress(left[outcome.key] == 0, len(outcome.records))
    if prepared.bare is not None:
        bare = []
        for outcome in targets_alone(engine).capture(prepared.bare) if prepared.bare else ():
            left[outcome.key] -= 1
            progress(left[outcome.key] == 0, 0)
            bare.append(outcome)
        seen = {request.sample.key for request in prepared.requests if request.sample.images}
        captured, refused = with_advantages(captured, bare, seen)
        rejected += refused
    order = prepared.order
    captured.sort(key=lambda item: order[item.key, item.role])
    rejected.sort(key=lambda item: order[item.key, item.role])
    return captured, [located(item, setup.samples, prepared.rows[item.key]) for item in rejected]


def located(item: Rejection, samples: SampleSet, row: int) -> Rejection:
    """A rejection with the file and row that its sample, a row of the set, was packed from."""
    file, place = samples.origin_of(row) or (None, None)
    return replace(item, file=file, row=place)
