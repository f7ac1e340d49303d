"""`cache-teacher run engine.kind=vllm`, on a CPU: a whole cache with the real command, in pieces and in one go."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from llavamod_offline.entrypoint import run_command
from teacher_cache.cli.main import app
from teacher_cache.read.reader import open_cache
from teacher_cache.verify.cache import verify_cache
from tests.tiny import write_tiny_llava, write_tiny_set
from tests.vllm_cpu import NEEDS_VLLM

pytestmark = NEEDS_VLLM

VLLM = ("engine.kind=vllm", "engine.vllm.kv_cache_gib=0.1", "engine.vllm.max_num_seqs=8", "device=cpu")
REFERENCE = "capture.preset=reference"


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("vllm-run")
    teacher = write_tiny_llava(folder / "teacher", hidden=128)
    samples = write_tiny_set(folder / "set", 12, shard_samples=4)
    return [f"data={samples}", f"teacher={teacher}", "capture.precision=exact"]


def _run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_command(app, ["run", *argv])
    printed = capsys.readouterr()
    status = stopped.value.code
    assert isinstance(status, int)
    return status, printed.out, printed.err


def _numbers(cache: Path) -> dict[str, tuple[float, float]]:
    opened = open_cache(cache)
    found = {key: opened.sequence(key, "response") for key in opened.keys("response")}
    return {key: (sequence.sum_log_prob, sequence.mean_entropy) for key, sequence in found.items()}


def test_a_cache_by_the_command_resumed_and_at_once(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, parts, hf = (f"output={tmp_path}/{name}" for name in ("whole", "parts", "hf"))
    status, out, _ = _run(capsys, *arguments, whole, *VLLM, "--json")
    assert status == 0
    summary = json.loads(out)
    assert (summary["complete"], summary["sequences"], summary["rejected"]) == (True, 12, 0)
    for part in ("0/2", "1/2"):
        assert _run(capsys, *arguments, parts, *VLLM, "--slice", part)[0] == 0
    assert open_cache(tmp_path / "parts").digest == summary["digest"]
    status, out, _ = _run(capsys, *arguments, parts, *VLLM)
    assert (status, "nothing to do" in out) == (0, True)
    verify_cache(tmp_path / "whole")
    engine = open_cache(tmp_path / "whole").fingerprint["engine"]
    assert (engine["name"], engine["dtype"], engine["head_dtype"]) == ("vllm", "float32", "float32")
    assert "0.32" in engine["vllm"]
    assert _run(capsys, *arguments, hf)[0] == 0
    expected, found = _numbers(tmp_path / "hf"), _numbers(tmp_path / "whole")
    assert expected.keys() == found.keys()
    for key, numbers in expected.items():
        assert np.allclose(numbers, found[key], rtol=1e-5, atol=1e-4), key


def test_a_cache_of_one_engine_is_not_finished_by_another(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = f"output={tmp_path}/cache"
    assert _run(capsys, *arguments, output, "--slice", "0/2")[0] == 0
    status, _, err = _run(capsys, *arguments, output, *VLLM)
    assert (status, err.count("\n")) == (2, 1)
    assert "engine.name" in err


def test_reference_log_probs_by_the_fallback(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["engine.kind=vllm_logprobs", *VLLM[1:]]
    status, _, err = _run(capsys, *arguments, f"output={tmp_path}/refused", *settings)
    assert (status, err.count("\n")) == (2, 1)
    assert "set capture.temperatures=[] capture.tail_samples_max=0, or engine.kind=vllm" in err
    assert _run(capsys, *arguments, REFERENCE, f"output={tmp_path}/cache", *settings)[0] == 0
    assert _run(capsys, *arguments, REFERENCE, f"output={tmp_path}/hf")[0] == 0
    expected, found = _numbers(tmp_path / "hf"), _numbers(tmp_path / "cache")
    assert expected.keys() == found.keys()
    for key, (log_prob, entropy) in expected.items():
        assert found[key][0] == pytest.approx(log_prob, abs=1e-3)
        assert found[key][1] < entropy
    limits = open_cache(tmp_path / "cache").fingerprint["engine"]["limits"]
    assert any("entropy" in limit for limit in limits)
