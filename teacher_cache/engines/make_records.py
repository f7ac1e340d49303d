"""Records made from logits, chunk by chunk on the device they are on.

A GPU is never waited for in between: what a chunk gives has a fixed number of columns, is copied to the host behind the
computation, and is made into records there when they are asked for (`RecordsInFlight`).

Shape suffixes: N positions (R of them in a chunk), X what a row holds, V ids, K slots of the top-k being built, M slots
of tail samples, F forced ids, S temperatures, I and J columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llavamod_offline.data.encode.tokenize import NO_TARGET, Ids
from teacher_cache.engines.tail_samples import tail_sample_budget, tail_samples
from teacher_cache.engines.transfer import HostCopy, to_device
from teacher_cache.format.record import Floats, Ints, Records, RecordSettings, concatenate_records

_CHUNK_VALUES = {"cpu": 2**20, "cuda": 2**26}
_MOST_SLOTS = 256  # of tail samples; more are counted first
_LEAST_GROUP = 4  # ids; of smaller groups too many are picked
_COUNTED = 128  # of a larger share of all ids than 1/128 it is counted first how many are likely enough
_ROUNDING = 1e-3  # nats that a float32 log-prob is off by at most, and far more
_FINITE, _CROSSED = 0, 1  # columns of integers


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
    in_flight = RecordsInFlight(
        rows_NX, target_ids_N, uniforms_N, settings, logits_of=logits_of, vocab_size=vocab_size or rows_NX.shape[1]
    )
    return in_flight.result()


class RecordsInFlight:
    """Records that a GPU is still computing; the arguments are those of `make_records`."""

    @torch.inference_mode()
    def __init__(
        self,
        rows_NX: Tensor,
        target_ids_N: Tensor,
        uniforms_N: Tensor,
        settings: RecordSettings,
        *,
        logits_of: Callable[[Tensor], Tensor],
        vocab_size: int,
    ) -> None:
        self._settings = settings
        self._exact = not _stalls(rows_NX.device)
        step = rows_per_chunk(vocab_size, rows_NX.device.type)

        def columns(chunk: slice, exact: bool) -> tuple[HostCopy, HostCopy]:
            logits_RV = logits_of(rows_NX[chunk]).float()
            found = _chunk_columns(logits_RV, target_ids_N[chunk], uniforms_N[chunk], settings, exact=exact)
            return HostCopy(found[0]), HostCopy(found[1])

        self._columns = columns
        chunks = [slice(start, start + step) for start in range(0, len(rows_NX), step)]
        self._chunks = [(chunk, *columns(chunk, self._exact)) for chunk in chunks]

    @torch.inference_mode()
    def result(self) -> tuple[Records, NDArray[np.bool_]]:
        """Wait for the device; the records, and whether each row's logits were finite."""
        parts: list[Records] = []
        finite: list[NDArray[np.bool_]] = [np.zeros(0, np.bool_)]
        for chunk, ints, floats in self._chunks:
            ints_RI, floats_RJ = ints.result(), floats.result()
            if not self._exact and bool(ints_RI[:, _CROSSED].any()):  # rare: logits that are equal in float32
                ints_RI, floats_RJ = (copy.result() for copy in self._columns(chunk, True))
            finite.append(ints_RI[:, _FINITE].numpy().astype(np.bool_))
            parts.append(_unpacked(ints_RI.numpy(), floats_RJ.numpy(), self._settings))
        return concatenate_records(parts, len(self._settings.temperatures)), np.concatenate(finite)


def _stalls(device: torch.device) -> bool:
    """Whether asking for a value stops the host until the device has finished all that it was given."""
    return device.type != "cpu"


def begin_sequence_records(
    rows_ND: Tensor,
    targets: Sequence[Ids],
    uniforms: Sequence[NDArray[np.float64]],
    settings: RecordSettings,
    *,
    logits_of: Callable[[Tensor], Tensor],
    vocab_size: int,
) -> Callable[[], list[tuple[Records, NDArray[np.bool_]]]]:
    """Begin the records of several sequences whose rows [N, D] follow one another; their rows fill common chunks.

    What is returned waits for them: call it once the device has been given other work.
    """
    in_flight = RecordsInFlight(
        rows_ND,
        to_device(np.concatenate(targets), rows_ND.device),
        to_device(np.concatenate(uniforms), rows_ND.device),
        settings,
        logits_of=logits_of,
        vocab_size=vocab_size,
    )
    lengths = [len(targets_N) for targets_N in targets]

    def finish() -> list[tuple[Records, NDArray[np.bool_]]]:
        records, finite_N = in_flight.result()
        return list(zip(records.split(lengths), np.split(finite_N, np.cumsum(lengths)[:-1]), strict=True))

    return finish


def _chunk_columns(
    logits_RV: Tensor, targets_R: Tensor, uniforms_R: Tensor, settings: RecordSettings, *, exact: bool
) -> tuple[Tensor, Tensor]:
    """Integers [R, I] and floats [R, J] of a chunk, in the order that `_unpacked` takes them apart.

    Without `exact` no value is asked for that would have to be waited for, and which of the equal logits at the end of
    the top-k are taken is left open; rows where that matters are marked.
    """
    shifted_RV, log_z_R, entropy_R = _normalise(logits_RV)
    finite_R = torch.isfinite(entropy_R)  # NaN for a row with any logit that is not finite
    if not exact or not bool(finite_R.all()):  # those rows continue as uniform distributions
        shifted_RV.masked_fill_(~finite_R[:, None], 0.0)
        uniform = math.log(max(logits_RV.shape[1], 1))
        log_z_R, entropy_R = (torch.where(finite_R, values_R, uniform) for values_R in (log_z_R, entropy_R))
    # Σ exp(x/T) ≥ exp(0): no shift is needed, whatever T.
    log_z_at = {t: (shifted_RV / t).exp_().sum(-1).log() for t in settings.temperatures} | {1.0: log_z_R}
    normalisers = [log_z_at[t] - log_z_R / t for t in settings.temperatures]
    learnt_at = settings.temperature
    if learnt_at != 1.0:
        probs_RV = (shifted_RV / learnt_at - log_z_at[learnt_at][:, None]).exp_()
        entropy_R = log_z_at[learnt_at] - torch.linalg.vecdot(probs_RV, shifted_RV) / learnt_at
    topk_ids_RK, topk_shifted_RK, kept_RK, crossed_R = _top_k(shifted_RV, log_z_at[learnt_at], settings, exact=exact)
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
    most = int(budget_R.max()) if exact or settings.tail_samples_max > _MOST_SLOTS else settings.tail_samples_max
    tail_ids_RM = tail_samples(weights_RV, uniforms_R, budget_R, most)
    ints = [finite_R[:, None], crossed_R[:, None], targets_R[:, None], budget_R[:, None]]
    floats = [targets[:, None], entropy_R[:, None], tail_log_mass_R[:, None], *(n[:, None] for n in normalisers)]
    return (
        torch.cat([column.to(torch.int32) for column in (*ints, kept_RK, topk_ids_RK, tail_ids_RM)], 1),
        torch.cat([column.float() for column in (*floats, topk_shifted_RK - log_z_R[:, None])], 1),
    )


def _unpacked(ints_RI: Ints, floats_RJ: Floats, settings: RecordSettings) -> Records:
    """Records of what `_chunk_columns` gives."""
    temperatures = len(settings.temperatures)
    slots = floats_RJ.shape[1] - 3 - temperatures
    kept_RK, ids_RK, tail_ids_RM = np.split(ints_RI[:, 4:], [slots, 2 * slots], axis=1)
    kept_RK, budget_R = kept_RK.astype(np.bool_), np.ascontiguousarray(ints_RI[:, 3])
    return Records(
        target_ids_N=np.ascontiguousarray(ints_RI[:, 2]),
        target_log_probs_N=np.ascontiguousarray(floats_RJ[:, 0]),
        entropy_N=np.ascontiguousarray(floats_RJ[:, 1]),
        tail_log_mass_N=np.ascontiguousarray(floats_RJ[:, 2]),
        log_normalisers_NS=np.ascontiguousarray(floats_RJ[:, 3 : 3 + temperatures]),
        topk_counts_N=kept_RK.sum(-1, dtype=np.int32),
        tail_counts_N=budget_R,
        topk_ids_H=ids_RK[kept_RK],
        topk_log_probs_H=floats_RJ[:, 3 + temperatures :][kept_RK],
        tail_ids_D=tail_ids_RM[np.arange(tail_ids_RM.shape[1]) < budget_R[:, None]],
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


def _top_k(
    shifted_RV: Tensor, log_z_R: Tensor, settings: RecordSettings, *, exact: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Choose the top-k: ids, shifted logits and which slots are kept, [R, K] each; likely ids, then forced ones.

    Equal logits are common in low-precision models, and topk takes any of them in any order: what it took is replaced
    by the smallest ids, in rising order. Without `exact` that leaves out ids that topk did not take; the last result
    marks such rows [R]. `log_z_R`: of the shifted logits divided by `settings.temperature`.
    """
    slots = _slots(shifted_RV, log_z_R, settings, exact=exact)
    most_RK, ids_RK = _largest(shifted_RV, min(slots + 1, shifted_RV.shape[1]))  # one more shows a tie across the bound
    shifted_RK, ids_RK = most_RK[:, :slots], ids_RK[:, :slots].contiguous()
    count_R = torch.full((len(ids_RK),), slots, device=ids_RK.device)
    probs_RK = (shifted_RK / settings.temperature - log_z_R[:, None]).double().exp()
    if settings.top_p < 1.0:  # at 1 the mass does not end it: a sum of rounded numbers may reach 1 early, or never
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

    The count is a pass over V, and has to be waited for.
    """
    slots = min(settings.top_k, shifted_RV.shape[1])
    if not exact or settings.min_prob <= 0.0 or slots * _COUNTED < shifted_RV.shape[1]:
        return slots
    least_R = (log_z_R + math.log(settings.min_prob) - _ROUNDING) * settings.temperature
    return min(slots, max(1, int((shifted_RV >= least_R[:, None]).sum(-1).amax())))


def _largest(values_RV: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest numbers of each row, and their ids, [R, count] each; as topk, any of equal ones.

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
