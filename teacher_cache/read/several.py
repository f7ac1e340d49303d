"""Several teachers' caches of one set, read as one: mixed, or a cache for each source of the set.

FORMAT.md, "Several teachers", says what a mixture's records are.

Shape suffixes: N samples of the set, B sequences requested at once, V ids.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from llavamod_offline.data.encode.tokenize import Positions
from llavamod_offline.errors import CacheError
from llavamod_offline.losses.mixture import concatenate_targets, mix_targets
from llavamod_offline.losses.targets import SparseTargets
from teacher_cache.format.manifest import canonical, sha256_bytes
from teacher_cache.format.sequences import CachedSequence
from teacher_cache.read.cache_tail_profile import mean_tail
from teacher_cache.read.reader import TeacherCache

Rows = NDArray[np.int64]


class Combination(Protocol):
    """How the records of several caches become those of a set."""

    def describe(self, digests: Sequence[str]) -> Any:
        """What the digest of the whole covers, as JSON values."""

    def assigned(self, rows: Rows, parts: int) -> list[Rows]:
        """For each part, those of the given set rows whose records it provides."""

    def rows(self, found: Sequence[Rows]) -> Rows:
        """One row for each sample, from its rows in the parts (−1: none)."""

    def part(self, row: int) -> int:
        """The part that a row belongs to."""

    def sequences(self, parts: Sequence[TeacherCache], rows_B: Rows) -> list[CachedSequence]: ...
    def targets(self, parts: Sequence[TeacherCache], rows_B: Rows, vocab_size: int) -> SparseTargets: ...
    def visual_weights(self, parts: Sequence[TeacherCache], rows_B: Rows, strength: float) -> Tensor: ...
    def tail_sums(self, parts: Sequence[TeacherCache], vocab_size: int) -> NDArray[np.float64]: ...
    def positions(self, parts: Sequence[TeacherCache]) -> int: ...


class SeveralCaches:
    """Open caches as one, with the part of `TeacherCache`'s interface that training reads.

    `parts` share their tokenizer, kinds of positions and temperature; the caller checks that (`train/teachers.py`).
    """

    def __init__(self, parts: Sequence[TeacherCache], combination: Combination) -> None:
        self.parts = tuple(parts)
        self._combination = combination
        self.path = ", ".join(part.path for part in parts)
        self.digest = sha256_bytes(canonical(combination.describe([part.digest for part in parts])))
        self.vocab_size = min(part.vocab_size for part in parts)
        self.positions = combination.positions(parts)
        self.has_tail_samples = any(part.has_tail_samples for part in parts)
        self.is_remote = any(part.is_remote for part in parts)
        self.fits_in_memory = all(part.fits_in_memory for part in parts)
        self.shard_bytes: Mapping[str, int] = sum((Counter(part.shard_bytes) for part in parts), Counter())

    @property
    def temperatures(self) -> tuple[float, ...]:
        """The temperatures other than 1 that all parts have."""
        first, *others = self.parts
        return tuple(value for value in first.temperatures if all(value in other.temperatures for other in others))

    @property
    def sampled_at(self) -> float:
        """The temperature for which the parts with tail samples were captured."""
        return next((part for part in self.parts if part.has_tail_samples), self.parts[0]).sampled_at

    @property
    def positions_kept(self) -> Positions:
        """Which positions of a sequence have records."""
        return self.parts[0].positions_kept

    @cached_property
    def tail_profile(self) -> Tensor | None:
        """The mean tail, [V] float32, sum 1; None without tails or tail samples. See `TeacherCache.tail_profile`."""
        return mean_tail(self._combination.tail_sums(self.parts, self.vocab_size))

    def assigned(self, rows: Rows) -> list[tuple[TeacherCache, Rows]]:
        """Each part with those of the given set rows whose records it provides."""
        return list(zip(self.parts, self._combination.assigned(rows, len(self.parts)), strict=True))

    def owner(self, row: int) -> TeacherCache:
        """The part that a row of `rows` belongs to; of a mixture, whose parts agree in every sequence, the first."""
        return self.parts[self._combination.part(row)]

    def rows(self, keys: pa.ChunkedArray, role: str, shards: Mapping[str, range] | None = None) -> Rows:
        """The rows of the sequences of all keys of the set, in one role; −1 if missing."""
        return self._combination.rows([part.rows(keys, role, shards) for part in self.parts])

    def sequences(self, rows_B: Rows) -> list[CachedSequence]:
        """The sequences in some rows. Errors: `CacheError` if a mixture's parts have captured different ones."""
        return self._combination.sequences(self.parts, rows_B)

    def targets(self, rows_B: Rows) -> SparseTargets:
        """The targets of several sequences, as CPU tensors."""
        return self._combination.targets(self.parts, rows_B, self.vocab_size)

    def visual_weights(self, rows_B: Rows, strength: float) -> Tensor:
        """The weights of the positions of several sequences; each part's have mean 1 over that part."""
        return self._combination.visual_weights(self.parts, rows_B, strength)

    def keep_shards(self, count: int) -> None:
        """Keep up to `count` decoded shards of each part."""
        for part in self.parts:
            part.keep_shards(count)

    def stage(self, name: str) -> None:
        """Copy the shard of this name to this machine, from each remote part that has one."""
        for part in self.parts:
            if part.is_remote and name in part.shard_bytes:
                part.stage(name)


@dataclass(frozen=True)
class Mixture:
    """Every sample's records are the mean of all parts', by `weights` that sum to 1; see `mix_targets`.

    Rows are those of the first part.
    """

    weights: tuple[float, ...]
    by_samples: bool

    def describe(self, digests: Sequence[str]) -> Any:
        """Digests in order with their weights; how tails are read is a setting of the loss."""
        return {"mixture": [[digest, weight] for digest, weight in zip(digests, self.weights, strict=True)]}

    def assigned(self, rows: Rows, parts: int) -> list[Rows]:
        """All rows for each part."""
        return [rows] * parts

    def rows(self, found: Sequence[Rows]) -> Rows:
        """Those of the first part where all have one."""
        return np.where(np.min(found, axis=0) < 0, -1, found[0])

    def part(self, row: int) -> int:
        """The first."""
        return 0

    def sequences(self, parts: Sequence[TeacherCache], rows_B: Rows) -> list[CachedSequence]:
        """The first part's, with the summed log-probs of the mixture. Errors: `CacheError` if another part's differ."""
        items = parts[0].items(rows_B.tolist())
        first, *others = (part.sequences(items) for part in parts)
        for part, found in zip(parts[1:], others, strict=True):
            for one, other in zip(first, found, strict=True):
                _check_same(one, other, parts[0].path, part.path)
        log_probs = [part.records(items).target_log_probs_N.astype(np.float64) for part in parts]
        mixed_N = np.logaddexp.reduce([own + np.log(w) for own, w in zip(log_probs, self.weights, strict=True)])
        ends = np.cumsum([one.n_positions for one in first])[:-1]
        return [
            replace(one, sum_log_prob=float(own.sum())) for one, own in zip(first, np.split(mixed_N, ends), strict=True)
        ]

    def targets(self, parts: Sequence[TeacherCache], rows_B: Rows, vocab_size: int) -> SparseTargets:
        """See `mix_targets`."""
        items = parts[0].items(rows_B.tolist())
        found = [part.targets(items).limited(vocab_size) for part in parts]
        return mix_targets(found, self.weights, by_samples=self.by_samples)

    def visual_weights(self, parts: Sequence[TeacherCache], rows_B: Rows, strength: float) -> Tensor:
        """The weighted mean of the parts' weights."""
        items = parts[0].items(rows_B.tolist())
        own = [w * part.visual_weights(items, strength) for part, w in zip(parts, self.weights, strict=True)]
        return torch.stack(own).sum(0)

    def tail_sums(self, parts: Sequence[TeacherCache], vocab_size: int) -> NDArray[np.float64]:
        """The weighted mean of the parts' mean tails."""
        means = (
            weight * part.tail_sums()[:vocab_size] / max(part.positions, 1)
            for part, weight in zip(parts, self.weights, strict=True)
        )
        return sum(means, np.zeros(vocab_size))

    def positions(self, parts: Sequence[TeacherCache]) -> int:
        """Those of one part."""
        return min(part.positions for part in parts)


@dataclass(frozen=True, eq=False)
class BySource:
    """A sample's records come from the part of its source.

    `part_of`: the number of each source's part; `part_N`: that of each sample. Rows are numbered across the parts,
    whose first rows are `first_rows`.
    """

    part_of: Mapping[str, int]
    part_N: NDArray[np.int64]
    first_rows: tuple[int, ...]

    def describe(self, digests: Sequence[str]) -> Any:
        """The digest of each source's cache."""
        return {"sources": {source: digests[part] for source, part in self.part_of.items()}}

    def assigned(self, rows: Rows, parts: int) -> list[Rows]:
        """The rows of its sources for each part."""
        return [rows[self.part_N[rows] == part] for part in range(parts)]

    def rows(self, found: Sequence[Rows]) -> Rows:
        """Those in the part of each sample's source."""
        own_N = np.stack(found)[self.part_N, np.arange(len(self.part_N))]
        return np.where(own_N < 0, -1, own_N + np.array(self.first_rows)[self.part_N])

    def part(self, row: int) -> int:
        """The part whose rows include this one."""
        return int(np.searchsorted(self.first_rows, row, side="right")) - 1

    def sequences(self, parts: Sequence[TeacherCache], rows_B: Rows) -> list[CachedSequence]:
        """Each from its part."""
        parts_B, locals_B = self._places(rows_B)
        return [parts[part].sequences(local[None])[0] for part, local in zip(parts_B.tolist(), locals_B, strict=True)]

    def targets(self, parts: Sequence[TeacherCache], rows_B: Rows, vocab_size: int) -> SparseTargets:
        """Read part by part, then put into the order of `rows_B`."""
        found = [part.targets(rows).limited(vocab_size) for part, rows in self._by_part(parts, rows_B)]
        return concatenate_targets(found).take(self._order(parts, rows_B))

    def visual_weights(self, parts: Sequence[TeacherCache], rows_B: Rows, strength: float) -> Tensor:
        """Each from its part."""
        found = [part.visual_weights(rows, strength) for part, rows in self._by_part(parts, rows_B)]
        return torch.cat(found)[self._order(parts, rows_B)]

    def tail_sums(self, parts: Sequence[TeacherCache], vocab_size: int) -> NDArray[np.float64]:
        """The sum over the parts, each weighted by the share of its sequences that the set has."""
        shares = zip(parts, self._shares(parts), strict=True)
        return sum((share * part.tail_sums()[:vocab_size] for part, share in shares), np.zeros(vocab_size))

    def positions(self, parts: Sequence[TeacherCache]) -> int:
        """Approximately those of the set's samples."""
        return round(sum(share * part.positions for part, share in zip(parts, self._shares(parts), strict=True)))

    def _shares(self, parts: Sequence[TeacherCache]) -> list[float]:
        counts = np.bincount(self.part_N, minlength=len(parts))
        return [min(1.0, count / max(len(part), 1)) for count, part in zip(counts, parts, strict=True)]

    def _places(self, rows_B: Rows) -> tuple[Rows, Rows]:
        """The part of each row, and its row there."""
        parts_B = np.searchsorted(self.first_rows, rows_B, side="right") - 1
        return parts_B, rows_B - np.array(self.first_rows)[parts_B]

    def _by_part(self, parts: Sequence[TeacherCache], rows_B: Rows) -> list[tuple[TeacherCache, Rows]]:
        """The rows of each part, in their order."""
        parts_B, locals_B = self._places(rows_B)
        return [(part, locals_B[parts_B == number]) for number, part in enumerate(parts)]

    def _order(self, parts: Sequence[TeacherCache], rows_B: Rows) -> Tensor:
        """Where the positions of `rows_B`, in order, are among those read part by part."""
        lengths_B = np.array([one.n_positions for one in self.sequences(parts, rows_B)], np.int64)
        order_B = np.argsort(self._places(rows_B)[0], kind="stable")
        starts_B = np.empty_like(lengths_B)
        starts_B[order_B] = np.cumsum(lengths_B[order_B]) - lengths_B[order_B]
        spans = [np.arange(start, start + length) for start, length in zip(starts_B, lengths_B, strict=True)]
        return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *spans]))


def _check_same(one: CachedSequence, other: CachedSequence, first: str, second: str) -> None:
    for name, what in (("content_hash", "text or images"), ("target_hash", "supervised tokens")):
        if getattr(one, name) != getattr(other, name):
            raise CacheError(
                f"sample '{one.key}' ({one.role}): its {what} in cache '{second}' are not those in cache '{first}': "
                "capture the same set with both teachers"
            )
    if one.n_positions != other.n_positions:
        raise CacheError(
            f"sample '{one.key}' ({one.role}): {other.n_positions} positions in cache '{second}', {one.n_positions} in "
            f"cache '{first}': capture both with the same template, or with capture.positions=response"
        )


Teachers = TeacherCache | SeveralCaches  # one teacher's cache, or several as one
