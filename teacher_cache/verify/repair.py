"""`cache-teacher verify --repair`: remove damaged shards, so that `cache-teacher run` captures just those again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llavamod_offline.errors import CacheError
from llavamod_offline.plural import counted
from llavamod_offline.storage.folders import Folder, open_folder
from llavamod_offline.storage.lock import check_unlocked, locked
from teacher_cache.format.manifest import (
    CACHE_NAME,
    JOB_NAME,
    MANIFEST_NAME,
    REJECTED_NAME,
    SHARDS_NAME,
    canonical,
    job_content,
    sha256_bytes,
    way_to_finish,
)
from teacher_cache.verify.cache import Findings, examine
from teacher_cache.work.claims import clear_claims, histories
from teacher_cache.work.heartbeat import check_no_workers


@dataclass(frozen=True)
class Repair:
    """The result of a repair; names are relative to the cache.

    `finish`: the command that finishes the cache.
    `shards`: those that a run must capture, including those never captured; `left`: other files in the folder,
    untouched.
    """

    damage: list[str]
    restored: list[str]
    removed: list[str]
    left: list[str]
    shards: list[str]
    finish: str


def repair_cache(where: Path | str) -> Repair:
    """Remove a cache's damaged shards, what depends on them, leftovers of killed writers and strays in `shards/`.

    Restores a damaged `job.json` from `cache.json`.
    Errors: `ConfigError` while a run writes the cache; `CacheError` if the cache is missing or cannot be written, or
    both `job.json` and `cache.json` are damaged.
    """
    check_unlocked(where)
    findings = examine(open_folder(where), unfinished=True)
    with locked(where):
        check_no_workers(where)
        return _repair(open_folder(where), findings)


def _repair(folder: Folder, findings: Findings) -> Repair:
    """Remove and restore what the findings say; see `repair_cache`."""
    restored, removed = [], []
    try:
        if findings.job is None:
            if findings.cache is None:
                raise CacheError(
                    f"{folder.where}/{JOB_NAME}: damaged or missing, and so is {CACHE_NAME}, from which it could be "
                    "restored: put back a copy of either, or remove the folder and rerun"
                )
            job = job_content(findings.cache["fingerprint"], [shard["name"] for shard in findings.cache["shards"]])
            if sha256_bytes(canonical(job)) != findings.cache["files"][JOB_NAME]["sha256"]:
                raise CacheError(
                    f"{folder.where}/{JOB_NAME}: damaged, and {CACHE_NAME} does not match it: put back a copy, or "
                    "remove the folder and rerun"
                )
            folder.write(JOB_NAME, canonical(job))
            findings.job = job
            restored.append(JOB_NAME)
        names = folder.names()
        strays = set(findings.strays)
        if any(line.partition(":")[0] not in {*strays, JOB_NAME} for line in findings.damage):
            # cache.json first: without it the cache counts as unfinished
            for name in (CACHE_NAME, REJECTED_NAME):
                if name in names:
                    folder.remove_files([name])
                    removed.append(name)
        for name in [f"{SHARDS_NAME}/{shard}" for shard in findings.damaged] + findings.strays:
            if not any(name.startswith(f"{other}/") for other in removed):
                folder.remove(name, MANIFEST_NAME)
                removed.append(name)
        clear_claims(folder, findings.damaged, histories(folder))  # failures before do not count against the next try
        for name in (JOB_NAME, CACHE_NAME, REJECTED_NAME, f"{SHARDS_NAME}/*"):
            removed += folder.clear_leftovers(name)
    except OSError as error:
        raise CacheError(f"{folder.where}: cannot be repaired: {error.strerror or error}") from error
    own = {CACHE_NAME, JOB_NAME, REJECTED_NAME, SHARDS_NAME}
    there = {shard["name"] for shard in findings.found["shards"]} - set(findings.damaged)
    return Repair(
        damage=findings.damage,
        restored=restored,
        removed=removed,
        left=sorted(name for name in names - own if not name.startswith(".")),
        shards=[name for name in findings.job["shards"] if name not in there],
        finish=way_to_finish(findings.job["fingerprint"]),
    )


def repair_lines(where: str, done: Repair) -> list[str]:
    """A repair as lines of text."""
    lines = [f"found: {problem}" for problem in done.damage]
    lines += [f"restored: {name}" for name in done.restored]
    lines += [f"removed: {name}" for name in done.removed]
    lines += [f"left alone, not part of the cache: {name}" for name in done.left]
    if done.shards or CACHE_NAME in done.removed:
        rest = f"{CACHE_NAME} and {REJECTED_NAME}"
        missing = f"{counted(len(done.shards), 'missing shard')}, {rest}" if done.shards else rest
        return [*lines, f"{where}: run {done.finish} to write {missing}"]
    return [*lines, f"{where}: intact"]
