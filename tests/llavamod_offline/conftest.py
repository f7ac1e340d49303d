from __future__ import annotations

from pathlib import Path

import pytest

from tests.tiny import write_tiny_llava


@pytest.fixture(scope="package")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense LLaVA of four layers whose LM head has 32 more rows than the tokenizer; read only."""
    return write_tiny_llava(tmp_path_factory.mktemp("models") / "llava", layers=4, head_rows=432)
