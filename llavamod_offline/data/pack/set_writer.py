"""The files of every set folder besides tars: index, list of rejections, manifest (see `sample_set.py`).

The folder gets its name when it is complete, so a killed process leaves nothing under that name; with a job it leaves
what the same job needs to continue (see `work_folder.py`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from llavamod_offline.data.keys import key_from_id
from llavamod_offline.data.pack.key_register import KeyRegister
from llavamod_offline.data.pack.prepare import Facts
from llavamod_offline.data.pack.rejections import Rejections
from llavamod_offline.data.pack.work_folder import (
    CanUse,
    Entry,
    IndexedSample,
    OtherSettingsError,
    PackJournal,
    work_folder,
    work_path,
)
from llavamod_offline.data.rows import RejectedRow, RowPlace
from llavamod_offline.data.sample import KEY_PATTERN
from llavamod_offline.data.sets.sample_set import INDEX_NAME, INDEX_SCHEMA, MANIFEST_NAME, REJECTED_NAME, SET_FORMAT
from llavamod_offline.data.sets.tar_files import Shard
from llavamod_offline.errors import ConfigError, DataError, EmptySetError
from llavamod_offline.plural import counted
from llavamod_offline.storage.atomic import aside_path, fsync_tree, new_folder, remove_leftovers
from llavamod_offline.storage.lock import locked_beside
from llavamod_offline.storage.walk import is_utf8

Fitting = Callable[[Sequence[str]], str]

_INDEX_BATCH = 4096
_LOG = logging.getLogger(__name__)


def no_advice(missing: Sequence[str]) -> str:
    """Advise nothing on missing images."""
    return ""


@dataclass(frozen=True)
class PackSummary:
    """A new set's contents: counts, rejections by kind, and the reason for most; `bytes` is the size of the shards."""

    path: Path
    name: str
    samples: int
    conversations: int
    preferences: int
    unpaired: int
    images: int
    shrunk: int
    shards: int
    bytes: int
    rejected: int
    rejected_by_kind: dict[str, int]
    sources: dict[str, int]
    weights: dict[str, float]
    digest: str
    diagnosis: str = ""

    def to_json(self) -> dict[str, Any]:
        """The summary as JSON values."""
        return asdict(self) | {"path": str(self.path)}


@contextmanager
def new_set(
    output: Path,
    name: str | None,
    *,
    overwrite: bool,
    duplicate_hint: str,
    fitting: Fitting = no_advice,
    job: Mapping[str, Any] | None = None,
    can_use: CanUse = lambda image: False,
) -> Iterator[SetWriter]:
    """Yield the writer of the set folder `output`, which appears when the block ends without an error.

    `job`: what is packed, and how, so that it can be continued; `can_use`: see `work_folder`.

    `name`: of the shards; by default the folder's, with characters that it may not contain written as in keys.
    Errors: `ConfigError` if another process writes it; `DataError` if `output` exists (with `overwrite`: if it is not
    a set), or cannot be written.
    """
    output = Path(output) if Path(output).name not in {"", ".."} else Path(output).resolve()
    if name is None:
        folder_name = output.resolve().name
        name = folder_name if KEY_PATTERN.fullmatch(folder_name) else key_from_id(folder_name)
    if not KEY_PATTERN.fullmatch(name):
        raise DataError(f"set name '{name}': only letters, digits, '-' and '_' are allowed: choose another with --name")
    if not is_utf8(str(output)):
        raise DataError(f"output {str(output)!a}: its name is not UTF-8: choose another")
    with locked_beside(output):
        _check_output(output, overwrite)
        try:
            remove_leftovers(output.parent, output.name)
            if job is None:
                shutil.rmtree(work_path(output), ignore_errors=True)
            with new_folder(output) if job is None else work_folder(output, job, can_use) as folder:
                journal = None if job is None else PackJournal(folder)
                yield SetWriter(folder, output, name, duplicate_hint, fitting, journal)
                displaced = _displace(output, folder)
        except OSError as error:
            kept = f"; rerun to continue from {work_path(output)}" if work_path(output).exists() else ""
            raise DataError(f"output '{output}': cannot be written: {error.strerror or error}{kept}") from error
        if displaced:
            shutil.rmtree(displaced, ignore_errors=True)
        _list_beside(output).unlink(missing_ok=True)  # of an earlier attempt that was refused


def _list_beside(output: Path) -> Path:
    return output.with_name(f"{output.name}.{REJECTED_NAME}")


def _displace(output: Path, folder: Path) -> Path | None:
    """Rename the old set once the new one, `folder`, is flushed, so that the name is unused only for a moment."""
    if not output.exists():
        return None
    fsync_tree(folder)
    displaced = output.with_name(f".{output.name}.old.{os.getpid()}.tmp")
    return output.rename(displaced)


def _check_output(output: Path, overwrite: bool) -> None:
    if not output.exists() and not output.is_symlink():
        return
    if output.is_symlink() or not (output / MANIFEST_NAME).is_file():
        raise DataError(f"output '{output}' exists, and is not a set that --overwrite replaces: choose another folder")
    if not overwrite:
        raise DataError(f"output '{output}' exists: choose another folder, or replace it with --overwrite")
    own = {MANIFEST_NAME, INDEX_NAME, REJECTED_NAME}
    for path in sorted(output.iterdir()):
        if path.name not in own and path.suffix != ".tar" and not path.name.startswith("."):
            raise DataError(
                f"output '{output}' holds more than a set, such as '{path.name}', so --overwrite does not replace it: "
                "move that away, or choose another folder"
            )


@dataclass
class SetWriter:
    """Writes the index and the rejections of a set, row by row; a context manager that closes its files.

    Memory holds a few thousand rows of the index, and 28 bytes a row to detect duplicate keys. `fitting`: see
    `Rejections`.
    """

    folder: Path
    output: Path
    name: str
    duplicate_hint: str
    fitting: Fitting
    journal: PackJournal | None = None
    shards: list[Shard] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    sources: Counter[str] = field(default_factory=Counter)
    rows: int = 0

    def __enter__(self) -> SetWriter:
        self._keys = KeyRegister(self.duplicate_hint)
        self._digest = hashlib.sha256()
        self._pending: list[dict[str, Any]] = []
        self._uncommitted: list[Entry] = []
        with ExitStack() as stack:
            self._list = stack.enter_context((self.folder / REJECTED_NAME).open("w", encoding="utf-8"))
            self.rejections = Rejections(self._list)
            self._index = stack.enter_context(pa.ipc.new_file(str(self.folder / INDEX_NAME), INDEX_SCHEMA))
            stack.callback(self._flush_index)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def kept(self) -> str:
        """What a stopped writer has kept, for its last line of output; empty if nothing."""
        done = self.journal.shards if self.journal else 0
        return f"{counted(done, 'shard')} of {self.output} kept" if done else ""

    def resume(self) -> RowPlace | None:
        """Take over the shards that an earlier writer finished; return where the next row is, if there are any."""
        place = None
        for shard, place, entries in self.journal.finished() if self.journal else ():  # noqa: B007
            for entry in entries:
                if isinstance(entry, RejectedRow):
                    self.reject(entry)
                else:
                    self.add(entry.facts, entry.members, entry.file, entry.row)
            self.shards.append(shard)
            self._uncommitted.clear()
        if place is not None:
            _LOG.info("%s: continuing after %s", self.output, counted(self.counts["samples"], "sample"))
        return place

    def close_shard(self, shard: Shard, after: RowPlace | None) -> None:
        """Add a complete shard; `after`: where the next row is, unless this is the last one."""
        self.shards.append(shard)
        if self.journal is not None and after is not None:
            self.journal.commit(shard, after, self._uncommitted)
        self._uncommitted.clear()

    def add(self, facts: Facts, members: Sequence[Mapping[str, Any]], file: str, row: int) -> None:
        """Add a sample of the next shard to the index, with its origin; `members` as stored there.

        Errors: `DataError` naming both rows if its key is taken.
        """
        origin = {"file": self._keys.claim(facts.key, file, row), "row": row}
        if self.journal is not None:
            self._uncommitted.append(IndexedSample(facts, members, file, row))
        self._pending.append(vars(facts) | origin | {"shard": len(self.shards), "members": members})
        if len(self._pending) >= _INDEX_BATCH:
            self._flush_index()
        self._digest.update(f"{facts.key} {facts.content_hash}\n".encode())
        self.counts["samples"] += 1
        self.counts[facts.kind] += 1
        self.counts["images"] += facts.n_images
        self.counts["shrunk"] += facts.n_shrunk
        self.sources[facts.source] += 1
        self.rows += 1

    def reject(self, rejection: RejectedRow) -> None:
        """List a row as rejected."""
        if self.journal is not None:
            self._uncommitted.append(rejection)
        self.rejections.add(rejection)
        self.rows += 1

    def check(self, max_rejected: float | None, *, weights: Mapping[str, float], licences: Mapping[str, str]) -> None:
        """Refuse a set without samples, with too many rejections, or with weights or licences of unknown sources.

        The list of a set that is refused for its rejections is kept beside the output.
        """
        rejected = self.rejections.kinds.total()
        if not self.counts["samples"]:
            raise EmptySetError(f"nothing to pack: no sample in {counted(self.rows, 'row')}{self._diagnosis()}")
        if max_rejected is not None and rejected > max_rejected * self.rows:
            raise OtherSettingsError(
                f"{rejected} of {counted(self.rows, 'row')} rejected, more than max-rejected {max_rejected:g} allows"
                f"{self._diagnosis()}{self._continue('allow more')}"
            )
        check_weights(weights)
        for what, named in (("weight", weights), ("licence", licences)):
            unknown = sorted(named.keys() - self.sources.keys())
            if unknown:
                known = ", ".join(f"'{source}'" for source in sorted(self.sources)[:8])
                raise OtherSettingsError(
                    f"{what} of '{unknown[0]}': no samples from that source: name one of {known}"
                    f"{self._continue('correct it')}"
                )

    def _continue(self, how: str) -> str:
        return f"; what is packed is kept: {how} and rerun to continue" if self.journal is not None else ""

    def _diagnosis(self) -> str:
        """Why rows were rejected, and where they are listed: beside the output, because no set is made."""
        diagnosis = self.rejections.diagnosis(self.fitting)
        if not diagnosis:
            return ""
        kept = _list_beside(self.output)
        self._list.flush()
        aside = aside_path(kept)
        shutil.copyfile(self.folder / REJECTED_NAME, aside)
        aside.replace(kept)
        return f"; {diagnosis}; every rejected row is listed in {kept}"

    def finish(self, weights: Mapping[str, float], more: Mapping[str, Any]) -> PackSummary:
        """Write the manifest, after everything else, with the further fields `more`."""
        summary = PackSummary(
            path=self.output,
            name=self.name,
            samples=self.counts["samples"],
            conversations=self.counts["conversation"],
            preferences=self.counts["preference"],
            unpaired=self.counts["desirable"] + self.counts["undesirable"],
            images=self.counts["images"],
            shrunk=self.counts["shrunk"],
            shards=len(self.shards),
            bytes=sum(shard.size for shard in self.shards),
            rejected=self.rejections.kinds.total(),
            rejected_by_kind=dict(sorted(self.rejections.kinds.items())),
            sources=dict(sorted(self.sources.items())),
            weights=dict(sorted(weights.items())),
            digest=self._digest.hexdigest(),
            diagnosis=self.rejections.diagnosis(self.fitting),
        )
        fields = asdict(summary)
        index = self.folder / INDEX_NAME
        with index.open("rb") as stream:
            index_hash = hashlib.file_digest(stream, "sha256").hexdigest()
        manifest = {
            "format": SET_FORMAT,
            **{name: fields[name] for name in fields if name not in {"path", "shards", "bytes", "diagnosis"}},
            "files": list(self._keys.files),
            "index": {"bytes": index.stat().st_size, "sha256": index_hash},
            **more,
            "shards": [_shard_entry(shard) for shard in self.shards],
        }
        (self.folder / MANIFEST_NAME).write_text(json.dumps(manifest, ensure_ascii=False, indent=1) + "\n", "utf-8")
        return summary

    def _flush_index(self) -> None:
        if self._pending:
            self._index.write_batch(pa.RecordBatch.from_pylist(self._pending, schema=INDEX_SCHEMA))
            self._pending = []


def check_weights(weights: Mapping[str, float]) -> None:
    """Refuse invalid weights. Errors: `ConfigError` naming the source."""
    for source, weight in weights.items():
        if not 0 <= weight < 1e6:  # also for NaN
            raise ConfigError(f"weight of '{source}' is {weight:g}: must be a number from 0 to 1,000,000")


def _shard_entry(shard: Shard) -> dict[str, Any]:
    place = {"path": shard.path} if shard.path else {}
    return {"name": shard.name, "samples": shard.samples, "bytes": shard.size, "sha256": shard.sha256, **place}
