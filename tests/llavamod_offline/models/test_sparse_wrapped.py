"""Image-text models of other classes than LLaVA's, around text models with a sparse twin, and around some without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForImageTextToText

from llavamod_offline.errors import ModelError
from llavamod_offline.models.upcycle import upcycle
from tests.llavamod_offline.models.test_sparse_twins import EXACT, TEXT, random_model

_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


def _around(name: str, text: str, *, tower: str | None = None, **settings: Any) -> Callable[[], Any]:
    def make() -> Any:
        config = getattr(transformers, f"{name}Config")
        vision = {**_VISION, **settings.pop("vision", {})}
        if tower is not None:
            vision["model_type"] = tower
        whole = config(text_config=AutoConfig.for_model(text, **TEXT), vision_config=vision, **settings)
        return random_model(getattr(transformers, f"{name}ForConditionalGeneration"), whole)

    return make


_IMAGE = {"image_token_id": 60}
WRAPPED: dict[str, tuple[Callable[[], Any], str]] = {
    "llava_onevision": (_around("LlavaOnevision", "qwen2", tower="siglip_vision_model", **_IMAGE), "qwen2_moe"),
    "llava_next": (_around("LlavaNext", "mistral", tower="clip_vision_model", **_IMAGE), "mixtral"),
    "smolvlm": (_around("SmolVLM", "llama", **_IMAGE), "mixtral"),
    "idefics3": (_around("Idefics3", "llama", **_IMAGE), "mixtral"),
    "internvl": (
        _around("InternVL", "qwen3", vision={"image_size": [16, 16], "patch_size": [8, 8]}, **_IMAGE),
        "qwen3_moe",
    ),
    "mistral3": (_around("Mistral3", "mistral", tower="pixtral", **_IMAGE), "mixtral"),
}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("kind", WRAPPED)
def test_the_text_model_becomes_its_twin_and_the_class_stays(kind: str, tmp_path: Path) -> None:
    make, twin = WRAPPED[kind]
    dense = make()
    sparse = upcycle(dense, layers="dense", num_experts=4, top_k=2, seed=0)
    sparse.save_pretrained(tmp_path)
    plain, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert type(plain) is type(sparse) is type(dense)
    assert plain.config.get_text_config().model_type == twin
    assert not any(info.values()), info
    ids_BT = torch.tensor([[3, 17, 40, 5, 9]])
    expected = dense(input_ids=ids_BT).logits
    for model in (sparse.eval(), plain.eval()):
        torch.testing.assert_close(
            model(input_ids=ids_BT).logits, expected, rtol=0, atol=EXACT * float(expected.abs().max())
        )


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (_around("Gemma3", "gemma3_text", mm_tokens_per_image=1, image_token_index=60), "gemma3_text"),
        (_around("Llava", "gemma2", tower="clip_vision_model", **_IMAGE), "gemma2"),
        (_around("Llava", "phi3", tower="clip_vision_model", **_IMAGE), "phi3"),
    ],
)
def test_those_without_a_twin_say_so(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(ModelError, match=rf"a '{text}' text model cannot be made sparse: transformers has no mixture"):
        upcycle(make(), layers="dense", num_experts=4, top_k=2, seed=0)
