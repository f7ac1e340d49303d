"""Reading a cache back: by key and role, in batches, from threads and workers, and what is refused."""

from __future__ import annotations

import json
import multiprocessing
import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from llavamod_offline.data.encode.template import get_template
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import CacheError, TargetError
from llavamod_offline.families.llava.checkpoint import sequence_encoder
from llavamod_offline.losses.targets import SparseTargets
from llavamod_offline.models.checkpoint import load_tokenizer
from teacher_cache.format import columns
from teacher_cache.format.manifest import CACHE_NAME, canonical, content_digest
from teacher_cache.format.quantise import FINE, log_prob_bound
from teacher_cache.format.record import Records
from teacher_cache.read import block_cache as blocks
from teacher_cache.read.reader import TeacherCache, open_cache
from teacher_cache.student.check import check_sequence
from tests.teacher_cache.conftest import World


class CacheDataset(Dataset[list[float]]):
    """Uses a cache like a training loader: one sequence per item."""

    def __init__(self, cache: TeacherCache) -> None:
        self.cache = cache
        self.keys = sorted(cache.keys("response"))

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> list[float]:
        targets = self.cache.targets([(self.keys[index], "response")])
        return [*targets.target_log_probs_N.tolist(), float(targets.topk_ids_NK.sum())]


def _equal(left: SparseTargets, right: SparseTargets) -> bool:
    pairs = [(getattr(left, name), getattr(right, name)) for name in left.__dataclass_fields__]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def test_every_sequence_of_the_set_is_there(world: World, finished: Path) -> None:
    cache = open_cache(finished)
    samples = SampleSet.open(world.samples)
    encoder = sequence_encoder(world.teacher, load_tokenizer(world.teacher), get_template("qwen"), 2048)
    assert cache.keys("response") == set(samples.keys)
    assert cache.keys("chosen") == set()
    assert len(cache) == len(samples) == 24
    total = 0
    for row, key in enumerate(samples.keys):
        sample = samples.read(row)
        sequence = encoder.encode(sample, "response")
        about = cache.sequence(key, "response")
        assert (key, "response") in cache
        assert about.target_hash == sequence.target_hash[:32]
        assert about.content_hash == sample.content_hash[:32]
        assert about.n_tokens == len(sequence.input_ids_T)
        assert about.n_positions == len(sequence.supervised_N)
        assert np.array_equal(cache.target_ids(key, "response"), sequence.target_ids_N)
        targets = cache.targets([(key, "response")])
        assert targets.target_ids_N.tolist() == sequence.target_ids_N.tolist()
        rounding = 2 * float(log_prob_bound(targets.target_log_probs_N.numpy(), FINE).sum())
        assert about.sum_log_prob == pytest.approx(float(targets.target_log_probs_N.double().sum()), abs=rounding)
        assert about.mean_entropy == pytest.approx(float(targets.entropy_N.mean()), abs=0.5 / FINE.entropy_steps)
        check_sequence(cache, sequence)
        total += about.n_positions
    assert cache.positions == total


def test_a_batch_is_its_sequences_one_after_another(finished: Path) -> None:
    cache = open_cache(finished)
    items = [(key, "response") for key in sorted(cache.keys("response"), reverse=True)]
    batch = cache.targets(items)
    start = 0
    for item in items:
        alone = cache.targets([item])
        piece = batch[start : start + len(alone)]
        start += len(alone)
        for name in ("topk_ids_NK", "topk_log_probs_NK", "tail_ids_NM", "tail_weights_NM"):
            wide, narrow = getattr(piece, name), getattr(alone, name)
            assert torch.equal(wide[:, : narrow.shape[1]], narrow)
            empty = {"topk_ids_NK": -1, "topk_log_probs_NK": float("-inf"), "tail_ids_NM": -1}.get(name, 0)
            assert (wide[:, narrow.shape[1] :] == empty).all()
        assert torch.equal(piece.log_normalisers_NS, alone.log_normalisers_NS)
    assert start == len(batch)


def test_rows_say_what_keys_and_roles_say(world: World, finished: Path) -> None:
    """Also if the keys are in a different order from the cache's, and one of them is unknown."""
    cache = open_cache(finished)
    keys = SampleSet.open(world.samples).index.column("key")
    shuffled = pa.chunked_array([pa.array([*keys.to_pylist()[::-1], "nobody"])])
    in_order = cache.rows(keys, "response", SampleSet.open(world.samples).shard_rows)
    assert cache.rows(shuffled, "response").tolist() == [*in_order.tolist()[::-1], -1]
    assert cache.rows(keys, "chosen").tolist() == [-1] * len(keys)
    items = [(key, "response") for key in keys.to_pylist()]
    assert cache.items(in_order.tolist()) == items
    chosen = in_order[[17, 3, 20]]
    named = [items[place] for place in (17, 3, 20)]
    assert cache.sequences(chosen) == cache.sequences(named) == [cache.sequence(*item) for item in named]
    assert _equal(cache.targets(chosen), cache.targets(named))


def test_a_window_that_is_kept_is_decoded_once(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a budget one byte short of a window, blocks are decoded again as long as the window is read."""
    monkeypatch.setattr(columns, "BLOCK_POSITIONS", 9)
    world.run(tmp_path / "c")
    decoded: list[tuple[str, int]] = []
    read = columns.ColumnFile.records

    def count(file: columns.ColumnFile, first: int, last: int, temperatures: tuple[float, ...]) -> list[Records]:
        decoded.extend((str(file.folder), number) for number in range(first, last))
        return read(file, first, last, temperatures)

    monkeypatch.setattr(columns.ColumnFile, "records", count)
    cache = TeacherCache(tmp_path / "c", memory_bytes=0)
    cache.keep_shards(len(cache.shard_names))
    items = cache.items()
    for number in range(3 * len(items)):
        cache.targets([items[number * 7 % len(items)]])
    assert len(decoded) == len(set(decoded))


def test_targets_are_whole_distributions(finished: Path) -> None:
    cache = open_cache(finished)
    targets = cache.targets([(key, "response") for key in cache.keys("response")])
    mass_N = targets.topk_log_probs_NK.double().exp().sum(-1) + targets.tail_log_mass_N.double().exp()
    assert torch.allclose(mass_N, torch.ones_like(mass_N), atol=1e-6)
    drawn_N = targets.tail_weights_NM.sum(-1)
    assert torch.allclose(drawn_N, torch.ones_like(drawn_N), atol=1e-6)
    assert (targets.tail_ids_NM[targets.tail_weights_NM > 0] >= 0).all()
    assert targets.vocab_size == cache.vocab_size == 400
    assert targets.temperatures == cache.temperatures == (1.5, 2.0, 4.0)
    assert (targets.topk_log_probs_NK[:, 0:1] >= targets.topk_log_probs_NK).all()


def test_no_items_give_no_positions(finished: Path) -> None:
    targets = open_cache(finished).targets([])
    assert len(targets) == 0
    assert targets.log_normalisers_NS.shape == (0, 3)


def test_exhaustive_is_the_whole_log_softmax(world: World, tmp_path: Path) -> None:
    world.run(tmp_path / "c", "capture.preset=exhaustive")
    cache = open_cache(tmp_path / "c")
    targets = cache.targets([(key, "response") for key in sorted(cache.keys("response"))[:5]])
    assert targets.topk_ids_NK.shape[1] == 400
    assert torch.equal(targets.topk_ids_NK.sort(-1).values, torch.arange(400).expand(len(targets), -1))
    assert targets.tail_log_mass_N.isneginf().all()
    assert targets.tail_ids_NM.shape[1] == 0
    dense_NV = torch.empty(len(targets), 400).scatter_(1, targets.topk_ids_NK, targets.topk_log_probs_NK)
    assert torch.allclose(dense_NV.logsumexp(-1), torch.zeros(len(targets)), atol=1e-5)
    assert torch.allclose(dense_NV.gather(1, targets.target_ids_N[:, None])[:, 0], targets.target_log_probs_N)


def test_forked_loader_workers_read_what_this_process_reads(finished: Path) -> None:
    dataset = CacheDataset(open_cache(finished))
    expected = [dataset[index] for index in range(len(dataset))]  # the parent has decoded blocks and open files
    fork = multiprocessing.get_context("fork")
    loader = DataLoader(dataset, batch_size=None, num_workers=2, multiprocessing_context=fork)
    assert list(loader) == expected


def test_a_fork_while_another_thread_reads_does_not_hang(finished: Path) -> None:
    """The child would find the parent's lock held by a thread that the child does not have."""
    dataset = CacheDataset(open_cache(finished))
    expected = dataset[0]
    pipe, far_end = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=lambda: far_end.send(dataset[0]), daemon=True)
    with dataset.cache._blocks._lock:
        child.start()
    assert pipe.poll(300), "the forked reader hangs"
    assert pipe.recv() == expected
    child.join()


def test_an_open_cache_can_be_pickled(finished: Path) -> None:
    cache = open_cache(finished)
    item = (min(cache.keys("response")), "response")
    again = pickle.loads(pickle.dumps(cache))
    assert _equal(again.targets([item]), cache.targets([item]))


def test_threads_share_one_reader_and_memory_stays_bounded(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "BLOCK_POSITIONS", 9)
    monkeypatch.setattr(blocks, "_OPEN_SHARDS", 2)
    world.run(tmp_path / "c")
    expected = open_cache(tmp_path / "c")
    cache = TeacherCache(tmp_path / "c", memory_bytes=30_000)
    items = [(key, "response") for key in sorted(cache.keys("response"))[::3]]
    wrong: list[object] = []

    def read(offset: int) -> None:
        for index in range(len(items)):
            item = items[(index * 7 + offset) % len(items)]
            if not _equal(cache.targets([item]), expected.targets([item])):
                wrong.append(item)

    threads = [threading.Thread(target=read, args=(offset,)) for offset in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert cache._blocks._bytes <= max(30_000, max(block.bytes for block in cache._blocks._blocks.values()))
    assert len(cache._blocks._files) <= 2


def test_what_is_not_there_is_named(finished: Path) -> None:
    cache = open_cache(finished)
    assert ("tiny-0000", "chosen") not in cache
    for call in (cache.sequence, cache.target_ids, lambda key, role: cache.targets([(key, role)])):
        with pytest.raises(CacheError, match=r"no record of sample 'tiny-0000' \(chosen\)"):
            call("tiny-0000", "chosen")


def test_other_supervised_ids_are_refused_with_the_first_difference(world: World, finished: Path) -> None:
    cache = open_cache(finished)
    sample = SampleSet.open(world.samples).read(0)
    encoder = sequence_encoder(world.teacher, load_tokenizer(world.teacher), get_template("chatml"), 2048)
    with pytest.raises(TargetError, match=r"sample 'tiny-0000' \(response\).*at position 0 the cache has \d+ of \d+"):
        check_sequence(cache, encoder.encode(sample, "response"))


def test_an_unfinished_cache_says_how_to_finish(copied: Callable[[], Path], tmp_path: Path) -> None:
    path = copied()
    (path / CACHE_NAME).unlink()
    with pytest.raises(CacheError, match=r"unfinished .*rerun `cache-teacher run`"):
        open_cache(path)
    with pytest.raises(CacheError, match="no such folder"):
        open_cache(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CacheError, match="it is not a teacher cache"):
        open_cache(tmp_path / "empty")


def test_another_format_version_is_refused(copied: Callable[[], Path]) -> None:
    path = copied()
    content = json.loads((path / CACHE_NAME).read_bytes()) | {"format_version": 9}
    content["digest"] = content_digest(content)
    (path / CACHE_NAME).write_bytes(canonical(content))
    with pytest.raises(CacheError, match="format version 9, not 1: update the project"):
        open_cache(path)


def test_a_cache_file_in_another_form_is_the_same(copied: Callable[[], Path]) -> None:
    """The digest covers the content, whatever the formatting; a content that does not match is refused in any form."""
    path = copied()
    content = json.loads((path / CACHE_NAME).read_bytes())
    (path / CACHE_NAME).write_text(json.dumps(content))
    assert open_cache(path).digest == content["digest"]
    for form in (json.dumps, lambda changed: canonical(changed).decode()):
        (path / CACHE_NAME).write_text(form(content | {"format_version": 1, "more": 0}))
        with pytest.raises(CacheError, match="wrong digest"):
            open_cache(path)


@pytest.mark.parametrize("name", [CACHE_NAME, "shards/samples-000002/sequences.arrow"])
def test_damaged_small_files_are_found_when_opening(copied: Callable[[], Path], name: str) -> None:
    path = copied()
    file = path / name
    content = bytearray(file.read_bytes())
    at = content.index(b"tiny-00") if name.endswith("arrow") else content.index(b'positions": ') + 12
    content[at] ^= 1
    file.write_bytes(content)
    with pytest.raises(CacheError, match=f"{file.name}.*cache-teacher verify"):
        open_cache(path)


@pytest.mark.parametrize("harm", ["missing", "flipped"])
def test_a_damaged_manifest_is_found_when_its_shard_is_read(copied: Callable[[], Path], harm: str) -> None:
    path = copied()
    file = path / "shards/samples-000000/manifest.json"
    content = bytearray(file.read_bytes())
    content[content.index(b'positions": ') + 12] ^= 1
    file.unlink()
    if harm == "flipped":
        file.write_bytes(content)
    cache = open_cache(path)
    with pytest.raises(CacheError, match=r"samples-000000/manifest.json: .*cache-teacher verify"):
        cache.targets([("tiny-0000", "response")])
    with pytest.raises(CacheError, match=r"manifest.json.*cache-teacher verify"):
        cache.manifests()
    assert len(cache.targets([("tiny-0007", "response")])) > 0  # another shard


@pytest.mark.parametrize("harm", ["missing", "short", "flipped"])
def test_damaged_arrays_are_never_decoded(copied: Callable[[], Path], harm: str) -> None:
    """Zarr by itself reads a missing file as zeros."""
    path = copied()
    file = path / "shards/samples-000000/columns.zarr/id_codes/c/0/0"
    content = bytearray(file.read_bytes())
    if harm == "missing":
        file.unlink()
    elif harm == "short":
        file.write_bytes(content[:-1])
    else:
        content[len(content) // 3] ^= 0x10
        file.write_bytes(content)
    cache = open_cache(path)
    with pytest.raises(CacheError, match=r"id_codes.*cache-teacher verify"):
        cache.targets([("tiny-0000", "response")])
    assert len(cache.targets([("tiny-0007", "response")])) > 0  # another shard
