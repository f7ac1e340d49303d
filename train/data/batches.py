"""Micro-batches: samples with their records in a teacher's cache.

Shape suffixes: B samples, S their sequences (B for one role, 2·B for two, the first role's before the second's; an
unpaired answer has only one of them). A `mismatched` role is excluded: it has a batch of its own, B sequences that are
evaluated but not trained on.
"""

from __future__ import annotations

import gc
import signal
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from llavamod_offline.data.encode.collate import Batch
from llavamod_offline.data.encode.tokenize import NO_TARGET, Positions, TokenizedSequence
from llavamod_offline.data.order.schedule import BatchSchedule
from llavamod_offline.data.sample import Sample
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import DataError, LlavaModError
from llavamod_offline.families.students.protocol import StudentFamily
from llavamod_offline.losses.other_tokenizer.targets import AlignedTargets
from llavamod_offline.losses.targets import SparseTargets
from train.data.behaviour import behaviour_log_probs
from train.data.join import MISMATCHED
from train.data.prefetch import Prefetch
from train.data.teacher_states import TeacherStates, WantedStates, read_states

if TYPE_CHECKING:
    from teacher_cache.format.sequences import CachedSequence
    from teacher_cache.other_tokenizer.bridge import TokenizerBridge
    from teacher_cache.read.reader import TeacherCache
    from teacher_cache.read.several import Teachers
    from teacher_cache.student.end_of_turn import TokenIdSwap


ChosenPositions = Literal["response", "written"]


@dataclass(frozen=True)
class TrainBatch:
    """A micro-batch: the student's inputs and the teacher's cached outputs.

    `targets` cover the first positions of `batch`, in its order: all of them (mimic stages), those of the chosen
    responses (preference stage with distillation) or none. If the teacher has another tokenizer, `aligned` holds them
    instead. `reference_S`: the teacher's log-prob of each sequence, summed over its tokens. `sample_of_S`: each
    sequence's sample, from 0. If the loss needs them, `mismatched` holds the samples' mismatched responses and `states`
    the teacher's hidden states. `behaviour_N`: the log-probs of the student that wrote the answers, for each position
    of `batch`; NaN where it wrote nothing, or where a loss on own answers leaves the token out. `weights_N`: the weight
    of each position in the loss, by what the image is worth to its token; None: all 1.
    """

    batch: Batch
    samples: int
    targets: SparseTargets | None = None
    reference_S: Tensor | None = None
    sample_of_S: Tensor | None = None
    mismatched: TrainBatch | None = None
    states: TeacherStates | None = None
    behaviour_N: Tensor | None = None
    aligned: AlignedTargets | None = None
    weights_N: Tensor | None = None

    def rows(self, which: ChosenPositions) -> Tensor:
        """Return the rows [M] of `batch` that predict answers, or only those of answers that a student wrote."""
        if which == "response":
            return (self.batch.target_ids_N != NO_TARGET).nonzero()[:, 0]
        assert self.behaviour_N is not None
        return self.behaviour_N.isnan().logical_not().nonzero()[:, 0]

    @property
    def positions(self) -> int:
        """The number of positions; a loss may cover only some `rows` of them."""
        return len(self.batch.target_ids_N)

    def to(self, device: torch.device) -> TrainBatch:
        """Move every tensor to `device`."""
        return self._map(lambda part: part.to(device, non_blocking=True))

    def pin_memory(self) -> TrainBatch:
        """Pin every tensor, for overlapped copies to a GPU."""
        return self._map(lambda part: part.pin_memory())

    def _map(self, move: Callable[[Any], Any]) -> TrainBatch:
        names = ("batch", "targets", "reference_S", "sample_of_S", "states", "behaviour_N", "aligned", "weights_N")
        parts = {name: getattr(self, name) for name in names}
        moved = {name: move(part) for name, part in parts.items() if part is not None}
        return replace(self, mismatched=self.mismatched and self.mismatched._map(move), **moved)


class Loader:
    """Micro-batches in the order of a schedule, decoded, tokenized and joined in `workers` processes (0: in this one).

    `records`: for each role, the cache's row for each row of the set (see `Join`). `record_roles`: the roles whose
    records the loss needs, which come first in `roles`. `swap`: swaps a differing end of turn for the student's.
    `vocab_size`: how many ids cache and student share, if fewer than the cache has. `bridge`: to a teacher with another
    tokenizer. `positions`: the positions of a sequence that batches hold, as in the cache. `states`: the teacher's
    hidden states that the loss needs. `masked_ids`: tokens that a loss on own answers leaves out; None: no such loss.
    `visual_weight`: how much more the tokens that need the image count; 0: positions have no weights.
    `prefetch`: copies remote shards ahead of a schedule; other reads fetch samples one by one.

    Errors while iterating: `DataError` or `TargetError` naming the sample whose image, length or answer is unsuitable.
    """

    def __init__(
        self,
        samples: SampleSet,
        rows: NDArray[np.int64],
        *,
        family: StudentFamily,
        roles: Sequence[str],
        cache: Teachers | None,
        records: Mapping[str, NDArray[np.int64]],
        record_roles: Sequence[str],
        workers: int,
        pin_memory: bool,
        swap: TokenIdSwap | None = None,
        vocab_size: int | None = None,
        positions: Positions = "response",
        states: WantedStates | None = None,
        masked_ids: frozenset[int] | None = None,
        bridge: TokenizerBridge | None = None,
        visual_weight: float = 0.0,
        prefetch: Prefetch | None = None,
    ) -> None:
        self._prefetch = prefetch
        if cache is not None and visual_weight:
            for part in cache.parts:
                _ = part.advantage_counts  # from all manifests: read once, before workers are forked
        self._dataset = _Micro(
            samples,
            rows,
            family,
            tuple(roles),
            cache,
            records,
            tuple(record_roles),
            swap,
            vocab_size,
            positions,
            states,
            masked_ids,
            bridge,
            visual_weight,
        )
        self._settings: dict[str, Any] = {"num_workers": workers, "pin_memory": pin_memory}
        if workers:
            self._settings |= {
                "prefetch_factor": 4,
                "multiprocessing_context": "fork",
                "worker_init_fn": begin_worker,
            }

    def check_room(self) -> None:
        """Check that remote shards fit into the disk cache, as a schedule needs them. Errors: `ConfigError`."""
        if self._prefetch is not None:
            self._prefetch.check_room()

    def batches(self, schedule: BatchSchedule | Sequence[list[int]]) -> Generator[TrainBatch]:
        """Yield the micro-batches of a schedule of indices into `rows`; closing the generator ends the workers."""
        follows = isinstance(schedule, BatchSchedule)
        dataset = self._dataset if follows else replace(self._dataset, scattered=True)
        loader = DataLoader(dataset, batch_sampler=schedule, collate_fn=as_it_is, **self._settings)
        batches: Iterator[Any] = iter(loader)  # forks the workers: must precede any thread
        if self._prefetch is not None and isinstance(schedule, BatchSchedule):
            batches = self._prefetch.around(batches, schedule)
        try:
            for batch in batches:
                if isinstance(batch, LlavaModError):
                    raise batch
                yield batch
        finally:
            # Workers end when nothing refers to them, but an error's traceback would keep this variable alive.
            del batches


@dataclass(frozen=True, eq=False)
class _Micro(Dataset[TrainBatch]):
    """Makes a micro-batch from several rows. Errors are returned as values: a worker would add its traceback.

    `scattered`: the rows are spread over the set.
    """

    samples: SampleSet
    rows: NDArray[np.int64]
    family: StudentFamily
    roles: tuple[str, ...]
    cache: Teachers | None
    records: Mapping[str, NDArray[np.int64]]
    record_roles: tuple[str, ...]
    swap: TokenIdSwap | None
    vocab_size: int | None
    positions: Positions
    states: WantedStates | None
    masked_ids: frozenset[int] | None
    bridge: TokenizerBridge | None = None
    visual_weight: float = 0.0
    scattered: bool = False

    def __getitem__(self, place: int) -> TrainBatch:
        raise NotImplementedError("use __getitems__, which makes whole micro-batches")

    def __getitems__(self, places: list[int]) -> TrainBatch | LlavaModError:
        try:
            return self._make([int(self.rows[place]) for place in places])
        except LlavaModError as error:
            return error

    def _make(self, rows: list[int]) -> TrainBatch:
        samples = [self.samples.read(row, scattered=self.scattered) for row in rows]
        if MISMATCHED in self.roles:  # chosen answers first, so that both batches have their images in the same order
            order = sorted(range(len(rows)), key=lambda n: "chosen" not in samples[n].roles)
            rows, samples = [rows[n] for n in order], [samples[n] for n in order]
        images = self._images(samples)
        trained = [role for role in self.roles if role != MISMATCHED]
        made = self._batch(rows, samples, images, trained)
        if len(trained) == len(self.roles):
            return made
        return replace(made, mismatched=self._batch(rows, samples, images, [MISMATCHED]))

    def _images(self, samples: list[Sample]) -> list[Any]:
        try:
            return self.family.images(samples)
        except DataError as error:
            raise DataError(
                f"{error}: pack the set again with this image repaired or without the sample, and rerun to "
                "resume from the last checkpoint"
            ) from error

    def _batch(self, rows: list[int], samples: list[Sample], images: list[Any], roles: Sequence[str]) -> TrainBatch:
        places = [(role, n) for role in roles for n, sample in enumerate(samples) if role in sample.roles]
        sequences = [self.family.encode(samples[n], role) for role, n in places]
        batch = self.family.collate(sequences, [images[n] for _, n in places], positions=self.positions)
        if self.cache is None:
            return TrainBatch(batch, len(samples))
        rows_S = np.array([self.records[role][rows[n]] for role, n in places], np.int64)
        records = self.cache.sequences(rows_S)
        for sequence, (_, n), row, record in zip(sequences, places, rows_S.tolist(), records, strict=True):
            self._check(self.cache.owner(row), sequence, samples[n], record)
        if self.bridge is not None:
            counts = [record.n_positions for record in records]
            aligned = self.bridge.targets(self.cache.targets(rows_S), counts, sequences)
            return TrainBatch(batch, len(samples), aligned=aligned)
        rows_R = rows_S[: sum(role in self.record_roles for role, _ in places)]
        targets = self.cache.targets(rows_R) if set(self.record_roles) & set(roles) else None
        if targets is not None and self.swap is not None:
            targets = self.swap.targets(targets)
        if targets is not None and self.vocab_size is not None:
            targets = targets.limited(self.vocab_size)
        states = None
        if self.states is not None:
            states = read_states(self.cache.owner(0), rows_R, batch, self.states)  # only ever from one teacher's cache
        sums_S = torch.tensor([record.sum_log_prob for record in records], dtype=torch.float32)
        owners_S = torch.tensor([n for _, n in places])
        behaviour_N = None if self.masked_ids is None else self._behaviour(batch, places, samples, sequences)
        weights_N = self.cache.visual_weights(rows_R, self.visual_weight) if self.visual_weight else None
        return TrainBatch(
            batch,
            len(samples),
            targets,
            sums_S,
            owners_S,
            states=states,
            behaviour_N=behaviour_N,
            weights_N=weights_N,
        )

    def _behaviour(
        self,
        batch: Batch,
        places: Sequence[tuple[str, int]],
        samples: list[Sample],
        sequences: Sequence[TokenizedSequence],
    ) -> Tensor:
        """The writer's log-probs at the positions of `batch`, NaN at those not trained on."""
        found = [
            behaviour_log_probs(samples[n], sequence, self.masked_ids or ())
            for (_, n), sequence in zip(places, sequences, strict=True)
        ]
        behaviour_N = torch.full(batch.target_ids_N.shape, torch.nan)
        behaviour_N[batch.target_ids_N != NO_TARGET] = torch.from_numpy(np.concatenate(found))
        return behaviour_N

    def _check(self, cache: TeacherCache, sequence: TokenizedSequence, sample: Sample, record: CachedSequence) -> None:
        """Check that a record was made for these tokens and this sample. Errors: `TargetError`, `DataError`."""
        from teacher_cache.format.sequences import short_hash
        from teacher_cache.student.check import check_sequence

        if self.bridge is None:
            check_sequence(cache, sequence, self.swap, record)
        if record.content_hash != short_hash(sample.content_hash):
            raise DataError(
                f"sample '{sequence.key}' ({sequence.role}): its text or images differ from those captured: "
                "capture again, or set data.set to the set of the cache"
            )


def begin_worker(worker: int) -> None:
    """Begin a worker, ignoring signals that may reach all processes: the main process ends the workers.

    Freeze inherited objects too: destroying one that owns a thread, such as a process group, fails after a fork.
    """
    gc.freeze()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)


def as_it_is(made: Any) -> Any:
    """Collate nothing: a worker returns whole batches, or an error."""
    return made
