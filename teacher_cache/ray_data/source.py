"""A packed set as a dataset of Ray Data: one block of rows for each of its shards."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pyarrow as pa
import ray.data
from ray.data._internal.logical.operators import AbstractMap, Read, StreamingRepartition
from ray.data.block import BlockMetadata
from ray.data.datasource import Datasource, ReadTask

from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import ConfigError
from llavamod_offline.storage.folders import absolute, open_folder
from teacher_cache.format.manifest import JOB_NAME, read_object
from teacher_cache.ray_data.rows import SAMPLE_SCHEMA, sample_table
from teacher_cache.write.store import committed_shards


class SetSource(Datasource):
    """Reads whole shards of a set."""

    def __init__(self, samples: SampleSet, shards: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.samples, self.shards = samples, shards

    def get_name(self) -> str:
        """The name that Ray shows."""
        return "Set"

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown: Ray would split blocks by it."""
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[Any]:
        """One task per shard, whatever the parallelism."""
        return [
            ReadTask(
                _reading(self.samples, shard),
                BlockMetadata(len(self.samples.rows_of(shard)), None, None, None),
                schema=SAMPLE_SCHEMA,
            )
            for shard in self.shards
        ]


def read_set(where: str, *, missing_in: str | None = None) -> Any:
    """Read a packed set by path or URL: a Ray dataset with the columns of `rows.SAMPLE_SCHEMA`.

    `missing_in`: a cache of the set; only shards that it lacks are read, so that a pipeline continues where it ended.
    Errors: `DataError` if it is not a set; `CacheError` if what is at `missing_in` cannot be read.
    """
    samples = SampleSet.open(absolute(where))
    shards = samples.shard_names
    if missing_in is not None:
        folder = open_folder(missing_in)
        if JOB_NAME in folder.names():
            read_object(folder, JOB_NAME, way_out="choose another output")
            there = committed_shards(folder, shards)
            shards = [name for name in shards if name not in there]
    context = ray.data.DataContext.get_current().copy()
    context.target_max_block_size = None  # a shard stays in one block,
    context.max_errored_blocks = 0  # and none is dropped
    with ray.data.DataContext.current(context):
        return ray.data.read_datasource(SetSource(samples, shards), override_num_blocks=max(len(shards), 1))


def source_of(dataset: Any) -> SetSource:
    """The source of a dataset. Errors: `ConfigError` if that is not `read_set`, or a step between may split shards."""
    step = dataset._logical_plan.dag
    while not isinstance(step, Read):
        if not isinstance(step, AbstractMap) or isinstance(step, StreamingRepartition):
            raise ConfigError(
                f"ray_data: the step {step.name} may separate the rows of a shard, or hold some back: between "
                "read_set and write_cache, only filter and map"
            )
        (step,) = step.input_dependencies
    if not isinstance(step.datasource, SetSource):
        raise ConfigError("ray_data: the dataset does not come from read_set: begin with it")
    return step.datasource


def _reading(samples: SampleSet, shard: str) -> Callable[[], list[pa.Table]]:
    return partial(_read, samples, shard)


def _read(samples: SampleSet, shard: str) -> list[pa.Table]:
    return [sample_table(samples, shard)]
