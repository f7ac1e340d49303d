"""Exports: the reader's numbers in the documented columns, written completely or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from tokenizers import Regex, pre_tokenizers

from llavamod_offline.data.encode.template import get_template
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import ConfigError, DataError, LlavaModError, TargetError
from llavamod_offline.families.llava.checkpoint import load_llava, sequence_encoder
from llavamod_offline.models.checkpoint import load_tokenizer
from teacher_cache.inspection import export
from teacher_cache.inspection.export import export_cache
from teacher_cache.read.reader import open_cache
from tests.teacher_cache.conftest import FLOAT32, World
from tests.tiny import tiny_tokenizer, write_tiny_llava, write_tiny_set


def _rows(file: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(file).to_pylist()
    return rows


@pytest.mark.parametrize("top_k", [None, 1, 7])
def test_the_table_holds_what_the_reader_gives(world: World, finished: Path, tmp_path: Path, top_k: int | None) -> None:
    cache = open_cache(finished)
    done = export_cache(cache, tmp_path / "out.parquet", layout="table", top_k=top_k)
    rows = _rows(tmp_path / "out.parquet")
    assert [row["key"] for row in rows] == SampleSet.open(world.samples).keys
    assert (done.sequences, done.positions, done.with_images) == (24, cache.positions, 0)
    mass = 0.0
    for row in rows:
        item = (row["key"], row["role"])
        records = cache.records([item])
        assert row["target_ids"] == records.target_ids_N.tolist()
        assert row["target_log_probs"] == records.target_log_probs_N.tolist()
        assert row["sum_log_prob"] == cache.sequence(*item).sum_log_prob
        for position, record in enumerate(records.split([1] * len(records))):
            assert row["token_ids"][position] == record.topk_ids_H.tolist()[:top_k]
            assert row["log_probs"][position] == record.topk_log_probs_H.tolist()[:top_k]
            mass += sum(torch.tensor(row["log_probs"][position], dtype=torch.float64).exp().tolist())
    assert done.mass == pytest.approx(mass / cache.positions)
    metadata = pq.read_schema(tmp_path / "out.parquet").metadata
    assert metadata[b"llavamod.cache_digest"] == cache.digest.encode()


def test_batches_leave_no_trace(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = open_cache(finished)
    export_cache(cache, tmp_path / "one.parquet", layout="table")
    for name, value in (("_BATCH_SEQUENCES", 5), ("_BATCH_IDS", 300)):
        monkeypatch.setattr(export, name, value)
        export_cache(cache, tmp_path / f"{name}.parquet", layout="table")
        assert pq.read_table(tmp_path / f"{name}.parquet").equals(pq.read_table(tmp_path / "one.parquet"))
        assert pq.ParquetFile(tmp_path / f"{name}.parquet").num_row_groups > 4


def test_both_roles_are_exported(world: World, tmp_path: Path) -> None:
    world.run(tmp_path / "cache", data=world.pairs)
    export_cache(open_cache(tmp_path / "cache"), tmp_path / "out.parquet", layout="table")
    assert [row["role"] for row in _rows(tmp_path / "out.parquet")] == ["chosen", "rejected"] * 7


def test_axolotl_rows_are_whole_sequences_of_text(world: World, finished: Path, tmp_path: Path) -> None:
    cache, samples = open_cache(finished), SampleSet.open(world.samples)
    settings: dict[str, Any] = {"data": world.samples, "tokenizer": world.teacher}
    done = export_cache(cache, tmp_path / "out.parquet", layout="axolotl", top_k=5, **settings)
    rows = _rows(tmp_path / "out.parquet")
    texts = [sample for sample in map(samples.read, range(len(samples))) if not sample.images]
    assert len(rows) == done.sequences == len(texts) == 6
    assert done.with_images == 18
    encoder = sequence_encoder(world.teacher, load_tokenizer(world.teacher), get_template("qwen"), 2048)
    for row, sample in zip(rows, texts, strict=True):
        assert set(row) == {
            "input_ids",
            "attention_mask",
            "labels",
            "target_token_ids",
            "target_logprobs",
            "target_mask",
        }
        sequence = encoder.encode(sample, "response")
        supervised = set(sequence.supervised_N.tolist())
        length = len(sequence.input_ids_T)
        assert row["input_ids"] == sequence.input_ids_T.tolist()
        assert row["attention_mask"] == [1] * length
        assert row["labels"] == [row["input_ids"][t] if t in supervised else -100 for t in range(length)]
        records = iter(cache.records([(sample.key, "response")]).split([1] * len(supervised)))
        for t in range(length):
            record = next(records) if t + 1 in supervised else None
            assert row["target_token_ids"][t] == ([] if record is None else record.topk_ids_H.tolist()[:5])
            assert row["target_logprobs"][t] == ([] if record is None else record.topk_log_probs_H.tolist()[:5])
            assert row["target_mask"][t] == [1] * len(row["target_token_ids"][t])


@torch.no_grad()
@pytest.mark.parametrize("positions", ["response", "all"])
def test_axolotl_rows_describe_the_teachers_own_outputs(world: World, tmp_path: Path, positions: str) -> None:
    """The log-probs in row t are those that the teacher gives after reading the ids up to t."""
    world.run(tmp_path / "cache", FLOAT32, f"capture.positions={positions}")
    settings: dict[str, Any] = {"data": world.samples, "tokenizer": world.teacher}
    export_cache(open_cache(tmp_path / "cache"), tmp_path / "out.parquet", layout="axolotl", **settings)
    model = load_llava(world.teacher)
    for row in _rows(tmp_path / "out.parquet"):
        filled = [t for t, ids in enumerate(row["target_token_ids"]) if ids]
        supervised = [t - 1 for t, label in enumerate(row["labels"]) if label != -100]
        assert filled == (supervised if positions == "response" else list(range(len(row["input_ids"]))))
        log_probs_TV = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        for t, (ids, expected) in enumerate(zip(row["target_token_ids"], row["target_logprobs"], strict=True)):
            torch.testing.assert_close(log_probs_TV[t, ids], torch.tensor(expected), rtol=1e-4, atol=1e-4)


def test_a_tokenizer_that_splits_words_otherwise_is_noticed(world: World, finished: Path, tmp_path: Path) -> None:
    """Its vocabulary and merges are the teacher's, all that a fingerprint enforces; the ids of its answers differ."""
    tokenizer = tiny_tokenizer()
    letters = pre_tokenizers.Split(Regex("."), behavior="isolated")
    bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([letters, bytewise])
    shutil.copytree(world.teacher, tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    settings: dict[str, Any] = {"data": world.samples, "tokenizer": tmp_path / "other"}
    with pytest.raises(TargetError, match="its supervised ids differ from the cache's"):
        export_cache(open_cache(finished), tmp_path / "out.parquet", layout="axolotl", **settings)


def test_choices_that_do_not_fit_are_refused(world: World, finished: Path, tmp_path: Path) -> None:
    cache = open_cache(finished)
    (tmp_path / "there.parquet").write_bytes(b"")
    other = write_tiny_set(tmp_path / "other", 24, seed=1)
    fewer = write_tiny_set(tmp_path / "fewer", 8)
    stranger = write_tiny_llava(tmp_path / "stranger", vocabulary=320)
    axolotl: dict[str, Any] = {"layout": "axolotl", "data": world.samples, "tokenizer": world.teacher}
    for settings, name, kind, problem in (
        ({"layout": "csv"}, "x.parquet", ConfigError, "'csv' is unknown: choose one of table, axolotl"),
        ({"layout": "table", "top_k": 0}, "x.parquet", ConfigError, "--top-k 0: must be at least 1"),
        ({"layout": "table"}, "there.parquet", ConfigError, "already exists"),
        ({"layout": "table"}, "no/x.parquet", ConfigError, "create it first"),
        ({**axolotl, "data": None}, "x.parquet", ConfigError, "pass --data SET"),
        ({**axolotl, "tokenizer": None}, "x.parquet", ConfigError, "pass --tokenizer FOLDER"),
        ({**axolotl, "data": other}, "x.parquet", DataError, "its text differs from the captured one"),
        ({**axolotl, "data": fewer}, "x.parquet", DataError, "has no sample 'tiny-0008'"),
        (
            {**axolotl, "tokenizer": stranger},
            "x.parquet",
            LlavaModError,
            "tokenizer.vocabulary: 4 differing: id 316 is ",
        ),
    ):
        before = sorted(tmp_path.iterdir())
        with pytest.raises(kind, match=problem.replace("'", "'")):
            export_cache(cache, tmp_path / name, **settings)
        assert sorted(tmp_path.iterdir()) == before
