"""A folder with the images that rows name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.llavamod_offline.data.parse.packed_rows import IMAGES


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for name, content in IMAGES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder
