"""Divergences over a record's top-k ids and one bucket for the tail: their values and slopes.

Shape suffixes: N positions, E events (the top-k ids, then the bucket). p is the teacher and q the student, both over
the same events; all values are in nats.

- `forward_kl`: Σ p log(p/q).
- `reverse_kl`: Σ q log(q/p). Source: MiniLLM, arXiv 2306.08543.
- `js`: w·KL(p ‖ m) + (1 − w)·KL(q ‖ m) with m = w·p + (1 − w)·q; w is `js_weight`. Source: GKD, arXiv 2306.13649.
- `skewed_forward_kl`: KL(p ‖ α·p + (1 − α)·q); α is `skew`. Source: DistiLLM, arXiv 2402.03898.
- `skewed_reverse_kl`: KL(q ‖ (1 − α)·p + α·q), likewise.
- `total_variation`: ½ Σ |p − q|.

By the data-processing inequality, each is a lower bound of the same divergence over the whole vocabulary, with equality
where the student's tail has the teacher's shape. All are ≥ 0, and 0 at p = q.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llavamod_offline.errors import TargetError
from llavamod_offline.losses.kinds import DIVERGENCE_KINDS, DivergenceKind


@dataclass(frozen=True)
class DivergenceSpec:
    """A divergence and its parameter: `js_weight` for `js`, `skew` for the skewed kinds.

    Errors: `TargetError` for an unknown kind, or a `js_weight` or `skew` outside (0, 1).
    """

    kind: DivergenceKind = "forward_kl"
    js_weight: float = 0.5
    skew: float = 0.1

    def __post_init__(self) -> None:
        if self.kind not in DIVERGENCE_KINDS:
            raise TargetError(f"divergence '{self.kind}' is unknown: choose one of {', '.join(DIVERGENCE_KINDS)}")
        for name, value in (("js_weight", self.js_weight), ("skew", self.skew)):
            if not 0 < value < 1:
                raise TargetError(f"{name} is {value:g}: expected 0 < {name} < 1")


def event_divergence(log_p_NE: Tensor, log_q_NE: Tensor, spec: DivergenceSpec) -> tuple[Tensor, Tensor]:
    """The divergence D of each position, [N], and its slopes q·∂D/∂q, [N, E].

    Slopes treat the q of each event as independent: with slopes s and their sum S, the gradient with respect to the
    events' logits is s − S·q. Events of probability 0 have log-prob −inf.
    """
    return _FORMULAS[spec.kind](log_p_NE, log_q_NE, spec)


def weighted(weights_NE: Tensor, values_NE: Tensor) -> Tensor:
    """weight · value, but 0 where the weight is 0, even if the value is infinite."""
    return torch.where(weights_NE > 0, weights_NE * values_NE, 0.0)


def _forward_kl(log_p_NE: Tensor, log_q_NE: Tensor, spec: DivergenceSpec) -> tuple[Tensor, Tensor]:
    p_NE = log_p_NE.exp()
    return weighted(p_NE, log_p_NE - log_q_NE).sum(-1), -p_NE


def _reverse_kl(log_p_NE: Tensor, log_q_NE: Tensor, spec: DivergenceSpec) -> tuple[Tensor, Tensor]:
    q_NE = log_q_NE.exp()
    terms_NE = weighted(q_NE, log_q_NE - log_p_NE)
    return terms_NE.sum(-1), terms_NE + q_NE


def _js(log_p_NE: Tensor, log_q_NE: Tensor, spec: DivergenceSpec) -> tuple[Tensor, Tensor]:
    weight, p_NE, q_NE = spec.js_weight, log_p_NE.exp(), log_q_NE.exp()
    log_m_NE = _log_mixture(log_p_NE, log_q_NE, weight)
    student_NE = (1 - weight) * weighted(q_NE, log_q_NE - log_m_NE)
    return weight * weighted(p_NE, log_p_NE - log_m_NE).sum(-1) + student_NE.sum(-1), student_NE


def _skewed_forward_kl(log_p_NE: Tensor, log_q_NE: Tensor, spec: DivergenceSpec) -> tuple[Tensor, Tensor]:
    skew, p_NE = spec.skew, log_p_NE.exp()
    log_m_NE = _log_mixture(log_p_NE, log_q_NE, skew)
    slope_NE = -(1 - skew) * weighted(p_NE, (log_q_NE - log_m_NE).exp())
    return weighted(p_NE, log_p_NE - log_m_NE).sum(-1), slope_NE


def _skewed_reverse_kl(log_p_NE: Tensor, log_q_NE: Tensor, spec: DivergenceSpec) -> tuple[Tensor, Tensor]:
    skew, q_NE = spec.skew, log_q_NE.exp()
    log_ratio_NE = log_q_NE - _log_mixture(log_p_NE, log_q_NE, 1 - skew)
    terms_NE = weighted(q_NE, log_ratio_NE)
    return terms_NE.sum(-1), terms_NE + weighted(q_NE, 1 - skew * log_ratio_NE.exp())


def _total_variation(log_p_NE: Tensor, log_q_NE: Tensor, spec: DivergenceSpec) -> tuple[Tensor, Tensor]:
    q_NE = log_q_NE.exp()
    difference_NE = q_NE - log_p_NE.exp()
    return 0.5 * difference_NE.abs().sum(-1), 0.5 * q_NE * difference_NE.sign()


def _log_mixture(log_p_NE: Tensor, log_q_NE: Tensor, weight_p: float) -> Tensor:
    """log(weight · p + (1 − weight) · q)."""
    return torch.logaddexp(log_p_NE + math.log(weight_p), log_q_NE + math.log1p(-weight_p))


_FORMULAS: dict[str, Callable[[Tensor, Tensor, DivergenceSpec], tuple[Tensor, Tensor]]] = {
    "forward_kl": _forward_kl,
    "reverse_kl": _reverse_kl,
    "js": _js,
    "skewed_forward_kl": _skewed_forward_kl,
    "skewed_reverse_kl": _skewed_reverse_kl,
    "total_variation": _total_variation,
}
