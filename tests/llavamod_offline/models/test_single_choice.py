"""Top-1 routers: the same function as before, but with a gradient from the loss, from which they learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from llavamod_offline.families.llava.checkpoint import load_llava
from llavamod_offline.families.llava.export import save_llava
from llavamod_offline.families.llava.forward import student_hidden_states
from llavamod_offline.models.capacity import limit_capacity
from llavamod_offline.models.checkpoint import load_tokenizer
from llavamod_offline.models.routing import RouterWatch
from llavamod_offline.models.single_choice import compare_single_choices
from llavamod_offline.models.upcycle import upcycle
from tests.llavamod_offline.models.batches import Batch, make_batch

quiet = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")


def make_sparse(folder: Path, *, top_k: int = 1) -> Any:
    """An upcycled student whose experts differ."""
    model = upcycle(load_llava(folder), layers="sparse", num_experts=4, top_k=top_k, seed=0).train()
    with torch.no_grad():
        for layer in model.model.language_model.layers[::2]:
            layer.mlp.experts.down_proj.mul_(torch.arange(1.0, 5.0)[:, None, None])
    return model


def hidden_states(model: Any, batch: Batch) -> Tensor:
    return student_hidden_states(model, batch.input_ids_BT, batch.attention_mask_BT, batch.pixel_values_ICHW)


def router_gradients(model: Any, batch: Batch) -> list[Tensor]:
    model.zero_grad()
    hidden_states(model, batch)[..., 0].sum().backward()
    return [layer.mlp.gate.weight.grad.clone() for layer in model.model.language_model.layers[::2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routers_get_a_gradient_and_outputs_stay(tiny_folder: Path, dtype: torch.dtype) -> None:
    batch, model = make_batch(tiny_folder, [0, 3, 5]), make_sparse(tiny_folder).to(dtype)
    before_BTD, without = hidden_states(model, batch), router_gradients(model, batch)
    compare_single_choices(model)
    torch.testing.assert_close(hidden_states(model, batch), before_BTD)
    for little_ED, much_ED in zip(without, router_gradients(model, batch), strict=True):
        assert much_ED.norm() > 1e5 * little_ED.norm()
        assert much_ED.norm() > 1e-2


@quiet
def test_the_gradient_is_that_of_two_choices_and_outputs_those_of_one() -> None:
    torch.manual_seed(0)
    block, inputs_1SD = make_block(), torch.randn(1, 20, 8)
    before_1SD = block(inputs_1SD)
    logits_SE = block.gate(inputs_1SD)[0]
    likely_S2, choices_S2 = logits_SE.softmax(-1).topk(2)
    with torch.no_grad():  # each expert's output, and the loss's derivative along it
        ones_S = torch.ones(20, 1)
        outputs_2SD = torch.stack([block.experts(inputs_1SD[0], choices_S2[:, k : k + 1], ones_S) for k in range(2)])
        slopes_S2 = (2 * before_1SD[0] * outputs_2SD).sum(-1).T
    shares_S2 = likely_S2 / likely_S2.sum(-1, keepdim=True)
    expected_ED = torch.autograd.grad((slopes_S2 * shares_S2).sum(), block.gate.weight)[0]
    compare_single_choices(block)
    output_1SD = block(inputs_1SD)
    torch.testing.assert_close(output_1SD, before_1SD)
    output_1SD.square().sum().backward()
    torch.testing.assert_close(block.gate.weight.grad, expected_ED, rtol=1e-4, atol=1e-6)


def test_only_training_a_router_costs_a_second_expert(tiny_folder: Path) -> None:
    batch, model = make_batch(tiny_folder, [0, 3]), make_sparse(tiny_folder)
    compare_single_choices(model)
    seen: list[int] = []
    gate = model.model.language_model.layers[0].mlp.gate
    gate.register_forward_hook(lambda module, args, output: seen.append(output[2].shape[1]))
    hidden_states(model, batch)
    with torch.no_grad():
        hidden_states(model, batch)
    hidden_states(model.eval(), batch)
    gate.weight.requires_grad_(False)
    hidden_states(model.train(), batch)
    assert seen == [2, 1, 1, 1]


def test_capacity_drops_the_same_and_routers_learn_from_the_rest(tiny_folder: Path) -> None:
    batch, model = make_batch(tiny_folder, [0, 3, 5]), make_sparse(tiny_folder)
    limit_capacity(model, 0.7)
    found = []
    for compared in (False, True):
        if compared:
            compare_single_choices(model)
        with RouterWatch(model) as watch:
            states_BTD = hidden_states(model, batch)
        found.append((states_BTD, watch.routing(batch.attention_mask_BT)))
    (plain_BTD, plain), (states_BTD, routing) = found
    torch.testing.assert_close(states_BTD, plain_BTD)
    assert torch.equal(routing.drop_rates_L, plain.drop_rates_L)
    assert torch.equal(routing.loads_LE, plain.loads_LE)
    assert bool((routing.drop_rates_L > 0).all())
    assert all(gradient_ED.norm() > 1e-2 for gradient_ED in router_gradients(model, batch))


@quiet
def test_a_saved_student_is_what_was_trained_in_plain_transformers(tiny_folder: Path, tmp_path: Path) -> None:
    batch, model = make_batch(tiny_folder, [0, 3, 5]), make_sparse(tiny_folder)
    compare_single_choices(model)
    trained_BTD = hidden_states(model, batch)
    save_llava(model, tmp_path / "s", tokenizer=load_tokenizer(tiny_folder), processor_source=tiny_folder)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "s")
    with torch.no_grad():
        torch.testing.assert_close(hidden_states(plain.train(), batch), trained_BTD)


def test_at_step_0_it_equals_the_dense_student(tiny_folder: Path) -> None:
    dense, batch = load_llava(tiny_folder), make_batch(tiny_folder, [0, 3, 5])
    sparse = upcycle(dense, layers="sparse", num_experts=4, top_k=1, seed=0).train()
    compare_single_choices(sparse)
    keep_BT = batch.attention_mask_BT.bool()
    torch.testing.assert_close(hidden_states(sparse, batch)[keep_BT], hidden_states(dense, batch)[keep_BT])


def test_gradient_checkpointing_changes_nothing(tiny_folder: Path) -> None:
    batch, model = make_batch(tiny_folder, [0, 3, 5]), make_sparse(tiny_folder)
    compare_single_choices(model)
    plain = router_gradients(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for one_ED, other_ED in zip(plain, router_gradients(model, batch), strict=True):
        torch.testing.assert_close(one_ED, other_ED, rtol=1e-4, atol=1e-5)


def test_other_routers_are_left_alone(tiny_folder: Path) -> None:
    """Routers with two choices, or with one weighted by its probability, already get a gradient."""
    two, raw = make_sparse(tiny_folder, top_k=2), make_sparse(tiny_folder)
    for layer in raw.model.language_model.layers[::2]:
        layer.mlp.gate.norm_topk_prob = False
    for model in (two, raw):
        compare_single_choices(model)
        for layer in model.model.language_model.layers[::2]:
            assert not layer.mlp.gate._forward_hooks


def make_block() -> Qwen2MoeSparseMoeBlock:
    config = Qwen2MoeConfig(
        hidden_size=8,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=0,
        num_experts=4,
        num_experts_per_tok=1,
        norm_topk_prob=True,
    )
    config._experts_implementation = "eager"
    block = Qwen2MoeSparseMoeBlock(config)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=8**-0.5)
    return block


def _loss_after_training(seed: int, *, compared: bool) -> float:
    """Train a layer on four kinds of tokens, each with its own linear map, from equal experts as after upcycling."""
    torch.manual_seed(seed)
    block = make_block()
    with torch.no_grad():
        for weight in (block.experts.gate_up_proj, block.experts.down_proj):
            weight.copy_(weight[:1].clone().expand_as(weight))
    maps = torch.randn(4, 8, 8) * 8**-0.5
    centres = torch.nn.functional.normalize(torch.randn(4, 8), dim=1) * 2
    if compared:
        compare_single_choices(block)
    optimizer = torch.optim.Adam(block.parameters(), 1e-2)
    losses: list[float] = []
    for _ in range(300):
        kinds_S = torch.randint(4, (256,))
        inputs_SD = torch.randn(256, 8) + centres[kinds_S]
        wanted_SD = torch.einsum("sd,sde->se", inputs_SD, maps[kinds_S])
        with RouterWatch(block) as watch:
            loss = (block(inputs_SD[None])[0] - wanted_SD).square().mean()
        (loss + 0.01 * watch.routing(torch.ones(1, 256)).balance_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-50:]) / 50


@quiet
@pytest.mark.parametrize("seed", range(3))
def test_it_learns_which_expert_suits_which_token(seed: int) -> None:
    """Without the comparison only the balance loss trains the router."""
    assert _loss_after_training(seed, compared=True) < 0.95 * _loss_after_training(seed, compared=False)
