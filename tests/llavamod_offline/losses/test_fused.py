from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llavamod_offline.errors import TargetError
from llavamod_offline.losses.divergence import forward_kl
from llavamod_offline.losses.fused import (
    LossTerms,
    cross_entropy_from_hidden,
    distillation_from_hidden,
    sequence_log_probs_from_hidden,
)
from llavamod_offline.losses.kinds import TailEstimator
from llavamod_offline.losses.targets import SparseTargets
from tests.llavamod_offline.losses.reference import random_teacher, reference_kl, truncate


def _leaves(n: int, rows: int, dim: int = 6, seed: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden_ND = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
    return hidden_ND.requires_grad_(), weight_VD.requires_grad_()


def _single(tensor: Tensor) -> Tensor:
    return tensor.detach().float().requires_grad_()


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(0, 9),
    vocab=st.integers(2, 19),
    extra=st.integers(0, 3),
    top_k=st.integers(0, 19),
    chunk=st.integers(1, 11),
    tail=st.sampled_from(("bucket", "samples", "renormalised")),
    temperature=st.sampled_from((1.0, 2.0)),
    weights=st.sampled_from(((1.0, 0.0), (1.0, 1.0), (0.5, 2.0), (0.0, 1.0))),
    seed=st.integers(0, 2**20),
)
def test_distillation_equals_the_dense_reference_in_any_chunks(
    n: int,
    vocab: int,
    extra: int,
    top_k: int,
    chunk: int,
    tail: TailEstimator,
    temperature: float,
    weights: tuple[float, float],
    seed: int,
) -> None:
    if tail == "samples":
        temperature = 1.0
    log_probs_NV = random_teacher(n, vocab, seed)
    targets = truncate(log_probs_NV, top_k=top_k, samples=3, temperatures=(2.0,), seed=seed)
    kd_weight, lm_weight = weights
    hidden_ND, weight_VD = _leaves(n, vocab + extra)
    logits_NV = hidden_ND @ weight_VD.T
    divergence = reference_kl(log_probs_NV, targets, logits_NV, tail, temperature)
    log_q_NV = logits_NV[:, :vocab].log_softmax(-1)
    cross_entropy = -log_q_NV.gather(1, targets.target_ids_N[:, None]).sum()
    expected = torch.autograd.grad(
        0.1 * (kd_weight * divergence + lm_weight * cross_entropy), (hidden_ND, weight_VD), materialize_grads=True
    )

    leaves = _single(hidden_ND), _single(weight_VD)
    terms = distillation_from_hidden(
        *leaves,
        targets,
        tail=tail,
        temperature=temperature,
        kd_weight=kd_weight,
        lm_weight=lm_weight,
        chunk_size=chunk,
    )
    gradients = torch.autograd.grad(0.1 * terms.loss_sum, leaves)
    if kd_weight:
        torch.testing.assert_close(terms.divergence_sum.double(), divergence, rtol=5e-5, atol=5e-5)
    if lm_weight:
        torch.testing.assert_close(terms.cross_entropy_sum.double(), cross_entropy, rtol=5e-5, atol=5e-5)
    total = kd_weight * terms.divergence_sum + lm_weight * terms.cross_entropy_sum
    torch.testing.assert_close(terms.loss_sum.detach(), total, rtol=1e-5, atol=1e-5)
    for gradient, reference in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=5e-4, atol=2e-5)


def test_metrics_do_not_depend_on_the_chunks_and_equal_the_dense_ones() -> None:
    targets = truncate(random_teacher(11, 30, 1), top_k=6, samples=3)
    hidden_ND, weight_VD = (_single(leaf) for leaf in _leaves(11, 32))
    dense = forward_kl((hidden_ND @ weight_VD.T).detach(), targets).metrics
    for chunk in (1, 4, 11, 100):
        metrics = distillation_from_hidden(hidden_ND, weight_VD, targets, chunk_size=chunk).metrics
        assert metrics.keys() == dense.keys()
        for name, value in metrics.items():
            torch.testing.assert_close(value, dense[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vocab_size", [None, 17])
def test_cross_entropy_equals_torch(vocab_size: int | None) -> None:
    hidden_ND, weight_VD = _leaves(10, 20)
    ids_N = torch.arange(10) % 17
    logits_NV = (hidden_ND @ weight_VD.T)[:, :vocab_size]
    dense = torch.nn.functional.cross_entropy(logits_NV, ids_N, reduction="sum")
    expected = torch.autograd.grad(dense, (hidden_ND, weight_VD))
    leaves = _single(hidden_ND), _single(weight_VD)
    terms = cross_entropy_from_hidden(*leaves, ids_N, vocab_size=vocab_size, chunk_size=3)
    torch.testing.assert_close(terms.loss_sum, dense.float())
    assert terms.count == 10
    assert terms.cross_entropy_sum == terms.loss_sum.detach()
    for gradient, reference in zip(torch.autograd.grad(terms.loss_sum, leaves), expected, strict=True):
        torch.testing.assert_close(gradient.double(), reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vocab_size", [None, 15])
def test_sequence_log_probs_equal_torch_with_a_gradient_of_their_own_each(vocab_size: int | None) -> None:
    hidden_ND, weight_VD = _leaves(10, 20)
    ids_N = (torch.arange(10) * 7) % 15
    sequence_of_N = torch.tensor([0, 0, 0, 2, 2, 1, 1, 1, 1, 0])
    log_q_NV = (hidden_ND @ weight_VD.T)[:, :vocab_size].log_softmax(-1)
    chosen_N = log_q_NV.gather(1, ids_N[:, None]).squeeze(1)
    dense_S = torch.stack([chosen_N[sequence_of_N == s].sum() for s in range(4)])
    upstream_S = torch.tensor([1.0, -2.0, 0.3, 5.0], dtype=torch.float64)
    expected = torch.autograd.grad((dense_S * upstream_S).sum(), (hidden_ND, weight_VD))
    leaves = _single(hidden_ND), _single(weight_VD)
    sums_S = sequence_log_probs_from_hidden(*leaves, ids_N, sequence_of_N, 4, vocab_size=vocab_size, chunk_size=4)
    torch.testing.assert_close(sums_S, dense_S.float())
    for gradient, reference in zip(
        torch.autograd.grad((sums_S * upstream_S.float()).sum(), leaves), expected, strict=True
    ):
        torch.testing.assert_close(gradient.double(), reference, rtol=1e-4, atol=1e-5)


def test_tied_embeddings_collect_both_gradients() -> None:
    targets = truncate(random_teacher(5, 12, 1), top_k=4, samples=2)
    ids_N = torch.tensor([1, 2, 3, 4, 11])
    weight_VD = _single(_leaves(0, 12)[1])
    distillation_from_hidden(weight_VD[ids_N], weight_VD, targets, lm_weight=1.0, chunk_size=2).loss_sum.backward()
    dense_VD = weight_VD.detach().requires_grad_()
    logits_NV = dense_VD[ids_N] @ dense_VD.T
    cross_entropy = torch.nn.functional.cross_entropy(logits_NV, targets.target_ids_N, reduction="sum")
    (forward_kl(logits_NV, targets).loss_sum + cross_entropy).backward()
    assert weight_VD.grad is not None
    assert dense_VD.grad is not None
    torch.testing.assert_close(weight_VD.grad, dense_VD.grad, rtol=1e-4, atol=1e-5)


def test_frozen_head_gets_no_gradient_and_hidden_states_the_same() -> None:
    targets = truncate(random_teacher(5, 12, 1), top_k=4)
    hidden_ND, weight_VD = (_single(leaf) for leaf in _leaves(5, 12))
    distillation_from_hidden(hidden_ND, weight_VD, targets).loss_sum.backward()
    frozen_ND = hidden_ND.detach().requires_grad_()
    distillation_from_hidden(frozen_ND, weight_VD.detach(), targets).loss_sum.backward()
    assert hidden_ND.grad is not None
    assert frozen_ND.grad is not None
    assert torch.equal(hidden_ND.grad, frozen_ND.grad)


def test_evaluation_makes_no_gradient() -> None:
    targets = truncate(random_teacher(5, 12, 1), top_k=4)
    hidden_ND, weight_VD = (_single(leaf) for leaf in _leaves(5, 12))
    trained = distillation_from_hidden(hidden_ND, weight_VD, targets).loss_sum
    with torch.no_grad(), _LargestTensor() as largest:
        evaluated = distillation_from_hidden(hidden_ND, weight_VD, targets, chunk_size=1).loss_sum
    assert not evaluated.requires_grad
    torch.testing.assert_close(evaluated, trained.detach())
    assert largest.numel < 12 * 6  # less than the LM head's gradient


@pytest.mark.parametrize("lm_weight", [0.0, 1.0])
def test_no_positions_give_zero_with_zero_gradients(lm_weight: float) -> None:
    targets = truncate(random_teacher(0, 9, 0), top_k=3, samples=2)
    hidden_ND, weight_VD = (_single(leaf) for leaf in _leaves(0, 9))
    terms: LossTerms = distillation_from_hidden(hidden_ND, weight_VD, targets, lm_weight=lm_weight)
    terms.loss_sum.backward()
    assert terms.loss_sum.item() == 0.0
    assert terms.count == 0
    assert weight_VD.grad is not None
    assert not weight_VD.grad.any()
    nothing = torch.zeros(0, dtype=torch.long)
    assert cross_entropy_from_hidden(hidden_ND, weight_VD, nothing).loss_sum.item() == 0.0
    assert sequence_log_probs_from_hidden(hidden_ND, weight_VD, nothing, nothing, 2).tolist() == [0.0, 0.0]


def test_bfloat16_keeps_logits_and_sums_in_float32() -> None:
    n, vocab = 64, 50
    targets = truncate(random_teacher(n, vocab, 1), top_k=8)
    hidden_ND, weight_VD = (leaf.detach().bfloat16().requires_grad_() for leaf in _leaves(n, vocab, dim=32))
    terms = distillation_from_hidden(hidden_ND, weight_VD, targets, lm_weight=1.0, chunk_size=4)
    terms.loss_sum.backward()
    exact = hidden_ND.detach().float().requires_grad_(), weight_VD.detach().float().requires_grad_()
    reference = distillation_from_hidden(*exact, targets, lm_weight=1.0)
    reference.loss_sum.backward()
    assert terms.loss_sum.dtype == torch.float32
    torch.testing.assert_close(terms.loss_sum, reference.loss_sum, rtol=2e-2, atol=0.0)
    for low, high in zip((hidden_ND, weight_VD), exact, strict=True):
        assert low.grad is not None
        assert high.grad is not None
        assert low.grad.dtype == torch.bfloat16
        assert (low.grad.float() - high.grad).norm() < 0.03 * high.grad.norm()


class _LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation creates; views are not counted."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {value.untyped_storage().data_ptr() for value in args if isinstance(value, Tensor)}
        for tensor in out if isinstance(out, tuple) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("lm_weight", [0.0, 1.0])
def test_logits_never_exist_whole(lm_weight: float) -> None:
    n, vocab, chunk = 600, 100, 16
    targets = truncate(random_teacher(n, vocab, 1), top_k=4, samples=2)
    hidden_ND, weight_VD = (_single(leaf) for leaf in _leaves(n, vocab))
    ids_N = targets.target_ids_N
    with _LargestTensor() as largest:
        distillation_from_hidden(
            hidden_ND, weight_VD, targets, lm_weight=lm_weight, chunk_size=chunk
        ).loss_sum.backward()
        cross_entropy_from_hidden(hidden_ND, weight_VD, ids_N, chunk_size=chunk).loss_sum.backward()
        sums_S = sequence_log_probs_from_hidden(hidden_ND, weight_VD, ids_N, ids_N % 2, 2, chunk_size=chunk)
        sums_S.sum().backward()
    assert largest.numel <= n * 6  # the hidden states' own gradient; logits would be n · 100


class TestErrors:
    targets: SparseTargets = truncate(random_teacher(5, 12, 1), top_k=4)

    def test_positions_that_differ_in_number(self) -> None:
        hidden_ND, weight_VD = _leaves(4, 12)
        with pytest.raises(TargetError, match="4 hidden states for 5 cached positions"):
            distillation_from_hidden(hidden_ND.float(), weight_VD.float(), self.targets)

    def test_ids_beyond_the_head(self) -> None:
        hidden_ND, weight_VD = (_single(leaf) for leaf in _leaves(5, 8))
        with pytest.raises(TargetError, match="beyond the 8 rows of the student's LM head"):
            distillation_from_hidden(hidden_ND, weight_VD, self.targets)
        ids_N = torch.tensor([0, 1, 2, 3, 8])
        with pytest.raises(TargetError, match="8 lies beyond the student's vocabulary of 8"):
            cross_entropy_from_hidden(hidden_ND, weight_VD, ids_N)
        with pytest.raises(TargetError, match="8 lies beyond the student's vocabulary of 7"):
            sequence_log_probs_from_hidden(hidden_ND, weight_VD, ids_N, ids_N, 9, vocab_size=7)

    def test_a_second_backward_pass(self) -> None:
        hidden_ND, weight_VD = (_single(leaf) for leaf in _leaves(5, 12))
        loss = distillation_from_hidden(hidden_ND, weight_VD, self.targets).loss_sum
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="one backward pass"):
            loss.backward()

    def test_vocabulary_of_the_targets_may_be_smaller(self) -> None:
        hidden_ND, weight_VD = (_single(leaf) for leaf in _leaves(5, 12))
        smaller = dataclasses.replace(self.targets, vocab_size=12)
        terms = distillation_from_hidden(
            hidden_ND, torch.cat([weight_VD, 9 * torch.ones(32, 6)]), smaller, lm_weight=1.0
        )
        same = distillation_from_hidden(hidden_ND, weight_VD, self.targets, lm_weight=1.0)
        torch.testing.assert_close(terms.loss_sum, same.loss_sum)
