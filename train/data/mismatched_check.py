"""Check before the first step that a set's mismatched responses are those recorded in a cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llavamod_offline.data.encode.tokenize import TokenizedSequence
from llavamod_offline.data.sample import Sample
from llavamod_offline.data.sets.mismatched import PAIRING
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import ConfigError

if TYPE_CHECKING:
    from teacher_cache.read.reader import TeacherCache
    from teacher_cache.student.end_of_turn import TokenIdSwap

_TRIED = 64


def check_pairs(
    samples: SampleSet,
    cache: TeacherCache,
    rows: NDArray[np.int64],
    encode: Callable[[Sample, str], TokenizedSequence],
    swap: TokenIdSwap | None = None,
) -> None:
    """Compare the mismatched responses of a set with those of a cache.

    Pairs depend on a set's samples alone, so the captured set always matches. For another set, such as a part of it,
    this compares some of `rows`, and the loader compares every row that is trained on.
    Errors: `ConfigError` if the cache's pairs were made by another rule, `TargetError` naming a sample.
    """
    rule = cache.fingerprint["capture"].get("mismatched")
    if rule != PAIRING:
        raise ConfigError(
            f"loss.kind: the mismatched responses of cache '{cache.path}' follow another pairing rule ({rule}) than "
            f"those of data.set ({PAIRING}): capture it again with capture.mismatched=true, or set loss.kind to "
            "kto_pair"
        )
    captured = cache.fingerprint["data"]["digest"]  # a list in a merged cache
    if samples.digest in (captured if isinstance(captured, list) else [captured]):
        return
    from teacher_cache.student.check import check_sequence

    places = np.unique(np.linspace(0, len(rows) - 1, _TRIED).round().astype(np.int64))
    for row in rows[places].tolist():
        sample = samples.read(row, scattered=True)
        for role in sample.roles:  # the sample's own first: an error in them is not about the pairing
            check_sequence(cache, encode(sample, role), swap)
