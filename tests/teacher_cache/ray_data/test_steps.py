"""The steps of a Ray Data pipeline one by one, without a cluster: what each takes, returns and refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from llavamod_offline.config import load_config
from llavamod_offline.errors import DataError
from teacher_cache.capture_setup import SetupValues, prepare_capture
from teacher_cache.config import CacheTeacherConfig
from teacher_cache.format.manifest import file_entries
from teacher_cache.read.reader import open_cache
from tests.teacher_cache.conftest import World

pytest.importorskip("ray")
pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")]


class Steps:
    """The steps of a pipeline over a set."""

    def __init__(self, settings: list[str], output: Path) -> None:
        from teacher_cache.ray_data.sink import CacheSink
        from teacher_cache.ray_data.teacher import TeacherActor

        values: SetupValues = load_config(CacheTeacherConfig, (), settings).setup_values
        self.setup = prepare_capture(**values)
        self.samples = self.setup.samples
        self.teacher = TeacherActor(values, self.setup.fingerprint)
        self.sink = CacheSink(self.samples, str(output), self.setup.fingerprint, self.setup.codec, ())
        self.store = self.sink.store()
        self.store.start()

    def rows(self, shard: str) -> pa.Table:
        """A block of samples."""
        from teacher_cache.ray_data.rows import sample_table

        return sample_table(self.samples, shard)

    def finish(self) -> str:
        """Complete the cache."""
        return str(self.store.finalise()["digest"])


@pytest.fixture
def steps(world: World, tmp_path: Path) -> Steps:
    return Steps(world.arguments(tmp_path / "c"), tmp_path / "c")


def test_each_shard_is_committed_as_run_commits_it(steps: Steps, finished: Path, tmp_path: Path) -> None:
    """Also if a step has bundled the blocks of several shards, and with columns added by a user."""
    first, *others = steps.samples.shard_names
    bundle = pa.concat_tables([steps.rows(name) for name in others])
    for block in (steps.rows(first), bundle):
        records = steps.teacher(block)
        records = records.append_column("mine", pa.array(range(len(records))))
        steps.sink.write([records], None)
    assert steps.finish() == open_cache(finished).digest
    assert file_entries(tmp_path / "c") == file_entries(finished)


def test_pairs_hidden_states_and_mismatched_answers(world: World, tmp_path: Path) -> None:
    more = ["capture.mismatched=true", "capture.hidden=float16"]
    steps = Steps(world.arguments(tmp_path / "c", *more, data=world.pairs), tmp_path / "c")
    for name in steps.samples.shard_names:
        steps.sink.write([steps.teacher(steps.rows(name))], None)
    assert steps.finish() == world.run(tmp_path / "alone", *more, data=world.pairs).digest


def test_what_a_filter_left_out_is_listed(steps: Steps) -> None:
    shard = steps.samples.shard_names[0]
    done = steps.sink.write([steps.teacher(steps.rows(shard).slice(1, 2))], None)
    assert [(item.sequences, item.rejected) for item in done] == [(2, [])]
    _, rejected = steps.store.outcomes([shard])
    assert [item.key for item in rejected] == [steps.samples.key_of(row) for row in (0, 3, 4)]
    assert {item.reason for item in rejected} == {"left out: a filter before the teacher removed its sample"}
    assert steps.sink.commit(steps.samples.shard_names[1], []).sequences == 0
    assert len(steps.store.outcomes(steps.samples.shard_names[:2])[1]) == 3 + 5


def changed(column: str, value: Any) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        rows = table.to_pylist()
        rows[1][column] = value
        return pa.Table.from_pylist(rows, schema=table.schema)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            changed("turns", [{"role": "user", "text": "?"}, {"role": "assistant", "text": "!"}]),
            "(differs from that of set|in the text for)",
        ),
        (changed("key", "another"), "sample 'another': differs from that of set"),
        (changed("row", 3), "differs from that of set"),
        (lambda table: table.drop_columns(["images"]), "ray_data: the column 'images' is missing"),
    ],
)
def test_a_changed_sample_is_refused(steps: Steps, change: Callable[[pa.Table], pa.Table], message: str) -> None:
    with pytest.raises(DataError, match=message):
        steps.teacher(change(steps.rows(steps.samples.shard_names[0])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.slice(1), "4 rows arrived together of the 5 that left the teacher"),
        (lambda table: pa.concat_tables([table, table.slice(0, 1)]), "6 rows arrived together of the 5"),
        (lambda table: pa.concat_tables([table.slice(1), table.slice(1, 1)]), "5 rows arrived together of the 5"),
        (changed("key", "another"), "has no sample 'another' with role 'response'"),
        (lambda table: table.drop_columns(["record"]), "the column 'record' is missing"),
    ],
)
def test_rows_that_are_lost_doubled_or_renamed_are_refused(
    steps: Steps, change: Callable[[pa.Table], pa.Table], message: str
) -> None:
    """And nothing of their shard is committed."""
    records = steps.teacher(steps.rows(steps.samples.shard_names[0]))
    with pytest.raises(DataError, match=message):
        steps.sink.write([change(records)], None)
    assert steps.store.missing() == steps.samples.shard_names


def test_an_empty_block_gives_an_empty_one(steps: Steps) -> None:
    block = steps.rows(steps.samples.shard_names[0]).slice(0, 0)
    assert len(steps.teacher(block)) == 0
    assert steps.sink.write([steps.teacher(block)], None) == []
