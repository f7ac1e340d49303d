"""Prepared images on their way from one process to another, in shared memory instead of through a pipe.

Measured on two busy cores: 20 MB cost the receiving process 3 ms of its core this way, 20 ms through a pipe.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np

from llavamod_offline.families import SampleImage

_ALIGNED = 64  # bytes
_Place = tuple[str, str, tuple[int, ...], int]  # an array's name, type, shape and offset


@dataclass(frozen=True)
class SharedImages:
    """A sample's images; pickling moves their arrays into anonymous shared memory, freed with its last user."""

    images: list[SampleImage]

    def __reduce__(self) -> tuple[Any, ...]:
        if not self.images or not hasattr(os, "memfd_create"):  # not on every system
            return SharedImages, (self.images,)
        layout: list[tuple[int, list[_Place]]] = []
        with open(os.memfd_create("images"), "wb") as memory:
            for image in self.images:
                places = []
                for name, array in image.inputs.items():
                    memory.seek(-memory.tell() % _ALIGNED, os.SEEK_CUR)
                    places.append((name, array.dtype.str, array.shape, memory.tell()))
                    memory.write(np.ascontiguousarray(array).data if array.size else b"")
                layout.append((image.tokens, places))
            memory.truncate(max(memory.tell(), 1))
            memory.flush()
            return _opened, (DupFd(memory.fileno()), layout)


def _opened(descriptor: Any, layout: Sequence[tuple[int, list[_Place]]]) -> SharedImages:
    file = descriptor.detach()
    try:
        memory = mmap.mmap(file, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(file)
    return SharedImages(
        [
            SampleImage(
                {
                    name: np.frombuffer(memory, dtype, int(np.prod(shape)), offset).reshape(shape)
                    for name, dtype, shape, offset in places
                },
                tokens,
            )
            for tokens, places in layout
        ]
    )
