"""Two commands on one output: the second is refused and changes nothing, whatever happened to the first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llavamod_offline.config import dump_config
from llavamod_offline.errors import ConfigError
from llavamod_offline.storage.lock import LOCK_NAME
from tests.train.conftest import World, wait_for_lines
from train.metrics import METRICS_NAME
from train.run import train


def contents(output: Path) -> dict[str, bytes]:
    """The files that the first command, still running, does not touch."""
    return {name: (output / name).read_bytes() for name in ("config.yaml", LOCK_NAME)}


def test_the_second_is_refused_and_goes_on_once_the_first_is_killed(world: World, tmp_path: Path) -> None:
    output = tmp_path / "run"
    settings = ("steps=100000", "save_steps=5")
    (tmp_path / "config.yaml").write_text(dump_config(world.config("sft", output, *settings)))
    first = subprocess.Popen(
        [Path(sys.executable).with_name("train-student"), tmp_path / "config.yaml"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for_lines(output / METRICS_NAME, 7)
        before = contents(output)
        for other in ("optim.lr=1e-6", "log_steps=3"):
            with pytest.raises(
                ConfigError, match=f"^output: {output} is in use by process {first.pid}, since "
            ) as caught:
                train(world.config("sft", output, *settings, other))
            assert "\n" not in str(caught.value)
        assert contents(output) == before
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    assert (output / LOCK_NAME).is_file()
    lines = len((output / METRICS_NAME).read_text().splitlines())
    with pytest.raises(ConfigError, match=r"^seed: the run in "):  # no longer in use
        train(world.config("sft", output, *settings, "seed=4"))
    assert len((output / METRICS_NAME).read_text().splitlines()) == lines
    assert not (output / LOCK_NAME).exists()


def test_only_the_main_process_of_several_takes_the_lock(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others run beside it, on the same output."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="environment: "):  # without its launcher's other variables it fails later
        train(world.config("sft", tmp_path / "run"))
    assert not (tmp_path / "run").exists()
