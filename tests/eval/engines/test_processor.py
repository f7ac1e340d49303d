"""Checkpoints from elsewhere, with their own processors."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from eval.engines.processor import ProcessorEngine
from eval.example import Example
from llavamod_offline.errors import ConfigError
from llavamod_offline.models.checkpoint import load_tokenizer
from tests.tiny_families import TINY_FAMILIES
from tests.tiny_teachers import write_tiny_onevision, write_tiny_qwen_vl


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
@pytest.mark.parametrize("write", [write_tiny_qwen_vl, write_tiny_onevision])
def test_a_processor_that_needs_torchvision_says_what_to_install(write: object, tmp_path: Path) -> None:
    assert callable(write)
    write(tmp_path / "checkpoint")
    with pytest.raises(ConfigError, match=r"needs torchvision: pip install 'llavamod-offline\[processor\]'$"):
        ProcessorEngine(tmp_path / "checkpoint", device="cpu")


def test_the_token_that_begins_a_prompt_is_there_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even though Gemma's chat template and tokenizer both add it."""
    folder = TINY_FAMILIES["gemma3"].write(tmp_path / "model")
    tokenizer = load_tokenizer(folder)
    start = (tokenizer.bos_token, tokenizer.bos_token_id)
    added = processors.TemplateProcessing(single=f"{start[0]} $A", special_tokens=[start])
    tokenizer.backend_tokenizer.post_processor = added
    tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
    engine, seen = ProcessorEngine(folder, device="cpu"), []
    generate = engine.model.generate

    def noting(**given: Any) -> Any:
        seen.append(given["input_ids"][0].tolist())
        return generate(**given)

    monkeypatch.setattr(engine.model, "generate", noting)
    engine.answer([Example("0", "Which colour?", None)], 2)
    assert seen[0].count(start[1]) == 1
