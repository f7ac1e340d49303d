"""The portable copy prepares the same pixels and tokens as this project's own engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transformers import AutoProcessor

from eval.engines.hf import HfEngine
from eval.engines.prompts import asked_sample, prompt_sequence
from eval.example import Example
from eval.export.portable import write_portable
from eval.files import FileImage
from llavamod_offline.data.images import decode_image
from llavamod_offline.data.sample import Turn
from llavamod_offline.errors import ConfigError, ModelError
from tests.tiny import tiny_image, write_tiny_llava
from tests.tiny_families import TINY_FAMILIES


def example(folder: Path, size: tuple[int, int]) -> Example[None]:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{size[0]}.png"
    (folder / name).write_bytes(tiny_image(3, size))
    return Example("1", "What is it?\nAnswer briefly.", None, name, FileImage(folder, (name,)))


@pytest.mark.parametrize("template", ["qwen", "chatml"])
@pytest.mark.parametrize("aspect", ["pad", "square"])
def test_tokens_and_pixels_are_the_engines_own(tmp_path: Path, template: str, aspect: str) -> None:
    student = write_tiny_llava(tmp_path / "student")
    write_portable(student, tmp_path / "portable", template=template, image_aspect=aspect)
    engine = HfEngine(student, template=template, image_aspect=aspect)
    processor = AutoProcessor.from_pretrained(tmp_path / "portable")
    for size in ((50, 20), (20, 50), (24, 24)):
        asked = example(tmp_path / "images", size)
        assert asked.source is not None
        image = decode_image(asked.source.read(), name="1")
        parts = [{"type": "image"}, {"type": "text", "text": asked.prompt}]
        for content in (parts, f"<image>\n{asked.prompt}"):
            messages = [{"role": "user", "content": content}]
            text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            inputs = processor(text=text, images=image, return_tensors="pt")
            prompt = prompt_sequence(engine.family, asked_sample(asked), 4)
            assert inputs["input_ids"][0].tolist() == prompt.input_ids_T.tolist()
        pixels = engine.family.images(asked_sample(asked))[0].inputs["pixel_values"]
        assert np.array_equal(inputs["pixel_values"][0].numpy(), pixels)
    assert processor.tokenizer.eos_token == engine.encoder.template.end


@pytest.mark.parametrize("template", ["qwen", "chatml"])
def test_conversations_read_as_the_template_renders_them(tmp_path: Path, template: str) -> None:
    student = write_tiny_llava(tmp_path / "student")
    write_portable(student, tmp_path / "portable", template=template)
    rendered = HfEngine(student, template=template).encoder.template
    processor = AutoProcessor.from_pretrained(tmp_path / "portable")
    turns = [
        Turn("user", 'Is it {{ "a" }}?'),
        Turn("assistant", "Yes."),
        Turn("user", "Why?"),
        Turn("assistant", "So."),
    ]
    for count in range(1, 5):
        messages = [{"role": turn.role, "content": turn.text} for turn in turns[:count]]
        expected = "".join(segment.text for segment in rendered.render(turns[:count]))
        assert processor.apply_chat_template(messages, tokenize=False) == expected


def test_the_copy_keeps_the_card_and_states_its_image_aspect(tmp_path: Path) -> None:
    student = write_tiny_llava(tmp_path / "student")
    (student / "README.md").write_text("# Mine\n", encoding="utf-8")
    for aspect in ("pad", "square"):
        copy = tmp_path / aspect
        write_portable(student, copy, image_aspect=aspect)
        assert (copy / "README.md").read_text(encoding="utf-8") == "# Mine\n"
        assert HfEngine(copy).describe()["image_aspect"] == aspect
        write_portable(copy, tmp_path / f"{aspect}-again")
        assert HfEngine(tmp_path / f"{aspect}-again").describe()["image_aspect"] == aspect
    assert HfEngine(student).describe()["image_aspect"] == "pad"  # the folder states none: LLaVA's default


def test_what_cannot_be_copied_is_told(tmp_path: Path) -> None:
    student = write_tiny_llava(tmp_path / "student")
    with pytest.raises(ConfigError, match="already exists"):
        write_portable(student, student)
    with pytest.raises(ConfigError, match="template 'x' is unknown"):
        write_portable(student, tmp_path / "new", template="x")
    with pytest.raises(ConfigError, match="image aspect 'x' is unknown"):
        write_portable(student, tmp_path / "new", image_aspect="x")
    with pytest.raises(ModelError, match="no such checkpoint folder"):
        write_portable(tmp_path / "nothing", tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_other_families_need_no_copy(tmp_path: Path) -> None:
    student = TINY_FAMILIES["qwen3_vl"].write(tmp_path / "student")
    with pytest.raises(ModelError, match=r"it is not a LLaVA, and its own processor .*: use it as it is$"):
        write_portable(student, tmp_path / "portable")
    assert not (tmp_path / "portable").exists()
