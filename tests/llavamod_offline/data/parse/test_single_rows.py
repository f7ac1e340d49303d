"""Rows as public sets hold them, one by one: preferences, unpaired answers, and what is rejected."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from llavamod_offline.data.parse.members import sample_from_members
from llavamod_offline.data.rows import Located, RejectedRow
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.data.tars.tar_index import TarSource, index_tars
from llavamod_offline.errors import DataError
from tests.llavamod_offline.data.parse.packed_rows import pack
from tests.llavamod_offline.data.sources.source_files import JPG, read_sources, write_rows
from tests.llavamod_offline.data.tars.foreign_tars import write_tar
from tests.llavamod_offline.data.tars.test_tar_index import read_all

ASK = [{"role": "user", "content": "Is it?"}]
YES, NO = ([{"role": "assistant", "content": text}] for text in ("Yes.", "No."))
PAIR = Sample("k", (Turn("user", "Is it?"),), chosen="Yes.", rejected="No.", source="rows")
PREFERENCES: dict[str, dict[str, Any]] = {
    "TRL, texts": {"prompt": "Is it?", "chosen": "Yes.", "rejected": "No."},
    "TRL, messages": {"prompt": ASK, "chosen": YES, "rejected": NO},
    "TRL, implicit prompt": {"chosen": ASK + YES, "rejected": ASK + NO},
    "prompt repeated": {"prompt": "Is it?", "chosen": ASK + YES, "rejected": ASK + NO},
    "LlamaFactory": {"conversations": [{"from": "human", "value": "Is it?"}],
                     "chosen": {"from": "gpt", "value": "Yes."}, "rejected": {"from": "gpt", "value": "No."}},
    "ms-swift": {"messages": ASK + YES, "rejected_response": "No."},
    "question": {"question": "Is it?", "chosen": "Yes.", "rejected": "No."},
}  # fmt: skip


@pytest.mark.parametrize("form", PREFERENCES)
def test_preferences(tmp_path: Path, form: str) -> None:
    assert pack(write_rows(tmp_path / "rows.json", [PREFERENCES[form] | {"id": "k"}])) == [PAIR]


UNPAIRED: dict[str, dict[str, Any]] = {
    "TRL, texts": {"prompt": "Is it?", "completion": "Yes."},
    "TRL, messages": {"prompt": ASK, "completion": YES},
    "ms-swift": {"messages": ASK + YES},
    "ShareGPT": {"conversations": [{"from": "human", "value": "Is it?"}, {"from": "gpt", "value": "Yes."}]},
}


@pytest.mark.parametrize("desirable", [True, False])
@pytest.mark.parametrize("tag", ["label", "kto_tag"])
@pytest.mark.parametrize("form", UNPAIRED)
def test_unpaired_answers(tmp_path: Path, form: str, tag: str, desirable: bool) -> None:
    """In JSON, in parquet beside rows of other forms, and in tars, each becomes one half of a pair."""
    row = UNPAIRED[form] | {"id": "k", tag: desirable}
    expected = replace(PAIR, chosen="Yes." if desirable else None, rejected=None if desirable else "Yes.")
    assert pack(write_rows(tmp_path / "rows.json", [row])) == [expected]
    pq.write_table(pa.Table.from_pylist([row, row | {"id": "l", tag: None}]), tmp_path / "rows.parquet")
    judged, plain = pack(tmp_path / "rows.parquet")
    assert judged == expected
    assert isinstance(plain, Sample)
    assert plain.turns == (Turn("user", "Is it?"), Turn("assistant", "Yes."))
    write_tar(tmp_path / "x.tar", [("k.json", json.dumps(row).encode())])
    index_tars([TarSource(tmp_path / "x.tar", "rows")], tmp_path / "set")
    assert read_all(tmp_path / "set") == [expected]


def test_an_unpaired_answer_after_earlier_turns_with_an_image(tmp_path: Path, images: Path) -> None:
    """The assistant's earlier answers are context, as in a pair; a label that is text means something else."""
    ask = [{"role": "user", "content": [IMAGE, {"type": "text", "text": "What?"}]}]
    row = {"id": "k", "messages": [*ask, *YES, *ASK, *NO], "images": ["a.jpg"], "label": False}
    turns = (Turn("user", "<image>\nWhat?"), Turn("assistant", "Yes."), Turn("user", "Is it?"))
    expected = Sample("k", turns, (JPG,), ("jpg",), rejected="No.", source="rows")
    assert pack(write_rows(tmp_path / "rows.json", [row]), images) == [expected]
    [found] = pack(write_rows(tmp_path / "rows.json", [row | {"label": "cat"}]), images)
    assert isinstance(found, Sample)
    assert found.kind == "conversation"


def test_a_preference_with_an_image_part(tmp_path: Path, images: Path) -> None:
    part = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Is it?"}]}]
    row = {"id": "k", "prompt": part, "chosen": YES, "rejected": NO, "images": ["a.jpg"]}
    [found] = pack(write_rows(tmp_path / "rows.json", [row]), images)
    assert found == Sample("k", (Turn("user", "<image>\nIs it?"),), (JPG,), ("jpg",), "Yes.", "No.", "rows")


@pytest.mark.parametrize("none", ["[]", "", " [] ", "null", []])
def test_a_row_without_tools_beside_rows_with_some(tmp_path: Path, none: Any) -> None:
    [found] = pack(write_rows(tmp_path / "rows.json", [{"id": "k", "messages": ASK + YES, "tools": none}]))
    assert isinstance(found, Sample)


def test_prompt_and_completion(tmp_path: Path) -> None:
    rows = [{"id": "k", "prompt": "Is it?", "completion": "Yes."}, {"id": "k2", "prompt": ASK, "completion": YES}]
    found = pack(write_rows(tmp_path / "rows.json", rows))
    assert [sample.turns for sample in found if isinstance(sample, Sample)] == [
        (Turn("user", "Is it?"), Turn("assistant", "Yes."))
    ] * 2


IMAGE = {"type": "image"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [{"role": "user", "content": [IMAGE, IMAGE]}, *YES], "images": ["a.jpg"]},
         "placeholder mismatch: 2 image parts for 1 image"),
        ({"messages": [{"role": "user", "content": [IMAGE, {"type": "text", "text": "<image>"}]}, *YES],
          "images": ["a.jpg"]}, "placeholder mismatch: 2 '<image>' in the user's turns for 1 image"),
        ({"messages": ASK + YES, "images": ["a.jpg"]},
         "placeholder mismatch: has 1 image that its text does not refer to (0 '<image>')"),
        ({"messages": [{"role": "user", "content": [{"type": "video", "video": "a.mp4"}]}, *YES]},
         "unsupported media: 'messages' turn 0, part 0 is video"),
        ({"messages": [*ASK, {"role": "assistant", "content": [IMAGE]}], "images": ["a.jpg"]},
         "placeholder mismatch: has 1 image that its"),
        ({"messages": [*ASK, YES[0] | {"loss": False}]}, "bad conversation: 'messages' turn 1 has 'loss' False"),
        ({"messages": [*ASK, YES[0] | {"weight": 0}]}, "bad conversation: 'messages' turn 1 has 'weight' 0"),
        ({"messages": [{"role": "user", "content": [{"type": "file"}]}]}, "malformed row: 'messages' turn 0, part 0: "),
        ({"messages": [*ASK, *YES, {"role": "system", "content": "s"}]}, "bad conversation: turn 2 is by 'system'"),
        ({"messages": [{"role": "system", "content": "<image>"}, *ASK, *YES], "images": ["a.jpg"]},
         "placeholder mismatch: "),
        ({"texts": [{"user": "a"}]}, "malformed row: 'texts' pair 0: expected strings 'user' and 'assistant'"),
        ({"prompt": ASK + YES + ASK, "completion": "A."}, "bad conversation: 'prompt' has answers"),
        ({"prompt": "a", "completion": "b", "label": "good"}, "malformed row: field 'label' is 'good': expected"),
        ({"prompt": "a", "completion": "b", "label": 1}, "malformed row: field 'label' is 1: expected true or false"),
        ({"messages": ASK + YES, "kto_tag": "yes"}, "malformed row: field 'kto_tag' is 'yes': expected true or false"),
        ({"messages": ASK + YES, "label": 0}, "malformed row: field 'label' is 0: expected true or false, whether the "
         "last answer is desirable; if it says something else, rename it"),
        ({"messages": ASK, "label": True}, "bad conversation: has 'label', but does not end with an answer"),
        ({"prompt": "a", "completion": " ", "label": False}, "bad conversation: the chosen or the rejected response"),
        ({"messages": ASK + YES, "images": [{"bytes": None, "path": None}]}, "missing image: field 'images' holds no "),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "data:image/png;base64,?"}]}, *YES]},
         "undecodable image: field ''messages' turn 0, part 0' is not valid base64"),
    ],
)  # fmt: skip
def test_rows_that_are_rejected(tmp_path: Path, images: Path, row: dict[str, Any], reason: str) -> None:
    [found] = pack(write_rows(tmp_path / "rows.json", [row]), images)
    assert isinstance(found, str)
    assert found.startswith(reason)


def test_an_image_that_the_row_only_names(tmp_path: Path, images: Path) -> None:
    """In parquet, the row is rejected if no image folder is given, and read if one is."""
    row = {
        "id": "k",
        "messages": [{"role": "user", "content": "<image>"}, *YES],
        "images": [{"bytes": None, "path": "a.jpg"}],
    }
    file = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([row]), file)
    [lost] = read_sources([file])
    assert isinstance(lost, RejectedRow)
    assert (lost.kind, lost.image) == ("missing image", "a.jpg")
    assert isinstance(pack(file, images)[0], Sample)


@pytest.mark.parametrize("name", ["rejected", "rejected_response"])
def test_several_rejected_answers(tmp_path: Path, name: str) -> None:
    """Each becomes a sample; one that equals the chosen answer is rejected under its own key."""
    row = {"prompt": ASK, "chosen": YES} if name == "rejected" else {"messages": ASK + YES}
    file = write_rows(tmp_path / "rows.json", [row | {"id": "k", name: ["No.", "Yes. ", "Never."]}])
    first, same, last = read_sources([file])
    assert isinstance(first, Located)
    assert isinstance(last, Located)
    assert [(each.sample.key, each.sample.rejected) for each in (first, last)] == [("k-0", "No."), ("k-2", "Never.")]
    assert isinstance(same, RejectedRow)
    assert (same.key, same.kind, same.row) == ("k-1", "identical answers", 0)
    alone = write_rows(tmp_path / "rows.json", [row | {"id": "k", name: ["No."]}])
    assert pack(alone) == [PAIR]


def test_equal_answers_that_were_indexed_earlier_stay_readable(tmp_path: Path) -> None:
    """Training continues on a set made by an earlier version; indexing the tars again rejects such pairs."""
    content = json.dumps({"chosen": ASK + YES, "rejected": ASK + YES}).encode()
    assert sample_from_members("llava", "k", content, (), "rows").is_preference
    with pytest.raises(DataError, match="the chosen and the rejected answer are the same"):
        index_tars([TarSource(write_tar(tmp_path / "x.tar", [("k.json", content)]))], tmp_path / "set")
