"""The student's forward pass up to its last hidden states; the fused losses apply the LM head.

Shape suffixes: B sequences, T tokens, D hidden size, I images, P tokens per image, Q image
occurrences, C channels.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import cast

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from llavamod_offline.data.encode.collate import Batch


class LlavaForward:
    """The pass of LLaVA students; see `students.protocol.ForwardPass`. Features are the tower's, [I, P, C]."""

    def features(self, model: LlavaForConditionalGeneration, batch: Batch, *, train_vision: bool) -> Tensor | None:
        """Compute the tower's features of a batch's images.

        None if each pass must run the tower itself: if there are no images, if the tower is trained, or under ZeRO-3,
        where all processes must gather the same weights, whether they have images or not.
        """
        sharded = hasattr(next(model.model.vision_tower.parameters()), "ds_id")
        pixel_values_ICHW = None if train_vision or sharded else batch.pixel_values_ICHW
        return None if pixel_values_ICHW is None else vision_features(model, pixel_values_ICHW)

    def hidden_states(
        self,
        model: LlavaForConditionalGeneration,
        batch: Batch,
        *,
        train_vision: bool,
        features: Tensor | None = None,
    ) -> Tensor:
        """Run the student up to its final norm."""
        return student_hidden_states(
            model,
            batch.input_ids_BT,
            batch.attention_mask_BT,
            batch.pixel_values_ICHW if features is None else None,
            image_rows_Q=batch.image_rows_P,
            features_IPC=features,
            train_vision=train_vision,
        )


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
    """Run the student up to its final norm; return hidden states [B, T, D] in the model's dtype.

    `pixel_values_ICHW`: the images in the order of their tokens, or None without images. If an image occurs more than
    once, `image_rows_Q` gives the image of each occurrence, and tower and projector run once per image. The tower runs
    without gradients unless `train_vision` is set, and is skipped if `features_IPC` (see `vision_features`) are given
    instead of images. Errors: `ValueError` if the numbers of image tokens and of image features differ.
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
        # Without images the projector must still get a zero gradient: stages that train only it need a graph.
        embeddings_BTD = embeddings_BTD + _no_features(model, train_vision).sum().to(embeddings_BTD.dtype)
    outputs = llava.language_model(
        inputs_embeds=embeddings_BTD, attention_mask=attention_mask_BT, use_cache=False, return_dict=True
    )
    return cast("Tensor", outputs.last_hidden_state)


def vision_features(model: LlavaForConditionalGeneration, pixel_values_ICHW: Tensor, *, train: bool = False) -> Tensor:
    """The tower's features for the projector, [I, P, C]: the configured layers; `default` drops the class token."""
    tower, config = model.model.vision_tower, model.config
    # no_grad, not inference_mode: the projector saves these features for its backward pass.
    with nullcontext() if train else torch.no_grad():
        outputs = tower(pixel_values_ICHW.to(tower.dtype), output_hidden_states=True, return_dict=True)
        layers = config.vision_feature_layer
        chosen = [outputs.hidden_states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
        features_IPC = torch.cat(chosen, dim=-1)
    return features_IPC[:, 1:] if config.vision_feature_select_strategy == "default" else features_IPC


def _no_features(model: LlavaForConditionalGeneration, train_vision: bool) -> Tensor:
    """The projector's output for zero images: empty, but part of the autograd graph."""
    projector, tower = model.model.multi_modal_projector, model.model.vision_tower
    if train_vision or hasattr(next(tower.parameters()), "ds_id"):
        # This process must run the tower too if another one has images: ZeRO-1 and 2 exchange the gradients of all
        # trained parameters, and ZeRO-3 gathers all weights, collectively.
        size = model.config.vision_config.image_size
        blank_1CHW = torch.zeros(1, 3, size, size, device=model.device)
        return cast("Tensor", projector(vision_features(model, blank_1CHW, train=train_vision)[:0]))
    first = projector.linear_1.weight
    return cast("Tensor", projector(torch.zeros(0, 1, first.shape[1], dtype=first.dtype, device=first.device)))
