"""How every command reports errors: one line and status 2; a traceback only for bugs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from llavamod_offline import __version__
from llavamod_offline.entrypoint import run_command
from llavamod_offline.errors import DataError

app = typer.Typer(pretty_exceptions_enable=False)


@app.command()
def work(what: str) -> None:
    """Do one thing, or fail at it."""
    if what == "input":
        raise DataError("set 'x': no such folder: make one")
    if what == "defect":
        raise ZeroDivisionError("a defect")
    if what == "interrupt":
        raise KeyboardInterrupt
    if what == "exit":
        raise typer.Exit(3)
    print("done")


def status(what: str) -> int:
    with pytest.raises(SystemExit) as caught:
        run_command(app, [what])
    assert isinstance(caught.value.code, int)
    return caught.value.code


def test_success(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("well") == 0
    assert capsys.readouterr().out == "done\n"


def test_input_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("input") == 2
    captured = capsys.readouterr()
    assert captured.err == "error: set 'x': no such folder: make one\n"
    assert not captured.out


def test_debugging_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVAMOD_DEBUG", "1")
    with pytest.raises(DataError):
        run_command(app, ["input"])


def test_defects_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command(app, ["defect"])


def test_interrupts_and_chosen_statuses() -> None:
    assert status("interrupt") == 130
    assert status("exit") == 3


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("--nothing") == 2
    assert "No such option" in capsys.readouterr().err


def test_line_breaks_and_control_characters_of_names_are_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    app = typer.Typer()

    @app.command()
    def fail() -> None:
        raise DataError("sample 'a\nb\x1b[2J\u2028é': twice")

    with pytest.raises(SystemExit):
        run_command(app, [])
    assert capsys.readouterr().err == "error: sample 'a\\nb\\x1b[2J\\u2028é': twice\n"


def doctor(redirection: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a console script through a shell to its very end, with a redirection."""
    command = f"{Path(sys.executable).with_name('llavamod-offline')} doctor --quick {redirection}"
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )


def test_a_reader_that_has_gone_is_no_error() -> None:
    done = doctor("| (exec <&-; sleep 5)")
    assert (done.returncode, done.stderr) == (141, "")


def test_a_full_disk_behind_stdout_is_one_line() -> None:
    done = doctor("> /dev/full")
    assert done.returncode == 2
    assert done.stderr == (
        "error: standard output cannot be written: No space left on device: free space or write elsewhere\n"
    )


def test_a_full_disk_behind_stderr_is_no_error() -> None:
    assert doctor("2> /dev/full").returncode == 1  # data sets are missing


def test_closed_streams_are_no_error() -> None:
    done = doctor(">&- <&-")
    assert (done.returncode, done.stderr) == (1, "")
    assert doctor(">&- <&- 2>&-").returncode == 1


def test_what_an_encoding_lacks_is_escaped_as_in_json() -> None:
    app = 'import typer; app = typer.Typer(); app.command()(lambda: print(\'{"a": "é… \U0001f600"}\'))'
    code = f"{app}; from llavamod_offline.entrypoint import run_command; run_command(app)"
    for encoding in ("ascii", "iso-8859-1"):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environment)
        assert json.loads(done.stdout.decode(encoding)) == {"a": "é… \U0001f600"}


@pytest.mark.parametrize("name", ["llavamod-offline", "cache-teacher", "train-student", "eval-student"])
def test_every_command_tells_its_version(name: str) -> None:
    script = Path(sys.executable).with_name(name)
    done = subprocess.run([str(script), "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"llavamod-offline {__version__}\n"
    shown = subprocess.run([str(script), "--help"], capture_output=True, text=True, check=True)
    assert "--version prints the version." in shown.stdout
