from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from llavamod_offline.families.llava.checkpoint import load_llava
from llavamod_offline.families.llava.forward import student_hidden_states, vision_features
from llavamod_offline.losses.fused import distillation_from_hidden
from llavamod_offline.models.lm_head import lm_head_of
from tests.llavamod_offline.losses.reference import random_teacher, truncate
from tests.llavamod_offline.models.batches import make_batch


def _moves(module: nn.Module) -> bool:
    gradient = module.weight.grad
    return isinstance(gradient, Tensor) and bool(gradient.any())


@pytest.mark.parametrize("rows", [[0], [3], [0, 3, 5], [3, 7]])
def test_hidden_states_times_head_are_the_models_logits(tiny_folder: Path, rows: list[int]) -> None:
    model, batch = load_llava(tiny_folder), make_batch(tiny_folder, rows)
    with torch.no_grad():
        hidden_BTD = student_hidden_states(model, batch.input_ids_BT, batch.attention_mask_BT, batch.pixel_values_ICHW)
        expected = model(
            input_ids=batch.input_ids_BT,
            attention_mask=batch.attention_mask_BT,
            pixel_values=batch.pixel_values_ICHW if len(batch.pixel_values_ICHW) else None,
        ).logits
    kept = batch.attention_mask_BT.bool()
    torch.testing.assert_close((hidden_BTD @ lm_head_of(model).weight_VD.T)[kept], expected[kept], rtol=1e-5, atol=1e-5)


def test_pixels_matter_and_padding_does_not(tiny_folder: Path) -> None:
    model, batch = load_llava(tiny_folder), make_batch(tiny_folder, [0, 5])
    alone = make_batch(tiny_folder, [0])
    with torch.no_grad():
        both = student_hidden_states(model, batch.input_ids_BT, batch.attention_mask_BT, batch.pixel_values_ICHW)
        pixels = batch.pixel_values_ICHW[:1]
        one = student_hidden_states(model, alone.input_ids_BT, alone.attention_mask_BT, pixels)
        other = student_hidden_states(model, alone.input_ids_BT, alone.attention_mask_BT, -pixels)
    torch.testing.assert_close(both[0, : one.shape[1]], one[0], rtol=1e-4, atol=1e-4)
    assert (one - other).abs().max() > 0.1


def test_tower_is_frozen_unless_told_otherwise(tiny_folder: Path) -> None:
    model, batch = load_llava(tiny_folder), make_batch(tiny_folder, [0])
    model.requires_grad_(True)
    tower = model.model.vision_tower.embeddings.patch_embedding
    projector = model.model.multi_modal_projector.linear_1
    inputs = (batch.input_ids_BT, batch.attention_mask_BT, batch.pixel_values_ICHW)
    student_hidden_states(model, *inputs).sum().backward()
    assert not _moves(tower)
    assert _moves(projector)
    student_hidden_states(model, *inputs, train_vision=True).sum().backward()
    assert _moves(tower)


def test_text_alone_leaves_the_projector_a_gradient_of_zero(tiny_folder: Path) -> None:
    model, batch = load_llava(tiny_folder), make_batch(tiny_folder, [3])
    model.requires_grad_(False)
    model.model.multi_modal_projector.requires_grad_(True)
    hidden_BTD = student_hidden_states(model, batch.input_ids_BT, batch.attention_mask_BT)
    hidden_ND = hidden_BTD[0, 20:25]
    targets = truncate(random_teacher(5, 400, 0), top_k=3)
    distillation_from_hidden(hidden_ND, lm_head_of(model).weight_VD, targets).loss_sum.backward()
    for parameter in model.model.multi_modal_projector.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_text_alone_leaves_a_trained_tower_the_gradients_that_images_give_it(tiny_folder: Path) -> None:
    """Of zero, but for the same parameters: several processes exchange them."""
    model = load_llava(tiny_folder)
    model.requires_grad_(False)
    model.model.vision_tower.requires_grad_(True)
    with_gradient = []
    for samples in ([3], [5]):
        batch = make_batch(tiny_folder, samples)
        inputs = (batch.input_ids_BT, batch.attention_mask_BT, batch.pixel_values_ICHW)
        model.zero_grad()
        student_hidden_states(model, *inputs, train_vision=True).sum().backward()
        with_gradient.append({name for name, value in model.named_parameters() if value.grad is not None})
    assert with_gradient[0] == with_gradient[1] != set()


def test_vision_features_are_the_configured_layers_patches(tiny_folder: Path) -> None:
    model, batch = load_llava(tiny_folder), make_batch(tiny_folder, [5])
    with torch.no_grad():
        hidden = model.model.vision_tower(batch.pixel_values_ICHW, output_hidden_states=True).hidden_states
    features = vision_features(model, batch.pixel_values_ICHW)
    assert features.shape == (2, 9, 32)
    assert torch.equal(features, hidden[-2][:, 1:])
    model.config.vision_feature_layer = [-2, -3]
    assert torch.equal(vision_features(model, batch.pixel_values_ICHW), torch.cat([hidden[-2], hidden[-3]], -1)[:, 1:])


def test_images_that_do_not_fit_their_tokens(tiny_folder: Path) -> None:
    model, batch = load_llava(tiny_folder), make_batch(tiny_folder, [5])
    with pytest.raises(ValueError, match="do not match"):
        student_hidden_states(model, batch.input_ids_BT, batch.attention_mask_BT, batch.pixel_values_ICHW[:1])


def test_head_rows_beyond_the_tokenizer_get_no_probability(tiny_folder: Path) -> None:
    model, batch = load_llava(tiny_folder), make_batch(tiny_folder, [0])
    weight_VD = lm_head_of(model).weight_VD.detach().clone()
    assert weight_VD.shape[0] == 432
    hidden_ND = student_hidden_states(
        model, batch.input_ids_BT, batch.attention_mask_BT, batch.pixel_values_ICHW
    ).detach()[0, -6:]
    weight_VD[400:] = 50 * hidden_ND.mean(0)
    weight_VD.requires_grad_()
    # The teacher is the student over the tokenizer's 400 ids: the divergence is 0, whatever the other rows hold.
    log_probs_NV = (hidden_ND @ weight_VD[:400].T).detach().double().log_softmax(-1)
    terms = distillation_from_hidden(hidden_ND, weight_VD, truncate(log_probs_NV, top_k=12), lm_weight=1.0)
    terms.loss_sum.backward()
    assert terms.divergence_sum.item() == pytest.approx(0.0, abs=1e-4)
    assert weight_VD.grad is not None
    assert weight_VD.grad[:400].abs().max() > 0
    assert not weight_VD.grad[400:].any()


def test_an_image_at_several_places_runs_through_the_tower_once(tiny_folder: Path) -> None:
    """Hidden states and gradients are those of as many copies of the image; samples 0, 5 (two images) and 3 (none)."""
    model, batch = load_llava(tiny_folder), make_batch(tiny_folder, [0, 5, 3, 5, 0])
    distinct, rows = batch.pixel_values_ICHW[[0, 1, 2]], torch.tensor([0, 1, 2, 1, 2, 0])
    seen: list[int] = []
    model.model.vision_tower.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    found, gradients = [], []
    for pixels, places in ((distinct[rows], None), (distinct, rows)):
        model.zero_grad()
        inputs = (batch.input_ids_BT, batch.attention_mask_BT, pixels)
        hidden_BTD = student_hidden_states(model, *inputs, image_rows_Q=places, train_vision=True)
        hidden_BTD[batch.attention_mask_BT.bool()].square().sum().backward()
        found.append(hidden_BTD.detach())
        weight = model.model.vision_tower.embeddings.patch_embedding.weight
        gradients.append(weight.grad.clone())
    assert seen == [6, 3]
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-3, atol=1e-3 * float(gradients[0].abs().max()))


def test_features_at_hand_stand_for_the_images(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tower does not run then, and the result is bitwise identical."""
    model, batch = load_llava(tiny_folder).eval(), make_batch(tiny_folder, [0, 3, 5])
    assert batch.pixel_values_ICHW is not None
    inputs = (model, batch.input_ids_BT, batch.attention_mask_BT)
    whole_BTD = student_hidden_states(*inputs, batch.pixel_values_ICHW)
    features_IPC = vision_features(model, batch.pixel_values_ICHW)
    monkeypatch.setattr(model.model.vision_tower, "forward", None)
    assert torch.equal(student_hidden_states(*inputs, features_IPC=features_IPC), whole_BTD)
