from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionModel, Qwen2ForCausalLM

from llavamod_offline.errors import ModelError
from llavamod_offline.families.llava.building import build_llava, build_tokenizer
from llavamod_offline.families.llava.checkpoint import image_tokens, load_llava
from llavamod_offline.families.llava.export import save_llava
from llavamod_offline.models.checkpoint import load_tokenizer
from tests.tiny import tiny_vision_config, write_tiny_language_model, write_tiny_tower


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("parts")
    return write_tiny_tower(folder / "tower"), write_tiny_language_model(folder / "text", extra_rows=7)


def test_parts_keep_their_weights_and_the_projector_follows_the_seed(parts: tuple[Path, Path]) -> None:
    model = build_llava(*parts, seed=1)
    tower, text = CLIPVisionModel.from_pretrained(parts[0]), Qwen2ForCausalLM.from_pretrained(parts[1])
    for name, tensor in tower.state_dict().items():
        assert torch.equal(model.model.vision_tower.state_dict()[name], tensor), name
    for name, tensor in text.model.state_dict().items():
        assert torch.equal(model.model.language_model.state_dict()[name], tensor), name
    again, other = build_llava(*parts, seed=1), build_llava(*parts, seed=2)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
        assert torch.equal(tensor, other.state_dict()[name]) == ("projector" not in name), name
    assert model.model.multi_modal_projector.linear_1.weight.abs().max() <= 32**-0.5
    assert model.model.multi_modal_projector.linear_1.weight.std() > 0.05
    assert image_tokens(model.config) == 9
    assert model.config.vision_feature_layer == -2


def test_text_alone_gives_the_language_models_logits(parts: tuple[Path, Path]) -> None:
    model, text = build_llava(*parts, seed=0), Qwen2ForCausalLM.from_pretrained(parts[1])
    input_ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model(input_ids=input_ids).logits, text(input_ids=input_ids).logits)


def test_image_token_takes_a_free_row(parts: tuple[Path, Path]) -> None:
    plain, tokenizer = load_tokenizer(parts[1]), build_tokenizer(parts[1])
    assert "<image>" not in plain.get_vocab()
    assert tokenizer.convert_tokens_to_ids("<image>") == len(plain) == len(tokenizer) - 1
    assert tokenizer.encode("a<image>b")[1:-1] == [len(plain)]
    model = build_llava(*parts, seed=0)
    assert model.config.image_token_index == len(plain)
    assert model.lm_head.weight.shape[0] == len(plain) + 7


@pytest.mark.parametrize("tied", [True, False])
def test_head_grows_where_no_row_is_free(parts: tuple[Path, Path], tmp_path: Path, tied: bool) -> None:
    text = write_tiny_language_model(tmp_path / "text", tied=tied)
    old, tokenizer = Qwen2ForCausalLM.from_pretrained(text), build_tokenizer(text)
    model = build_llava(parts[0], text, seed=0)
    assert model.lm_head.weight.shape[0] == len(tokenizer) == old.lm_head.weight.shape[0] + 1
    assert torch.equal(model.lm_head.weight[-1], old.lm_head.weight.mean(0))
    embeddings = model.model.language_model.embed_tokens.weight
    assert (embeddings is model.lm_head.weight) == tied
    assert torch.equal(embeddings[:-1], old.model.embed_tokens.weight)
    assert torch.equal(embeddings[-1], old.model.embed_tokens.weight.mean(0))
    save_llava(model, tmp_path / "student", tokenizer=tokenizer, processor_source=parts[0])
    loaded = load_llava(tmp_path / "student")
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert load_tokenizer(tmp_path / "student").get_vocab() == tokenizer.get_vocab()


def test_tower_out_of_a_clip_or_a_llava_folder(parts: tuple[Path, Path], tmp_path: Path) -> None:
    direct = build_llava(*parts, seed=0)
    save_llava(direct, tmp_path / "llava", tokenizer=build_tokenizer(parts[1]), processor_source=parts[0])
    clip_config = CLIPConfig(
        text_config=CLIPTextConfig(
            vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
        ).to_dict(),
        vision_config=tiny_vision_config().to_dict(),
        projection_dim=8,
    )
    clip = CLIPModel(clip_config)
    clip.vision_model.load_state_dict(direct.model.vision_tower.state_dict())
    clip.save_pretrained(tmp_path / "clip")
    for source in ("llava", "clip"):
        model = build_llava(tmp_path / source, parts[1], seed=0)
        for name, tensor in direct.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), (source, name)


class TestErrors:
    def test_swapped_folders(self, parts: tuple[Path, Path]) -> None:
        with pytest.raises(ModelError, match="model_type is 'qwen2', expected clip, siglip, clip_vision_model"):
            build_llava(parts[1], parts[0], seed=0)
        with pytest.raises(ModelError, match="model_type is 'clip_vision_model', which is no causal language model"):
            build_llava(parts[0], parts[0], seed=0)

    def test_a_tower_of_variable_resolution(self, parts: tuple[Path, Path], tmp_path: Path) -> None:
        for kind in ("siglip2", "siglip2_vision_model"):
            (tmp_path / kind).mkdir()
            (tmp_path / kind / "config.json").write_text(f'{{"model_type": "{kind}"}}')
            with pytest.raises(ModelError, match=r"NaFlex.* use one of a fixed resolution"):
                build_llava(tmp_path / kind, parts[1], seed=0)

    def test_missing_folder(self, parts: tuple[Path, Path], tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="no such checkpoint folder"):
            build_llava(tmp_path / "nowhere", parts[1], seed=0)

    def test_no_tokenizer(self, parts: tuple[Path, Path], tmp_path: Path) -> None:
        text = Path(shutil.copytree(parts[1], tmp_path / "text"))
        (text / "tokenizer.json").unlink()
        with pytest.raises(ModelError, match=r"no tokenizer\.json"):
            build_llava(parts[0], text, seed=0)

    def test_a_layer_the_tower_does_not_have(self, parts: tuple[Path, Path]) -> None:
        with pytest.raises(ModelError, match="vision_feature_layer is -5: expected -4 to 3"):
            build_llava(*parts, seed=0, vision_feature_layer=-5)
