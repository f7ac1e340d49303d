"""The parts of every family's model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from llavamod_offline.families.students.parts import model_parts
from tests.tiny_families import TINY_FAMILIES
from tests.tiny_teachers import write_tiny_onevision, write_tiny_qwen_vl

WRITERS = {
    "qwen2_5_vl": write_tiny_qwen_vl,
    "llava_onevision": write_tiny_onevision,
    **{name: tiny.write for name, tiny in TINY_FAMILIES.items()},
}
FAST = ("qwen3_vl", "gemma3", "smolvlm", "janus")
# In models that also generate images.
UNUSED = {"janus": ("generation_", "vqmodel")}


@pytest.mark.parametrize(
    "name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in WRITERS]
)
def test_tower_projector_and_text_are_all_of_a_model(tmp_path: Path, name: str) -> None:
    """No parameter belongs to two of them, and only parameters that answers do not use belong to none."""
    model = AutoModelForImageTextToText.from_pretrained(WRITERS[name](tmp_path / "model"), dtype=torch.float32)
    patterns = model_parts(model)
    names = [parameter for parameter, _ in model.named_parameters()]
    whole = {part: {one for one in names if patterns[part].search(one)} for part in patterns}
    assert all(whole[part] for part in ("vision", "projector", "text", "embeddings", "attention", "mlp", "norms"))
    tops = [whole[part] for part in ("vision", "projector", "text")]
    assert sum(map(len, tops)) == len(set().union(*tops))
    rest = set(names) - set().union(*tops)
    assert all(any(word in one for word in UNUSED.get(name, ())) for one in rest)
    assert bool(rest) == (name in UNUSED)
    assert whole["text"] >= set().union(
        *(whole[part] for part in ("embeddings", "attention", "mlp", "norms", "lm_head"))
    )
    wrapped = {one for one in names if patterns["projector"].search(f"student.{one}")}
    assert wrapped == whole["projector"]
    assert not patterns["projector"].search("projection.weight")
