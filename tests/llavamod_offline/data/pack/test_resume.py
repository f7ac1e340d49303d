"""A `pack` that is stopped or killed continues after its last complete shard and ends as if undisturbed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.pack.prepare import PreparedSources
from llavamod_offline.data.pack.process_map import WorkerLostError
from llavamod_offline.data.rows import RejectedRow, RowPlace
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.data.sources.image_folders import ImageFolders
from llavamod_offline.data.sources.read import prepare_sources
from llavamod_offline.data.sources.source import Source, check_sources, describe_sources
from llavamod_offline.errors import ConfigError, DataError, StorageError
from llavamod_offline.grace import Grace
from llavamod_offline.plural import counted
from llavamod_offline.signals import Stopped, interruptible
from tests.llavamod_offline.data.sources.source_files import JPG, write_rows
from tests.tiny import tiny_image

Outcome = PreparedSources | RejectedRow


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Every kind of source, including rows that are rejected and rows that give several samples."""
    talk = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "This."}]
    several = {"prompt": "a", "chosen": "b", "rejected": ["c", "b", "d", "e"]}
    rows: list[dict[str, Any]] = [{"id": f"j{n}", "messages": talk if n % 5 else "?"} for n in range(20)]
    rows += [{"id": f"s{n}", **several} for n in range(3)]
    photos = tmp_path / "photos"
    photos.mkdir()
    for n in range(9):
        (photos / f"{n}.jpg").write_bytes(tiny_image(n, format="JPEG") if n % 4 else JPG[:40])
        (photos / f"{n}.json").write_text(json.dumps({"conversations": [
            {"from": "human", "value": f"<image>\n{n}?"}, {"from": "gpt", "value": "Yes."}]}))  # fmt: skip
    table = pa.Table.from_pylist([{"id": f"p{n}", "messages": talk} for n in range(40)])
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=7)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.set_column(0, "id", pa.array([f"a{n}" for n in range(40)])), max_chunksize=9)
    lines = tmp_path / "l.jsonl"
    lines.write_text("".join(json.dumps({"id": f"l{n}", "messages": talk}) + "\n" for n in range(10)) + "{\n")
    return [write_rows(tmp_path / "r.json", rows), photos, tmp_path / "t.parquet", lines, tmp_path / "a.arrow"]


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def pack(files: list[Path], output: Path, stop_after: float = float("inf"), *, shard_samples: int = 6) -> list[str]:
    """Pack, stopping after `stop_after` rows; return the rows that were read."""
    sources = check_sources([Source(file) for file in files], ())
    seen: list[str] = []

    def rows(start: RowPlace | None) -> Iterator[Outcome]:
        for row in prepare_sources(sources, start=start):
            if len(seen) >= stop_after:
                raise KeyboardInterrupt
            seen.append(f"{row.file} {row.row}")
            yield row

    write_set(rows, output, shard_samples=shard_samples, job={"files": describe_sources(sources)})
    return seen


def test_stopped_anywhere_and_continued(files: list[Path], tmp_path: Path) -> None:
    """Each run gets a few rows further; only the incomplete shard is read again."""
    (tmp_path / "whole").mkdir()
    everything = pack(files, tmp_path / "whole" / "set")
    expected = contents(tmp_path / "whole" / "set")
    rng = random.Random(0)
    for turn in range(6):
        output = tmp_path / f"cut-{turn}" / "set"
        read = 0
        for _ in range(100):
            try:
                last = pack(files, output, stop_after=rng.randint(7, 60))
            except KeyboardInterrupt:
                assert not output.exists()
                continue
            break
        assert contents(output) == expected
        assert [path.name for path in output.parent.iterdir()] == ["set"]
        assert len(last) < len(everything)
        assert everything[len(everything) - len(last) :] == last
        read += len(last)


def test_other_files_or_settings_start_anew(
    files: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = pack(files, tmp_path / "whole")
    output = tmp_path / "cut" / "set"

    def cut() -> None:
        with pytest.raises(KeyboardInterrupt):
            pack(files, output, stop_after=50)
        assert (output.parent / ".set.packing").is_dir()

    cut()
    assert len(pack(files, output, shard_samples=5)) == len(whole)
    shutil.rmtree(output)
    cut()
    files[0].write_text(files[0].read_text().replace("Which?", "Who???"))
    os.utime(files[0], ns=(1, 1))
    assert len(pack(files, output)) == len(whole)
    assert "Who???" in SampleSet.open(output).read(0).turns[0].text
    shutil.rmtree(output)
    cut()
    write_set(prepare_sources(files), output, shard_samples=6)  # without a job, nothing is reused
    assert sorted(path.name for path in output.parent.iterdir()) == ["set"]


def test_a_users_error_leaves_nothing_and_a_lost_worker_leaves_what_is_done(files: list[Path], tmp_path: Path) -> None:
    def failing(error: Exception, start: RowPlace | None) -> Iterator[Outcome]:
        found = prepare_sources(files, start=start)
        for _ in range(60):
            yield next(found)
        raise error

    unreadable = DataError("x: cannot be read")
    unreadable.__cause__ = OSError(errno.EIO, "disk")
    kept = [".set.packing"]
    cases: tuple[tuple[Exception, list[str]], ...] = (
        (DataError("x: row 3: bad"), []),
        (StorageError("a server"), kept),
        (unreadable, kept),
        (WorkerLostError("a worker"), kept),
    )
    for number, (error, left) in enumerate(cases):
        output = tmp_path / f"out-{number}" / "set"
        with pytest.raises(type(error)):
            write_set(partial(failing, error), output, shard_samples=6, job={"a": 1})
        assert [path.name for path in output.parent.glob(".set*")] == left
    write_set(lambda start: prepare_sources(files, start=start), output, shard_samples=6, job={"a": 1})
    pack(files, tmp_path / "whole")
    assert SampleSet.open(output).digest == SampleSet.open(tmp_path / "whole").digest


@pytest.mark.parametrize("before", ["missing", "truncated"])
def test_an_image_that_could_not_be_used_is_looked_at_again(tmp_path: Path, before: str) -> None:
    """Only from the shard on whose row lacked it; one that is still damaged is not."""
    images, output = tmp_path / "images", tmp_path / "set"
    images.mkdir()
    turns = [{"from": "human", "value": "<image>Which?"}, {"from": "gpt", "value": "This."}]
    rows = [{"id": f"k{n}", "image": f"{n}.png", "conversations": turns} for n in range(30)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    for number in set(range(30)) - {13}:
        (images / f"{number}.png").write_bytes(tiny_image(number))
    (images / "2.png").write_bytes(tiny_image(2)[:40])
    if before == "truncated":
        (images / "13.png").write_bytes(tiny_image(13)[:40])
    read: list[int] = []

    def pack_images(stop_at: int = 30) -> None:
        files = check_sources([Source(tmp_path / "rows.json")], [images])
        read.clear()

        def found(start: RowPlace | None) -> Iterator[Outcome]:
            for row in prepare_sources(files, images=[images], start=start):
                if row.row == stop_at:
                    raise KeyboardInterrupt
                read.append(row.row)
                yield row

        write_set(found, output, shard_samples=6, job={"a": 1}, can_use=ImageFolders([images]).can_use)

    with pytest.raises(KeyboardInterrupt):
        pack_images(stop_at=28)
    (images / "13.png").write_bytes(tiny_image(13))
    pack_images()
    assert read == list(range(7, 30))
    assert len(SampleSet.open(output)) == 29


def test_settings_that_do_not_fit_the_set_do_not_lose_what_is_packed(files: list[Path], tmp_path: Path) -> None:
    """A weight of a source that is not there, or too many rejections, show only at the end."""
    output, begun = tmp_path / "set", []

    def pack_with(**settings: Any) -> None:
        def rows(start: RowPlace | None) -> Iterator[Outcome]:
            begun.append(start)
            return prepare_sources(files, start=start)

        write_set(rows, output, shard_samples=6, job={"a": 1}, **settings)

    with pytest.raises(
        ConfigError, match=r"weight of 'bgi': no samples .*; what is packed is kept: correct it and rerun"
    ):
        pack_with(weights={"bgi": 2.0})
    with pytest.raises(ConfigError, match=r"more than max-rejected 0 allows; .* kept: allow more and rerun"):
        pack_with(max_rejected=0.0)
    pack_with()
    assert begun[0] is None
    assert None not in begun[1:]
    pack(files, tmp_path / "whole")
    assert SampleSet.open(output).digest == SampleSet.open(tmp_path / "whole").digest


@pytest.mark.parametrize(("grace", "shards"), [(600.0, 2), (1e-6, 1)])
def test_sigterm_finishes_the_shard_in_hand_if_that_fits(
    grace: float, shards: int, files: list[Path], tmp_path: Path
) -> None:
    def rows(start: RowPlace | None) -> Iterator[Outcome]:
        samples = 0
        for row in prepare_sources(files, start=start):
            samples += not isinstance(row, RejectedRow)
            if samples == 9 and start is None:
                os.kill(os.getpid(), signal.SIGTERM)
                start = RowPlace("", 0)
            yield row

    job, output = {"a": 1}, tmp_path / "out" / "set"
    with interruptible(), Grace(grace) as stop, pytest.raises(Stopped) as stopped:
        write_set(rows, output, shard_samples=6, job=job, grace=stop)
    assert (stopped.value.kept, bool(stopped.value.finished)) == (
        f"{counted(shards, 'shard')} of {output} kept",
        shards == 2,
    )
    write_set(lambda start: prepare_sources(files, start=start), output, shard_samples=6, job=job)
    pack(files, tmp_path / "whole")
    assert SampleSet.open(output).digest == SampleSet.open(tmp_path / "whole").digest


@pytest.mark.slow
def test_killed_by_the_kernel(files: list[Path], tmp_path: Path) -> None:
    """The command itself, with SIGKILL after one more shard each time, then to the end."""
    command = [sys.executable, "-m", "llavamod_offline", "pack", *map(str, files), "--shard-samples", "15"]
    subprocess.run([*command, "-o", "whole"], cwd=tmp_path, check=True, capture_output=True)
    for _ in range(200):
        process = subprocess.Popen([*command, "-o", "cut"], cwd=tmp_path, stdout=subprocess.DEVNULL)
        journal = tmp_path / ".cut.packing" / "journal"
        before = len(list(journal.glob("*.jsonl")))
        while process.poll() is None and len(list(journal.glob("*.jsonl"))) <= before:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (tmp_path / "cut").exists():
            break
    expected = contents(tmp_path / "whole")
    found = contents(tmp_path / "cut")
    assert {name.replace("cut", "whole"): value for name, value in found.items() if name != "set.json"} == {
        name: value for name, value in expected.items() if name != "set.json"
    }


def test_a_full_disk_keeps_what_is_done(tmp_path: Path) -> None:
    """No file may exceed 200 KiB, so the last sample does not fit."""
    rows = [{"id": n, "prompt": "a", "completion": "b" * (300_000 if n == 20 else 10)} for n in range(21)]
    write_rows(tmp_path / "rows.json", rows)
    command = f"{sys.executable} -m llavamod_offline pack rows.json --shard-samples 5 --workers 1 --output"
    full = subprocess.run(
        f"ulimit -f 200; exec {command} set", shell=True, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert full.returncode == 2
    assert "output 'set': cannot be written: " in full.stderr
    assert full.stderr.rstrip().endswith("; rerun to continue from .set.packing")
    again = subprocess.run(f"{command} set", shell=True, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "set: continuing after 20 samples" in again.stderr
    subprocess.run(f"{command} whole --name set", shell=True, cwd=tmp_path, capture_output=True, check=True)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole")
