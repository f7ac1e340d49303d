"""Prompts about toy scenes, and settings for rounds of the toy teacher with itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llavamod_offline.demo.plan import TEACHER
from tests.teacher_cache.generate.reference import write_prompts


@dataclass(frozen=True)
class Prompts:
    """A set of prompts and a held-out one."""

    prompts: Path
    holdout: Path

    def arguments(self, output: Path, *settings: str) -> list[str]:
        """The settings of two rounds of two steps."""
        places = [f"prompts={self.prompts}", f"holdout={self.holdout}", f"output={output}"]
        models = [f"teacher={TEACHER}", f"student={TEACHER}"]
        train = "train=[batch.global_size=4,batch.micro_size=4,optim.lr=1e-5,workers=0]"
        return [*places, *models, "steps=2", "max_new_tokens=80", train, *settings]


def write_world(folder: Path) -> Prompts:
    """Write both sets."""
    return Prompts(write_prompts(folder / "prompts"), write_prompts(folder / "holdout"))
