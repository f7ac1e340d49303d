"""A user's Ray Data pipeline around the teacher, on a real cluster: the cache is that of `cache-teacher run`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sample import Sample
from teacher_cache.format.manifest import file_entries
from teacher_cache.read.reader import open_cache
from teacher_cache.verify.cache import verify_cache
from tests.teacher_cache.conftest import World
from tests.teacher_cache.ray_cluster import in_a_process
from tests.tiny import tiny_samples

pytestmark = [pytest.mark.ray, pytest.mark.slow]
pytest.importorskip("ray")
PIPELINES = "from tests.teacher_cache.ray_data.pipelines import main; main()"


def test_pipelines(world: World, tmp_path: Path) -> None:
    """One cluster for all of them, as starting one takes longest."""
    samples = tiny_samples(12)
    broken = Sample("broken", samples[0].turns, (b"no picture",), ("png",))
    data = tmp_path / "set"
    write_set([*samples[:3], broken, *samples[3:]], data, shard_samples=4)
    own = [f"data={data}", f"teacher={world.teacher}"]
    pairs = ["capture.mismatched=true", "capture.hidden=float16", "capture.temperatures=[2.0]"]
    wanted = dict.fromkeys(("whole", "stopped", "filtered", "refused"), own)
    wanted["pairs"] = [f"data={world.pairs}", f"teacher={world.teacher}", *pairs]
    (tmp_path / "wanted.json").write_text(json.dumps(wanted))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in an actor: the last digits of a product on a CPU depend on it
    alone = world.run(tmp_path / "alone", data=data)
    with_pairs = world.run(tmp_path / "alone-pairs", *pairs, data=world.pairs)
    torch.set_num_threads(threads)
    done = in_a_process(PIPELINES, str(tmp_path))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])

    assert found["whole"] == alone.digest
    assert file_entries(tmp_path / "whole") == file_entries(tmp_path / "alone")
    assert found["pairs"] == with_pairs.digest
    # If a user's step fails, committed shards are kept; the next run captures the rest.
    assert found["stopped"] not in (alone.digest, "None")
    assert found["left"]
    assert "set-000002" in found["left"]
    assert found["resumed"] == alone.digest

    # What a filter removes is listed, even if nothing of a shard remains.
    filtered = open_cache(tmp_path / "filtered")
    assert found["filtered"] == filtered.digest
    assert verify_cache(str(tmp_path / "filtered")).ok
    kept = [sample.key for number, sample in enumerate([*samples[:3], broken, *samples[3:]]) if 5 <= number != 7]
    assert sorted(filtered.keys("response")) == sorted(kept)
    left_out = [json.loads(line) for line in (tmp_path / "filtered" / "rejected.jsonl").read_text().splitlines()]
    assert {row["key"] for row in left_out} == {s.key for s in [*samples, broken]} - set(kept)
    assert {row["reason"] for row in left_out} == {"left out: a filter before the teacher removed its sample"}
    items = [(key, "response") for key in kept]
    ours, theirs = filtered.targets(items), open_cache(tmp_path / "alone").targets(items)
    assert torch.allclose(ours.entropy_N, theirs.entropy_N, atol=1e-4)

    assert found["changed"].startswith("DataError: sample '")
    assert "differs from that of set" in found["changed"]
    assert "\n" not in found["changed"]
    assert found["dropped"].startswith("DataError: ray_data: shard 'set-000001': 3 rows arrived together of the 4")
    assert found["shuffled"].startswith("ConfigError: ray_data: the step Repartition")
