from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llavamod_offline.errors import ConfigError, TargetError
from llavamod_offline.losses.preference import kto_loss


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


POLICY = torch.tensor([-8.0, -21.0, -13.0])
REFERENCE = torch.tensor([-10.0, -20.0, -12.0])  # r = 2, −1, −1
DESIRABLE = torch.tensor([True, True, False])


def test_by_hand() -> None:
    # K = max(0, (2 + 1 − 1.5) / 3) = 0.5; 1 − σ(0.1 · 1.5), 1 − σ(0.1 · −1.5), 1 − σ(0.1 · 1.5)
    mismatched = torch.tensor([2.0, 1.0, -1.5])
    loss = kto_loss(POLICY, REFERENCE, DESIRABLE, mismatched_ratios_M=mismatched, beta=0.1)
    assert loss.losses_S.tolist() == pytest.approx([0.4625702, 0.5374298, 0.4625702], abs=1e-6)
    assert loss.kl.item() == pytest.approx(0.5)
    assert loss.rewards_S.tolist() == pytest.approx([0.2, -0.1, -0.1])
    assert loss.rewards_S[loss.desirable_S].tolist() == pytest.approx([0.2, -0.1])
    assert loss.rewards_S[~loss.desirable_S].tolist() == pytest.approx([-0.1])
    weighted = kto_loss(
        POLICY,
        REFERENCE,
        DESIRABLE,
        mismatched_ratios_M=mismatched,
        beta=0.1,
        desirable_weight=2.0,
        undesirable_weight=0.5,
    )
    assert weighted.losses_S.tolist() == pytest.approx([0.9251404, 1.0748596, 0.2312851], abs=1e-6)
    assert weighted.loss_sum.item() == pytest.approx(2.2312851, abs=1e-6)


def test_a_kl_below_zero_counts_as_zero() -> None:
    loss = kto_loss(POLICY, REFERENCE, DESIRABLE, mismatched_ratios_M=torch.tensor([-5.0, 1.0]), beta=0.1)
    assert loss.kl.item() == 0.0
    assert loss.losses_S.tolist() == pytest.approx([_sigmoid(-0.2), _sigmoid(0.1), _sigmoid(-0.1)], abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.3, 0.4)])
def test_equals_trl(seed: int, weights: tuple[float, float]) -> None:
    """TRL's KTOTrainer.kto_loss, written out: desirable and undesirable responses apart, the batch's mean as KL."""
    generator = torch.Generator().manual_seed(seed)
    policy_S, reference_S = 20 * torch.randn(2, 9, generator=generator)
    kl_policy_M, kl_reference_M = 5 * torch.randn(2, 7, generator=generator)
    desirable_S = torch.rand(9, generator=generator) < 0.5
    chosen_logratios = (policy_S - reference_S)[desirable_S]
    rejected_logratios = (policy_S - reference_S)[~desirable_S]
    kl = (kl_policy_M - kl_reference_M).mean().clamp(min=0)
    chosen_losses = 1 - torch.sigmoid(0.1 * (chosen_logratios - kl))
    rejected_losses = 1 - torch.sigmoid(0.1 * (kl - rejected_logratios))
    loss = kto_loss(
        policy_S,
        reference_S,
        desirable_S,
        mismatched_ratios_M=kl_policy_M - kl_reference_M,
        beta=0.1,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
    )
    torch.testing.assert_close(loss.losses_S[desirable_S], weights[0] * chosen_losses)
    torch.testing.assert_close(loss.losses_S[~desirable_S], weights[1] * rejected_losses)
    torch.testing.assert_close(loss.kl, kl)
    alone = kto_loss(
        policy_S,
        reference_S,
        desirable_S,
        mismatched_ratios_M=(kl_policy_M - kl_reference_M).mean()[None],
        beta=0.1,
        desirable_weight=weights[0],
        undesirable_weight=weights[1],
    )
    torch.testing.assert_close(alone.losses_S, loss.losses_S)  # the global batch's mean is enough


@pytest.mark.parametrize("seed", range(3))
def test_equals_trls_trainer(seed: int) -> None:
    """TRL's own code, run on token log-probs as a model would give them."""
    trainer: Any = pytest.importorskip("trl").KTOTrainer
    generator = torch.Generator().manual_seed(seed)
    policy_ST, kl_ST = (-torch.rand(6, 4, generator=generator) for _ in range(2))
    reference_S, kl_reference_S = (-4 * torch.rand(6, generator=generator) for _ in range(2))
    desirable_S = torch.tensor([True, True, False, True, False, False])
    policy_ST.requires_grad_()
    outputs = {
        kind: SimpleNamespace(log_probs=found, entropy=torch.zeros(6, 4), mean_logits=torch.zeros(6, 4))
        for kind, found in ((0, policy_ST), (1, kl_ST))
    }

    def model(input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return outputs[int(input_ids[0, 0])]

    def ids(kind: int) -> dict[str, Tensor]:
        name = "KL_" * kind
        filled = {"input_ids": torch.full((6, 5), kind), "attention_mask": torch.ones(6, 5).long()}
        return {f"{name}{part}": value for part, value in (filled | {"completion_mask": torch.ones(6, 5)}).items()}

    own = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(device=torch.device("cpu"), gather_for_metrics=lambda tensor: tensor),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=True,
        beta=0.1,
        loss_type="kto",
        desirable_weight=1.3,
        undesirable_weight=0.4,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    own._compute_kl_logps = lambda *given: trainer._compute_kl_logps(own, *given)
    batch = ids(0) | ids(1) | {"label": desirable_S, "ref_logps": reference_S, "ref_KL_logps": kl_reference_S}
    theirs = trainer._compute_loss(own, model, batch, False)
    loss = kto_loss(
        policy_ST.sum(1),
        reference_S,
        desirable_S,
        mismatched_ratios_M=kl_ST.sum(1) - kl_reference_S,
        beta=0.1,
        desirable_weight=1.3,
        undesirable_weight=0.4,
    )
    torch.testing.assert_close(loss.loss_sum / 6, theirs)
    (gradient,) = torch.autograd.grad(loss.loss_sum / 6, policy_ST, retain_graph=True)
    (expected,) = torch.autograd.grad(theirs, policy_ST)
    torch.testing.assert_close(gradient, expected)


def test_the_gradient_is_the_responses_own() -> None:
    """No gradient through K or into the reference; up for desirable responses, down for the others."""
    policy, reference, mismatched = (
        tensor.clone().requires_grad_() for tensor in (POLICY, REFERENCE, torch.tensor([2.0, 1.0, -1.5]))
    )
    kto_loss(policy, reference, DESIRABLE, mismatched_ratios_M=mismatched, beta=0.1).loss_sum.backward()
    assert reference.grad is None
    assert mismatched.grad is None
    assert policy.grad is not None
    slope = 0.1 * _sigmoid(0.15) * _sigmoid(-0.15)
    assert policy.grad.tolist() == pytest.approx([-slope, -slope, slope], rel=1e-5)


@pytest.mark.parametrize("mismatched", [torch.zeros(0), torch.ones(3)])
def test_no_responses_give_zero_without_nan(mismatched: Tensor) -> None:
    policy = torch.zeros(0, requires_grad=True)
    loss = kto_loss(policy, torch.zeros(0), torch.zeros(0).bool(), mismatched_ratios_M=mismatched, beta=0.1)
    loss.loss_sum.backward()
    assert loss.loss_sum.item() == 0.0
    assert math.isfinite(loss.kl.item())


def test_bad_settings() -> None:
    none = torch.zeros(1)
    with pytest.raises(ConfigError, match="kto: beta is 0"):
        kto_loss(POLICY, REFERENCE, DESIRABLE, mismatched_ratios_M=none, beta=0.0)
    with pytest.raises(ConfigError, match="undesirable_weight is -1"):
        kto_loss(POLICY, REFERENCE, DESIRABLE, mismatched_ratios_M=none, beta=0.1, undesirable_weight=-1.0)
    with pytest.raises(TargetError, match="mismatched_ratios_M is empty"):
        kto_loss(POLICY, REFERENCE, DESIRABLE, mismatched_ratios_M=torch.zeros(0), beta=0.1)
