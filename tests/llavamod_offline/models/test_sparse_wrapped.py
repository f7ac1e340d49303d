"""Image-text models of classes other than LLaVA's, around text models with and without a sparse twin."""

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


def _around(name: str, text: str, tower: str | None = None, **vision: Any) -> Callable[[], Any]:
    def make() -> Any:
        towers = {**_VISION, **vision} | ({} if tower is None else {"model_type": tower})
        config_class = getattr(transformers, f"{name}Config")
        config = config_class(text_config=AutoConfig.for_model(text, **TEXT), vision_config=towers, image_token_id=60)
        return random_model(getattr(transformers, f"{name}ForConditionalGeneration"), config)

    return make


WRAPPED: dict[str, tuple[Callable[[], Any], str]] = {
    "llava_onevision": (_around("LlavaOnevision", "qwen2", "siglip_vision_model"), "qwen2_moe"),
    "llava_next": (_around("LlavaNext", "mistral", "clip_vision_model"), "mixtral"),
    "smolvlm": (_around("SmolVLM", "llama"), "mixtral"),
    "idefics3": (_around("Idefics3", "llama"), "mixtral"),
    "internvl": (
        _around("InternVL", "qwen3", image_size=[16, 16], patch_size=[8, 8]),
        "qwen3_moe",
    ),
    "mistral3": (_around("Mistral3", "mistral", "pixtral"), "mixtral"),
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
        (_around("Gemma3", "gemma3_text"), "gemma3_text"),
        (_around("Llava", "gemma2", "clip_vision_model"), "gemma2"),
        (_around("Llava", "phi3", "clip_vision_model"), "phi3"),
    ],
)
def test_those_without_a_twin_say_so(make: Callable[[], Any], text: str) -> None:
    with pytest.raises(ModelError, match=rf"a '{text}' text model cannot be made sparse: transformers has no mixture"):
        upcycle(make(), layers="dense", num_experts=4, top_k=2, seed=0)
