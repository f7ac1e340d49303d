"""The LM head as a model applies it: its logits are cap(scale · (hidden · weightᵀ + bias)), cap(x) = c · tanh(x / c).

Shape suffixes: V rows of the LM head, D hidden size, R rows of hidden states, T tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from llavamod_offline.errors import ModelError

# What classes of transformers do between their LM head and their logits, and the field of the text model's
# configuration that says by how much. All others return their LM head's output unchanged.
_CAP, _TIMES, _OVER, _BEFORE = "softcap", "times", "over", "before"  # the last divides the LM head's input
_GEMMA = {_CAP: "final_logit_softcapping"}
_COHERE = {_TIMES: "logit_scale"}
_GRANITE = {_OVER: "logits_scaling"}
_INKLING = {_BEFORE: "logits_mup_width_multiplier"}
RULES: dict[str, dict[str, str]] = {
    **dict.fromkeys(("Gemma2ForCausalLM", "Gemma3ForCausalLM", "VaultGemmaForCausalLM", "NanoChatForCausalLM"), _GEMMA),
    **dict.fromkeys(("Gemma3nForCausalLM", "Gemma3nForConditionalGeneration"), _GEMMA),
    **dict.fromkeys(("Gemma4ForCausalLM", "Gemma4ForConditionalGeneration"), _GEMMA),
    **dict.fromkeys(("Gemma4UnifiedForCausalLM", "Gemma4UnifiedForConditionalGeneration"), _GEMMA),
    "RecurrentGemmaForCausalLM": {_CAP: "logits_soft_cap"},
    "xLSTMForCausalLM": {_CAP: "output_logit_soft_cap"},
    "MuseGlimmerForConditionalGeneration": {_TIMES: "output_multiplier", **_GEMMA},
    **dict.fromkeys(("CohereForCausalLM", "Cohere2ForCausalLM", "Cohere2MoeForCausalLM"), _COHERE),
    **dict.fromkeys(("CohereCompassForCausalLM", "CohereCompassForConditionalGeneration"), _COHERE),
    **dict.fromkeys(("GraniteForCausalLM", "GraniteSWAForCausalLM", "GraniteMoeForCausalLM"), _GRANITE),
    **dict.fromkeys(("GraniteMoeSWAForCausalLM", "GraniteMoeHybridForCausalLM"), _GRANITE),
    **dict.fromkeys(("GraniteMoeSharedForCausalLM", "Granite4VisionForConditionalGeneration"), _GRANITE),
    "MiniCPM3ForCausalLM": {_BEFORE: "logits_scaling"},
    "HyperCLOVAXForCausalLM": {_TIMES: "logits_scaling"},
    "FalconH1ForCausalLM": {_TIMES: "lm_head_multiplier"},
    **dict.fromkeys(("InklingForCausalLM", "InklingForConditionalGeneration"), _INKLING),
}
_MAGNIFIED = 100.0  # beyond any soft cap in use
_EXACT, _ROUNDED = 1e-5, 2e-2
_BLOCK_VALUES = 2**24


@dataclass(frozen=True, eq=False)
class LmHead:
    """Logits [R, V] = cap(scale · (hidden · `weight_VD`ᵀ + `bias_V`)), where cap(x) = softcap · tanh(x / softcap).

    Without a softcap, cap(x) = x. `before` is the part of `scale` that the model applies to hidden states: the layer's
    own input is hidden · before. The tensors are the model's own, so that gradients reach its parameters.
    """

    weight_VD: Tensor
    bias_V: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    before: float = 1.0

    @property
    def rows(self) -> int:
        """The number of ids that it knows, V."""
        return self.weight_VD.shape[0]

    @property
    def is_linear(self) -> bool:
        """Whether logits are a linear map of hidden states: no bias and no softcap."""
        return self.bias_V is None and self.softcap is None

    def first(self, rows: int) -> LmHead:
        """The same head for its first ids only."""
        return self if rows >= self.rows else self.part(0, rows)

    def part(self, start: int, stop: int) -> LmHead:
        """The same head for the ids from `start` to `stop` − 1."""
        bias_V = None if self.bias_V is None else self.bias_V[start:stop]
        return replace(self, weight_VD=self.weight_VD[start:stop], bias_V=bias_V)

    def finish_(self, products_RV: Tensor) -> Tensor:
        """Turn float32 products hidden · weightᵀ [R, V] into logits, in place."""
        if self.bias_V is not None:
            products_RV.add_(self.bias_V)
        if self.scale != 1.0:
            products_RV.mul_(self.scale)
        if self.softcap is not None:
            products_RV.div_(self.softcap).tanh_().mul_(self.softcap)
        return products_RV

    def slope(self, logits_RV: Tensor) -> Tensor | float:
        """The derivative of logits with respect to products hidden · weightᵀ, [R, V] or one number for all."""
        if self.softcap is None:
            return self.scale
        return logits_RV.div(self.softcap).square_().neg_().add_(1.0).mul_(self.scale)


def as_lm_head(head: LmHead | Tensor) -> LmHead:
    """The head itself, or the one that has this weight [V, D] and no bias, scale or softcap."""
    return LmHead(head) if isinstance(head, Tensor) else head


def lm_head_of(model: Any) -> LmHead:
    """The LM head of a transformers model, as its class applies it; see `check_lm_head`. Reads no weights.

    Errors: `ModelError` if it has none, or one that is not a linear layer.
    """
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear) or not layer.weight.is_floating_point():
        kind = "no LM head" if layer is None else f"a {type(layer).__name__} as its LM head"
        raise ModelError(
            f"{type(model).__name__}: it has {kind}, not a linear layer with weights in floating point: choose another "
            "model"
        )
    classes = [base.__name__ for base in type(model).__mro__]
    softcap, scale = head_settings(classes, model.config)
    head = LmHead(layer.weight, layer.bias, softcap, scale, scale if _BEFORE in _rule(classes) else 1.0)
    text = model.config.get_text_config()
    head = head.first(getattr(text, "unpadded_vocab_size", None) or head.rows)  # Inkling cuts its spare rows off
    vocabulary = getattr(getattr(model, "model", None), "vocabulary_mapping", None)
    if vocabulary is None:
        return head
    never_V = torch.zeros(head.rows, device=layer.weight.device)  # Chameleon never predicts an image's tokens
    never_V[vocabulary.image_tokens] = torch.finfo(torch.float32).min
    return replace(head, bias_V=never_V)


def head_settings(classes: list[str], config: Any) -> tuple[float | None, float]:
    """Softcap and scale of the first of `classes` that has any, by a model's configuration; else None and 1."""
    text = config.get_text_config()
    values = {kind: getattr(text, name) for kind, name in _rule(classes).items()}
    softcap, scale = values.get(_CAP), 1.0
    for kind in (_TIMES, _OVER, _BEFORE):
        if (value := values.get(kind)) is not None:
            scale = scale * value if kind == _TIMES else scale / value
    return (None if softcap is None else float(softcap)), float(scale)


def _rule(classes: list[str]) -> dict[str, str]:
    return next((RULES[name] for name in classes if name in RULES), {})


def float32_products(rows_RD: Tensor, weight_VD: Tensor, buffer_RV: Tensor | None = None) -> Tensor:
    """Multiply rows by a weight in float32, [R, D] · [V, D]ᵀ → [R, V], into `buffer_RV` if possible.

    On a GPU half-precision operands are multiplied as they are and accumulated in float32, which equals casting both;
    where the device cannot do so, blocks of the weight are cast in turn.
    """
    if rows_RD.dtype == weight_VD.dtype == torch.float32:
        return torch.mm(rows_RD, weight_VD.T, out=buffer_RV)
    if rows_RD.dtype == weight_VD.dtype and _multiplies_mixed(weight_VD.device, weight_VD.dtype):
        return torch.mm(rows_RD, weight_VD.T, out_dtype=torch.float32, out=buffer_RV)
    rows_RD = rows_RD.float()
    if buffer_RV is None:
        buffer_RV = torch.empty(len(rows_RD), len(weight_VD), device=rows_RD.device)
    step = max(1, _BLOCK_VALUES // weight_VD.shape[1])
    for start in range(0, len(weight_VD), step):
        block = slice(start, start + step)
        torch.mm(rows_RD, weight_VD[block].float().T, out=buffer_RV[:, block])
    return buffer_RV


@functools.cache
def _multiplies_mixed(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the device multiplies in half precision with float32 sums and output."""
    one_11 = torch.ones(1, 1, device=device, dtype=dtype)
    try:
        torch.mm(one_11, one_11, out_dtype=torch.float32, out=torch.empty(1, 1, device=device))
    except (RuntimeError, TypeError):
        return False
    return True


@torch.no_grad()
def check_lm_head(model: Any, backbone: Any, *, name: str, inputs: Mapping[str, Tensor] | None = None) -> None:
    """Compare the logits of a model's own forward pass with those of `lm_head_of`, on `inputs` or two tokens.

    They must agree within 1e-5 of the largest logit in float32 (2e-2 in half precision, where the model itself rounds),
    on the last hidden states of `backbone` unchanged and on large multiples of them, which reach any softcap. If
    weights are sharded or not loaded, classes of transformers are accepted by name and others are refused; logits that
    are not finite are not compared. Errors: `ModelError` naming `name`.
    """
    head = lm_head_of(model)
    weight_VD = head.weight_VD
    if weight_VD.dim() != 2 or weight_VD.is_meta or hasattr(weight_VD, "placements"):
        if not type(model).__module__.startswith("transformers."):
            raise ModelError(
                f"{name}: the weights of its LM head are sharded or not loaded, so that its logits cannot be compared "
                "with them: do this before sharding"
            )
        return
    if inputs is None:
        inputs = {"input_ids": torch.tensor([plain_ids(model, 2)], device=model.get_input_embeddings().weight.device)}
    rounding = _ROUNDED if weight_VD.dtype in (torch.bfloat16, torch.float16) else _EXACT
    with evaluating(model):
        hidden_TD = getattr(backbone(**inputs, use_cache=False), "last_hidden_state", None)
        if hidden_TD is None:
            raise ModelError(
                f"{name}: its {type(backbone).__name__} gives no last hidden state: use the model that it wraps, or "
                "another"
            )
        hidden_TD = hidden_TD[0].to(weight_VD.device)
        most = abs(head.scale) * float(float32_products(hidden_TD, weight_VD).abs().max())
        for factor in (1.0, _MAGNIFIED / most if most else 1.0):
            with _magnified(model.get_output_embeddings(), factor):
                theirs_TV = model(**inputs, use_cache=False).logits[0].float()
            ours_TV = head.finish_(float32_products(hidden_TD * factor, weight_VD)).to(theirs_TV.device)
            if not bool(theirs_TV.isfinite().all()):
                return
            if problem := _difference(theirs_TV, ours_TV, rounding):
                raise ModelError(
                    f"{name}: the logits of {type(model).__name__} are not those of its LM head ({problem}), in a way "
                    "that no known rule explains: choose another model"
                )


def _difference(theirs_TV: Tensor, ours_TV: Tensor, rounding: float) -> str | None:
    """What differs between two tensors of logits; None if they agree up to rounding."""
    if theirs_TV.shape != ours_TV.shape:
        return f"there are {theirs_TV.shape[1]}, not {ours_TV.shape[1]}"
    never_TV, unlikely_TV = (logits_TV < torch.finfo(torch.float32).min / 2 for logits_TV in (theirs_TV, ours_TV))
    if not torch.equal(never_TV, unlikely_TV):
        return "they rule out other ids"
    theirs_TV, ours_TV = theirs_TV.masked_fill(never_TV, 0.0), ours_TV.masked_fill(never_TV, 0.0)
    gap, most = float((theirs_TV - ours_TV).abs().max()), float(theirs_TV.abs().max())
    return f"they differ by {gap:.3g}, the largest is {most:.3g}" if gap > rounding * most else None


def plain_ids(model: Any, count: int) -> list[int]:
    """Ids that stand for themselves: not those of images, nor others that the configuration names."""
    special = set(_named_ids(model.config.to_dict()))
    rows = model.get_input_embeddings().weight.shape[0]
    return [number for number in range(rows) if number not in special][:count]


def _named_ids(settings: dict[str, Any]) -> Iterator[int]:
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from _named_ids(value)
        elif str(key).endswith(("token_id", "token_index", "token_ids")):
            yield from (item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode; afterwards, restore the mode of each of its modules."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _magnified(layer: nn.Module, factor: float) -> Iterator[None]:
    """Multiply a layer's input."""
    hook = layer.register_forward_pre_hook(lambda _, inputs: (inputs[0] * factor, *inputs[1:]))
    try:
        yield
    finally:
        hook.remove()
