"""Build a LLaVA student from a vision tower, a language model and a projector."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

import torch
from tokenizers import AddedToken
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration

from llavamod_offline.data.sample import IMAGE_PLACEHOLDER
from llavamod_offline.errors import ModelError
from llavamod_offline.families.llava.building.projector import (
    MLP,
    check_projector_type,
    new_projector,
    projector_activation,
    read_projector,
)
from llavamod_offline.families.llava.building.text_model import check_same_logits, load_language_model
from llavamod_offline.families.llava.building.tower import load_tower
from llavamod_offline.families.llava.towers import extra_tokens
from llavamod_offline.models.checkpoint import id_count, load_tensors, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def build_llava(
    vision_tower: Path,
    language_model: Path,
    *,
    seed: int,
    projector: Path | None = None,
    projector_type: str | None = None,
    vision_feature_layer: int | Sequence[int] = -2,
    vision_feature_select_strategy: Literal["default", "full"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> LlavaForConditionalGeneration:
    """Join a tower and a language model by a projector.

    The projector comes from the file `projector` (see `read_projector`), or is a new one from `seed`; its type is the
    file's, or `mlp2x_gelu`. It sees the tower's hidden states of one layer, or of several side by side; the strategy
    `default` drops the class token and `full` keeps it (None: drop it if there is one).
    For `vision_tower` and `language_model` see `load_tower` and `load_language_model`. Use the result with
    `build_tokenizer(language_model)`; if that adds an image token beyond the last row, the embeddings and the LM head
    grow by copies of their mean row.
    Errors: `ModelError` if a folder is missing, incomplete or holds another kind of model.
    """
    tower = load_tower(vision_tower, dtype)
    text = load_language_model(language_model, dtype)
    tokenizer = build_tokenizer(language_model)
    vision_config, tied = tower.config, bool(text.config.tie_word_embeddings)
    embeddings = text.base_model.get_input_embeddings().weight
    rows = max(id_count(tokenizer), len(embeddings))
    layers = _feature_layers(vision_feature_layer, vision_config.num_hidden_layers)
    inputs, hidden = vision_config.hidden_size * len(layers), text.config.hidden_size
    kind = None if projector_type is None else check_projector_type(projector_type)
    if projector is None:
        kind = kind or MLP
        tensors = new_projector(inputs, hidden, seed, kind)
    else:
        kind, tensors = read_projector(projector, kind=kind, inputs=inputs, hidden=hidden)
    config = LlavaConfig(
        vision_config=vision_config.to_dict(),
        text_config=text.config.to_dict() | {"vocab_size": rows},
        image_token_index=tokenizer.get_vocab()[IMAGE_PLACEHOLDER],
        projector_hidden_act=projector_activation(kind),
        vision_feature_layer=layers if len(layers) > 1 else layers[0],
        tie_word_embeddings=tied,
    )
    _choose_tokens(config, vision_feature_select_strategy)
    tensors |= {f"model.vision_tower.{name}": tensor for name, tensor in tower.state_dict().items()}
    tensors |= {f"model.language_model.{name}": tensor for name, tensor in text.base_model.state_dict().items()}
    named = next(name for name, parameter in text.base_model.named_parameters() if parameter is embeddings)
    tensors[f"model.language_model.{named}"] = _grown(embeddings.detach(), rows)
    if not tied:
        tensors["lm_head.weight"] = _grown(text.get_output_embeddings().weight.detach(), rows)
    try:
        model = load_tensors(LlavaForConditionalGeneration, config, tensors, dtype=dtype)
    except ModelError as error:
        raise ModelError(f"a LLaVA of {vision_tower} and {language_model} cannot be made: {error}") from error
    check_same_logits(model, text, language_model)
    model.generation_config = text.generation_config
    return cast("LlavaForConditionalGeneration", model)


def build_tokenizer(language_model: Path) -> PreTrainedTokenizerFast:
    """Load a language model's tokenizer and add the special token `<image>` if it has none.

    Errors: `ModelError` if the folder has no tokenizer.
    """
    tokenizer = load_tokenizer(language_model)
    if IMAGE_PLACEHOLDER not in tokenizer.get_vocab():
        token = AddedToken(IMAGE_PLACEHOLDER, special=True, normalized=False)
        tokenizer.add_special_tokens({"extra_special_tokens": [token]}, replace_extra_special_tokens=False)
    return tokenizer


def _feature_layers(chosen: int | Sequence[int], count: int) -> list[int]:
    """List the layers whose hidden states the projector sees; 0: the embeddings. Errors: `ModelError`."""
    layers = [chosen] if isinstance(chosen, int) else list(chosen)
    wrong = [layer for layer in layers if not -count - 1 <= layer <= count]
    if wrong or not layers:
        raise ModelError(f"vision_feature_layer is {wrong[0] if wrong else '[]'}: expected {-count - 1} to {count}")
    return layers


def _choose_tokens(config: LlavaConfig, strategy: Literal["default", "full"] | None) -> None:
    """Set which of the tower's tokens become image tokens, and their number. Errors: `ModelError`."""
    extra, vision = extra_tokens(config), config.vision_config
    if strategy == "default" and not extra:
        raise ModelError(
            f"vision_feature_select_strategy 'default' drops the first token, but a {vision.model_type} has no class "
            "token, so that would be a patch: set it to full"
        )
    config.vision_feature_select_strategy = strategy or ("default" if extra else "full")
    dropped = int(config.vision_feature_select_strategy == "default")
    config.image_seq_length = (vision.image_size // vision.patch_size) ** 2 + extra - dropped


def _grown(weight_VD: Tensor, rows: int) -> Tensor:
    """Append copies of the mean row, up to `rows` rows."""
    new = weight_VD.mean(0, keepdim=True).expand(rows - len(weight_VD), -1)
    return torch.cat([weight_VD, new])
