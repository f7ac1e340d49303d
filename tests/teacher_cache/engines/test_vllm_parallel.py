"""A teacher that vLLM spreads over several processes: the records of the Hugging Face engine.

vLLM 0.32 cannot run pipeline parallelism on a CPU (its CPU runner has no buffers for what one stage passes to the
next), so only its settings are compared.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from llavamod_offline.vllm.settings import VllmSettings
from tests.teacher_cache.engines.vllm_world import HEAD_OF_32, Start, assert_same
from tests.tiny import tiny_samples, write_tiny_llava
from tests.vllm_cpu import NEEDS_VLLM, SETTINGS

pytestmark = NEEDS_VLLM


@pytest.mark.parametrize(
    ("settings", "runs"),
    [
        (dataclasses.replace(SETTINGS, executor="mp", tensor_parallel=2), True),
        (dataclasses.replace(SETTINGS, executor="mp", pipeline_parallel=2), False),
    ],
    ids=["tensor", "pipeline"],
)
def test_two_processes_share_a_model(settings: VllmSettings, runs: bool, start: Start, tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "teacher", hidden=HEAD_OF_32, head_rows=448)
    world = start(folder, settings)
    parallel = world.session.engine.vllm_config.parallel_config
    assert (parallel.world_size, parallel.distributed_executor_backend) == (2, "mp")
    assert (parallel.tensor_parallel_size, parallel.pipeline_parallel_size) == (
        settings.tensor_parallel,
        settings.pipeline_parallel,
    )
    if runs:
        samples = tiny_samples(12, seed=1)
        assert_same(world.capture(world.hf(), samples), world.capture(world.vllm(), samples))
