"""Running a batch in pieces that fit into the device's memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from llavamod_offline.errors import ModelError

_LOG = logging.getLogger(__name__)
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class BatchLimit:
    """The most items to run at once: halved for good whenever memory runs out, which is logged."""

    def __init__(self, size: int, unit: str) -> None:
        self.size, self.unit = size, unit

    def run(
        self,
        items: Sequence[_Item],
        run: Callable[[Sequence[_Item]], Sequence[_Result]],
        too_large: Callable[[_Item], str],
    ) -> Iterator[_Result]:
        """Run all items, in order. Errors: `ModelError` with the text of `too_large` if one does not fit alone."""
        while items:
            piece = items[: self.size]
            try:
                results = run(piece)
            except torch.OutOfMemoryError as error:
                if len(piece) == 1:
                    raise ModelError(too_large(piece[0])) from error
                self.size = len(piece) // 2
                _LOG.warning("out of memory with %d %s at once: continuing with %d", len(piece), self.unit, self.size)
                torch.cuda.empty_cache()
                continue
            items = items[len(piece) :]
            yield from results
