from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llavamod_offline.errors import ConfigError
from llavamod_offline.losses.kinds import PreferenceKind
from llavamod_offline.losses.preference import PreferenceTerms, preference_loss

# Two pairs: r_w = (2, −1), r_l = (−1, 1), so r_w − r_l = (3, −2).
POLICY_CHOSEN = torch.tensor([-8.0, -21.0])
REFERENCE_CHOSEN = torch.tensor([-10.0, -20.0])
POLICY_REJECTED = torch.tensor([-13.0, -4.0])
REFERENCE_REJECTED = torch.tensor([-12.0, -5.0])


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _loss(kind: PreferenceKind, **settings: float | Tensor) -> PreferenceTerms:
    values: dict[str, float | Tensor] = {"beta": 0.1, **settings}
    return preference_loss(
        POLICY_CHOSEN,
        POLICY_REJECTED,
        REFERENCE_CHOSEN,
        REFERENCE_REJECTED,
        kind=kind,
        **values,  # type: ignore[arg-type]
    )


def test_sigmoid_by_hand() -> None:
    # −log σ(0.3), −log σ(−0.2)
    assert _loss("sigmoid").losses_B.tolist() == pytest.approx([0.5543552, 0.7981389], abs=1e-6)
    smoothed = [-0.9 * math.log(_sigmoid(x)) - 0.1 * math.log(_sigmoid(-x)) for x in (0.3, -0.2)]
    assert _loss("sigmoid", label_smoothing=0.1).losses_B.tolist() == pytest.approx(smoothed, abs=1e-6)


def test_ipo_by_hand() -> None:
    # ((3 − 5)², (−2 − 5)²) with 1 / (2 · 0.1) = 5
    assert _loss("ipo").losses_B.tolist() == pytest.approx([4.0, 49.0], rel=1e-5)


def test_hinge_by_hand() -> None:
    # max(0, 1 − 0.3), max(0, 1 + 0.2); with β = 1: max(0, 1 − 3) = 0
    assert _loss("hinge").losses_B.tolist() == pytest.approx([0.7, 1.2], rel=1e-5)
    assert _loss("hinge", beta=1.0).losses_B.tolist() == pytest.approx([0.0, 3.0], rel=1e-5)


def test_kto_pair_by_hand() -> None:
    # K_w = max(0, (2 − 1)/2) = 0.5, K_l = max(0, (−1 + 1)/2) = 0
    # chosen: 1 − σ(0.1 · 2), 1 − σ(0.1 · −1); rejected: 1 − σ(0.1 · (0.5 + 1)), 1 − σ(0.1 · (0.5 − 1))
    chosen = [0.4501660, 0.5249792]
    rejected = [0.4625702, 0.5124974]
    expected = [(w + r) / 2 for w, r in zip(chosen, rejected, strict=True)]
    assert _loss("kto_pair").losses_B.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_equals_trl(seed: int) -> None:
    """TRL's DPOTrainer.dpo_loss, written out as in the versions that had `kto_pair` (before 0.9.5)."""
    generator = torch.Generator().manual_seed(seed)
    policy_chosen, policy_rejected, ref_chosen, ref_rejected = 20 * torch.randn(4, 7, generator=generator)
    beta, smoothing = 0.1, 0.2
    logits = (policy_chosen - policy_rejected) - (ref_chosen - ref_rejected)
    log_sigmoid = torch.nn.functional.logsigmoid
    chosen_kl = (policy_chosen - ref_chosen).mean().clamp(min=0)
    rejected_kl = (policy_rejected - ref_rejected).mean().clamp(min=0)
    kto = torch.cat(
        (
            1 - torch.sigmoid(beta * ((policy_chosen - ref_chosen) - rejected_kl)),
            1 - torch.sigmoid(beta * (chosen_kl - (policy_rejected - ref_rejected))),
        )
    )
    expected = {
        "sigmoid": (-log_sigmoid(beta * logits) * (1 - smoothing) - log_sigmoid(-beta * logits) * smoothing).mean(),
        "ipo": ((logits - 1 / (2 * beta)) ** 2).mean(),
        "hinge": torch.relu(1 - beta * logits).mean(),
        "kto_pair": kto.mean(),
    }
    for kind, value in expected.items():
        loss = preference_loss(
            policy_chosen,
            policy_rejected,
            ref_chosen,
            ref_rejected,
            kind=kind,  # type: ignore[arg-type]
            beta=beta,
            label_smoothing=smoothing if kind == "sigmoid" else 0.0,
        )
        torch.testing.assert_close(loss.losses_B.mean(), value)
        torch.testing.assert_close(loss.chosen_rewards_B, beta * (policy_chosen - ref_chosen))
        torch.testing.assert_close(loss.rejected_rewards_B, beta * (policy_rejected - ref_rejected))


def test_kto_pair_takes_the_global_means_and_clamps_them() -> None:
    given = _loss("kto_pair", kl_chosen=torch.tensor(-3.0), kl_rejected=torch.tensor(1.5))
    chosen = [1 - _sigmoid(0.1 * (r - 1.5)) for r in (2.0, -1.0)]
    rejected = [1 - _sigmoid(0.1 * (0.0 - r)) for r in (-1.0, 1.0)]
    expected = [(w + r) / 2 for w, r in zip(chosen, rejected, strict=True)]
    assert given.losses_B.tolist() == pytest.approx(expected, abs=1e-6)
    local = _loss("kto_pair", kl_chosen=torch.tensor(0.5), kl_rejected=torch.tensor(0.0))
    assert torch.equal(local.losses_B, _loss("kto_pair").losses_B)


def test_kto_pair_clamps_the_batchs_own_means() -> None:
    # r_w = (−2, −4), r_l = (1, −3): both means are negative, so K_w = K_l = 0.
    chosen, rejected, nothing = torch.tensor([-2.0, -4.0]), torch.tensor([1.0, -3.0]), torch.zeros(2)
    loss = preference_loss(chosen, rejected, nothing, nothing, kind="kto_pair", beta=0.1)
    expected = [(_sigmoid(0.2) + _sigmoid(0.1)) / 2, (_sigmoid(0.4) + _sigmoid(-0.3)) / 2]
    assert loss.losses_B.tolist() == pytest.approx(expected, abs=1e-6)


def test_kto_pair_has_no_gradient_through_its_kl_terms() -> None:
    # Only σ'(x) β / 2 from each response's own term; through the KL terms, other pairs would contribute.
    chosen = POLICY_CHOSEN.clone().requires_grad_()
    rejected = POLICY_REJECTED.clone().requires_grad_()
    loss = preference_loss(chosen, rejected, REFERENCE_CHOSEN, REFERENCE_REJECTED, kind="kto_pair", beta=0.1)
    loss.loss_sum.backward()

    def slope(x: float) -> float:
        return _sigmoid(x) * (1 - _sigmoid(x)) * 0.1 / 2

    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.tolist() == pytest.approx([-slope(0.2), -slope(-0.1)], rel=1e-5)
    assert rejected.grad.tolist() == pytest.approx([slope(0.15), slope(-0.05)], rel=1e-5)


@pytest.mark.parametrize("kind", ["kto_pair", "sigmoid", "ipo", "hinge"])
def test_gradient_pushes_the_pair_apart_and_spares_the_reference(kind: PreferenceKind) -> None:
    leaves = [
        t.clone().requires_grad_() for t in (POLICY_CHOSEN, POLICY_REJECTED, REFERENCE_CHOSEN, REFERENCE_REJECTED)
    ]
    preference_loss(*leaves, kind=kind, beta=0.1).loss_sum.backward()
    assert leaves[0].grad is not None
    assert leaves[1].grad is not None
    assert (leaves[0].grad < 0).all()
    assert (leaves[1].grad > 0).all()
    assert leaves[2].grad is None
    assert leaves[3].grad is None


def test_rewards_margins_and_accuracy() -> None:
    loss = _loss("sigmoid")
    assert loss.chosen_rewards_B.tolist() == pytest.approx([0.2, -0.1], abs=1e-6)
    assert loss.rejected_rewards_B.tolist() == pytest.approx([-0.1, 0.1], abs=1e-6)
    assert loss.margins_B.tolist() == pytest.approx([0.3, -0.2], abs=1e-6)
    assert loss.correct_B.tolist() == [True, False]
    assert loss.loss_sum.item() == pytest.approx(loss.losses_B.sum().item())


@pytest.mark.parametrize("kind", ["kto_pair", "sigmoid", "ipo", "hinge"])
def test_no_pairs_give_zero_without_nan(kind: PreferenceKind) -> None:
    policy = torch.zeros(0, requires_grad=True)
    loss = preference_loss(policy, policy, torch.zeros(0), torch.zeros(0), kind=kind, beta=0.1)
    loss.loss_sum.backward()
    assert loss.loss_sum.item() == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "dpo"}, "'dpo' is unknown: choose one of kto_pair"),
        ({"kind": "sigmoid", "beta": 0.0}, "beta is 0"),
        ({"kind": "sigmoid", "label_smoothing": 0.7}, "label_smoothing is 0.7"),
        ({"kind": "ipo", "label_smoothing": 0.1}, "'ipo' has no label smoothing"),
    ],
)
def test_bad_settings(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        _loss(**settings)  # type: ignore[arg-type]
