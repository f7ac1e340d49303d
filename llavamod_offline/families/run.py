"""Run a family's model up to its last hidden states, and check that it accepts its processor's output.

Shape suffixes: B sequences of a batch, T tokens of the longest, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from llavamod_offline.errors import ModelError, first_line
from llavamod_offline.families.image_text import ImageTextFamily
from llavamod_offline.families.protocol import Family
from llavamod_offline.models.lm_head import check_lm_head


def check_model(family: Family, model: Any) -> None:
    """Run a loaded model on a short conversation, and compare its logits with those of its LM head.

    Errors: `ModelError` if it cannot take its processor's output, or changes its logits in an unknown way.
    """
    name = str(family.folder)
    if not isinstance(family, ImageTextFamily):
        check_lm_head(model, model.get_decoder(), name=name)
        return
    try:
        check_lm_head(model, backbone(model), inputs=on_model(model, family.probe_inputs()), name=name)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"{name}: the model cannot take its processor's output: {first_line(error)}: copy the processor's files "
            "that belong to the model"
        ) from error


def whole_hidden_states(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """The last hidden states [B, T, D] of a model that takes tokens and images together."""
    found: Tensor = backbone(model)(**on_model(model, inputs), use_cache=False).last_hidden_state
    return found


class _HeadReached(Exception):  # noqa: N818
    """Ends a forward pass where the LM head begins."""


def backbone(model: Any) -> Callable[..., Any]:
    """What returns a model's last hidden states: its base model, or itself up to the LM head if it has none."""
    if model.base_model is not model:
        base: Callable[..., Any] = model.base_model
        return base

    def until_head(**inputs: Any) -> SimpleNamespace:
        seen: list[Tensor] = []

        def stop(_: Any, given: tuple[Tensor, ...]) -> None:
            seen.append(given[0])
            raise _HeadReached

        handle = model.get_output_embeddings().register_forward_pre_hook(stop)
        try:
            model(**inputs)
        except _HeadReached:
            pass
        finally:
            handle.remove()
        return SimpleNamespace(last_hidden_state=seen[0])

    return until_head


def on_model(model: Any, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's inputs on its device, and in its dtype unless they are integers."""
    device = model.get_input_embeddings().weight.device
    return {
        name: tensor.to(device, model.dtype if tensor.is_floating_point() else None) for name, tensor in inputs.items()
    }
