"""How settings for several GPUs become vLLM arguments."""

from __future__ import annotations

import pytest

from llavamod_offline.vllm.settings import VllmSettings


@pytest.mark.parametrize(
    ("settings", "arguments", "gpus"),
    [
        (VllmSettings(), (1, 1, None), 1),
        (VllmSettings(tensor_parallel=4), (4, 1, None), 4),
        (VllmSettings(tensor_parallel=8, pipeline_parallel=2, executor="ray"), (8, 2, "ray"), 16),
        (VllmSettings(pipeline_parallel=3, executor="mp"), (1, 3, "mp"), 3),
    ],
)
def test_the_shares_of_a_model_are_passed_on(
    settings: VllmSettings, arguments: tuple[int, int, str | None], gpus: int
) -> None:
    names = ("tensor_parallel_size", "pipeline_parallel_size", "distributed_executor_backend")
    assert settings.parallel_arguments == dict(zip(names, arguments, strict=True))
    assert settings.gpus == gpus


def test_no_engine_runs_on_less_than_one_gpu() -> None:
    assert list(VllmSettings(pipeline_parallel=0).problems("vllm")) == ["vllm.pipeline_parallel is 0: must be above 0"]
