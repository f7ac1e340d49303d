"""Checkpoints whose configuration and weights disagree on whether the LM head is tied to the embeddings."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from llavamod_offline.errors import ModelError
from llavamod_offline.families import open_family
from llavamod_offline.families.llava.building import build_llava
from tests.tiny import write_tiny_language_model, write_tiny_llava, write_tiny_tower
from tests.tiny_families import TINY_FAMILIES
from tests.tiny_teachers import write_tiny_causal_lm

WRITERS: dict[str, Callable[[Path], Path]] = {
    "qwen3_vl": TINY_FAMILIES["qwen3_vl"].write,
    "smolvlm": TINY_FAMILIES["smolvlm"].write,
    "gemma3": TINY_FAMILIES["gemma3"].write,
    "llava": write_tiny_llava,
    "language model": write_tiny_causal_lm,
}


def disagreeing(folder: Path) -> tuple[str, Tensor]:
    """Tie a checkpoint's LM head only in config.json; return the folder's name and the LM head's weight."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | {"tie_word_embeddings": True}
    file.write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    embeddings = next(tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight"))
    tensors["lm_head.weight"] = 0.1 * torch.randn(embeddings.shape, generator=torch.manual_seed(1))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return str(file.parent), tensors["lm_head.weight"]


def opened(folder: Path) -> Any:
    return open_family(folder, "qwen", image_aspect="auto", max_length=64).load(torch.float32)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_head_that_differs_from_what_it_is_tied_to_is_used(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As in transformers 5; copies and exports of the model keep it in a form that all software reads."""
    folder = WRITERS[kind](tmp_path / "model")
    name, head_VD = disagreeing(folder)
    with caplog.at_level(logging.WARNING):
        model = opened(folder)
    (message,) = [record.getMessage() for record in caplog.records if "tie" in record.getMessage()]
    assert message.startswith(f"{name}: config.json ties 'lm_head.weight' to 'model.")
    assert "embed_tokens.weight'" in message
    assert "\n" not in message
    auto = AutoModelForCausalLM if kind == "language model" else AutoModelForImageTextToText
    ids_BT = torch.arange(8, 20)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids_BT).logits, auto.from_pretrained(folder)(input_ids=ids_BT).logits)
    assert torch.equal(model.get_output_embeddings().weight, head_VD)
    model.save_pretrained(tmp_path / "export")
    assert json.loads((tmp_path / "export" / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(opened_export(auto, tmp_path / "export"), head_VD)


def opened_export(auto: Any, folder: Path) -> Tensor:
    weight: Tensor = auto.from_pretrained(folder).get_output_embeddings().weight
    return weight


def test_a_copy_of_the_embeddings_is_a_tied_head(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = WRITERS["qwen3_vl"](tmp_path / "model")
    disagreeing(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with caplog.at_level(logging.WARNING):
        model = opened(folder)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings
    assert not caplog.records


def test_a_student_is_built_with_the_head_of_its_language_model(tmp_path: Path) -> None:
    text = write_tiny_language_model(tmp_path / "text")
    _, head_VD = disagreeing(text)
    model = build_llava(write_tiny_tower(tmp_path / "tower"), text, seed=0)
    assert torch.equal(model.get_output_embeddings().weight[: len(head_VD)], head_VD)
    assert not model.config.tie_word_embeddings


@pytest.mark.parametrize("kind", ["qwen3_vl", "smolvlm", "llava", "language model"])
def test_an_untied_head_without_weights_is_refused(tmp_path: Path, kind: str) -> None:
    folder = WRITERS[kind](tmp_path / "model")
    file = folder / "config.json"
    config = json.loads(file.read_text()) | {"tie_word_embeddings": False}
    if "text_config" in config:  # LLaVA's class reads this one too
        config["text_config"]["tie_word_embeddings"] = False
    file.write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    tensors.pop("lm_head.weight", None)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"first 'lm_head\.weight'.*tie_word_embeddings") as caught:
        opened(folder)
    assert "\n" not in str(caught.value)
