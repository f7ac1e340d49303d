"""Projectors of students built from parts: types, files, the tower's layers and tokens."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText

from llavamod_offline.errors import ModelError
from llavamod_offline.families.llava.building import build_llava, build_tokenizer
from llavamod_offline.families.llava.building.projector import check_projector_type, fixed_parameters, read_projector
from llavamod_offline.families.llava.checkpoint import image_tokens, load_llava
from llavamod_offline.families.llava.export import save_llava
from llavamod_offline.families.llava.forward import vision_features
from tests.tiny import write_tiny_language_model, write_tiny_tower

C, D = 32, 64


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("parts")
    return write_tiny_tower(folder / "tower"), write_tiny_language_model(folder / "text")


def original(kind: str, inputs: int = C, hidden: int = D) -> nn.Module:
    """A projector as LLaVA builds it (llava/model/multimodal_projector/builder.py)."""
    if kind == "linear":
        return nn.Linear(inputs, hidden)
    modules: list[nn.Module] = [nn.Linear(inputs, hidden)]
    for _ in range(1, int(kind[3])):
        modules += [nn.GELU(), nn.Linear(hidden, hidden)]
    return nn.Sequential(*modules)


def named(projector: nn.Module, prefix: str = "model.mm_projector.") -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor.clone() for name, tensor in projector.state_dict().items()}


def written(folder: Path, tensors: Any, name: str = "mm_projector.bin") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / name)
    return folder / name


def reloaded(model: Any, parts: tuple[Path, Path], folder: Path) -> Any:
    """Export a student and load it in plain transformers."""
    save_llava(model, folder, tokenizer=build_tokenizer(parts[1]), processor_source=parts[0])
    return AutoModelForImageTextToText.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["linear", "mlp1x_gelu", "mlp2x_gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_mm_projector_computes_what_it_did_in_the_original(
    parts: tuple[Path, Path], tmp_path: Path, kind: str, dtype: torch.dtype
) -> None:
    """Also after an export, when loaded in plain transformers."""
    projector = original(kind).to(dtype)
    file = written(tmp_path, named(projector))
    for given in (file, file.parent):  # LLaVA's scripts are given the file; its trainer writes it to a folder
        model = build_llava(*parts, seed=0, projector=given)
        features = torch.randn(2, 9, C)
        with torch.no_grad():
            expected = projector.float()(features)
            torch.testing.assert_close(model.model.multi_modal_projector(features), expected, rtol=1e-6, atol=1e-6)
    plain = reloaded(model, parts, tmp_path / "student")
    with torch.no_grad():
        torch.testing.assert_close(plain.model.multi_modal_projector(features), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "prefix",
    [
        "model.mm_projector.",
        "mm_projector.",
        "base_model.model.model.mm_projector.",
        "model.mm_projector.image_spatial_proj.",  # in LLaVA-MoD, as in MoE-LLaVA
    ],
)
def test_names_of_other_code_are_understood(tmp_path: Path, prefix: str) -> None:
    projector = original("mlp2x_gelu")
    _, tensors = read_projector(written(tmp_path, named(projector, prefix)), kind=None, inputs=C, hidden=D)
    assert torch.equal(tensors["model.multi_modal_projector.linear_2.weight"], projector.state_dict()["2.weight"])
    linear = original("linear")
    kind, tensors = read_projector(written(tmp_path, named(linear, prefix)), kind=None, inputs=C, hidden=D)
    assert kind == "linear"
    assert torch.equal(tensors["model.multi_modal_projector.linear_1.weight"], linear.state_dict()["weight"])


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
def test_the_projector_of_another_student_is_read_from_its_safetensors(
    parts: tuple[Path, Path], tmp_path: Path, kind: str
) -> None:
    first = build_llava(*parts, seed=3, projector_type=kind)
    reloaded(first, parts, tmp_path / "first")
    second = build_llava(*parts, seed=0, projector=tmp_path / "first" / "model.safetensors")
    assert second.config.projector_hidden_act == first.config.projector_hidden_act
    for name, tensor in first.model.multi_modal_projector.state_dict().items():
        assert torch.equal(second.model.multi_modal_projector.state_dict()[name], tensor), name


def test_a_new_linear_projector_is_one_matrix_and_stays_one(parts: tuple[Path, Path], tmp_path: Path) -> None:
    model = build_llava(*parts, seed=1, projector_type="linear")
    projector = model.model.multi_modal_projector
    features = torch.randn(3, C)
    expected = features @ projector.linear_1.weight.T + projector.linear_1.bias
    torch.testing.assert_close(projector(features), expected)
    second_layer = {f"model.multi_modal_projector.linear_2.{name}" for name in ("weight", "bias")}
    assert fixed_parameters(model) == second_layer
    assert fixed_parameters(reloaded(model, parts, tmp_path / "student")) == second_layer
    assert fixed_parameters(build_llava(*parts, seed=1)) == set()
    two = build_llava(*parts, seed=1)
    assert torch.equal(two.model.multi_modal_projector.linear_1.weight, projector.linear_1.weight)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("mlp3x_gelu", "has a projector of two layers, so a student with another one could not be loaded: use linear"),
        ("mlp10x_gelu", "has a projector of two layers"),
        ("resampler", "projector_type 'resampler' is unknown: use linear or mlp2x_gelu"),
        ("gelu", "is unknown"),
    ],
)
def test_types_that_could_not_be_exported_are_refused(name: str, problem: str) -> None:
    with pytest.raises(ModelError, match=problem):
        check_projector_type(name)


class TestFiles:
    def refused(self, file: Path, kind: str | None = None) -> str:
        with pytest.raises(ModelError) as caught:
            read_projector(file, kind=kind, inputs=C, hidden=D)
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_code_is_never_run(self, tmp_path: Path) -> None:
        class Harmful:
            def __reduce__(self) -> Any:
                return os.mkdir, (str(tmp_path / "harm"),)

        file = written(tmp_path, named(original("linear")) | {"model.mm_projector.extra": Harmful()})
        assert "cannot be read as tensors alone" in self.refused(file)
        assert not (tmp_path / "harm").exists()

    def test_what_is_no_projector(self, tmp_path: Path) -> None:
        whole = named(original("mlp2x_gelu"))
        assert "no such file" in self.refused(tmp_path / "nowhere.bin")
        assert "cannot be read" in self.refused(_text(tmp_path / "a.bin"))
        assert "cannot be read as safetensors" in self.refused(_text(tmp_path / "a.safetensors"))
        assert "expected named tensors" in self.refused(written(tmp_path, [1, 2]))
        assert "holds no projector" in self.refused(written(tmp_path, {}))
        embeddings = whole | {"model.embed_tokens.weight": torch.zeros(2, D)}
        assert "holds 'model.embed_tokens.weight', which belongs to" in self.refused(written(tmp_path, embeddings))
        video = whole | {"model.mm_projector.video_patch_proj.0.weight": torch.zeros(2, D)}
        assert "holds 'model.mm_projector.video_patch_proj.0.weight'" in self.refused(written(tmp_path, video))
        save_file({"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "b.safetensors")
        assert "holds no projector" in self.refused(tmp_path / "b.safetensors")

    def test_other_sizes_and_types(self, tmp_path: Path) -> None:
        message = self.refused(written(tmp_path, named(original("mlp2x_gelu", inputs=C + 1))))
        assert f"has shape [{D}, {C + 1}], but tower and language model need [{D}, {C}]" in message
        assert "has a projector of two layers" in self.refused_type(tmp_path, "mlp3x_gelu")
        file = written(tmp_path, named(original("linear")))
        assert "holds a projector of type linear, not mlp2x_gelu" in self.refused(file, "mlp2x_gelu")
        for missing in ("0.weight", "0.bias", "2.bias", "2.weight"):
            tensors = named(original("mlp2x_gelu"))
            del tensors[f"model.mm_projector.{missing}"]
            self.refused(written(tmp_path, tensors))

    def refused_type(self, folder: Path, kind: str) -> str:
        with pytest.raises(ModelError) as caught:
            read_projector(written(folder, named(original(kind))), kind=None, inputs=C, hidden=D)
        return str(caught.value)


def _text(file: Path) -> Path:
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    return file


@pytest.mark.parametrize("strategy", ["default", "full", None])
@pytest.mark.parametrize("layer", [-1, -2, 0, 3, [-1, -3], [1, 2, 3]])
def test_layers_and_tokens_are_those_of_plain_transformers(
    parts: tuple[Path, Path], tmp_path: Path, layer: Any, strategy: Any
) -> None:
    model = build_llava(*parts, seed=0, vision_feature_layer=layer, vision_feature_select_strategy=strategy)
    pixels = torch.randn(2, 3, 24, 24)
    ours = model.model.multi_modal_projector(vision_features(model, pixels))
    assert ours.shape[1] == image_tokens(model.config) == (10 if strategy == "full" else 9)
    plain = reloaded(model, parts, tmp_path / "student")
    with torch.no_grad():
        settings = {name: getattr(plain.config, f"vision_feature_{name}") for name in ("layer", "select_strategy")}
        given = {f"vision_feature_{name}": value for name, value in settings.items()}
        theirs = torch.stack(list(plain.model.get_image_features(pixels, **given).pooler_output))
    torch.testing.assert_close(ours.detach(), theirs, rtol=1e-5, atol=1e-6)
    assert image_tokens(load_llava(tmp_path / "student").config) == ours.shape[1]


@pytest.mark.parametrize("layer", [-5, 4, [], [-1, 7]])
def test_layers_that_the_tower_lacks_are_refused(parts: tuple[Path, Path], layer: Any) -> None:
    with pytest.raises(ModelError, match=r"vision_feature_layer is (-5|4|\[\]|7): expected -4 to 3"):
        build_llava(*parts, seed=0, vision_feature_layer=layer)
