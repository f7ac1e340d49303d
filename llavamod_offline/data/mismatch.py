"""Prompts paired with answers that belong to others: what unpaired KTO measures the KL of policy and reference by.

The preference samples of a set stand in a ring, by the SHA-256 of their keys. A sample's *mismatched* response is the
chosen or the rejected one (by the last bit of that hash) of the next sample in the ring; of the one after it where the
text is one of the sample's own, and so on. So the pairs follow from the samples of a set alone: its order, its shards
and whoever reads it do not enter. A sample more or less in the set changes the pairs of its neighbours in the ring.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llavamod_offline.data.sample import Sample
from llavamod_offline.errors import DataError

PAIRING = "next in the ring of SHA-256"  # what a fingerprint says of how pairs were made
_SALT = "mismatched"


@dataclass(frozen=True)
class MismatchRing:
    """The rows of a set's preference samples in the order of the ring, and the place of each in it."""

    rows: tuple[int, ...]
    places: Mapping[int, int]

    @classmethod
    def of(cls, keys: Mapping[int, str], *, where: str) -> MismatchRing:
        """Put samples, given as row → key, into a ring. Errors: `DataError` naming `where` if they are fewer than 2."""
        if len(keys) < 2:
            raise DataError(
                f"{where}: {len(keys)} preference sample(s): a mismatched response is that of another one: "
                "use a set of at least 2, or capture without capture.mismatched and train with loss.kind kto_pair"
            )
        rows = tuple(sorted(keys, key=lambda row: _hash(keys[row])))
        return cls(rows, {row: place for place, row in enumerate(rows)})

    def response(self, row: int, sample: Sample, read: Callable[[int], tuple[str, str]]) -> str:
        """The mismatched response of the sample in `row`; `read` gives the responses of another one by its row.

        Errors: `DataError` naming the sample if no other one has a response that differs from both of its own.
        """
        own = {str(sample.chosen).strip(), str(sample.rejected).strip()}
        side = _hash(sample.key)[-1] % 2
        place = self.places[row]
        for step in range(1, len(self.rows)):
            text = read(self.rows[(place + step) % len(self.rows)])[side]
            if text.strip() not in own:
                return text
        raise DataError(f"sample '{sample.key}' (mismatched): no other sample of the set has another response")


def _hash(key: str) -> bytes:
    return hashlib.sha256(f"{_SALT}\0{key}".encode()).digest()
