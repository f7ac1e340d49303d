"""Tables as the Hugging Face Hub lays them out, in folders, and as `datasets` saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llavamod_offline.data.rows import Located
from llavamod_offline.data.sources.row_files import ROW_FILES
from llavamod_offline.data.sources.source import Source, check_sources
from llavamod_offline.data.tars.tar_samples import ReadRule
from llavamod_offline.errors import DataError
from tests.llavamod_offline.data.sources.source_files import JPG, TEXT, read_sources, samples


def rows(*numbers: int, **fields: Any) -> pa.Table:
    talk = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "Yes."}]
    held = [{"bytes": JPG, "path": "a.jpg"}]
    return pa.Table.from_pylist([{"messages": talk, "images": held, "note": n} | fields for n in numbers])


def write(file: Path, table: pa.Table) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file)


def found(*sources: Path | Source, **settings: Any) -> list[tuple[str, str]]:
    return [(sample.key, sample.source) for sample in samples(read_sources(sources, **settings))]


def test_a_folder_of_tables(tmp_path: Path) -> None:
    """Parts of one data set with files of the same names in folders of their own, and other files beside them."""
    hub = tmp_path / "FineVision"
    write(hub / "aokvqa" / "train-00000-of-00001.parquet", rows(0, 1))
    write(hub / "chartqa" / "train-00000-of-00001.parquet", rows(2))
    write(tmp_path / "disk2" / "train-00000-of-00001.parquet", rows(3))
    (hub / "far").symlink_to("../disk2")
    (hub / "README.md").write_text("# FineVision")
    (hub / "dataset_infos.json").write_text("{}")
    keys = [f"{part}_x2Ftrain-00000-of-00001-{row:09d}" for part, row in (("aokvqa", 0), ("aokvqa", 1))]
    for rule in ("id", "row"):
        named = found(hub, keys=rule)
        assert [source for _, source in named] == ["aokvqa", "aokvqa", "chartqa", "far"]
        assert [key for key, _ in named[:2]] == keys
    assert {source for _, source in found(Source(hub, "mine"))} == {"mine"}


@pytest.mark.parametrize("beside", ["rows.jsonl", "sub/rows.json", "0.txt"])
def test_tables_beside_other_samples_are_refused(tmp_path: Path, beside: str) -> None:
    """None of them is left out silently; what `datasets` writes about its tables is no sample."""
    folder = tmp_path / "data"
    (folder / "sub").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([{"id": "a", "conversations": TEXT}]), folder / "0.parquet")
    for name in ("0.jpg", "dataset_info.json", "README.txt"):
        (folder / name).write_bytes(JPG)
    assert [source.path.name for source in check_sources([folder], [], by_row=False)] == ["0.parquet"]
    (folder / beside).write_text("[]")
    refusal = rf"holds the table '0\.parquet' and also '{beside}', which would be left out: .* --ignore parquet"
    with pytest.raises(DataError, match=refusal):
        check_sources([folder], [], by_row=False)
    ignoring = ReadRule.of("Describe it.", ["parquet"])
    assert [source.path for source in check_sources([Source(folder, rule=ignoring)], [], by_row=False)] == [folder]
    ignoring = ReadRule.of(None, [beside.rpartition(".")[2]])
    assert len(check_sources([Source(folder, rule=ignoring)], [], by_row=False)) == 1


def test_a_data_set_without_parts(tmp_path: Path) -> None:
    write(tmp_path / "set" / "data" / "train-00000-of-00002.parquet", rows(0))
    write(tmp_path / "set" / "data" / "train-00001-of-00002.parquet", rows(1, ds_name="own"))
    assert [source for _, source in found(tmp_path / "set")] == ["set", "own"]


@pytest.mark.parametrize("workers", [1, 2])
def test_saved_by_datasets(tmp_path: Path, workers: int) -> None:
    """`save_to_disk` writes Arrow streams; Arrow files are read, too."""
    datasets.Dataset(rows(*range(70))).save_to_disk(tmp_path / "saved", num_shards=2)
    assert len(found(tmp_path / "saved", workers=workers)) == 70
    table = rows(*range(40))
    with pa.OSFile(str(tmp_path / "one.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    told: list[int] = []
    keys = [key for key, _ in found(tmp_path / "one.arrow", advance=told.append)]
    assert keys == [f"one-{row:09d}" for row in range(40)]
    assert sum(told) == (tmp_path / "one.arrow").stat().st_size
    outline = list(ROW_FILES[".arrow"].outline(tmp_path / "one.arrow", told.append))
    assert [number for number, _ in outline] == list(range(40))


def test_what_is_no_arrow_file(tmp_path: Path) -> None:
    (tmp_path / "a.arrow").write_bytes(b"hello")
    with pytest.raises(DataError, match=r"a\.arrow: cannot be read as Arrow: "):
        list(read_sources([tmp_path / "a.arrow"]))


def test_only_the_columns_that_samples_need_are_read(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", rows(0, 1))
    [some] = ROW_FILES[".parquet"].rows(tmp_path / "a.parquet", lambda size: None, 0)
    assert list(some.listed()[0][1]) == ["messages", "images"]
    assert all(isinstance(row, Located) for row in read_sources([tmp_path / "a.parquet"]))
