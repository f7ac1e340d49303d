"""Micro-batches: samples and the records that a teacher's cache has of them.

Letters: B samples, S sequences of them (B for one role, 2·B for two, the first role's before the second's).
A `mismatched` role is no part of these: it makes a batch of its own, B sequences that are read but not trained on.
"""

from __future__ import annotations

import copy
import gc
import signal
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from llavamod_offline.data.collate import Batch, collate
from llavamod_offline.data.images import ImagePreprocessor
from llavamod_offline.data.sample import Sample
from llavamod_offline.data.sampler import BatchSchedule
from llavamod_offline.data.shards import SampleSet
from llavamod_offline.data.tokenise import Positions, SequenceEncoder
from llavamod_offline.data.tokenise import Sequence as Tokens
from llavamod_offline.errors import DataError, LlavaModError
from llavamod_offline.losses.targets import SparseTargets
from train.join import MISMATCHED
from train.prefetch import Prefetch

if TYPE_CHECKING:
    from teacher_cache.end_of_turn import Exchange
    from teacher_cache.reader import TeacherCache


@dataclass(frozen=True)
class TrainBatch:
    """A micro-batch: what the student reads, and what the teacher said about it.

    `targets` hold the first positions of `batch`, in its order: all of them (mimic stages), those of the chosen
    responses (preference stage with distillation) or none. `reference_S`: the teacher's log-prob of each sequence,
    summed over its tokens. `mismatched`: the same samples' mismatched responses, where the loss wants them.
    """

    batch: Batch
    samples: int
    targets: SparseTargets | None = None
    reference_S: Tensor | None = None
    mismatched: TrainBatch | None = None

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
            mismatched=None if self.mismatched is None else self.mismatched.to(device),
        )

    def pin_memory(self) -> TrainBatch:
        """Pin every tensor, for overlapped copies to a GPU."""
        return replace(
            self,
            batch=self.batch.pin_memory(),
            targets=None if self.targets is None else self.targets.pin_memory(),
            reference_S=None if self.reference_S is None else self.reference_S.pin_memory(),
            mismatched=None if self.mismatched is None else self.mismatched.pin_memory(),
        )


class Loader:
    """Micro-batches in the order of a schedule, decoded, tokenised and joined in `workers` processes (0: here).

    `record_roles`: the roles whose records the loss wants, the first ones of `roles`.
    `exchange`: the ids by which the teacher's end of turn is read as the student's, where they differ.
    `positions`: which positions of a sequence the batches are about, as in the cache.
    `prefetch`: copies what lies behind a URL ahead of a schedule; batches that follow none are read piece by piece.

    Errors while iterating: `DataError` or `TargetError` naming the sample whose picture, length or answer does not fit.
    """

    def __init__(
        self,
        samples: SampleSet,
        rows: NDArray[np.int64],
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
        prefetch: Prefetch | None = None,
    ) -> None:
        self._prefetch = prefetch
        self._dataset = _Micro(
            samples, rows, encoder, images, tuple(roles), cache, tuple(record_roles), pad_id, exchange, positions
        )
        self._settings: dict[str, Any] = {"num_workers": workers, "pin_memory": pin_memory}
        if workers:
            self._settings |= {
                "prefetch_factor": 4,
                "multiprocessing_context": "fork",
                "worker_init_fn": _begin_worker,
            }

    def batches(self, schedule: BatchSchedule | Sequence[list[int]]) -> Generator[TrainBatch]:
        """Yield the micro-batches of a schedule, whose numbers are places in `rows`; closing it ends the workers."""
        follows = isinstance(schedule, BatchSchedule)
        dataset = self._dataset if follows else self._dataset.scattered()
        loader = DataLoader(dataset, batch_sampler=schedule, collate_fn=_as_it_is, **self._settings)  # type: ignore[arg-type]
        batches: Iterator[Any] = iter(loader)  # forks the workers, before any thread is started
        if self._prefetch is not None and isinstance(schedule, BatchSchedule):
            batches = self._prefetch.around(batches, schedule)
        try:
            for batch in batches:
                if isinstance(batch, LlavaModError):
                    raise batch
                yield batch
        finally:
            # Workers go when nobody holds their iterator any more, and an error's traceback holds all that has a name.
            del batches


class _Micro(Dataset[TrainBatch]):
    """Makes one micro-batch of several rows at once. An error is handed over as a value, to keep its one line."""

    def __init__(
        self,
        samples: SampleSet,
        rows: NDArray[np.int64],
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
        self.reads_scattered = False

    def scattered(self) -> _Micro:
        """The same, for rows that lie anywhere in the set."""
        other = copy.copy(self)
        other.reads_scattered = True
        return other

    def __getitem__(self, place: int) -> TrainBatch:
        raise NotImplementedError("micro-batches are made whole, by __getitems__")

    def __getitems__(self, places: list[int]) -> TrainBatch | LlavaModError:
        try:
            return self._make([int(self.rows[place]) for place in places])
        except LlavaModError as error:
            return error

    def _make(self, rows: list[int]) -> TrainBatch:
        samples = [self.samples.read(row, scattered=self.reads_scattered) for row in rows]
        pixels = self._pixels(samples)
        trained = [role for role in self.roles if role != MISMATCHED]
        made = self._batch(samples, pixels, trained)
        if len(trained) == len(self.roles):
            return made
        return replace(made, mismatched=self._batch(samples, pixels, [MISMATCHED]))

    def _pixels(self, samples: list[Sample]) -> list[list[NDArray[np.float32]]]:
        """The pixels of each sample's images, slices of one array, so that they need not be copied into a batch."""
        whole_ICHW = np.empty((sum(len(sample.images) for sample in samples), 3, *self.images.size), np.float32)
        slices = iter(whole_ICHW)
        return [
            [self.images.pixels(image, name=f"{s.key} image {i}", out=next(slices)) for i, image in enumerate(s.images)]
            for s in samples
        ]

    def _batch(
        self, samples: list[Sample], pixels: list[list[NDArray[np.float32]]], roles: Sequence[str]
    ) -> TrainBatch:
        sequences = [self.encoder.encode(sample, role) for role in roles for sample in samples]
        batch = collate(sequences, pixels * len(roles), pad_id=self.pad_id, positions=self.positions)
        if self.cache is None:
            return TrainBatch(batch, len(samples))
        sums = [
            self._checked(self.cache, sequence, sample)
            for sequence, sample in zip(sequences, samples * len(roles), strict=True)
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


def _begin_worker(worker: int) -> None:
    """Leave to the main process what is its own.

    Ctrl-C and SIGTERM, which may be sent to all processes at once: it ends the workers. And objects that nobody uses
    any more: those that hold a thread, as a process group does, cannot be destroyed where that thread is not.
    """
    gc.freeze()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _as_it_is(batch: TrainBatch | LlavaModError) -> TrainBatch | LlavaModError:
    return batch
