"""The estimator `shrink` against its definition, position by position and id by id, in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from llavamod_offline.errors import TargetError
from llavamod_offline.losses.divergence import forward_kl
from llavamod_offline.losses.fused import distillation_from_hidden
from llavamod_offline.losses.shrinkage import Shrinkage
from llavamod_offline.losses.shrinkage_stats import bands
from llavamod_offline.losses.targets import EMPTY_ID, SparseTargets
from tests.llavamod_offline.losses.reference import full_kl, random_teacher, truncate, without_targets

V, D = 40, 6


@dataclass(frozen=True)
class Position:
    """One position, taken apart: masses, tail shapes over all V ids (0 in the top-k), the top-k ids."""

    r: float
    top_k: list[int]
    q_V: Tensor
    v_V: Tensor
    g_V: Tensor | None
    drawn: list[tuple[int, float]]


def _positions(
    log_probs_NV: Tensor, targets: SparseTargets, logits_NV: Tensor, profile_V: Tensor | None
) -> list[Position]:
    found = []
    for i in range(len(targets)):
        top_k = [int(v) for v in targets.topk_ids_NK[i] if v != EMPTY_ID]
        outside_V = torch.ones(V, dtype=torch.float64)
        outside_V[top_k] = 0
        q_V = logits_NV[i, :V].double().softmax(-1)
        slots = zip(targets.tail_ids_NM[i].tolist(), targets.tail_weights_NM[i].tolist(), strict=True)
        found.append(
            Position(
                r=float((log_probs_NV[i].exp() * outside_V).sum()),
                top_k=top_k,
                q_V=q_V,
                v_V=q_V * outside_V / (q_V * outside_V).sum(),
                g_V=None if profile_V is None else profile_V * outside_V / (profile_V * outside_V).sum(),
                drawn=[(v, w) for v, w in slots if w > 0],
            )
        )
    return found


def _statistics(
    positions: list[Position], features_NJ: Tensor, band_V: Tensor, count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """S·G, G·G, ‖S‖² − B and B of each band, and n."""
    kept = [(p, f) for p, f in zip(positions, features_NJ.double(), strict=True) if p.drawn and p.r > 0]
    n = len(kept)
    scale_J = torch.stack([f**2 for _, f in kept]).mean(0).rsqrt()
    s_VJ = torch.zeros(V, features_NJ.shape[1], dtype=torch.float64)
    g_VJ = torch.zeros_like(s_VJ)
    noise_R = torch.zeros(count, dtype=torch.float64)
    for p, f_J in kept:
        f_J = f_J * scale_J
        u_V = torch.zeros(V, dtype=torch.float64)
        for v, w in p.drawn:
            u_V[v] += w
            noise_R[band_V[v]] += p.r**2 * w**2 * (f_J**2).sum()
        s_VJ += torch.outer(p.r * (u_V - p.v_V), f_J)
        if p.g_V is not None:
            g_VJ += torch.outer(p.r * (p.g_V - p.v_V), f_J)

    def banded(x_VJ: Tensor) -> Tensor:
        return torch.stack([x_VJ[band_V == band].sum() for band in range(count)])

    return banded(s_VJ * g_VJ), banded(g_VJ * g_VJ), banded(s_VJ * s_VJ) - noise_R, noise_R, n


def _weights(
    steps: list[tuple[Tensor, Tensor, Tensor, Tensor, int]], decay: float, horizon: float
) -> tuple[Tensor, Tensor]:
    """a and λ of each band, from the statistics of the steps so far."""
    age = [decay ** (len(steps) - 1 - k) for k in range(len(steps))]
    sums_4R = sum(
        (age[k] * torch.stack(list(step[:4])) for k, step in enumerate(steps)), start=torch.zeros(4, 1).double()
    )
    sg_R, gg_R, excess_R, noise_R = sums_4R
    squared = sum(age[k] * step[4] ** 2 for k, step in enumerate(steps))
    positions = sum(age[k] * step[4] for k, step in enumerate(steps))
    n = horizon * positions / sum(age)
    a_R = torch.tensor([min(1.0, max(0.0, float(x / y))) if y > 0 else 0.0 for x, y in zip(sg_R, gg_R, strict=True)])
    k_R = (excess_R - 2 * a_R * sg_R + a_R**2 * gg_R).clamp(min=0) / squared * n**2
    b_R = noise_R / positions * n
    lambda_R = torch.tensor([float(k / (k + b)) if k > 0 else 0.0 for k, b in zip(k_R, b_R, strict=True)])
    return a_R.double(), lambda_R.double()


def _gradient(position: Position, a_V: Tensor, lambda_V: Tensor, log_p_V: Tensor) -> Tensor:
    """q − p̂."""
    own_V = position.v_V if position.g_V is None else (1 - a_V) * position.v_V + a_V * position.g_V
    m_V = (1 - lambda_V) * own_V
    for v, w in position.drawn:
        m_V[v] += lambda_V[v] * w
    target_V = position.r * m_V / m_V.sum() if position.r > 0 else torch.zeros(V, dtype=torch.float64)
    target_V[position.top_k] = log_p_V[position.top_k].exp()
    return position.q_V - target_V


def _batch(n: int, seed: int, *, top_k: int = 5, samples: int = 4) -> tuple[Tensor, SparseTargets, Tensor]:
    """Teachers whose tails lean to the same ids, their records, and hidden states."""
    lean_V = torch.linspace(2.0, -2.0, V, dtype=torch.float64)[torch.randperm(V, generator=_seeded(99))]
    log_probs_NV = (random_teacher(n, V, seed, sharpness=1.0) + lean_V).log_softmax(-1)
    targets = truncate(log_probs_NV, top_k=top_k, samples=samples, seed=seed)
    hidden_ND = torch.randn(n, D, generator=_seeded(seed + 1))
    return log_probs_NV, targets, hidden_ND


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _profile(seed: int = 5) -> Tensor:
    return _batch(400, seed)[0].exp().mean(0).float()


WEIGHT_VD = torch.randn(V + 3, D, generator=_seeded(3))


def _run(
    state: Shrinkage, hidden_ND: Tensor, targets: SparseTargets, chunk: int = 4, **settings: float
) -> tuple[Tensor, Tensor, Tensor]:
    leaves = hidden_ND.detach().requires_grad_(), WEIGHT_VD.detach().requires_grad_()
    terms = distillation_from_hidden(
        *leaves,
        targets,
        tail="shrink",
        shrinkage=state,
        chunk_size=chunk,
        **settings,  # type: ignore[arg-type]
    )
    hidden_gradient, weight_gradient = torch.autograd.grad(terms.loss_sum, leaves)
    return terms.divergence_sum, hidden_gradient, weight_gradient


@settings(deadline=None, max_examples=25)
@given(
    n=st.integers(1, 9),
    top_k=st.integers(0, 12),
    samples=st.integers(1, 5),
    with_profile=st.booleans(),
    lm_weight=st.sampled_from((0.0, 0.7)),
    chunk=st.integers(1, 10),
    seed=st.integers(0, 2**20),
)
def test_weights_and_gradients_equal_their_definition(
    n: int, top_k: int, samples: int, with_profile: bool, lm_weight: float, chunk: int, seed: int
) -> None:
    """Two steps of two micro-batches each, cut into chunks; then a third whose gradient is looked at."""
    profile_V = _profile() if with_profile else None
    state = Shrinkage(V, profile_V=profile_V, decay=0.8, horizon=3.0)
    band_V = bands(V, profile_V)
    count = int(band_V.max()) + 1
    wide_V = None if profile_V is None else profile_V.double()
    steps = []
    for step in range(2):
        log_probs_NV, targets, hidden_ND = _batch(60, 7 + step)
        features_NJ = state.features(hidden_ND)
        found = _positions(log_probs_NV, targets, hidden_ND @ WEIGHT_VD.T, wide_V)
        steps.append(_statistics(found, features_NJ, band_V, count))
        for part in (slice(0, 23), slice(23, 60)):
            _run(state, hidden_ND[part], targets[part], chunk=17)
        state.finish_step()
    a_R, lambda_R = _weights(steps, decay=0.8, horizon=3.0)
    assert float(lambda_R.max()) > 0.05
    entry = state.entry()
    assert entry["tail_profile_weight"] == pytest.approx(a_R.tolist(), rel=1e-3, abs=1e-5)
    assert entry["tail_samples_weight"] == pytest.approx(lambda_R.tolist(), rel=1e-3, abs=1e-4)

    log_probs_NV, targets, hidden_ND = _batch(n, seed, top_k=top_k, samples=samples)
    logits_NV = (hidden_ND @ WEIGHT_VD.T).double()
    found = _positions(log_probs_NV, targets, logits_NV, wide_V)
    gradients = [_gradient(p, a_R[band_V], lambda_R[band_V], log_probs_NV[i]) for i, p in enumerate(found)]
    gradient_NV = torch.stack(gradients)
    if lm_weight:
        one_hot_NV = torch.nn.functional.one_hot(targets.target_ids_N, V)
        gradient_NV = gradient_NV + lm_weight * (logits_NV[:, :V].softmax(-1) - one_hot_NV)
    value, hidden_gradient, weight_gradient = _run(state, hidden_ND, targets, chunk, lm_weight=lm_weight)
    bucket = forward_kl(logits_NV.float(), targets).loss_sum
    torch.testing.assert_close(value, bucket, rtol=1e-4, atol=1e-4)  # the value is the bucket's
    torch.testing.assert_close(hidden_gradient.double(), gradient_NV @ WEIGHT_VD[:V].double(), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(weight_gradient[:V].double(), gradient_NV.T @ hidden_ND.double(), rtol=1e-3, atol=1e-4)
    assert not weight_gradient[V:].any()


def test_before_the_first_step_it_is_the_bucket() -> None:
    _, targets, hidden_ND = _batch(9, 1)
    ours = _run(Shrinkage(V, profile_V=_profile()), hidden_ND, targets)
    leaves = hidden_ND.requires_grad_(), WEIGHT_VD.clone().requires_grad_()
    terms = distillation_from_hidden(*leaves, targets, chunk_size=4)
    for mine, bucket in zip(ours, (terms.divergence_sum, *torch.autograd.grad(terms.loss_sum, leaves)), strict=True):
        assert torch.equal(mine, bucket)


@pytest.mark.parametrize("make", [lambda t: t, lambda t: without_targets(t, [0, 3])])
def test_records_without_samples_or_tail_stay_finite(make: Callable[[SparseTargets], SparseTargets]) -> None:
    state = Shrinkage(V, profile_V=_profile())
    _, targets, hidden_ND = _batch(50, 7)
    _run(state, hidden_ND, targets)
    state.finish_step()
    for samples, top_k in ((0, 5), (3, 0), (3, V), (0, V)):
        log_probs_NV, targets, hidden_ND = _batch(6, 2, top_k=top_k, samples=samples)
        value, *gradients = _run(state, hidden_ND, make(targets))
        assert all(bool(torch.isfinite(tensor).all()) for tensor in (value, *gradients))
        if top_k == V and make(targets) is targets:
            exact = full_kl(log_probs_NV[:1], hidden_ND[:1] @ WEIGHT_VD.T)
            one = _run(state, hidden_ND[:1], targets[:1])[0]
            assert one.item() == pytest.approx(float(exact), rel=1e-4)
    nothing = _batch(0, 2)
    assert _run(state, nothing[2], nothing[1])[0].item() == 0.0
    state.finish_step()
    assert all(0 <= weight <= 1 for weights in state.entry().values() for weight in weights)


def test_a_profile_that_lies_in_the_heads_is_left_out() -> None:
    """Then only the student's shape and the samples are left, and no row divides by nothing."""
    _, targets, hidden_ND = _batch(30, 7, top_k=5)
    profile_V = torch.zeros(V)
    profile_V[targets.topk_ids_NK[0]] = 0.2
    state = Shrinkage(V, profile_V=profile_V)
    for _ in range(2):
        _run(state, hidden_ND, targets)
        state.finish_step()
    value, *gradients = _run(state, hidden_ND, targets)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in (value, *gradients))
    same = targets[:1]
    again = _run(state, hidden_ND[:1], same)
    assert bool(torch.isfinite(again[1]).all())


def test_an_id_drawn_twice_counts_as_two_samples() -> None:
    """Two slots of weights ¼ and ½ pull like one of ¾, but are squared one by one in what is chance."""
    _, targets, hidden_ND = _batch(30, 7, samples=2)
    drawn = targets.tail_weights_NM.sum(-1) > 0
    ids_NM = targets.tail_ids_NM[:, :1].clamp(min=0)
    weights_NM = drawn[:, None].float()

    def drawn_as(shares: list[float]) -> SparseTargets:
        return replace(
            targets,
            tail_ids_NM=ids_NM.expand(-1, len(shares)),
            tail_weights_NM=weights_NM * torch.tensor(shares),
        )

    entries = []
    for shares in ([1.0], [0.25, 0.75]):
        state = Shrinkage(V, horizon=1.0)
        _run(state, hidden_ND, drawn_as(shares))
        state.finish_step()
        entries.append(state.entry()["tail_samples_weight"])
    assert all(two > one for one, two in zip(*entries, strict=True) if 0 < one < 1)
    state = Shrinkage(V)
    _run(state, hidden_ND, targets)
    state.finish_step()
    for mine, other in zip(
        _run(state, hidden_ND, drawn_as([1.0])), _run(state, hidden_ND, drawn_as([0.25, 0.75])), strict=True
    ):
        torch.testing.assert_close(mine, other)


def test_evaluation_teaches_it_nothing() -> None:
    _, targets, hidden_ND = _batch(50, 7)
    state = Shrinkage(V)
    with torch.no_grad():
        distillation_from_hidden(hidden_ND, WEIGHT_VD, targets, tail="shrink", shrinkage=state)
    state.finish_step()
    assert not any(state.entry()["tail_samples_weight"])


def test_state_survives_a_checkpoint_bit_for_bit() -> None:
    profile_V = _profile()
    states = [Shrinkage(V, profile_V=profile_V) for _ in range(2)]
    for step in range(3):
        if step == 2:
            states[1] = Shrinkage(V, profile_V=profile_V)
            states[1].load_state(states[0].state())
            assert states[1].entry() == states[0].entry()
        _, targets, hidden_ND = _batch(50, 7 + step)
        results = [_run(state, hidden_ND, targets) for state in states]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        for state in states:
            state.finish_step()
    assert states[0].entry() == states[1].entry()
    assert any(states[0].entry()["tail_samples_weight"])
    with pytest.raises(TargetError, match="for another vocabulary"):
        Shrinkage(8).load_state(states[0].state())


def test_ranks_share_their_statistics() -> None:
    """Each process brings its own sums; the weights come out alike, also where a process has no positions at all."""
    log_probs_NV, targets, hidden_ND = _batch(80, 7)
    parts = [slice(0, 50), slice(50, 80), slice(80, 80)]
    states = [Shrinkage(V) for _ in parts]
    band_V, locals_ = bands(V, None), []
    for state, part in zip(states, parts, strict=True):
        _run(state, hidden_ND[part], targets[part])
        state.finish_step(lambda values: locals_.append(values) or values)  # type: ignore[func-returns-value]
    total = torch.stack(locals_).sum(0)
    for rank, (state, part) in enumerate(zip(states, parts, strict=True)):
        states[rank] = state = Shrinkage(V)
        _run(state, hidden_ND[part], targets[part])
        state.finish_step(lambda values: total)
    assert states[0].entry() == states[1].entry() == states[2].entry()
    found = _positions(log_probs_NV, targets, hidden_ND @ WEIGHT_VD.T, None)
    features_NJ, count = states[0].features(hidden_ND), int(band_V.max()) + 1
    ranks = [_statistics(found[part], features_NJ[part], band_V, count) for part in parts[:2]]
    noise_R, n = ranks[0][3] + ranks[1][3], ranks[0][4] + ranks[1][4]
    excess_R = (ranks[0][2] + ranks[1][2]).clamp(min=0) / (ranks[0][4] ** 2 + ranks[1][4] ** 2) * (10 * n) ** 2
    lambda_R = excess_R / (excess_R + noise_R * 10)
    assert states[0].entry()["tail_samples_weight"] == pytest.approx(lambda_R.tolist(), rel=1e-3, abs=1e-4)


def test_it_comes_nearer_to_the_full_divergence_than_bucket_and_samples() -> None:
    """The gradients of LM head and bias over many positions: the error is less than that of either estimator alone."""
    log_probs_NV, targets, hidden_ND = _batch(1500, 7, top_k=3, samples=3)
    leaves = hidden_ND.requires_grad_(), WEIGHT_VD.clone().requires_grad_()
    exact = torch.autograd.grad(full_kl(log_probs_NV, leaves[0].double() @ leaves[1].double().T), leaves)[1]
    state = Shrinkage(V, profile_V=_profile(), horizon=1.0)
    distillation_from_hidden(hidden_ND, WEIGHT_VD, targets, tail="shrink", shrinkage=state)
    state.finish_step()
    errors = {}
    for tail in ("shrink", "bucket", "samples"):
        terms = distillation_from_hidden(*leaves, targets, tail=tail, shrinkage=state)
        gradient = torch.autograd.grad(terms.loss_sum, leaves)[1]
        errors[tail] = float((gradient - exact).norm() / exact.norm())
    assert errors["shrink"] < 0.7 * min(errors["bucket"], errors["samples"])


def test_dense_logits_know_the_constant_alone() -> None:
    log_probs_NV, targets, hidden_ND = _batch(60, 7)
    logits_NV = (hidden_ND @ WEIGHT_VD.T).requires_grad_()
    profile_V = _profile()
    state = Shrinkage(V, profile_V=profile_V, horizon=1.0)
    forward_kl(logits_NV, targets, tail="shrink", shrinkage=state)
    state.finish_step()
    band_V = bands(V, profile_V)
    found = _positions(log_probs_NV, targets, logits_NV.detach(), profile_V.double())
    a_R, lambda_R = _weights([_statistics(found, torch.ones(60, 1), band_V, int(band_V.max()) + 1)], 0.9, 1.0)
    assert state.entry()["tail_profile_weight"] == pytest.approx(a_R.tolist(), rel=1e-3, abs=1e-5)
    assert state.entry()["tail_samples_weight"] == pytest.approx(lambda_R.tolist(), rel=1e-3, abs=1e-4)
    (gradient,) = torch.autograd.grad(
        forward_kl(logits_NV, targets, tail="shrink", shrinkage=state).loss_sum, logits_NV
    )
    expected = [_gradient(p, a_R[band_V], lambda_R[band_V], log_probs_NV[i]) for i, p in enumerate(found)]
    torch.testing.assert_close(gradient[:, :V].double(), torch.stack(expected), rtol=1e-3, atol=1e-5)


def test_at_another_temperature_it_is_the_bucket() -> None:
    log_probs_NV, _, hidden_ND = _batch(9, 1)
    targets = truncate(log_probs_NV, top_k=5, samples=3, temperatures=(2.0,))
    logits_NV = hidden_ND @ WEIGHT_VD.T
    shrunk = forward_kl(logits_NV, targets, tail="shrink", temperature=2.0)
    assert shrunk.loss_sum == forward_kl(logits_NV, targets, temperature=2.0).loss_sum


def test_bands_are_by_rank_on_a_log_scale() -> None:
    band_V = bands(1000, None)
    assert band_V.bincount().tolist() == [10, 19, 51, 144, 407, 369]  # edges 10, 29, 80, 224, 631
    profile_V = torch.arange(1000).float()
    assert torch.equal(bands(1000, profile_V), band_V.flip(0))
    assert bands(7, None).tolist() == [0] * 7
    assert int(bands(151_646, None).max()) == 10


class TestErrors:
    def test_an_estimator_without_its_state(self) -> None:
        _, targets, hidden_ND = _batch(4, 1)
        with pytest.raises(TargetError, match="tail 'shrink' learns its weights in training"):
            distillation_from_hidden(hidden_ND, WEIGHT_VD, targets, tail="shrink")

    def test_a_state_of_another_vocabulary(self) -> None:
        _, targets, hidden_ND = _batch(4, 1)
        with pytest.raises(TargetError, match=f"`shrinkage` has 41 ids, the divergence {V}"):
            distillation_from_hidden(hidden_ND, WEIGHT_VD, targets, tail="shrink", shrinkage=Shrinkage(V + 1))

    def test_a_profile_of_another_length(self) -> None:
        with pytest.raises(TargetError, match="tail profile: 40 values for a vocabulary of 50"):
            Shrinkage(50, profile_V=torch.ones(40) / 40)
