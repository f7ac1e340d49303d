"""The order of a run whose samples changed while it was stopped: some were dropped as too long, or the set repaired.

    OUTPUT/samples.npy    uint64: hashes of the keys of all samples that the run has trained on; a key's index in the
                          file is the number that decides its sample's place (see `llavamod_offline.data.order`)

So the samples that remain keep their order: the run continues with those of the epoch that it has not seen, and with
new ones, and repeats none, except where weights, lengths or windows of shards decide the order as well.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from llavamod_offline.data.order.stream import Mark, Order
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import ModelError
from llavamod_offline.storage import atomic

logger = logging.getLogger(__name__)

SAMPLES_NAME = "samples.npy"
_SALT = "order"
_INEXACT = ": with weights, grouping by length or windows of shards, some may come twice and others not at all"

Hashes = NDArray[np.uint64]


def resume_order(
    output: Path, order: Order, hashes_N: Hashes, before: Mapping[str, Any], step: int, *, moved: bool
) -> Hashes:
    """Continue an order of samples with these hashes where the run in `output` stopped, after `step` steps.

    `before`: the checkpoint's identity, with `numbered` (samples have changed before), `offset` and `mark`; `moved`:
    the samples are no longer the same as then.
    Returns the hashes to keep. Errors: `ModelError` if the kept ones are damaged.
    """
    known = read_hashes(output)
    if known is None or "mark" not in before:  # an earlier version's run
        if moved:
            logger.warning("%s: an earlier version began this run: some samples of this epoch may come twice", output)
        return hashes_N
    numbers_N, table = number_samples(known, hashes_N)
    if moved or before["numbered"]:
        order.renumber(numbers_N, before["offset"])
    if moved:
        place = order.find(Mark(**before["mark"]))
        order.renumber(numbers_N, place - step * order.batch_size)
        left = -(-place // order.per_epoch) * order.per_epoch - place
        logger.warning(
            "%s: the samples have changed: now %d, of which %d are new; of this epoch %d are left%s",
            *(output, len(hashes_N), len(table) - len(known), left),
            "" if order.is_exact and not order.window else _INEXACT,
        )
    return table


def number_samples(known: Hashes, hashes_N: Hashes) -> tuple[NDArray[np.int64], Hashes]:
    """Give known samples the numbers they had, and new ones the next numbers; also returns all hashes by number."""
    order = np.argsort(known, kind="stable")
    places = np.minimum(np.searchsorted(known, hashes_N, sorter=order), len(known) - 1)
    numbers_N = order[places].astype(np.int64)
    is_new = known[numbers_N] != hashes_N
    numbers_N[is_new] = len(known) + np.arange(int(is_new.sum()))
    return numbers_N, np.concatenate([known, hashes_N[is_new]])


def hash_keys(keys: pa.ChunkedArray) -> Hashes:
    """Hash keys to 64 bits."""
    from teacher_cache.read.key_index import column_texts, key_hashes, role_salt

    return key_hashes(*column_texts(keys), np.full(len(keys), role_salt(_SALT), np.uint64))


def is_repaired(output: Path, samples: SampleSet) -> bool:
    """Whether a set has at least half of the samples that the run in `output` has used, so is not another set."""
    known = read_hashes(output)
    return known is not None and 2 * int(np.isin(known, hash_keys(samples.index.column("key"))).sum()) >= len(known)


def read_hashes(output: Path) -> Hashes | None:
    """Read the hashes of a run's samples; None if an earlier version made the run. Errors: `ModelError` if damaged."""
    file = output / SAMPLES_NAME
    try:
        return np.asarray(np.load(file, allow_pickle=False), np.uint64)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError) as error:
        raise ModelError(f"{file}: damaged ({error}): restore it, or choose another output") from error


def write_hashes(output: Path, hashes: Hashes) -> None:
    """Write the hashes of a run's samples."""
    content = io.BytesIO()
    np.save(content, hashes)
    atomic.write_file(output / SAMPLES_NAME, content.getvalue())
