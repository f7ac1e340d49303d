"""Losses that align hidden states, or relations between tokens, of teacher and student.

Shape suffixes: N positions, D and T hidden sizes of student and teacher, B images, P visual tokens per image, V rows of
the LM head.

- LLAVADI (arXiv 2407.19409) aligns the last hidden states at the response's tokens, by mean squared error or cosine,
  through a projection that is trained with the student and discarded afterwards.
- LLaVA-KD (arXiv 2410.16236) aligns the next-token distributions at the image's tokens (visual-token KL) and the
  relations between these tokens, by the cosine of the Gram matrices of teacher's and student's logits. Without the
  teacher's LM head, Gram matrices of hidden states replace those of logits.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from llavamod_offline.errors import ConfigError, TargetError
from llavamod_offline.losses.fused import LossTerms, distillation_from_hidden
from llavamod_offline.losses.kinds import HIDDEN_DISTANCES, HiddenDistance
from llavamod_offline.losses.targets import SparseTargets
from llavamod_offline.models.lm_head import LmHead


class HiddenProjection(nn.Module):
    """Maps the student's hidden states [.., D] to the teacher's hidden size [.., T]: linear, GELU, linear (LLAVADI).

    It is not part of the student: the optimiser trains both, but only the student is saved.
    """

    def __init__(self, student_size: int, teacher_size: int) -> None:
        super().__init__()
        self.inner = nn.Linear(student_size, teacher_size)
        self.outer = nn.Linear(teacher_size, teacher_size)

    def forward(self, hidden_ND: Tensor) -> Tensor:
        """Project hidden states; the result has the projection's dtype."""
        hidden_NT = self.inner(hidden_ND.to(self.inner.weight.dtype))
        return cast("Tensor", self.outer(nn.functional.gelu(hidden_NT)))


def hidden_alignment(
    projected_NT: Tensor, teacher_NT: Tensor, *, distance: HiddenDistance = "mse", mask_N: Tensor | None = None
) -> Tensor:
    """The distance of projected hidden states from the teacher's, summed over positions, in float32.

    Shapes: both [N, T] float; `mask_N` [N] bool selects positions; the teacher's states are detached. `mse`: the mean
    squared difference over T. `cosine`: 1 − cos, 1 if either state is 0.
    Errors: `TargetError` if the shapes differ, `ConfigError` for an unknown distance.
    Source: LLAVADI, arXiv 2407.19409.
    """
    if projected_NT.shape != teacher_NT.shape:
        raise TargetError(
            f"hidden states: the projected shape is {tuple(projected_NT.shape)}, "
            f"the teacher's {tuple(teacher_NT.shape)}: they must be equal"
        )
    projected_NT, teacher_NT = projected_NT.float(), teacher_NT.detach().float()
    if distance == "mse":
        loss_N = (projected_NT - teacher_NT).square().mean(-1)
    elif distance == "cosine":
        loss_N = 1 - nn.functional.cosine_similarity(projected_NT, teacher_NT, dim=-1)
    else:
        raise ConfigError(f"distance '{distance}' is unknown: choose one of {', '.join(HIDDEN_DISTANCES)}")
    return loss_N.sum() if mask_N is None else torch.where(mask_N, loss_N, 0.0).sum()


def visual_token_kl(
    hidden_ND: Tensor, lm_head: LmHead | Tensor, targets: SparseTargets, *, chunk_size: int | None = None
) -> LossTerms:
    """Forward KL(teacher ‖ student) at the image's tokens, summed over them.

    Shapes: `hidden_ND` [N, D] are the student's hidden states *at* the N visual tokens of all images, `targets` the
    teacher's distributions at the same tokens.
    Errors: as `distillation_from_hidden`. Source: LLaVA-KD, arXiv 2410.16236, multimodal distillation (L_vis).
    """
    return distillation_from_hidden(hidden_ND, lm_head, targets, chunk_size=chunk_size)


def hidden_relations(hidden_BPD: Tensor, metric_DD: Tensor | None = None) -> Tensor:
    """Relations between the hidden states H of each image's tokens: H M Hᵀ [B, P, P], float32; by default M = I."""
    hidden_BPD = hidden_BPD.float()
    measured_BPD = hidden_BPD if metric_DD is None else hidden_BPD @ metric_DD
    return measured_BPD @ hidden_BPD.transpose(1, 2)


def lm_head_metric(lm_head_VD: Tensor, *, vocab_size: int | None = None) -> Tensor:
    """WᵀW [D, D] of an LM head W, in float32: the metric that gives the relations between logits.

    It avoids computing logits [P, V]: (H Wᵀ)(H Wᵀ)ᵀ = H (WᵀW) Hᵀ. Rows from `vocab_size` on are ignored.
    """
    lm_head_VD = lm_head_VD[:vocab_size].float()
    return lm_head_VD.T @ lm_head_VD


def relation_alignment(student_BPP: Tensor, teacher_BPP: Tensor, *, mask_BP: Tensor | None = None) -> Tensor:
    """1 − the cosine between the two flattened relation matrices of each image, summed over images.

    Shapes: both [B, P, P], see `hidden_relations`; the teacher's are detached. `mask_BP` [B, P] bool selects
    tokens, for images of different lengths; images without any add 0.
    Errors: `TargetError` if the shapes differ.
    Source: LLaVA-KD, arXiv 2410.16236, relation distillation (L_rel).
    """
    if student_BPP.shape != teacher_BPP.shape:
        raise TargetError(
            f"relations: the student's shape is {tuple(student_BPP.shape)}, "
            f"the teacher's {tuple(teacher_BPP.shape)}: they must be equal"
        )
    if mask_BP is None:
        mask_BP = torch.ones(student_BPP.shape[:2], dtype=torch.bool, device=student_BPP.device)
    pair_BPP = mask_BP[:, :, None] & mask_BP[:, None, :]
    student_BPP = torch.where(pair_BPP, student_BPP.float(), 0.0)
    teacher_BPP = torch.where(pair_BPP, teacher_BPP.detach().float(), 0.0)
    cosine_B = nn.functional.cosine_similarity(student_BPP.flatten(1), teacher_BPP.flatten(1), dim=-1)
    return torch.where(mask_BP.any(-1), 1 - cosine_B, 0.0).sum()
