"""Every image-text model type of transformers, and folders that lack files: opened, or refused by one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from llavamod_offline.errors import LlavaModError
from llavamod_offline.families import open_family
from tests.tiny_families import TINY_FAMILIES
from tests.tiny_teachers import tokenizer_with

TYPES = sorted(set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - {"llava"})
# An image processor that fits none of the types, to see what each makes of another's.
_IMAGES = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 16}, "crop_size": 16}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model_type", TYPES)
def test_a_folder_of_any_type_is_refused_by_one_line(tmp_path: Path, model_type: str) -> None:
    """With only a configuration of that type; with a tokenizer added; and with another model's image processor."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    for step in range(3):
        if step == 1:
            tokenizer_with("<image>", "<|image_pad|>", "<|image|>").save_pretrained(tmp_path)
        if step == 2:
            (tmp_path / "preprocessor_config.json").write_text(json.dumps(_IMAGES))
        with pytest.raises(LlavaModError) as caught:
            open_family(tmp_path, "chatml", image_aspect="auto", max_length=99)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3", "smolvlm", "internvl"])
@pytest.mark.parametrize("missing", ["tokenizer.json", "preprocessor_config.json", "config.json"])
def test_a_folder_that_lacks_a_file_is_refused_by_its_name(tmp_path: Path, name: str, missing: str) -> None:
    folder = TINY_FAMILIES[name].write(tmp_path / "teacher")
    (folder / missing).unlink()
    with pytest.raises(LlavaModError) as caught:
        open_family(folder, "auto", image_aspect="auto", max_length=99)
    assert missing.removesuffix("_config.json") in str(caught.value)
    assert "\n" not in str(caught.value)
