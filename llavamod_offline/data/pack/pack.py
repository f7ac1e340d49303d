"""Packing: samples and rejections in, a set folder out (its files: see `sample_set.py`).

The same rows in the same order produce the same bytes. Memory holds one sample, one shard's tar headers, and what
`SetWriter` holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llavamod_offline.data.pack.prepare import PreparedSources, prepare
from llavamod_offline.data.pack.set_writer import Fitting, PackSummary, SetWriter, check_weights, new_set, no_advice
from llavamod_offline.data.pack.shard_writer import ShardWriter
from llavamod_offline.data.pack.work_folder import CanUse
from llavamod_offline.data.rows import Located, RejectedRow, RowPlace
from llavamod_offline.data.sample import Sample
from llavamod_offline.grace import Grace
from llavamod_offline.signals import keeping

Rows = Iterable[Sample | Located | PreparedSources | RejectedRow]
SHARD_SAMPLES = 1000
SHARD_BYTES = 512 * 2**20


def write_set(
    rows: Rows | Callable[[RowPlace | None], Rows],
    output: Path,
    *,
    name: str | None = None,
    shard_samples: int = SHARD_SAMPLES,
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    max_rejected: float | None = None,
    duplicate_hint: str = "give every row its own key",
    weights: Mapping[str, float] | None = None,
    licences: Mapping[str, str] | None = None,
    listed_licences: Mapping[str, str] | None = None,
    max_side: int | None = None,
    generated: Mapping[str, Any] | None = None,
    job: Mapping[str, Any] | None = None,
    fitting: Fitting = no_advice,
    can_use: CanUse = lambda image: False,
    grace: Grace | None = None,
) -> PackSummary:
    """Write rows, in order, to the set folder `output`; shards are named `name` (default: the folder's name).

    `job`: JSON values that say what is packed, and how. If an earlier call with the same job was stopped or killed,
    this one continues after its last complete shard; `rows` is then a function of where to begin.
    A shard is closed when it holds `shard_samples` samples, or when the next one would exceed `shard_bytes`.
    For the manifest: `weights`, how often training sees a source's samples, if not once; `licences` of sources,
    and `listed_licences` of sources that may turn out to have no samples; `max_side`, the length beyond
    which images were shrunk; `generated`, a description of the teacher that wrote the answers. `fitting`: advises on
    missing images from their names, for messages; `can_use`: whether an image can be used by now, for rows
    that an earlier call rejected for it. `grace`: on SIGTERM, decides whether the shard in hand is finished.
    Errors: `DataError` if `output` exists (with `overwrite`: unless it is a set), for a duplicate key (naming both rows
    and `duplicate_hint`), if no row yields a sample, if more than the share `max_rejected` is rejected;
    `ConfigError` for the weight or licence of a source without samples. Errors leave nothing behind, except the list
    of rejected rows in `{output}.rejected.jsonl` if those are the error.
    """
    weights = weights or {}
    check_weights(weights)
    hint = duplicate_hint
    if job is not None:
        job = {**job, "limits": [name, shard_samples, shard_bytes]}
    with new_set(
        output, name, overwrite=overwrite, duplicate_hint=hint, fitting=fitting, job=job, can_use=can_use
    ) as writer:
        with (
            writer,
            keeping(lambda: writer.kept),
            _Shards(writer, shard_samples, shard_bytes, grace or Grace()) as shards,
        ):
            start = writer.resume()
            for row in rows(start) if callable(rows) else rows:
                if isinstance(row, RejectedRow):
                    shards.reject(row)
                else:
                    shards.add(_prepared(row, writer.rows))
            writer.check(max_rejected, weights=weights, licences=licences or {})
        found = {**(listed_licences or {}), **(licences or {})}
        more = {
            "max_side": max_side,
            "licences": {name: found[name] for name in sorted(found.keys() & writer.sources.keys())} or None,
            "generated": generated,
        }
        return writer.finish(weights, {name: value for name, value in more.items() if value is not None})


def _prepared(row: Sample | Located | PreparedSources, number: int) -> PreparedSources:
    if isinstance(row, Sample):
        return prepare(row, "samples", number)
    return prepare(row.sample, row.file, row.row) if isinstance(row, Located) else row


class _Shards:
    """The tars of a new set, one after another; a context manager that closes the last one."""

    def __init__(self, writer: SetWriter, shard_samples: int, shard_bytes: int, grace: Grace) -> None:
        self._writer, self._grace = writer, grace
        self._limits = (shard_samples, shard_bytes)
        self._shard: ShardWriter | None = None
        self._last = RowPlace("", -1)  # the last row, and how many samples and rejections it has so far

    def __enter__(self) -> _Shards:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._close(None)
        elif self._shard:
            self._shard.close()

    def add(self, prepared: PreparedSources) -> None:
        """Write a sample to the current shard, or to a new one."""
        size = sum(len(content) for _, content in prepared.members)
        shard_samples, shard_bytes = self._limits
        shard = self._shard
        here = self._place(prepared)
        if shard and (shard.samples >= shard_samples or shard.size + size > shard_bytes):
            self._close(here)
            self._grace.check()
        if self._shard is None:
            name = f"{self._writer.name}-{len(self._writer.shards):06d}"
            self._shard = ShardWriter(self._writer.folder, name)
            self._grace.begin(f"shard '{name}'", shard_samples)
        members = self._shard.add(prepared.facts.key, prepared.members)
        self._writer.add(prepared.facts, members, prepared.file, prepared.row)
        self._last = replace(here, done=here.done + 1)
        self._grace.advance(1)

    def reject(self, row: RejectedRow) -> None:
        """List a row as rejected."""
        here = self._place(row)
        self._writer.reject(row)
        self._last = replace(here, done=here.done + 1)

    def _place(self, row: PreparedSources | RejectedRow) -> RowPlace:
        same = (row.file, row.row) == (self._last.file, self._last.row)
        return RowPlace(row.file, row.row, self._last.done if same else 0)

    def _close(self, after: RowPlace | None) -> None:
        if self._shard:
            self._grace.end()
            self._writer.close_shard(self._shard.close(), after)
            self._shard = None
