"""The tail profile of a whole cache, from two small arrays of every shard; nothing else is read.

Shape suffixes: V ids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llavamod_offline.errors import CacheError
from llavamod_offline.storage.disk_cache import DiskCache
from llavamod_offline.storage.folders import Folder
from llavamod_offline.storage.zarr_rows import RowArray
from teacher_cache.format.manifest import COLUMNS_NAME, MANIFEST_NAME, SHARDS_NAME, sha256_bytes
from teacher_cache.format.tail_profile import spread
from teacher_cache.read.shard_files import VERIFY, checked_manifest

_ARRAYS = ("frequent_ids", "tail_profile")
_SHARDS_AT_ONCE = 64


def tail_sums(folder: Folder, shards: Sequence[Mapping[str, Any]], vocab_size: int) -> NDArray[np.float64]:
    """The mass of every id in the tails of all positions [V]. Errors: `CacheError` naming a missing or damaged file."""
    sums_V = np.zeros(vocab_size)
    for first in range(0, len(shards), _SHARDS_AT_ONCE):
        some = shards[first : first + _SHARDS_AT_ONCE]
        for shard, files in zip(some, _array_files(folder, some), strict=True):
            mean, frequent_F = _arrays(files, f"{folder.where}/{SHARDS_NAME}/{shard['name']}/{COLUMNS_NAME}")
            sums_V += int(shard["positions"]) * spread(mean, frequent_F, vocab_size)
    return sums_V


def mean_tail(sums_V: NDArray[np.float64]) -> Tensor | None:
    """Scale the tails' mass of every id [V] to a sum of 1, float32; None if there is none."""
    return torch.from_numpy(sums_V / sums_V.sum()).float() if sums_V.any() else None


def staged_tail_sums(
    folder: Folder, shards: Sequence[Mapping[str, Any]], vocab_size: int, *, digest: str, staging: DiskCache
) -> NDArray[np.float64]:
    """The same for a remote cache, kept on this machine under the cache's `digest`."""

    def fill(aside: Path) -> None:
        tail_sums(folder, shards, vocab_size).astype("<f8").tofile(aside / "sums")

    with staging.hold(f"tail-{digest}", 8 * vocab_size, fill) as unit:
        sums_V: NDArray[np.float64] = np.fromfile(unit / "sums", "<f8")
    return sums_V


def _array_files(folder: Folder, shards: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, bytes]]:
    """The arrays' files of each shard, by their names within the columns."""
    folders = [f"{SHARDS_NAME}/{shard['name']}" for shard in shards]
    manifests = [
        checked_manifest(content, f"{folder.where}/{place}/{MANIFEST_NAME}", shard)
        for content, place, shard in zip(
            _read(folder, [f"{place}/{MANIFEST_NAME}" for place in folders]), folders, shards, strict=True
        )
    ]
    prefixes = tuple(f"{COLUMNS_NAME}/{array}/" for array in _ARRAYS)
    names = [[name for name in manifest["files"] if name.startswith(prefixes)] for manifest in manifests]
    wanted = [f"{place}/{name}" for place, some in zip(folders, names, strict=True) for name in some]
    contents = iter(_read(folder, wanted))
    for place, some, manifest in zip(folders, names, manifests, strict=True):
        files = {}
        for name in some:
            content = next(contents)
            if sha256_bytes(content) != manifest["files"][name]["sha256"]:
                raise CacheError(f"{folder.where}/{place}/{name}: damaged (wrong checksum): {VERIFY}")
            files[name.removeprefix(f"{COLUMNS_NAME}/")] = content
        yield files


def _read(folder: Folder, names: list[str]) -> list[bytes]:
    try:
        return folder.read_all(names)
    except FileNotFoundError as error:
        raise CacheError(f"{error.filename or folder.where}: missing: {VERIFY}") from error


def _arrays(files: Mapping[str, bytes], where: str) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    try:
        frequent, mean = (_row(files, name) for name in _ARRAYS)
    except Exception as error:  # a damaged file may raise anything
        raise CacheError(f"{where}: cannot be read: {error}: {VERIFY}") from error
    return mean, frequent.astype(np.int32)


def _row(files: Mapping[str, bytes], name: str) -> NDArray[Any]:
    array = RowArray.parse(files[f"{name}/zarr.json"])
    content = files.get(f"{name}/{array.file}")
    row: NDArray[Any] = array.read(None if content is None else BytesIO(content), 0, 1)[0]
    return row
