"""Records made from logits, chunk by chunk on the device they are on.

Shape suffixes: N positions (R of them in a chunk), X what a row holds, V ids, K slots of the top-k being built, F
forced ids, S temperatures; H and D count all top-k entries and all tail samples, one position after another (as in a
CSR matrix).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llavamod_offline.data.encode.tokenize import NO_TARGET, Ids
from teacher_cache.engines.tail_samples import systematic_tail_samples, tail_sample_budget
from teacher_cache.format.record import Floats, Ints, Records, RecordSettings, concatenate_records

_CHUNK_VALUES = {"cpu": 2**20, "cuda": 2**26}


def rows_per_chunk(vocab_size: int, device_type: str) -> int:
    """How many rows of logits to hold at once: what keeps the working set small, yet the device busy."""
    return max(1, _CHUNK_VALUES.get(device_type, 2**20) // max(vocab_size, 1))


@torch.inference_mode()
def make_records(
    rows_NX: Tensor,
    target_ids_N: Tensor,
    uniforms_N: Tensor,
    settings: RecordSettings,
    *,
    logits_of: Callable[[Tensor], Tensor] = Tensor.float,
    vocab_size: int | None = None,
) -> tuple[Records, NDArray[np.bool_]]:
    """Make the records of N rows, chunk by chunk on the device they are on.

    `logits_of` turns rows [R, X] into logits [R, V] cut to the shared vocabulary of `vocab_size` ids; by default the
    rows are the logits.
    Shapes: `rows_NX` [N, X]; `target_ids_N` int64 < V, or −1 for none; `uniforms_N` float64, from
    `tail_samples.sequence_uniforms`. Result: the records, and [N] bool: whether the row's logits were finite (the
    record of a row that was not is meaningless).
    """
    step = rows_per_chunk(vocab_size or rows_NX.shape[1], rows_NX.device.type)
    parts: list[Records] = []
    finite: list[NDArray[np.bool_]] = [np.zeros(0, np.bool_)]
    for start in range(0, len(rows_NX), step):
        chunk = slice(start, start + step)
        logits_RV = logits_of(rows_NX[chunk]).float()
        finite_R, part = _chunk_records(logits_RV, target_ids_N[chunk], uniforms_N[chunk], settings)
        parts.append(part)
        finite.append(finite_R.cpu().numpy())
    return concatenate_records(parts, len(settings.temperatures)), np.concatenate(finite)


def make_sequence_records(
    rows_ND: Tensor,
    targets: Sequence[Ids],
    uniforms: Sequence[NDArray[np.float64]],
    settings: RecordSettings,
    *,
    logits_of: Callable[[Tensor], Tensor],
    vocab_size: int,
) -> list[tuple[Records, NDArray[np.bool_]]]:
    """Make the records of several sequences whose rows [N, D] follow one another; their rows fill common chunks."""
    records, finite_N = make_records(
        rows_ND,
        torch.from_numpy(np.concatenate(targets)).to(rows_ND.device),
        torch.from_numpy(np.concatenate(uniforms)).to(rows_ND.device),
        settings,
        logits_of=logits_of,
        vocab_size=vocab_size,
    )
    lengths = [len(targets_N) for targets_N in targets]
    return list(zip(records.split(lengths), np.split(finite_N, np.cumsum(lengths)[:-1]), strict=True))


def _chunk_records(
    logits_RV: Tensor, targets_R: Tensor, uniforms_R: Tensor, settings: RecordSettings
) -> tuple[Tensor, Records]:
    shifted_RV, log_z_R, entropy_R = _normalise(logits_RV)
    finite_R = torch.isfinite(entropy_R)  # NaN for a row with any logit that is not finite
    if not bool(finite_R.all()):
        shifted_RV, log_z_R, entropy_R = _normalise(torch.where(finite_R[:, None], logits_RV, 0.0))
    # Σ exp(x/T) ≥ exp(0): no shift is needed, whatever T.
    log_z_at = {t: (shifted_RV / t).exp_().sum(-1).log() for t in settings.temperatures} | {1.0: log_z_R}
    normalisers = [log_z_at[t] - log_z_R / t for t in settings.temperatures]
    learnt_at = settings.temperature
    if learnt_at != 1.0:
        probs_RV = (shifted_RV / learnt_at - log_z_at[learnt_at][:, None]).exp_()
        entropy_R = log_z_at[learnt_at] - torch.linalg.vecdot(probs_RV, shifted_RV) / learnt_at
    topk_ids_RK, topk_shifted_RK, kept_RK = _top_k(shifted_RV, log_z_at[learnt_at], settings)
    targets = shifted_RV.gather(1, targets_R.clamp(min=0)[:, None])[:, 0] - log_z_R
    targets = torch.where(targets_R == NO_TARGET, 0.0, targets)
    # Slots that are not kept point at the first one, so that every write to a cell is the same.
    tail_RV = shifted_RV.scatter_(1, torch.where(kept_RK, topk_ids_RK, topk_ids_RK[:, :1]), float("-inf"))
    largest_R = tail_RV.amax(-1)
    largest_R = largest_R.masked_fill(torch.isneginf(largest_R), 0.0)
    weights_RV = tail_RV.sub_(largest_R[:, None]).exp_()
    tail_log_mass_R = weights_RV.sum(-1).log() + largest_R - log_z_R
    sampled_log_mass_R = tail_log_mass_R
    if learnt_at != 1.0:
        weights_RV.pow_(1 / learnt_at)
        sampled_log_mass_R = weights_RV.sum(-1).log() + largest_R / learnt_at - log_z_at[learnt_at]
    budget_R = tail_sample_budget(sampled_log_mass_R, settings.tail_samples_max, settings.tail_samples_per_mass)
    tail_ids_D = systematic_tail_samples(weights_RV, uniforms_R, budget_R)
    return finite_R, Records(
        target_ids_N=_ints(targets_R),
        target_log_probs_N=_floats(targets),
        entropy_N=_floats(entropy_R),
        tail_log_mass_N=_floats(tail_log_mass_R),
        log_normalisers_NS=_floats(torch.stack(normalisers, 1) if normalisers else logits_RV[:, :0]),
        topk_counts_N=_ints(kept_RK.sum(-1)),
        tail_counts_N=_ints(budget_R),
        topk_ids_H=_ints(topk_ids_RK[kept_RK]),
        topk_log_probs_H=_floats((topk_shifted_RK - log_z_R[:, None])[kept_RK]),
        tail_ids_D=_ints(tail_ids_D),
    )


def _normalise(logits_RV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Shift rows so that the largest logit is 0: shifted [R, V], log of their Σ exp, and the entropy, both [R] ≥ 0.

    A log-prob is then a difference of numbers that are small where it is, and keeps its precision near 0. The entropy
    log Z + Σ p·(−x) is a sum of terms ≥ 0: nothing cancels, even where it is tiny.
    """
    shifted_RV = logits_RV - logits_RV.amax(-1, keepdim=True)
    exponentials_RV = shifted_RV.exp()
    z_R = exponentials_RV.sum(-1)
    spread_R = -torch.linalg.vecdot(exponentials_RV, shifted_RV)
    log_z_R = z_R.log()
    return shifted_RV, log_z_R, log_z_R + spread_R / z_R


def _top_k(shifted_RV: Tensor, log_z_R: Tensor, settings: RecordSettings) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the top-k: ids, shifted logits and which slots are kept, [R, K] each; likely ids, then forced ones.

    Equal logits are common in low-precision models, and topk takes any of them in any order: what it took is replaced
    by the smallest ids, in rising order. `log_z_R`: of the shifted logits divided by `settings.temperature`.
    """
    slots = min(settings.top_k, shifted_RV.shape[1])
    most_RK, ids_RK = shifted_RV.topk(min(slots + 1, shifted_RV.shape[1]))  # one more shows a tie across the bound
    shifted_RK, ids_RK = most_RK[:, :slots], ids_RK[:, :slots].contiguous()
    count_R = torch.full((len(ids_RK),), slots, device=ids_RK.device)
    probs_RK = (shifted_RK / settings.temperature - log_z_R[:, None]).double().exp()
    if settings.top_p < 1.0:  # at 1 the mass does not end it: a sum of rounded numbers may reach 1 early, or never
        count_R = torch.minimum(count_R, (probs_RK.cumsum(-1) < settings.top_p).sum(-1) + 1)
    if settings.min_prob > 0.0:
        count_R = torch.minimum(count_R, (probs_RK >= settings.min_prob).sum(-1).clamp(min=1))
    tied_R = (shifted_RK[:, 1:] == shifted_RK[:, :-1]).any(-1)
    if bool(tied_R.any()):
        by_id = ids_RK[tied_R].argsort(-1)
        order = by_id.gather(1, shifted_RK[tied_R].gather(1, by_id).argsort(dim=-1, descending=True, stable=True))
        ids_RK[tied_R] = ids_RK[tied_R].gather(1, order)
    above_R = (shifted_RK > shifted_RK[:, -1:]).sum(-1)
    crossed_R = (most_RK[:, slots:] == shifted_RK[:, -1:]).any(-1) & (above_R < count_R)
    for rows_C in crossed_R.nonzero()[:, 0].split(max(1, len(ids_RK) // 8)):  # pieces: ties may be many
        ids_RK[rows_C] = _smallest_ids(shifted_RV[rows_C], shifted_RK[rows_C, -1], above_R[rows_C], ids_RK[rows_C])
    kept_RK = torch.arange(slots, device=ids_RK.device) < count_R[:, None]
    if settings.forced_ids:
        forced_F = torch.tensor(settings.forced_ids, device=ids_RK.device)
        known_RF = ((ids_RK[:, :, None] == forced_F) & kept_RK[:, :, None]).any(1)
        ids_RK = torch.cat([ids_RK, forced_F.expand(len(ids_RK), -1)], 1)
        shifted_RK = torch.cat([shifted_RK, shifted_RV[:, forced_F]], 1)
        kept_RK = torch.cat([kept_RK, ~known_RF], 1)
    return ids_RK, shifted_RK, kept_RK


def _smallest_ids(shifted_CV: Tensor, level_C: Tensor, above_C: Tensor, ids_CK: Tensor) -> Tensor:
    """Fill the slots from `above_C` on with the smallest ids whose logit is `level_C`."""
    row_M, id_M = (shifted_CV == level_C[:, None]).nonzero(as_tuple=True)  # by row, then by rising id
    first_C = torch.searchsorted(row_M, torch.arange(len(ids_CK), device=row_M.device))
    slot_M = above_C[row_M] + torch.arange(len(row_M), device=row_M.device) - first_C[row_M]
    fits_M = slot_M < ids_CK.shape[1]
    ids_CK[row_M[fits_M], slot_M[fits_M]] = id_M[fits_M]
    return ids_CK


def _ints(values: Tensor) -> Ints:
    return values.to(torch.int32).cpu().numpy()


def _floats(values: Tensor) -> Floats:
    return values.float().cpu().numpy()
