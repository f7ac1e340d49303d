"""`llavamod-offline pack`, `index` and `doctor` as users type them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llavamod_offline.cli import app
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.entrypoint import run_command
from tests.llavamod_offline.data.tars.foreign_tars import write_tar
from tests.tiny import tiny_image

TALK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "That."}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small mixture as users have it: images, a JSON file with a bad row, and a parquet file of pairs."""
    (tmp_path / "pictures").mkdir()
    for number in range(3):
        (tmp_path / "pictures" / f"{number}.png").write_bytes(tiny_image(number))
    rows: list[dict[str, Any]] = [{"id": f"p/{n}", "image": f"{n}.png", "conversations": TALK} for n in range(4)]
    rows.append({"id": "t", "conversations": [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "Yes."}]})
    (tmp_path / "chat.json").write_text(json.dumps(rows))
    columns = {"image": [{"bytes": tiny_image(7), "path": "x"}], "question": ["Q?"], "chosen": ["A"], "rejected": ["B"]}
    pq.write_table(pa.table(columns), tmp_path / "pairs.parquet")
    return tmp_path


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    status: int | str | None
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in that folder, in this process."""

    def run_here(*arguments: str) -> Result:
        with pytest.raises(SystemExit) as caught:
            run_command(app, arguments)
        captured = capsys.readouterr()
        return Result(caught.value.code, captured.out, captured.err)

    monkeypatch.chdir(folder)
    return run_here


def test_pack(folder: Path, run: Run) -> None:
    result = run("pack", "chat.json", "pairs.parquet", "--images", "pictures", "--output", "sets/mine")
    assert (result.status, result.err) == (0, "")
    assert result.out == (
        "packed 5 samples (4 conversations, 1 preference, 4 images) into sets/mine: 1 shard, 0.0 MB\n"
        "rejected 1 of 6 rows, listed in sets/mine/rejected.jsonl:\n"
        "         1  missing image\n"
        "  all for one reason, as in chat.json row 3: image '3.png': no such file in 'pictures'\n"
    )
    packed = SampleSet.open(folder / "sets" / "mine")
    assert packed.keys == ["p_x2F0", "p_x2F1", "p_x2F2", "t", "pairs-000000000"]
    assert packed.shard_names == ["mine-000000"]
    assert packed.read(4, verify=True) == Sample(
        "pairs-000000000", (Turn("user", "<image>\nQ?"),), (tiny_image(7),), ("png",), "A", "B", "pairs"
    )
    rejected = json.loads((folder / "sets" / "mine" / "rejected.jsonl").read_text())
    assert (rejected["key"], rejected["kind"], rejected["row"]) == ("p_x2F3", "missing image", 3)


def test_options(folder: Path, run: Run) -> None:
    arguments = ["pack", "chat.json", "--images", "pictures", "--output", "set", "--name", "n", "--shard-samples", "2"]
    result = run(*arguments, "--keys", "row", "--json")
    summary = json.loads(result.out)
    assert (summary["samples"], summary["shards"], summary["rejected_by_kind"]) == (4, 2, {"missing image": 1})
    packed = SampleSet.open(folder / "set")
    assert packed.shard_names == ["n-000000", "n-000001"]
    assert packed.keys == [f"chat-{row:09d}" for row in (0, 1, 2, 4)]
    refused = run(*arguments)
    assert (refused.status, refused.out) == (2, "")
    assert refused.err == "error: output 'set' exists: choose another folder, or replace it with --overwrite\n"
    assert run(*arguments, "--overwrite").status == 0
    assert SampleSet.open(folder / "set").keys == ["p_x2F0", "p_x2F1", "p_x2F2", "t"]


def test_errors_leave_nothing(folder: Path, run: Run) -> None:
    rows = json.loads((folder / "chat.json").read_text())
    (folder / "again.jsonl").write_text("\n" + json.dumps(rows[0]))
    (folder / "cut.json").write_text(json.dumps(rows)[:-5])
    (folder / "empty.json").write_text("[]")
    before = sorted(folder.iterdir())
    cases = [
        (["none.json"], "error: source 'none.json': no such file"),
        (["empty.json"], "error: 'empty.json': nothing to pack: no sample in 0 rows"),
        (["chat.json", "cut.json"], "error: duplicate key 'p_x2F0': chat.json row 0 and cut.json row 0: number the "),
        (["chat.json", "again.jsonl"], "chat.json row 0 and again.jsonl row 1: number the rows with --keys row"),
        (["cut.json"], "error: cut.json: row 4 (character "),
        (["chat.json", "--images", "nowhere"], "error: image folder 'nowhere': no such folder"),
        (["chat.json", "--name", "a/b"], "error: set name 'a/b': "),
        (["chat.json", "--keys", "none"], "invalid value for '--keys': 'none' is not one of"),
    ]
    for arguments, problem in cases:
        result = run("pack", *arguments, "--images", "pictures", "--output", "set")
        assert (result.status, result.out) == (2, ""), result.err
        assert problem in result.err
        assert "Traceback" not in result.err
        if problem.startswith("error"):
            assert result.err.count("\n") == 1
        assert sorted(folder.iterdir()) == before


@pytest.mark.parametrize("wrong", ["chat.json", "chat.tar"])
def test_most_rows_rejected(folder: Path, run: Run, wrong: str) -> None:
    """No set; an exit status, one line with the reason and the remedy, and the full list beside the output."""
    rows = json.loads((folder / "chat.json").read_text())
    (folder / "own" / "deep").mkdir(parents=True)
    (folder / "pictures").rename(folder / "own" / "deep" / "pictures")
    if wrong == "chat.tar":
        entries = [(f"{n}.json", json.dumps(row).encode()) for n, row in enumerate(rows)]
        write_tar(folder / wrong, entries)
        arguments = ["index", wrong, "--output", "set"]
    else:
        arguments = ["pack", wrong, "--images", "own", "--output", "set"]
    result = run(*arguments)
    assert (result.status, result.out, result.err.count("\n")) == (2, "", 1)
    assert result.err.startswith("error: 4 of 5 rows rejected, more than max-rejected 0.5 allows; all for one reason, ")
    end = "; what is packed is kept: allow more and rerun to continue" if wrong == "chat.json" else ""
    assert result.err.endswith(f"; every rejected row is listed in set.rejected.jsonl{end}\n")
    assert ("try --images own/deep/pictures" in result.err) is (wrong == "chat.json")
    assert [json.loads(line)["row"] for line in (folder / "set.rejected.jsonl").read_text().splitlines()] == [
        0,
        1,
        2,
        3,
    ]
    assert not (folder / "set").exists()
    assert run(*arguments, "--max-rejected", "0.8").status == 0
    assert (len(SampleSet.open(folder / "set")), (folder / "set.rejected.jsonl").exists()) == (1, False)


def test_images_without_a_folder_and_repeated_ids(folder: Path, run: Run) -> None:
    """Each refusal says what to type next, until the rows are packed."""
    rows = json.loads((folder / "chat.json").read_text())[:3] * 2
    (folder / "mix.json").write_text(json.dumps(rows))
    bare = run("pack", "mix.json", "--output", "set")
    assert bare.err.endswith("no image folder: name one with --images DIR: try --images pictures\n")
    twice = run("pack", "mix.json", "--images", "pictures", "--output", "set")
    assert twice.err.endswith("mix.json row 0 and mix.json row 3: number the rows with --keys row\n")
    assert (bare.status, twice.status) == (2, 2)
    assert run("pack", "mix.json", "--images", "pictures", "--keys", "row", "--output", "set").status == 0


def test_sources_with_names_weights_and_a_limit(folder: Path, run: Run) -> None:
    arguments = ["pack", "talk=chat.json", "pairs.parquet", "--images", "pictures", "--output", "set"]
    result = run(*arguments, "--weight", "talk=2", "--weight", "pairs=0.5", "--max-side", "16", "--workers", "2")
    assert (result.status, result.err) == (0, "")
    assert "shrank 4 images\n" in result.out
    manifest = SampleSet.open(folder / "set").manifest
    assert manifest["sources"] == {"pairs": 1, "talk": 4}
    assert manifest["weights"] == {"pairs": 0.5, "talk": 2.0}
    assert manifest["max_side"] == 16
    refused = run(*arguments, "--overwrite", "--weight", "chat=2")
    assert (refused.status, refused.err) == (
        2, "error: weight of 'chat': no samples from that source: name one of 'pairs', 'talk'"
        "; what is packed is kept: correct it and rerun to continue\n"
    )  # fmt: skip
    assert SampleSet.open(folder / "set").manifest == manifest


def test_index(folder: Path, run: Run) -> None:
    run("pack", "chat.json", "--images", "pictures", "--output", "sets/packed", "--shard-samples", "2")
    before = {path: path.read_bytes() for path in (folder / "sets" / "packed").iterdir()}
    result = run("index", "mine=sets/packed", "--output", "sets/indexed", "--weight", "mine=3")
    assert (result.status, result.err) == (0, "")
    assert result.out.startswith(
        "indexed 4 samples (4 conversations, 0 preferences, 3 images) into sets/indexed: 2 shards, "
    )
    assert {path: path.read_bytes() for path in (folder / "sets" / "packed").iterdir()} == before
    indexed = SampleSet.open(folder / "sets" / "indexed")
    assert indexed.keys == SampleSet.open(folder / "sets" / "packed").keys
    assert indexed.manifest["weights"] == {"mine": 3.0}
    assert [indexed.read(row, verify=True).source for row in range(4)] == ["mine"] * 4
    again = run("index", "sets/packed", "--output", "sets/indexed", "--json", "--overwrite")
    assert json.loads(again.out)["sources"] == {"chat": 4}
    assert run("index", "pictures", "--output", "none").err == "error: source 'pictures': no .tar in this folder\n"


LIST = """
stages: {general: [chat], all: [chat, pairs]}
sources:
  chat: {files: [chat.json], images: [pictures], rows: 5, licence: mit, weight: 2}
  pairs: {files: ["pairs*.parquet"], rows: 1, download: "https://example.org"}
"""


def test_doctor_and_the_stages_of_a_list(folder: Path, run: Run) -> None:
    (folder / "list.yaml").write_text(LIST)
    result = run("doctor", "list.yaml", "--json")
    chat, pairs = json.loads(result.out)
    assert result.status == 1
    assert chat["problems"] == ["missing: 1 of 4 images: . (1)"]
    assert (pairs["problems"], pairs["rows"], pairs["download"]) == ([], 1, "https://example.org")
    (folder / "pictures" / "3.png").write_bytes(tiny_image(3))
    whole = run("doctor", "list.yaml", "--stage", "general")
    assert (whole.status, whole.err) == (0, "")
    assert whole.out.splitlines()[0] == "chat: there"
    assert whole.out.splitlines()[-1] == "1 of 1 data sets are complete below ."
    assert run("doctor", "list.yaml", "--root", "pictures", "--quick").status == 1
    assert run("doctor", "list.yaml", "--stage", "x").err == "error: stage 'x' is unknown: choose one of general, all\n"
    assert run("pack", "--from", "list.yaml", "--stage", "all", "--output", "set").status == 0
    manifest = SampleSet.open(folder / "set").manifest
    assert (manifest["sources"], manifest["weights"]) == ({"chat": 5, "pairs": 1}, {"chat": 2.0})
    assert manifest["licences"] == {"chat": "mit"}
    own = ("pack", "--from", "list.yaml", "--stage", "all", "--output", "licensed")
    assert run(*own, "--licence", "pairs=cc-by 4.0").status == 0
    assert SampleSet.open(folder / "licensed").manifest["licences"] == {"chat": "mit", "pairs": "cc-by 4.0"}
    unknown = run(*own, "--overwrite", "--licence", "pears=mit").err
    assert unknown.startswith("error: licence of 'pears': no samples from that source: name one of 'chat', 'pairs'; ")
    refused = run("pack", "--from", "list.yaml", "--stage", "all", "--root", "pictures", "--output", "other")
    assert "source 'chat': pictures/chat.json is missing: `llavamod-offline doctor` lists the rest" in refused.err
    for command in (("doctor", "list.yaml"), ("pack", "--from", "list.yaml", "--stage", "all", "--output", "other")):
        assert run(*command, "--root", "none").err == "error: --root none: no such folder\n"
    assert run("pack", "--output", "other").status == 2


def test_the_console_script(folder: Path) -> None:
    script = Path(sys.executable).with_name("llavamod-offline")
    command = [str(script), "pack", "chat.json", "--images", "pictures", "--output", "set"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert len(SampleSet.open(folder / "set")) == 4


def test_help_has_examples_and_loads_nothing_heavy(run: Run) -> None:
    result = run("pack", "--help")
    assert result.status == 0
    assert "llavamod-offline pack RLAIF-V-Dataset_*.parquet --output sets/preference" in result.out
    program = (
        "import sys\nfrom llavamod_offline.cli import app\n"
        "try:\n    app(['pack', '--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'pyarrow', 'webdataset', 'numpy'} & set(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert loaded.stdout.splitlines()[-1] == "[]"
