"""The arrows between the four packages, read from the imports themselves."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "llavamod_offline" / "examples"
PACKAGES = ("llavamod_offline", "teacher_cache", "train", "eval")
MAY_IMPORT = {
    "llavamod_offline": set(),
    "teacher_cache": {"llavamod_offline"},
    "train": {"llavamod_offline", "teacher_cache"},
    "eval": {"llavamod_offline"},
}


def imported_packages(file: Path) -> set[str]:
    """The project's packages that a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            found.add(node.module.split(".")[0])
    return found & set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_what_stands_below_it(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for file in files:
        if EXAMPLES in file.parents:  # uses the packages from outside, as a reader would
            continue
        unexpected = imported_packages(file) - MAY_IMPORT[package] - {package}
        assert not unexpected, f"{file.relative_to(ROOT)} imports {unexpected}"


def test_nothing_imports_the_examples() -> None:
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            assert EXAMPLES in file.parents or "llavamod_offline.examples" not in file.read_text(), file


def test_no_package_imports_the_tests() -> None:
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            source = file.read_text()
            assert "from tests" not in source, file


def test_nothing_is_unpickled() -> None:
    """`pickle` and unsafe `torch.load` appear nowhere in the product."""
    for package in PACKAGES:
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    assert not {"pickle", "dill", "joblib"} & {alias.name for alias in node.names}, file
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                    assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), file
