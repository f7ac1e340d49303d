"""Last hidden states of the teacher at chosen positions, the targets of feature and relation distillation.

`float16` rounds to 11 bits. `int8` rounds to 127ths of a state's largest magnitude, with an error of at most half a
step.

Shape suffixes: N recorded positions of a shard or sequence, M those of them with a state, D the teacher's hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

from llavamod_offline.errors import CacheError, first_line
from teacher_cache.format.schema import HiddenKind

_STATES_PER_CHUNK = 256
_FLAGS_PER_CHUNK = 32768
_LEVELS = 127
_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class HiddenStates:
    """The states of one sequence; `rows_M`: the recorded positions that have one, ascending."""

    rows_M: NDArray[np.int64]
    states_MD: NDArray[np.float32]


def write_hidden(group: zarr.Group, parts: Sequence[HiddenStates], lengths: Sequence[int], kind: HiddenKind) -> None:
    """Add the states of a shard's sequences to its columns; `lengths`: the number of recorded positions of each.

    Errors: `CacheError` if a state overflows float16.
    """
    starts = np.cumsum([0, *lengths])
    flags_N = np.zeros(starts[-1], np.uint8)
    for part, start in zip(parts, starts[:-1], strict=True):
        flags_N[start + part.rows_M] = 1
    states_MD = np.concatenate([part.states_MD for part in parts])
    write_array(group, "hidden_flags", flags_N, _FLAGS_PER_CHUNK)
    if kind == "float16":
        if len(states_MD) and np.abs(states_MD).max() > _LARGEST:
            raise CacheError("a hidden state overflows float16: capture with capture.hidden=int8")
        write_array(group, "hidden", states_MD.astype("<f2"), _STATES_PER_CHUNK)
        return
    scales_M = (np.abs(states_MD).max(axis=1, initial=0.0) / _LEVELS).astype("<f4")
    codes_MD = np.rint(states_MD / np.where(scales_M > 0, scales_M, 1.0)[:, None]).astype(np.int8)
    write_array(group, "hidden", codes_MD, _STATES_PER_CHUNK)
    write_array(group, "hidden_scales", scales_M, _FLAGS_PER_CHUNK)


class HiddenFile:
    """The hidden states of one shard, opened for reading. Errors of every method: `CacheError` naming the array."""

    def __init__(self, group: zarr.Group, kind: HiddenKind, positions: int, where: str) -> None:
        self._where = where
        try:
            self._arrays: dict[str, Any] = {name: group[name] for name in ("hidden_flags", "hidden")}
            if kind == "int8":
                self._arrays["hidden_scales"] = group["hidden_scales"]
        except KeyError as error:
            raise CacheError(f"{where}/{error}: missing: run `cache-teacher verify`") from error
        flags_N = self._read("hidden_flags", 0, positions)
        self._rows_M = np.flatnonzero(flags_N)
        if len(flags_N) != positions or len(self._rows_M) != self._arrays["hidden"].shape[0]:
            raise CacheError(f"{where}/hidden: its length does not match hidden_flags: run `cache-teacher verify`")

    def read(self, start: int, stop: int) -> HiddenStates:
        """The states of the positions `start` … `stop`, their rows counted from `start`."""
        first, last = np.searchsorted(self._rows_M, [start, stop]).tolist()
        states_MD = self._read("hidden", first, last).astype(np.float32)
        if "hidden_scales" in self._arrays:
            states_MD *= self._read("hidden_scales", first, last)[:, None]
        return HiddenStates(self._rows_M[first:last] - start, states_MD)

    def _read(self, name: str, start: int, stop: int) -> NDArray[Any]:
        return read_array(self._arrays[name], start, stop, f"{self._where}/{name}")


def read_array(array: Any, start: int, stop: int, where: str) -> NDArray[Any]:
    """Read the rows `start` … `stop` of a Zarr array. Errors: `CacheError` naming `where`."""
    try:
        return np.asarray(array[start:stop])
    except Exception as error:  # a damaged chunk may raise anything in a codec
        raise CacheError(f"{where}: cannot be read: {first_line(error)}: run `cache-teacher verify`") from error


def write_array(group: zarr.Group, name: str, values: NDArray[Any], length: int) -> None:
    """Add an array to a shard's columns, in chunks of `length` of its rows."""
    chunk = min(length, max(1, len(values)))
    others = values.shape[1:]
    array = group.create_array(
        name,
        shape=values.shape,
        dtype=values.dtype,
        chunks=(chunk, *others),
        shards=(chunk * max(1, -(-len(values) // chunk)), *others),
        filters=None,
        compressors=[
            BloscCodec(cname="zstd", clevel=5, shuffle="shuffle", typesize=values.dtype.itemsize),
            Crc32cCodec(),
        ],
        fill_value=0,
    )
    if values.size:
        array[...] = values
