"""The fused LM head in training conditions: low precision, recomputed layers, compiled functions, odd vocabularies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llavamod_offline.losses import fused_linear
from llavamod_offline.losses.fused import (
    cross_entropy_from_hidden,
    distillation_from_hidden,
    sequence_log_probs_from_hidden,
)
from llavamod_offline.losses.kinds import DIVERGENCE_KINDS, TailEstimator
from llavamod_offline.losses.tail_estimators import TailPrior
from llavamod_offline.models.lm_head import LmHead
from tests.llavamod_offline.losses.reference import random_teacher, truncate
from tests.nothing_asked import NothingAsked

pytestmark = pytest.mark.usefixtures("order")

N, DIM, VOCAB = 37, 12, 53  # no convenient multiples
TARGETS = truncate(random_teacher(N, VOCAB, 1), top_k=7, samples=3, temperatures=(2.0,))
IDS_N, SEQUENCE_OF_N = TARGETS.target_ids_N, torch.arange(N) % 3
UPSTREAM_S = torch.tensor([1.0, -2.0, 0.5])

Loss = Callable[[Tensor, Any], Tensor]


def _distillation(**chosen: Any) -> Loss:
    return lambda hidden_ND, weight_VD: (
        distillation_from_hidden(hidden_ND, weight_VD, TARGETS, chunk_size=5, **chosen).loss_sum
    )


def _sequences(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
    sums_S = sequence_log_probs_from_hidden(
        hidden_ND, weight_VD, IDS_N, SEQUENCE_OF_N, 3, vocab_size=VOCAB, chunk_size=5
    )
    return (sums_S * UPSTREAM_S).sum()


LOSSES: dict[str, Loss] = {
    **{kind: _distillation(divergence=kind, lm_weight=0.5) for kind in DIVERGENCE_KINDS},
    "samples": _distillation(tail="samples", lm_weight=0.5),
    "two temperatures": _distillation(temperature=2.0, lm_weight=0.5),
    "cross-entropy": lambda hidden_ND, weight_VD: (
        cross_entropy_from_hidden(hidden_ND, weight_VD, IDS_N, vocab_size=VOCAB, chunk_size=5).loss_sum
    ),
    "sequences": _sequences,
}


def _leaves(rows: int = VOCAB + 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, DIM, generator=generator), torch.randn(rows, DIM, generator=generator)


def _gradients(loss: Callable[..., Tensor], *leaves: Tensor) -> tuple[Tensor, ...]:
    own = tuple(leaf.detach().requires_grad_() for leaf in leaves)
    value = loss(*own)
    return (value.detach(), *torch.autograd.grad(value, own))


@pytest.mark.parametrize("name", LOSSES)
def test_low_precision_is_exact_but_for_its_inputs_and_results(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products, logits and sums over chunks are float32: the only rounding is that of the gradients to bfloat16."""
    monkeypatch.setattr(fused_linear, "_SLAB", 10)
    low = [leaf.bfloat16() for leaf in _leaves()]
    value, *gradients = _gradients(LOSSES[name], *low)
    expected_value, *expected = _gradients(LOSSES[name], *(leaf.float() for leaf in low))
    torch.testing.assert_close(value, expected_value, rtol=1e-5, atol=1e-5)
    for gradient, reference in zip(gradients, expected, strict=True):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient.float(), reference, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", ["forward_kl", "sequences"])
def test_checkpointed_layers_change_nothing(name: str, inside: bool, reentrant: bool) -> None:
    """With checkpointing below the loss, as in a student's layers, or with the loss inside the recomputed part."""
    inputs_ND, weight_VD = _leaves()
    layer, lm_head = nn.Linear(DIM, DIM), nn.Linear(DIM, len(weight_VD), bias=False)

    def body(x_ND: Tensor) -> Tensor:
        return torch.tanh(layer(x_ND))

    def whole(x_ND: Tensor) -> Tensor:
        return LOSSES[name](body(x_ND), lm_head.weight)

    def recomputed(x_ND: Tensor) -> Tensor:
        if inside:
            result: Tensor = checkpoint(whole, x_ND, use_reentrant=reentrant)
            return result
        return LOSSES[name](checkpoint(body, x_ND, use_reentrant=reentrant), lm_head.weight)

    results = []
    for function in (whole, recomputed):
        layer.zero_grad()
        lm_head.zero_grad()
        value = function(inputs_ND.requires_grad_())
        value.backward()
        assert layer.weight.grad is not None
        assert lm_head.weight.grad is not None
        results.append((value.detach(), layer.weight.grad.clone(), lm_head.weight.grad.clone()))
    for ours, plain in zip(*results, strict=True):
        assert torch.equal(ours, plain)


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # from Dynamo's own inspection
@pytest.mark.parametrize("name", ["forward_kl", "js", "cross-entropy", "sequences"])
def test_a_compiled_function_around_it_gives_the_same(name: str) -> None:
    """The graph breaks at the loss, which runs uncompiled; the rest of the graph is compiled."""
    inputs_ND, weight_VD = _leaves()
    layer = nn.Linear(DIM, DIM)

    def plain(x_ND: Tensor, lm_head_VD: Tensor) -> Tensor:
        return LOSSES[name](torch.tanh(layer(x_ND)), lm_head_VD * 1.0) * 2.0

    compiled: Loss = torch.compile(plain, backend="aot_eager")
    for rows in (N, N):  # the second call runs what the first compiled
        for ours, expected in zip(
            _gradients(compiled, inputs_ND[:rows], weight_VD),
            _gradients(plain, inputs_ND[:rows], weight_VD),
            strict=True,
        ):
            torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_function_gets_a_log_without_gradient() -> None:
    hidden_ND, weight_VD = (leaf.requires_grad_() for leaf in _leaves())
    compiled = torch.compile(lambda x, w: distillation_from_hidden(x, w, TARGETS, lm_weight=1.0), backend="eager")
    terms = compiled(hidden_ND, weight_VD)
    expected = distillation_from_hidden(hidden_ND, weight_VD, TARGETS, lm_weight=1.0)
    assert terms.metrics == expected.metrics
    logged = [terms.divergence_sum, terms.cross_entropy_sum, *terms.metrics.values()]
    assert not any(value.requires_grad for value in logged)
    assert terms.loss_sum.requires_grad


@pytest.mark.parametrize("name", LOSSES)
def test_rows_beyond_the_vocabulary_get_neither_probability_nor_gradient(name: str) -> None:
    hidden_ND, weight_VD = _leaves()
    loud_VD = torch.cat([weight_VD[:VOCAB], 100 * torch.ones(4, DIM)])
    value, hidden_gradient, weight_gradient = _gradients(LOSSES[name], hidden_ND, loud_VD)
    expected, expected_hidden, expected_weight = _gradients(LOSSES[name], hidden_ND, weight_VD[:VOCAB])
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(hidden_gradient, expected_hidden)
    torch.testing.assert_close(weight_gradient[:VOCAB], expected_weight)
    assert not weight_gradient[VOCAB:].any()


@pytest.mark.parametrize(
    ("tail", "share"), [("samples", 0.0), ("samples", 0.4), ("bucket", 0.0), ("renormalised", 0.0)]
)
def test_narrow_ids_and_an_id_drawn_twice_will_do(tail: TailEstimator, share: float) -> None:
    """32-bit ids give identical bits; a tail sample whose weight is split over two slots gives the same divergence."""
    hidden_ND, weight_VD = _leaves(VOCAB)
    names = ("topk_ids_NK", "tail_ids_NM", "target_ids_N")
    narrow = replace(TARGETS, **{name: getattr(TARGETS, name).int() for name in names})
    twice = replace(
        TARGETS,
        tail_ids_NM=TARGETS.tail_ids_NM.repeat(1, 2),
        tail_weights_NM=torch.cat([0.3 * TARGETS.tail_weights_NM, 0.7 * TARGETS.tail_weights_NM], 1),
    )
    results, logs = [], []
    for targets in (TARGETS, narrow, twice):
        prior = TailPrior(share, torch.full((VOCAB,), 1 / VOCAB)) if share else None
        leaves = hidden_ND.detach().requires_grad_(), weight_VD.detach().requires_grad_()
        terms = distillation_from_hidden(*leaves, targets, tail=tail, prior=prior, lm_weight=1.0)
        results.append((terms.loss_sum.detach(), *torch.autograd.grad(terms.loss_sum, leaves)))
        logs.append({name: value.item() for name, value in terms.metrics.items()})
    assert logs[1] == logs[0]
    assert logs[2] == pytest.approx(logs[0], rel=1e-4)
    for plain, as_narrow, as_twice in zip(*results, strict=True):
        assert torch.equal(as_narrow, plain)
        torch.testing.assert_close(as_twice, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_a_frozen_head_costs_no_gradient(name: str) -> None:
    hidden_ND, weight_VD = _leaves(VOCAB)
    free = hidden_ND.requires_grad_()
    (frozen_gradient,) = torch.autograd.grad(LOSSES[name](free, weight_VD), free)
    _, hidden_gradient, _ = _gradients(LOSSES[name], hidden_ND, weight_VD)
    assert torch.equal(frozen_gradient, hidden_gradient)
    frozen_hidden, lm_head_VD = hidden_ND.detach(), weight_VD.clone().requires_grad_()
    (weight_gradient,) = torch.autograd.grad(LOSSES[name](frozen_hidden, lm_head_VD), lm_head_VD)
    assert torch.equal(weight_gradient, _gradients(LOSSES[name], hidden_ND, weight_VD)[2])


@pytest.mark.parametrize("name", ["forward_kl", "sequences"])
def test_a_frozen_head_gets_no_product(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Tensor) -> None:
        raise AssertionError("a frozen LM head's gradient was computed")

    for product in ("_add_outer", "_write_outer"):
        monkeypatch.setattr(fused_linear, product, refused)
    hidden_ND, weight_VD = _leaves()
    LOSSES[name](hidden_ND.requires_grad_(), weight_VD).backward()
    with pytest.raises(AssertionError, match="was computed"):
        LOSSES[name](hidden_ND, weight_VD.requires_grad_()).backward()


HEADS: dict[str, tuple[bool, float | None, float]] = {  # whether biased, softcap, scale
    "bias": (True, None, 1.0),
    "softcap": (False, 3.0, 1.0),
    "scale": (False, None, 0.25),
    "all": (True, 3.0, 0.7),
}


def _slow_logits(head: str, hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor) -> Tensor:
    biased, softcap, scale = HEADS[head]
    logits_NV = (hidden_ND @ weight_VD.T + (bias_V if biased else 0.0)) * scale
    return logits_NV if softcap is None else softcap * torch.tanh(logits_NV / softcap)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("frozen", [None, "hidden", "weight", "bias"])
def test_gradients_go_through_softcap_scale_and_bias(name: str, head: str, frozen: str | None) -> None:
    """Against float64 autograd through the logits; the loss gets them as inputs, with the identity as LM head."""
    biased, softcap, scale = HEADS[head]
    hidden_ND, weight_VD = _leaves()
    bias_V = torch.randn(len(weight_VD), generator=torch.Generator().manual_seed(1))
    leaves = {"hidden": hidden_ND, "weight": weight_VD, "bias": bias_V}
    own = [leaf.clone().requires_grad_(frozen != key) for key, leaf in leaves.items()]
    loss = LOSSES[name](own[0], LmHead(own[1], own[2] if biased else None, softcap, scale))
    used = [leaf for leaf in own[: 2 + biased] if leaf.requires_grad]
    found = torch.autograd.grad(loss, used)
    # The loss and its gradient with respect to given logits: the LM head multiplies by the identity.
    exact = [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in own]
    logits_NV = _slow_logits(head, *exact)
    given_NV = logits_NV.detach().float().requires_grad_()
    expected = LOSSES[name](given_NV, torch.eye(len(weight_VD)))
    (by_logits_NV,) = torch.autograd.grad(expected, given_NV)
    reference = torch.autograd.grad(
        logits_NV, [leaf for leaf in exact[: 2 + biased] if leaf.requires_grad], by_logits_NV.double()
    )
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(found, reference, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["forward_kl", "samples", "sequences"])
def test_a_whole_head_in_low_precision_is_exact_but_for_its_inputs_and_results(name: str) -> None:
    low = [leaf.bfloat16() for leaf in (*_leaves(), torch.linspace(-1, 1, VOCAB + 4))]

    def loss(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor) -> Tensor:
        return LOSSES[name](hidden_ND, LmHead(weight_VD, bias_V, 3.0, 0.7))

    value, *gradients = _gradients(loss, *low)
    expected_value, *expected = _gradients(loss, *(leaf.float() for leaf in low))
    torch.testing.assert_close(value, expected_value, rtol=1e-5, atol=1e-5)
    for gradient, reference in zip(gradients, expected, strict=True):
        assert gradient.dtype == torch.bfloat16
        torch.testing.assert_close(gradient.float(), reference, rtol=2**-8, atol=1e-5)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**16),
    rows=st.integers(1, 40),
    spare=st.integers(0, 9),
    chunk=st.integers(1, 50),
    biased=st.booleans(),
    softcap=st.none() | st.floats(0.5, 50.0),
    scale=st.floats(-4.0, 4.0).filter(lambda number: abs(number) > 0.01),
    name=st.sampled_from(["cross-entropy", "sequences"]),
)
def test_any_head_gives_the_gradients_of_autograd(
    seed: int, rows: int, spare: int, chunk: int, biased: bool, softcap: float | None, scale: float, name: str
) -> None:
    """Cross-entropy and sequence log-probs over V ids of an LM head with spare rows, against float64."""
    generator = torch.Generator().manual_seed(seed)
    vocab = int(torch.randint(2, 60, (), generator=generator))
    ids_N = torch.randint(0, vocab, (rows,), generator=generator)
    shapes = [(rows, DIM), (vocab + spare, DIM), (vocab + spare,)][: 2 + biased]
    low = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    high = [leaf.detach().double().requires_grad_() for leaf in low]
    head = LmHead(low[1], low[2] if biased else None, softcap, scale)
    logits_NV = (high[0] @ high[1].T + (high[2] if biased else 0.0)) * scale
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    log_probs_N = logits_NV[:, :vocab].log_softmax(-1).gather(1, ids_N[:, None])[:, 0]
    sizes: dict[str, Any] = {"vocab_size": vocab, "chunk_size": chunk}
    if name == "sequences":
        expected = log_probs_N.square().sum()
        found = sequence_log_probs_from_hidden(low[0], head, ids_N, torch.arange(rows), rows, **sizes).square().sum()
    else:
        expected, found = -log_probs_N.sum(), cross_entropy_from_hidden(low[0], head, ids_N, **sizes).loss_sum
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(torch.autograd.grad(found, low), torch.autograd.grad(expected, high), strict=True):
        bound = 1e-4 * float(theirs.abs().max()) + 1e-5
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=bound)


@pytest.mark.parametrize("name", ["forward_kl", "js", "samples", "two temperatures"])
def test_the_device_is_asked_for_nothing(name: str, order: str) -> None:
    leaves = [leaf.requires_grad_() for leaf in _leaves()]
    with NothingAsked():
        LOSSES[name](*leaves).backward()
