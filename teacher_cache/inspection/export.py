"""`cache-teacher export`: top-k ids and reference log-probs of a cache as a parquet file for other trainers.

One row per sequence, in the order of the cache, with natural log-probs at T = 1 as the reader returns them, not
renormalised. Three layouts, where n is the sequence's recorded positions, T all its tokens, K the top-k ids kept:

- `table`: `key`, `role` string; `target_ids` [n] int32, the supervised tokens (−1 where a position of a cache of all
  positions has none); `target_log_probs` [n] float32, their reference log-probs; `sum_log_prob` float64, their sum;
  `token_ids` [n][K] int32 and `log_probs` [n][K] float32, the top-k ids: likely ids, most likely first, then
  forced ones. K varies by position.
- `axolotl`: tokenized rows for axolotl's knowledge-distillation trainer, with exactly the columns that its collator
  (`DataCollatorForKD`, read at commit 067b021) takes, since it makes a tensor of each:
  `input_ids`, `attention_mask`, `labels` [T], labels −100 for unsupervised tokens; `target_token_ids`,
  `target_logprobs`, `target_mask` [T][K]. Row t is the model's output at t, the distribution of the token at t + 1, and
  is empty without a record. Text only: sequences with images are left out. Use it with `kd_normalize_topk: false`.
- `trl`: one row per preference sample, for TRL's DPO trainer: `key` string; `ref_chosen_logps` and `ref_rejected_logps`
  float64, the teacher's log-probs of the two responses, summed over their tokens, the end of the turn included.

Shape suffixes: N positions of a batch of sequences, H top-k ids of all of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from llavamod_offline.data.encode.chat_template import choose_template
from llavamod_offline.data.encode.tokenize import UNSUPERVISED, SequenceEncoder, TokenizedSequence
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import CacheError, ConfigError, DataError
from llavamod_offline.models.checkpoint import load_tokenizer
from llavamod_offline.models.hub import checkpoint_folder
from llavamod_offline.progress import track
from llavamod_offline.storage import atomic
from teacher_cache.fingerprint import is_template
from teacher_cache.format.record import Records
from teacher_cache.format.sequences import short_hash
from teacher_cache.read.reader import TeacherCache
from teacher_cache.student.check import check_sequence, check_student

FORMATS = ("table", "axolotl", "trl")
_LOST = ("tail mass", "tail samples", "entropy", "log normalisers")
_BATCH_IDS = 2**21
_BATCH_SEQUENCES = 512
_IDS, _FLOATS = pa.list_(pa.int32()), pa.list_(pa.float32())
_TABLE_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("role", pa.string()),
        ("target_ids", _IDS),
        ("target_log_probs", _FLOATS),
        ("sum_log_prob", pa.float64()),
        ("token_ids", pa.list_(_IDS)),
        ("log_probs", pa.list_(_FLOATS)),
    ]
)
_TRL_SCHEMA = pa.schema(
    [("key", pa.string()), ("ref_chosen_logps", pa.float64()), ("ref_rejected_logps", pa.float64())]
)
_AXOLOTL_SCHEMA = pa.schema(
    [
        ("input_ids", _IDS),
        ("attention_mask", pa.list_(pa.int8())),
        ("labels", _IDS),
        ("target_token_ids", pa.list_(_IDS)),
        ("target_logprobs", pa.list_(_FLOATS)),
        ("target_mask", pa.list_(pa.list_(pa.int8()))),
    ]
)

Item = tuple[str, str]
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Exported:
    """The result of an export. `mass`: mean probability of the exported ids per position; `lost`: what was left out.

    `incomplete`: pairs without a row, because one of their responses was rejected.
    """

    output: str
    format: str
    sequences: int
    positions: int
    with_images: int
    top_k: int | None
    mass: float
    lost: tuple[str, ...]
    bytes: int
    incomplete: int = 0


def export_cache(
    cache: TeacherCache,
    output: Path,
    *,
    layout: str,
    top_k: int | None = None,
    data: Path | None = None,
    tokenizer: Path | None = None,
) -> Exported:
    """Write one of the layouts above to `output`, atomically and in bounded memory.

    `top_k`: keep at most this many ids per position. `data` and `tokenizer`, the packed set and a checkpoint folder,
    provide the prompts for `axolotl`. Errors: `ConfigError` for an invalid choice; `CacheError`, `DataError` or
    `TargetError` if set or tokenizer do not match the cache.
    """
    _check_choice(output, layout, top_k, data, tokenizer)
    totals = {"sequences": 0, "positions": 0, "mass": 0.0}
    items, incomplete = cache.items(), 0
    if layout == "table":
        schema, rows = _TABLE_SCHEMA, _table_rows
    elif layout == "trl":
        schema = _TRL_SCHEMA
        sides = {key for key, role in items if role in ("chosen", "rejected")}
        items = [(key, role) for key, role in items if role == "chosen" and (key, "rejected") in cache]
        incomplete = len(sides) - len(items)
        if not items:
            raise CacheError(f"cache '{cache.path}': has no pairs of responses for --format trl: choose another format")
    else:
        assert data is not None
        assert tokenizer is not None
        prompts = _Prompts(cache, data, tokenizer)
        schema, rows = _AXOLOTL_SCHEMA, partial(_axolotl_rows, prompts)
        items = [(key, role) for key, role in items if prompts.is_text(key)]
    schema = schema.with_metadata({"llavamod.cache_digest": cache.digest, "llavamod.layout": layout})
    aside = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        atomic.remove_leftovers(output.parent, output.name)
        with pq.ParquetWriter(aside, schema, compression="zstd") as writer:
            for batch in track(list(_batches(cache, items)), "export", "batch"):
                if layout == "trl":  # needs only sums
                    writer.write_batch(_trl_rows(cache, batch).cast(schema))
                    totals["sequences"] += 2 * len(batch)
                    continue
                records = _capped(cache.records(batch), top_k)
                writer.write_batch(rows(cache, batch, records).cast(schema))
                totals["sequences"] += len(batch)
                totals["positions"] += len(records)
                totals["mass"] += float(np.exp(records.topk_log_probs_H, dtype=np.float64).sum())
        atomic.fsync_path(aside)
        aside.replace(output)
        atomic.fsync_path(output.parent)
    except OSError as error:
        raise ConfigError(f"output '{output}': cannot be written: {error.strerror or error}: choose another") from error
    finally:
        aside.unlink(missing_ok=True)
    positions = int(totals["positions"])
    return Exported(
        output=str(output),
        format=layout,
        sequences=int(totals["sequences"]),
        positions=positions,
        with_images=len(cache) - len(items) if layout == "axolotl" else 0,
        top_k=top_k,
        mass=totals["mass"] / positions if positions else 0.0,
        lost=("distributions",) if layout == "trl" else _LOST,
        bytes=output.stat().st_size,
        incomplete=incomplete,
    )


def _check_choice(output: Path, layout: str, top_k: int | None, data: Path | None, tokenizer: Path | None) -> None:
    if layout not in FORMATS:
        raise ConfigError(f"--format '{layout}' is unknown: choose one of {', '.join(FORMATS)}")
    if top_k is not None and top_k < 1:
        raise ConfigError(f"--top-k {top_k}: must be at least 1")
    if top_k is not None and layout == "trl":
        raise ConfigError("--top-k: --format trl writes no distributions: remove it")
    if output.suffix != ".parquet":
        raise ConfigError(f"output '{output}': the file is parquet: give it a name that ends with .parquet")
    if output.exists():
        raise ConfigError(f"output '{output}': already exists: choose another, or remove it")
    if not output.parent.is_dir():
        raise ConfigError(f"output '{output}': folder '{output.parent}' does not exist: create it first")
    if layout == "axolotl" and (data is None or tokenizer is None):
        missing = "--data SET" if data is None else "--tokenizer FOLDER"
        raise ConfigError(f"--format axolotl needs prompts, which a cache does not store: pass {missing}")


def _batches(cache: TeacherCache, items: Sequence[Item]) -> Iterator[Sequence[Item]]:
    """Split the sequences into batches with a limited number of top-k ids."""
    ids = cache.totals["heads"] / max(cache.totals["sequences"], 1)
    size = int(min(max(_BATCH_IDS // max(ids, 1), 1), _BATCH_SEQUENCES))
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _capped(records: Records, top_k: int | None) -> Records:
    """Keep the first `top_k` ids of each position."""
    if top_k is None:
        return records
    counts_N = records.topk_counts_N.astype(np.int64)
    rank_H = np.arange(len(records.topk_ids_H)) - np.repeat(np.cumsum(counts_N) - counts_N, counts_N)
    kept_H = rank_H < top_k
    return replace(
        records,
        topk_counts_N=np.minimum(records.topk_counts_N, top_k),
        topk_ids_H=records.topk_ids_H[kept_H],
        topk_log_probs_H=records.topk_log_probs_H[kept_H],
    )


def _table_rows(cache: TeacherCache, batch: Sequence[Item], records: Records) -> pa.RecordBatch:
    about = [cache.sequence(*item) for item in batch]
    lengths = np.array([entry.n_positions for entry in about], np.int64)
    counts_N = records.topk_counts_N.astype(np.int64)
    columns = {
        "key": [key for key, _ in batch],
        "role": [role for _, role in batch],
        "target_ids": _lists(lengths, records.target_ids_N),
        "target_log_probs": _lists(lengths, records.target_log_probs_N),
        "sum_log_prob": [entry.sum_log_prob for entry in about],
        "token_ids": _lists(lengths, _lists(counts_N, records.topk_ids_H)),
        "log_probs": _lists(lengths, _lists(counts_N, records.topk_log_probs_H)),
    }
    return pa.RecordBatch.from_pydict(columns)


def _trl_rows(cache: TeacherCache, batch: Sequence[Item]) -> pa.RecordBatch:
    columns: dict[str, list[Any]] = {"key": [key for key, _ in batch]}
    for role in ("chosen", "rejected"):
        columns[f"ref_{role}_logps"] = [cache.sequence(key, role).sum_log_prob for key, _ in batch]
    return pa.RecordBatch.from_pydict(columns)


def _axolotl_rows(prompts: _Prompts, cache: TeacherCache, batch: Sequence[Item], records: Records) -> pa.RecordBatch:
    ids, labels, counts = [], [], []
    pieces = records.split([cache.sequence(*item).n_positions for item in batch])
    for item, piece in zip(batch, pieces, strict=True):
        sequence = prompts.encode(*item)
        marked_T = np.full(len(sequence.input_ids_T), UNSUPERVISED, np.int64)
        marked_T[sequence.supervised_N] = sequence.target_ids_N
        counts_T = np.zeros(len(sequence.input_ids_T), np.int64)
        counts_T[sequence.rows_and_targets(cache.fingerprint["capture"]["positions"])[0]] = piece.topk_counts_N
        ids.append(sequence.input_ids_T)
        labels.append(marked_T)
        counts.append(counts_T)
    lengths = np.array([len(row) for row in ids], np.int64)
    counts_T = np.concatenate(counts)
    ones = np.ones(max(int(lengths.sum()), len(records.topk_ids_H)), np.int8)
    columns = {
        "input_ids": _lists(lengths, np.concatenate(ids).astype(np.int32)),
        "attention_mask": _lists(lengths, ones[: lengths.sum()]),
        "labels": _lists(lengths, np.concatenate(labels).astype(np.int32)),
        "target_token_ids": _lists(lengths, _lists(counts_T, records.topk_ids_H)),
        "target_logprobs": _lists(lengths, _lists(counts_T, records.topk_log_probs_H)),
        "target_mask": _lists(lengths, _lists(counts_T, ones[: len(records.topk_ids_H)])),
    }
    return pa.RecordBatch.from_pydict(columns)


def _lists(lengths: Counts, values: Any) -> pa.ListArray:
    """Consecutive pieces of `values`, of the given lengths, as an array of lists."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, values if isinstance(values, pa.Array) else pa.array(values))


class _Prompts:
    """Tokenizes text sequences as in the capture. Errors: those of `export_cache`."""

    def __init__(self, cache: TeacherCache, data: Path, tokenizer: Path) -> None:
        about = cache.fingerprint
        loaded = load_tokenizer(checkpoint_folder(tokenizer))
        check_student(about, loaded)
        template = choose_template(about["template"]["name"], lambda: loaded)
        if not is_template(template, about["template"]):
            raise CacheError(
                f"cache '{cache.path}': its template '{template.name}' has changed: capture the cache again"
            )
        self._cache = cache
        self._samples = SampleSet.open(data)
        if "mismatched" in cache.roles:
            self._samples = self._samples.with_mismatched()
        self._images = self._samples.index.column("n_images").to_numpy()
        self._encoder = SequenceEncoder(
            loaded,
            template,
            image_token_id=-1,  # text only, see `is_text`
            image_tokens=0,
            max_length=int(about["sequence"]["max_length"]),
            add_start=bool(about["sequence"].get("start_ids")),
        )

    def is_text(self, key: str) -> bool:
        """Whether a sample has no images."""
        return not self._images[self._samples.row_of(key)]

    def encode(self, key: str, role: str) -> TokenizedSequence:
        """The sequence, checked against its record."""
        sample = self._samples.read(self._samples.row_of(key))
        if short_hash(sample.content_hash) != self._cache.sequence(key, role).content_hash:
            raise DataError(f"sample '{key}' ({role}): its text differs from the captured one: pass the captured set")
        sequence = self._encoder.encode(sample, role)
        check_sequence(self._cache, sequence)
        return sequence
