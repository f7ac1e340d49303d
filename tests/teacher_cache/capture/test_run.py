"""`run` as a whole: resumable at any moment, the same result in every case, and clear about what it refuses."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.rows import Located
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import CacheError, ConfigError, DataError, LlavaModError, ModelError
from llavamod_offline.models.checkpoint import load_tokenizer
from llavamod_offline.storage.lock import LOCK_NAME, locked
from teacher_cache.format.manifest import CACHE_NAME, file_entries
from teacher_cache.read.reader import open_cache
from teacher_cache.verify.cache import verify_cache
from teacher_cache.verify.repair import repair_cache
from teacher_cache.write import store
from tests.teacher_cache.capture.killer import fork_server, run_and_die
from tests.teacher_cache.conftest import World, count_reads
from tests.tiny import tiny_samples, write_tiny_set

COMMAND = [sys.executable, "-c", "from teacher_cache.cli.main import main; main()"]


def test_a_set_that_was_packed_again_in_other_shards_is_not_continued(world: World, tmp_path: Path) -> None:
    """Its digest is the same, and so are the names of its shards, but not what they hold."""
    samples, output = write_tiny_set(tmp_path / "set", 20, shard_samples=5), tmp_path / "c"
    world.run(output, data=samples)
    (output / "cache.json").unlink()
    shutil.rmtree(output / "shards" / "set-000002")
    write_tiny_set(samples, 20, shard_samples=6, overwrite=True)
    with pytest.raises(CacheError, match=r"contains a cache with different settings: data\.shards: was .*, now "):
        world.run(output, data=samples)


def test_a_run_clears_the_failures_of_workers(world: World, tmp_path: Path) -> None:
    """Else they would count if the shard has to be captured again."""
    samples, output = write_tiny_set(tmp_path / "set", 4, shard_samples=2), tmp_path / "c"
    claims = output / ".work" / "claims"
    claims.mkdir(parents=True)
    for number in (1, 2, 3):
        ended = {"worker": "w", "host": "h", "how": "failed", "reason": "disk"}
        (claims / f"set-000001~{number}").write_text('{"worker": "w"}')
        (claims / f"set-000001~{number}~ended").write_text(json.dumps(ended))
    world.run(output, data=samples)
    assert not list(claims.iterdir())


def test_a_run_says_what_it_did_and_the_second_has_nothing_to_do(world: World, tmp_path: Path) -> None:
    first = world.run(tmp_path / "c")
    assert (first.complete, first.shards_done, first.shards_total) == (True, 5, 5)
    assert (first.sequences, first.rejected) == (24, 0)
    assert first.totals is not None
    assert first.positions == first.totals["positions"] > 100
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "c").rglob("*")}
    assert first.waiting_share is not None
    assert 0 < first.waiting_share <= 1
    assert {"images", "reading", "writing"} == first.waiting_shares.keys()
    assert sum(first.waiting_shares.values()) == pytest.approx(first.waiting_share, abs=2e-4)
    second = world.run(tmp_path / "c")
    assert (second.sequences, second.positions, second.digest) == (0, 0, first.digest)
    assert (second.waiting_share, second.waiting_shares) == (None, {})
    assert second.bytes_per_position == first.bytes_per_position
    assert first.bytes_per_position == round(open_cache(tmp_path / "c").bytes_per_position, 3)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "c").rglob("*")} == before


def test_a_shard_that_was_taken_away_is_made_again(world: World, finished: Path, tmp_path: Path) -> None:
    output = Path(shutil.copytree(finished, tmp_path / "c"))
    shutil.rmtree(output / "shards/samples-000003")
    assert world.run(output).sequences == 5
    assert file_entries(output) == file_entries(finished)


@pytest.mark.slow
def test_processes_that_prepare_images_change_nothing(world: World, finished: Path, tmp_path: Path) -> None:
    assert world.run(tmp_path / "c", "workers=2").digest == open_cache(finished).digest
    assert file_entries(tmp_path / "c") == file_entries(finished)


def test_place_time_batch_size_and_workers_do_not_enter_the_cache(world: World, finished: Path, tmp_path: Path) -> None:
    """The cache's description is equal; numbers are equal up to rounding (see the engine's tests)."""
    world.run(tmp_path / "deep" / "er" / "c", "batch_size=3")
    ours, other = open_cache(tmp_path / "deep/er/c"), open_cache(finished)
    assert ours.fingerprint == other.fingerprint
    items = [(key, "response") for key in sorted(other.keys("response"))]
    assert torch.allclose(ours.targets(items).entropy_N, other.targets(items).entropy_N, atol=1e-4)
    text = (tmp_path / "deep/er/c" / CACHE_NAME).read_text() + (tmp_path / "deep/er/c/job.json").read_text()
    assert str(tmp_path) not in text
    assert str(world.teacher) not in text


def test_the_same_run_elsewhere_gives_the_same_bytes(world: World, finished: Path, tmp_path: Path) -> None:
    world.run(tmp_path / "again")
    assert file_entries(tmp_path / "again") == file_entries(finished)


def test_slices_by_different_runs_make_the_same_cache(world: World, finished: Path, tmp_path: Path) -> None:
    for part in (2, 0):
        summary = world.run(tmp_path / "c", f"slice={part}/3")
        assert not summary.complete
        assert summary.digest is None
        with pytest.raises(CacheError, match="unfinished"):
            open_cache(tmp_path / "c")
    last = world.run(tmp_path / "c", "slice=1/3")
    assert last.complete
    assert last.digest == open_cache(finished).digest


def test_one_process_a_slice_and_one_a_cache(world: World, tmp_path: Path) -> None:
    """Two processes on one slice would do the same work twice; other slices may run."""
    with locked(tmp_path / "c", f"{LOCK_NAME}-1-of-2"):
        with pytest.raises(ConfigError, match=f"^output: {tmp_path}/c is in use by process "):
            world.run(tmp_path / "c", "slice=1/2")
        assert not (tmp_path / "c" / "job.json").exists()
        assert world.run(tmp_path / "c", "slice=0/2").shards_done == 3
        with pytest.raises(ConfigError, match="is in use by process "):
            repair_cache(tmp_path / "c")
    with locked(tmp_path / "c"), pytest.raises(ConfigError, match="is in use by process "):
        world.run(tmp_path / "c")
    assert world.run(tmp_path / "c", "slice=1/2").complete
    assert not list((tmp_path / "c").glob(f"{LOCK_NAME}*"))


def test_killed_between_any_two_steps_and_resumed_it_is_the_same_cache(
    world: World, small: Path, tmp_path: Path
) -> None:
    """SIGKILL before the n-th change on disk, for n spread over the run; each is then resumed."""
    data = small.parent / "set"
    expected = file_entries(small)
    context = fork_server()

    def attempt(output: Path, moment: int) -> int | None:
        here, there = context.Pipe()
        arguments = world.arguments(output, data=data)
        process = context.Process(target=run_and_die, args=(arguments, str(output), moment, there))
        process.start()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        return here.recv() if process.exitcode == 0 else None

    changes = attempt(tmp_path / "counted", sys.maxsize)
    assert changes is not None
    generator = random.Random(0)
    middle = changes // 2  # roughly when the first of two shards is committed
    moments = {1, 3, middle - 1, middle, middle + 1, changes - 1, changes, *generator.sample(range(4, changes - 1), 4)}
    for moment in sorted(moments):
        output = tmp_path / f"c{moment}"
        assert attempt(output, moment) is None
        assert (output / CACHE_NAME).exists() == (moment == changes)  # the last one releases the lock
        if generator.random() < 0.4:  # and once more while it resumes
            attempt(output, generator.randrange(1, middle))
        world.run(output, data=data)
        assert file_entries(output) == expected, f"killed before change {moment}"
        shutil.rmtree(output)


def test_the_command_killed_and_started_again_gives_the_same_digest(
    world: World, finished: Path, tmp_path: Path
) -> None:
    output = tmp_path / "c"
    command = [*COMMAND, "run", *world.arguments(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[3])}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not list(output.glob("shards/samples-*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    resumed = subprocess.run([*command, "--json"], env=environment, capture_output=True, text=True, check=True)
    summary = json.loads(resumed.stdout)
    assert summary["complete"]
    assert summary["digest"] == open_cache(finished).digest
    assert summary["sequences"] < 24 or process.returncode == 0
    assert verify_cache(output).ok


def test_a_disk_that_fills_up_stops_the_run_and_room_lets_it_go_on(
    world: World, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards are written while the teacher runs on: its next one is abandoned, those before are kept."""
    write = store.write_shard

    def fill(folder: Path, name: str, *rest: Any) -> None:
        write(folder, name, *rest)
        if name == "samples-000002":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(store, "write_shard", fill)
        with pytest.raises(CacheError, match=r"shards/samples-000002: cannot be written: No space left on device: "):
            world.run(tmp_path / "c")
    there = sorted(path.name for path in (tmp_path / "c/shards").iterdir())
    assert there == ["samples-000000", "samples-000001"]
    assert world.run(tmp_path / "c").sequences == 14
    assert file_entries(tmp_path / "c") == file_entries(finished)


def test_what_cannot_be_captured_is_on_record(world: World, tmp_path: Path) -> None:
    samples = tiny_samples(6)
    long = Sample("long", (Turn("user", "many " * 300), Turn("assistant", "words")))
    rows: list[Sample | Located] = [*samples[:3], Located(long, "rows.json", 41), *samples[3:]]
    write_set(rows, tmp_path / "set", shard_samples=4)
    summary = world.run(tmp_path / "c", "max_length=200", data=tmp_path / "set")
    assert (summary.sequences, summary.rejected) == (6, 1)
    row = json.loads((tmp_path / "c/rejected.jsonl").read_text())
    assert (row["key"], row["role"]) == ("long", "response")
    assert (row["file"], row["row"]) == ("rows.json", 41)
    assert "more than max_length 200" in row["reason"]
    cache = open_cache(tmp_path / "c")
    assert ("long", "response") not in cache
    assert cache.totals["rejected"] == 1


def test_a_sequence_beyond_the_teachers_context_is_rejected(world: World, tmp_path: Path) -> None:
    long = Sample("long", (Turn("user", "many " * 1100), Turn("assistant", "words")))
    write_set([long, *tiny_samples(1)], tmp_path / "set")
    world.run(tmp_path / "c", "max_length=100000", data=tmp_path / "set")
    assert "the teacher takes 1024" in (tmp_path / "c/rejected.jsonl").read_text()


def test_a_set_of_which_nothing_can_be_captured_is_an_error(world: World, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"no sequence could be captured: see the reasons in .*rejected.jsonl"):
        world.run(tmp_path / "c", "max_length=5")


def test_preference_samples_give_both_roles(world: World, tmp_path: Path) -> None:
    summary = world.run(tmp_path / "c", data=world.pairs)
    cache = open_cache(tmp_path / "c")
    assert summary.sequences == 14
    assert cache.roles == ("chosen", "rejected")
    assert cache.keys("chosen") == cache.keys("rejected") == {f"pair-{number:04d}" for number in range(7)}
    chosen, rejected = (cache.sequence("pair-0003", role) for role in cache.roles)
    assert chosen.content_hash == rejected.content_hash
    assert chosen.target_hash != rejected.target_hash
    assert chosen.sum_log_prob != rejected.sum_log_prob


def test_forced_tokens_are_in_every_head(world: World, tmp_path: Path) -> None:
    world.run(tmp_path / "c", "capture.forced_tokens=['<|endoftext|>','7']", "capture.top_k=2")
    cache = open_cache(tmp_path / "c")
    tokenizer = load_tokenizer(world.teacher)
    targets = cache.targets([(key, "response") for key in cache.keys("response")])
    for token in (tokenizer.convert_tokens_to_ids("<|endoftext|>"), tokenizer.encode("7")[0]):
        assert (targets.topk_ids_NK == token).any(-1).all()
    assert targets.topk_ids_NK.shape[1] <= 4


@pytest.mark.parametrize(
    ("override", "error", "words"),
    [
        ("capture.min_prop=0.9", ConfigError, "min_prob"),
        ("capture.top_k=many", ConfigError, "capture.top_k"),
        ("capture.top_k=0", ConfigError, "capture.top_k is 0: must be at least 1"),
        (
            "capture.precision=float8",
            ConfigError,
            "capture.precision is 'float8': must be one of coarse, fine",
        ),
        ("capture.positions=some", ConfigError, "capture.positions is 'some': must be response or all"),
        ("capture.temperatures=[1.0]", ConfigError, "capture.temperatures is [1.0]: all must be above 0, and not 1"),
        ("capture.temperature=0", ConfigError, "capture.temperature is 0: must be above 0"),
        ("capture.top_p=1.5", ConfigError, "capture.top_p is 1.5: must be from 0 to 1"),
        (
            f"capture.forced_tokens={[str(n) for n in range(256)]}",
            ConfigError,
            "capture.forced_tokens has 256: must be at",
        ),
        ("capture.forced_tokens=['circle square']", ConfigError, "'circle square' is"),
        ("batch_size=0", ConfigError, "batch_size is 0: must be at least 1"),
        ("slice=4/4", ConfigError, "slice: in '4/4'"),
        ("slice=half", ConfigError, "slice is 'half': must be i/n"),
        ("max_rejected=1.5", ConfigError, "max_rejected is 1.5: must be from 0 to 1"),
        ("engine.ray_workers=0", ConfigError, "engine.ray_workers is 0: must be at least 1"),
        ("dtype=int4", ConfigError, "dtype is 'int4'"),
        ("device=warp", ConfigError, "device is 'warp': must be auto, cpu, cuda, or one GPU"),
        ("template=vicuna", ConfigError, "template 'vicuna' is unknown"),
        ("data=nowhere", DataError, "'nowhere'"),
        ("teacher=nowhere", ModelError, "nowhere"),
    ],
)
def test_bad_settings_are_one_line_and_leave_nothing(
    world: World, tmp_path: Path, override: str, error: type[LlavaModError], words: str
) -> None:
    with pytest.raises(error) as caught:
        world.run(tmp_path / "c", override)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_with_more_ids_than_the_head_has_rows_is_refused(world: World, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(world.teacher, tmp_path / "teacher"))
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(ModelError, match="largest id is 400, but the model's LM head has 400 rows"):
        world.run(tmp_path / "c", f"teacher={folder}")
    assert not (tmp_path / "c").exists()


def test_another_set_or_other_settings_into_the_same_output_are_refused(world: World, finished: Path) -> None:
    before = file_entries(finished)
    with pytest.raises(CacheError, match=r"capture.top_k: was 250, now 7; sequence.max_length: was"):
        world.run(finished, "capture.top_k=7", "max_length=99")
    with pytest.raises(CacheError, match=r"data.digest: was"):
        world.run(finished, data=world.pairs)
    for setting in ("capture.top_k=7", "capture.temperature=2", "capture.temperatures=[3]"):
        with pytest.raises(ConfigError, match=r"allow: capture\.\w+ decides how records are read: it cannot differ"):
            world.run(finished, setting, allow=("capture",))
    summary = world.run(finished, "capture.seed=7", allow=("capture.seed",))
    assert summary.sequences == 0
    assert file_entries(finished) == before


@pytest.mark.parametrize("data", ["samples", "pairs"])
def test_each_member_of_a_tar_is_read_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str
) -> None:
    reads = count_reads(monkeypatch)
    packed = world.samples if data == "samples" else world.pairs
    world.run(tmp_path / "c", data=packed)
    members = SampleSet.open(packed).index.column("members").to_pylist()
    assert set(reads.values()) == {1}
    assert len(reads) == sum(map(len, members))
