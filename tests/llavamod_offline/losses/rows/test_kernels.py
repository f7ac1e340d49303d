"""The Triton kernels, in Triton's interpreter (see `tests/conftest.py`), against PyTorch's own operations."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from llavamod_offline.losses import fused_linear
from llavamod_offline.losses.fused import (
    cross_entropy_from_hidden,
    distillation_from_hidden,
    sequence_log_probs_from_hidden,
)
from llavamod_offline.losses.rows import kernels
from llavamod_offline.losses.rows.gradients import RowGradients
from llavamod_offline.losses.tail_estimators import TailPrior
from tests.llavamod_offline.losses.reference import random_teacher, truncate

pytest.importorskip("triton")

DEVICE = torch.device("cpu")
VOCAB = 23
TARGETS = truncate(random_teacher(6, VOCAB, 1), top_k=5, samples=3, temperatures=(2.0,)).to(DEVICE)
IDS_N = TARGETS.target_ids_N
PROFILE_V = torch.linspace(0.0, 1.0, VOCAB, device=DEVICE) / VOCAB


def _sum_of_sequences(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
    return sequence_log_probs_from_hidden(hidden_ND, weight_VD, IDS_N, IDS_N % 2, 2, chunk_size=2).square().sum()


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "two temperatures": lambda hidden_ND, weight_VD: (
        distillation_from_hidden(hidden_ND, weight_VD, TARGETS, temperature=2.0, lm_weight=0.5, chunk_size=2).loss_sum
    ),
    "samples and prior": lambda hidden_ND, weight_VD: (
        distillation_from_hidden(
            hidden_ND, weight_VD, TARGETS, tail="samples", prior=TailPrior(0.5, PROFILE_V), lm_weight=1.0, chunk_size=4
        ).loss_sum
    ),
    "cross-entropy": lambda hidden_ND, weight_VD: (
        cross_entropy_from_hidden(hidden_ND, weight_VD, IDS_N, chunk_size=3).loss_sum
    ),
    "sequences": _sum_of_sequences,
}


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "has_kernels", lambda device: True)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("block", [4, 64])
def test_the_largest_and_the_sum_come_from_one_pass(
    block: int, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_BLOCK", block)
    logits_NV = 40 * torch.randn(5, 19, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    logits_NV[1, :9] = float("-inf")  # the first blocks hold no finite logit
    logits_NV[2] = float("-inf")
    padded_NV = torch.nn.functional.pad(logits_NV, (0, 3), value=99.0)[:, :19]
    largest_N, shift_N, sum_N = kernels.peaks_and_sums(padded_NV, temperature)
    expected_N = (logits_NV / temperature).logsumexp(-1)
    torch.testing.assert_close(largest_N, logits_NV.amax(-1) / temperature)
    torch.testing.assert_close(sum_N.log() + shift_N, expected_N)
    assert shift_N[2] == 0.0


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, None])
@pytest.mark.parametrize("has_profile", [False, True])
@pytest.mark.parametrize("block", [4, 64])
def test_the_gradient_of_a_slab_is_that_of_the_slow_operations(
    block: int, has_profile: bool, out_dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masked ids may overflow, ids may repeat, and most are outside the slab."""
    monkeypatch.setattr(kernels, "_BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    start, width, rows = 7, 9, 4
    logits_NW = torch.randn(rows, width, generator=generator).to(DEVICE)
    masked_NK = torch.randint(0, VOCAB, (rows, 3), generator=generator).to(DEVICE)
    masked_NK[0], masked_NK[1, 0] = -1, start
    logits_NW[1, 0] = 1e4
    gradients = RowGradients(
        temperature=2.0,
        shift_N=torch.randn(rows, generator=generator).to(DEVICE),
        scale_N=torch.randn(rows, generator=generator).to(DEVICE),
        masked_ids_NK=masked_NK,
        ids_NX=torch.randint(start, start + 3, (rows, 6), generator=generator).to(DEVICE),
        values_NX=torch.randn(rows, 6, generator=generator).to(DEVICE),
        per_mass_N=torch.rand(rows, generator=generator).to(DEVICE) if has_profile else None,
        profile_V=PROFILE_V if has_profile else None,
    )
    results = []
    for usable in (False, True):
        monkeypatch.setattr(kernels, "has_kernels", lambda device, usable=usable: usable)
        given_NW = logits_NW.clone()
        out_NW = given_NW if out_dtype is None else torch.full_like(given_NW, 7.0, dtype=out_dtype)
        gradients.write(given_NW, start, out_NW)
        results.append(out_NW)
    slow_NW, fast_NW = results
    assert bool(slow_NW.isfinite().all())
    torch.testing.assert_close(fast_NW, slow_NW)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_do_not_depend_on_the_kernels(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(rows, 8, generator=generator).to(DEVICE).requires_grad_() for rows in (6, VOCAB + 2)]
    results = []
    for by_slabs in (False, True):
        monkeypatch.setattr(fused_linear, "goes_by_slabs", lambda weight_VD, by_slabs=by_slabs: by_slabs)
        monkeypatch.setattr(kernels, "has_kernels", lambda device, by_slabs=by_slabs: by_slabs)
        loss = LOSSES[name](*leaves)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for slow, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
