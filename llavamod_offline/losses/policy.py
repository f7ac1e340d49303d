"""Distillation by policy gradient from one number per token: the teacher's log-prob of what the student wrote.

Shape suffixes: N tokens. Source: Lightning OPD, arXiv 2604.13010 (offline on-policy distillation).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from llavamod_offline.errors import TargetError

IMPORTANCE_MAX = 2.0


@dataclass(frozen=True)
class PolicyTerms:
    """The loss summed over `count` tokens, which carries the gradient, and metrics: detached sums over the same tokens.

    `advantage`: log π_teacher − log π_student. `importance`: the weights, after clipping. `clipped`: the number of
    weights that were clipped.
    """

    loss_sum: Tensor
    count: int
    metrics: dict[str, Tensor]


def policy_gradient(
    log_probs_N: Tensor,
    teacher_log_probs_N: Tensor,
    behaviour_log_probs_N: Tensor,
    *,
    importance_max: float = IMPORTANCE_MAX,
) -> PolicyTerms:
    """Policy gradient of the reverse KL(student ‖ teacher), from answers that the student wrote, summed over tokens.

    With the advantage A = log π_teacher − log π_student and the weight w = min(π_student / π_behaviour,
    `importance_max`), both without gradient, each token adds −w·A to the value, an estimate of the reverse KL, and
    −w·A·∇log π_student to the gradient. If no weight is clipped, its expectation over tokens drawn from the full
    π_behaviour (not its top p) is the gradient of the reverse KL at their positions. A token's effect on later
    positions is left out, as usual.

    Shapes: all [N], for the tokens that were written; only `log_probs_N`, the student's, needs a gradient.
    Errors: `TargetError` if `importance_max` is not above 0.
    """
    if not importance_max > 0:
        raise TargetError(f"importance_max is {importance_max:g}: must be above 0")
    student_N = log_probs_N.detach()
    advantage_N = teacher_log_probs_N.to(student_N) - student_N
    ratio_N = (student_N - behaviour_log_probs_N.to(student_N)).exp()
    weight_N = ratio_N.clamp(max=importance_max)
    score_N = -weight_N * advantage_N
    # The student's log-probs add their gradient but no value.
    loss_sum = (score_N * (1 + log_probs_N - student_N)).sum()
    metrics = {
        "advantage": advantage_N.sum(),
        "importance": weight_N.sum(),
        "clipped": (ratio_N > importance_max).sum(),
    }
    return PolicyTerms(loss_sum, len(log_probs_N), metrics)
