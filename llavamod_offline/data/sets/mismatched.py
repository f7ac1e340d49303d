"""Pair prompts with answers of other samples, from which unpaired KTO estimates the KL of policy and reference.

The preference samples of a set form a ring, ordered by the SHA-256 of their keys. A sample's *mismatched* response is
the chosen or the rejected one (by the last bit of that hash; of an unpaired sample, its only one) of the next sample in
the ring; of the one after it if the text is one of the sample's own, and so on. So the pairs depend only on the samples
of a set, not on its order, its shards or the reader. Adding or removing a sample changes only the pairs of its
neighbours in the ring.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from llavamod_offline.data.sample import Sample
from llavamod_offline.errors import DataError
from llavamod_offline.plural import counted

PAIRING = "next in the ring of SHA-256"  # in fingerprints: how pairs were made
_SALT = "mismatched"


@dataclass(frozen=True, eq=False)
class MismatchRing:
    """The P rows of a set's preference samples in ring order, and the place in the ring of each of its N rows."""

    rows_P: NDArray[np.int64]
    places_N: NDArray[np.int64]

    @classmethod
    def of(cls, index: pa.Table, *, where: str) -> MismatchRing:
        """Form the ring of a set's preference samples from its index.

        Errors: `DataError` naming `where` if there are fewer than 2.
        """
        is_preference = pc.not_equal(index.column("kind"), "conversation")
        rows_P = np.flatnonzero(is_preference.to_numpy())
        if len(rows_P) < 2:
            raise DataError(
                f"{where}: {counted(len(rows_P), 'preference sample')}, but mismatched responses come from other "
                "samples: use a set of at least 2, or capture without capture.mismatched and train with loss.kind "
                "kto_pair"
            )
        keys = index.column("key").filter(is_preference)
        hashes = b"".join(_hash(key) for chunk in keys.chunks for key in chunk.to_pylist())
        words_4P = np.frombuffer(hashes, ">u8").reshape(-1, 4).T.astype(np.uint64)
        rows_P = rows_P[np.lexsort(words_4P[::-1])]  # by the first word, then the second, …
        places_N = np.full(len(index), -1, np.int64)
        places_N[rows_P] = np.arange(len(rows_P))
        return cls(rows_P, places_N)

    def response(self, row: int, sample: Sample, read: Callable[[int], tuple[str, ...]]) -> str:
        """The mismatched response of the sample in `row`; `read` returns the responses of another row.

        Errors: `DataError` naming the sample if no other sample has a response different from both of its own.
        """
        own = {text.strip() for text in (sample.chosen, sample.rejected) if text is not None}
        side = _hash(sample.key)[-1] % 2
        place = int(self.places_N[row])
        for step in range(1, len(self.rows_P)):
            texts = read(int(self.rows_P[(place + step) % len(self.rows_P)]))
            text = texts[side % len(texts)]
            if text.strip() not in own:
                return text
        raise DataError(f"sample '{sample.key}' (mismatched): no other sample has a different response")


def _hash(key: str) -> bytes:
    return hashlib.sha256(f"{_SALT}\0{key}".encode()).digest()
