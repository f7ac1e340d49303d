"""Router noise: only in training, in the amount requested, and reproducible from the random seed."""

from __future__ import annotations

import copy

import pytest
import torch

from llavamod_offline.models.router_noise import add_router_noise
from llavamod_offline.models.routing import RouterWatch
from llavamod_offline.models.sparse_twins import is_router, routed
from tests.llavamod_offline.models.test_sparse_twins import dense, inputs_of
from tests.llavamod_offline.models.test_sparse_twins import sparse_of as sparse

KINDS = ["llava_mistral", "llava_granite", "qwen3_vl"]  # routers of each form


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_and_saved_weights_know_nothing_of_it(kind: str) -> None:
    plain = sparse(dense(kind), kind)
    noisy = copy.deepcopy(plain)
    add_router_noise(noisy, 5.0)
    inputs = inputs_of(plain)
    with torch.no_grad():
        assert torch.equal(plain(**inputs).logits, noisy(**inputs).logits)
    assert noisy.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("kind", KINDS)
def test_choices_change_as_often_as_the_noise_says(kind: str) -> None:
    """None change without noise, nearly all with a lot of it; weights sum to 1 over the chosen experts."""
    plain = sparse(dense(kind), kind).train()
    inputs = inputs_of(plain)
    changed = []
    for noise in (0.0, 0.3, 100.0):
        noisy = copy.deepcopy(plain)
        add_router_noise(noisy, noise)
        first = next(module for module in noisy.modules() if is_router(module))
        bare = next(module for module in plain.modules() if is_router(module))
        states_SD = torch.randn(400, 32, generator=torch.Generator().manual_seed(0))
        torch.manual_seed(0)
        logits_SE, weights_SK, choices_SK = routed(first(states_SD))
        torch.manual_seed(0)
        assert all(map(torch.equal, routed(first(states_SD)), (logits_SE, weights_SK, choices_SK)))
        same_SE, bare_weights_SK, bare_SK = routed(bare(states_SD))
        assert torch.equal(logits_SE, same_SE)
        torch.testing.assert_close(weights_SK.sum(1), torch.ones(400))
        changed.append(float((choices_SK.sort(1).values != bare_SK.sort(1).values).any(1).float().mean()))
        if not noise:
            torch.testing.assert_close(weights_SK, bare_weights_SK)
    assert changed[0] == 0.0
    assert 0.05 < changed[1] < 0.6
    assert changed[2] == pytest.approx(5 / 6, abs=0.08)  # one of the six pairs of four experts is the original choice
    with RouterWatch(noisy) as watch:
        noisy(**inputs)
    assert float(watch.routing(inputs["attention_mask"]).balance_loss.detach()) > 0


def test_routers_still_learn() -> None:
    model = sparse(dense("llava_mistral"), "llava_mistral").train()
    add_router_noise(model, 0.3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".experts.down_proj" in name:
                parameter.mul_(torch.linspace(0.5, 2.0, 4)[:, None, None])
    model(**inputs_of(model)).logits.log_softmax(-1)[..., 5].mean().backward()
    routers = [module for module in model.modules() if is_router(module)]
    assert all(float(router.weight.grad.abs().max()) > 1e-6 for router in routers)
