"""Slow, obvious, dense references: full teacher distributions, one position at a time, in float64."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from llavamod_offline.losses.tail_estimators import TailPrior
from llavamod_offline.losses.targets import EMPTY_ID, SparseTargets


def random_teacher(n: int, vocab: int, seed: int, sharpness: float = 2.0) -> Tensor:
    """Log-probs [N, V] of random teachers, float64."""
    generator = torch.Generator().manual_seed(seed)
    return (sharpness * torch.randn(n, vocab, generator=generator, dtype=torch.float64)).log_softmax(-1)


def truncate(
    log_probs_NV: Tensor,
    *,
    top_k: int,
    samples: int = 0,
    temperatures: tuple[float, ...] = (),
    seed: int = 0,
    vocab_size: int | None = None,
    sampled_at: float = 1.0,
) -> SparseTargets:
    """Records of full distributions with a top-k of 0 to `top_k` ids (ragged) and `samples` weighted tail ids."""
    generator = torch.Generator().manual_seed(seed)
    n, vocab = log_probs_NV.shape
    top_k = min(top_k, vocab)
    topk_ids = torch.full((n, top_k), EMPTY_ID)
    topk_log_probs = torch.full((n, top_k), -math.inf)
    tail = torch.full((n,), -math.inf)
    tail_ids = torch.full((n, samples), EMPTY_ID)
    tail_weights = torch.zeros(n, samples)
    for i in range(n):
        k = top_k - (i % (top_k + 1)) if i % 3 == 1 else top_k
        order = log_probs_NV[i].argsort(descending=True)
        topk_ids[i, :k] = order[:k]
        topk_log_probs[i, :k] = log_probs_NV[i, order[:k]].float()
        if k == vocab:
            continue
        tail[i] = log_probs_NV[i, order[k:]].logsumexp(0).float()
        if samples and i % 5 != 4:  # every fifth position has a tail but no samples from it
            shape = (log_probs_NV[i, order[k:]] / sampled_at).softmax(0)
            drawn = order[k:][torch.multinomial(shape, samples, replacement=True, generator=generator)]
            ids, counts = drawn.unique(return_counts=True)
            tail_ids[i, : len(ids)] = ids
            tail_weights[i, : len(ids)] = counts / samples
    targets = torch.multinomial(log_probs_NV.exp(), 1, generator=generator).squeeze(1) if n else torch.zeros(0).long()
    normalisers = [(log_probs_NV / t).logsumexp(-1) for t in temperatures]
    return SparseTargets(
        topk_ids_NK=topk_ids,
        topk_log_probs_NK=topk_log_probs,
        tail_log_mass_N=tail,
        tail_ids_NM=tail_ids,
        tail_weights_NM=tail_weights,
        target_ids_N=targets,
        target_log_probs_N=log_probs_NV.gather(1, targets[:, None]).squeeze(1).float(),
        entropy_N=torch.special.entr((log_probs_NV / sampled_at).softmax(-1)).sum(-1).float(),
        log_normalisers_NS=torch.stack(normalisers, -1).float() if normalisers else torch.zeros(n, 0),
        temperatures=temperatures,
        vocab_size=vocab_size or vocab,
        sampled_at=sampled_at,
    )


def full_kl(log_probs_NV: Tensor, logits_NV: Tensor, temperature: float = 1.0) -> Tensor:
    """T² · Σ_positions KL(softmax(log p / T) ‖ softmax(z / T)) over the teacher's vocabulary."""
    teacher = (log_probs_NV / temperature).log_softmax(-1)
    student = (logits_NV[:, : log_probs_NV.shape[1]] / temperature).log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum() * temperature**2


def reference_kl(
    log_probs_NV: Tensor,
    targets: SparseTargets,
    logits_NV: Tensor,
    tail: str,
    temperature: float = 1.0,
    prior: TailPrior | None = None,
) -> Tensor:
    """What each tail estimator should give, position by position, from the full teacher and the top-k ids."""
    vocab = log_probs_NV.shape[1]
    total = logits_NV.sum() * 0.0
    for i in range(len(targets)):
        p = (log_probs_NV[i] / temperature).softmax(-1)
        log_q = (logits_NV[i, :vocab] / temperature).log_softmax(-1)
        ids = [int(v) for v in targets.topk_ids_NK[i] if v != EMPTY_ID]
        rest = [v for v in range(vocab) if v not in ids]
        drawn = [
            (int(v), float(w)) for v, w in zip(targets.tail_ids_NM[i], targets.tail_weights_NM[i], strict=True) if w > 0
        ]
        if tail == "renormalised":
            mass = p[ids].sum()
            total = total + sum((p[v] / mass * (torch.log(p[v] / mass) - log_q[v]) for v in ids), start=p.new_zeros(()))
        elif tail == "samples" and drawn and rest:
            r = p[rest].sum()
            cross = -sum((p[v] * log_q[v] for v in ids), start=p.new_zeros(()))
            share = 0.0
            if prior is not None and float(outside := prior.profile_V[rest].double().sum()) > 1e-6:
                share = prior.share
                cross = cross - sum(share * r * prior.profile_V[v] / outside * log_q[v] for v in rest)
            cross = cross - sum(((1 - share) * r * w * log_q[v] for v, w in drawn), start=p.new_zeros(()))
            total = total + cross - torch.special.entr(p).sum()
        else:
            total = total + sum((p[v] * (torch.log(p[v]) - log_q[v]) for v in ids), start=p.new_zeros(()))
            if rest:
                r = p[rest].sum()
                total = total + r * (torch.log(r) - log_q[rest].logsumexp(0))
    return total * temperature**2


def reference_divergence(
    log_probs_NV: Tensor,
    targets: SparseTargets,
    logits_NV: Tensor,
    kind: str,
    *,
    js_weight: float = 0.5,
    skew: float = 0.1,
    temperature: float = 1.0,
    weights_N: Tensor | None = None,
) -> Tensor:
    """T² · Σ of a divergence over the top-k ids and one bucket, event by event, from the full teacher."""
    vocab = log_probs_NV.shape[1]
    total = logits_NV.sum() * 0.0
    for i in range(len(targets)):
        ids = [int(v) for v in targets.topk_ids_NK[i] if v != EMPTY_ID]
        rest = [v for v in range(vocab) if v not in ids]
        p = (log_probs_NV[i] / temperature).softmax(-1)
        q = (logits_NV[i, :vocab] / temperature).softmax(-1)
        events = [[v] for v in ids] + ([rest] if rest else [])
        pairs = [(p[event].sum(), q[event].sum()) for event in events]
        if not ids and targets.tail_log_mass_N[i] == -math.inf:
            continue  # neither top-k nor tail
        weight = 1.0 if weights_N is None else float(weights_N[i])
        total = total + weight * sum((_term(kind, a, b, js_weight, skew) for a, b in pairs), start=p.new_zeros(()))
    return total * temperature**2


def _term(kind: str, p: Tensor, q: Tensor, w: float, a: float) -> Tensor:
    if kind == "forward_kl":
        return p * torch.log(p / q)
    if kind == "reverse_kl":
        return q * torch.log(q / p)
    if kind == "js":
        m = w * p + (1 - w) * q
        return w * p * torch.log(p / m) + (1 - w) * q * torch.log(q / m)
    if kind == "skewed_forward_kl":
        return p * torch.log(p / (a * p + (1 - a) * q))
    if kind == "skewed_reverse_kl":
        return q * torch.log(q / ((1 - a) * p + a * q))
    return (p - q).abs() / 2


def without_targets(targets: SparseTargets, rows: list[int]) -> SparseTargets:
    """The same positions, but the given rows have no top-k, tail, samples or actual token."""
    values = {name: tensor.clone() for name, tensor in vars(targets).items() if isinstance(tensor, Tensor)}
    for name in ("topk_ids_NK", "tail_ids_NM", "target_ids_N"):
        values[name][rows] = EMPTY_ID
    for name in ("topk_log_probs_NK", "tail_log_mass_N"):
        values[name][rows] = -math.inf
    values["tail_weights_NM"][rows] = 0.0
    return replace(targets, **values)  # type: ignore[arg-type]
