"""A slow, obvious reference: full distributions as dictionaries keyed by bytes, one span at a time, with autograd.

Shape suffixes: N positions of the student, M of the teacher, V and W their ids.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from llavamod_offline.data.encode.tokenize import TokenizedSequence
from teacher_cache.other_tokenizer.bridge import TokenizerBridge
from teacher_cache.other_tokenizer.spans import Span

Divergence = Callable[[Tensor, Tensor], Tensor]


def forward_kl(p: Tensor, q: Tensor) -> Tensor:
    """Σ p log(p/q) over the events with p > 0."""
    kept = p > 0
    return (p[kept] * (p[kept] / q[kept]).log()).sum()


def reverse_kl(p: Tensor, q: Tensor) -> Tensor:
    """Σ q log(q/p)."""
    kept = q > 0
    return (q[kept] * (q[kept] / p[kept]).log()).sum()


def span_terms(
    bridge: TokenizerBridge,
    span: Span,
    *,
    teacher_NW: Tensor,
    student_MV: Tensor,
    ids: tuple[list[int], list[int]],
    top_k: int | None = None,
    divergence: Divergence = forward_kl,
) -> tuple[Tensor, Tensor]:
    """A span's divergence and sorted distance, from the log-probs at a sequence's tokens, in float64."""
    p, path_p, said, taught = _last(teacher_NW, ids[0], span.teacher, bridge.teacher.join, span.teacher_before)
    q, path_q, own, learnt = _last(student_MV, ids[1], span.student, bridge.student.join, span.student_before)
    ordered = p.argsort(descending=True).tolist()
    known = set(ordered[:top_k]) | {taught}
    match: dict[int, int] = {}
    for number in range(len(p)):
        piece = bridge.teacher.pieces[number]
        if number == taught:
            match[number] = learnt
        elif number == bridge.end_ids[0]:
            if span.is_single and learnt != bridge.end_ids[1]:
                match[number] = bridge.end_ids[1]
        elif piece and bridge.teacher.ids[piece] == number and (said + piece).startswith(own):
            other = bridge.student.ids.get((said + piece)[len(own) :])
            if other is not None and other not in (learnt, bridge.end_ids[1]):
                match[number] = other
    pairs = [(number, match[number]) for number in sorted(known & match.keys())]
    theirs, mine = (torch.tensor([pair[side] for pair in pairs]) for side in (0, 1))
    events_p = torch.cat([p[theirs], (1 - path_p + _without(p, theirs).sum()).clamp(min=1e-7)[None]])
    events_q = torch.cat([q[mine], (1 - path_q + _without(q, mine).sum())[None]])
    unmatched_p = p[torch.tensor(sorted(known - match.keys()), dtype=torch.long)]
    if top_k is not None:  # the actual token may be outside the top-k, but is then matched
        unmatched_p = p[torch.tensor(sorted(set(ordered[:top_k]) - match.keys()), dtype=torch.long)]
    out = torch.zeros(len(q), dtype=torch.bool)
    out[mine] = True
    if span.is_single:
        counterparts = [n for n in bridge.to_student_W.tolist() if n >= 0]
        out[torch.tensor(counterparts)] = True
    unmatched_p = unmatched_p.sort(descending=True).values
    unmatched_q = q[~out].sort(descending=True).values
    count = len(unmatched_p)
    first_q = torch.nn.functional.pad(unmatched_q[:count], (0, max(0, count - len(unmatched_q))))
    tail = p[torch.tensor(sorted(set(range(len(p))) - known), dtype=torch.long)].sum()
    further = (unmatched_q[count:].sum() - tail).clamp(min=0)
    return divergence(events_p, events_q), (unmatched_p - first_q).abs().sum() + further


def _last(
    log_probs_NV: Tensor, ids: list[int], at: tuple[int, int], join: Callable[[list[int]], bytes], before: bytes
) -> tuple[Tensor, Tensor, bytes, int]:
    """The last token's distribution times the others' probability; that probability; the others' bytes; the token."""
    start, stop = at
    probability = torch.ones((), dtype=log_probs_NV.dtype)
    for place in range(start, stop - 1):
        probability = probability * log_probs_NV[place, ids[place]].exp()
    return log_probs_NV[stop - 1].exp() * probability, probability, before + join(ids[start : stop - 1]), ids[stop - 1]


def _without(values: Tensor, places: Tensor) -> Tensor:
    kept = torch.ones(len(values), dtype=torch.bool)
    kept[places] = False
    return values[kept]


def spans_of(bridge: TokenizerBridge, ids: tuple[list[int], list[int]]) -> Iterator[Span]:
    """The spans of two lists of supervised ids."""
    yield from bridge.spans(torch.tensor(ids[0]).numpy(), sequence_of(ids[1]))


def sequence_of(ids: list[int], key: str = "a") -> TokenizedSequence:
    """A sequence of one prompt token followed by supervised ones."""
    ids_T = torch.tensor([0, *ids]).numpy()
    return TokenizedSequence(key, "response", ids_T, torch.arange(1, len(ids) + 1).numpy())
