"""Combine several teachers' targets for the same positions: their weighted mean distribution, p = Σ w·p_t.

The top-k part of the mixture is the union of the teachers' top-k parts. A teacher that lacks an id of the union in its
own top-k part has it somewhere in its tail. FORMAT.md, "Several teachers", says what that means for each reading.

Shape suffixes: N positions, L entries of a position: all teachers' top-k slots, then all their tail samples. The
entries of a position that hold the same id are a group; groups are numbered by increasing id.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llavamod_offline.errors import TargetError
from llavamod_offline.losses.targets import EMPTY_ID, SparseTargets


def mix_targets(parts: Sequence[SparseTargets], weights: Sequence[float], *, by_samples: bool) -> SparseTargets:
    """Mix several teachers' targets at temperature 1, by relative `weights`.

    `by_samples`: a teacher's tail samples determine what its tail gives to the ids of the union, and which other ids it
    holds. Every probability is then unbiased, and so is the gradient of the forward KL. Otherwise, and for a teacher
    whose tail has no samples, the whole tail joins the mixture's: ids of the union lack what it gives to them, at most
    its mass in total. Either way the result is exact where the top-k parts hold all ids.

    The log-probs of the actual tokens are exact. Entropy: the weighted mean of the teachers' plus their Jensen–Shannon
    divergence over the union and whole tails; exact without tails. Normalisers are left out.
    Errors: `TargetError` if the parts are of other tokens, ids or temperatures.
    """
    _check(parts)
    shares = [weight / sum(weights) for weight in weights]
    tails_N = [share * part.tail_log_mass_N.double().exp() for part, share in zip(parts, shares, strict=True)]
    sampled_N = [(part.tail_weights_NM.sum(-1) > 0) & by_samples for part in parts]
    ids_NL = torch.cat([part.topk_ids_NK for part in parts] + [part.tail_ids_NM for part in parts], 1).long()
    known_NL = torch.cat(
        [share * part.topk_log_probs_NK.double().exp() for part, share in zip(parts, shares, strict=True)], 1
    )
    drawn_NL = torch.cat(
        [
            (tail_N * own_N)[:, None] * part.tail_weights_NM.double()
            for part, tail_N, own_N in zip(parts, tails_N, sampled_N, strict=True)
        ],
        1,
    )
    known_NL, drawn_NL = (
        torch.cat([known_NL, torch.zeros_like(drawn_NL)], 1),
        torch.cat([torch.zeros_like(known_NL), drawn_NL], 1),
    )
    group_NL = _groups(ids_NL)
    by_group = torch.zeros_like(known_NL)
    head_NL, sampled_NL = by_group.scatter_add(1, group_NL, known_NL), by_group.scatter_add(1, group_NL, drawn_NL)
    group_ids_NL = torch.full_like(ids_NL, EMPTY_ID).scatter(1, group_NL, ids_NL)
    union_NL = head_NL > 0
    topk_ids_NK, topk_NK = _most_likely(group_ids_NL, torch.where(union_NL, head_NL + sampled_NL, 0.0))
    tail_ids_NM, tail_NM = _most_likely(group_ids_NL, torch.where(union_NL, 0.0, sampled_NL))
    whole_N = torch.stack([t.masked_fill(own, 0.0) for t, own in zip(tails_N, sampled_N, strict=True)]).sum(0)
    readable_N = (whole_N == 0) & (tail_NM.sum(-1) > 0)
    tail_weights_NM = torch.where(readable_N[:, None], tail_NM / tail_NM.sum(-1, keepdim=True), 0.0)
    return replace(
        parts[0],
        topk_ids_NK=topk_ids_NK,
        topk_log_probs_NK=topk_NK.log().float(),
        tail_log_mass_N=(tail_NM.sum(-1) + whole_N).log().float(),
        tail_ids_NM=tail_ids_NM.masked_fill(~readable_N[:, None], EMPTY_ID),
        tail_weights_NM=tail_weights_NM.float(),
        target_log_probs_N=_log_of_mean([part.target_log_probs_N for part in parts], shares),
        entropy_N=_entropy(parts, shares, tails_N, head_NL.gather(1, group_NL)),
        log_normalisers_NS=parts[0].log_normalisers_NS[:, :0],
        temperatures=(),
    )


def concatenate_targets(parts: Sequence[SparseTargets]) -> SparseTargets:
    """Concatenate targets of one vocabulary and the same temperatures, padded to the widest.

    The result's `sampled_at` is that of the parts that have tail samples.
    """
    topk, tail = (max(getattr(part, name).shape[1] for part in parts) for name in ("topk_ids_NK", "tail_ids_NM"))
    padding = {
        "topk_ids_NK": (topk, EMPTY_ID),
        "topk_log_probs_NK": (topk, -torch.inf),
        "tail_ids_NM": (tail, EMPTY_ID),
        "tail_weights_NM": (tail, 0.0),
    }
    columns: dict[str, Any] = {}
    for name, value in vars(parts[0]).items():
        if isinstance(value, Tensor):
            tensors = [getattr(part, name) for part in parts]
            if name in padding:
                width, empty = padding[name]
                tensors = [torch.nn.functional.pad(t, (0, width - t.shape[1]), value=empty) for t in tensors]
            columns[name] = torch.cat(tensors)
    return replace(next((part for part in parts if part.tail_ids_NM.shape[1]), parts[0]), **columns)


def _check(parts: Sequence[SparseTargets]) -> None:
    for part in parts[1:]:
        if len(part) != len(parts[0]) or not torch.equal(part.target_ids_N, parts[0].target_ids_N):
            raise TargetError("a mixture's teachers have records of different tokens: capture the same set with each")
    if len({part.vocab_size for part in parts}) > 1 or {part.sampled_at for part in parts} != {1.0}:
        raise TargetError("a mixture's teachers need the same ids and temperature 1: limit their targets, or use one")


def _groups(ids_NL: Tensor) -> Tensor:
    """The group of each entry, [N, L] int64."""
    sorted_NL, order_NL = ids_NL.sort(-1)
    new_NL = torch.zeros_like(ids_NL)
    new_NL[:, 1:] = sorted_NL[:, 1:] != sorted_NL[:, :-1]
    return torch.zeros_like(ids_NL).scatter(1, order_NL, new_NL.cumsum(-1))


def _most_likely(ids_NL: Tensor, probs_NL: Tensor) -> tuple[Tensor, Tensor]:
    """The ids with a probability and their probabilities, most likely first, ties by id; empty slots: −1 and 0."""
    width = int((probs_NL > 0).sum(-1).max()) if len(ids_NL) else 0
    order_NW = probs_NL.argsort(dim=-1, descending=True, stable=True)[:, :width]
    found_NW = probs_NL.gather(1, order_NW)
    return ids_NL.gather(1, order_NW).masked_fill(found_NW == 0, EMPTY_ID).int(), found_NW


def _log_of_mean(log_probs_N: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    together_NC = torch.stack(list(log_probs_N), -1).double()
    return (together_NC + together_NC.new_tensor(shares).log()).logsumexp(-1).float()


def _entropy(
    parts: Sequence[SparseTargets], shares: Sequence[float], tails_N: Sequence[Tensor], mean_NL: Tensor
) -> Tensor:
    """`mean_NL`: for each entry's id, the probability that the teachers' top-k parts give to it together."""
    own_N = torch.zeros_like(tails_N[0])
    start = 0
    for part, share, tail_N in zip(parts, shares, tails_N, strict=True):
        stop = start + part.topk_ids_NK.shape[1]
        p_NK = part.topk_log_probs_NK.double().exp()
        own_N = own_N + share * part.entropy_N.double()
        own_N = own_N + share * (
            torch.special.xlogy(p_NK, p_NK) - torch.special.xlogy(p_NK, mean_NL[:, start:stop])
        ).sum(-1)
        own_N = own_N + torch.special.xlogy(tail_N, tail_N / share) - torch.special.xlogy(tail_N, sum(tails_N))
        start = stop
    return own_N.float()
