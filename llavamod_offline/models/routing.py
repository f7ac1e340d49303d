"""Watching the routers of a sparse student during a training step: the balance loss and the experts' load.

Shape suffixes: B sequences, T tokens, S = B·T tokens in a row, E experts, K experts a token, L sparse layers.

The balance loss of a layer is E · Σ_e mean(gate_e) · fraction_first_choice(e) over the tokens that are no padding: 1
when balanced, E when one expert gets all. Source: GShard (arXiv 2006.16668) as DeepSpeed's top-2 gate computes it. It
is summed over the layers; the coefficient is the training loop's, which adds it once.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

# Both give logits [S, E], weights [S, K] and choices [S, K].
ROUTERS = (Qwen2MoeTopKRouter, Qwen3MoeTopKRouter)


@dataclass(frozen=True)
class Routing:
    """What the routers did with one batch.

    `balance_loss`: summed over layers, with gradient; 0 for a dense model or a batch of padding alone.
    `loads_LE`: the share of the tokens' choices (K a token) that asked for each expert, rows sum to 1; detached.
    `entropies_L`: mean entropy of the gates' distributions over E, nats; detached. `drop_rates_L`: the share of the
    choices that found no place (see `capacity.py`). `tokens`: those that are no padding.
    """

    balance_loss: Tensor
    loads_LE: Tensor
    entropies_L: Tensor
    drop_rates_L: Tensor
    tokens: int


class RouterWatch:
    """Collects the routers' outputs of the forward passes inside a `with` block.

    The hooks keep references and compute nothing, so a gradient checkpoint's second pass sees the same operations; they
    are gone when the block ends. Leave `backward()` outside of it. A dense model is watched in vain.
    """

    def __init__(self, model: nn.Module) -> None:
        self._routers = [module for module in model.modules() if isinstance(module, ROUTERS)]
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
        """Summarise the one forward pass that the block held; `attention_mask_BT` is its mask.

        Errors: `RuntimeError` if the block held no forward pass, or several, or the gradient was cut by a reentrant
        gradient checkpoint.
        """
        keep_S = attention_mask_BT.reshape(-1).to(torch.bool)
        tokens = int(keep_S.sum())
        losses: list[Tensor] = []
        loads: list[Tensor] = []
        entropies: list[Tensor] = []
        drops: list[Tensor] = []
        for logits, choices, weights in zip(self._logits, self._choices, self._weights, strict=True):
            if len(logits) != 1 or len(logits[0]) != len(keep_S):
                raise RuntimeError(
                    f"a router ran {len(logits)} time(s) in the watched block; expected one pass, same mask"
                )
            if self._train and not logits[0].requires_grad and _trained(self._routers):
                raise RuntimeError("the routers' gradient is cut: use gradient checkpointing with use_reentrant=False")
            loss, load_E, entropy = _summary(logits[0], choices[0], keep_S)
            losses.append(loss)
            loads.append(load_E)
            entropies.append(entropy)
            drops.append((weights[0].detach()[keep_S] == 0).sum() / max(tokens * weights[0].shape[1], 1))
        zero = torch.zeros((), dtype=torch.float32, device=keep_S.device)
        return Routing(
            balance_loss=torch.stack(losses).sum() if losses else zero,
            loads_LE=torch.stack(loads) if loads else zero.new_zeros(0, 0),
            entropies_L=torch.stack(entropies) if entropies else zero.new_zeros(0),
            drop_rates_L=torch.stack(drops) if drops else zero.new_zeros(0),
            tokens=tokens,
        )

    def _hook(self, layer: int) -> Any:
        def collect(module: nn.Module, inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
            logits_SE, weights_SK, choices_SK = output
            self._logits[layer].append(logits_SE)
            self._choices[layer].append(choices_SK)
            self._weights[layer].append(weights_SK)

        return collect


def _trained(routers: list[Any]) -> bool:
    return any(router.weight.requires_grad for router in routers)


def _summary(logits_SE: Tensor, choices_SK: Tensor, keep_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Balance loss, load and gate entropy of one layer over the tokens to keep; zeros if there are none."""
    experts = logits_SE.shape[1]
    gates_SE = torch.softmax(logits_SE.float(), dim=-1)
    weight_S = keep_S.float() / keep_S.sum().clamp(min=1)
    mean_E = weight_S @ gates_SE
    chosen_SKE = nn.functional.one_hot(choices_SK, experts).to(weight_S)
    first_E = weight_S @ chosen_SKE[:, 0]  # topk sorts: the first choice comes first
    loss = experts * (mean_E * first_E).sum()
    load_E = weight_S @ chosen_SKE.mean(1)
    entropy = weight_S @ torch.special.entr(gates_SE.detach()).sum(-1)
    return loss, load_E, entropy
