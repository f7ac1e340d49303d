"""File errors become one line that names the file, the reason and the argument; bugs keep their traceback."""

from __future__ import annotations

import errno
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from llavamod_offline.file_errors import describe_file_error


def error(number: int, file: Path | str | None = None) -> OSError:
    return OSError(number, os.strerror(number), None if file is None else str(file))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["score", "pope", "--output", "out/file/s.json"], "change --output out/file/s.json"),
        (["score", "pope", "--json=out/file/s.json"], "change --json=out/file/s.json"),
        (["generate", "model=m", "output=out/file"], "change output=out/file"),
        (["export", "-o", "out/file", "--root", "out"], "change -o out/file"),
        (["verify", "out/file"], "change out/file"),
        (["verify", "elsewhere"], "choose another file or folder, or correct its permissions"),
    ],
)
def test_the_argument_that_named_the_file_is_named(arguments: list[str], named: str) -> None:
    assert (
        describe_file_error(error(errno.ENOTDIR, "out/file"), arguments) == f"error: out/file: Not a directory: {named}"
    )


def test_a_key_of_a_yaml_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"data: x\nnested:\n  output: {tmp_path}/out\n")
    line = describe_file_error(error(errno.EACCES, tmp_path / "out" / "a.json"), ["run", str(file)])
    assert line is not None
    assert line.endswith(f"Permission denied: change nested.output: {tmp_path}/out in {file}")


def test_a_full_disk_without_a_file_names_the_outputs() -> None:
    line = describe_file_error(error(errno.ENOSPC), ["generate", "model=m", "output=runs/x"])
    assert line == (
        "error: cannot be written (given by output=runs/x): No space left on device: free space, then run the "
        "command again"
    )


def test_missing_files_are_the_users_only_if_they_are_arguments() -> None:
    assert describe_file_error(error(errno.ENOENT, "here/a"), ["run", "data=here"]) is not None
    assert describe_file_error(error(errno.ENOENT, "ours/b"), ["run", "data=here"]) is None
    assert describe_file_error(error(errno.ENOENT), []) is None


@pytest.mark.parametrize("defect", [ValueError("(os error x)"), KeyError("a"), RuntimeError("no"), OSError("odd")])
def test_defects_stay_defects(defect: Exception) -> None:
    assert describe_file_error(defect, ["output=a"]) is None


def write_table(file: Path) -> None:
    pq.write_table(pa.table({"a": list(range(10**5))}), file)


def write_ipc(file: Path) -> None:
    table = pa.table({"a": list(range(10**5))})
    with pa.ipc.new_file(str(file), table.schema) as writer:
        writer.write_table(table)


def write_zarr(file: Path) -> None:
    import numpy as np
    import zarr

    zarr.create_array(store=str(file), data=np.arange(10**5), compressors=None, chunks=(10**5,))


WRITERS: dict[str, Callable[[Path], object]] = {
    "python": lambda file: file.write_bytes(bytes(10**5)),
    "safetensors": lambda file: save_file({"a": torch.zeros(10**5)}, file),
    "tokenizers": lambda file: Tokenizer(models.WordLevel({f"{n:9}": n for n in range(10**4)}, "x")).save(str(file)),
    "parquet": write_table,
    "arrow": write_ipc,
    "zarr": write_zarr,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_in_each_library(name: str, tmp_path: Path) -> None:
    """No file may grow beyond a limit, as on a full disk; each library reports that in its own words."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(Exception) as caught:  # noqa: PT011
            WRITERS[name](tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    line = describe_file_error(caught.value, [f"output={tmp_path}"])
    assert line is not None, repr(caught.value)
    assert f"output={tmp_path}" in line
    assert "File too large: free space" in line
