"""Writing sets: completely or not at all, the same bytes for the same rows, every row accounted for."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tarfile
import tracemalloc
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.rows import Located, RejectedRow
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import ConfigError, DataError
from llavamod_offline.storage.lock import LockOwner, locked_beside
from tests.tiny import tiny_image, tiny_samples

Rows = list[Sample | Located | RejectedRow]


def text_sample(key: str, answer: str = "Yes.") -> Sample:
    return Sample(key, (Turn("user", "Is it?"), Turn("assistant", answer)), source="text")


def rejection(key: str, kind: str = "missing image") -> RejectedRow:
    return RejectedRow(key, kind, f"why not {key} \ud800", "rows.json", 7)  # type: ignore[arg-type]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_same_rows_same_bytes(tmp_path: Path) -> None:
    rows: Rows = [*tiny_samples(20), rejection("a"), *tiny_samples(5, preference=True)]
    for name in ("one", "two"):
        write_set(rows, tmp_path / name, name="tiny", shard_samples=7)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_manifest_and_summary(tmp_path: Path) -> None:
    rows: Rows = [*tiny_samples(9), rejection("a"), rejection("b", "malformed row"), rejection("c"), text_sample("t")]
    summary = write_set([*rows, *tiny_samples(3, preference=True)], tmp_path / "set", shard_samples=5)
    manifest = json.loads((tmp_path / "set" / "set.json").read_text())
    images = sum(len(sample.images) for sample in [*tiny_samples(9), *tiny_samples(3)])
    for found in (manifest, summary.to_json()):
        assert found["name"] == "set"
        assert (found["samples"], found["conversations"], found["preferences"]) == (13, 10, 3)
        assert found["images"] == images
        assert found["rejected"] == 3
        assert found["rejected_by_kind"] == {"malformed row": 1, "missing image": 2}
        assert found["sources"] == {"text": 1, "tiny": 12}
        assert found["digest"] == SampleSet.open(tmp_path / "set").digest
    assert summary.shards == len(manifest["shards"]) == 3
    assert summary.bytes == sum(file.stat().st_size for file in (tmp_path / "set").glob("*.tar"))
    assert json.loads(json.dumps(summary.to_json())) == summary.to_json()
    for shard in manifest["shards"]:
        content = (tmp_path / "set" / f"{shard['name']}.tar").read_bytes()
        assert shard["bytes"] == len(content)
        assert shard["sha256"] == hashlib.sha256(content).hexdigest()


def test_digest_is_of_keys_and_contents_not_of_shards(tmp_path: Path) -> None:
    def digest(samples: list[Sample], name: str, shard_samples: int) -> str:
        return write_set(samples, tmp_path / name, shard_samples=shard_samples).digest

    samples = tiny_samples(8)
    expected = hashlib.sha256("".join(f"{s.key} {s.content_hash}\n" for s in samples).encode()).hexdigest()
    assert digest(samples, "a", 3) == digest(samples, "b", 100) == expected
    assert digest(samples[::-1], "c", 3) != expected
    assert digest([*samples[:-1], text_sample("t")], "d", 3) != expected


def test_rejected_rows_are_listed(tmp_path: Path) -> None:
    write_set([rejection("a"), text_sample("t"), rejection("b", "malformed row")], tmp_path / "set")
    lines = (tmp_path / "set" / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"key": "a", "kind": "missing image", "reason": "why not a \ud800", "file": "rows.json", "row": 7},
        {"key": "b", "kind": "malformed row", "reason": "why not b \ud800", "file": "rows.json", "row": 7},
    ]


def test_image_bytes_pass_through(tmp_path: Path) -> None:
    encoded = (tiny_image(0, format="JPEG"), tiny_image(1, format="WEBP"), tiny_image(2))
    turns = (Turn("user", "<image><image><image>?"), Turn("assistant", "Three."))
    write_set([Sample("k", turns, encoded, ("jpg", "webp", "png"))], tmp_path / "set")
    with tarfile.open(tmp_path / "set" / "set-000000.tar") as tar:
        assert tar.getnames() == ["k.json", "k.0.jpg", "k.1.webp", "k.2.png"]
        for member, content in zip(tar.getnames()[1:], encoded, strict=True):
            stream = tar.extractfile(member)
            assert stream is not None
            assert stream.read() == content


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=12), limit=st.integers(1, 5))
def test_shards_keep_to_their_limits(tmp_path_factory: pytest.TempPathFactory, sizes: list[int], limit: int) -> None:
    folder = tmp_path_factory.mktemp("limits") / "set"
    samples = [text_sample(f"k{number}", "y" * size) for number, size in enumerate(sizes)]
    write_set(samples, folder, shard_samples=limit, shard_bytes=6000)
    packed = SampleSet.open(folder)
    assert [packed.read(row) for row in range(len(packed))] == samples
    for shard in packed.shards:
        assert 1 <= shard.samples <= limit
        members = sum(
            member["size"]
            for row in packed.rows_of(shard.name)
            for member in packed.index.slice(row, 1).to_pylist()[0]["members"]
        )
        assert shard.samples == 1 or members <= 6000


def test_duplicate_keys_name_both_rows(tmp_path: Path) -> None:
    rows = [
        Located(text_sample("a"), "one.json", 0),
        Located(text_sample("b"), "one.json", 4),
        Located(text_sample("b", "No."), "two.json", 2),
    ]
    with pytest.raises(DataError) as caught:
        write_set(rows, tmp_path / "set", duplicate_hint="number the rows")
    assert str(caught.value) == "duplicate key 'b': one.json row 4 and two.json row 2: number the rows"
    assert not list(tmp_path.iterdir())
    with pytest.raises(DataError, match="duplicate key 'a': samples row 0 and samples row 1"):
        write_set([text_sample("a"), text_sample("a")], tmp_path / "set")


def test_nothing_to_pack(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no sample in 0 rows$"):
        write_set([], tmp_path / "set")
    assert not list(tmp_path.iterdir())
    with pytest.raises(
        DataError, match=r"no sample in 2 rows; the first: rows.json row 7: why not a .*; every rejected "
    ):
        write_set([rejection("a"), rejection("b")], tmp_path / "set")
    assert listed(tmp_path / "set.rejected.jsonl") == ["a", "b"]


def listed(file: Path) -> list[str]:
    return [json.loads(line)["key"] for line in file.read_text().splitlines()]


def test_too_many_rejected(tmp_path: Path) -> None:
    rows: Rows = [text_sample("a"), rejection("b"), text_sample("c"), rejection("d")]
    write_set(rows, tmp_path / "half", max_rejected=0.5)
    refusal = r"2 of 4 rows rejected, more than max-rejected 0\.49 allows; the first: .* in .*set\.rejected\.jsonl"
    with pytest.raises(ConfigError, match=refusal):
        write_set(rows, tmp_path / "set", max_rejected=0.49)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["half", "set.rejected.jsonl"]
    assert listed(tmp_path / "set.rejected.jsonl") == ["b", "d"]
    with pytest.raises(ConfigError, match="more than max-rejected 0 allows"):
        write_set(rows[:2], tmp_path / "half", max_rejected=0, overwrite=True)
    assert listed(tmp_path / "half.rejected.jsonl") == ["b"]
    assert listed(tmp_path / "half" / "rejected.jsonl") == ["b", "d"]
    write_set(rows, tmp_path / "set")
    assert not (tmp_path / "set.rejected.jsonl").exists()


def test_existing_output(tmp_path: Path) -> None:
    output = tmp_path / "set"
    write_set([text_sample("a")], output)
    before = contents(output)
    with pytest.raises(DataError, match="exists: choose another folder, or replace it with --overwrite"):
        write_set([text_sample("b")], output)
    with pytest.raises(DataError, match="duplicate"):
        write_set([text_sample("b"), text_sample("b")], output, overwrite=True)
    assert contents(output) == before
    write_set([text_sample("b")], output, overwrite=True)
    assert SampleSet.open(output).keys == ["b"]
    assert list(tmp_path.iterdir()) == [output]


def test_a_second_command_on_the_output_is_refused(tmp_path: Path) -> None:
    """Without a lock, the one that finishes last would find the output taken, or replace it."""
    with locked_beside(tmp_path / "set"), pytest.raises(ConfigError, match=f"^output: {tmp_path}/set is in use by "):
        write_set([text_sample("a")], tmp_path / "set")
    write_set([text_sample("a")], tmp_path / "set")
    assert list(tmp_path.iterdir()) == [tmp_path / "set"]
    killed = replace(LockOwner.this_process(), started="1")  # killed with the set complete but the lock not released
    (tmp_path / ".set.lock").write_text(json.dumps(asdict(killed)))
    with pytest.raises(DataError, match="exists: choose another folder"):
        write_set([text_sample("a")], tmp_path / "set")
    assert list(tmp_path.iterdir()) == [tmp_path / "set"]


def test_overwrite_spares_a_set_that_holds_something_else(tmp_path: Path) -> None:
    """Such as a student trained into it by mistake."""
    write_set([text_sample("a")], tmp_path / "set")
    (tmp_path / "set" / "student").mkdir()
    with pytest.raises(DataError, match="holds more than a set, such as 'student', so --overwrite does not replace it"):
        write_set([text_sample("b")], tmp_path / "set", overwrite=True)
    assert (tmp_path / "set" / "student").is_dir()


def test_overwrite_spares_what_is_no_set(tmp_path: Path) -> None:
    other = tmp_path / "photos"
    other.mkdir()
    (other / "mine.jpg").write_bytes(b"dear")
    file = tmp_path / "file"
    file.write_text("dear")
    link = tmp_path / "link"
    write_set([text_sample("a")], tmp_path / "real")
    link.symlink_to(tmp_path / "real")
    for output, overwrite in itertools.product((other, file, link), (False, True)):
        with pytest.raises(DataError, match="exists, and is not a set that --overwrite replaces: choose another"):
            write_set([text_sample("a")], output, overwrite=overwrite)
    assert (other / "mine.jpg").read_bytes() == b"dear"


def test_outputs_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("dear")
    with pytest.raises(ConfigError, match=r"^output: .*/file/set cannot be written \("):
        write_set([text_sample("a")], tmp_path / "file" / "set")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(DataError, match="exists, and is not a set that --overwrite replaces: choose another folder"):
        write_set([text_sample("a")], Path())
    write_set([text_sample("a")], tmp_path / "set")
    monkeypatch.chdir(tmp_path / "set")
    write_set([text_sample("b")], Path(), overwrite=True)
    assert SampleSet.open(tmp_path / "set").keys == ["b"]


@pytest.mark.parametrize("name", ["a/b", "a.b", "", "ü"])
def test_names_of_sets(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match="choose another with --name"):
        write_set([text_sample("a")], tmp_path / "set", name=name)
    write_set([text_sample("a")], tmp_path / "set", name="other")
    assert SampleSet.open(tmp_path / "set").shard_names == ["other-000000"]


@pytest.mark.parametrize(
    ("folder", "shard"), [("v1.5", "v1_x2E5"), ("my set", "my_x20set"), ("ü", "_xC3_xBC"), ("a_x", "a_x")]
)
def test_a_set_folder_may_have_any_name(tmp_path: Path, folder: str, shard: str) -> None:
    write_set([text_sample("a")], tmp_path / folder)
    assert SampleSet.open(tmp_path / folder).shard_names == [f"{shard}-000000"]
    assert SampleSet.open(tmp_path / folder).keys == ["a"]


def test_an_error_while_reading_leaves_nothing(tmp_path: Path) -> None:
    def rows() -> Iterator[Sample]:
        yield text_sample("a")
        raise DataError("the file ends here")

    with pytest.raises(DataError, match="the file ends here"):
        write_set(rows(), tmp_path / "set")
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys
from pathlib import Path
from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sample import Sample, Turn

def rows():
    for number in range(40):
        if number == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        yield Sample(f"k{number}", (Turn("user", "Is it?"), Turn("assistant", "Yes.")))

write_set(rows(), Path(sys.argv[1]), shard_samples=10)
"""


def test_a_kill_leaves_nothing_under_the_name(tmp_path: Path) -> None:
    output = tmp_path / "set"
    command = [sys.executable, "-c", KILLED, str(output), "25"]
    assert subprocess.run(command, check=False, env=os.environ).returncode == -signal.SIGKILL
    assert not output.exists()
    assert list(tmp_path.iterdir()), "the kill came too early to leave anything aside"
    write_set([text_sample("a")], output)
    assert list(tmp_path.iterdir()) == [output]


def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    """120 samples of 1 MB each pass through in the memory of a few."""
    turns = (Turn("user", "<image>?"), Turn("assistant", "Yes."))
    body = os.urandom(2**20)

    def rows() -> Iterator[Sample]:
        for number in range(120):
            yield Sample(f"k{number}", turns, (number.to_bytes(4, "big") + body,), ("jpg",))

    write_set([text_sample("a")], tmp_path / "warm")  # imports are not what is measured
    tracemalloc.start()
    write_set(rows(), tmp_path / "set", shard_samples=50)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12 * 2**20


def test_weights(tmp_path: Path) -> None:
    rows = [text_sample("a"), *tiny_samples(2)]
    summary = write_set(rows, tmp_path / "set", weights={"tiny": 2.5, "text": 0})
    manifest = json.loads((tmp_path / "set" / "set.json").read_text())
    assert manifest["weights"] == summary.weights == {"text": 0, "tiny": 2.5}
    with pytest.raises(ConfigError, match="weight of 'other': no samples from that source: name one of 'text'"):
        write_set(rows, tmp_path / "unknown", weights={"other": 2})
    for weight in (-1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match=r"weight of 'tiny' is .*: must be a number from 0"):
            write_set(rows, tmp_path / "bad", weights={"tiny": weight})
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    write_set(rows, tmp_path / "plain")
    assert SampleSet.open(tmp_path / "plain").manifest["weights"] == {}


def test_the_manifest_knows_the_index(tmp_path: Path) -> None:
    write_set([text_sample("a")], tmp_path / "set")
    content = (tmp_path / "set" / "index.arrow").read_bytes()
    expected = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert SampleSet.open(tmp_path / "set").manifest["index"] == expected
