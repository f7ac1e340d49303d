"""Source files of each format, valid and invalid."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from llavamod_offline.data.rows import Located, RejectedRow
from llavamod_offline.data.sample import Sample, Turn, sample_from_json
from llavamod_offline.data.sources.read import prepare_sources
from llavamod_offline.data.sources.source import Source
from tests.tiny import tiny_image

JPG, PNG, WEBP = tiny_image(0, format="JPEG"), tiny_image(1), tiny_image(2, format="WEBP")


def talk(*texts: str) -> list[dict[str, str]]:
    """A conversation in the form of LLaVA's JSON, the user first."""
    return [{"from": "gpt" if index % 2 else "human", "value": text} for index, text in enumerate(texts)]


GOOD = talk("<image>\nWhat?", "That.")
TEXT = talk("Is it?", "Yes.")


def turns(*texts: str) -> tuple[Turn, ...]:
    """The same conversation as a sample's turns."""
    return tuple(Turn("assistant" if index % 2 else "user", text) for index, text in enumerate(texts))


def write_rows(file: Path, rows: list[Any]) -> Path:
    """Write JSON, or JSON Lines if the file's name says so."""
    separator, (opening, closing) = ("\n", ("", "")) if file.suffix == ".jsonl" else (",\n", ("[", "]"))
    file.write_text(opening + separator.join(json.dumps(row) for row in rows) + closing)
    return file


def write_parquet(file: Path, rows: list[dict[str, Any]], **changes: Any) -> Path:
    """Write a table with RLAIF-V's columns."""
    columns: dict[str, Any] = {
        "ds_name": ["RLAIF-V"] * len(rows),
        "image": [row.get("image", {"bytes": JPG, "path": "a.jpg"}) for row in rows],
        "question": [row.get("question", "What?") for row in rows],
        "chosen": [row.get("chosen", "A dog.") for row in rows],
        "rejected": [row.get("rejected", "A cat.") for row in rows],
        "origin_dataset": ["VQAv2"] * len(rows),
        "origin_split": ['{"model": "x"}'] * len(rows),
        "idx": [row.get("idx", number) for number, row in enumerate(rows)],
        "image_path": ["a.jpg"] * len(rows),
    }
    columns = {name: column for name, column in (columns | changes).items() if column is not None}
    pq.write_table(pa.table(columns), file, row_group_size=20)
    return file


def read_sources(files: Sequence[Path | Source], **settings: Any) -> Iterator[Located | RejectedRow]:
    """The samples that the sources' rows become, and rejections."""
    return (
        row
        if isinstance(row, RejectedRow)
        else Located(
            sample_from_json(row.facts.key, row.members[0][1], tuple(image for _, image in row.members[1:])),
            row.file,
            row.row,
        )
        for row in prepare_sources(files, **settings)
    )


def samples(rows: Iterator[Located | RejectedRow]) -> list[Sample]:
    """The samples of rows, none of which may be rejected."""
    found = list(rows)
    assert not [row for row in found if isinstance(row, RejectedRow)]
    return [row.sample for row in found if isinstance(row, Located)]


def only_rejection(tmp_path: Path, row: Any, folders: list[Path]) -> RejectedRow:
    """The rejection of a row placed between two good ones."""
    good = [{"id": name, "conversations": talk("Is it?", "Yes.")} for name in ("first", "last")]
    file = write_rows(tmp_path / "rows.json", [good[0], row, good[1]])
    first, middle, last = read_sources([file], images=folders)
    assert isinstance(first, Located)
    assert isinstance(last, Located)
    assert (first.sample.key, last.sample.key) == ("first", "last")
    assert isinstance(middle, RejectedRow)
    assert (middle.file, middle.row) == (str(file), 1)
    return middle


def write_images(folder: Path) -> Path:
    """Write images of every format, some of them broken, and one outside the folder."""
    (folder / "coco").mkdir(parents=True)
    (folder / "coco" / "a.jpg").write_bytes(JPG)
    (folder / "b.png").write_bytes(PNG)
    (folder / "c.webp").write_bytes(WEBP)
    (folder / "wrong.png").write_bytes(JPG)
    (folder / "cut.jpg").write_bytes(JPG[: len(JPG) // 2])
    (folder / "text.jpg").write_bytes(b"hello")
    (folder.parent / "outside.png").write_bytes(PNG)
    return folder
