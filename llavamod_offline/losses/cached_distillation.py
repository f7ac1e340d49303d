"""Distillation from a cache as one module, for training loops other than `train-student`.

Shape suffixes: B sequences, T tokens, N positions that have records, D hidden size, V rows of the LM head.
"""

from __future__ import annotations

from dataclasses import replace
from types import MethodType
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from llavamod_offline.data.encode.tokenize import NO_TARGET, UNSUPERVISED
from llavamod_offline.errors import ModelError, TargetError
from llavamod_offline.losses.fused import distillation_from_hidden
from llavamod_offline.losses.kinds import DivergenceKind, TailEstimator
from llavamod_offline.losses.tail_estimators import TailPrior, choose_tail, prior_share
from llavamod_offline.losses.targets import SparseTargets
from llavamod_offline.models.lm_head import LmHead, as_lm_head, check_lm_head, lm_head_of


class CachedTeacher(Protocol):
    """The part of a cache that the loss needs; `teacher_cache.TeacherCache` implements it."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def tail_profile(self) -> Tensor | None: ...
    @property
    def positions_kept(self) -> str: ...
    @property
    def positions(self) -> int: ...
    @property
    def sampled_at(self) -> float: ...
    @property
    def has_tail_samples(self) -> bool: ...


class Swap(Protocol):
    """Two token ids that teacher and student have swapped; `teacher_cache.check_student` returns it."""

    def vocab_size(self, cached: int) -> int: ...
    def profile(self, profile_V: Tensor) -> Tensor: ...
    def targets(self, targets: SparseTargets) -> SparseTargets: ...


class DistillationOutput(NamedTuple):
    """`loss` carries the gradient; the others are detached means over the batch's positions.

    `metrics`: see `divergence.Divergence`.
    """

    loss: Tensor
    divergence: Tensor
    cross_entropy: Tensor
    positions: int
    metrics: dict[str, Tensor]


class CachedDistillation(nn.Module):
    """kd_weight · T² · divergence(teacher, student) + lm_weight · cross-entropy, from a cache's records.

    The defaults are those of `train-student`'s recipes: forward KL with the tail from its samples (`tail` None: see
    `tail_estimators.choose_tail`). `epochs`: how often each record will be read; see `tail_estimators.prior_share`.

    `swap`: what `check_student` returned for a student with a different end of turn. `student_rows`: the rows of the
    student's LM head, if they are fewer than the cache's ids.

    `attach` makes a transformers model return this loss from its own forward pass, which is what HF `Trainer`, DDP,
    FSDP and ZeRO-3 need. Without it, call the module on hidden states and `lm_head_of(model)`.
    """

    def __init__(
        self,
        cache: CachedTeacher,
        *,
        divergence: DivergenceKind = "forward_kl",
        tail: TailEstimator | None = None,
        temperature: float = 1.0,
        kd_weight: float = 1.0,
        lm_weight: float = 0.0,
        js_weight: float = 0.5,
        skew: float = 0.1,
        epochs: float = 1.0,
        swap: Swap | None = None,
        student_rows: int | None = None,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        if tail is None:
            tail = choose_tail(divergence, temperature, sampled_at=cache.sampled_at, has_samples=cache.has_tail_samples)
        self.swap = swap
        self.all_positions = cache.positions_kept == "all"
        self.lm_weight = lm_weight
        self.prior: TailPrior | None = None
        if tail == "samples":
            self.prior = prior_of(cache, epochs=epochs, swap=swap, vocab_size=student_rows)
        self._settings: dict[str, Any] = {
            "divergence": divergence,
            "tail": tail,
            "temperature": temperature,
            "kd_weight": kd_weight,
            "js_weight": js_weight,
            "skew": skew,
            "chunk_size": chunk_size,
        }

    def forward(
        self,
        hidden_BTD: Tensor,
        lm_head: LmHead | Tensor,
        labels_BT: Tensor,
        targets: SparseTargets,
        *,
        attention_mask_BT: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> DistillationOutput:
        """Compute the loss of a batch from its last hidden states and its labels (−100: unsupervised).

        `targets` are the records of the batch's sequences, in order, as returned by `TeacherCache.targets`. The loss is
        the mean over the batch's positions; with `num_items_in_batch`, the labels of all micro-batches and processes of
        the step (HF `Trainer` passes it), this batch's share of the step's mean. A cache of all positions needs
        `attention_mask_BT` where there is padding.

        Errors: `TargetError` if a record was made for a token other than the label, or if a cache of all positions
        comes with a count of other micro-batches' labels, which does not say how many positions these have;
        `ModelError` if the LM head's weight is sharded here.
        """
        head = as_lm_head(lm_head)
        _check_whole(head.weight_VD, hidden_BTD.shape[-1])
        rows_N, target_ids_N = _positions(labels_BT, attention_mask_BT, self.all_positions)
        targets = (targets if self.swap is None else self.swap.targets(targets)).to(hidden_BTD.device)
        _check_target_ids(target_ids_N, targets)
        answers = int((target_ids_N != NO_TARGET).sum())
        positions = len(rows_N)
        if self.all_positions and num_items_in_batch is not None and num_items_in_batch != answers:
            raise TargetError(
                f"num_items_in_batch is {int(num_items_in_batch)} answer tokens, but this cache teaches all positions, "
                "whose number in the other micro-batches is unknown: use one micro-batch per step, or a cache captured "
                "with capture.positions=response"
            )
        with torch.autocast(hidden_BTD.device.type, enabled=False):
            terms = distillation_from_hidden(
                hidden_BTD.flatten(0, 1).index_select(0, rows_N),
                replace(head, weight_VD=head.weight_VD.to(hidden_BTD.dtype)),
                targets,
                prior=self.prior,
                lm_weight=self.lm_weight * positions / max(answers, 1),
                **self._settings,
            )
        share = 1.0 / max(positions, 1)
        scale = share if num_items_in_batch is None else share * answers / num_items_in_batch
        return DistillationOutput(
            terms.loss_sum * scale,
            terms.divergence_sum * share,
            terms.cross_entropy_sum / max(answers, 1),
            positions,
            {name: value * share for name, value in terms.metrics.items()},
        )

    def attach(self, student: Any) -> None:
        """Let `student(**inputs, labels=…, targets=…)` return this loss as a `DistillationOutput`.

        `student` is a transformers model with an LM head; without `targets` it behaves as before. Attach
        before wrapping it in DDP, FSDP or DeepSpeed, and before making a `Trainer` with `remove_unused_columns=False`.
        Errors: `ModelError` if its logits are not those of its LM head, see `check_lm_head`.
        """
        check_lm_head(student, student.base_model, name=type(student).__name__)
        original = student.forward
        distillation = self

        def forward(self: Any, *args: Any, targets: SparseTargets | None = None, **inputs: Any) -> Any:
            if targets is None:
                return original(*args, **inputs)
            labels_BT, items = inputs.pop("labels"), inputs.pop("num_items_in_batch", None)
            _check_unshifted(labels_BT, inputs.get("input_ids"))
            hidden_BTD = self.base_model(*args, **inputs, use_cache=False).last_hidden_state
            return distillation(
                hidden_BTD,
                lm_head_of(self),
                labels_BT,
                targets,
                attention_mask_BT=inputs.get("attention_mask"),
                num_items_in_batch=items,
            )

        student.forward = MethodType(forward, student)


def prior_of(cache: CachedTeacher, *, epochs: float, swap: Swap | None, vocab_size: int | None) -> TailPrior | None:
    """The prior of a student that reads a cache `epochs` times, in the student's ids; None if its share is 0."""
    share = prior_share(positions=cache.positions, epochs=epochs)
    profile_V = cache.tail_profile if share else None  # reads every shard
    if profile_V is None:
        return None
    if swap is not None:
        profile_V = swap.profile(profile_V)
    if vocab_size is not None and vocab_size < len(profile_V):
        profile_V = profile_V[:vocab_size] / profile_V[:vocab_size].sum()
    return TailPrior(share, profile_V)


def _check_target_ids(target_ids_N: Tensor, targets: SparseTargets) -> None:
    """Refuse records that were made for tokens other than the batch's. Errors: `TargetError`."""
    if len(target_ids_N) != len(targets):
        raise TargetError(
            f"the labels supervise {len(target_ids_N)} positions, their records hold {len(targets)}: pass the records "
            "of the same sequences in the same order, and labels of exactly the tokens that the cache supervises"
        )
    unequal_N = target_ids_N != targets.target_ids_N
    if bool(unequal_N.any()):
        place = int(unequal_N.nonzero()[0])
        raise TargetError(
            f"position {place} of the batch: its label is token {int(target_ids_N[place])}, its record was made for "
            f"token {int(targets.target_ids_N[place])}: pass the records of the same sequences, in the same order"
        )


def _check_unshifted(labels_BT: Tensor, input_ids_BT: Tensor | None) -> None:
    if input_ids_BT is None or not bool(((labels_BT != UNSUPERVISED) & (labels_BT != input_ids_BT)).any()):
        return
    raise TargetError("labels: differ from input_ids where they are not −100: do not shift them, the loss does")


def _positions(labels_BT: Tensor, mask_BT: Tensor | None, everywhere: bool) -> tuple[Tensor, Tensor]:
    """The rows of the flattened output that have records, and the token that each predicts (−1: none), both [N]."""
    next_BT = torch.full_like(labels_BT, UNSUPERVISED)
    next_BT[:, :-1] = labels_BT[:, 1:]
    if bool((labels_BT[:, 0] != UNSUPERVISED).any()):
        raise TargetError("labels: the first token of a sequence is supervised, but nothing predicts it: label it −100")
    next_ids_M = next_BT.flatten()
    kept_M = next_ids_M != UNSUPERVISED
    if everywhere:
        kept_M = torch.ones_like(kept_M) if mask_BT is None else mask_BT.flatten().bool()
    rows_N = kept_M.nonzero()[:, 0]
    target_ids_N = next_ids_M[rows_N]
    return rows_N, torch.where(target_ids_N == UNSUPERVISED, NO_TARGET, target_ids_N)


def _check_whole(lm_head_VD: Tensor, hidden_size: int) -> None:
    if hasattr(lm_head_VD, "placements") or lm_head_VD.dim() != 2 or lm_head_VD.shape[1] != hidden_size:
        raise ModelError(
            f"the LM head's weight has shape {list(lm_head_VD.shape)}, the hidden size is {hidden_size}: if FSDP or "
            "ZeRO-3 has sharded it, call `CachedDistillation.attach(student)` before wrapping the student"
        )
