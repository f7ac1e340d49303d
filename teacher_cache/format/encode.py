"""Records → the columns of one block of positions.

Shape suffixes: N positions, H top-k ids of all positions, P the likely ones of them (the others are forced), D tail
samples, V ids, S temperatures, T = 1 + S.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llavamod_offline.data.encode.tokenize import NO_TARGET
from llavamod_offline.errors import CacheError
from teacher_cache.format.id_codes import encode_ranks
from teacher_cache.format.quantise import Precision, encode_entropy, encode_log_probs, encode_shares
from teacher_cache.format.record import Records
from teacher_cache.format.schema import Block, Codec
from teacher_cache.format.top_k_codes import Ints, encode_steps, forced_suffix, missing_forced, starts


def check_range(codec: Codec, records: Records) -> None:
    """Refuse values that would overflow a column. Errors: `CacheError` naming the field of an id or a count."""
    limits = {
        "topk_ids_H": (0, codec.vocab_size - 1),
        "tail_ids_D": (0, codec.vocab_size - 1),
        "target_ids_N": (NO_TARGET, codec.vocab_size - 1),
        "topk_counts_N": (1, codec.topk_limit),
        "tail_counts_N": (0, codec.tail_limit),
    }
    for name, (low, high) in limits.items():
        values = getattr(records, name)
        if len(values) and not low <= int(values.min()) <= int(values.max()) <= high:
            raise CacheError(f"'{name[:-2]}' holds {values.min()} … {values.max()}, beyond {low} … {high}")


def encode_block(codec: Codec, records: Records, ranks_V: Ints) -> Block:
    """Turn records into columns; `ranks_V` gives each id's rank. Errors: `CacheError` if a forced id is missing."""
    counts_N = records.topk_counts_N
    slots_N = _target_slots(records, codec.topk_limit)
    outside_N = slots_N == 0
    likely_N = counts_N
    if codec.numbers is not None and codec.forced_ids:
        likely_N = counts_N - forced_suffix(records.topk_ids_H, counts_N, codec.forced_by_id_V)
    place_H = np.arange(len(records.topk_ids_H)) - np.repeat(starts(counts_N), counts_N)
    likely_H = place_H < np.repeat(likely_N, counts_N)
    ids_P = records.topk_ids_H[likely_H]
    tail_steps_D = _differences(
        _sorted_within(ranks_V[records.tail_ids_D], records.tail_counts_N), records.tail_counts_N
    )
    ids = encode_ranks(np.concatenate([ranks_V[ids_P], tail_steps_D, ranks_V[records.target_ids_N[outside_N]]]))
    outside_log_probs = records.target_log_probs_N[outside_N]
    block: Block = {
        "head_counts": likely_N,
        "draw_counts": records.tail_counts_N,
        "target_slots": slots_N,
        "id_codes": ids.codes,
        "id_low": ids.low,
        "id_high": ids.high,
    }
    if codec.numbers is None:
        block |= {
            "entropy": records.entropy_N,
            "tail_log_mass": records.tail_log_mass_N,
            "log_normalisers": records.log_normalisers_NS.T,
            "head_log_probs": records.topk_log_probs_H,
            "outside_log_probs": outside_log_probs,
        }
    else:
        codes_H = encode_log_probs(records.topk_log_probs_H, codec.numbers)
        steps = encode_steps(codes_H[likely_H], likely_N)
        block |= {
            "entropy": encode_entropy(records.entropy_N, codec.numbers),
            "tail_shares": _share_steps(records, codec.temperatures, codec.numbers),
            "head_first": steps.first_N,
            "head_steps": steps.near,
            "head_far_steps": steps.far,
            "outside_log_probs": encode_log_probs(outside_log_probs, codec.numbers),
        }
        if codec.forced_ids:
            missing_NF = missing_forced(ids_P, likely_N, codec.forced_by_id_V)
            if not np.array_equal(missing_NF.sum(1), counts_N - likely_N):
                raise CacheError("the top-k ids of a position lack a forced id")
            forced_NF = np.zeros(missing_NF.shape, np.uint16)
            forced_NF[missing_NF] = codes_H[~likely_H]
            block["forced_log_probs"] = forced_NF.T
    return {name: np.ascontiguousarray(block[name], dtype=column.dtype) for name, column in codec.columns.items()}


def _target_slots(records: Records, topk_limit: int) -> Ints:
    """1 + the target's index among the top-k ids, 0 if it is not one of them, `topk_limit` + 1 without a target."""
    counts_N = records.topk_counts_N
    hits = np.flatnonzero(records.topk_ids_H == np.repeat(records.target_ids_N, counts_N))
    rows = np.searchsorted(np.cumsum(counts_N), hits, side="right")
    slots_N = np.zeros(len(records), np.int32)
    slots_N[rows] = hits - starts(counts_N)[rows] + 1
    slots_N[records.target_ids_N == NO_TARGET] = topk_limit + 1
    return slots_N


def _sorted_within(ranks_D: Ints, counts_N: Ints) -> Ints:
    row_D = np.repeat(np.arange(len(counts_N), dtype=np.int64) << 32, counts_N)
    return (np.sort(row_D | ranks_D) & 0xFFFFFFFF).astype(np.int32)


def _differences(ranks_D: Ints, counts_N: Ints) -> Ints:
    """The first rank of each position, then the increase from each to the next."""
    steps_D = np.diff(ranks_D, prepend=0)
    first = starts(counts_N)[counts_N > 0]
    steps_D[first] = ranks_D[first]
    return steps_D


def _share_steps(records: Records, temperatures: tuple[float, ...], numbers: Precision) -> NDArray[np.int32]:
    """Codes of the tail's share of Σ p^(1/T) [T, N]: at T = 1, then the differences from one T to the next."""
    counts_N = records.topk_counts_N
    log_probs_H = records.topk_log_probs_H.astype(np.float64)
    shares = [np.exp(records.tail_log_mass_N.astype(np.float64))]
    for column, temperature in enumerate(temperatures):
        topk_N = np.add.reduceat(np.exp(log_probs_H / temperature), starts(counts_N)) if len(counts_N) else np.zeros(0)
        share_N = 1.0 - topk_N / np.exp(records.log_normalisers_NS[:, column].astype(np.float64))
        # Cancellation is far below a step of the code, but a non-empty tail must not vanish.
        shares.append(np.where(shares[0] > 0.0, np.maximum(share_N, 1e-30), 0.0))
    codes_TN = encode_shares(np.stack(shares), numbers).astype(np.int32)
    return np.diff(codes_TN, axis=0, prepend=0)
