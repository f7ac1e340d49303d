"""The join of samples and records, and the micro-batches made of both.

The join is done once, at the start: it decides which samples are trained on before anything is decoded.
Letters: B samples, S sequences of them (B for one role, 2·B for two, the first role's before the second's).
"""

from __future__ import annotations

import hashlib
import json
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from llavamod_offline.data.collate import Batch, collate
from llavamod_offline.data.images import ImagePreprocessor
from llavamod_offline.data.sample import Sample
from llavamod_offline.data.sampler import BatchSchedule
from llavamod_offline.data.shards import SampleSet
from llavamod_offline.data.tokenise import Positions, SequenceEncoder
from llavamod_offline.data.tokenise import Sequence as Tokens
from llavamod_offline.errors import DataError, LlavaModError
from llavamod_offline.losses.targets import SparseTargets

if TYPE_CHECKING:
    from teacher_cache.end_of_turn import Exchange
    from teacher_cache.reader import TeacherCache

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Join:
    """The rows of a set that a run uses, in set order: those trained on and those held out."""

    rows: tuple[int, ...]
    holdout: tuple[int, ...]
    missing: int
    too_long: tuple[tuple[str, str], ...]
    kept_hash: str


@dataclass(frozen=True)
class TrainBatch:
    """A micro-batch: what the student reads, and what the teacher said about it.

    `targets` hold the first positions of `batch`, in its order: all of them (mimic stages), those of the chosen
    responses (preference stage with distillation) or none. `reference_S`: the teacher's log-prob of each sequence,
    summed over its tokens.
    """

    batch: Batch
    samples: int
    targets: SparseTargets | None = None
    reference_S: Tensor | None = None

    @property
    def positions(self) -> int:
        """The positions that the loss is taken over."""
        return len(self.batch.target_ids_N)

    def to(self, device: torch.device) -> TrainBatch:
        """Move every tensor to `device`."""
        return replace(
            self,
            batch=self.batch.to(device, non_blocking=True),
            targets=None if self.targets is None else self.targets.to(device, non_blocking=True),
            reference_S=None if self.reference_S is None else self.reference_S.to(device, non_blocking=True),
        )

    def pin_memory(self) -> TrainBatch:
        """Pin every tensor, for overlapped copies to a GPU."""
        return replace(
            self,
            batch=self.batch.pin_memory(),
            targets=None if self.targets is None else self.targets.pin_memory(),
            reference_S=None if self.reference_S is None else self.reference_S.pin_memory(),
        )


def join(
    samples: SampleSet,
    roles: Sequence[str],
    cache: TeacherCache | None,
    *,
    missing: str,
    holdout: int,
    seed: int,
    encoder: SequenceEncoder | None = None,
) -> Join:
    """Decide which rows of a set are used: those with a record for every role, if there is a cache.

    `missing`: `error` or `drop`. `holdout` rows are chosen by a hash of (seed, key). With an `encoder`, samples of more
    tokens than its `max_length` are left out.
    Errors: `DataError` if samples are of the wrong kind, lack a record (`error`), or none is left to train on.
    """
    _check_kind(samples, roles)
    keys = samples.keys
    rows = list(range(len(keys)))
    absent: list[int] = []
    if cache is not None:
        cached = [cache.keys(role) for role in roles]
        absent = [row for row in rows if not all(keys[row] in known for known in cached)]
        _report_missing([keys[row] for row in absent], len(rows), str(cache.path), missing)
        left_out = set(absent)
        rows = [row for row in rows if row not in left_out]
    too_long = _too_long(samples, rows, roles, encoder) if encoder is not None else {}
    rows = [row for row in rows if row not in too_long]
    if len(rows) <= holdout:
        raise DataError(
            f"set '{samples.path}': {len(rows)} of {len(keys)} samples can be used and {holdout} are held out: "
            "none is left to train on"
        )
    held = set(sorted(rows, key=lambda row: _hash(f"{seed}:{keys[row]}"))[:holdout]) if holdout else set()
    train = tuple(row for row in rows if row not in held)
    return Join(
        rows=train,
        holdout=tuple(sorted(held)),
        missing=len(absent),
        too_long=tuple((keys[row], reason) for row, reason in too_long.items()),
        kept_hash=_hash("\n".join(keys[row] for row in train)),
    )


class Loader:
    """Micro-batches in the order of a schedule, decoded, tokenised and joined in `workers` processes (0: here).

    `record_roles`: the roles whose records the loss wants, the first ones of `roles`.
    `exchange`: the ids by which the teacher's end of turn is read as the student's, where they differ.
    `positions`: which positions of a sequence the batches are about, as in the cache.

    Errors while iterating: `DataError` or `TargetError` naming the sample whose picture, length or answer does not fit.
    """

    def __init__(
        self,
        samples: SampleSet,
        rows: Sequence[int],
        *,
        encoder: SequenceEncoder,
        images: ImagePreprocessor,
        roles: Sequence[str],
        cache: TeacherCache | None,
        record_roles: Sequence[str],
        pad_id: int,
        workers: int,
        pin_memory: bool,
        exchange: Exchange | None = None,
        positions: Positions = "response",
    ) -> None:
        self._dataset = _Micro(
            samples, rows, encoder, images, tuple(roles), cache, tuple(record_roles), pad_id, exchange, positions
        )
        self._settings: dict[str, Any] = {"num_workers": workers, "pin_memory": pin_memory}
        if workers:
            self._settings |= {
                "prefetch_factor": 4,
                "multiprocessing_context": "fork",
                "worker_init_fn": _leave_signals,
            }

    def batches(self, schedule: BatchSchedule | Sequence[list[int]]) -> Iterator[TrainBatch]:
        """Yield the micro-batches of a schedule, whose numbers are places in `rows`."""
        loader = DataLoader(self._dataset, batch_sampler=schedule, collate_fn=_as_it_is, **self._settings)  # type: ignore[arg-type]
        for batch in loader:
            if isinstance(batch, LlavaModError):
                raise batch
            yield batch


class _Micro(Dataset[TrainBatch]):
    """Makes one micro-batch of several rows at once. An error is handed over as a value, to keep its one line."""

    def __init__(
        self,
        samples: SampleSet,
        rows: Sequence[int],
        encoder: SequenceEncoder,
        images: ImagePreprocessor,
        roles: tuple[str, ...],
        cache: TeacherCache | None,
        record_roles: tuple[str, ...],
        pad_id: int,
        exchange: Exchange | None,
        positions: Positions,
    ) -> None:
        self.samples, self.rows, self.encoder, self.images = samples, rows, encoder, images
        self.roles, self.cache, self.record_roles, self.pad_id = roles, cache, record_roles, pad_id
        self.exchange, self.positions = exchange, positions

    def __getitem__(self, place: int) -> TrainBatch:
        raise NotImplementedError("micro-batches are made whole, by __getitems__")

    def __getitems__(self, places: list[int]) -> TrainBatch | LlavaModError:
        try:
            return self._make([self.rows[place] for place in places])
        except LlavaModError as error:
            return error

    def _make(self, rows: list[int]) -> TrainBatch:
        samples = [self.samples.read(row) for row in rows]
        pixels = [
            [self.images.pixels(image, name=f"{s.key} image {i}") for i, image in enumerate(s.images)] for s in samples
        ]
        sequences = [self.encoder.encode(sample, role) for role in self.roles for sample in samples]
        batch = collate(sequences, pixels * len(self.roles), pad_id=self.pad_id, positions=self.positions)
        if self.cache is None:
            return TrainBatch(batch, len(samples))
        sums = [
            self._checked(self.cache, sequence, sample)
            for sequence, sample in zip(sequences, samples * len(self.roles), strict=True)
        ]
        items = [(sequence.key, sequence.role) for sequence in sequences if sequence.role in self.record_roles]
        targets = self.cache.targets(items) if items else None
        if targets is not None and self.exchange is not None:
            targets = self.exchange.targets(targets)
        return TrainBatch(batch, len(samples), targets, torch.tensor(sums, dtype=torch.float32))

    def _checked(self, cache: TeacherCache, sequence: Tokens, sample: Sample) -> float:
        """Refuse a record that was made for other tokens or another sample; gives its summed log-prob."""
        from teacher_cache.fingerprint import check_sequence
        from teacher_cache.sequences import short_hash

        check_sequence(cache, sequence, self.exchange)
        record = cache.sequence(sequence.key, sequence.role)
        if record.content_hash != short_hash(sample.content_hash):
            raise DataError(
                f"sample '{sequence.key}' ({sequence.role}): its text or pictures are not those the teacher saw: "
                "capture again, or set data.set to the set of the cache"
            )
        return record.sum_log_prob


def _check_kind(samples: SampleSet, roles: Sequence[str]) -> None:
    wanted, other = "conversation", "preference"
    if tuple(roles) != ("response",):
        wanted, other = other, wanted
    wrong = pc.index(samples.index.column("kind"), other).as_py()
    if wrong >= 0:
        raise DataError(
            f"set '{samples.path}': sample '{samples.keys[wrong]}' is a {other}, the stage needs {wanted}s: "
            "set data.set to a set of those"
        )


def _report_missing(absent: list[str], total: int, cache: str, policy: str) -> None:
    if not absent:
        return
    first = ", ".join(absent[:3]) + (", …" if len(absent) > 3 else "")
    said = f"{len(absent)} of {total} samples have no record in cache '{cache}' ({first})"
    if policy == "error":
        raise DataError(f"{said}: capture them, or set cache.missing=drop to train without them")
    logger.warning("%s: dropped", said)


def _too_long(
    samples: SampleSet, rows: Sequence[int], roles: Sequence[str], encoder: SequenceEncoder
) -> dict[int, str]:
    """Find the samples of more than `max_length` tokens. No text has more tokens than bytes, so few are tokenised."""
    template = encoder.template
    around = (*template.system, *template.user_prefix, *template.assistant_prefix)
    wording = sum(len(segment.text.encode()) for segment in around)
    wording += sum(len(text.encode()) for text in (template.answer_prefix, template.end, template.separator))
    texts = pc.struct_field(pc.list_element(samples.index.column("members"), 0), "size").to_numpy()
    turns = samples.index.column("n_turns").to_numpy() + 1
    images = samples.index.column("n_images").to_numpy()
    bounds = texts + turns * wording + images * encoder.image_tokens
    candidates = [row for row in rows if bounds[row] > encoder.max_length]
    found: dict[int, str] = {}
    for row in tqdm(candidates, desc="lengths", unit="sample", disable=not sys.stderr.isatty()):
        sample = samples.read(row)
        for role in roles:
            try:
                encoder.encode(sample, role)
            except DataError as error:
                found[row] = str(error)
    if found:
        logger.warning(
            "%d of %d samples are longer than max_length %d: dropped", len(found), len(rows), encoder.max_length
        )
    return found


def rejection_lines(too_long: Sequence[tuple[str, str]]) -> str:
    """The lines of `rejected.jsonl`."""
    return "".join(json.dumps({"key": key, "reason": reason}) + "\n" for key, reason in too_long)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _leave_signals(worker: int) -> None:
    """Leave Ctrl-C and SIGTERM, which may be sent to all processes at once, to the main one, which ends the workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _as_it_is(batch: TrainBatch | LlavaModError) -> TrainBatch | LlavaModError:
    return batch
