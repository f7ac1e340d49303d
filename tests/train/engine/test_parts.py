"""The parts of a student, whatever names its kind of language model uses."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from llavamod_offline.families.llava.building import build_llava
from llavamod_offline.families.students.parts import model_parts
from llavamod_offline.models.upcycle import upcycle
from tests.tiny_students import OTHER_TEXT_MODELS, TEXT_MODELS, write_language_model, write_tower
from train.engine.optim import choose_trainable

PARTS = ("embeddings", "attention", "mlp", "norms")


@pytest.mark.parametrize("name", [*TEXT_MODELS, *OTHER_TEXT_MODELS])
def test_the_parts_of_a_language_model_are_all_of_it(tmp_path: Path, name: str) -> None:
    """No part is empty, and no parameter is left out."""
    model = build_llava(write_tower(tmp_path / "tower", "CLIP"), write_language_model(tmp_path / "text", name), seed=0)
    text = set(choose_trainable(model, ["text"]))
    parts = {part: set(choose_trainable(model, [part])) for part in PARTS}
    head = {"lm_head.weight"} & text
    assert set().union(*parts.values()) | head == text
    assert not parts["embeddings"] & (parts["attention"] | parts["mlp"] | parts["norms"])
    assert not parts["attention"] & parts["mlp"]
    embeddings = model.get_input_embeddings().weight
    assert any(model.get_parameter(parameter) is embeddings for parameter in parts["embeddings"])
    assert all(re.search("norm|ln_", parameter) for parameter in parts["norms"])


@pytest.mark.parametrize("name", ["Qwen2", "Qwen3", "Llama", "Mistral", "OLMo2"])
def test_experts_and_routers_are_parts_of_a_sparse_student(tmp_path: Path, name: str) -> None:
    dense = build_llava(write_tower(tmp_path / "tower", "CLIP"), write_language_model(tmp_path / "text", name), seed=0)
    model = upcycle(dense, layers="dense", num_experts=4, top_k=2, seed=0)
    mlp, experts, router = (set(choose_trainable(model, [part])) for part in ("mlp", "experts", "router"))
    assert experts
    assert experts <= mlp
    assert router
    assert not router & mlp
    assert all(model_parts(model)["text"].search(parameter) for parameter in mlp | router)
    new = {parameter for parameter, _ in model.named_parameters()} - set(dense.state_dict())
    assert {parameter for parameter in new if model.get_parameter(parameter).numel()} <= experts | router
