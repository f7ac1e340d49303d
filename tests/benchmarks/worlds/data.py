"""What the data loading benchmark reads: a packed set of images, its cache, and both scaled up to millions of rows.

The images are JPEGs of 336×336 pixels, smooth shapes with some noise, of about 27 kB; each conversation is one question
and an answer of about 60 tokens. Records are those of the synthetic teacher of `store.py`. The large set repeats one
shard under other keys: its tars and its cache's columns are hard links to the same files; its index and its sequence
tables are files of their own.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from llavamod_offline.data.encode.template import get_template
from llavamod_offline.data.encode.tokenize import SequenceEncoder
from llavamod_offline.data.images import ImagePreprocessor
from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.data.sets.sample_set import INDEX_NAME, INDEX_SCHEMA, MANIFEST_NAME, SampleSet
from teacher_cache.format.manifest import (
    CACHE_NAME,
    COLUMNS_NAME,
    JOB_NAME,
    REJECTED_NAME,
    SEQUENCES_NAME,
    SHARDS_NAME,
    cache_content,
    canonical,
    content_entry,
    file_entry,
    job_content,
    shard_entry,
)
from teacher_cache.format.manifest import MANIFEST_NAME as SHARD_MANIFEST
from teacher_cache.format.sequences import SEQUENCE_SCHEMA, SequenceRecord, read_sequences, write_sequences
from teacher_cache.write.store import CacheStore
from tests.benchmarks.store import CODEC, FINGERPRINT, make_records
from tests.tiny import tiny_tokenizer

SIDE = 336
IMAGE_TOKENS = 576
_COLOURS = ("red", "green", "blue", "yellow", "purple")
_SHAPES = ("circle", "square", "triangle", "star")


def make_encoder() -> SequenceEncoder:
    """An encoder with a tokenizer of 400 tokens, LLaVA-MoD's template and a tower of 24 × 24 patches."""
    tokenizer = tiny_tokenizer()
    image_token_id = int(tokenizer.convert_tokens_to_ids("<image>"))
    return SequenceEncoder(
        tokenizer, get_template("qwen"), image_token_id=image_token_id, image_tokens=IMAGE_TOKENS, max_length=2048
    )


def make_preprocessor() -> ImagePreprocessor:
    """The image preprocessor of clip-vit-large-patch14-336."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return ImagePreprocessor(
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    )


def make_sample(number: int, side: int = SIDE) -> Sample:
    """An image, a question and an answer."""
    rng = np.random.default_rng(number)
    colour, shape = _COLOURS[number % 5], _SHAPES[number % 4]
    words = " ".join(f"There is a {_COLOURS[i]} {_SHAPES[j]} in it." for i, j in rng.integers(0, 4, (6, 2)).tolist())
    turns = (
        Turn("user", f"<image>\nWhich colour has the {shape} on the left?"),
        Turn("assistant", f"{colour}. {words}"),
    )
    return Sample(f"sample-{number:09d}", turns, (make_picture(rng, side),), ("jpg",), source="made")


def make_picture(rng: np.random.Generator, side: int) -> bytes:
    """A JPEG of smooth shapes with some noise."""
    coarse = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).resize((side, side))
    noisy = np.asarray(coarse).astype(np.int64) + rng.normal(0, 6, (side, side, 3)).astype(np.int64)
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def write_world(folder: Path, samples: int, *, shard_samples: int, side: int = SIDE) -> None:
    """Write a packed `set` and its `cache` below a folder."""
    write_set((make_sample(number, side) for number in range(samples)), folder / "set", shard_samples=shard_samples)
    packed, encoder = SampleSet.open(folder / "set"), make_encoder()
    store = CacheStore.open(folder / "cache", FINGERPRINT, packed.shard_names)
    store.start()
    for number, name in enumerate(packed.shard_names):
        read = [packed.read(row) for row in packed.rows_of(name)]
        sequences = [encoder.encode(sample, "response") for sample in read]
        counts = [len(sequence.supervised_N) for sequence in sequences]
        pieces = make_records(sum(counts), number).split(counts)
        captured = [
            SequenceRecord(s.key, "response", s.target_hash, sample.content_hash, len(s.input_ids_T), piece)
            for s, sample, piece in zip(sequences, read, pieces, strict=True)
        ]
        store.commit(name, captured, [], CODEC)
    store.finalise()


def write_large(small: Path, large: Path, rows: int) -> None:
    """Repeat the first shard of a world under `rows` other keys."""
    _write_large_set(small / "set", large / "set", rows)
    _write_large_cache(small / "cache", large / "cache", rows)


def _keys(first: int, count: int) -> list[str]:
    return [f"llava-{row * 7919 % 10**10:010d}" for row in range(first, first + count)]


def _write_large_set(small: Path, large: Path, rows: int) -> None:
    large.mkdir(parents=True)
    manifest: dict[str, Any] = json.loads((small / MANIFEST_NAME).read_bytes())
    (shard, *_) = manifest["shards"]
    count = int(shard["samples"])
    entries = SampleSet.open(small).index.slice(0, count).combine_chunks().to_batches()[0]
    shards = []
    with pa.ipc.new_file(str(large / INDEX_NAME), INDEX_SCHEMA) as writer:
        for number in range(rows // count):
            name = f"large-{number:06d}"
            os.link(small / f"{shard['name']}.tar", large / f"{name}.tar")
            shards.append(shard | {"name": name})
            changed = {
                "key": pa.array(_keys(number * count, count)),
                "shard": pa.array(np.full(count, number, np.int32)),
            }
            columns = [changed.get(name, entries.column(name)) for name in INDEX_SCHEMA.names]
            writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=INDEX_SCHEMA))
    size = len(shards) * count
    manifest |= {"samples": size, "conversations": size, "sources": {"made": size}, "shards": shards, "name": "large"}
    manifest.pop("index", None)
    (large / MANIFEST_NAME).write_text(json.dumps(manifest))


def _write_large_cache(small: Path, large: Path, rows: int) -> None:
    first = sorted((small / SHARDS_NAME).iterdir())[0]
    table = read_sequences(first / SEQUENCES_NAME)
    before = json.loads((first / SHARD_MANIFEST).read_bytes())
    count, shards = len(table), []
    for number in range(rows // count):
        name = f"large-{number:06d}"
        target = large / SHARDS_NAME / name
        target.mkdir(parents=True)
        shutil.copytree(first / COLUMNS_NAME, target / COLUMNS_NAME, copy_function=os.link)
        columns = [pa.array(_keys(number * count, count)), *table.columns[1:]]
        write_sequences(target / SEQUENCES_NAME, pa.RecordBatch.from_arrays(columns, schema=SEQUENCE_SCHEMA))
        files = before["files"] | {SEQUENCES_NAME: file_entry(target / SEQUENCES_NAME)}
        content = canonical(before | {"name": name, "files": files})
        (target / SHARD_MANIFEST).write_bytes(content)
        shards.append(shard_entry(name, content, before | {"files": files}))
    job = canonical(job_content(FINGERPRINT, [str(shard["name"]) for shard in shards]))
    (large / JOB_NAME).write_bytes(job)
    (large / REJECTED_NAME).write_bytes(b"")
    beside = {JOB_NAME: content_entry(job), REJECTED_NAME: content_entry(b"")}
    (large / CACHE_NAME).write_bytes(canonical(cache_content({"fingerprint": FINGERPRINT}, shards, beside)))
