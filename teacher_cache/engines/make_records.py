"""Records made from logits, chunk by chunk on the device they are on.

Shape suffixes: N positions (R of them in a chunk), V ids, K slots of a head being built, F forced ids, S temperatures;
H and D are the lengths of all heads and of all lists of tail draws, one after another (as in a CSR matrix).
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llavamod_offline.data.encode.tokenize import NO_TARGET
from teacher_cache.engines.tail_samples import systematic_tail_samples, tail_sample_budget
from teacher_cache.format.record import Floats, Ints, Records, RecordSettings, concatenate_records

_CHUNK_VALUES = {"cpu": 2**20, "cuda": 2**26}


def rows_per_chunk(vocab_size: int, device_type: str) -> int:
    """How many rows of logits to hold at once: what keeps the working set small, yet the device busy."""
    return max(1, _CHUNK_VALUES.get(device_type, 2**20) // max(vocab_size, 1))


@torch.inference_mode()
def make_records(
    logits_NV: Tensor, target_ids_N: Tensor, uniforms_N: Tensor, settings: RecordSettings
) -> tuple[Records, NDArray[np.bool_]]:
    """Make the records of N rows of logits, chunk by chunk on the device they are on.

    Shapes: `logits_NV` [N, V] float, already cut to the shared vocabulary; `target_ids_N` int64 < V, or −1 for none;
    `uniforms_N` float64, from `draws.sequence_uniforms`. Result: the records, and [N] bool: whether the row's
    logits were finite (the record of a row that was not is meaningless).
    """
    rows, width = logits_NV.shape
    chunk = rows_per_chunk(width, logits_NV.device.type)
    parts = []
    finite = []
    for start in range(0, rows, chunk):
        piece = slice(start, start + chunk)
        fine_R, part = _chunk_records(logits_NV[piece].float(), target_ids_N[piece], uniforms_N[piece], settings)
        parts.append(part)
        finite.append(fine_R.cpu().numpy())
    records = concatenate_records(parts, len(settings.temperatures))
    return records, np.concatenate(finite) if finite else np.zeros(0, np.bool_)


def _chunk_records(
    logits_RV: Tensor, targets_R: Tensor, uniforms_R: Tensor, settings: RecordSettings
) -> tuple[Tensor, Records]:
    shifted_RV, log_z_R, entropy_R = _normalise(logits_RV)
    finite_R = torch.isfinite(entropy_R)  # NaN for a row with any logit that is not finite
    if not bool(finite_R.all()):
        shifted_RV, log_z_R, entropy_R = _normalise(torch.where(finite_R[:, None], logits_RV, 0.0))
    topk_ids_RK, topk_shifted_RK, kept_RK = _head(shifted_RV, log_z_R, settings)
    # Σ exp(x/T) ≥ exp(0): no shift is needed, whatever T.
    normalisers = [(shifted_RV / t).exp_().sum(-1).log() - log_z_R / t for t in settings.temperatures]
    targets = shifted_RV.gather(1, targets_R.clamp(min=0)[:, None])[:, 0] - log_z_R
    targets = torch.where(targets_R == NO_TARGET, 0.0, targets)
    # Slots that are not kept point at the first one, so that every write to a cell is the same.
    tail_RV = shifted_RV.scatter_(1, torch.where(kept_RK, topk_ids_RK, topk_ids_RK[:, :1]), float("-inf"))
    largest_R = tail_RV.amax(-1)
    largest_R = largest_R.masked_fill(torch.isneginf(largest_R), 0.0)
    weights_RV = tail_RV.sub_(largest_R[:, None]).exp_()
    tail_log_mass_R = weights_RV.sum(-1).log() + largest_R - log_z_R
    budget_R = tail_sample_budget(tail_log_mass_R, settings.tail_samples_max, settings.tail_samples_per_mass)
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


def _head(shifted_RV: Tensor, log_z_R: Tensor, settings: RecordSettings) -> tuple[Tensor, Tensor, Tensor]:
    """Choose the head: ids, shifted logits and which slots are kept, [R, K] each; likely ids, then forced ones."""
    slots = min(settings.top_k, shifted_RV.shape[1])
    shifted_RK, ids_RK = shifted_RV.topk(slots)
    # Equal logits are common in low-precision models: their order must not depend on how topk met them.
    tied_R = (shifted_RK[:, 1:] == shifted_RK[:, :-1]).any(-1)
    if bool(tied_R.any()):
        by_id = ids_RK[tied_R].argsort(-1)
        order = by_id.gather(1, shifted_RK[tied_R].gather(1, by_id).argsort(dim=-1, descending=True, stable=True))
        ids_RK[tied_R] = ids_RK[tied_R].gather(1, order)
    count_R = torch.full((len(ids_RK),), slots, device=ids_RK.device)
    probs_RK = (shifted_RK - log_z_R[:, None]).double().exp()
    if settings.top_p < 1.0:  # at 1 the mass does not end it: a sum of rounded numbers may reach 1 early, or never
        count_R = torch.minimum(count_R, (probs_RK.cumsum(-1) < settings.top_p).sum(-1) + 1)
    if settings.min_prob > 0.0:
        count_R = torch.minimum(count_R, (probs_RK >= settings.min_prob).sum(-1).clamp(min=1))
    kept_RK = torch.arange(slots, device=ids_RK.device) < count_R[:, None]
    if settings.forced_ids:
        forced_F = torch.tensor(settings.forced_ids, device=ids_RK.device)
        known_RF = ((ids_RK[:, :, None] == forced_F) & kept_RK[:, :, None]).any(1)
        ids_RK = torch.cat([ids_RK, forced_F.expand(len(ids_RK), -1)], 1)
        shifted_RK = torch.cat([shifted_RK, shifted_RV[:, forced_F]], 1)
        kept_RK = torch.cat([kept_RK, ~known_RF], 1)
    return ids_RK, shifted_RK, kept_RK


def _ints(values: Tensor) -> Ints:
    return values.to(torch.int32).cpu().numpy()


def _floats(values: Tensor) -> Floats:
    return values.float().cpu().numpy()
