"""Index existing WebDataset tars as a set that reads them in place (its files: see `sample_set.py`).

Each tar is read once, from its first byte to its last (one behind a URL is downloaded, and the copy removed); images
are decoded, and samples checked and hashed, as in packing. A sample has one of the formats in `members.py`, with its
images beside its text: one `jpg`, `jpeg`, `png` or `webp`, or several as `0.jpg`, `1.png`… in order. Beside a caption,
a JSON file without a sample is ignored. Everything else goes to `rejected.jsonl`; `row` counts the members of a tar
from 0.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from llavamod_offline.data.keys import key_from_id
from llavamod_offline.data.pack.prepare import Facts
from llavamod_offline.data.pack.process_map import map_in_order
from llavamod_offline.data.pack.set_writer import PackSummary, SetWriter, check_weights, new_set
from llavamod_offline.data.rows import RejectedRow, RowError
from llavamod_offline.data.sample import KEY_PATTERN
from llavamod_offline.data.sets.tar_files import Shard
from llavamod_offline.data.sources.system_files import is_system_name
from llavamod_offline.data.tars.tar_reader import TarGroup, TarReader
from llavamod_offline.data.tars.tar_samples import ReadRule, read_group
from llavamod_offline.errors import DataError, StorageError
from llavamod_offline.grace import Grace
from llavamod_offline.storage.disk_cache import scratch
from llavamod_offline.storage.remote import RemoteFolder, Wanted
from llavamod_offline.storage.remote_file import Place, RemoteFile
from llavamod_offline.storage.walk import absence, is_utf8, walk_files

TarKeyRule = Literal["member", "shard"]
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")


@dataclass(frozen=True)
class TarSource:
    """A tar; `name` is the `source` of its samples (default: the name of its folder)."""

    path: Place
    name: str = ""


@dataclass(frozen=True)
class _Found:
    """A sample of a tar, its row, and its files as listed in the index."""

    facts: Facts
    row: int
    members: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class _Tar:
    """The contents of a tar, in order."""

    path: Place
    size: int
    sha256: str
    rows: tuple[_Found | RejectedRow, ...]


def index_tars(
    tars: Sequence[TarSource],
    output: Path,
    *,
    keys: TarKeyRule = "member",
    caption_prompt: str | None = None,
    ignore: Sequence[str] = (),
    overwrite: bool = False,
    max_rejected: float | None = None,
    weights: Mapping[str, float] | None = None,
    licences: Mapping[str, str] | None = None,
    workers: int = 1,
    advance: Callable[[int], object] = lambda size: None,
    grace: Grace | None = None,
) -> PackSummary:
    """Make the set folder `output` from the samples in `tars`, which stay unchanged.

    Tars below the folder that holds `output` are stored by relative path, so that both can be moved together; others by
    absolute path or URL. `keys`: the members' key (as `key_from_id` writes it), or the same prefixed with the tar's
    name, for tars that share keys. `caption_prompt`: the prompt of captions; without it they are rejected. `ignore`:
    suffixes of members to ignore. `workers`: processes, each of which reads one tar at a time. `grace`: on SIGTERM,
    decides whether the whole set is finished; part of one cannot be kept.
    Errors: as `write_set`, and `DataError` if a tar is not a file, given twice, or in `output`.
    """
    weights = weights or {}
    check_weights(weights)
    names = _shard_names(tars)
    inside = next((tar.path for tar in tars if isinstance(tar.path, Path) and _is_below(tar.path, output)), None)
    if inside is not None:
        raise DataError(f"source '{inside}': lies in the output, which would replace it: choose another output")
    reader = _TarIndexer(keys, ReadRule.of(caption_prompt, ignore))
    hint = "rename one of them" if keys == "shard" else "prefix the keys with the tars' names by --keys shard"
    with new_set(output, None, overwrite=overwrite, duplicate_hint=hint) as writer:
        with writer:
            jobs = list(zip(tars, names, strict=True))
            grace = grace or Grace()
            grace.begin("the set", len(jobs))
            for (_, name), tar in zip(jobs, map_in_order(reader, jobs, workers=workers, chunk=1), strict=True):
                _add(writer, name, tar)
                advance(tar.size)
                grace.advance(1)
            writer.check(max_rejected, weights=weights, licences=licences or {})
        more: dict[str, Any] = {} if caption_prompt is None else {"caption_prompt": caption_prompt}
        return writer.finish(weights, more | ({"licences": dict(sorted(licences.items()))} if licences else {}))


def find_tars(places: Sequence[Place], name: str = "") -> list[TarSource]:
    """The tars at `places`, files or folders; tars below a folder are sorted by path. Links to folders are followed.

    Errors: `DataError` if a folder holds no tar, a compressed one, or a broken link.
    """
    found: list[TarSource] = []
    for place in places:
        if isinstance(place, RemoteFile):
            found += [TarSource(tar, name) for tar in ([place] if place.suffix else _remote_tars(place))]
        else:
            found += [TarSource(tar, name) for tar in (_tars(place) if place.is_dir() else [place])]
    return found


def _remote_tars(folder: RemoteFile) -> list[RemoteFile]:
    names = sorted(RemoteFolder(folder.url).sizes())
    packed = next((name for name in names if name.lower().endswith(_COMPRESSED)), None)
    if packed is not None:
        raise DataError(f"source '{folder}': '{packed}' is compressed, which rules out reading by position: unpack it")
    found = [RemoteFile(f"{folder.url.rstrip('/')}/{name}") for name in names if name.endswith(".tar")]
    if not found:
        raise DataError(f"source '{folder}': no .tar in this folder, or it cannot be listed: name its tars one by one")
    return found


def _tars(folder: Path) -> list[Path]:
    try:
        paths = [folder / name for name in walk_files(folder, is_system_name)]
    except OSError as error:
        raise DataError(f"source '{error.filename or folder}': cannot be read: {error.strerror}") from error
    for path in paths:
        if not path.exists():
            raise DataError(f"source '{path}': {absence(path)}: remove it, or restore what it leads to")
        if path.name.lower().endswith(_COMPRESSED):
            raise DataError(f"source '{path}': is compressed, which rules out reading by position: unpack it")
    found = sorted(path for path in paths if path.suffix == ".tar")
    if not found:
        raise DataError(f"source '{folder}': no .tar in this folder")
    return found


def _add(writer: SetWriter, name: str, tar: _Tar) -> None:
    samples = 0
    for row in tar.rows:
        if isinstance(row, RejectedRow):
            writer.reject(row)
        else:
            writer.add(row.facts, row.members, str(tar.path), row.row)
            samples += 1
    if samples:
        shard = Shard(name, samples, tar.size, tar.sha256, _path_from(writer.output, tar.path))
        writer.close_shard(shard, None)


def _path_from(output: Path, tar: Place) -> str:
    if isinstance(tar, RemoteFile):
        return tar.url
    tar, folder = tar.resolve(), output.resolve()
    return Path(os.path.relpath(tar, folder)).as_posix() if tar.is_relative_to(folder.parent) else str(tar)


def _is_below(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())


def _shard_names(tars: Sequence[TarSource]) -> list[str]:
    """A unique name for each tar: its stem or, if that is ambiguous, its path below their common folder."""
    seen: dict[str, Place] = {}
    for place in (tar.path for tar in tars):
        if isinstance(place, Path) and not place.is_file():
            raise DataError(f"source '{place}': {absence(place)}")
        if not is_utf8(str(place)):
            raise DataError(f"source {str(place)!a}: its name is not UTF-8: rename it")
        if isinstance(place, RemoteFile) and place.suffix != ".tar":
            raise DataError(f"source '{place}': its name must end in .tar; a compressed tar must be unpacked")
        where = str(place.resolve()) if isinstance(place, Path) else f"/{urlsplit(place.url).netloc}{_path_of(place)}"
        if where in seen:
            raise DataError(f"source '{place}' is given twice: remove one")
        seen[where] = place
    paths = [Path(where).with_suffix("") for where in seen]
    if len({path.name for path in paths}) < len(paths):
        common = Path(os.path.commonpath(paths))
        names = [key_from_id(path.relative_to(common).as_posix()) for path in paths]
    else:
        names = [key_from_id(path.name) for path in paths]
    long = next((path for path, name in zip(paths, names, strict=True) if not KEY_PATTERN.fullmatch(name)), None)
    if long is not None:
        raise DataError(f"source '{long}.tar': its name is too long: rename it")
    return names


def _path_of(tar: RemoteFile) -> str:
    return urlsplit(tar.url).path


@contextmanager
def _on_disk(tar: Place) -> Iterator[Path]:
    """The tar itself, or a copy of a remote one while in the context. Errors: `StorageError`."""
    if isinstance(tar, Path):
        yield tar
        return
    folder, name = tar.parts()
    size = tar.size()
    with scratch() as there:
        if folder.fetch([Wanted(name, there / "tar", size)]):
            raise StorageError(f"{tar}: the copy does not have its {size} bytes: check the network and try again")
        yield there / "tar"


class _TarIndexer:
    """Reads tars; picklable."""

    def __init__(self, keys: TarKeyRule, rule: ReadRule) -> None:
        self._keys, self._rule = keys, rule

    def __call__(self, jobs: list[tuple[TarSource, str]]) -> list[_Tar]:
        return [self._read(source, name) for source, name in jobs]

    def _read(self, source: TarSource, name: str) -> _Tar:
        with _on_disk(source.path) as path:
            return self._read_at(path, source, name)

    def _read_at(self, path: Path, source: TarSource, name: str) -> _Tar:
        reader = TarReader(path)
        file = str(source.path)
        rows: list[tuple[str, _Found | RejectedRow]] = []  # with the key in the tar
        try:
            for group in reader.groups():
                rows.append((group.key, self._row(group, source, name)))
        except OSError as error:
            raise DataError(f"source '{file}': cannot be read: {error.strerror or error}") from error
        times = Counter(key for key, _ in rows)
        outcomes = [
            row if times[key] == 1 else RejectedRow(_row_key(row), "bad member", _apart(key), file, row.row)
            for key, row in rows
        ]
        if reader.problem is not None:
            outcomes.append(RejectedRow(name, reader.problem.kind, str(reader.problem), file, reader.rows))
        return _Tar(source.path, reader.size, reader.sha256, tuple(outcomes))

    def _row(self, group: TarGroup, source: TarSource, shard: str) -> _Found | RejectedRow:
        key = key_from_id(group.key)
        try:
            if group.problem is not None:
                raise group.problem
            place = source.path
            folder = place.resolve().parent.name if isinstance(place, Path) else Path(_path_of(place)).parent.name
            folder = folder or urlsplit(str(place)).netloc
            _checked(group.key if KEY_PATTERN.fullmatch(group.key) else key)
            sample, parser, members = read_group(group, key, source.name or folder, self._rule)
            if parser == "sample" and KEY_PATTERN.fullmatch(group.key):
                key = group.key  # our own tars hold keys in their final form
            key = _checked(f"{shard}-{key}" if self._keys == "shard" else key)
            if source.name:
                sample = replace(sample, source=source.name)
            entries = ({"name": m.suffix, "offset": m.offset, "size": len(m.content)} for m in members)
            return _Found(Facts.of(replace(sample, key=key), parser=parser), group.row, tuple(entries))
        except RowError as error:
            return RejectedRow(key[:400], error.kind, str(error), str(source.path), group.row)


def _checked(key: str) -> str:
    if not KEY_PATTERN.fullmatch(key):
        raise RowError("malformed row", f"key of {len(key)} characters, more than 200: rename its members")
    return key


def _row_key(row: _Found | RejectedRow) -> str:
    return row.key if isinstance(row, RejectedRow) else row.facts.key


def _apart(key: str) -> str:
    return f"members of '{key}' are not adjacent in the tar, so they may belong to different samples"
