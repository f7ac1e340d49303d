"""The configuration overrides passed to vLLM; that its numbers then equal transformers' is shown by tests with vLLM."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llavamod_offline.vllm.overrides import config_overrides
from tests.tiny import write_tiny_llava
from tests.tiny_families import TINY_FAMILIES
from tests.tiny_teachers import write_tiny_qwen_vl

WRITERS: dict[str, Callable[[Path], Path]] = {
    **{name: TINY_FAMILIES[name].write for name in ("qwen3_vl", "qwen3_vl_moe", "glm4v", "smolvlm")},
    "qwen2_vl": write_tiny_qwen_vl,
}


def rope_of(folder: Path, rope: dict[str, Any]) -> dict[str, Any]:
    """The override for a checkpoint whose config.json has these `rope_parameters`."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["text_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, **rope}
    file.write_text(json.dumps(config))
    found: dict[str, Any] = config_overrides(folder)["text_config"]["rope_parameters"]
    return found


@pytest.mark.parametrize(("kind", "interleaved"), [("qwen3_vl", True), ("qwen3_vl_moe", True), ("qwen2_vl", False)])
@pytest.mark.parametrize("said", [{}, {"mrope_interleaved": False}, {"mrope_interleaved": True}])
def test_the_class_decides_whether_positions_are_interleaved(
    tmp_path: Path, kind: str, interleaved: bool, said: dict[str, Any]
) -> None:
    found = rope_of(WRITERS[kind](tmp_path / "model"), {"mrope_section": [4, 6, 6], **said})
    assert found["mrope_interleaved"] is interleaved
    assert found["mrope_section"] == [4, 6, 6]
    assert found["rope_theta"] == 1e4


def test_missing_sections_are_those_of_the_class(tmp_path: Path) -> None:
    found = {kind: rope_of(write(tmp_path / kind), {}) for kind, write in WRITERS.items() if kind != "smolvlm"}
    assert {kind: rope["mrope_section"] for kind, rope in found.items()} == {
        "qwen3_vl": [24, 20, 20],
        "qwen3_vl_moe": [24, 20, 20],
        "glm4v": [8, 12, 12],
        "qwen2_vl": [16, 24, 24],
    }
    assert found["glm4v"]["partial_rotary_factor"] == 1.0
    assert rope_of(tmp_path / "glm4v", {"partial_rotary_factor": 0.5})["partial_rotary_factor"] == 0.5


def test_what_the_class_fixes_need_not_be_in_the_configuration(tmp_path: Path) -> None:
    found = {kind: config_overrides(write(tmp_path / kind)) for kind, write in WRITERS.items()}
    assert found["qwen3_vl_moe"]["text_config"]["norm_topk_prob"] is True
    assert found["glm4v"]["text_config"]["attention_bias"] is True
    assert found["smolvlm"] == {}
    assert config_overrides(write_tiny_llava(tmp_path / "llava")) == {}
