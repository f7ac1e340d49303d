"""Shared fixtures of the training tests: a tiny checkpoint, packed sets and their caches, made once."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from llavamod_offline.config import load_config
from llavamod_offline.storage.disk_cache import FOLDER_VARIABLE
from teacher_cache.capture.run import run_capture
from teacher_cache.config import CacheTeacherConfig
from tests.tiny import write_tiny_llava, write_tiny_set
from train.config import TrainConfig
from train.config.recipes import resolve_config

EXHAUSTIVE = ("capture.preset=exhaustive",)


@dataclass(frozen=True)
class World:
    """Folders to train with: student and teacher (differing in depth, width, LM head), sets of 24 samples, caches."""

    root: Path
    student: Path
    other_student: Path
    teacher: Path
    chats: Path
    pairs: Path
    chats_cache: Path
    pairs_cache: Path

    def config(self, stage: str, output: Path, *settings: str) -> TrainConfig:
        """A small run of a packaged recipe: batches of 8 in micro-batches of 4, 4 steps, no workers."""
        data, cache = (self.chats, self.chats_cache)
        if stage == "preference":
            data, cache = (self.pairs, self.pairs_cache)
        given = [
            f"data.set={data}",
            f"student.checkpoint={self.student}",
            f"output={output}",
            "batch.global_size=8",
            "batch.micro_size=4",
            "steps=4",
            "optim.lr=1e-3",
            "optim.warmup_ratio=0",
            "engine.gradient_checkpointing=false",
            "workers=0",
        ]
        if stage not in ("align", "sft"):
            given.append(f"cache.path={cache}")
        if stage == "preference":
            given += ["student.kind=dense", "student.capacity_factor=null", "loss.router_aux_coef=0"]
            given.append("trainable=[projector,mlp]")
        return resolve_config([stage, *given, *settings])


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The folders, made once for all tests."""
    root = tmp_path_factory.mktemp("world")
    teacher = write_tiny_llava(root / "teacher", hidden=48, layers=3, seed=7, tied=False)
    chats, pairs = write_tiny_set(root / "chats", 24), write_tiny_set(root / "pairs", 24, preference=True)
    return World(
        root,
        write_tiny_llava(root / "student"),
        write_tiny_llava(root / "other-student", seed=1),
        teacher,
        chats,
        pairs,
        write_cache(root / "chats-cache", chats, teacher, *EXHAUSTIVE),
        write_cache(root / "pairs-cache", pairs, teacher),
    )


def write_cache(folder: Path, data: Path, teacher: Path, *settings: str) -> Path:
    """Capture a set with a teacher."""
    given = (f"data={data}", f"teacher={teacher}", f"output={folder}")
    run_capture(load_config(CacheTeacherConfig, (), [*given, *settings]))
    return folder


def wait_for_lines(file: Path, lines: int) -> None:
    """Wait until a file has some lines; if they do not appear within minutes, their writer must be dead."""
    deadline = time.monotonic() + 300
    while not file.is_file() or len(file.read_text().splitlines()) < lines:
        assert time.monotonic() < deadline, f"{file} never had {lines} lines"
        time.sleep(0.002)


@pytest.fixture(autouse=True)
def _own_staging(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep measured lengths out of the user's folder, and other test sessions' lengths out of this one."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path_factory.getbasetemp() / "staging"))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads, and the machine may be busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)  # other tests compare with processes that use as many as the machine has
