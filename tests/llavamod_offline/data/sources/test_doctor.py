"""Which data sets of a list are present, and what is missing."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llavamod_offline.data.pack.prepare import PreparedSources
from llavamod_offline.data.sources.catalogue import SHIPPED, Catalogue, DataSet, read_catalogue, stage_sources
from llavamod_offline.data.sources.doctor import Finding, examine, render
from llavamod_offline.data.sources.read import KeyRule, prepare_sources
from llavamod_offline.data.sources.source import Source
from llavamod_offline.errors import ConfigError, DataError
from tests.tiny import tiny_image

ENTRY = DataSet(files=["a/rows.json"], images=["a/p"], rows=3, licence="mit", download="https://x", note="by hand")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three rows with four images, and a table of two rows."""
    (tmp_path / "a" / "p" / "coco" / "train").mkdir(parents=True)
    for name in ("coco/train/1.png", "coco/train/2.png", "own.png"):
        (tmp_path / "a" / "p" / name).write_bytes(tiny_image(0))
    rows: list[dict[str, Any]] = [{"image": "coco/train/1.png"}, {"image": ["coco/train/2.png", "own.png"]}, {"id": 1}]
    (tmp_path / "a" / "rows.json").write_text(json.dumps(rows))
    for number in range(2):
        pq.write_table(pa.table({"question": ["a", "b"]}), tmp_path / f"t_{number}.parquet")
    return tmp_path


def only(entry: DataSet, root: Path, **settings: Any) -> Finding:
    (finding,) = examine({"mine": entry}, root, **settings)
    return finding


def test_all_there(root: Path) -> None:
    told: list[int] = []
    finding = only(ENTRY, root, advance=told.append)
    size = (root / "a" / "rows.json").stat().st_size
    assert finding == Finding(
        "mine", (str(root / "a" / "rows.json"),), size, 3, "3", 3, "mit", "https://x", "by hand", ()
    )
    assert sum(told) == size
    assert json.loads(json.dumps(finding.to_json()))["problems"] == []
    assert render(finding).splitlines()[0] == "mine: there"
    table = DataSet(files=["t_*.parquet"], rows_about=4)
    assert (only(table, root).rows, only(table, root).problems) == (4, ())
    assert (only(table, root).licence, only(table, root).rows_expected) == ("unknown", "about 4")


def test_what_is_missing(root: Path) -> None:
    (root / "a" / "p" / "coco" / "train" / "1.png").unlink()
    (root / "a" / "p" / "own.png").unlink()
    finding = only(ENTRY, root)
    assert finding.problems == ("missing: 2 of 3 images: coco/train (1), . (1)",)
    assert only(ENTRY, root, count=False).problems == ()
    assert only(ENTRY, root, count=False).rows is None
    absent = DataSet(files=["a/rows.json", "a/none_*.jsonl"], images=["a/p", "b"], rows=9)
    assert only(absent, root).problems == (
        f"missing: {root / 'a' / 'none_*.jsonl'}",
        f"missing: {root / 'b'}/",
        "missing: 2 of 3 images: coco/train (1), . (1)",
    )
    assert render(only(absent, root)).splitlines()[0] == "mine: MISSING"


@pytest.mark.parametrize(
    ("rows", "about", "problem"),
    [
        (4, None, "rows: 3 instead of 4: another version, or truncated"),
        (2, None, "rows: 3 instead of 2: another version, or truncated"),
        (None, 4, "rows: 3 instead of about 4: another version, or truncated"),
        (None, 2, None),
        (None, None, None),
    ],
)
def test_counts(root: Path, rows: int | None, about: int | None, problem: str | None) -> None:
    finding = only(DataSet(files=["a/rows.json"], images=["a/p"], rows=rows, rows_about=about), root)
    assert finding.problems == ((problem,) if problem else ())


def test_damaged_files(root: Path) -> None:
    (root / "a" / "rows.json").write_text('[{"id": 1}, {"id"')
    (root / "t_1.parquet").write_bytes(b"PAR1")
    (root / "b.jsonl").write_text('{"id": 1}\n17\n{bad\n{"image": "/etc/passwd"}\n{"image": 3}\n')
    assert "row 1" in only(ENTRY, root).problems[0]
    assert "cannot be read as parquet" in only(DataSet(files=["t_*.parquet"]), root).problems[0]
    assert only(DataSet(files=["b.jsonl"]), root).problems == (
        "unreadable: 3 rows",
        "missing: 1 of 1 images: /etc (1)",
    )


def test_the_shipped_list() -> None:
    """Every stage of the original is listed, with where to get each of its sets."""
    catalogue = read_catalogue(SHIPPED)
    assert {"align", "mimic_dense", "mimic_sparse", "preference"} <= set(catalogue.stages)
    for name, entry in catalogue.of_stage(None).items():
        assert entry.download is not None, name
        assert name in {listed for stage in catalogue.stages.values() for listed in stage}
    assert catalogue.sources["rlaif_v"].rows == 83_132
    assert catalogue.sources["rlaif_v"].licence == "cc-by-nc-4.0"
    assert catalogue.sources["sharegpt4v_captioner"].rows_about == 1_246_000
    today = {"finevision": 24_300_000, "llava_onevision_1_5_mid_training": 85_000_000,
             "llava_onevision_1_5_instruct": 22_000_000, "mmpr": 3_000_000}  # fmt: skip
    assert {name: catalogue.sources[name].rows_about for name in today} == today
    assert all(catalogue.sources[name].licence for name in today)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("stages: {align: [x]}", "stage 'align': source 'x' is unknown"),
        ("sources: {x: {files: []}}", "source 'x': names no files"),
        ("sources: {x: {files: [a.json, /b.json]}}", "'/b.json' must be a path below the root folder"),
        ("sources: {x: {files: [../b.json]}}", "must be a path below the root folder"),
        ("sources: {x: {files: [a.json], images: [..]}}", "must be a path below the root folder"),
        ("sources: {x: {files: [a.tar]}}", "must end in one of .json, .jsonl, .parquet"),
        ("sources: {x: {files: [a.json], row: 3}}", "sources.x.row"),
        ("sources: {x: {files: [a.json], rows: many}}", "sources.x.rows"),
        ("[1, 2]", "must hold a mapping"),
    ],
)
def test_lists_that_make_no_sense(tmp_path: Path, content: str, problem: str) -> None:
    (tmp_path / "s.yaml").write_text(content)
    with pytest.raises(ConfigError) as caught:
        read_catalogue(tmp_path / "s.yaml")
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_of_a_stage(root: Path) -> None:
    table = DataSet(files=["t_*.parquet"], weight=0.5)
    catalogue = Catalogue({"mine": ENTRY, "pairs": table, "none": DataSet(files=["n.json"])}, {"s": ["pairs", "mine"]})
    sources, weights, licences = stage_sources(catalogue, "s", root)
    assert sources == [
        Source(root / "t_0.parquet", "pairs"),
        Source(root / "t_1.parquet", "pairs"),
        Source(root / "a" / "rows.json", "mine", (root / "a" / "p",)),
    ]
    assert weights == {"pairs": 0.5}
    assert licences == {"mine": "mit"}
    with pytest.raises(ConfigError, match="stage 'x' is unknown: choose one of s"):
        stage_sources(catalogue, "x", root)
    with pytest.raises(
        DataError, match=r"source 'none': .*n\.json is missing: `llavamod-offline doctor` lists the rest"
    ):
        stage_sources(Catalogue(catalogue.sources, {"s": ["none"]}), "s", root)


def test_files_of_equal_names_in_several_folders(tmp_path: Path) -> None:
    """As in FineVision: their rows get distinct keys, whatever their ids."""
    for folder in ("ai2d", "chartqa"):
        (tmp_path / "fine" / folder).mkdir(parents=True)
        table = pa.Table.from_pylist([{"texts": [{"user": "a?", "assistant": "b"}], "images": None}])
        pq.write_table(table, tmp_path / "fine" / folder / "train-00000-of-00001.parquet")
    catalogue = Catalogue({"fine": DataSet(files=["fine/*/*.parquet"])}, {"s": ["fine"]})
    sources, _, _ = stage_sources(catalogue, "s", tmp_path)
    rules: tuple[KeyRule, ...] = ("id", "row")
    for keys in rules:
        found = [row.facts for row in prepare_sources(sources, keys=keys) if isinstance(row, PreparedSources)]
        assert {facts.source for facts in found} == {"fine"}
        assert [facts.key for facts in found] == [
            f"{folder}_x2Ftrain-00000-of-00001-000000000" for folder in ("ai2d", "chartqa")
        ]


def test_images_as_chat_rows_have_them(root: Path) -> None:
    held = "data:image/png;base64," + base64.b64encode(tiny_image(0)).decode()
    rows = [{"images": ["own.png", {"path": "lost.png", "bytes": None}]}, {"images": [{"path": held}]}]
    (root / "a" / "rows.json").write_text(json.dumps(rows))
    finding = only(DataSet(files=["a/rows.json"], images=["a/p"]), root)
    assert (finding.images, finding.problems) == (3, ("missing: 1 of 3 images: . (1)",))


def test_linked_folders_and_dead_links(root: Path) -> None:
    (root / "linked").symlink_to("a")
    (root / "a" / "up").symlink_to("..")
    (root / "a" / "gone.json").symlink_to("nowhere.json")
    finding = only(DataSet(files=["linked/**/rows.json"], images=["a/p"]), root)
    assert str(root / "linked" / "rows.json") in finding.files
    broken = DataSet(files=["linked/*.json"], images=["a/p"])
    lost = f"{root / 'linked' / 'gone.json'} is a link to 'nowhere.json', which does not exist"
    assert f"missing: {lost}" in only(broken, root).problems
    with pytest.raises(DataError, match=f"{re.escape(lost)}: remove it, or restore what it leads to"):
        stage_sources(Catalogue({"x": broken}, {"s": ["x"]}), "s", root)
