"""The language model of a student that is built from parts: a dense decoder whose logits LLaVA reproduces.

`LlavaForConditionalGeneration` runs a language model from its embeddings and applies a plain LM head. Anything else
that a model does would be lost in a student built on it, so such models are refused: by name where the reason is known,
and by comparing the logits of both on a probe.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlavaForConditionalGeneration
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from llavamod_offline.errors import ModelError, first_line
from llavamod_offline.models.checkpoint import load_weights, read_json
from llavamod_offline.models.lm_head import check_lm_head, lm_head_of

_TOLERANCE = 1e-4  # of the largest logit, in float32; attention kernels may differ in the last digits
_PROBED_TOKENS = 24


def load_language_model(folder: Path, dtype: torch.dtype) -> Any:
    """Load a dense causal language model that a LLaVA can be built on.

    Errors: `ModelError` if the folder holds another kind of model, or one that a LLaVA would lose a part of.
    """
    model_type = str(read_json(folder, "config.json").get("model_type"))
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(
            f"{folder}/config.json: model_type is '{model_type}', which is no causal language model of transformers: "
            "use the folder of a dense language model, such as Qwen, Llama, Gemma, SmolLM or Phi-3"
        )
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ModelError(f"{folder}/config.json: invalid configuration: {first_line(error)}") from error
    if config.get_text_config() is not config:
        raise ModelError(
            f"{folder}/config.json: model_type is '{model_type}', which is multimodal already: use the folder of a "
            "plain language model"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(
            f"{folder}/config.json: model_type is '{model_type}', an encoder-decoder: use the folder of a "
            "decoder-only model"
        )
    text = load_weights(AutoModelForCausalLM, folder, dtype=dtype)
    try:
        text.base_model.get_input_embeddings()
    except NotImplementedError as error:
        raise _unusable(folder, model_type, "its embeddings cannot be reached") from error
    if any(".experts." in name for name, _ in text.named_parameters()):
        raise ModelError(
            f"{folder}: the language model is a mixture of experts: use a dense one, and student.upcycle to make the "
            "student sparse"
        )
    _check_plain_head(folder, text)
    return text


def _check_plain_head(folder: Path, text: Any) -> None:
    """Refuse a language model that does more between hidden states and logits than LLaVA's class."""
    kind = text.config.model_type
    try:
        check_lm_head(text, text.base_model, name=str(folder))
    except ModelError:
        raise
    except Exception as error:
        raise _unusable(folder, kind, first_line(error)) from error
    head = lm_head_of(text)
    if head.bias_V is not None:
        raise _lost(folder, kind, "the bias of its LM head")
    if head.softcap is not None:
        raise _lost(folder, kind, f"the soft cap of its logits, {head.softcap:g}")
    if head.scale != 1.0:
        raise _lost(folder, kind, f"the scale of its logits, {head.scale:g}")


@torch.no_grad()
def check_same_logits(model: LlavaForConditionalGeneration, text: Any, folder: Path) -> None:
    """Compare a LLaVA's logits with its language model's on two texts, one of them padded.

    Errors: `ModelError` if they differ, or if the language model cannot run from embeddings.
    """
    rows = text.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids_2T = torch.randint(rows, (2, _PROBED_TOKENS), generator=generator)
    ids_2T[ids_2T == model.config.image_token_index] = 0
    mask_2T = torch.ones_like(ids_2T)
    mask_2T[1, _PROBED_TOKENS // 2 :] = 0
    try:
        own, wanted = (
            one(input_ids=ids_2T, attention_mask=mask_2T, use_cache=False).logits[..., :rows][mask_2T.bool()].float()
            for one in (model, text)
        )
    except Exception as error:
        raise _unusable(folder, text.config.model_type, first_line(error)) from error
    difference = float((own - wanted).abs().max())
    if not difference <= _TOLERANCE * float(wanted.abs().max()):
        raise _lost(folder, text.config.model_type, f"a part of its forward pass: logits differ by {difference:.2g}")


def _lost(folder: Path, model_type: str, what: str) -> ModelError:
    return ModelError(
        f"{folder}: transformers' LlavaForConditionalGeneration over a '{model_type}' would lose {what}: use another "
        "language model"
    )


def _unusable(folder: Path, model_type: str, why: str) -> ModelError:
    return ModelError(f"{folder}: a '{model_type}' cannot be the language model of a LLaVA ({why}): use another one")
