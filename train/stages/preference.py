"""Preference distillation: the student learns which response to prefer, with the cached teacher as reference.

The loss of a step is the mean over its pairs of the preference loss + sft_weight · the chosen response's negative
log-prob + distill_weight · T² · its divergence from the teacher, the last two being means over the response's tokens
(as in RPO, arXiv 2404.19733); plus the routers' balance loss once.

With `kto` each pair is split into a desirable and an undesirable example, and counts as their mean; a sample may also
be a single such example. The terms of chosen responses are then sums over the chosen responses that exist. The shared
baseline, a KL, is estimated on mismatched responses, without gradient.

Shape suffixes: B samples of a micro-batch, R roles (chosen and rejected, or mismatched alone), S sequences, role by
role (R·B if all samples are pairs), N supervised positions, C of them in chosen responses, D hidden size. For the
tower's features see `student_pass.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from llavamod_offline.losses.fused import LossTerms, sequence_log_probs_from_hidden
from llavamod_offline.losses.kinds import PreferenceKind
from llavamod_offline.losses.preference import KtoLoss, kto_loss, preference_loss
from llavamod_offline.models.lm_head import lm_head_of
from llavamod_offline.models.routing import Routing
from train.data.batches import TrainBatch
from train.engine.deepspeed_engine import World
from train.stages.loss_sums import LossSums
from train.stages.student_pass import Distillation, LookAhead, StudentPass, with_balance

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    Loss = Callable[[PreTrainedModel, TrainBatch, Tensor | None, Tensor | None], LossSums]
    LogRatios = Callable[[PreTrainedModel, TrainBatch], LookAhead]

Kind = PreferenceKind | Literal["kto"]


def make_loss(
    *,
    kind: Kind,
    beta: float,
    label_smoothing: float,
    desirable_weight: float,
    undesirable_weight: float,
    average_log_probs: bool,
    sft_weight: float,
    distill_weight: float,
    distillation: Distillation,
    paired: bool,
    vocab_size: int,
    router_aux_coef: float,
    forward: StudentPass,
) -> Loss:
    """Return the loss of a micro-batch, summed over its samples; `paired`: all of them are pairs.

    The loss takes mean log-ratios over the global batch, or None if the micro-batch is the whole batch: for `kto_pair`
    those of chosen and rejected responses [2], for `kto` that of mismatched ones [1]. It also takes the images'
    features if the ratios needed them, so that a step runs the tower once per image.
    """

    def loss(
        model: PreTrainedModel,
        batch: TrainBatch,
        mean_ratios_R: Tensor | None,
        features: Tensor | None,
    ) -> LossSums:
        if features is None:
            features = forward.features(model, batch)
        ratios_R = mean_ratios_R
        if kind == "kto" and ratios_R is None:
            # Before the trained pass: with checkpointing, the backward pass runs it again with the padding mask of the
            # latest one (`models/capacity.py`).
            wanted = batch.mismatched
            assert wanted is not None
            ratios_R = _log_ratios(model, wanted, vocab_size, average_log_probs, features, forward).mean(1)
        found = _log_probs(model, batch, vocab_size, average_log_probs, features, forward)
        means: dict[str, Tensor] = {}
        if kind == "kto":
            assert ratios_R is not None
            judged = kto_loss(
                found.policy_S,
                found.reference_S,
                found.is_chosen_S,
                mismatched_ratios_M=ratios_R,
                beta=beta,
                desirable_weight=desirable_weight,
                undesirable_weight=undesirable_weight,
            )
            total, rewards_2B = _by_sample(judged, batch)
            means["kto_baseline"] = judged.kl * batch.samples
        else:
            policy_2B, reference_2B = found.by_role(batch.samples)
            result = preference_loss(
                policy_2B[0],
                policy_2B[1],
                reference_2B[0],
                reference_2B[1],
                kind=kind,
                beta=beta,
                label_smoothing=label_smoothing,
                kl_chosen=None if ratios_R is None else ratios_R[0],
                kl_rejected=None if ratios_R is None else ratios_R[1],
            )
            total, rewards_2B = result.loss_sum, torch.stack([result.chosen_rewards_B, result.rejected_rewards_B])
        means["preference"] = total.detach()
        if paired:
            margins_B = rewards_2B[0] - rewards_2B[1]
            means |= {
                "reward_accuracy": (margins_B > 0).float().sum(),
                "reward_margin": margins_B.sum(),
                "chosen_log_prob": found.policy_S[: batch.samples].detach().sum(),
                "rejected_log_prob": found.policy_S[batch.samples :].detach().sum(),
            }
        if sft_weight:
            nll = -found.means_S[found.is_chosen_S].sum()
            total = total + sft_weight * nll
            means["chosen_nll"] = nll.detach()
        if distill_weight:
            terms = _distilled(model, batch, found, distillation)
            total = total + distill_weight * terms.loss_sum
            means |= {"divergence": terms.divergence_sum, **terms.metrics}
        spreads = {"chosen_reward": rewards_2B[0], "rejected_reward": rewards_2B[1]}
        sums = LossSums(total, means=means, spreads=spreads)
        return with_balance(sums, found.routing, coefficient=router_aux_coef)

    return loss


def make_log_ratios(*, average_log_probs: bool, vocab_size: int, mismatched: bool, forward: StudentPass) -> LogRatios:
    """Return a look-ahead: log-ratios [R, B] of policy and reference, without gradient, and shared features.

    The ratios are those of the trained responses, or only of the `mismatched` ones.
    """

    def log_ratios(model: PreTrainedModel, batch: TrainBatch) -> LookAhead:
        wanted = batch.mismatched if mismatched else batch
        assert wanted is not None
        features = forward.features(model, wanted)
        return LookAhead(_log_ratios(model, wanted, vocab_size, average_log_probs, features, forward), features)

    return log_ratios


def mean_log_ratios(ratios: Sequence[Tensor], world: World) -> Tensor:
    """Average log-ratios [R, B] over all micro-batches and processes to [R], from which KTO estimates its KL."""
    totals_R = torch.stack([ratios_RB.double().sum(1) for ratios_RB in ratios]).sum(0)
    count = totals_R.new_tensor([sum(ratios_RB.shape[1] for ratios_RB in ratios)])
    summed = world.sum(torch.cat([totals_R, count]))
    return (summed[:-1] / summed[-1]).float()


def _by_sample(judged: KtoLoss, batch: TrainBatch) -> tuple[Tensor, Tensor]:
    """Sum the losses, counting a pair as the mean of its two; also return rewards [2, B], NaN where there is none."""
    assert batch.sample_of_S is not None
    shares_S = 1.0 / torch.bincount(batch.sample_of_S)[batch.sample_of_S]
    rewards_2B = judged.rewards_S.new_full((2, batch.samples), torch.nan)
    rewards_2B[(~judged.desirable_S).long(), batch.sample_of_S] = judged.rewards_S
    return (shares_S * judged.losses_S).sum(), rewards_2B


@dataclass(frozen=True)
class _LogProbs:
    """Log-probs of responses, their means over tokens, and the inputs they come from."""

    policy_S: Tensor
    reference_S: Tensor
    means_S: Tensor
    lengths_S: Tensor
    is_chosen_S: Tensor
    hidden_ND: Tensor
    routing: Routing

    def by_role(self, samples: int) -> tuple[Tensor, Tensor]:
        """Return the policy's and the reference's log-probs, each [R, B]."""
        return self.policy_S.view(-1, samples), self.reference_S.view(-1, samples)


@torch.no_grad()
def _log_ratios(
    model: PreTrainedModel,
    batch: TrainBatch,
    vocab_size: int,
    average: bool,
    features: Tensor | None,
    forward: StudentPass,
) -> Tensor:
    policy_RB, reference_RB = _log_probs(model, batch, vocab_size, average, features, forward).by_role(batch.samples)
    return policy_RB - reference_RB


def _log_probs(
    model: PreTrainedModel,
    batch: TrainBatch,
    vocab_size: int,
    average: bool,
    features: Tensor | None,
    forward: StudentPass,
) -> _LogProbs:
    assert batch.reference_S is not None
    inputs = batch.batch
    hidden_ND, routing = forward.predicting_states(model, batch, features)
    policy_S = sequence_log_probs_from_hidden(
        hidden_ND, lm_head_of(model), inputs.target_ids_N, inputs.sequence_of_N, len(inputs), vocab_size=vocab_size
    )
    lengths_S = torch.bincount(inputs.sequence_of_N, minlength=len(inputs))
    means_S = policy_S / lengths_S
    reference_S = batch.reference_S
    if average:
        policy_S, reference_S = means_S, reference_S / lengths_S
    is_chosen_S = torch.tensor([role == "chosen" for role in inputs.roles], device=policy_S.device)
    return _LogProbs(policy_S, reference_S, means_S, lengths_S, is_chosen_S, hidden_ND, routing)


def _distilled(model: PreTrainedModel, batch: TrainBatch, found: _LogProbs, distillation: Distillation) -> LossTerms:
    """Compute the divergence on chosen responses, averaged over each one's tokens; metrics likewise."""
    assert batch.targets is not None
    chosen_C = slice(len(batch.targets))
    weights_C = 1.0 / found.lengths_S[batch.batch.sequence_of_N[chosen_C]]
    return distillation(found.hidden_ND[chosen_C], lm_head_of(model), batch.targets, weights_N=weights_C)
