"""The files that the demo starts from: samples in LLaVA's formats, benchmarks, and a small language model."""

from __future__ import annotations

from pathlib import Path

from llavamod_offline.demo.plan import FULL, QUICK, TEACHER, small_language_model
from llavamod_offline.errors import ConfigError
from llavamod_offline.toyworld.benchmarks import write_benchmarks
from llavamod_offline.toyworld.datasets import write_datasets
from llavamod_offline.toyworld.narrow import write_small_language_model


def write_world(output: Path, *, quick: bool = False, seed: int = 1, benchmark_images: int | None = None) -> list[Path]:
    """Write the folders of a toy world into `output` and return them. Errors: `ConfigError` if one exists.

    `benchmark_images`: see `write_benchmarks`; None: as many as in the demo.
    """
    sizes = QUICK if quick else FULL
    folders = [output / "world", output / "benchmarks", small_language_model(output)]
    for folder in folders:
        if folder.exists():
            raise ConfigError(f"{folder}: exists already: remove it, or choose another folder with --output")
    write_datasets(
        folders[0],
        align=sizes.align,
        general=sizes.general,
        multitask=sizes.multitask,
        preference=sizes.preference,
        unseen=sizes.unseen,
        error_share=0.1,
        seed=seed,
    )
    write_benchmarks(folders[1], images=benchmark_images or sizes.benchmark_images, seed=seed + 1)
    write_small_language_model(TEACHER, folders[2])
    return folders
