"""Progress: a live bar on a terminal, an occasional line elsewhere."""

from __future__ import annotations

import logging
import os
import pty
import subprocess
import sys
import termios
import time

import pytest

from llavamod_offline.errors import ConfigError
from llavamod_offline.progress import ProgressBar, track


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that the test sets, with lines as frequent as for users."""
    monkeypatch.delenv("LLAVAMOD_PROGRESS_SECONDS")
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_line_every_thirty_seconds(
    clock: list[float], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    with ProgressBar("capture", 400, "sample", also="positions") as bar:
        for _ in range(200):
            clock[0] += 0.5
            bar.advance(1, 50)
    assert caplog.messages == [
        "capture: 60/400 samples (15 %),  2.00sample/s, 100 positions/s, 02:50 left",
        "capture: 120/400 samples (30 %),  2.00sample/s, 100 positions/s, 02:20 left",
        "capture: 180/400 samples (45 %),  2.00sample/s, 100 positions/s, 01:50 left",
    ]
    assert capsys.readouterr().err == ""


def test_what_was_done_before_does_not_count_for_the_speed(
    clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with ProgressBar("mimic_dense", 100, "step", done=50) as bar:
        clock[0] += 100
        bar.advance(10, note="loss 1.5")
    assert caplog.messages == ["mimic_dense: 60/100 steps (60 %), 10.00s/step, loss 1.5, 06:40 left"]


@pytest.mark.parametrize(("total", "unit", "shown"), [(1, "file", "1/1 file"), (3, "batch", "1/3 batches")])
def test_units_are_counted_in_the_right_number(
    total: int, unit: str, shown: str, clock: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    with ProgressBar("read", total, unit) as bar:
        clock[0] += 100
        bar.advance()
    assert caplog.messages[0].startswith(f"read: {shown} (")


def test_silence_and_another_interval(
    clock: list[float], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("LLAVAMOD_PROGRESS_SECONDS", "0")
    with ProgressBar("a", 2, "x", silent=True) as bar:
        bar.advance()
    assert not caplog.messages
    assert list(track([3, 4], "b", "x")) == [3, 4]
    assert len(caplog.messages) == 2
    monkeypatch.setenv("LLAVAMOD_PROGRESS_SECONDS", "often")
    with pytest.raises(ConfigError, match="LLAVAMOD_PROGRESS_SECONDS is 'often'"):
        ProgressBar("a", 2, "x")


def test_a_terminal_shows_a_live_bar() -> None:
    code = "from llavamod_offline.progress import track; list(track(range(3), 'verify', 'shard'))"
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    done = subprocess.run([sys.executable, "-c", code], stderr=slave, check=True)
    os.close(slave)
    shown = os.read(master, 10000).decode()
    os.close(master)
    assert done.returncode == 0
    assert "verify: 100%" in shown
    assert "\r" in shown
