"""The fixture that starts vLLM, for every test in this folder that needs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.teacher_cache.engines.vllm_world import Start, World, start_world


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Start vLLM on a folder; it stops with the module."""
    sessions = []

    def started(folder: Path, *settings: Any, **options: Any) -> World:
        world = start_world(folder, *settings, **options)
        sessions.append(world.session)
        return world

    yield started
    for session in sessions:
        session.close()
