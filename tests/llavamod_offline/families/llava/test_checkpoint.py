from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from llavamod_offline.data.encode.template import get_template
from llavamod_offline.data.sample import Turn
from llavamod_offline.errors import ModelError
from llavamod_offline.families.llava.checkpoint import image_tokens, load_config, load_llava, sequence_encoder
from llavamod_offline.families.llava.export import save_llava
from llavamod_offline.models.checkpoint import load_tokenizer, vocabulary_size
from tests.tiny import IMAGE_TOKENS, tiny_tokenizer, write_tiny_language_model, write_tiny_llava


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "llava"))


def _edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text())
    for key, value in changes.items():
        target = content
        *parents, last = key.split("__")
        for parent in parents:
            target = target[parent]
        target[last] = value
    file.write_text(json.dumps(content))


def test_saved_student_is_loaded_by_plain_transformers(tiny_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_llava(tiny_folder), load_tokenizer(tiny_folder)
    assert not model.training
    assert model.dtype == torch.float32
    copy = tmp_path / "new" / "student"
    save_llava(model, copy, tokenizer=tokenizer, processor_source=tiny_folder)
    plain = AutoModelForImageTextToText.from_pretrained(copy)
    assert type(plain).__name__ == "LlavaForConditionalGeneration"
    for name, tensor in model.state_dict().items():
        assert torch.equal(plain.state_dict()[name], tensor), name
    processor = AutoProcessor.from_pretrained(copy)
    inputs = processor(text="USER: <image>\nWhat is it? ASSISTANT:", images=torch.zeros(3, 32, 24), return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_index).sum() == IMAGE_TOKENS
    assert inputs["pixel_values"].shape == (1, 3, 24, 24)
    answer = plain.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(answer, model.generate(**inputs, max_new_tokens=4, do_sample=False))


def test_a_batch_of_prompts_gets_the_answers_of_each_alone(tiny_folder: Path, tmp_path: Path) -> None:
    """Other tools pad as the exported processor says: on the left, so that generation starts right after the prompt."""
    model, tokenizer = load_llava(tiny_folder), load_tokenizer(tiny_folder)
    tokenizer.padding_side = "right"
    save_llava(model, tmp_path / "student", tokenizer=tokenizer, processor_source=tiny_folder)
    processor = AutoProcessor.from_pretrained(tmp_path / "student")
    prompts = ["USER: <image>\nWhat is it? ASSISTANT:", "USER: <image>\nHow many red circles are there? ASSISTANT:"]

    def answers(texts: list[str]) -> list[list[int]]:
        images = [torch.ones(3, 24, 24)] * len(texts)
        inputs = processor(text=texts, images=images, padding=True, return_tensors="pt")
        made = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        return [row[inputs["input_ids"].shape[1] :].tolist() for row in made]

    assert answers(prompts) == [answers([prompt])[0] for prompt in prompts]


def test_generation_stops_at_the_known_end_tokens_where_no_template_names_one(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "model", template=None)
    tokenizer = load_tokenizer(folder)
    ends = {tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")}
    assert set(load_llava(folder).generation_config.eos_token_id) == ends


@pytest.mark.parametrize("named", [None, 396, [5, 398]])
def test_a_student_says_how_it_was_taught_to_converse(
    tiny_folder: Path, tmp_path: Path, named: int | list[int] | None
) -> None:
    """A base model's own settings hold neither the wording nor the end-of-answer token that training used."""
    model, tokenizer = load_llava(tiny_folder), load_tokenizer(tiny_folder)
    assert tokenizer.convert_ids_to_tokens([398, 396]) == ["<|im_end|>", "<|endoftext|>"]
    model.generation_config.eos_token_id = named
    template = get_template("chatml")
    save_llava(model, tmp_path / "student", tokenizer=tokenizer, processor_source=tiny_folder, template=template)
    saved = AutoProcessor.from_pretrained(tmp_path / "student")
    for speaker in (saved, saved.tokenizer):
        text = speaker.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
        assert text == "".join(segment.text for segment in template.render([Turn("user", "Hi")]))
    assert load_llava(tmp_path / "student").generation_config.eos_token_id == 398


def test_saving_never_overwrites_and_leaves_nothing_half_written(tiny_folder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_llava(tiny_folder), load_tokenizer(tiny_folder)
    with pytest.raises(ModelError, match="exists already"):
        save_llava(model, tiny_folder, tokenizer=tokenizer, processor_source=tiny_folder)
    with pytest.raises(ModelError, match=r"no preprocessor_config\.json"):
        save_llava(model, tmp_path / "student", tokenizer=tokenizer, processor_source=tmp_path)
    with pytest.raises(RuntimeError):
        save_llava(model, tmp_path / "student", tokenizer=tokenizer, processor_source=tiny_folder, state_dict=_Broken())
    assert list(tmp_path.iterdir()) == []


class _Broken(dict[str, torch.Tensor]):
    def items(self) -> Any:
        raise RuntimeError("disk full")

    keys = values = __iter__ = items


def test_image_processor_inside_the_processors_file(tiny_folder: Path, folder: Path, tmp_path: Path) -> None:
    # Where transformers' own processors have put it since version 5.
    (folder / "preprocessor_config.json").unlink()
    AutoProcessor.from_pretrained(tiny_folder).save_pretrained(folder)
    assert not (folder / "preprocessor_config.json").exists()
    model = load_llava(folder)
    save_llava(model, tmp_path / "student", tokenizer=load_tokenizer(folder), processor_source=folder)
    processor = AutoProcessor.from_pretrained(tmp_path / "student").image_processor
    assert dict(processor.crop_size) == {"height": 24, "width": 24}
    _edit(folder / "processor_config.json", image_processor__crop_size={"height": 32, "width": 32})
    for refused in (
        lambda: load_llava(folder),
        lambda: save_llava(model, tmp_path / "x", tokenizer=load_tokenizer(folder), processor_source=folder),
    ):
        with pytest.raises(ModelError, match="does not fit the vision tower's 24 pixels"):
            refused()


def test_a_half_precision_checkpoint_becomes_the_dtype_asked_for(tiny_folder: Path, tmp_path: Path) -> None:
    half = load_llava(tiny_folder, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    save_llava(half, tmp_path / "half", tokenizer=load_tokenizer(tiny_folder), processor_source=tiny_folder)
    assert load_llava(tmp_path / "half").dtype == torch.float32


class TestBadFolders:
    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="nowhere: no such checkpoint folder"):
            load_llava(tmp_path / "nowhere")

    def test_no_config(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match=r"no config\.json"):
            load_llava(tmp_path)

    def test_unreadable_config(self, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        with pytest.raises(ModelError, match="not readable as JSON"):
            load_llava(folder)

    def test_another_class(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="model_type is 'qwen2', expected 'llava'"):
            load_llava(write_tiny_language_model(tmp_path / "text"))

    def test_wrong_value_in_config(self, folder: Path) -> None:
        _edit(folder / "config.json", text_config__model_type="no such model")
        with pytest.raises(ModelError, match="invalid LLaVA configuration"):
            load_llava(folder)

    def test_no_weights(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        with pytest.raises(ModelError, match=r"no \*\.safetensors"):
            load_llava(folder)

    def test_cut_weights(self, folder: Path) -> None:
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
        with pytest.raises(ModelError, match="the weights cannot be loaded"):
            load_llava(folder)

    @pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
    def test_tensors_of_another_model(self, folder: Path, change: str) -> None:
        tensors = load_file(folder / "model.safetensors")
        name = next(name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
        if change == "missing":
            del tensors[name]
        elif change == "unexpected":
            tensors["language_model.layers.9.mlp.up_proj.weight"] = tensors[name].clone()
        else:
            tensors[name] = tensors[name][:-1].clone()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match=r"layers\.[19]\.mlp\.up_proj|cannot be loaded") as caught:
            load_llava(folder)
        assert "\n" not in str(caught.value)

    def test_pickled_weights_are_never_read(self, folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin")
        with pytest.raises(ModelError, match="weights are pickled"):
            load_llava(folder)

    def test_image_tokens_that_do_not_fit(self, folder: Path) -> None:
        _edit(folder / "config.json", image_seq_length=576)
        with pytest.raises(ModelError, match=r"image_seq_length is 576, but .* gives 9 image tokens"):
            load_llava(folder)

    def test_image_processor_that_does_not_fit(self, folder: Path) -> None:
        _edit(folder / "preprocessor_config.json", crop_size={"height": 32, "width": 32})
        with pytest.raises(ModelError, match="does not fit the vision tower's 24 pixels"):
            load_llava(folder)

    def test_no_tokenizer(self, folder: Path) -> None:
        (folder / "tokenizer.json").unlink()
        with pytest.raises(ModelError, match=r"no tokenizer\.json"):
            load_tokenizer(folder)

    def test_broken_tokenizer(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")
        with pytest.raises(ModelError, match="the tokenizer cannot be loaded"):
            load_tokenizer(folder)


def test_image_tokens_count_the_class_token_if_it_is_kept(tiny_folder: Path) -> None:
    config = load_config(tiny_folder)
    assert image_tokens(config) == IMAGE_TOKENS
    config.vision_feature_select_strategy, config.image_seq_length = "full", IMAGE_TOKENS + 1
    assert image_tokens(config) == IMAGE_TOKENS + 1


def test_sequence_encoder_checks_the_image_token(tiny_folder: Path) -> None:
    config, tokenizer = load_config(tiny_folder), load_tokenizer(tiny_folder)
    encoder = sequence_encoder(tiny_folder, tokenizer, get_template("qwen"), 77)
    assert (encoder.image_token_id, encoder.image_tokens, encoder.max_length) == (399, IMAGE_TOKENS, 77)
    config.image_token_index = 398
    with pytest.raises(ModelError, match="image_token_index is 398, but the tokenizer has '<image>' at 399"):
        sequence_encoder(config, tokenizer, get_template("qwen"), 77)
    config.image_token_index = 420
    with pytest.raises(ModelError, match="image_token_index is 420"):
        sequence_encoder(config, tokenizer, get_template("qwen"), 77)


def test_vocabulary_is_the_smallest_of_tokenizer_and_heads() -> None:
    tokenizer = tiny_tokenizer()
    assert vocabulary_size(tokenizer) == 400
    assert vocabulary_size(tokenizer, 432, 401) == 400
    assert vocabulary_size(tokenizer, 432, 390) == 390
