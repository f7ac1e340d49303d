"""What SIGTERM does to the unit in progress: finished if it fits at the measured rate, else abandoned."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import pytest

from llavamod_offline.errors import ConfigError
from llavamod_offline.grace import Grace

PROGRAM = """
import os, signal, sys, time, typer
from llavamod_offline.entrypoint import run_command
from llavamod_offline.grace import Grace
from llavamod_offline.signals import keeping
app = typer.Typer()

@app.command()
def main() -> None:
    with Grace({seconds}) as grace, keeping(lambda: "1 of 9 shards are kept"):
        grace.begin("shard 'a'", 2)
        for _ in range(2):
            time.sleep(0.05)
            grace.advance(1)
        grace.end()
        grace.wrote(0.0)
        grace.check()
        grace.begin("shard 'b'", {pieces})
        for number in range({pieces}):
            {before}
            time.sleep({sleep})
            grace.advance(1)
        grace.end()
        grace.check()
        print("went on")

run_command(app, [])
"""


def run(before: str, *, seconds: float, pieces: int = 4, sleep: float = 0.05) -> tuple[int, list[str], str]:
    """Run units of `pieces` pieces each; the code `before` runs before each piece of the second unit."""
    code = textwrap.dedent(PROGRAM).format(before=before, seconds=seconds, pieces=pieces, sleep=sleep)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr.splitlines(), done.stdout


AT_ONE = "number == 1 and os.kill(os.getpid(), signal.SIGTERM)"


def test_a_unit_that_fits_is_finished_and_the_status_says_so() -> None:
    status, lines, printed = run(AT_ONE, seconds=600)
    assert (status, printed) == (4, "")
    assert lines[0].startswith("SIGTERM: finishing shard 'b', in about")
    assert lines[1].startswith("stopped by SIGTERM: shard 'b' is finished, 1 of 9 shards are kept; to continue, run")


def test_a_unit_that_does_not_fit_is_given_up_at_once() -> None:
    status, lines, _ = run(AT_ONE, seconds=60, pieces=10**6)
    assert status == 143
    assert len(lines) == 1
    assert lines[0].startswith("stopped by SIGTERM: 1 of 9 shards are kept; ")


def test_a_unit_that_takes_longer_after_all_is_given_up_when_the_seconds_are_over() -> None:
    slow = f"{AT_ONE}; number == 2 and time.sleep(1.2)"
    status, lines, _ = run(slow, seconds=1.0, pieces=4, sleep=0.0)
    assert status == 143
    assert len(lines) == 2


def test_without_seconds_and_for_other_signals_nothing_changes() -> None:
    assert run(AT_ONE, seconds=0)[0] == 143
    status, lines, _ = run(AT_ONE.replace("SIGTERM", "SIGINT"), seconds=600)
    assert (status, len(lines)) == (130, 1)


def test_a_second_signal_ends_it() -> None:
    twice = f"{AT_ONE}; number == 2 and (time.sleep(0.5), os.kill(os.getpid(), signal.SIGTERM))"
    status, lines, _ = run(twice, seconds=600)
    assert status == 143
    assert len(lines) == 2


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_seconds_that_mean_nothing_are_refused(seconds: float) -> None:
    with pytest.raises(ConfigError, match=r"--grace is .*: must be a number of seconds, 0 or more"):
        Grace(seconds)


def test_the_handler_is_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Grace(1.0):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
