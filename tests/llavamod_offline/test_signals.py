"""Every command ends on a signal with one line and the signal's status, whatever it is doing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from llavamod_offline import signals
from llavamod_offline.toyworld.benchmarks import write_benchmarks
from llavamod_offline.toyworld.datasets import write_datasets
from tests.processes import catches, has_loaded, heed_signals, start, wait_until

NUMBERS = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small toy world's files and a set packed from them."""
    folder = tmp_path_factory.mktemp("toy")
    write_datasets(folder / "world", align=60, general=0, multitask=0, preference=0, error_share=0, seed=3)
    write_benchmarks(folder / "benchmarks", images=4, seed=4)
    made = start([*["llavamod-offline", "pack", "--workers", "1", "--output"], str(folder / "set"), *sources(folder)])
    assert made.communicate()[1] == ""
    return folder


def sources(folder: Path) -> list[str]:
    return [str(folder / "world" / "align.json"), "--images", str(folder / "world" / "images")]


TEACHER = str(Path(signals.__file__).with_name("toyworld") / "checkpoints" / "teacher")


def commands(toy: Path, output: Path) -> dict[str, list[str]]:
    """One command of each console script."""
    return {
        "pack": ["llavamod-offline", "pack", *sources(toy), "--output", str(output / "set")],
        "capture": ["cache-teacher", "run", f"data={toy / 'set'}", f"teacher={TEACHER}", f"output={output / 'cache'}"],
        "train": [
            *["train-student", "align", f"data.set={toy / 'set'}", f"student.vision_tower={TEACHER}"],
            *[f"student.language_model={TEACHER}/../language_model", f"output={output / 'run'}"],
            *["steps=100000", "batch.global_size=8", "batch.micro_size=8"],
        ],
        "answer": [
            "eval-student",
            "generate",
            f"model={TEACHER}",
            f"root={toy / 'benchmarks'}",
            f"output={output}",
            "tasks=[pope]",
        ],
    }


def check_end(process: subprocess.Popen[str], number: int) -> str:
    """Check the status and the single line of a stopped command; return the line."""
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 128 + number, stderr
    assert "Traceback" not in stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("stopped by")]
    assert line.startswith(f"stopped by {signal.Signals(number).name}: ")
    assert stdout == ""
    return line


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.name)
@pytest.mark.parametrize("library", ["", "libtorch_python", "_imaging"])
@pytest.mark.parametrize("name", ["pack", "capture", "train", "answer"])
def test_during_imports(name: str, library: str, number: signal.Signals, toy: Path, tmp_path: Path) -> None:
    """As soon as the command handles signals, and while it is importing a large library."""
    process = start(commands(toy, tmp_path)[name])
    wait_until(lambda: catches(process, signal.SIGTERM), process)
    if library and name != "pack":
        wait_until(lambda: has_loaded(process, library), process)
    process.send_signal(number)
    line = check_end(process, number)
    assert "nothing new was kept; to go on, run again: " in line
    assert commands(toy, tmp_path)[name][-1] in line
    assert list(tmp_path.iterdir()) == []


def children(process: subprocess.Popen[str]) -> int:
    """The number of its child processes that are still running."""
    try:
        return len(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
    except OSError:
        return 0


def wait_for_the_last(process: subprocess.Popen[str]) -> None:
    """Wait until no process of the session is left."""
    deadline = time.monotonic() + 120
    while True:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        assert time.monotonic() < deadline, "processes are left"
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.name)
@pytest.mark.parametrize("seconds", [0, 0.3, 1.0])
def test_workers_of_pack_end_quietly(seconds: float, number: signal.Signals, toy: Path, tmp_path: Path) -> None:
    """A terminal's Ctrl-C reaches them as well, while they start or work."""
    process = start([*commands(toy, tmp_path)["pack"], "--workers", "2"])
    wait_until(lambda: children(process) >= 3, process)  # Python's resource tracker is the third
    time.sleep(seconds)
    if process.poll() is None:
        os.killpg(process.pid, number)
        check_end(process, number)
    wait_for_the_last(process)


@pytest.mark.slow
@pytest.mark.parametrize("number", [*NUMBERS, signal.SIGKILL], ids=lambda number: number.name)
def test_the_demo_leaves_no_command_running(number: signal.Signals, tmp_path: Path) -> None:
    """Its commands would otherwise go on writing into the next demo's folder."""
    process = start(["llavamod-offline", "demo", "--quick", "--output", str(tmp_path / "demo")])
    wait_until(lambda: children(process) >= 2, process)
    process.send_signal(number)
    if number == signal.SIGKILL:
        process.communicate()
    else:
        check_end(process, number)
    wait_for_the_last(process)


def run(code: str, *, number: int, again: bool = False, launched: bool = False) -> tuple[int, list[str]]:
    """Run `code` as a command, send it a signal once it prints `ready` and, if `again`, another one."""
    program = f"""
        import os, signal, sys, time, typer
        from llavamod_offline import signals
        from llavamod_offline.entrypoint import run_command
        signals.watch()
        app = typer.Typer(pretty_exceptions_enable=False)
        @app.command()
        def work() -> None:
        {textwrap.indent(textwrap.dedent(code), "            ")}
        run_command(app)
    """
    variables = {"RANK": "0"} if launched else {}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **variables},
        preexec_fn=heed_signals,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    if again:
        assert process.stdout.readline() == "again\n"
        process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert "Traceback" not in stderr
    return process.returncode, stderr.splitlines()


@pytest.mark.parametrize("number", signals.SIGNALS, ids=lambda number: number.name)
def test_a_stopped_command_says_what_it_kept(number: signal.Signals) -> None:
    status, lines = run(
        """
        with signals.keeping(lambda: "3 of 7 shards are in caches/x"):
            print("ready", flush=True)
            time.sleep(60)
        """,
        number=number,
    )
    assert status == 128 + number
    assert lines == [f"stopped by {number.name}: 3 of 7 shards are in caches/x; to continue, run again: -c"]


def test_cleaning_up_is_not_disturbed_by_a_copy_of_the_signal() -> None:
    """`timeout` sends it twice within microseconds."""
    status, lines = run(
        """
        try:
            print("ready", flush=True)
            time.sleep(60)
        finally:
            signal.raise_signal(signal.SIGTERM)
            print("cleaned", file=sys.stderr)
        """,
        number=signal.SIGTERM,
    )
    assert status == 143
    assert lines[0] == "cleaned"
    assert len(lines) == 2


CLEANING = """
    try:
        print("ready", flush=True)
        time.sleep(60)
    finally:
        time.sleep(0.5)  # longer than copies of a signal may take
        print("again", flush=True)
        {wait}
"""


IN_C = """import ctypes
        lib, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
        lib.pthread_mutex_lock(mutex), lib.pthread_mutex_lock(mutex)"""


@pytest.mark.parametrize("number", NUMBERS, ids=lambda number: number.name)
@pytest.mark.parametrize("wait", ["time.sleep(60)", IN_C], ids=["python", "c"])
def test_a_second_signal_ends_at_once(wait: str, number: signal.Signals) -> None:
    """Also while the main thread waits in C code, where no handler of Python's runs."""
    status, lines = run(CLEANING.format(wait=wait), number=number, again=True)
    assert status == 128 + number
    assert len(lines) == 1
    assert lines[0].startswith(f"{number.name} again: ended at once; to continue, run again: ")


def test_a_launcher_may_repeat_the_signal() -> None:
    """Ctrl-C reaches every process of the terminal, and the launcher passes it on as well."""
    status, lines = run(CLEANING.format(wait="time.sleep(1)"), number=signal.SIGINT, again=True, launched=True)
    assert status == 130
    assert lines == ["stopped by SIGINT: nothing new was kept; to go on, run again: the same command"]


def test_a_destructor_does_not_swallow_it() -> None:
    status, lines = run(
        """
        class Slow:
            def __del__(self) -> None:
                print("ready", flush=True)
                time.sleep(60)
        slow = Slow()
        del slow
        time.sleep(60)
        """,
        number=signal.SIGINT,
    )
    assert status == 130
    assert len(lines) == 1


def test_a_noting_loop_ends_by_itself() -> None:
    status, lines = run(
        """
        with signals.noted("finishing this step") as stop:
            print("ready", flush=True)
            while not stop.is_set():
                time.sleep(0.01)
        print("done", file=sys.stderr)
        raise signals.Stopped(signals.received(), "step 3 is saved")
        """,
        number=signal.SIGINT,
    )
    assert status == 130
    assert lines[:2] == ["SIGINT: finishing this step", "done"]
    assert lines[2].startswith("stopped by SIGINT: step 3 is saved; ")


def test_a_signal_after_the_end_keeps_the_status() -> None:
    """Python takes a while to exit, for instance waiting for threads; by then the work is done."""
    status, lines = run(
        """
        import threading
        def late() -> None:
            time.sleep(0.3)
            print("ready", flush=True)
            time.sleep(60)
        threading.Thread(target=late).start()
        raise typer.Exit(3)
        """,
        number=signal.SIGINT,
    )
    assert (status, lines) == (3, [])


def test_a_forked_child_leaves_ctrl_c_to_its_parent() -> None:
    status, lines = run(
        """
        child = os.fork()
        if not child:
            signal.raise_signal(signal.SIGINT)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        print("ready", flush=True)
        time.sleep(60)
        """,
        number=signal.SIGTERM,
    )
    assert status == 143
    assert len(lines) == 1


def test_an_ignored_signal_stays_ignored() -> None:
    """As in a script's background job, which a Ctrl-C meant for the foreground must not end."""
    code = "import signal; from llavamod_offline import signals; signals.watch(); signal.raise_signal(signal.SIGINT)"
    ignore = lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)  # noqa: E731
    assert subprocess.run([sys.executable, "-c", code], preexec_fn=ignore, check=False).returncode == 0


def test_children_of_nohup_ignore_a_hangup_too() -> None:
    """A logout sends it to the whole group: workers that it killed would end their parent."""
    code = """
import os, signal
from llavamod_offline import signals
signals.watch()
child = os.fork()
if not child:
    signal.raise_signal(signal.SIGHUP)
    os._exit(7)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    assert subprocess.run([sys.executable, "-c", code], preexec_fn=ignore, check=False).returncode == 7
