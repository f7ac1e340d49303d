"""Losses over cached teacher distributions, for any training loop.

`CachedDistillation` is the whole distillation loss as one module. `distillation_from_hidden` and its relatives fuse the
LM head with the loss, so that logits [N, V] never exist in full. `preference_loss` and `kto_loss` take the summed
log-probs of policy and reference, `policy_gradient` those of a student's own tokens. `SparseTargets` holds a cache's
records in memory.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llavamod_offline.lazy import lazy_exports

if TYPE_CHECKING:
    from llavamod_offline.losses.cached_distillation import CachedDistillation, DistillationOutput
    from llavamod_offline.losses.divergence import (
        Divergence,
        forward_kl,
        jensen_shannon,
        reverse_kl,
        skewed_forward_kl,
        skewed_reverse_kl,
        total_variation,
    )
    from llavamod_offline.losses.fused import (
        LossTerms,
        cross_entropy_from_hidden,
        distillation_from_hidden,
        sequence_log_probs_from_hidden,
    )
    from llavamod_offline.losses.policy import PolicyTerms, policy_gradient
    from llavamod_offline.losses.preference import KtoLoss, PreferenceTerms, kto_loss, preference_loss
    from llavamod_offline.losses.tail_estimators import TailPrior, choose_tail, prior_share
    from llavamod_offline.losses.targets import SparseTargets

__all__ = [
    "CachedDistillation",
    "DistillationOutput",
    "Divergence",
    "KtoLoss",
    "LossTerms",
    "PolicyTerms",
    "PreferenceTerms",
    "SparseTargets",
    "TailPrior",
    "choose_tail",
    "cross_entropy_from_hidden",
    "distillation_from_hidden",
    "forward_kl",
    "jensen_shannon",
    "kto_loss",
    "policy_gradient",
    "preference_loss",
    "prior_share",
    "reverse_kl",
    "sequence_log_probs_from_hidden",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "total_variation",
]
__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "cached_distillation": "CachedDistillation DistillationOutput",
        "divergence": "Divergence forward_kl jensen_shannon reverse_kl skewed_forward_kl skewed_reverse_kl "
        "total_variation",
        "fused": "LossTerms cross_entropy_from_hidden distillation_from_hidden sequence_log_probs_from_hidden",
        "policy": "PolicyTerms policy_gradient",
        "preference": "KtoLoss PreferenceTerms kto_loss preference_loss",
        "tail_estimators": "TailPrior choose_tail prior_share",
        "targets": "SparseTargets",
    },
)
