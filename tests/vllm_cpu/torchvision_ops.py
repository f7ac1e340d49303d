"""Lets `import torchvision` work beside torch's CPU build. Run as a script, it installs itself into its environment.

vLLM's models import torchvision. The wheel on package indexes is built against CUDA: its operators do not load beside a
CPU build of torch, and the import fails where torchvision registers a fake `nms`, because torch then has no such
operator. Nothing here runs it, so a declaration is enough; it is made when the import system first looks for
torchvision. A `.pth` file imports this module whenever the interpreter starts, since vLLM starts interpreters of its
own.
"""

from __future__ import annotations

import importlib.machinery
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

_NAME = "llavamod_torchvision_ops"
_DECLARED: list[Any] = []  # operators vanish with the library object that holds them


class _Declare:
    """Finds no module; declares the operators when torchvision is looked for."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        if name != "torchvision":
            return
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or not spec.submodule_search_locations:
            return
        import torch

        try:
            torch.ops.load_library(str(Path(spec.submodule_search_locations[0]) / "_C.so"))
        except OSError:
            library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _DECLARED.append(library)


def _install() -> None:
    packages = Path(sysconfig.get_path("purelib"))
    shutil.copyfile(__file__, packages / f"{_NAME}.py")
    (packages / f"{_NAME}.pth").write_text(f"import {_NAME}\n")


if __name__ == _NAME:
    sys.meta_path.insert(0, _Declare())
elif __name__ == "__main__":
    _install()
