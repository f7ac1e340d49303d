"""What starts vLLM, for every test of this folder that needs it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llavamod_offline.families import open_family
from llavamod_offline.vllm.session import Session
from llavamod_offline.vllm.settings import VllmSettings
from teacher_cache.engines.vllm import plugin as recording
from tests.teacher_cache.engines.vllm_world import Start, World
from tests.vllm_cpu import SETTINGS


@pytest.fixture(scope="module")
def start() -> Iterator[Start]:
    """Start vLLM on a folder; it stops with the module."""
    sessions = []

    def started(
        folder: Path,
        settings: VllmSettings = SETTINGS,
        *,
        models: Any = recording,
        template: str = "qwen",
        **options: Any,
    ) -> World:
        teacher = open_family(folder, template, image_aspect="auto", max_length=512)
        session = Session(
            folder,
            settings,
            prefix=models.PREFIX,
            register=models.register,
            dtype="float32",
            device="cpu",
            max_length=512,
            **{"runner": "pooling", **options},
        )
        sessions.append(session)
        return World(teacher, session)

    yield started
    for session in sessions:
        session.close()
