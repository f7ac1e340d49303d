"""Finding a cache's samples in the packed sets that it was made from.

Shape suffixes: Q sequences asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from llavamod_offline.data.sample import Sample
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import CacheError
from teacher_cache.format.sequences import short_hash
from teacher_cache.read.reader import TeacherCache

NO_SET = "not in the given sets"
NO_SOURCE = "no source"


class CacheSets:
    """Packed sets, opened to look up the samples of a cache. Errors: `DataError` if one cannot be opened."""

    def __init__(self, cache: TeacherCache, paths: Sequence[Path | str]) -> None:
        self.cache = cache
        self.sets = [SampleSet.open(path) for path in paths]

    def __bool__(self) -> bool:
        return bool(self.sets)

    def sample(self, item: tuple[str, str]) -> Sample | None:
        """The sample of a (key, role), or None if no set has it. Errors: as `places`."""
        ((ordinal, row),) = self.places([item]).tolist()
        return None if ordinal < 0 else self.sets[ordinal].read(row, verify=True)

    def sources(self, items: Sequence[tuple[str, str]]) -> list[str]:
        """The source of each (key, role). Errors: as `places`."""
        found = [NO_SET] * len(items)
        columns = [packed.index.column("source") for packed in self.sets]
        for number, (ordinal, row) in enumerate(self.places(items).tolist()):
            if ordinal >= 0:
                found[number] = columns[ordinal][row].as_py() or NO_SOURCE
        return found

    def places(self, items: Sequence[tuple[str, str]]) -> NDArray[np.int64]:
        """The set and the row of each (key, role), [Q, 2] int64; −1 where no set has it.

        Errors: `CacheError` naming a sample whose content differs from what was captured.
        """
        places_Q2 = np.full((len(items), 2), -1, np.int64)
        keys = pa.array([key for key, _ in items], pa.string())
        other: dict[int, str] = {}
        for ordinal, packed in enumerate(self.sets):
            rows = pc.index_in(keys, value_set=packed.index.column("key").combine_chunks()).to_pylist()
            hashes = packed.index.column("content_hash")
            for number, row in enumerate(rows):
                if row is None or places_Q2[number, 0] >= 0:
                    continue
                if short_hash(hashes[row].as_py()) == self.cache.sequence(*items[number]).content_hash:
                    places_Q2[number] = ordinal, row
                else:
                    other.setdefault(number, str(packed.path))
        for number, path in other.items():
            if places_Q2[number, 0] < 0:
                raise CacheError(
                    f"sample '{items[number][0]}': its content in set '{path}' differs from that captured in "
                    f"cache '{self.cache.path}': pass the captured set"
                )
        return places_Q2
