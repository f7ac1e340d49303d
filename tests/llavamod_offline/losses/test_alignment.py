from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llavamod_offline.errors import ConfigError, TargetError
from llavamod_offline.families.llava.checkpoint import load_llava
from llavamod_offline.families.llava.export import save_llava
from llavamod_offline.losses.alignment import (
    HiddenProjection,
    hidden_alignment,
    hidden_relations,
    lm_head_metric,
    relation_alignment,
    visual_token_kl,
)
from llavamod_offline.losses.kinds import HiddenDistance
from llavamod_offline.models.checkpoint import load_tokenizer
from tests.llavamod_offline.losses.reference import full_kl, random_teacher, truncate
from tests.tiny import write_tiny_llava


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class TestHiddenAlignment:
    def test_by_hand(self) -> None:
        student = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
        teacher = torch.tensor([[4.0, 3.0], [0.0, -2.0]])
        # (1 + 1) / 2 and (1 + 4) / 2; 1 − 24/25 and 1 − 0
        assert hidden_alignment(student, teacher).item() == pytest.approx(3.5)
        assert hidden_alignment(student, teacher, distance="cosine").item() == pytest.approx(1.04)
        only_first = torch.tensor([True, False])
        assert hidden_alignment(student, teacher, mask_N=only_first).item() == pytest.approx(1.0)
        assert hidden_alignment(student, teacher, distance="cosine", mask_N=only_first).item() == pytest.approx(0.04)

    @pytest.mark.parametrize("distance", ["mse", "cosine"])
    @pytest.mark.parametrize("n", [0, 1, 7])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_equals_a_loop_in_value_and_gradient(self, distance: HiddenDistance, n: int, dtype: torch.dtype) -> None:
        student_NT, teacher_NT = (_normal(n, 5, seed=seed).to(dtype).requires_grad_() for seed in (1, 2))
        mask_N = torch.arange(n) % 3 != 1
        wide_NT, wide_teacher_NT = student_NT.detach().double().requires_grad_(), teacher_NT.detach().double()
        total = wide_NT.sum() * 0.0
        for i in range(n):
            a, b = wide_NT[i], wide_teacher_NT[i]
            one = ((a - b) ** 2).mean() if distance == "mse" else 1 - a @ b / (a.norm() * b.norm())
            total = total + one * float(mask_N[i])
        (expected,) = torch.autograd.grad(total, wide_NT)
        loss = hidden_alignment(student_NT, teacher_NT, distance=distance, mask_N=mask_N)
        loss.backward()
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss.double(), total.detach(), rtol=1e-5, atol=1e-6)
        assert student_NT.grad is not None
        rtol = 1e-5 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(student_NT.grad.double(), expected, rtol=rtol, atol=1e-6)
        assert teacher_NT.grad is None

    def test_states_of_zero_give_no_nan(self) -> None:
        student = torch.zeros(2, 3, requires_grad=True)
        loss = hidden_alignment(student, torch.ones(2, 3), distance="cosine")
        loss.backward()
        assert loss.item() == pytest.approx(2.0)
        assert student.grad is not None
        assert torch.isfinite(student.grad).all()

    def test_errors(self) -> None:
        with pytest.raises(TargetError, match=r"projected shape is \(2, 3\), the teacher's \(2, 4\)"):
            hidden_alignment(torch.zeros(2, 3), torch.zeros(2, 4))
        with pytest.raises(ConfigError, match="'l1' is unknown: choose one of mse, cosine"):
            hidden_alignment(torch.zeros(2, 3), torch.zeros(2, 3), distance="l1")  # type: ignore[arg-type]


def test_the_projection_learns_beside_the_student_and_stays_behind(tmp_path: Path) -> None:
    """It maps 64 dimensions to 48, is trained by the same optimiser, and appears in no exported file."""
    folder = write_tiny_llava(tmp_path / "student")
    student = load_llava(folder)
    projection = HiddenProjection(64, 48)
    embedding = student.get_input_embeddings()
    teacher_NT = _normal(6, 48).float()
    optimizer = torch.optim.AdamW([*embedding.parameters(), *projection.parameters()], lr=1e-2)
    losses = []
    for _ in range(20):
        loss = hidden_alignment(projection(embedding(torch.arange(6))), teacher_NT)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    save_llava(student, tmp_path / "exported", tokenizer=load_tokenizer(folder), processor_source=folder)
    saved = load_file(tmp_path / "exported" / "model.safetensors")
    assert saved.keys() == load_file(folder / "model.safetensors").keys()
    assert not {tuple(tensor.shape) for tensor in saved.values()} & {(48, 64), (48, 48)}


def test_visual_token_kl_is_the_forward_kl_at_the_images_tokens() -> None:
    log_probs_NV = random_teacher(9, 30, 2)
    targets = truncate(log_probs_NV[:1], top_k=30)
    hidden_ND, weight_VD = _normal(1, 6).float().requires_grad_(), _normal(33, 6, seed=1).float()
    terms = visual_token_kl(hidden_ND, weight_VD, targets)
    wide_ND = hidden_ND.detach().double().requires_grad_()
    exact = full_kl(log_probs_NV[:1], wide_ND @ weight_VD.double().T)
    torch.testing.assert_close(terms.loss_sum.double(), exact, rtol=1e-5, atol=1e-5)
    (ours,), (theirs,) = torch.autograd.grad(terms.loss_sum, hidden_ND), torch.autograd.grad(exact, wide_ND)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


def test_some_of_the_positions_are_taken_in_any_order() -> None:
    targets = truncate(random_teacher(9, 30, 2), top_k=4)
    taken = targets.take(torch.tensor([5, 0, 5]))
    assert len(taken) == 3
    for place, row in enumerate((5, 0, 5)):
        for name in ("topk_ids_NK", "topk_log_probs_NK", "tail_log_mass_N", "target_ids_N", "tail_ids_NM"):
            assert torch.equal(getattr(taken, name)[place], getattr(targets, name)[row]), name
    assert taken.vocab_size == targets.vocab_size


class TestRelations:
    @pytest.mark.parametrize("vocab_size", [None, 11])
    def test_relations_are_those_of_the_logits(self, vocab_size: int | None) -> None:
        hidden_BPD, weight_VD = _normal(2, 5, 4), _normal(13, 4, seed=1)
        logits_BPV = (hidden_BPD @ weight_VD.T)[..., :vocab_size]
        expected_BPP = torch.einsum("bpv,bqv->bpq", logits_BPV, logits_BPV)
        ours_BPP = hidden_relations(hidden_BPD.float(), lm_head_metric(weight_VD.float(), vocab_size=vocab_size))
        torch.testing.assert_close(ours_BPP.double(), expected_BPP, rtol=1e-5, atol=1e-5)

    def test_hidden_states_relate_by_themselves_where_no_head_is_given(self) -> None:
        hidden_BPD = _normal(2, 5, 4)
        expected_BPP = torch.einsum("bpd,bqd->bpq", hidden_BPD, hidden_BPD)
        torch.testing.assert_close(hidden_relations(hidden_BPD.half()).double(), expected_BPP, rtol=2e-3, atol=5e-3)
        measured_BPP = hidden_relations(hidden_BPD, torch.eye(4))
        torch.testing.assert_close(measured_BPP.double(), expected_BPP, rtol=1e-5, atol=1e-5)

    def test_by_hand(self) -> None:
        # ⟨(1, 0, 0, 1), (1, 1, 1, 1)⟩ / (√2 · 2) = 1/√2
        student, teacher = torch.eye(2)[None], torch.ones(1, 2, 2)
        assert relation_alignment(student, teacher).item() == pytest.approx(1 - 1 / math.sqrt(2))
        assert relation_alignment(5 * teacher, teacher).item() == pytest.approx(0.0, abs=1e-6)
        assert relation_alignment(-teacher, teacher).item() == pytest.approx(2.0)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_equals_a_loop_over_images_and_pairs_of_tokens(self, dtype: torch.dtype) -> None:
        """Student and teacher differ in width and LM head; images have different numbers of tokens, one has none."""
        student_BPD = _normal(4, 5, 6).to(dtype).requires_grad_()
        weight_VD = _normal(13, 6, seed=1).to(dtype)
        teacher_BPP = hidden_relations(
            _normal(4, 5, 9, seed=2), lm_head_metric(_normal(17, 9, seed=3))
        ).requires_grad_()
        mask_BP = torch.arange(5) < torch.tensor([5, 3, 0, 1])[:, None]
        loss = relation_alignment(
            hidden_relations(student_BPD, lm_head_metric(weight_VD)), teacher_BPP, mask_BP=mask_BP
        )
        loss.backward()
        wide_BPD = student_BPD.detach().double().requires_grad_()
        total = wide_BPD.sum() * 0.0
        for image, tokens in enumerate((5, 3, 0, 1)):
            if not tokens:
                continue
            logits_PV = wide_BPD[image, :tokens] @ weight_VD.double().T
            ours = torch.stack([a @ b for a in logits_PV for b in logits_PV])
            theirs = teacher_BPP[image, :tokens, :tokens].detach().double().flatten()
            total = total + 1 - ours @ theirs / (ours.norm() * theirs.norm())
        (expected,) = torch.autograd.grad(total, wide_BPD)
        torch.testing.assert_close(loss.double(), total.detach(), rtol=1e-4, atol=1e-5)
        assert student_BPD.grad is not None
        rtol = 1e-3 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(student_BPD.grad.double(), expected, rtol=rtol, atol=1e-5)
        assert not student_BPD.grad[2].any()
        assert teacher_BPP.grad is None

    def test_nothing_gives_zero_with_zero_gradient(self) -> None:
        for shape in ((0, 3, 3), (2, 0, 0)):
            student = torch.zeros(shape, requires_grad=True)
            loss = relation_alignment(student, torch.zeros(shape))
            loss.backward()
            assert loss.item() == 0.0
        zeros = torch.zeros(2, 3, 3, requires_grad=True)
        loss = relation_alignment(zeros, torch.zeros(2, 3, 3), mask_BP=torch.zeros(2, 3).bool())
        loss.backward()
        assert loss.item() == 0.0
        assert zeros.grad is not None
        assert not zeros.grad.any()

    def test_errors(self) -> None:
        with pytest.raises(TargetError, match=r"student's shape is \(1, 2, 2\), the teacher's \(1, 3, 3\)"):
            relation_alignment(torch.zeros(1, 2, 2), torch.zeros(1, 3, 3))
