from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from llavamod_offline.errors import ModelError
from llavamod_offline.families.llava.checkpoint import load_llava
from llavamod_offline.families.llava.export import save_llava
from llavamod_offline.models.checkpoint import load_tokenizer
from llavamod_offline.models.upcycle import (
    LayerChoice,
    activated_parameters,
    sparse_layers,
    total_parameters,
    upcycle,
)
from tests.llavamod_offline.models.batches import Batch, make_batch

CHOICES: dict[str, tuple[LayerChoice, list[int]]] = {
    "sparse": ("sparse", [0, 2]),
    "first_half": ("first_half", [0, 1]),
    "second_half": ("second_half", [2, 3]),
    "dense": ("dense", [0, 1, 2, 3]),
    "indices": ([3, 1], [1, 3]),
}


def _logits(model: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(
            input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, pixel_values=batch.pixel_values_ICHW
        ).logits[batch.attention_mask_BT.bool()]
    return logits


# Plain transformers warns about the size-0 shared expert of a student without a residual expert.
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("choice", CHOICES)
def test_sparse_equals_dense_at_step_0_also_after_save_and_reload(
    tiny_folder: Path, tmp_path: Path, choice: str, residual: bool
) -> None:
    layers, expected = CHOICES[choice]
    dense, batch = load_llava(tiny_folder), make_batch(tiny_folder, [0, 3, 5])
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    sparse = upcycle(dense, layers=layers, num_experts=4, top_k=2, seed=0, residual=residual)
    blocks = [hasattr(layer.mlp, "experts") for layer in sparse.model.language_model.layers]
    assert [index for index, is_sparse in enumerate(blocks) if is_sparse] == expected
    logits = _logits(dense, batch)
    # The weights of the chosen experts sum to 1 up to the last bit of float32.
    torch.testing.assert_close(_logits(sparse, batch), logits, rtol=1e-6, atol=1e-6 * float(logits.abs().max()))
    save_llava(sparse, tmp_path / "sparse", tokenizer=load_tokenizer(tiny_folder), processor_source=tiny_folder)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "sparse")
    assert plain.config.text_config.model_type == "qwen2_moe"
    for reloaded in (plain, load_llava(tmp_path / "sparse")):
        assert torch.equal(_logits(reloaded, batch), _logits(sparse, batch))
        for name, tensor in sparse.state_dict().items():
            assert torch.equal(reloaded.state_dict()[name], tensor), name
    # The dense model is unchanged, and training the sparse one does not affect it.
    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.add_(1.0)
    for name, tensor in dense.state_dict().items():
        assert torch.equal(before[name], tensor), name


def test_experts_matter_once_they_differ(tiny_folder: Path) -> None:
    dense, batch = load_llava(tiny_folder), make_batch(tiny_folder, [0])
    sparse = upcycle(dense, layers="sparse", num_experts=4, top_k=2, seed=0)
    with torch.no_grad():
        sparse.model.language_model.layers[0].mlp.experts.down_proj[1] += 1.0
    assert (_logits(sparse, batch) - _logits(dense, batch)).abs().max() > 0.1


def test_routers_follow_the_seed_alone(tiny_folder: Path) -> None:
    dense = load_llava(tiny_folder)
    torch.manual_seed(0)
    first = upcycle(dense, layers="dense", num_experts=4, top_k=2, seed=5)
    torch.manual_seed(1)
    again = upcycle(dense, layers="dense", num_experts=4, top_k=2, seed=5)
    other = upcycle(dense, layers="dense", num_experts=4, top_k=2, seed=6)
    routers = [name for name in first.state_dict() if name.endswith("mlp.gate.weight")]
    assert len(routers) == 4
    for name in routers:
        weight_ED = first.state_dict()[name]
        assert torch.equal(weight_ED, again.state_dict()[name])
        assert not torch.equal(weight_ED, other.state_dict()[name])
        # kaiming-uniform with a = √5 over 64 inputs: uniform within ±1/8, standard deviation 1/8/√3.
        assert weight_ED.abs().max() <= 1 / 8
        assert weight_ED.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.15)


def test_dtype_and_mode_are_kept(tiny_folder: Path) -> None:
    dense = load_llava(tiny_folder, torch.bfloat16).train()
    sparse = upcycle(dense, layers="sparse", num_experts=4, top_k=2, seed=0)
    assert {parameter.dtype for parameter in sparse.parameters()} == {torch.bfloat16}
    assert sparse.training


def test_parameters_are_counted(tiny_folder: Path) -> None:
    dense = load_llava(tiny_folder)
    assert activated_parameters(dense) == total_parameters(dense) == dense.num_parameters()
    mlp, router, gate = 3 * 64 * 128, 4 * 64, 64
    sparse = upcycle(dense, layers="sparse", num_experts=4, top_k=2, seed=0)
    assert total_parameters(sparse) == total_parameters(dense) + 2 * (3 * mlp + router + gate)
    assert activated_parameters(sparse) == total_parameters(dense) + 2 * (mlp + router + gate)
    residual = upcycle(dense, layers=[1], num_experts=8, top_k=1, seed=0, residual=True)
    assert total_parameters(residual) == total_parameters(dense) + 8 * mlp + 2 * router + gate
    assert activated_parameters(residual) == total_parameters(dense) + mlp + 2 * router + gate


def test_layers_of_a_real_student() -> None:
    assert sparse_layers("sparse", 24) == list(range(0, 24, 2))
    assert sparse_layers("first_half", 7) == [0, 1, 2]
    assert sparse_layers("second_half", 7) == [3, 4, 5, 6]
    assert sparse_layers([5, 2, 5], 7) == [2, 5]


class TestErrors:
    def test_unknown_layers(self) -> None:
        with pytest.raises(ModelError, match="'spare' is unknown: choose one of sparse, first_half"):
            sparse_layers("spare", 4)
        with pytest.raises(ModelError, match="layer 4 does not exist: the text model has layers 0 to 3"):
            sparse_layers([1, 4], 4)
        with pytest.raises(ModelError, match="selects none of the text model's"):
            sparse_layers([], 4)
        with pytest.raises(ModelError, match="selects none of the text model's"):
            sparse_layers("first_half", 1)

    def test_experts_and_choices(self, tiny_folder: Path) -> None:
        with pytest.raises(ModelError, match="top_k is 3 with 2 experts"):
            upcycle(load_llava(tiny_folder), layers="sparse", num_experts=2, top_k=3, seed=0)

    def test_sparse_already(self, tiny_folder: Path) -> None:
        sparse = upcycle(load_llava(tiny_folder), layers="sparse", num_experts=2, top_k=1, seed=0)
        with pytest.raises(ModelError, match=r"sparse already: set student\.upcycle to null"):
            upcycle(sparse, layers="sparse", num_experts=2, top_k=1, seed=0)
