"""Samples ready to be written: their row in the index, and their files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llavamod_offline.data.sample import Sample, Size, sample_to_json


@dataclass(frozen=True)
class Facts:
    """A sample's row in the index, without its position; fields as the columns in `sample_set.py`."""

    key: str
    content_hash: str
    kind: str
    n_turns: int
    n_images: int
    source: str
    text_length: int
    parser: str
    n_shrunk: int

    @classmethod
    def of(cls, sample: Sample, *, parser: str = "sample", n_shrunk: int = 0) -> Facts:
        """Collect them for a sample, hashing its content."""
        texts = [turn.text for turn in sample.turns] + [sample.chosen or "", sample.rejected or ""]
        return cls(
            key=sample.key,
            content_hash=sample.content_hash,
            kind=sample.kind,
            n_turns=len(sample.turns),
            n_images=len(sample.images),
            source=sample.source,
            text_length=sum(len(text) for text in texts),
            parser=parser,
            n_shrunk=n_shrunk,
        )


@dataclass(frozen=True)
class PreparedSources:
    """A sample ready to be written, with its source file and row (from 0).

    `members`: the name (without key) and content of each of its files.
    """

    facts: Facts
    members: tuple[tuple[str, bytes], ...]
    file: str
    row: int


def prepare(sample: Sample, file: str, row: int, original_sizes: Sequence[Size | None] = ()) -> PreparedSources:
    """Prepare a sample; the `original_sizes` of shrunk images go into its JSON."""
    n_shrunk = sum(size is not None for size in original_sizes)
    return PreparedSources(Facts.of(sample, n_shrunk=n_shrunk), sample_members(sample, original_sizes), file, row)


def sample_members(sample: Sample, original_sizes: Sequence[Size | None] = ()) -> tuple[tuple[str, bytes], ...]:
    """Name a sample's files: `json`, then `jpg`, or `0.jpg`, `1.png`… for several images."""
    members = [("json", sample_to_json(sample, original_sizes))]
    for number, (content, extension) in enumerate(zip(sample.images, sample.image_extensions, strict=True)):
        members.append((extension if len(sample.images) == 1 else f"{number}.{extension}", content))
    return tuple(members)
