"""Whether a set pairs its prompts with the responses that a cache has records of, looked at before the first step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llavamod_offline.data.encode.tokenize import SequenceEncoder
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
    encoder: SequenceEncoder,
    exchange: TokenIdSwap | None = None,
) -> None:
    """Refuse a set whose mismatched responses are others than those of a cache.

    Pairs follow from a set's samples alone: those of the set that was captured are the cache's. Of another set, such as
    a part of that one, some of `rows` are compared here, and each when it is trained on.
    Errors: `ConfigError` if the cache's pairs were made by another rule, `TargetError` naming a sample.
    """
    rule = cache.fingerprint["capture"].get("mismatched")
    if rule != PAIRING:
        raise ConfigError(
            f"loss.kind: the mismatched responses of cache '{cache.path}' were chosen by another rule ({rule}) than "
            f"those of data.set are ({PAIRING}): capture it again with capture.mismatched=true, or set loss.kind to "
            "kto_pair"
        )
    captured = cache.fingerprint["data"]["digest"]  # a list of them in a merged cache
    if samples.digest in (captured if isinstance(captured, list) else [captured]):
        return
    from teacher_cache.student.check import check_sequence

    places = np.unique(np.linspace(0, len(rows) - 1, _TRIED).round().astype(np.int64))
    for row in rows[places].tolist():
        sample = samples.read(row, scattered=True)
        for role in sample.roles:  # the sample's own first: what is wrong there is not the pair's fault
            check_sequence(cache, encoder.encode(sample, role), exchange)
