"""The commands accept the command lines and YAML files that the README files show."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.main import get_command

import eval.cli
import llavamod_offline.cli
import teacher_cache.cli.main
import train.cli
from eval.generate import EvalGenerateConfig
from llavamod_offline.config import load_config, split_arguments
from teacher_cache.config import CacheTeacherConfig
from train.config import MeasureConfig
from train.config.recipes import resolve_config

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "llavamod_offline/README.md", "teacher_cache/README.md", "train/README.md", "eval/README.md")
GROUPS: dict[str, typer.Typer] = {
    "llavamod-offline": llavamod_offline.cli.app,
    "cache-teacher": teacher_cache.cli.main.app,
    "eval-student": eval.cli.app,
}
SETTINGS = {
    "cache-teacher run": CacheTeacherConfig,
    "cache-teacher work": CacheTeacherConfig,
    "cache-teacher generate": CacheTeacherConfig,
    "cache-teacher plan": CacheTeacherConfig,
    "eval-student generate": EvalGenerateConfig,
}


def blocks(readme: str) -> list[tuple[str, str]]:
    """The language and the content of each code block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / readme).read_text(), flags=re.MULTILINE | re.DOTALL)


def yaml_files() -> dict[str, tuple[str, str]]:
    """The command and the content of each YAML file that starts with `# NAME: COMMAND`."""
    found = [content for readme in READMES for language, content in blocks(readme) if language == "yaml"]
    heads = [(re.match(r"# (\S+\.yaml): (\S+-\S+ .*)", content), content) for content in found]
    return {head[1]: (head[2], content) for head, content in heads if head}


def shown_commands(readme: str) -> Iterator[list[str]]:
    """Each of the project's commands in the blocks of a README file, as words."""
    for language, content in blocks(readme):
        if language not in ("", "bash", "sh"):
            continue
        yield from commands_of(content)


def commands_of(text: str) -> Iterator[list[str]]:
    """Each line, or part of one, that calls one of the project's commands."""
    for line in text.replace("\\\n", " ").splitlines():
        if not re.search(r"(^|\s)(llavamod-offline|cache-teacher|eval-student|train-student) \S", line):
            continue
        for part in re.split(r"&&|\|\|", line):
            words = shlex.split(part, comments=True)
            names = [place for place, word in enumerate(words) if word in (*GROUPS, "train-student")]
            if names:
                yield words[names[0] :]


def check(words: list[str]) -> None:
    """Parse a command line as the command would, without running it. Errors: the command's own."""
    words = [word for word in words if word not in ("...", "…")]
    name, arguments = words[0], words[1:]
    command: Any
    if name == "train-student" and arguments[:1] == ["report"]:
        command = get_command(train.cli.reports)
        command.make_context(name, arguments[1:])
        return
    if name == "train-student" and arguments[:1] == ["measure"]:
        command = get_command(train.cli.measurements)
        load_config(MeasureConfig, *split_arguments(command.make_context(name, arguments[1:]).params["arguments"]))
        return
    if name == "train-student":
        command = get_command(train.cli.app)
        resolve_config(command.make_context(name, arguments).params["arguments"])
        return
    command = get_command(GROUPS[name]).commands[arguments[0]]  # type: ignore[attr-defined]
    context = command.make_context(f"{name} {arguments[0]}", arguments[1:])
    schema = SETTINGS.get(f"{name} {arguments[0]}")
    if schema is not None:
        load_config(schema, *split_arguments(context.params["arguments"]))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the YAML files that the commands name."""
    for name, (_, content) in yaml_files().items():
        (tmp_path / name).write_text(content)
    (tmp_path / "eval").symlink_to(ROOT / "eval")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize("readme", READMES)
def test_every_command_in_a_readme_is_one(readme: str) -> None:
    commands = list(shown_commands(readme))
    assert commands
    for words in commands:
        try:
            check(words)
        except Exception as error:
            pytest.fail(f"{readme}: {shlex.join(words)}: {error}")


def helps() -> Iterator[tuple[str, str]]:
    """Each command with the text of its help."""
    yield "train-student", get_command(train.cli.app).help or ""
    yield "train-student report", get_command(train.cli.reports).help or ""
    yield "train-student measure", get_command(train.cli.measurements).help or ""
    for name, app in GROUPS.items():
        yield from ((f"{name} {sub}", inner.help) for sub, inner in get_command(app).commands.items())  # type: ignore[attr-defined]


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(("name", "text"), list(helps()))
def test_every_example_of_a_help_is_a_command(name: str, text: str) -> None:
    examples = list(commands_of(text.partition("\nExample")[2]))
    assert examples, f"{name}: no example"
    for words in examples:
        try:
            check(words)
        except Exception as error:
            pytest.fail(f"{name}: {shlex.join(words)}: {error}")


@pytest.mark.usefixtures("folder")
def test_every_command_with_settings_has_a_yaml_file_in_its_readme() -> None:
    files = yaml_files()
    for command in ("train-student", "cache-teacher run", "cache-teacher generate", "eval-student generate"):
        assert [name for name, (typed, _) in files.items() if typed == f"{command} {name}"], command
    for typed, _ in files.values():
        check(typed.split())
