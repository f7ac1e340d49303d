"""A student as it is when training starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llavamod_offline.families.llava.forward import student_hidden_states
from tests.llavamod_offline.models.batches import make_batch
from tests.tiny import write_tiny_llava
from train.config.train import StudentConfig, UpcycleConfig
from train.student.make import make_student


@pytest.mark.parametrize("top_k", [1, 2])
def test_routers_learn_from_the_loss_whatever_their_number_of_choices(tmp_path: Path, top_k: int) -> None:
    """Differing experts matter to the loss; the capacity leaves room for a choice."""
    folder = write_tiny_llava(tmp_path / "student", layers=2)
    upcycle = UpcycleConfig(layers="dense", top_k=top_k)
    config = StudentConfig(checkpoint=str(folder), kind="sparse", upcycle=upcycle, capacity_factor=1.5)
    for factor in (None, config.capacity_factor):
        model = make_student(replace(config, capacity_factor=factor), seed=0)
        batch, layers = make_batch(folder, [0, 3]), model.model.language_model.layers
        with torch.no_grad():
            for layer in layers:
                layer.mlp.experts.down_proj.mul_(torch.arange(1.0, 5.0)[:, None, None])
        hidden_BTD = student_hidden_states(model, batch.input_ids_BT, batch.attention_mask_BT, batch.pixel_values_ICHW)
        hidden_BTD[..., 0].sum().backward()
        assert all(layer.mlp.gate.weight.grad.norm() > 1e-2 for layer in layers)
