"""The hidden folder in which a set grows until it is complete; packing that was stopped or killed continues there.

.NAME.packing/            beside the set
  SHARD.tar               …
  journal/job.json        what is packed, and how: with other files or settings, packing starts anew
  journal/SHARD.jsonl     written when SHARD.tar is complete: the shard and where the next row is, then its rows
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llavamod_offline.data.pack.prepare import Facts
from llavamod_offline.data.pack.process_map import WorkerLostError
from llavamod_offline.data.rows import RejectedRow, RowPlace
from llavamod_offline.data.sets.tar_files import Shard
from llavamod_offline.errors import ConfigError, LlavaModError, StorageError
from llavamod_offline.storage import atomic

_LOG = logging.getLogger(__name__)
_JOURNAL, _JOB = "journal", "job.json"


@dataclass(frozen=True)
class IndexedSample:
    """A sample as the index has it; `members`: as in its shard."""

    facts: Facts
    members: Sequence[Mapping[str, Any]]
    file: str
    row: int


Entry = IndexedSample | RejectedRow
CanUse = Callable[[str], bool]


class OtherSettingsError(ConfigError):
    """The set cannot be finished with these settings, but what is packed can be, with others."""


_PASSING = (WorkerLostError, StorageError, OtherSettingsError)


class PackJournal:
    """What has been written of a set, shard by shard."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / _JOURNAL
        self.shards = 0

    def commit(self, shard: Shard, after: RowPlace, entries: Sequence[Entry]) -> None:
        """Keep a complete shard with the samples and the rejections since the previous one."""
        atomic.fsync_path(self._folder.parent / f"{shard.name}.tar")
        lines = [json.dumps({"shard": asdict(shard), "after": asdict(after)})]
        lines += map(_line, entries)
        atomic.write_file(self._folder / f"{shard.name}.jsonl", "\n".join(lines) + "\n")
        self.shards += 1

    def finished(self) -> Iterator[tuple[Shard, RowPlace, list[Entry]]]:
        """The shards that are there, in order, each with where the next row is, and its entries."""
        for file in sorted(self._folder.glob("*.jsonl")):
            head, *lines = map(json.loads, file.read_text("utf-8").splitlines())
            self.shards += 1
            yield Shard(**head["shard"]), RowPlace(**head["after"]), [_entry(line) for line in lines]


@contextmanager
def work_folder(output: Path, job: Mapping[str, Any], can_use: CanUse) -> Iterator[Path]:
    """Yield the folder in which `job` is packed; it becomes `output` when the block ends.

    What an earlier pack of the same job has finished is there, up to the first shard that lacks an image which can be
    used by now, and nothing else. If the block ends with a user's error, which would recur, everything is removed;
    otherwise, as when a server is away, or other settings would do (`OtherSettingsError`), what is finished stays.
    """
    work = work_path(output)
    journal, content = work / _JOURNAL, json.dumps(job, sort_keys=True)
    if not (journal / _JOB).is_file() or (journal / _JOB).read_text("utf-8") != content:
        if work.exists():
            _LOG.info("%s: what was begun there was of other files or settings: starting anew", output)
            shutil.rmtree(work)
        journal.mkdir(parents=True)
        atomic.write_file(journal / _JOB, content)
    files = sorted(journal.glob("*.jsonl"))
    outdated = next((place for place, file in enumerate(files) if _lacks_what(file, can_use)), len(files))
    for file in files[outdated:]:
        file.unlink()
    finished = {file.stem for file in files[:outdated]}
    for path in work.iterdir():
        if path != journal and path.stem not in finished:
            path.unlink()
    try:
        yield work
        atomic.fsync_tree(work)
        displaced = atomic.aside_path(work)
        journal.rename(displaced)
        work.rename(output)
        atomic.fsync_path(output.parent)
    except BaseException as error:
        passing = isinstance(error, _PASSING) or isinstance(error.__cause__, OSError)
        if (isinstance(error, LlavaModError) and not passing) or not any(journal.glob("*.jsonl")):
            shutil.rmtree(work, ignore_errors=True)
        raise
    shutil.rmtree(displaced, ignore_errors=True)


def _lacks_what(journal_file: Path, can_use: CanUse) -> bool:
    """Whether a row of a finished shard was rejected for an image that can be used by now."""
    entries = (json.loads(line) for line in journal_file.read_text("utf-8").splitlines() if '"RejectedRow"' in line)
    for row in (entry["RejectedRow"] for entry in entries if "RejectedRow" in entry):
        if row["image"] and can_use(row["image"]):
            _LOG.info("image '%s', which was rejected, can be used now: packing again from its shard on", row["image"])
            return True
    return False


def work_path(output: Path) -> Path:
    """The folder in which a set is packed."""
    return output.with_name(f".{output.name}.packing")


def _line(entry: Entry) -> str:
    fields = vars(entry)  # `asdict` would take as long as everything else in packing a small sample
    if isinstance(entry, IndexedSample):
        fields = fields | {"facts": vars(entry.facts)}
    return json.dumps({type(entry).__name__: fields})


def _entry(line: dict[str, Any]) -> Entry:
    if "RejectedRow" in line:
        return RejectedRow(**line["RejectedRow"])
    fields = line["IndexedSample"]
    return IndexedSample(**{**fields, "facts": Facts(**fields["facts"])})
