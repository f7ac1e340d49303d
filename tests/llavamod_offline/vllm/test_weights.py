"""A checkpoint that lacks a tensor is detected from its headers, whatever the family."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llavamod_offline.errors import ModelError
from llavamod_offline.vllm.weights import check_weights
from tests.tiny import write_tiny_llava
from tests.tiny_families import TINY_FAMILIES
from tests.tiny_teachers import write_tiny_causal_lm, write_tiny_onevision, write_tiny_qwen_vl

WRITERS: dict[str, Callable[[Path], Path]] = {
    "llava": write_tiny_llava,
    "llava_onevision": write_tiny_onevision,
    "qwen2_5_vl": write_tiny_qwen_vl,
    "qwen2": write_tiny_causal_lm,
}


@pytest.mark.parametrize("family", WRITERS)
def test_every_tensor_counts(tmp_path: Path, family: str) -> None:
    folder = WRITERS[family](tmp_path / "model")
    check_weights(folder)
    tensors = load_file(folder / "model.safetensors")
    for suffix in ("layers.1.self_attn.k_proj.weight", "layers.1.mlp.up_proj.weight"):
        missing = next(name for name in tensors if name.endswith(suffix))
        torn = shutil.copytree(folder, tmp_path / suffix)
        left = {name: tensor for name, tensor in tensors.items() if name != missing}
        save_file(left, torn / "model.safetensors", {"format": "pt"})
        with pytest.raises(ModelError, match=r"1 missing tensor, first '.*layers\.1\."):
            check_weights(torn)


def test_a_tensor_of_another_shape_is_found(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"model: tensors: 1 mismatched tensor, first .*1\.mlp\.up_proj\.weight"):
        check_weights(folder)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    folder = write_tiny_causal_lm(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"\x01\x02")
    with pytest.raises(ModelError, match=r"model\.safetensors: cannot be read: .*: copy it again"):
        check_weights(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors file"):
        check_weights(folder)


def test_the_layers_of_quantised_weights_are_compared(tmp_path: Path) -> None:
    """As AWQ and GPTQ store them: three tensors per weight, with shapes that differ from its own."""
    folder = TINY_FAMILIES["smolvlm"].write(tmp_path / "teacher")
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        if "text_model.layers" in name and name.endswith("_proj.weight"):
            stored |= {f"{layer}.{part}": torch.zeros(2, 3) for part in ("qweight", "qzeros", "scales")}
        else:
            stored[name] = tensor
    config = json.loads((folder / "config.json").read_text())
    quantised = config | {"quantization_config": {"quant_method": "awq", "bits": 4}}
    (folder / "config.json").write_text(json.dumps(quantised))
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    check_weights(folder)
    fewer = {name: tensor for name, tensor in stored.items() if "layers.1.mlp.up_proj" not in name}
    save_file(fewer, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"1 missing tensor, first '.*layers\.1\.mlp\.up_proj\.weight'"):
        check_weights(folder)


def test_weights_in_another_form_beside_them_are_left_alone(tmp_path: Path) -> None:
    """Such as those in Mistral's folders."""
    folder = write_tiny_causal_lm(tmp_path / "model", "mistral")
    save_file({"tok_embeddings.weight": torch.zeros(4, 4)}, folder / "consolidated.safetensors")
    check_weights(folder)
    parts = {"model-1.safetensors": {}, "model-2.safetensors": {}}  # type: dict[str, dict[str, torch.Tensor]]
    for number, (name, tensor) in enumerate(load_file(folder / "model.safetensors").items()):
        parts[f"model-{1 + number % 2}.safetensors"][name] = tensor
    for file, tensors in parts.items():
        save_file(tensors, folder / file, {"format": "pt"})
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, tensors in parts.items() for name in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    check_weights(folder)
