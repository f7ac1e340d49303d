"""`cache-teacher verify`: recompute every checksum, decode everything, and list any damage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llavamod_offline.errors import CacheError
from llavamod_offline.progress import track
from llavamod_offline.storage.folders import Folder, LocalFolder, open_folder
from teacher_cache.format.manifest import (
    CACHE_NAME,
    COUNTS,
    JOB_NAME,
    MANIFEST_NAME,
    REJECTED_NAME,
    SEQUENCES_NAME,
    SHARDS_NAME,
    cache_content,
    canonical,
    content_entry,
    job_content,
    parse_object,
    shard_entry,
)
from teacher_cache.format.sequences import SequenceRows
from teacher_cache.read.cache_file import check_folder
from teacher_cache.read.key_index import SequenceIndex
from teacher_cache.verify.shard_check import ShardCheck


@dataclass(frozen=True)
class CacheVerdict:
    """The result of `verify`. `digest` is recomputed from the bytes on disk; `damage` lists every problem."""

    ok: bool
    shards: int
    sequences: int
    positions: int
    digest: str
    damage: list[str]


@dataclass
class Findings:
    """Everything about a cache, finished or not. Names are relative to the cache.

    `cache` and `job`: the contents of these files if sound; `found`: what cache.json should contain, given the existing
    files; `damaged`: the names of damaged shards; `strays`: files that do not belong in `shards/`.
    """

    finished: bool
    cache: dict[str, Any] | None
    job: dict[str, Any] | None
    found: dict[str, Any] = field(default_factory=dict)
    damage: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)


def verify_cache(where: Path | str) -> CacheVerdict:
    """Check every byte and number of a finished cache, by path or URL, without changing anything.

    Errors: `CacheError` if the cache is missing or unfinished; damage is reported, not raised. `StorageError` if
    a bucket cannot be read.
    """
    return verdict_of(examine(open_folder(where)))


def verdict_of(findings: Findings) -> CacheVerdict:
    """Summarise findings."""
    totals = findings.found["totals"]
    return CacheVerdict(
        ok=not findings.damage,
        shards=len(findings.found["shards"]),
        sequences=totals["sequences"],
        positions=totals["positions"],
        digest=findings.found["digest"],
        damage=findings.damage,
    )


def examine(folder: Folder, *, unfinished: bool = False) -> Findings:
    """Examine all files of a cache. Errors: `CacheError` if it is missing, or unfinished and that is not allowed."""
    check_folder(folder)
    names = folder.names()
    if not names & {CACHE_NAME, JOB_NAME}:
        raise CacheError(f"cache '{folder.where}': {CACHE_NAME} is missing, so it is not a cache: check the path")
    if not (unfinished or CACHE_NAME in names):
        raise CacheError(f"cache '{folder.where}': {CACHE_NAME} is missing: rerun `cache-teacher run` to finish it")
    findings = Findings(CACHE_NAME in names, *_small_files(folder))
    if findings.finished and findings.cache is None:
        findings.damage.append(f"{CACHE_NAME}: damaged (wrong digest)")
    there = _shards_there(folder)
    said = {str(shard["name"]): shard for shard in findings.cache["shards"]} if findings.cache else {}
    expected = list(said) or list((findings.job or {}).get("shards", sorted(there)))
    for name in sorted(there - set(expected)):
        findings.strays.append(f"{SHARDS_NAME}/{name}")
    shards = []
    rows: dict[str, SequenceRows] = {}
    for name in track(expected, "verify", "shard"):
        if not findings.finished and name not in there:
            continue  # not captured yet
        manifest = said[name]["files"][MANIFEST_NAME]["sha256"] if name in said else None
        with folder.copied(f"{SHARDS_NAME}/{name}") as copy:
            check = ShardCheck(copy, name, manifest)
        if check.rows is not None:
            rows[name] = check.rows
        findings.strays += [f"{SHARDS_NAME}/{name}/{file}" for file in check.strays]
        entry: dict[str, Any] = {"name": name, "bytes": 0, "files": {}, **dict.fromkeys(COUNTS, 0)}
        if check.manifest is not None:
            try:
                entry = shard_entry(name, check.content, check.manifest)
            except (KeyError, TypeError) as error:
                check.problems.append(f"{MANIFEST_NAME}: cannot be used: {error!r}")
        if not check.problems and name in said and said[name] != entry:
            check.problems.append(f"{MANIFEST_NAME}: differs from {CACHE_NAME}")
        shards.append(entry)
        _add(findings, name, check.problems)
    for name, problem in _twice(rows):
        _add(findings, name, [problem])
    findings.damage += [f"{stray}: not part of the cache" for stray in findings.strays]
    _beside(folder, findings, shards)
    return findings


def _add(findings: Findings, shard: str, problems: Iterable[str]) -> None:
    lines = [f"{SHARDS_NAME}/{shard}/{problem}" for problem in problems]
    findings.damage += lines
    if lines and shard not in findings.damaged:
        findings.damaged.append(shard)


def _small_files(folder: Folder) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """cache.json and job.json if sound: in canonical form, with correct digest and checksum."""
    contents: dict[str, bytes] = {}
    parsed: dict[str, dict[str, Any]] = {}
    for name in (CACHE_NAME, JOB_NAME):
        try:
            contents[name] = folder.read(name)
            parsed[name] = parse_object(contents[name], name, way_out="")
        except (CacheError, OSError):
            continue  # damaged or missing: the caller reports it
        if canonical(parsed[name]) != contents[name]:
            del parsed[name]
    cache, job = parsed.get(CACHE_NAME), parsed.get(JOB_NAME)
    try:
        if cache is not None and cache != cache_content(cache, cache["shards"], cache["files"]):
            cache = None
        if cache is not None and job is not None and content_entry(contents[JOB_NAME]) != cache["files"][JOB_NAME]:
            job = None
        if job is not None and job != job_content(job["fingerprint"], job["shards"]):
            job = None
    except (KeyError, TypeError, AttributeError):  # correct checksums of content that no run writes
        return None, job
    return cache, job


def _beside(folder: Folder, findings: Findings, shards: list[dict[str, Any]]) -> None:
    """Check the files beside the shards, and assemble what cache.json should contain."""
    files = {}
    for name in (JOB_NAME, REJECTED_NAME):
        try:
            files[name] = content_entry(folder.read(name))
        except FileNotFoundError:
            if findings.finished or name == JOB_NAME:
                findings.damage.append(f"{name}: missing")
            continue
        said = findings.cache["files"].get(name) if findings.cache else None
        if said not in (None, files[name]) or (name == JOB_NAME and findings.job is None):
            findings.damage.append(f"{name}: damaged")
    job = findings.job or findings.cache or {"fingerprint": {}}
    findings.found = cache_content(job, shards, files)
    if findings.cache is not None and findings.found["digest"] != findings.cache["digest"] and not findings.damage:
        findings.damage.append(f"{CACHE_NAME}: its digest does not match the files")


def _twice(rows: dict[str, SequenceRows]) -> Iterator[tuple[str, str]]:
    names = list(rows)
    index = SequenceIndex(list(rows.values()))
    for row in index.repeated():
        shard, local = index.place(row)
        entry = rows[names[shard]].sequence(local)
        yield names[shard], f"{SEQUENCES_NAME}: '{entry.key}' ({entry.role}) is in the cache twice"


def _shards_there(folder: Folder) -> set[str]:
    """The names directly below `shards/` that are not hidden."""
    if isinstance(folder, LocalFolder):
        below = LocalFolder(folder.path / SHARDS_NAME).names()
    else:
        below = {name.partition("/")[0] for name in folder.sizes(SHARDS_NAME)}
    return {name for name in below if not name.startswith(".")}
