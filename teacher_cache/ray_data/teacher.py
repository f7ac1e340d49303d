"""The teacher as a step of a Ray Data pipeline: samples in, captured sequences out."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy

from llavamod_offline.errors import ConfigError
from teacher_cache.capture.ray_placing import absolute_values, choose_device, places
from teacher_cache.capture.shard import capture_prepared, prepare_samples
from teacher_cache.capture_setup import SetupValues, follow_template, prepare_capture
from teacher_cache.config import CacheTeacherConfig
from teacher_cache.fingerprint import differences
from teacher_cache.ray_data.rows import RECORD_SCHEMA, by_shard, record_table, sample_of
from teacher_cache.ray_data.source import source_of
from teacher_cache.write.store import begun_fingerprint


class TeacherActor:
    """Captures blocks of samples with an engine of its own; whole shards, each as `cache-teacher run` does."""

    def __init__(self, values: SetupValues, fingerprint: Mapping[str, Any]) -> None:
        self._setup = prepare_capture(**values)
        if found := differences(fingerprint, self._setup.fingerprint):
            raise ConfigError(
                f"ray_data: host {platform.node()} would capture something different from the driver: "
                f"{'; '.join(found)}: give all hosts of the cluster the same checkpoint, set and versions"
            )
        self._engine = self._setup.load()

    def __call__(self, block: pa.Table) -> pa.Table:
        """Capture the rows of `rows.SAMPLE_SCHEMA`; gives rows of `rows.RECORD_SCHEMA`."""
        setup = self._setup
        tables = []
        for shard, rows in by_shard(block.to_pylist()).items():
            samples = [(int(row["row"]), sample_of(row, setup.samples)) for row in rows]
            prepared = prepare_samples(setup, samples)
            captured, rejected = capture_prepared(setup, self._engine, prepared, lambda samples, positions: None)
            tables.append(record_table(captured, rejected, setup.samples, shard))
        return pa.concat_tables(tables) if tables else RECORD_SCHEMA.empty_table()


def capture(samples: Any, config: CacheTeacherConfig) -> Any:
    """Run the teacher on rows of `read_set`: a Ray dataset with the columns of `rows.RECORD_SCHEMA`.

    `config.engine` says how many actors there are at most, and what each gets of the cluster.
    Errors: a `LlavaModError`, if set, teacher and settings do not fit together, or the dataset is not of that set.
    """
    values, gpus = placed_values(config)
    setup = prepare_capture(**values)
    found, wanted = source_of(samples).samples, setup.samples
    if found.digest != wanted.digest:
        raise ConfigError(f"ray_data: the dataset reads set '{found.path}', data is '{config.data}': name one set")
    cpus = config.engine.cpus_per_worker
    most = config.engine.ray_workers or places(_cluster(), cpus=cpus, gpus=gpus)
    if gpus == 0 and config.engine.ray_workers is None:
        most = max(most - 1, 1)  # the pipeline's other steps need a core
    return samples.map_batches(
        TeacherActor,
        fn_constructor_args=(values, setup.fingerprint),
        batch_size=None,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(min_size=1, max_size=most),
        num_cpus=cpus,
        num_gpus=gpus,
    )


def _cluster() -> dict[str, float]:
    found: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return found


def placed_values(config: CacheTeacherConfig) -> tuple[SetupValues, float]:
    """What a setup is made from on any machine of the cluster, and an actor's GPUs. Errors: `ConfigError`."""
    wrong = (
        ("output_set", config.output_set is not None),
        ("engine.ray", config.engine.ray),
        ("slice", config.part != (0, 1)),
    )
    for name, given in wrong:
        if given:
            raise ConfigError(f"config: {name}: a pipeline of Ray Data captures the whole set by itself: remove it")
    if config.capture.without_image is not None:
        raise ConfigError("capture.without_image: rows of Ray Data hold no visual advantages: capture with `run`")
    if not ray.is_initialized():
        ray.init()
    values = absolute_values(follow_template(config.setup_values, begun_fingerprint(config.output)))
    has_gpu = _cluster().get("GPU", 0) > 0
    return choose_device(values, config.engine.gpus_per_worker, has_gpu=has_gpu)
