"""What the package offers without its extras: names to import, and a one-line error where an extra is needed."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("llavamod_offline", "teacher_cache", "train", "eval")
BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"deepspeed", "vllm", "ray", "accelerate", "s3fs", "aiohttp", "xlsxwriter", "trl"}:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)

sys.meta_path.insert(0, Blocked())
"""


def _run(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCKED + program, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_public_names_need_no_extra() -> None:
    done = _run(
        "from teacher_cache import open_cache, TeacherCache, check_student, check_labels\n"
        "from llavamod_offline.losses import CachedDistillation, SparseTargets, distillation_from_hidden\n"
        "print(sorted({'webdataset', 'transformers'} & set(sys.modules)))"
    )
    assert (done.stdout, done.returncode) == ("[]\n", 0), done.stderr


@pytest.mark.parametrize("package", ["teacher_cache", "llavamod_offline.losses"])
def test_every_public_name_is_there(package: str) -> None:
    done = _run(
        f"import {package} as package\n"
        "print(sorted(name for name in package.__all__ if getattr(package, name, None) is None))\n"
        "package.nothing"
    )
    assert done.stdout.splitlines()[0] == "[]"
    assert done.stderr.splitlines()[-1] == f"AttributeError: module '{package}' has no attribute 'nothing'"


def test_ray_data_names_its_extra() -> None:
    done = _run("import teacher_cache.ray_data")
    assert done.stderr.splitlines()[-1].endswith("needs Ray Data: pip install 'llavamod-offline[ray]'")


@pytest.mark.parametrize("command", ["llavamod_offline.cli", "teacher_cache.cli.main", "train.cli", "eval.cli"])
def test_commands_show_their_help_without_extras(command: str) -> None:
    done = _run(f"sys.argv[1:] = ['--help']\nfrom {command} import main\nmain()")
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_typed_and_run_by_their_names(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()
    done = subprocess.run(
        [sys.executable, "-m", package, "--version"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert re.fullmatch(r"llavamod-offline \d+\.\d+\.\d+\n", done.stdout)


def test_what_is_pinned_covers_what_is_declared() -> None:
    """For every extra that the tests install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    extras = project["optional-dependencies"]
    declared = [
        *project["dependencies"],
        *extras["train"],
        *extras["lora"],
        *extras["eval"],
        *extras["test"],
        *extras["lint"],
    ]
    names = {re.split(r"[\[<>=]", requirement)[0].lower() for requirement in declared} - {"llavamod-offline"}
    assert names <= pinned
