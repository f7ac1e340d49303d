"""Every long command, stopped or killed at any moment and rerun, gives the same result as undisturbed."""

from __future__ import annotations

import hashlib
import random
import signal
import time
from pathlib import Path

import pytest

from llavamod_offline.toyworld.benchmarks import write_benchmarks
from llavamod_offline.toyworld.datasets import write_datasets
from tests.processes import start
from tests.scripts import fork_script

CHECKPOINTS = Path(__file__).parents[1] / "llavamod_offline" / "toyworld" / "checkpoints"
TEACHER = CHECKPOINTS / "teacher"
NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
MOMENTS = 3
# Files whose content depends on the clock or on where the output lies.
TIMED = ("metrics.jsonl", "summary.json", "state.json", "README.md", "config.yaml")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy world in real file formats, a set packed from it, and benchmarks."""
    folder = tmp_path_factory.mktemp("world")
    write_datasets(folder, align=48, general=0, multitask=0, preference=0, error_share=0.1, seed=3)
    write_benchmarks(folder / "benchmarks", images=8, seed=4)
    made = start([*pack(folder), "--output", str(folder / "set")])
    assert made.communicate()[1] == ""
    assert made.returncode == 0
    return folder


def pack(world: Path) -> list[str]:
    sources = [str(world / "align.json"), "--images", str(world / "images"), "--shard-samples", "12"]
    return ["llavamod-offline", "pack", *sources, "--workers", "1"]


def commands(world: Path, output: Path) -> dict[str, list[str]]:
    """The long commands; each writes below `output`."""
    teacher, data = f"teacher={TEACHER}", f"data={world / 'set'}"
    return {
        "pack": [*pack(world), "--output", str(output / "set")],
        "index": ["llavamod-offline", "index", str(world / "set"), "--workers", "1", "--output", str(output / "set")],
        "capture": ["cache-teacher", "run", data, teacher, f"output={output / 'cache'}", "batch_size=4"],
        "generate": [
            *["cache-teacher", "generate", data, teacher, f"output_set={output / 'set'}", f"output={output / 'cache'}"],
            *["generate.max_new_tokens=64", "batch_size=12"],
        ],
        "train": [
            *["train-student", "align", f"data.set={world / 'set'}", f"student.vision_tower={TEACHER}"],
            *[f"student.language_model={CHECKPOINTS / 'language_model'}", f"output={output / 'run'}", "steps=8"],
            *["batch.global_size=8", "batch.micro_size=8", "save_steps=3", "keep_last=1", "workers=1"],
        ],
        "answer": [
            *["eval-student", "generate", f"model={TEACHER}", f"root={world / 'benchmarks'}", f"output={output}"],
            *["tasks=[pope]", "batch_size=4"],
        ],
    }


def contents(folder: Path) -> dict[str, str]:
    """All files below a folder, hidden ones too, with their hashes except where these may differ."""
    return {
        file.relative_to(folder).as_posix(): "" if file.name in TIMED else hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file() or not any(file.iterdir())
    }


class Undisturbed:
    """Each command's result and duration when undisturbed; each is run once, on first use."""

    def __init__(self, world: Path, folder: Path) -> None:
        self._world, self._folder = world, folder
        self._found: dict[str, tuple[dict[str, str], float]] = {}

    def of(self, name: str) -> tuple[dict[str, str], float]:
        """The command's files and its seconds."""
        if name not in self._found:
            output = self._folder / name
            output.mkdir()
            began = time.monotonic()
            status, stderr = fork_script(commands(self._world, output)[name], self._folder / f"{name}-log").ended()
            assert status == 0, stderr
            self._found[name] = contents(output), time.monotonic() - began
        return self._found[name]


@pytest.fixture(scope="module")
def undisturbed(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(world, tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.name)
@pytest.mark.parametrize("name", ["pack", "index", "capture", "generate", "train", "answer"])
def test_a_stopped_command_gives_the_same_when_run_again(
    name: str, number: signal.Signals, world: Path, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """Stopped a few times in a row, at random moments, then run to the end."""
    expected, seconds = undisturbed.of(name)
    output = tmp_path / "output"
    output.mkdir()
    command = commands(world, output)[name]
    rng = random.Random(f"{name} {number}")
    for _ in range(MOMENTS):
        script = fork_script(command, tmp_path / "log")
        time.sleep(rng.uniform(0, seconds))
        script.send(number)
        status, stderr = script.ended()
        assert "Traceback" not in stderr
        if status == 2:  # an existing set is not overwritten
            assert name in ("pack", "index")
            assert "--overwrite" in stderr
        elif number == signal.SIGKILL:
            assert status in (-number, 0)
        elif status == -number:  # its signal handlers were not yet installed
            assert not stderr
        else:
            assert status in (128 + number, 0)
            assert len([line for line in stderr.splitlines() if line.startswith("stopped by ")]) == (status != 0)
    status, stderr = fork_script(command, tmp_path / "log").ended()
    assert status == 0 or (name in ("pack", "index") and "--overwrite" in stderr), stderr
    assert contents(output) == expected
