"""Records made from the most likely ids alone, where an engine lists log-probs instead of giving logits.

Shape suffixes: N wanted rows, K most likely ids listed for each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llavamod_offline.data.encode.tokenize import NO_TARGET
from llavamod_offline.errors import ConfigError
from teacher_cache.format.record import Records, RecordSettings

if TYPE_CHECKING:
    from teacher_cache.capture_setup import SetupValues

_LIMITS = (
    "no tail samples, forced tokens, hidden states or normalisers at other temperatures",
    "the entropy is computed from the top-k and one bucket for the tail: a lower bound",
    "the tail's mass is 1 minus the top-k's, no finer than float32",
    "among equally likely ids that do not all fit into the top-k, those that vLLM lists are kept",
    "ids beyond the shared vocabulary are left out of the normaliser only where vLLM lists them",
)
_SMALLEST_TAIL = 2.0**-24  # the smallest step below 1 of a sum of float32 probabilities


def listed_ids(top_k: int, vocab_size: int) -> int:
    """How many ids of each distribution to ask for; -1: all, including those beyond the shared vocabulary."""
    return -1 if top_k >= vocab_size else top_k


def listed_records(
    ids_NK: NDArray[np.int64],
    log_probs_NK: NDArray[np.float64],
    target_ids_N: NDArray[np.int64],
    target_log_probs_N: NDArray[np.float64],
    settings: RecordSettings,
    *,
    vocab_size: int,
) -> tuple[Records, NDArray[np.bool_]]:
    """Make records of N rows from their K most likely ids alone; also returns [N] whether these were finite.

    Listed ids beyond the vocabulary are removed and the rest is renormalised. The records have no tail samples and no
    normalisers; their entropy counts the tail as one bucket, which is a lower bound.
    """
    finite_N = np.isfinite(log_probs_NK).all(1) & np.isfinite(target_log_probs_N)
    log_probs_NK = np.where(finite_N[:, None], log_probs_NK, 0.0)
    beyond_NK = ids_NK >= vocab_size
    surplus_N = np.where(beyond_NK, np.exp(log_probs_NK), 0.0).sum(1)
    rest_N = -np.log1p(-np.minimum(surplus_N, 1.0 - _SMALLEST_TAIL))
    log_probs_NK = np.where(beyond_NK, -np.inf, log_probs_NK + rest_N[:, None])
    order_NK = np.lexsort((ids_NK, -log_probs_NK), axis=1)  # most likely first, ties by id
    ids_NK = np.take_along_axis(ids_NK, order_NK, 1)
    log_probs_NK = np.take_along_axis(log_probs_NK, order_NK, 1)
    probs_NK = np.exp(log_probs_NK)
    kept_NK = (np.arange(ids_NK.shape[1]) < settings.top_k) & (probs_NK >= settings.min_prob)
    if settings.top_p < 1.0:
        kept_NK &= np.cumsum(probs_NK, 1) - probs_NK < settings.top_p
    kept_NK[:, 0] = True
    kept_NK &= ~np.isneginf(log_probs_NK)
    counts_N = kept_NK.sum(1)
    mass_N = np.where(kept_NK, probs_NK, 0.0).sum(1)
    tail_N = np.where(counts_N == vocab_size, 0.0, np.maximum(1.0 - mass_N, _SMALLEST_TAIL))
    with np.errstate(divide="ignore", invalid="ignore"):
        tail_log_mass_N = np.log(tail_N)
        bucket_N = np.where(tail_N > 0, -tail_N * tail_log_mass_N, 0.0)
        terms_NK = np.where(kept_NK, -probs_NK * log_probs_NK, 0.0)
    untargeted_N = target_ids_N == NO_TARGET
    records = Records(
        target_ids_N=target_ids_N.astype(np.int32),
        target_log_probs_N=np.where(untargeted_N, 0.0, target_log_probs_N + rest_N).astype(np.float32),
        entropy_N=np.maximum(terms_NK.sum(1) + bucket_N, 0.0).astype(np.float32),
        tail_log_mass_N=tail_log_mass_N.astype(np.float32),
        log_normalisers_NS=np.zeros((len(ids_NK), 0), np.float32),
        topk_counts_N=counts_N.astype(np.int32),
        tail_counts_N=np.zeros(len(ids_NK), np.int32),
        topk_ids_H=ids_NK[kept_NK].astype(np.int32),
        topk_log_probs_H=np.minimum(log_probs_NK[kept_NK], 0.0).astype(np.float32),
        tail_ids_D=np.zeros(0, np.int32),
    )
    return records, finite_N


def describe_limits(given: SetupValues) -> list[str]:
    """What records of listed ids lack. Errors: `ConfigError` for settings that ask for more."""
    keep = given["keep"]
    asked = {
        "capture.temperature=1": keep.temperature != 1.0,
        "capture.temperatures=[]": bool(keep.temperatures),
        "capture.tail_samples_max=0": keep.tail_samples_max > 0,
        "capture.forced_tokens=[]": bool(keep.forced_tokens),
        "capture.hidden=null": given["hidden"] is not None,
    }
    if wrong := [setting for setting, unsupported in asked.items() if unsupported]:
        raise ConfigError(
            f"engine.kind={given['engine']} cannot capture what these settings ask for: set {' '.join(wrong)}, "
            "or engine.kind=vllm"
        )
    return list(_LIMITS)
