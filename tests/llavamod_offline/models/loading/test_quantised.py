"""Quantised and pickled checkpoints, and what config.json may say about dtypes and tied weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llavamod_offline.errors import ConfigError, ModelError
from llavamod_offline.families import open_family
from tests.tiny_families import TINY_FAMILIES

_WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
_INT8: dict[str, Any] = {
    "format": "int-quantized",
    "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["re:.*language_model.*_proj$"], "weights": _WEIGHTS}},
}
METHODS: dict[str, tuple[dict[str, Any], str]] = {
    "awq": ({"bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}, "gptqmodel"),
    "gptq": ({"bits": 4, "group_size": 32}, "optimum"),
    "bitsandbytes": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "bitsandbytes"),
    "compressed-tensors": (_INT8, "compressed-tensors"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return TINY_FAMILIES["qwen3_vl"].write(tmp_path / "teacher")


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return open_family(folder, "auto", image_aspect="auto", max_length=64).load(dtype)


def edit(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("method", METHODS)
def test_a_package_that_is_missing_is_named(folder: Path, method: str) -> None:
    settings, package = METHODS[method]
    edit(folder, quantization_config={"quant_method": method, **settings})
    with pytest.raises(ConfigError, match=rf"its weights are quantised \({method}\), .*{package}") as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_fp8_weights_are_used_with_their_scales(folder: Path) -> None:
    """As Qwen publishes them: blocks of 8-bit floats, each with a scale; a CPU uses the dequantised weights."""
    block = 32
    tensors = load_file(folder / "model.safetensors")
    expected, stored = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if "language_model.layers" in name and name.endswith("_proj.weight"):
            stored[name], scale = _in_blocks(weight, block)
            stored[f"{name}_scale_inv"] = scale
            expected[name] = stored[name].float() * scale.repeat_interleave(block, 0).repeat_interleave(block, 1)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    skipped = ["lm_head", "visual", "model.visual"]
    config = {"quant_method": "fp8", "weight_block_size": [block, block], "modules_to_not_convert": skipped}
    edit(folder, quantization_config={"activation_scheme": "dynamic", **config})
    found = load(folder).state_dict()
    assert len(stored) > len(expected)
    for name, weight in expected.items():
        assert torch.equal(found[name].float(), weight), name


def _in_blocks(weight: Tensor, size: int) -> tuple[Tensor, Tensor]:
    rows, columns = (side // size for side in weight.shape)
    blocks = weight.reshape(rows, size, columns, size)
    scale = blocks.abs().amax((1, 3)) / 448.0
    return (blocks / scale[:, None, :, None]).reshape(weight.shape).to(torch.float8_e4m3fn), scale


def test_pickled_weights_are_never_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"weights are pickled \(pytorch_model\.bin\), .*\*\.safetensors") as caught:
        load(folder)
    assert "\n" not in str(caught.value)
