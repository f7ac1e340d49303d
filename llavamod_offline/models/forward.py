"""The student's forward pass up to its last hidden states; the head belongs to the fused losses.

Shape suffixes: B sequences, T tokens, D hidden size, V rows of the head, I images, P image tokens of one, Q places of
images, C channels.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration


def student_hidden_states(
    model: LlavaForConditionalGeneration,
    input_ids_BT: Tensor,
    attention_mask_BT: Tensor,
    pixel_values_ICHW: Tensor | None = None,
    *,
    image_rows_Q: Tensor | None = None,
    features_IPC: Tensor | None = None,
    train_vision: bool = False,
) -> Tensor:
    """Run the student up to its final norm; returns hidden states [B, T, D], in the model's dtype.

    `pixel_values_ICHW` holds the images in the order of their tokens, or None if there are none. Where an image stands
    at several places, `image_rows_Q` says which one stands at each; tower and projector run once for it. The tower runs
    without gradients unless `train_vision` is set, and not at all where its `features_IPC` (see `vision_features`) are
    given instead of the images. Errors: `ValueError` if image tokens and images at their places differ in number.
    """
    llava = model.model
    embeddings_BTD = llava.get_input_embeddings()(input_ids_BT)
    if features_IPC is None and pixel_values_ICHW is not None and len(pixel_values_ICHW):
        features_IPC = vision_features(model, pixel_values_ICHW, train=train_vision)
    if features_IPC is not None:
        features_QPD = llava.multi_modal_projector(features_IPC).to(embeddings_BTD.dtype)
        if image_rows_Q is not None:
            features_QPD = features_QPD.index_select(0, image_rows_Q)
        mask_BTD = llava.get_placeholder_mask(input_ids_BT, inputs_embeds=embeddings_BTD, image_features=features_QPD)
        embeddings_BTD = embeddings_BTD.masked_scatter(mask_BTD.expand_as(embeddings_BTD), features_QPD)
    else:
        # A projector that saw no image has a gradient of zero, not none: stages that train it alone need a graph.
        embeddings_BTD = embeddings_BTD + _no_features(model, train_vision).sum().to(embeddings_BTD.dtype)
    outputs = llava.language_model(
        inputs_embeds=embeddings_BTD, attention_mask=attention_mask_BT, use_cache=False, return_dict=True
    )
    return cast("Tensor", outputs.last_hidden_state)


def vision_features(model: LlavaForConditionalGeneration, pixel_values_ICHW: Tensor, *, train: bool = False) -> Tensor:
    """The tower's features that the projector takes, [I, P, C]: the configured layer, without the class token."""
    tower, config = model.model.vision_tower, model.config
    # no_grad, not inference_mode: the projector saves these features for its backward pass.
    with nullcontext() if train else torch.no_grad():
        outputs = tower(pixel_values_ICHW.to(tower.dtype), output_hidden_states=True, return_dict=True)
        layers = config.vision_feature_layer
        chosen = [outputs.hidden_states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
        features_IPC = torch.cat(chosen, dim=-1)
    return features_IPC[:, 1:] if config.vision_feature_select_strategy == "default" else features_IPC


def lm_head_weight(model: LlavaForConditionalGeneration) -> Tensor:
    """The head's weight [V, D]; with tied embeddings it is the embedding's."""
    return cast("Tensor", model.get_output_embeddings().weight)


def _no_features(model: LlavaForConditionalGeneration, train_vision: bool) -> Tensor:
    """The projection of no image at all: empty, but part of the graph."""
    projector, tower = model.model.multi_modal_projector, model.model.vision_tower
    if hasattr(next(tower.parameters()), "ds_id"):
        # ZeRO-3 gathers weights on all processes at once: where another one has images, this one must run the tower.
        size = model.config.vision_config.image_size
        blank_1CHW = torch.zeros(1, 3, size, size, device=model.device)
        return cast("Tensor", projector(vision_features(model, blank_1CHW, train=train_vision)[:0]))
    first = projector.linear_1.weight
    return cast("Tensor", projector(torch.zeros(0, 1, first.shape[1], dtype=first.dtype, device=first.device)))
