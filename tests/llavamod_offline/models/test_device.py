"""A missing device is refused by one line, before anything is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import eval.cli
import teacher_cache.cli.main
from llavamod_offline.entrypoint import run_command
from llavamod_offline.errors import ConfigError
from llavamod_offline.models.device import pick_device

without_gpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="has a GPU")


def test_the_cpu_is_always_there() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda", "mps", "xpu")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:", "0", "CPU0"])
def test_a_name_that_is_none(name: str) -> None:
    with pytest.raises(ConfigError, match=f"^device is '{name}': must be auto, cpu, cuda, or one GPU, such as cuda:1$"):
        pick_device(name)


@pytest.mark.parametrize("name", ["meta", "cuda:999999"])
def test_a_device_that_no_machine_has(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"^device is '{name}', but .* set device"):
        pick_device(name)


@without_gpu
@pytest.mark.parametrize(
    "arguments",
    [
        *(["cache-teacher", name, "data=x", "teacher=x", "output=x"] for name in ("run", "plan")),
        ["cache-teacher", "generate", "data=x", "teacher=x", "output=x", "output_set=y"],
        ["eval-student", "generate", "model=x", "root=x", "output=x", "tasks=[pope]"],
    ],
)
def test_every_command_says_at_once_that_there_is_no_gpu(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    app = {"cache-teacher": teacher_cache.cli.main.app, "eval-student": eval.cli.app}[arguments[0]]
    with pytest.raises(SystemExit, match="2"):
        run_command(app, [*arguments[1:], "device=cuda"])
    shown = capsys.readouterr().err
    assert shown == "error: device is 'cuda', but torch finds no such device on this machine: set device=cpu\n"
    assert not list(tmp_path.iterdir())
