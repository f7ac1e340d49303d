from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Qwen2MoeConfig
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter

from llavamod_offline.families.llava.checkpoint import load_llava
from llavamod_offline.families.llava.forward import student_hidden_states
from llavamod_offline.models.routing import RouterWatch, Routing, is_sparse, random_routing
from llavamod_offline.models.sparse_twins import is_router
from llavamod_offline.models.upcycle import upcycle
from tests.llavamod_offline.models.batches import Batch, make_batch


@pytest.fixture
def sparse(tiny_folder: Path) -> Any:
    return upcycle(load_llava(tiny_folder), layers="sparse", num_experts=4, top_k=2, seed=0)


def _watched(model: Any, batch: Batch) -> tuple[Tensor, Routing]:
    with RouterWatch(model) as watch:
        hidden_BTD = student_hidden_states(model, batch.input_ids_BT, batch.attention_mask_BT, batch.pixel_values_ICHW)
    return hidden_BTD, watch.routing(batch.attention_mask_BT)


def test_balance_loss_by_hand() -> None:
    # Two experts; gates (σ(x), σ(−x)) for router logits (x, 0). The fourth token is padding.
    router = Qwen2MoeTopKRouter(Qwen2MoeConfig(hidden_size=1, num_experts=2, num_experts_per_tok=1))
    model = nn.Sequential(router)
    router.weight.data = torch.tensor([[1.0], [0.0]])
    hidden = torch.tensor([[2.0], [1.0], [-3.0], [50.0]])
    with RouterWatch(model) as watch:
        model(hidden)
    routing = watch.routing(torch.tensor([[1, 1, 1, 0]]))
    gates = [1 / (1 + math.exp(-x)) for x in (2.0, 1.0, -3.0)]
    mean = sum(gates) / 3
    assert routing.balance_loss.item() == pytest.approx(2 * (mean * 2 / 3 + (1 - mean) * 1 / 3), rel=1e-6)
    assert routing.loads_LE.tolist() == [pytest.approx([2 / 3, 1 / 3])]
    entropy = -sum(g * math.log(g) + (1 - g) * math.log(1 - g) for g in gates) / 3
    assert routing.entropies_L.tolist() == [pytest.approx(entropy, rel=1e-5)]
    assert routing.tokens == 3


def test_one_expert_for_all_is_the_worst_and_even_gates_give_one() -> None:
    router = Qwen2MoeTopKRouter(Qwen2MoeConfig(hidden_size=4, num_experts=4, num_experts_per_tok=2))
    model = nn.Sequential(router)
    for weight, expected in ((100 * torch.eye(4), 1.0), (torch.zeros(4, 4), 1.0)):
        router.weight.data = weight
        with RouterWatch(model) as watch:
            model(torch.eye(4))
        assert watch.routing(torch.ones(1, 4)).balance_loss.item() == pytest.approx(expected)
    router.weight.data = 100 * torch.eye(4)
    with RouterWatch(model) as watch:
        model(torch.eye(4)[[2, 2, 2]])
    routing = watch.routing(torch.ones(3, 1))
    assert routing.balance_loss.item() == pytest.approx(4.0)
    assert routing.loads_LE[0, 2].item() == pytest.approx(0.5)  # the first choice; the second is the other expert


def test_loss_is_summed_over_layers_and_reaches_the_routers(sparse: Any, tiny_folder: Path) -> None:
    _, routing = _watched(sparse, make_batch(tiny_folder, [0, 3, 5]))
    assert routing.loads_LE.shape == (2, 4)
    torch.testing.assert_close(routing.loads_LE.sum(-1), torch.ones(2))
    assert 2.0 <= routing.balance_loss.item() <= 8.0
    routing.balance_loss.backward()
    for layer in (0, 2):
        assert sparse.model.language_model.layers[layer].mlp.gate.weight.grad.abs().max() > 0
    assert not routing.loads_LE.requires_grad


def test_padding_does_not_count(sparse: Any, tiny_folder: Path) -> None:
    batch = make_batch(tiny_folder, [0, 5])
    pad = torch.zeros(2, 30, dtype=torch.long)
    padded = Batch(
        torch.cat([batch.input_ids_BT, pad], 1),
        torch.cat([batch.attention_mask_BT, pad], 1),
        batch.pixel_values_ICHW,
    )
    with torch.no_grad():
        _, plain = _watched(sparse, batch)
        _, longer = _watched(sparse, padded)
    torch.testing.assert_close(longer.balance_loss, plain.balance_loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(longer.loads_LE, plain.loads_LE, rtol=1e-3, atol=1e-3)
    assert longer.tokens == plain.tokens == int(batch.attention_mask_BT.sum())


def test_watching_changes_nothing(sparse: Any, tiny_folder: Path) -> None:
    batch = make_batch(tiny_folder, [0, 3])
    with torch.no_grad():
        watched, _ = _watched(sparse, batch)
        plain = student_hidden_states(sparse, batch.input_ids_BT, batch.attention_mask_BT, batch.pixel_values_ICHW)
    assert torch.equal(watched, plain)
    assert not any(module._forward_hooks for module in sparse.modules() if isinstance(module, Qwen2MoeTopKRouter))


def test_gradients_are_the_same_under_gradient_checkpointing(sparse: Any, tiny_folder: Path) -> None:
    batch = make_batch(tiny_folder, [0, 3, 5])
    gradients = []
    for checkpointing in (False, True):
        sparse.train()
        sparse.zero_grad()
        if checkpointing:
            sparse.gradient_checkpointing_enable()
        hidden_BTD, routing = _watched(sparse, batch)
        (hidden_BTD.pow(2).mean() + routing.balance_loss).backward()
        gradients.append({n: p.grad.clone() for n, p in sparse.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7, msg=name)


def test_a_reentrant_checkpoint_is_refused(sparse: Any, tiny_folder: Path) -> None:
    sparse.train()
    sparse.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        _watched(sparse, make_batch(tiny_folder, [3]))


def test_several_passes_in_one_block_are_refused(sparse: Any, tiny_folder: Path) -> None:
    batch = make_batch(tiny_folder, [3])
    with torch.no_grad(), RouterWatch(sparse) as watch:
        for _ in range(2):
            student_hidden_states(sparse, batch.input_ids_BT, batch.attention_mask_BT)
    with pytest.raises(RuntimeError, match="ran 2 time"):
        watch.routing(batch.attention_mask_BT)


def test_dense_models_and_empty_batches_give_zero(sparse: Any, tiny_folder: Path) -> None:
    dense, batch = load_llava(tiny_folder), make_batch(tiny_folder, [3])
    assert any(is_router(module) for module in sparse.modules())
    assert not any(is_router(module) for module in dense.modules())
    with torch.no_grad():
        _, routing = _watched(dense, batch)
    assert routing.balance_loss.item() == 0.0
    assert routing.loads_LE.numel() == 0
    with torch.no_grad(), RouterWatch(sparse) as watch:
        student_hidden_states(sparse, batch.input_ids_BT, batch.attention_mask_BT)
    nothing = watch.routing(torch.zeros_like(batch.attention_mask_BT))
    assert nothing.balance_loss.item() == 0.0
    assert nothing.tokens == 0


def test_random_routing_matters_only_once_experts_differ(sparse: Any, tiny_folder: Path) -> None:
    batch = make_batch(tiny_folder, [0, 3, 5])
    keep_BT = batch.attention_mask_BT.bool()

    def states(seed: int | None) -> Tensor:
        with torch.no_grad(), nullcontext() if seed is None else random_routing(sparse, seed=seed):
            return _watched(sparse, batch)[0][keep_BT]

    torch.testing.assert_close(states(0), states(None))
    with torch.no_grad():
        sparse.model.language_model.layers[0].mlp.experts.down_proj.mul_(torch.arange(4.0)[:, None, None])
    own = states(None)
    assert (states(0) - own).abs().max() > 1e-2
    assert torch.equal(states(0), states(0))
    assert not torch.equal(states(0), states(1))
    assert torch.equal(states(None), own)
    assert is_sparse(sparse)
    assert not is_sparse(load_llava(tiny_folder))


def test_random_routing_gives_every_token_different_experts_equally_often() -> None:
    router = Qwen2MoeTopKRouter(Qwen2MoeConfig(hidden_size=4, num_experts=4, num_experts_per_tok=2))
    model, hidden = nn.Sequential(router), torch.randn(4000, 4, generator=torch.Generator().manual_seed(0))
    with random_routing(model, seed=0):
        _, weights_SK, choices_SK = model(hidden)
    assert torch.equal(weights_SK, model(hidden)[1])
    assert bool((choices_SK[:, 0] != choices_SK[:, 1]).all())
    assert choices_SK.flatten().bincount(minlength=4).tolist() == pytest.approx([2000] * 4, rel=0.1)
