"""Checkpoints from elsewhere, with their own processors."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from eval.engines.processor import ProcessorEngine
from llavamod_offline.errors import ConfigError
from tests.tiny_teachers import write_tiny_onevision, write_tiny_qwen_vl


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
@pytest.mark.parametrize("write", [write_tiny_qwen_vl, write_tiny_onevision])
def test_a_processor_that_needs_torchvision_says_what_to_install(write: object, tmp_path: Path) -> None:
    assert callable(write)
    write(tmp_path / "checkpoint")
    with pytest.raises(ConfigError, match=r"needs torchvision: pip install 'llavamod-offline\[processor\]'$"):
        ProcessorEngine(tmp_path / "checkpoint", device="cpu")
