"""Qwen3 as a student's language model: built, upcycled, routed with capacity, and read by plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, Qwen3Config, Qwen3ForCausalLM

from llavamod_offline.errors import ModelError
from llavamod_offline.families.llava.building import build_llava, build_tokenizer
from llavamod_offline.families.llava.checkpoint import load_llava
from llavamod_offline.families.llava.export import save_llava
from llavamod_offline.families.llava.forward import student_hidden_states
from llavamod_offline.models.capacity import limit_capacity
from llavamod_offline.models.checkpoint import load_tokenizer
from llavamod_offline.models.lm_head import lm_head_of
from llavamod_offline.models.routing import RouterWatch
from llavamod_offline.models.sparse_twins import is_router
from llavamod_offline.models.upcycle import activated_parameters, total_parameters, upcycle
from tests.llavamod_offline.models.batches import Batch, make_batch
from tests.tiny import tiny_text_config, write_tiny_language_model, write_tiny_llava, write_tiny_tower


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llava(tmp_path_factory.mktemp("qwen3") / "llava", layers=4, text_config=Qwen3Config)


def _logits(model: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        hidden_BTD = student_hidden_states(model, batch.input_ids_BT, batch.attention_mask_BT, batch.pixel_values_ICHW)
        return (hidden_BTD @ lm_head_of(model).weight_VD.T)[batch.attention_mask_BT.bool()]


def test_parts_make_a_student(tmp_path: Path) -> None:
    tower, plain = write_tiny_tower(tmp_path / "tower"), write_tiny_language_model(tmp_path / "qwen2", extra_rows=7)
    tokenizer = load_tokenizer(plain)
    torch.manual_seed(0)
    text = Qwen3ForCausalLM(tiny_text_config(len(tokenizer) + 7, kind=Qwen3Config))
    text.save_pretrained(tmp_path / "qwen3")
    tokenizer.save_pretrained(tmp_path / "qwen3")
    model = build_llava(tower, tmp_path / "qwen3", seed=0)
    assert model.config.text_config.model_type == "qwen3"
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits, text(input_ids=ids).logits)
    tokenizer = build_tokenizer(tmp_path / "qwen3")
    save_llava(model, tmp_path / "student", tokenizer=tokenizer, processor_source=tower)
    again = load_llava(tmp_path / "student")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_sparse_equals_dense_at_step_0_also_after_save_and_reload(folder: Path, tmp_path: Path) -> None:
    dense, batch = load_llava(folder), make_batch(folder, [0, 3, 5])
    sparse = upcycle(dense, layers="sparse", num_experts=4, top_k=2, seed=0)
    assert any(is_router(module) for module in sparse.modules())
    logits = _logits(dense, batch)
    torch.testing.assert_close(_logits(sparse, batch), logits, rtol=1e-6, atol=1e-6 * float(logits.abs().max()))
    mlp, router = 3 * 64 * 128, 4 * 64
    assert total_parameters(sparse) == total_parameters(dense) + 2 * (3 * mlp + router)
    assert activated_parameters(sparse) == total_parameters(dense) + 2 * (mlp + router)
    save_llava(sparse, tmp_path / "sparse", tokenizer=load_tokenizer(folder), processor_source=folder)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "sparse")
    assert plain.config.text_config.model_type == "qwen3_moe"
    for reloaded in (plain, load_llava(tmp_path / "sparse")):
        assert torch.equal(_logits(reloaded, batch), _logits(sparse, batch))


def test_its_routers_are_watched_and_have_capacity(folder: Path) -> None:
    batch = make_batch(folder, [0, 3, 5])
    model = upcycle(load_llava(folder), layers="sparse", num_experts=4, top_k=2, seed=0).train()
    limit_capacity(model, 0.5)
    with RouterWatch(model) as watch:
        student_hidden_states(model, batch.input_ids_BT, batch.attention_mask_BT, batch.pixel_values_ICHW)
    routing = watch.routing(batch.attention_mask_BT)
    assert routing.loads_LE.shape == (2, 4)
    assert bool((routing.drop_rates_L > 0.4).all())
    assert float(routing.balance_loss.detach()) >= 2.0


def test_what_it_has_no_place_for_is_refused(folder: Path) -> None:
    dense = load_llava(folder)
    with pytest.raises(ModelError, match=r"set student\.upcycle\.residual to false"):
        upcycle(dense, layers="sparse", num_experts=4, top_k=2, seed=0, residual=True)
    sparse = upcycle(dense, layers="sparse", num_experts=4, top_k=2, seed=0)
    with pytest.raises(ModelError, match="sparse already"):
        upcycle(sparse, layers="sparse", num_experts=4, top_k=2, seed=0)
