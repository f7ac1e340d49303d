"""Every command when it cannot write or print: one line, the right status, and never a traceback."""

from __future__ import annotations

import os
import re
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
from typer.main import get_command

import eval.cli
import llavamod_offline.cli
import teacher_cache.cli.main
import train.cli
from llavamod_offline.toyworld.benchmarks import write_benchmarks
from llavamod_offline.toyworld.datasets import write_datasets
from tests.scripts import fork_script

CHECKPOINTS = Path(__file__).parents[1] / "llavamod_offline" / "toyworld" / "checkpoints"
TEACHER = str(CHECKPOINTS / "teacher")
APPS: dict[str, list[typer.Typer]] = {
    "llavamod-offline": [llavamod_offline.cli.app],
    "cache-teacher": [teacher_cache.cli.main.app],
    "train-student": [train.cli.app, train.cli.reports, train.cli.measurements],
    "eval-student": [eval.cli.app],
}
ALONE = "train-student run"  # the one whose name is not typed: `train-student RECIPE ...`


def all_commands() -> Iterator[str]:
    """Every command of the parsers, such as `cache-teacher run`."""
    for script, apps in APPS.items():
        for app in apps:
            command = get_command(app)
            names = getattr(command, "commands", None) or [command.name]
            yield from (f"{script} {name}" for name in names)


def arguments(world: str, out: str) -> dict[str, list[str]]:
    """How each command is called; `out` is a folder for what it writes."""
    data, teacher, root = f"data={world}/set", f"teacher={TEACHER}", ["--root", f"{world}/benchmarks"]
    predictions = ["--predictions", f"{world}/answers/pope/predictions.jsonl"]
    return {
        "llavamod-offline pack": [f"{world}/align.json", "--images", f"{world}/images", "--output", f"{out}/set"],
        "llavamod-offline index": [f"{world}/set", "--workers", "1", "--output", f"{out}/set"],
        "llavamod-offline doctor": [f"{world}/sources.yaml", "--root", world],
        "llavamod-offline toyworld": ["--quick", "--output", f"{out}/toy"],
        "llavamod-offline ask": [TEACHER, "What colours do you know?", "--max-new-tokens", "4"],
        "llavamod-offline rounds": [
            *[f"prompts={world}/set", f"holdout={world}/other-set", f"teacher={TEACHER}", f"student={TEACHER}"],
            *[f"output={out}/rounds", "rounds=1", "steps=1", "max_new_tokens=64"],
            "train=[batch.global_size=4,batch.micro_size=4,workers=0]",
        ],
        "llavamod-offline demo": ["--quick", "--output", f"{out}/demo"],
        "llavamod-offline ladder": ["--quick", "--output", f"{out}/ladder"],
        "cache-teacher run": [data, teacher, f"output={out}/cache"],
        "cache-teacher work": [data, teacher, f"output={out}/cache"],
        "cache-teacher status": [f"{world}/cache"],
        "cache-teacher retry": [f"{world}/cache", data, teacher],
        "cache-teacher plan": [data, teacher, f"output={out}/cache", "--samples", "4", "--seconds", "0"],
        "cache-teacher verify": [f"{world}/cache"],
        "cache-teacher inspect": [f"{world}/cache"],
        "cache-teacher export": [f"{world}/cache", "--output", f"{out}/cache.parquet"],
        "cache-teacher merge": [f"{world}/cache", f"{world}/other-cache", "--output", f"{out}/cache"],
        "cache-teacher generate": [
            *[data, teacher, f"output_set={out}/set", f"output={out}/cache", "generate.max_new_tokens=64"]
        ],
        "cache-teacher report": [f"{world}/cache", "-o", f"{out}/report.html"],
        "cache-teacher audit": [f"{world}/cache", data, teacher, "--n", "2"],
        ALONE: training(world, f"{out}/run"),
        "train-student report": [f"{world}/run", "-o", f"{out}/report.html"],
        "train-student measure": [
            *[f"student.checkpoint={world}/run/student", f"data.set={world}/set", "workers=0"],
            *["-o", f"{out}/unseen.json"],
        ],
        "eval-student generate": [f"model={TEACHER}", f"root={world}/benchmarks", f"output={out}", "tasks=[pope]"],
        "eval-student score": ["pope", *root, *predictions, "--output", f"{out}/score.json"],
        "eval-student export": ["pope", *root, *predictions, "-o", f"{out}/answers.jsonl"],
        "eval-student report": [f"{world}/answers", *root, "-o", f"{out}/report.html"],
        "eval-student portable": [TEACHER, "-o", f"{out}/portable"],
    }


def training(world: str, output: str) -> list[str]:
    parts = [f"student.vision_tower={TEACHER}", f"student.language_model={CHECKPOINTS / 'language_model'}"]
    sizes = ["batch.global_size=4", "batch.micro_size=4", "steps=1"]
    return ["align", f"data.set={world}/set", *parts, *sizes, f"output={output}"]


def typed(name: str, world: Path | str, out: Path | str) -> list[str]:
    """A command as typed."""
    given = arguments(str(world), str(out))[name]
    return [*name.split()[: 1 if name == ALONE else 2], *given]


NAMES = list(arguments("", ""))
READERS = (
    "ask",
    "doctor",
    "verify",
    "inspect",
    "audit",
    "status",
    "retry",
)  # they write no file here
WRITERS = [name for name in NAMES if not name.endswith(READERS)]
QUICK = [name for name in NAMES if not name.endswith(("demo", "ladder", "rounds"))]  # these take minutes


def test_no_command_is_forgotten() -> None:
    assert sorted(all_commands()) == sorted(NAMES)


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    status: int
    stdout: bytes
    stderr: str

    @property
    def errors(self) -> list[str]:
        """The lines that name an error."""
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]


def run(command: list[str], folder: Path, *, before: Callable[[], None] | None = None, stdout: str = "pipe") -> Done:
    """Run a command; `stdout` is a pipe, a pipe whose reader has gone (`closed`), or a file's path."""
    folder.mkdir(exist_ok=True)
    pipes = {name: folder / name for name in ("out", "err")}
    for pipe in pipes.values():
        if not pipe.exists():
            os.mkfifo(pipe)
    read: dict[str, bytes] = {"out": b""}

    def reader(name: str) -> None:
        with pipes[name].open("rb") as stream:
            if name == "err" or stdout == "pipe":
                read[name] = stream.read()

    threads = [threading.Thread(target=reader, args=(name,)) for name in pipes if name == "err" or stdout in KINDS]
    for thread in threads:
        thread.start()
    script = fork_script(
        command, folder, stdout=str(pipes["out"]) if stdout in KINDS else stdout, stderr=pipes["err"], before=before
    )
    script.process.join()
    for thread in threads:
        thread.join()
    stderr = read["err"].decode(errors="replace")
    assert "Traceback" not in stderr, stderr
    assert "Exception ignored" not in stderr, stderr
    assert script.process.exitcode is not None
    return Done(script.process.exitcode, read["out"], stderr)


KINDS = ("pipe", "closed")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands read: sets, caches, a trained run and answers."""
    folder = tmp_path_factory.mktemp("world")
    write_datasets(folder, align=8, general=0, multitask=0, preference=0, error_share=0, seed=3)
    write_datasets(folder / "other", align=8, general=0, multitask=0, preference=0, error_share=0, seed=4)
    write_benchmarks(folder / "benchmarks", images=2, seed=4)
    (folder / "sources.yaml").write_text(
        "stages: {align: [toy]}\nsources: {toy: {files: [align.json], images: [images], licence: mit, download: x}}\n"
    )
    out = folder / "logs"
    pack = ["llavamod-offline", "pack"]
    source = [f"{folder}/align.json", "--images", f"{folder}/images"]
    other = [f"oth={folder}/other/align.json", "--images", f"{folder}/other/images", "--keys", "row"]
    for command in (
        [*pack, *source, "--output", f"{folder}/set"],
        [*pack, *other, "--output", f"{folder}/other-set"],
        ["cache-teacher", "run", f"data={folder}/set", f"teacher={TEACHER}", f"output={folder}/cache"],
        ["cache-teacher", "run", f"data={folder}/other-set", f"teacher={TEACHER}", f"output={folder}/other-cache"],
        ["train-student", *training(str(folder), f"{folder}/run")],
        typed("eval-student generate", folder, folder / "answers"),
    ):
        done = run(command, out)
        assert done.status == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITERS)
def test_an_output_below_a_file(name: str, world: Path, tmp_path: Path) -> None:
    """A stand-in for a read-only folder, which root could still write to."""
    (tmp_path / "file").touch()
    done = run(typed(name, world, tmp_path / "file"), tmp_path / "logs")
    assert done.status == 2, done.stderr
    assert len(done.errors) == 1, done.stderr
    assert str(tmp_path / "file") in done.errors[0]
    assert (tmp_path / "file").read_bytes() == b""


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk(name: str, world: Path, tmp_path: Path) -> None:
    """No file can be written; commands that only read still work."""
    (tmp_path / "out").mkdir()
    done = run(typed(name, world, tmp_path / "out"), tmp_path / "logs", before=_let_no_file_grow)
    assert done.status == (2 if name in WRITERS else done.status)
    assert len(done.errors) == (name in WRITERS), done.stderr
    if name in WRITERS:
        assert "File too large" in done.errors[0]
        assert str(tmp_path / "out") in done.errors[0]


def _let_no_file_grow() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


@pytest.mark.slow
def test_a_score_is_printed_even_if_its_file_cannot_be_written(world: Path, tmp_path: Path) -> None:
    done = run(typed("eval-student score", world, tmp_path / "file"), tmp_path / "logs", before=_let_no_file_grow)
    assert done.status == 2
    assert b"f1_mean" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("help_only", [True, False], ids=["help", "work"])
@pytest.mark.parametrize("name", QUICK)
def test_a_stdout_that_fails(name: str, help_only: bool, world: Path, tmp_path: Path) -> None:
    """A reader that has gone, as with `| head -1`, is no error; a full disk is one."""
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    command = typed(name, world, tmp_path / "first")
    if help_only:
        command = [*command[: 1 if name == ALONE else 2], "--help"]
    done = run(command, tmp_path / "logs", stdout="closed")
    assert done.status == 141, done.stderr
    assert not done.errors
    done = run([part.replace("first", "second") for part in command], tmp_path / "logs", stdout="/dev/full")
    assert done.status == 2, done.stderr
    assert done.errors == [
        "error: standard output cannot be written: No space left on device: free space or write elsewhere"
    ]


SHORT = (
    "llavamod-offline toyworld",
    "llavamod-offline ask",
    "cache-teacher inspect",
    "cache-teacher status",
    "cache-teacher retry",
    "train-student report",
    *(f"eval-student {what}" for what in ("score", "export", "report", "portable")),
)
LONG = [name for name in QUICK if name not in SHORT]


@pytest.mark.slow
@pytest.mark.parametrize("name", LONG)
def test_progress_in_a_log(name: str, world: Path, tmp_path: Path) -> None:
    """Every command that may take long prints progress lines when stderr is not a terminal."""
    (tmp_path / "out").mkdir()
    done = run(typed(name, world, tmp_path / "out"), tmp_path / "logs", before=_often)
    assert PROGRESS.search(done.stderr), done.stderr


PROGRESS = re.compile(r"^[\w-]+: [\d.]+[kMG]?/[\d.]+[kMG]? \w+ \(\d+ %\), .*, \d\d:\d\d left$", re.MULTILINE)


def _often() -> None:
    os.environ["LLAVAMOD_PROGRESS_SECONDS"] = "0"


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_seven_bits_and_no_stdin(name: str, world: Path, tmp_path: Path) -> None:
    """stdout can encode only ASCII, and stdin is closed."""
    (tmp_path / "out").mkdir()
    done = run(typed(name, world, tmp_path / "out"), tmp_path / "logs", before=_seven_bits)
    assert done.status == 0, done.stderr
    assert done.stdout.isascii()


def _seven_bits() -> None:
    sys.stdout.reconfigure(encoding="ascii")  # type: ignore[union-attr]
    os.close(0)
    sys.stdin = None
