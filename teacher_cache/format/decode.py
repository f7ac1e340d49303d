"""The columns of one block of positions → records.

Shape suffixes: N positions, H top-k ids of all positions, P the likely ones of them (the others are forced), D tail
samples, V ids, F forced ids, S temperatures, T = 1 + S.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llavamod_offline.data.encode.tokenize import NO_TARGET
from llavamod_offline.errors import CacheError
from teacher_cache.format.id_codes import CodedRanks, decode_ranks
from teacher_cache.format.quantise import Precision, decode_entropy, decode_log_probs, decode_shares
from teacher_cache.format.record import Floats, Records
from teacher_cache.format.schema import Codec
from teacher_cache.format.top_k_codes import Ints, Steps, decode_steps, missing_forced, starts

Doubles = NDArray[np.float64]


def decode_block(
    codec: Codec, block: Mapping[str, NDArray[Any]], ids_V: Ints, temperatures: tuple[float, ...]
) -> Records:
    """Turn columns back into records; `ids_V` lists the ids by rank.

    Log normalisers are decoded only for `temperatures`, some of the stored ones, to save time.
    Errors: `CacheError` if lengths are inconsistent, or an id is beyond the vocabulary.
    """
    rows = [codec.temperatures.index(temperature) for temperature in temperatures]
    numbers = codec.numbers
    likely_N = block["head_counts"].astype(np.int32)
    tail_N = block["draw_counts"].astype(np.int32)
    slots_N = block["target_slots"].astype(np.int32)
    outside_N = slots_N == 0
    likely, samples, outside = int(likely_N.sum()), int(tail_N.sum()), int(outside_N.sum())
    ranks = decode_ranks(CodedRanks(block["id_codes"], block["id_low"], block["id_high"]))
    if len(ranks) != likely + samples + outside or len(block["outside_log_probs"]) != outside:
        raise CacheError(f"{len(ranks)} ids for {likely} likely ids, {samples} tail samples and {outside} targets")
    ranks[likely : likely + samples] = _running_sums(ranks[likely : likely + samples], tail_N)
    if len(ranks) and int(ranks.max()) >= codec.vocab_size:
        raise CacheError(f"an id is beyond the vocabulary of {codec.vocab_size}")
    ids = ids_V.take(ranks)
    ids_H, counts_N = ids[:likely], likely_N
    if numbers is None:
        log_probs_H = block["head_log_probs"]
        if len(log_probs_H) != likely:
            raise CacheError(f"{len(log_probs_H)} log-probs for {likely} top-k ids")
        outside_log_probs, entropy_N = block["outside_log_probs"], block["entropy"]
        tail_log_mass_N = block["tail_log_mass"]
        log_normalisers_NS = block.get("log_normalisers", np.zeros((0, len(slots_N)), np.float32))[rows].T
    else:
        codes_P = decode_steps(Steps(block["head_first"], block["head_steps"], block["head_far_steps"]), likely_N)
        codes_H = codes_P
        if codec.forced_ids:
            missing_NF = missing_forced(ids_H, likely_N, codec.forced_by_id_V)
            ids_H, codes_H, counts_N = _with_forced(codec, ids_H, codes_P, likely_N, missing_NF, block)
        steps_TN = block["tail_shares"]  # unsigned: sums wrap around as the differences did
        shares_TN = decode_shares(np.cumsum(steps_TN, axis=0, dtype=steps_TN.dtype), numbers)
        shares_SN = shares_TN[1:][rows]
        log_probs_H, log_normalisers_NS = _restored(codes_H, counts_N, shares_TN[0], shares_SN, temperatures, numbers)
        with np.errstate(divide="ignore"):
            tail_log_mass_N = np.log(shares_TN[0]).astype(np.float32)
        outside_log_probs = decode_log_probs(block["outside_log_probs"], numbers)
        entropy_N = decode_entropy(block["entropy"], numbers)
    target_ids_N = np.full(len(slots_N), NO_TARGET, np.int32)
    target_log_probs_N = np.zeros(len(slots_N), np.float32)
    inside = np.flatnonzero((slots_N > 0) & (slots_N <= codec.topk_limit))
    if np.any(slots_N[inside] > counts_N[inside]) or np.any(slots_N > codec.topk_limit + 1):
        raise CacheError("a target's index is beyond its top-k ids")
    places = starts(counts_N)[inside] + slots_N[inside] - 1
    target_ids_N[inside], target_log_probs_N[inside] = ids_H[places], log_probs_H[places]
    target_ids_N[outside_N], target_log_probs_N[outside_N] = ids[likely + samples :], outside_log_probs
    return Records(
        target_ids_N=target_ids_N,
        target_log_probs_N=target_log_probs_N,
        entropy_N=entropy_N,
        tail_log_mass_N=tail_log_mass_N,
        log_normalisers_NS=log_normalisers_NS,
        topk_counts_N=counts_N,
        tail_counts_N=tail_N,
        topk_ids_H=ids_H,
        topk_log_probs_H=log_probs_H,
        tail_ids_D=ids[likely : likely + samples],
    )


def _running_sums(steps_D: Ints, counts_N: Ints) -> Ints:
    """The inverse of differences within each position."""
    sums = np.concatenate([[0], np.cumsum(steps_D, dtype=np.int64)])
    within_D: Ints = (sums[1:] - np.repeat(sums[starts(counts_N)], counts_N)).astype(np.int32)
    return within_D


def _with_forced(
    codec: Codec,
    ids_P: Ints,
    codes_P: Ints,
    likely_N: Ints,
    missing_NF: NDArray[np.bool_],
    block: Mapping[str, NDArray[Any]],
) -> tuple[Ints, Ints, Ints]:
    """Append the forced ids that are not likely: ids and codes of all positions, and their counts."""
    counts_N = likely_N + missing_NF.sum(1, dtype=np.int32)
    likely_H = np.arange(int(counts_N.sum())) - np.repeat(starts(counts_N), counts_N) < np.repeat(likely_N, counts_N)
    ids_H = np.empty(len(likely_H), np.int32)
    codes_H = np.empty(len(likely_H), np.int32)
    ids_H[likely_H], codes_H[likely_H] = ids_P, codes_P
    forced_NF = np.broadcast_to(np.array(codec.forced_ids, np.int32), missing_NF.shape)
    ids_H[~likely_H], codes_H[~likely_H] = forced_NF[missing_NF], block["forced_log_probs"].T[missing_NF]
    return ids_H, codes_H, counts_N


def _restored(
    codes_H: Ints,
    counts_N: Ints,
    share_N: Doubles,
    shares_SN: Doubles,
    temperatures: tuple[float, ...],
    numbers: Precision,
) -> tuple[Floats, Floats]:
    """Log-probs of top-k ids whose mass is 1 − the tail's, and the log normalisers [N, S] that go with them."""
    if not len(counts_N):
        return np.zeros(0, np.float32), np.zeros((0, len(temperatures)), np.float32)
    log_probs_H = decode_log_probs(codes_H, numbers)
    begin_N = starts(counts_N)
    mass_N = np.add.reduceat(np.exp(log_probs_H), begin_N, dtype=np.float64)
    shift_N = np.log1p(-share_N) - np.log(mass_N)
    normalisers = [
        np.log(np.add.reduceat(np.exp(log_probs_H / np.float32(temperature)), begin_N, dtype=np.float64))
        + shift_N / temperature
        - np.log1p(-at_N)
        for temperature, at_N in zip(temperatures, shares_SN, strict=True)
    ]
    log_probs_H += np.repeat(shift_N.astype(np.float32), counts_N)
    return log_probs_H, np.array(normalisers, np.float32).reshape(len(temperatures), len(counts_N)).T
