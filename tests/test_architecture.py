"""The layout of the four packages, read from their source: who imports whom, class names, sizes of folders."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Collection
from graphlib import TopologicalSorter
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
MOST_MODULES = 14  # directly in a folder
MOST_DIRECT = {"teacher_cache": 8, "llavamod_offline/data": 8}


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
        if EXAMPLES in file.parents:  # uses the packages from outside, as a user would
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


def source_files() -> dict[str, Path]:
    """Every module of the product by its dotted name; a package goes by the name of its folder."""
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports inside functions count too; those under `if TYPE_CHECKING:` do not, since they never run.

    `from a import b` counts as an import of the module `a.b` where that exists, else of `a`. That importing `a.b` runs
    `a/__init__.py` first is not counted.
    """
    files = source_files()
    graph = {name: imported_names(ast.parse(file.read_text()), files) & files.keys() for name, file in files.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError, which shows the circle


def imported_names(tree: ast.AST, modules: Collection[str]) -> set[str]:
    """Dotted names that a module imports, at its top or inside a function, unless only for type checkers."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for other in node.orelse:
                found |= imported_names(other, modules)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in modules else node.module for name in names}
        else:
            found |= imported_names(node, modules)
    return found


def test_no_class_name_is_defined_twice() -> None:
    """Across all four packages, private and nested classes too."""
    places: dict[str, list[str]] = defaultdict(list)
    for name, file in source_files().items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(name)
    assert not {name: where for name, where in places.items() if len(where) > 1}


def test_folders_stay_small() -> None:
    for folder in sorted({file.parent for file in source_files().values()}):
        modules = sorted(file.name for file in folder.glob("*.py"))
        most = MOST_DIRECT.get(folder.relative_to(ROOT).as_posix(), MOST_MODULES)
        assert len(modules) <= most, f"{folder.relative_to(ROOT)} holds {len(modules)}: {modules}"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_marked_as_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()
