"""The loss over aligned targets against the slow dense reference, and against TRL's GOLD."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llavamod_offline.losses.bucketed_divergence import DivergenceSpec
from llavamod_offline.losses.kinds import DivergenceKind
from llavamod_offline.losses.other_tokenizer.divergence import aligned_distillation_from_hidden, span_distances
from llavamod_offline.losses.other_tokenizer.targets import AlignedTargets
from llavamod_offline.losses.targets import SparseTargets
from teacher_cache.other_tokenizer.token_bytes import TokenBytes
from tests.llavamod_offline.losses.reference import random_teacher
from tests.teacher_cache.other_tokenizer.dense import forward_kl, reverse_kl, sequence_of, span_terms, spans_of
from tests.teacher_cache.other_tokenizer.tokenizers import bridge, said

PAIRS = [("byte400", "byte300"), ("llama", "byte300"), ("byte400", "llama")]
ANSWERS = (
    ("There is a red circle above two yellow squares. Sure?", "Yes."),
    ("naïve 日本 👩‍🚀 in the picture",),
    (" The number is 7. \n", "", "star"),
)
HIDDEN = 12


class Case:
    """A random teacher and student on some answers, as float64 log-probs and as hidden states."""

    def __init__(
        self,
        teacher: str,
        student: str,
        *,
        top_k: int | None = None,
        answers: tuple[tuple[str, ...], ...] = ANSWERS,
        seed: int = 0,
    ) -> None:
        self.bridge = bridge(teacher, student)
        self.ids = [(said(teacher, *turns), said(student, *turns)) for turns in answers]
        self.sequences = [sequence_of(mine, f"s{number}") for number, (_, mine) in enumerate(self.ids)]
        self.counts = [len(theirs) for theirs, _ in self.ids]
        teacher_ids = torch.tensor([number for theirs, _ in self.ids for number in theirs])
        self.target_ids_N = torch.tensor([number for _, mine in self.ids for number in mine])
        self.top_k = top_k
        self.teacher_NW = random_teacher(len(teacher_ids), len(self.bridge.teacher.pieces), seed, sharpness=3.0)
        self.records = records_of(self.teacher_NW, teacher_ids, top_k or self.teacher_NW.shape[1])
        generator = torch.Generator().manual_seed(seed + 1)
        vocab = len(self.bridge.student.pieces)
        self.hidden_ND = torch.randn(len(self.target_ids_N), HIDDEN, generator=generator)
        self.weight_VD = torch.randn(vocab, HIDDEN, generator=generator) * 0.8

    @property
    def targets(self) -> AlignedTargets:
        return self.bridge.targets(self.records, self.counts, self.sequences)

    def reference(self, divergence: str, unmatched_weight: float) -> tuple[Tensor, Tensor, Tensor]:
        """The loss and its gradients with respect to hidden states and LM head, span by span."""
        hidden_ND, weight_VD = (t.double().requires_grad_() for t in (self.hidden_ND, self.weight_VD))
        log_probs_NV = (hidden_ND @ weight_VD.T).log_softmax(-1)
        total = torch.zeros((), dtype=torch.float64)
        before = own_before = 0
        for theirs, mine in self.ids:
            for span in spans_of(self.bridge, (theirs, mine)):
                value, distance = span_terms(
                    self.bridge,
                    span,
                    teacher_NW=self.teacher_NW[before : before + len(theirs)],
                    student_MV=log_probs_NV[own_before : own_before + len(mine)],
                    ids=(theirs, mine),
                    top_k=self.top_k,
                    divergence=forward_kl if divergence == "forward_kl" else reverse_kl,
                )
                total = total + value + unmatched_weight * distance
            before, own_before = before + len(theirs), own_before + len(mine)
        total.backward()
        assert hidden_ND.grad is not None
        assert weight_VD.grad is not None
        return total.detach(), hidden_ND.grad, weight_VD.grad


def records_of(log_probs_NW: Tensor, ids_N: Tensor, top_k: int) -> SparseTargets:
    """Records with a top-k and the tail's mass."""
    sorted_NW, order_NW = log_probs_NW.sort(descending=True)
    none_N0 = torch.zeros(len(ids_N), 0)
    return SparseTargets(
        topk_ids_NK=order_NW[:, :top_k],
        topk_log_probs_NK=sorted_NW[:, :top_k].float(),
        tail_log_mass_N=sorted_NW[:, top_k:].exp().sum(-1).log().float(),
        tail_ids_NM=none_N0.long(),
        tail_weights_NM=none_N0,
        target_ids_N=ids_N,
        target_log_probs_N=log_probs_NW.gather(1, ids_N[:, None])[:, 0].float(),
        entropy_N=-(sorted_NW.exp() * sorted_NW).sum(-1).float(),
        log_normalisers_NS=none_N0,
        temperatures=(),
        vocab_size=log_probs_NW.shape[1],
    )


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
@pytest.mark.parametrize(("top_k", "divergence"), [(None, "forward_kl"), (12, "forward_kl"), (12, "reverse_kl")])
def test_loss_and_gradients_equal_the_dense_reference(
    teacher: str, student: str, top_k: int | None, divergence: DivergenceKind
) -> None:
    case = Case(teacher, student, top_k=top_k)
    expected, hidden_gradient, weight_gradient = case.reference(divergence, 0.7)
    hidden_ND, weight_VD = case.hidden_ND.requires_grad_(), case.weight_VD.requires_grad_()
    terms = aligned_distillation_from_hidden(
        hidden_ND,
        weight_VD,
        case.target_ids_N,
        case.targets,
        has_counterpart_V=torch.from_numpy(case.bridge.has_counterpart_V),
        divergence=divergence,
        kd_weight=2.0,
        unmatched_weight=0.7,
        chunk_size=5,
    )
    terms.loss_sum.backward()
    torch.testing.assert_close(terms.loss_sum.double(), 2 * expected, rtol=1e-4, atol=1e-4)
    assert hidden_ND.grad is not None
    assert weight_VD.grad is not None
    torch.testing.assert_close(hidden_ND.grad.double(), 2 * hidden_gradient, rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(weight_VD.grad.double(), 2 * weight_gradient, rtol=2e-3, atol=2e-4)


def _gold(case: Case) -> Any:
    """TRL's loss with a forward KL over matched tokens plus sorted distances, both with weight 1."""
    from trl.experimental.gold.gold_trainer import ULDLoss

    settings = {
        "uld_crossentropy_weight": 0.0,
        "uld_distillation_weight": 1.0,
        "uld_student_temperature": 1.0,
        "uld_teacher_temperature": 1.0,
        "uld_skip_student_eos": False,
        "uld_skip_teacher_eos": False,
        "use_extended_uld": True,
        "uld_token_merge_strategy": "bayesian",
        "uld_use_hybrid_loss": True,
        "uld_hybrid_matched_weight": 1.0,
        "uld_hybrid_unmatched_weight": 1.0,
        "beta": 0.0,
    }
    sides = [
        SimpleNamespace(get_vocab=partial(_names, tokens, end))
        for tokens, end in zip((case.bridge.student, case.bridge.teacher), reversed(case.bridge.end_ids), strict=True)
    ]
    return ULDLoss(SimpleNamespace(**settings), *sides)


def _names(tokens: TokenBytes, end: int) -> dict[str, int]:
    """A vocabulary in which tokens with the same bytes share a name, as do end-of-turn tokens."""
    names = {piece.decode("latin1"): number for piece, number in tokens.ids.items() if number != end}
    return names | {"<end>": end}


def _ends(tokens: TokenBytes, ids: Sequence[int]) -> list[int]:
    sizes = [len(tokens.pieces[number] or b"") for number in ids[:-1]]
    return [*itertools.accumulate(sizes), sum(sizes) + 1]


@pytest.mark.slow  # imports TRL's trainer
def test_spans_merged_probabilities_and_losses_equal_golds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    case = Case("byte400", "byte300", answers=(("naïve 日本 There is a red circle above two squares.",),))
    case.weight_VD *= 0.4  # GOLD takes logarithms only of probabilities of at least 1e-8
    ((theirs, mine),) = case.ids
    loss = _gold(case)
    logits_NV = case.hidden_ND @ case.weight_VD.T
    offsets = [
        [(0, end) for end in _ends(tokens, ids)]
        for tokens, ids in ((case.bridge.student, mine), (case.bridge.teacher, theirs))
    ]
    own_groups, groups = loss._align_by_byte_offsets(*offsets)
    spans = list(spans_of(case.bridge, (theirs, mine)))
    assert groups == [list(range(*span.teacher)) for span in spans]
    assert own_groups == [list(range(*span.student)) for span in spans]

    targets = case.targets
    merged_SW = loss._merge_probabilities_with_alignment_groups(case.teacher_NW.exp(), groups, theirs)
    ours = torch.cat([targets.topk_log_probs_SK, targets.unmatched_log_probs_SU], 1).double().exp()
    torch.testing.assert_close(
        ours.sort(-1, descending=True).values[:, : merged_SW.shape[1]],
        merged_SW.sort(-1, descending=True).values,
        rtol=1e-4,
        atol=1e-7,
    )

    single = [number for number, span in enumerate(spans) if span.is_single]
    assert 3 < len(single) < len(spans)
    student_SV = loss._merge_probabilities_with_alignment_groups(logits_NV.double().softmax(-1), own_groups, mine)
    loss._compute_hybrid_uld_loss(student_SV[single], merged_SW[single])
    own = {name: value[single] for name, value in vars(targets).items() if not name.endswith("_P")}
    found = span_distances(
        logits_NV[targets.rows_S[single]],
        torch.zeros(len(single)),
        AlignedTargets(**own, rows_P=targets.rows_P[:0], spans_P=targets.spans_P[:0]),
        has_counterpart_V=torch.from_numpy(case.bridge.has_counterpart_V),
        spec=DivergenceSpec(),
    )
    # GOLD's term for matched tokens has no bucket for the rest.
    none_V, none_W = ~torch.from_numpy(case.bridge.has_counterpart_V), torch.from_numpy(case.bridge.to_student_W) < 0
    rest_p, rest_q = merged_SW[single][:, none_W].sum(-1), student_SV[single][:, none_V].sum(-1)
    bucket = (rest_p * (rest_p / rest_q).log()).mean()
    torch.testing.assert_close(
        found["divergence"].double().mean() - bucket, loss.last_matched_loss, rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(found["unmatched"].double().mean(), loss.last_unmatched_loss, rtol=1e-4, atol=1e-5)
