"""`cache-teacher retry`: capture the failed shards and the rejected sequences of a cache again, and nothing else.

A shard that fails again stays listed as failed. Rejected sequences are tried alone first; if some of a shard's can be
captured now, the whole shard is captured and replaced, since its files belong together: the result is that of a capture
that never rejected them. An interrupted retry leaves a cache that `work` or `run` continues.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from llavamod_offline.config import load_config
from llavamod_offline.errors import CacheError, ConfigError, LlavaModError, first_line
from llavamod_offline.progress import ProgressBar
from llavamod_offline.signals import keeping
from llavamod_offline.storage.folders import open_folder
from llavamod_offline.storage.lock import locked
from teacher_cache.capture.pipeline import capture_shards
from teacher_cache.capture.rejection_limit import Rejected
from teacher_cache.capture.shard import capture_rows
from teacher_cache.capture.summary import Summary, Tally
from teacher_cache.capture_setup import CaptureSetup, follow_template, prepare_capture
from teacher_cache.config import CacheTeacherConfig
from teacher_cache.engines.protocol import CaptureEngine
from teacher_cache.fingerprint import check_allowed
from teacher_cache.format.manifest import REJECTED_NAME, SHARDS_NAME
from teacher_cache.read.cache_file import check_folder
from teacher_cache.work.claims import clear_claims, histories, read_endings
from teacher_cache.work.heartbeat import check_no_workers, read_present
from teacher_cache.work.journal import read_counts
from teacher_cache.work.run import SETTINGS_NAME
from teacher_cache.write.store import CacheStore, begun_fingerprint

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retried:
    """What a retry did: the shards that had failed, those that fail again with the reason, and how many of the
    rejected sequences it tried could be captured now."""

    capture: Summary
    failed_before: list[str]
    failed: dict[str, str]
    rejected_before: int
    recovered: int


def retry_config(output: str, files: Sequence[Path], overrides: Sequence[str]) -> CacheTeacherConfig:
    """The settings that a cache's workers left, if any, overridden by files and `overrides`.

    Errors: `CacheError` if the folder does not exist; `ConfigError`, also if nothing says where data and teacher are.
    """
    folder = open_folder(output)
    check_folder(folder)
    (stored,) = read_present(folder, [SETTINGS_NAME])
    with tempfile.TemporaryDirectory(prefix="cache-teacher-retry-") as scratch:
        own = []
        if stored is not None:
            own.append(Path(scratch) / "settings.yaml")
            own[0].write_bytes(stored)
        try:
            return load_config(CacheTeacherConfig, [*own, *files], [*overrides, f"output={output}"])
        except ConfigError as error:
            if own:
                raise
            raise ConfigError(f"{error} (only `work` leaves its settings in a cache; {output} has none)") from error


def retry(
    config: CacheTeacherConfig,
    *,
    allow: Sequence[str] = (),
    load: Callable[[CaptureSetup], CaptureEngine] = CaptureSetup.load,
) -> Retried:
    """Capture failed shards and rejected sequences again, with settings that the fingerprint allows.

    Errors: `ConfigError` while workers or another command write the cache; `CacheError` if there is none, or one with
    other settings; others as `run_capture`.
    """
    if config.output_set is not None or config.engine.ray or config.part != (0, 1):
        raise ConfigError("retry runs in one process: remove output_set, engine.ray and slice")
    tally = Tally(Rejected())
    about = begun_fingerprint(config.output)
    if about is None:
        raise CacheError(f"cache '{config.output}': no capture was begun there: check the path")
    setup = prepare_capture(**follow_template(config.setup_values, about))
    check_allowed(allow, setup.fingerprint)
    store = CacheStore.open(config.output, setup.fingerprint, setup.samples.shard_names, allow=allow)
    if not any(_left(store)) and store.complete:
        return Retried(tally.summary(store, config.output), [], {}, 0, 0)  # nothing is written, not even a lock
    with locked(config.output), keeping(lambda: store.kept):
        check_no_workers(config.output)
        return _retry(setup, store, config.output, load, tally)


def _retry(
    setup: CaptureSetup, store: CacheStore, output: str, load: Callable[[CaptureSetup], CaptureEngine], tally: Tally
) -> Retried:
    """Capture what is left; see `retry`."""
    names, rejected = _left(store)
    failed: dict[str, str] = {}
    recovered = 0
    if names or rejected:
        engine = load(setup)
        store.start()
        total = sum(len(setup.samples.rows_of(name)) for name in names) + sum(map(len, rejected.values()))
        with ProgressBar("retry", total, "sample", also="positions") as bar:

            def note(name: str, error: Exception) -> None:
                if not isinstance(error, LlavaModError | OSError):
                    raise error
                failed[name] = f"{type(error).__name__}: {first_line(error)}"

            shards = capture_shards(setup, engine, store, names, bar.advance, failed=note)
            with closing(shards):
                for done in shards:
                    tally.add(done.sequences, done.positions, done.rejected, done.seconds, done.waited)
            captured = [name for name in names if name not in failed]
            clear_claims(store.folder, captured, histories(store.folder))
            for name, keys in rejected.items():
                recovered += _recover(setup, engine, store, name, keys, tally)
                bar.advance(len(keys))
    return Retried(
        capture=tally.summary(store, output),
        failed_before=names,
        failed=failed,
        rejected_before=sum(map(len, rejected.values())),
        recovered=recovered,
    )


def _left(store: CacheStore) -> tuple[list[str], dict[str, set[tuple[str, str]]]]:
    """The shards that failed or whose workers died, and the rejected sequences of each shard that has any."""
    missing, there = store.missing(), histories(store.folder)
    failing = {name: there[name] for name in missing if name in there}
    read_endings(store.folder, failing)
    lacking = set(missing)
    names: list[str] = store.job["shards"]
    return (
        [name for name, history in failing.items() if history.failures or history.is_held],
        _rejected(store, [name for name in names if name not in lacking]),
    )


def _rejected(store: CacheStore, names: list[str]) -> dict[str, set[tuple[str, str]]]:
    """Key and role of the rejected sequences of each committed shard that has any."""
    counts = read_counts(store.folder, names)
    some = [name for name, count in zip(names, counts, strict=True) if count.rejected]
    contents = store.folder.read_all(f"{SHARDS_NAME}/{name}/{REJECTED_NAME}" for name in some)
    found = {}
    for name, content in zip(some, contents, strict=True):
        rows = [json.loads(line) for line in content.splitlines()]
        found[name] = {(str(row["key"]), str(row["role"])) for row in rows}
    return found


def _recover(
    setup: CaptureSetup,
    engine: CaptureEngine,
    store: CacheStore,
    name: str,
    rejected: set[tuple[str, str]],
    tally: Tally,
) -> int:
    """Try rejected sequences alone; if any can be captured now, capture their shard and replace it."""
    rows = sorted({setup.samples.row_of(key) for key, _ in rejected})
    found, _ = capture_rows(setup, engine, rows)
    if not rejected & {(item.key, item.role) for item in found}:
        return 0
    captured, left = capture_rows(setup, engine, setup.samples.rows_of(name))
    lost = {(item.key, item.role) for item in left} - rejected
    if lost:
        key, role = min(lost)
        _LOG.warning(
            "shard %s: kept as it was: %d sequences that it holds would be rejected now, first '%s' (%s)",
            *(name, len(lost), key, role),
        )
        return 0
    store.replace(name, captured, left, setup.codec)
    tally.add(len(captured), sum(len(item.records) for item in captured), left)
    return len(rejected - {(item.key, item.role) for item in left})
