"""Steps run in an order that meets their dependencies, up to a limit at once, and failures are reported."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from llavamod_offline.demo.plan import demo_steps
from llavamod_offline.demo.scheduler import Step, StepError, longest_first, run_steps


def python(name: str, code: str, *needs: str) -> Step:
    return Step(name, (sys.executable, "-c", code), needs)


def test_steps_wait_for_their_needs(tmp_path: Path) -> None:
    made = tmp_path / "made"
    first = python("first", f"import time; time.sleep(.3); open({str(made)!r}, 'w')")
    second = python("second", f"open({str(made)!r})", "first")
    seconds = run_steps([second, first], tmp_path, at_once=2)
    assert set(seconds) == {"first", "second"}
    assert seconds["first"] >= 0.3


def test_steps_without_needs_run_together(tmp_path: Path) -> None:
    """Each of two steps waits for a file that the other writes: run one after the other, they would never end."""
    files = [tmp_path / "a", tmp_path / "b"]
    meet = "import os, time\nopen({mine!r}, 'w')\nwhile not os.path.exists({other!r}): time.sleep(.01)"
    steps = [
        python(str(number), meet.format(mine=str(files[number]), other=str(files[1 - number]))) for number in (0, 1)
    ]
    assert len(run_steps(steps, tmp_path, at_once=2)) == 2


def test_a_failure_names_the_step_and_shows_its_last_words(tmp_path: Path) -> None:
    """A long step that is running at that moment is ended."""
    begun = tmp_path / "begun"
    lasting = python(
        "lasting",
        f"import os, time; open('{begun}.new', 'w').write(str(os.getpid()))\n"
        f"os.rename('{begun}.new', '{begun}'); time.sleep(3600)",
    )
    wait = f"import os, sys, time\nwhile not os.path.exists('{begun}'): time.sleep(.01)\n"
    failing = python("failing", f"{wait}print('no such shard'); sys.exit(3)")
    with pytest.raises(StepError, match=r"(?s)'failing' ended with status 3.*no such shard"):
        run_steps([lasting, failing], tmp_path, at_once=2)
    assert not Path("/proc", begun.read_text()).exists()


def test_a_launcher_that_is_killed_between_commands_is_replaced(tmp_path: Path) -> None:
    first = python("first", "import os, pathlib; pathlib.Path('launcher').write_text(str(os.getppid()))")
    second = python("second", "open('second', 'w')", "first")

    def kill(step: Step, seconds: float) -> None:
        if step.name == "first":
            launcher = int((tmp_path / "launcher").read_text())
            os.kill(launcher, signal.SIGKILL)
            os.waitid(os.P_PID, launcher, os.WEXITED | os.WNOWAIT)

    assert set(run_steps([first, second], tmp_path, at_once=1, on_end=kill)) == {"first", "second"}
    assert (tmp_path / "second").exists()


def test_an_unmet_need_is_told_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(StepError, match="'late' waits for 'never'"):
        run_steps([python("late", "", "never")], tmp_path, at_once=1)


def test_the_demos_commands_can_be_typed_in_their_order() -> None:
    done: set[str] = set()
    for step in demo_steps():
        assert set(step.needs) <= done, step.name
        done.add(step.name)
    assert longest_first(demo_steps())[0].name == "toyworld"
