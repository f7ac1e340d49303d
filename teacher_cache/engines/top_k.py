"""The top-k of a chunk of logits: its likely ids, the smallest of equal ones, and the ids that are always kept.

Shape suffixes: R positions of a chunk (C of them with a tie across the end of the top-k), V ids, K slots, F forced ids,
G groups of ids, M ids found.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from teacher_cache.format.record import RecordSettings

_LEAST_GROUP = 4  # ids; with smaller groups, too many are picked
_COUNTED = 128  # where the top-k may be more than a 128th of all ids, counting the likely ones costs less than sorting
_ROUNDING = 1e-3  # nats; more than the error of float32


def top_k(
    shifted_RV: Tensor, log_z_R: Tensor, settings: RecordSettings, *, exact: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose the top-k: ids, shifted logits and which slots are kept, [R, K] each; likely ids, then forced ones.

    Equal logits are common in low-precision models, and topk takes any of them in any order: its choice is replaced by
    the smallest ids, in ascending order. Without `exact`, that ignores ids that topk did not take; the last result
    marks such rows [R]. `log_z_R`: of the shifted logits divided by `settings.temperature`.
    """
    slots = _slots(shifted_RV, log_z_R, settings, exact=exact)
    most_RK, ids_RK = _largest(shifted_RV, min(slots + 1, shifted_RV.shape[1]))  # one more shows a tie across the bound
    shifted_RK, ids_RK = most_RK[:, :slots], ids_RK[:, :slots].contiguous()
    count_R = torch.full((len(ids_RK),), slots, device=ids_RK.device)
    probs_RK = (shifted_RK / settings.temperature - log_z_R[:, None]).double().exp()
    if settings.top_p < 1.0:  # at 1 the mass sets no end: a sum of rounded numbers may reach 1 early, or never
        count_R = torch.minimum(count_R, (probs_RK.cumsum(-1) < settings.top_p).sum(-1) + 1)
    if settings.min_prob > 0.0:
        count_R = torch.minimum(count_R, (probs_RK >= settings.min_prob).sum(-1).clamp(min=1))
    tied_R = (shifted_RK[:, 1:] == shifted_RK[:, :-1]).any(-1)
    if not exact or bool(tied_R.any()):
        rows: Tensor | slice = tied_R.nonzero()[:, 0] if exact else slice(None)
        by_id = ids_RK[rows].argsort(-1)
        order = by_id.gather(1, shifted_RK[rows].gather(1, by_id).argsort(dim=-1, descending=True, stable=True))
        ids_RK[rows] = ids_RK[rows].gather(1, order)
    above_R = (shifted_RK > shifted_RK[:, -1:]).sum(-1)
    crossed_R = (most_RK[:, slots:] == shifted_RK[:, -1:]).any(-1) & (above_R < count_R)
    pieces = crossed_R.nonzero()[:, 0].split(max(1, len(ids_RK) // 8)) if exact else ()  # ties may be many
    for rows_C in pieces:
        ids_RK[rows_C] = _smallest_ids(shifted_RV[rows_C], shifted_RK[rows_C, -1], above_R[rows_C], ids_RK[rows_C])
    kept_RK = torch.arange(slots, device=ids_RK.device) < count_R[:, None]
    if settings.forced_ids:
        forced_F = torch.tensor(settings.forced_ids, device=ids_RK.device)
        known_RF = ((ids_RK[:, :, None] == forced_F) & kept_RK[:, :, None]).any(1)
        ids_RK = torch.cat([ids_RK, forced_F.expand(len(ids_RK), -1)], 1)
        shifted_RK = torch.cat([shifted_RK, shifted_RV[:, forced_F]], 1)
        kept_RK = torch.cat([kept_RK, ~known_RF], 1)
    return ids_RK, shifted_RK, kept_RK, crossed_R


def _slots(shifted_RV: Tensor, log_z_R: Tensor, settings: RecordSettings, *, exact: bool) -> int:
    """How many slots the top-k needs: `top_k`, or what `min_prob` leaves of it where counting costs less than sorting.

    The count is a pass over V, and the host has to wait for it.
    """
    slots = min(settings.top_k, shifted_RV.shape[1])
    if not exact or settings.min_prob <= 0.0 or slots * _COUNTED < shifted_RV.shape[1]:
        return slots
    least_R = (log_z_R + math.log(settings.min_prob) - _ROUNDING) * settings.temperature
    return min(slots, max(1, int((shifted_RV >= least_R[:, None]).sum(-1, dtype=torch.int32).amax())))


def _largest(values_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest numbers of each row, and their ids, [R, count] each; ties are broken arbitrarily, as in topk.

    On a CPU topk copies V pairs of id and number and sorts some. The largest numbers are members of the groups with
    the `count` largest maxima, so one vectorised pass over V leaves it two short lists.
    """
    width = values_RV.shape[1]
    size = math.isqrt(width // count)
    if not values_RV.is_cpu or size < _LEAST_GROUP:
        largest_RK, ids_RK = values_RV.topk(count)
        return largest_RK, ids_RK
    groups = width // size  # id g + s · groups is in group g; fewer than `size` ids are in none
    maxima_RG = values_RV[:, : groups * size].unflatten(1, (size, groups)).amax(1)
    picked_RK = maxima_RG.topk(count, sorted=False).indices
    members_RC = (torch.arange(0, groups * size, groups)[:, None] + picked_RK[:, None]).flatten(1)
    others_RC = torch.arange(groups * size, width).expand(len(values_RV), -1)
    ids_RC = torch.cat([members_RC, others_RC], 1)
    largest_RK, places_RK = values_RV.gather(1, ids_RC).topk(count)
    return largest_RK, ids_RC.gather(1, places_RK)


def _smallest_ids(shifted_CV: Tensor, level_C: Tensor, above_C: Tensor, ids_CK: Tensor) -> Tensor:
    """Fill the slots from `above_C` on with the smallest ids whose logit is `level_C`."""
    row_M, id_M = (shifted_CV == level_C[:, None]).nonzero(as_tuple=True)  # by row, then by rising id
    first_C = torch.searchsorted(row_M, torch.arange(len(ids_CK), device=row_M.device))
    slot_M = above_C[row_M] + torch.arange(len(row_M), device=row_M.device) - first_C[row_M]
    fits_M = slot_M < ids_CK.shape[1]
    ids_CK[row_M[fits_M], slot_M[fits_M]] = id_M[fits_M]
    return ids_CK
