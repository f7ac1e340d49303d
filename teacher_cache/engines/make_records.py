"""Records made from logits, chunk by chunk on the device they are on.

The host never waits for a GPU in between: a chunk's results have a fixed number of columns, are copied to the host
behind the computation, and become records there when asked for (`RecordsInFlight`).

Shape suffixes: N positions (R of them in a chunk), X values of an input row, V ids, K slots of the top-k being built, M
slots of tail samples, F forced ids, S temperatures, I and J columns.
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
from teacher_cache.engines.top_k import top_k
from teacher_cache.engines.transfer import HostCopy, to_device
from teacher_cache.format.record import Floats, Ints, Records, RecordSettings, concatenate_records

_CHUNK_VALUES = {"cpu": 2**20, "cuda": 2**26}
_MOST_SLOTS = 256  # of tail samples; if there may be more, they are counted first
_LEAST_WEIGHT = 1e-15  # if a tail's largest weight is this or more, float32 holds all that counts beside it
_FINITE, _CROSSED = 0, 1  # columns of integers


def rows_per_chunk(vocab_size: int, device_type: str) -> int:
    """How many rows of logits to hold at once: few enough for a small working set, enough to keep the device busy."""
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
    """Whether reading a value blocks the host until the device has finished all queued work."""
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
    """Begin the records of several sequences whose rows [N, D] are concatenated and chunked together.

    The returned function waits for them: call it once the device has been given other work.
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
    """Integers [R, I] and floats [R, J] of a chunk, in the order in which `_unpacked` reads them.

    Without `exact`, no value is read that the host would have to wait for, and it is left open which of several equal
    logits at the end of the top-k are taken; rows where that matters are marked.
    """
    exponentials_RV: Tensor | None
    shifted_RV, exponentials_RV, log_z_at, entropy_R = _normalise(logits_RV, settings.temperatures)
    if not exact:
        exponentials_RV = None  # frees the memory: `_tail_weights` cannot use them then
    finite_R = torch.isfinite(entropy_R)  # NaN for a row with any logit that is not finite
    if not exact or not bool(finite_R.all()):  # those rows continue as uniform distributions
        shifted_RV.masked_fill_(~finite_R[:, None], 0.0)
        if exponentials_RV is not None:
            exponentials_RV.masked_fill_(~finite_R[:, None], 1.0)
        uniform = math.log(max(logits_RV.shape[1], 1))
        log_z_at = {t: torch.where(finite_R, log_z_R, uniform) for t, log_z_R in log_z_at.items()}
        entropy_R = torch.where(finite_R, entropy_R, uniform)
    log_z_R = log_z_at[1.0]
    normalisers = [log_z_at[t] - log_z_R / t for t in settings.temperatures]
    learnt_at = settings.temperature
    if learnt_at != 1.0:
        probs_RV = (shifted_RV / learnt_at - log_z_at[learnt_at][:, None]).exp_()
        entropy_R = log_z_at[learnt_at] - torch.linalg.vecdot(probs_RV, shifted_RV) / learnt_at
    topk_ids_RK, topk_shifted_RK, kept_RK, crossed_R = top_k(shifted_RV, log_z_at[learnt_at], settings, exact=exact)
    targets = shifted_RV.gather(1, targets_R.clamp(min=0)[:, None])[:, 0] - log_z_R
    targets = torch.where(targets_R == NO_TARGET, 0.0, targets)
    # Slots that are not kept point at the first one, so that every write to a cell is the same.
    ids_RK = torch.where(kept_RK, topk_ids_RK, topk_ids_RK[:, :1])
    weights_RV, log_factor_R = _tail_weights(shifted_RV, exponentials_RV, ids_RK)
    tail_log_mass_R = weights_RV.sum(-1).log() + log_factor_R - log_z_R
    sampled_log_mass_R = tail_log_mass_R
    if learnt_at != 1.0:
        weights_RV.pow_(1 / learnt_at)
        sampled_log_mass_R = weights_RV.sum(-1).log() + log_factor_R / learnt_at - log_z_at[learnt_at]
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


def _normalise(logits_RV: Tensor, temperatures: Sequence[float]) -> tuple[Tensor, Tensor, dict[float, Tensor], Tensor]:
    """Shift rows so that the largest logit is 0: logits x and exp(x) [R, V], logs of Σ exp(x/T) and the entropy [R].

    A log-prob is then a difference of numbers that are small where it is small, so it keeps its precision near 0. The
    entropy log Z + Σ p·(−x) is a sum of terms ≥ 0: nothing cancels, even where it is tiny. Σ exp(x/T) ≥ exp(0), so no T
    needs a shift of its own. The sums are keyed by T, T = 1 included.
    """
    shifted_RV = logits_RV - logits_RV.amax(-1, keepdim=True)
    log_z_at = {t: (shifted_RV / t).exp_().sum(-1).log() for t in temperatures if t not in (1.0, 2.0)}
    if 2.0 in temperatures:  # a square is cheaper than another exponential
        roots_RV = (shifted_RV / 2.0).exp_()
        log_z_at[2.0] = roots_RV.sum(-1).log()
        exponentials_RV = roots_RV.square_()
    else:
        exponentials_RV = shifted_RV.exp()
    z_R = exponentials_RV.sum(-1)
    spread_R = -torch.linalg.vecdot(exponentials_RV, shifted_RV)
    log_z_at[1.0] = z_R.log()
    return shifted_RV, exponentials_RV, log_z_at, log_z_at[1.0] + spread_R / z_R


def _tail_weights(shifted_RV: Tensor, exponentials_RV: Tensor | None, topk_ids_RK: Tensor) -> tuple[Tensor, Tensor]:
    """The tail's probabilities up to a factor: weights [R, V], 0 for the top-k ids, and each row's log factor [R].

    Both matrices are overwritten. A tail too unlikely for float32 to hold accurately is shifted by its own largest
    logit. Finding such rows means waiting for the device: without exponentials, all rows are shifted.
    """
    if exponentials_RV is None:
        return _shifted_tail(shifted_RV, topk_ids_RK)
    weights_RV = exponentials_RV.scatter_(1, topk_ids_RK, 0.0)
    log_factor_R = weights_RV.new_zeros(len(weights_RV))
    rows = (weights_RV.amax(-1) < _LEAST_WEIGHT).nonzero()[:, 0]
    if len(rows):
        weights_RV[rows], log_factor_R[rows] = _shifted_tail(shifted_RV[rows], topk_ids_RK[rows])
    return weights_RV, log_factor_R


def _shifted_tail(shifted_RV: Tensor, topk_ids_RK: Tensor) -> tuple[Tensor, Tensor]:
    """`_tail_weights` scaled so that each row's largest is 1."""
    tail_RV = shifted_RV.scatter_(1, topk_ids_RK, float("-inf"))
    largest_R = tail_RV.amax(-1)
    largest_R = largest_R.masked_fill(torch.isneginf(largest_R), 0.0)
    return tail_RV.sub_(largest_R[:, None]).exp_(), largest_R
