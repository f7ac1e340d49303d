"""Watch a sparse student's routers during a training step: balance loss and expert load.

Shape suffixes: B sequences, T tokens, S = B·T tokens in a row, E experts, K experts per token, L sparse layers.

The balance loss of a layer is E · Σ_e mean(gate_e) · fraction_first_choice(e) over the non-padding tokens: 1 when
balanced, E when one expert gets every token. It is summed over layers; the training loop multiplies it by its
coefficient and adds it once. As a product of means, it is not additive: a step's loss is the mean over its
micro-batches, weighted by their tokens, which for small or uniform micro-batches exceeds the loss of the whole batch.
Source: GShard (arXiv 2006.16668), as computed by DeepSpeed's top-2 gate.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from llavamod_offline.models.sparse_twins import is_router, rerouted, routed
from llavamod_offline.plural import counted


@dataclass(frozen=True)
class Routing:
    """What the routers did with one batch.

    `balance_loss`: summed over layers, differentiable; 0 for a dense model or a batch of padding only.
    `loads_LE`: each expert's share of the tokens' choices (K per token); rows sum to 1. `entropies_L`: mean entropy of
    the gate distributions, in nats. `drop_rates_L`: the share of choices dropped beyond capacity (see
    `capacity.py`). `tokens`: the number of non-padding tokens. All but `balance_loss` are detached.
    """

    balance_loss: Tensor
    loads_LE: Tensor
    entropies_L: Tensor
    drop_rates_L: Tensor
    tokens: int


class RouterWatch:
    """Collects the router outputs of the forward pass inside a `with` block. No-op for dense models.

    The hooks only keep references, so that the recomputation of gradient checkpointing runs the same operations; they
    are removed at the end of the block. Call `backward()` after the block.
    """

    def __init__(self, model: nn.Module) -> None:
        self._routers = [module for module in model.modules() if is_router(module)]
        self._hooks: list[Any] = []
        self._train = False
        self._logits: list[list[Tensor]] = [[] for _ in self._routers]
        self._choices: list[list[Tensor]] = [[] for _ in self._routers]
        self._weights: list[list[Tensor]] = [[] for _ in self._routers]

    def __enter__(self) -> RouterWatch:
        self._train = torch.is_grad_enabled()
        for collected in (*self._logits, *self._choices, *self._weights):
            collected.clear()
        self._hooks = [router.register_forward_hook(self._hook(layer)) for layer, router in enumerate(self._routers)]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def routing(self, attention_mask_BT: Tensor) -> Routing:
        """Summarise the forward pass run inside the block; `attention_mask_BT` is its mask.

        Errors: `RuntimeError` if the block ran no forward pass or several, or if reentrant gradient checkpointing
        detached the routers.
        """
        keep_S = attention_mask_BT.reshape(-1).to(torch.bool)
        count = keep_S.sum()
        losses: list[Tensor] = []
        loads: list[Tensor] = []
        entropies: list[Tensor] = []
        drops: list[Tensor] = []
        for logits, choices, weights in zip(self._logits, self._choices, self._weights, strict=True):
            if len(logits) != 1 or len(logits[0]) != len(keep_S):
                raise RuntimeError(
                    f"a router ran {counted(len(logits), 'time')} in the watched block: run one forward pass, "
                    "with this mask"
                )
            if self._train and not logits[0].requires_grad and _trained(self._routers):
                raise RuntimeError("the routers get no gradient: use gradient checkpointing with use_reentrant=False")
            loss, load_E, entropy = _summary(logits[0], choices[0], keep_S)
            losses.append(loss)
            loads.append(load_E)
            entropies.append(entropy)
            dropped_SK = (weights[0].detach() == 0) & keep_S[:, None]
            drops.append(dropped_SK.sum() / (count * weights[0].shape[1]).clamp(min=1))
        zero = torch.zeros((), dtype=torch.float32, device=keep_S.device)
        return Routing(
            balance_loss=torch.stack(losses).sum() if losses else zero,
            loads_LE=torch.stack(loads) if loads else zero.new_zeros(0, 0),
            entropies_L=torch.stack(entropies) if entropies else zero.new_zeros(0),
            drop_rates_L=torch.stack(drops) if drops else zero.new_zeros(0),
            tokens=int(count),  # the only wait for the device, once all layers are summarised
        )

    def _hook(self, layer: int) -> Any:
        def collect(module: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            logits_SE, weights_SK, choices_SK = routed(output)
            self._logits[layer].append(logits_SE)
            self._choices[layer].append(choices_SK[:, : module.top_k])  # without the runner-up of a single choice
            self._weights[layer].append(weights_SK[:, : module.top_k])

        return collect


def is_sparse(model: nn.Module) -> bool:
    """Whether a model has routers."""
    return any(is_router(module) for module in model.modules())


@contextmanager
def random_routing(model: nn.Module, *, seed: int) -> Iterator[None]:
    """Give every token random experts inside the block, with the weights of those that its routers choose.

    A student whose loss stays the same has experts that do not specialise.
    """
    generator = torch.Generator().manual_seed(seed)

    def choose(module: Any, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits_SE, weights_SK, choices_SK = routed(output)
        order_SE = torch.rand(logits_SE.shape, generator=generator).argsort(1).to(choices_SK)
        return rerouted(output, weights_SK, order_SE[:, : choices_SK.shape[1]])

    hooks = [module.register_forward_hook(choose) for module in model.modules() if is_router(module)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _trained(routers: list[Any]) -> bool:
    return any(router.weight.requires_grad for router in routers)


def _summary(logits_SE: Tensor, choices_SK: Tensor, keep_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Balance loss, load and gate entropy of one layer over the tokens to keep; zeros if none are kept."""
    experts = logits_SE.shape[1]
    gates_SE = torch.softmax(logits_SE.float(), dim=-1)
    weight_S = keep_S.float() / keep_S.sum().clamp(min=1)
    mean_E = weight_S @ gates_SE
    chosen_SKE = (choices_SK[:, :, None] == torch.arange(experts, device=choices_SK.device)).to(weight_S)
    first_E = weight_S @ chosen_SKE[:, 0]  # topk sorts: the first choice comes first
    loss = experts * (mean_E * first_E).sum()
    load_E = weight_S @ chosen_SKE.mean(1)
    entropy = weight_S @ torch.special.entr(gates_SE.detach()).sum(-1)
    return loss, load_E, entropy
