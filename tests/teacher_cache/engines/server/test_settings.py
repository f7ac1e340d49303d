"""Settings of a served teacher as the command takes them, its fingerprint, and its presets."""

from __future__ import annotations

import pytest

from llavamod_offline.config import load_config
from llavamod_offline.errors import ConfigError, ModelError
from teacher_cache.config import CacheTeacherConfig
from teacher_cache.engines.registry import describe_engine
from tests.teacher_cache.engines.server.replaying import replaying

REQUIRED = ("data=d", "teacher=t", "output=o")
SERVER = (*REQUIRED, "engine.kind=server")
URL = "engine.url=http://127.0.0.1:1"


def _config(*settings: str) -> CacheTeacherConfig:
    return load_config(CacheTeacherConfig, (), settings)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (SERVER, "engine.url: engine.kind=server needs the server's address, such as http://gpu-host:8000"),
        ((*SERVER, "engine.url=gpu-host:8000"), "engine.url is 'gpu-host:8000': expected an address such as"),
        ((*SERVER, "engine.url=http://gpu-host:99999"), "engine.url is 'http://gpu-host:99999': expected an address"),
        ((*SERVER, "engine.url=http://"), "engine.url is 'http://': expected an address"),
        ((*REQUIRED, URL), "engine.url is for engine.kind=server, not hf: set that, or remove it"),
        ((*SERVER, URL, "engine.ray=true"), "engine.ray: a server batches for itself"),
        ((*SERVER, URL, "engine.server.concurrency=0"), "engine.server.concurrency is 0: must be at least 1"),
        (
            (*SERVER, URL, "engine.server.patience_seconds=-1"),
            "engine.server.patience_seconds is -1: must be 0 or more",
        ),
        (
            (*SERVER, URL, "engine.server.key_variable=NO_SUCH_KEY"),
            "engine.server.key_variable: the environment variable NO_SUCH_KEY is not set",
        ),
    ],
)
def test_problems_name_the_key(settings: tuple[str, ...], problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        _config(*settings)
    assert problem in str(refused.value)


@pytest.mark.parametrize("preset", ["small", "compact", "standard", "exhaustive"])
def test_presets_that_need_more_are_refused_before_the_server_is_asked(preset: str) -> None:
    """Only `reference` fits; for the others, the error names what to switch off."""
    values = _config(*SERVER, URL, f"capture.preset={preset}").setup_values
    with pytest.raises(ConfigError, match=r"engine\.kind=server cannot capture what these settings ask") as refused:
        describe_engine(values, "auto", "cpu")
    asked = [word for word in str(refused.value).replace(",", "").split() if word.startswith("capture.")]
    assert asked
    with pytest.raises(ModelError, match=r"http://127\.0\.0\.1:1: its version: no answer"):
        describe_engine(_config(*SERVER, URL, f"capture.preset={preset}", *asked).setup_values, "auto", "cpu")


def test_the_fingerprint_says_that_the_teacher_was_served() -> None:
    with replaying() as server:
        values = _config(*SERVER, f"engine.url={server.url}", "capture.preset=reference").setup_values
        described = describe_engine(values, "float32", "cpu")
        server.change = lambda reply: reply.pop("system_fingerprint", None)
        hidden = describe_engine(values, "float32", "cpu")
    assert {described[name] for name in ("dtype", "head_dtype", "device", "torch")} == {"as served"}
    assert (described["name"], described["vllm"], described["model"]) == ("server", "0.32.0", "teacher")
    assert described["system_fingerprint"].startswith("vllm-0.32.0-")
    assert hidden["system_fingerprint"] is None
    said = " | ".join(described["limits"])
    assert all(part in said for part in ("no tail samples", "entropy", "the teacher's weights", "data types"))
    assert server.url not in str(described)
