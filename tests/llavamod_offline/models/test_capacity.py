"""Capacity: which tokens are dropped, what happens to their weight, and that evaluation is unaffected."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from llavamod_offline.families.llava.checkpoint import load_llava
from llavamod_offline.families.llava.export import save_llava
from llavamod_offline.families.llava.forward import student_hidden_states
from llavamod_offline.models.capacity import _drop, _Mask, limit_capacity, places
from llavamod_offline.models.routing import RouterWatch, _summary
from llavamod_offline.models.upcycle import upcycle
from tests.llavamod_offline.models.batches import Batch, make_batch
from tests.nothing_asked import NothingAsked


def make_sparse(folder: Path, *, residual: bool = False) -> Any:
    return upcycle(load_llava(folder), layers="sparse", num_experts=4, top_k=2, seed=0, residual=residual)


def hidden_states(model: Any, batch: Batch) -> Tensor:
    return student_hidden_states(model, batch.input_ids_BT, batch.attention_mask_BT, batch.pixel_values_ICHW)


def queue_by_hand(choices_SK: list[list[int]], keep_S: list[bool], capacity: int) -> list[list[bool]]:
    """The slow, obvious queue: one token after another, all first choices before all second ones."""
    taken: dict[int, int] = {}
    found = [[True] * len(row) for row in choices_SK]
    for choice in range(len(choices_SK[0])):
        for token, row in enumerate(choices_SK):
            if not keep_S[token]:
                continue
            expert = row[choice]
            found[token][choice] = taken.get(expert, 0) < capacity
            taken[expert] = taken.get(expert, 0) + 1
    return found


@given(st.data())
def test_places_are_those_of_a_queue(data: st.DataObject) -> None:
    experts = data.draw(st.integers(2, 5))
    top_k = data.draw(st.integers(1, min(3, experts)))
    tokens = data.draw(st.integers(1, 12))
    choices = [data.draw(st.permutations(range(experts)))[:top_k] for _ in range(tokens)]
    keep = data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens))
    capacity = data.draw(st.integers(0, tokens + 1))
    found_SK = places(torch.tensor(choices), torch.tensor(keep), experts, capacity)
    assert found_SK.tolist() == queue_by_hand(choices, keep, capacity)


@pytest.mark.parametrize("residual", [False, True])
def test_with_room_for_all_nothing_changes(tiny_folder: Path, residual: bool) -> None:
    batch, model = make_batch(tiny_folder, [0, 3, 5]), make_sparse(tiny_folder, residual=residual).train()
    free_BTD = hidden_states(model, batch)
    limit_capacity(model, 4 / 2)  # capacity for every token at every expert
    assert torch.equal(hidden_states(model, batch), free_BTD)


def test_evaluation_never_drops(tiny_folder: Path) -> None:
    batch, model = make_batch(tiny_folder, [0, 3, 5]), make_sparse(tiny_folder).eval()
    free_BTD = hidden_states(model, batch)
    limit_capacity(model, 0.5)
    assert torch.equal(hidden_states(model, batch), free_BTD)
    model.train()
    assert not torch.equal(hidden_states(model, batch), free_BTD)


def test_the_weights_of_what_is_kept_sum_to_one_and_no_expert_exceeds_its_places(tiny_folder: Path) -> None:
    batch, model = make_batch(tiny_folder, [0, 3, 5]), make_sparse(tiny_folder).train()
    factor = 0.6
    limit_capacity(model, factor)
    seen: list[tuple[Tensor, Tensor]] = []
    for layer in model.model.language_model.layers[::2]:
        layer.mlp.gate.register_forward_hook(lambda module, args, output: seen.append((output[1], output[2])))
    with RouterWatch(model) as watch:
        hidden_states(model, batch)
    routing = watch.routing(batch.attention_mask_BT)
    keep_S = batch.attention_mask_BT.reshape(-1).bool()
    capacity = math.ceil(factor * 2 * int(keep_S.sum()) / 4)
    assert len(seen) == len(routing.drop_rates_L)
    for (weights_SK, choices_SK), rate in zip(seen, routing.drop_rates_L.tolist(), strict=True):
        sums_S = weights_SK.sum(-1)
        assert torch.allclose(sums_S[sums_S > 0], torch.ones(()), atol=1e-6)
        used = choices_SK[keep_S][weights_SK[keep_S] > 0]
        assert used.bincount(minlength=4).max() <= capacity
        dropped = int((weights_SK[keep_S] == 0).sum())
        assert dropped > 0
        assert rate == pytest.approx(dropped / (2 * int(keep_S.sum())))


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("factor", [0.31, 0.77, 1.23])
def test_a_router_gives_what_a_queue_by_hand_gives(tiny_folder: Path, factor: float, normalised: bool) -> None:
    """Weights, token by token: lost weight goes to the kept choices in proportion; logits and choices do not change."""
    batch, model = make_batch(tiny_folder, [0, 3, 5]), make_sparse(tiny_folder).train()
    raw: list[tuple[Tensor, Tensor, Tensor]] = []
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    gates = [layer.mlp.gate for layer in model.model.language_model.layers[::2]]
    for gate in gates:
        gate.norm_topk_prob = normalised
        gate.register_forward_hook(lambda module, args, output: raw.append(tuple(output)))
    limit_capacity(model, factor)
    for gate in gates:
        gate.register_forward_hook(lambda module, args, output: seen.append(tuple(output)))
    hidden_states(model, batch)
    keep = batch.attention_mask_BT.reshape(-1).bool().tolist()
    assert factor * 2 * sum(keep) / 4 % 1 > 0  # so that rounding up can be told from rounding down
    assert not all(keep)
    for (logits_SE, weights_SK, choices_SK), (ours_SE, ours_SK, our_choices_SK) in zip(raw, seen, strict=True):
        kept = queue_by_hand(choices_SK.tolist(), keep, math.ceil(factor * 2 * sum(keep) / 4))
        for weights, found, row in zip(weights_SK.tolist(), kept, ours_SK.tolist(), strict=True):
            left = sum(weight for weight, is_kept in zip(weights, found, strict=True) if is_kept)
            expected = [
                weight * sum(weights) / left if is_kept else 0.0 for weight, is_kept in zip(weights, found, strict=True)
            ]
            assert row == pytest.approx(expected, rel=1e-5)
        assert torch.equal(ours_SE, logits_SE)
        assert torch.equal(our_choices_SK, choices_SK)


def test_routers_learn_through_what_is_kept(tiny_folder: Path) -> None:
    """The task's gradient reaches a router through the weights of tokens that have a choice left."""
    batch, model = make_batch(tiny_folder, [0, 3, 5]), make_sparse(tiny_folder).train()
    with torch.no_grad():
        for layer in model.model.language_model.layers[::2]:
            layer.mlp.experts.down_proj.mul_(torch.arange(1.0, 5.0)[:, None, None])  # experts that differ
    gradients = []
    for _ in range(2):  # without a capacity limit, then with one
        hidden_states(model, batch)[..., 0].sum().backward()
        gradients.append([layer.mlp.gate.weight.grad.clone() for layer in model.model.language_model.layers[::2]])
        model.zero_grad()
        limit_capacity(model, 1.2)
    for free_ED, limited_ED in zip(*gradients, strict=True):
        assert limited_ED.norm() > 0.1 * free_ED.norm() > 0


def test_padding_takes_no_place(tiny_folder: Path) -> None:
    """More padding, on either side of the batch, changes nothing for the real tokens."""
    batch, model = make_batch(tiny_folder, [0, 3, 5]), make_sparse(tiny_folder).train()
    limit_capacity(model, 0.6)
    plain_BTD = hidden_states(model, batch)
    wider = Batch(
        torch.nn.functional.pad(batch.input_ids_BT, (0, 9)),
        torch.nn.functional.pad(batch.attention_mask_BT, (0, 9)),
        batch.pixel_values_ICHW,
    )
    keep_BT = batch.attention_mask_BT.bool()
    wide_BTD = hidden_states(model, wider)[:, : keep_BT.shape[1]]
    assert torch.allclose(wide_BTD[keep_BT], plain_BTD[keep_BT], atol=1e-5)


def test_gradient_checkpointing_drops_the_same(tiny_folder: Path) -> None:
    batch = make_batch(tiny_folder, [0, 3, 5])
    gradients = []
    for checkpointing in (False, True):
        model = make_sparse(tiny_folder).train()
        limit_capacity(model, 0.6)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        hidden_states(model, batch).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.isfinite(gradient).all()
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-5), name


def test_a_saved_student_knows_nothing_of_it(tiny_folder: Path, tmp_path: Path) -> None:
    from llavamod_offline.models.checkpoint import load_tokenizer

    batch, model = make_batch(tiny_folder, [0, 3]), make_sparse(tiny_folder)
    limit_capacity(model, 0.5)
    save_llava(model, tmp_path / "s", tokenizer=load_tokenizer(tiny_folder), processor_source=tiny_folder)
    again = load_llava(tmp_path / "s").train()
    assert torch.equal(hidden_states(again, batch), hidden_states(model.eval(), batch))


def test_a_dense_model_is_left_alone(tiny_folder: Path) -> None:
    batch, model = make_batch(tiny_folder, [0]), load_llava(tiny_folder).train()
    before_BTD = hidden_states(model, batch)
    limit_capacity(model, 0.1)
    assert torch.equal(hidden_states(model, batch), before_BTD)


def test_no_layer_waits_for_the_device(tiny_folder: Path) -> None:
    """Neither for the capacity nor for the router summary; only once, for the number of tokens."""
    keep_S = torch.tensor([True] * 7 + [False])
    with NothingAsked():
        logits_SE = torch.randn(8, 4)
        weights_SK, choices_SK = logits_SE.softmax(-1).topk(2)
        hook = _drop(_Mask(keep_S), 0.5)
        hook(torch.nn.Identity().train(), (), (logits_SE, weights_SK, choices_SK))
        _summary(logits_SE, choices_SK, keep_S)


def test_experts_run_in_grouped_products(tiny_folder: Path) -> None:
    """One product for all experts; transformers' alternative looks up each expert's tokens in turn."""
    text = make_sparse(tiny_folder).model.language_model
    assert text.config._experts_implementation == "grouped_mm"
