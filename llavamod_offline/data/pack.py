"""Packing: samples and rejections in, a set folder out (its files: see `shards.py`).

The folder is written aside and renamed when it is complete, so a kill leaves nothing under its name. The same rows in
the same order give the same bytes. What is held in memory is one sample, one shard's tar headers, a few thousand rows
of the index, and the key and place of every row, by which duplicates are found.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from llavamod_offline.atomic import fsync_tree, new_folder, remove_leftovers
from llavamod_offline.data.rows import Located, Rejection
from llavamod_offline.data.sample import KEY_PATTERN, Sample
from llavamod_offline.data.shard_writer import ShardWriter, sample_members
from llavamod_offline.data.shards import INDEX_NAME, INDEX_SCHEMA, MANIFEST_NAME, REJECTED_NAME, SET_FORMAT, Shard
from llavamod_offline.errors import DataError

SHARD_SAMPLES = 1000
SHARD_BYTES = 512 * 2**20

_INDEX_BATCH = 4096


@dataclass(frozen=True)
class PackSummary:
    """What was packed: counts, and rejections by kind; `bytes` is the size of the shards."""

    path: Path
    name: str
    samples: int
    conversations: int
    preferences: int
    images: int
    shards: int
    bytes: int
    rejected: int
    rejected_by_kind: dict[str, int]
    sources: dict[str, int]
    digest: str

    def to_json(self) -> dict[str, Any]:
        """The summary as JSON values."""
        return asdict(self) | {"path": str(self.path)}


def write_set(
    rows: Iterable[Sample | Located | Rejection],
    output: Path,
    *,
    name: str | None = None,
    shard_samples: int = SHARD_SAMPLES,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    max_rejected: float | None = None,
    duplicate_hint: str = "give every row its own key",
) -> PackSummary:
    """Write rows, in their order, to the set folder `output`; shards are called `name` (default: the folder's name).

    A shard is closed when it holds `shard_samples` samples, or when the next one would take it past `shard_bytes`.
    Errors: `DataError` if `output` exists (with `overwrite`: if it is no packed set), for a duplicate key (naming both
    rows and `duplicate_hint`), if no row gives a sample, if more than the share `max_rejected` of them is rejected.
    Nothing is left behind then.
    """
    output = Path(output) if Path(output).name not in {"", ".."} else Path(output).resolve()
    name = output.resolve().name if name is None else name
    if not KEY_PATTERN.fullmatch(name):
        raise DataError(f"set name '{name}': only letters, digits, '-' and '_': choose another with --name")
    _check_output(output, overwrite)
    try:
        remove_leftovers(output.parent, output.name)
        with new_folder(output) as folder:
            with _SetWriter(folder, name, shard_samples, shard_bytes, duplicate_hint) as writer:
                for row in rows:
                    writer.add(row)
                writer.check(max_rejected)
            summary = writer.finish(output)
            displaced = _displace(output, folder)
    except OSError as error:
        raise DataError(f"output '{output}': cannot be written: {error.strerror or error}") from error
    if displaced:
        shutil.rmtree(displaced, ignore_errors=True)
    return summary


def _displace(output: Path, folder: Path) -> Path | None:
    """Move the old set aside when the new one, `folder`, is safe on disk, so that the name is free but for a moment."""
    if not output.exists():
        return None
    fsync_tree(folder)
    displaced = output.with_name(f".{output.name}.old.{os.getpid()}.tmp")
    return output.rename(displaced)


def _check_output(output: Path, overwrite: bool) -> None:
    if not output.exists() and not output.is_symlink():
        return
    if not overwrite:
        raise DataError(f"output '{output}' exists: choose another folder, or replace it with --overwrite")
    if output.is_symlink() or not (output / MANIFEST_NAME).is_file():
        raise DataError(f"output '{output}' is no packed set, so --overwrite leaves it alone: choose another folder")


@dataclass
class _SetWriter:
    """Writes one set folder, row by row; a context manager that closes its files."""

    folder: Path
    name: str
    shard_samples: int
    shard_bytes: int
    duplicate_hint: str
    shards: list[Shard] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    rejections: Counter[str] = field(default_factory=Counter)

    def __enter__(self) -> _SetWriter:
        self._rows = 0
        self._first_rejection: Rejection | None = None
        self._places: dict[str, tuple[int, int]] = {}
        self._files: dict[str, int] = {}
        self._digest = hashlib.sha256()
        self._pending: list[dict[str, Any]] = []
        self._shard: ShardWriter | None = None
        with ExitStack() as stack:
            self._rejected = stack.enter_context((self.folder / REJECTED_NAME).open("w", encoding="utf-8"))
            stack.callback(self._close_shard)
            self._index = stack.enter_context(pa.ipc.new_file(str(self.folder / INDEX_NAME), INDEX_SCHEMA))
            stack.callback(self._flush_index)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def add(self, row: Sample | Located | Rejection) -> None:
        """Write a sample to the current shard, or a rejection to its list."""
        if isinstance(row, Rejection):
            self._reject(row)
        else:
            located = Located(row, "samples", self._rows) if isinstance(row, Sample) else row
            self._check_key(located)
            self._write(located.sample)
        self._rows += 1

    def check(self, max_rejected: float | None) -> None:
        """Refuse a set without samples or with too many rejections."""
        rejected, first = self.rejections.total(), self._first_rejection
        example = f"; the first: {first.file} row {first.row}: {first.reason}" if first else ""
        if not self._places:
            raise DataError(f"nothing to pack: none of {self._rows} row(s) gives a sample{example}")
        if max_rejected is not None and rejected > max_rejected * self._rows:
            raise DataError(
                f"{rejected} of {self._rows} rows rejected, more than --max-rejected {max_rejected:g} allows{example}"
            )

    def finish(self, output: Path) -> PackSummary:
        """Write the manifest, after everything else."""
        samples = self.counts["samples"]
        manifest = {
            "format": SET_FORMAT,
            "name": self.name,
            "samples": samples,
            "conversations": self.counts["conversation"],
            "preferences": self.counts["preference"],
            "images": self.counts["images"],
            "sources": dict(sorted(self.sources.items())),
            "rejected": self.rejections.total(),
            "rejected_by_kind": dict(sorted(self.rejections.items())),
            "digest": self._digest.hexdigest(),
            "shards": [
                {"name": shard.name, "samples": shard.samples, "bytes": shard.size, "sha256": shard.sha256}
                for shard in self.shards
            ],
        }
        (self.folder / MANIFEST_NAME).write_text(json.dumps(manifest, ensure_ascii=False, indent=1) + "\n", "utf-8")
        return PackSummary(
            path=output,
            name=self.name,
            samples=samples,
            conversations=self.counts["conversation"],
            preferences=self.counts["preference"],
            images=self.counts["images"],
            shards=len(self.shards),
            bytes=sum(shard.size for shard in self.shards),
            rejected=self.rejections.total(),
            rejected_by_kind=dict(sorted(self.rejections.items())),
            sources=dict(sorted(self.sources.items())),
            digest=self._digest.hexdigest(),
        )

    def _reject(self, rejection: Rejection) -> None:
        self._first_rejection = self._first_rejection or rejection
        self.rejections[rejection.kind] += 1
        # ASCII, so that what is wrong with a row's text can be written down whatever it is.
        self._rejected.write(json.dumps(asdict(rejection)) + "\n")

    def _check_key(self, located: Located) -> None:
        file = self._files.setdefault(located.file, len(self._files))
        key = located.sample.key
        if key in self._places:
            earlier_file, earlier_row = self._places[key]
            raise DataError(
                f"duplicate key '{key}': {list(self._files)[earlier_file]} row {earlier_row} and {located.file} row "
                f"{located.row}: {self.duplicate_hint}"
            )
        self._places[key] = (file, located.row)

    def _write(self, sample: Sample) -> None:
        members = sample_members(sample)
        size = sum(len(content) for _, content in members)
        shard = self._shard
        if shard and (shard.samples >= self.shard_samples or shard.size + size > self.shard_bytes):
            self._close_shard()
        if self._shard is None:
            self._shard = ShardWriter(self.folder, f"{self.name}-{len(self.shards):06d}")
        content_hash = sample.content_hash
        kind = "preference" if sample.is_preference else "conversation"
        texts = [turn.text for turn in sample.turns] + [sample.chosen or "", sample.rejected or ""]
        self._pending.append(
            {
                "key": sample.key,
                "shard": len(self.shards),
                "content_hash": content_hash,
                "kind": kind,
                "n_turns": len(sample.turns),
                "n_images": len(sample.images),
                "source": sample.source,
                "text_length": sum(len(text) for text in texts),
                "members": self._shard.add(sample.key, members),
            }
        )
        if len(self._pending) >= _INDEX_BATCH:
            self._flush_index()
        self._digest.update(f"{sample.key} {content_hash}\n".encode())
        self.counts.update({"samples": 1, kind: 1, "images": len(sample.images)})
        self.sources[sample.source] += 1

    def _flush_index(self) -> None:
        if self._pending:
            self._index.write_batch(pa.RecordBatch.from_pylist(self._pending, schema=INDEX_SCHEMA))
            self._pending = []

    def _close_shard(self) -> None:
        if self._shard:
            self.shards.append(self._shard.close())
            self._shard = None
