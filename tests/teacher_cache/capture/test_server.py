"""`cache-teacher run engine.kind=server` on the replies of a real server: a whole cache, despite failures."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.entrypoint import run_command
from teacher_cache.cli.main import app
from teacher_cache.read.reader import open_cache
from teacher_cache.verify.cache import verify_cache
from tests.teacher_cache.engines.server.replaying import (
    LISTED,
    ReplayServer,
    cut_short,
    hang_up,
    replaying,
    samples,
    status,
    write_recorded_llava,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("server-run")
    write_recorded_llava(folder / "teacher")
    write_set(samples(), folder / "set", shard_samples=2)
    return folder


@pytest.fixture
def server() -> Iterator[ReplayServer]:
    with replaying() as server:
        yield server


def _run(
    capsys: pytest.CaptureFixture[str], server: ReplayServer, folder: Path, *more: str, command: str = "run"
) -> tuple[int, str, str]:
    capsys.readouterr()
    settings = [f"data={folder}/set", f"teacher={folder}/teacher", "engine.kind=server", f"engine.url={server.url}"]
    kept = ["capture.preset=reference", f"capture.top_k={LISTED}", "engine.server.concurrency=1"]
    with pytest.raises(SystemExit) as stopped:
        run_command(app, [command, *settings, *kept, *more])
    printed = capsys.readouterr()
    return int(str(stopped.value.code)), printed.out, printed.err


def test_a_cache_in_spite_of_failures_and_stops(
    folder: Path, server: ReplayServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status_, out, _ = _run(capsys, server, folder, f"output={tmp_path}/whole", "--json")
    assert status_ == 0
    digest = json.loads(out)["digest"]
    verify_cache(tmp_path / "whole")
    assert open_cache(tmp_path / "whole").fingerprint["engine"]["name"] == "server"

    output = f"output={tmp_path}/parts"
    server.faults.extend([hang_up, cut_short, status(503)])
    assert _run(capsys, server, folder, output, "--slice", "0/2")[0] == 0
    server.faults.append(status(400, {"error": {"message": "too many images"}}))
    ended, _, err = _run(capsys, server, folder, output)
    assert (ended, err.count("sample '")) == (2, 1)
    assert "was refused: 400: too many images" in err
    ended, out, _ = _run(capsys, server, folder, output, "--json")
    assert (ended, json.loads(out)["digest"]) == (0, digest)


def test_a_plan_and_an_audit_of_a_served_teacher(
    folder: Path, server: ReplayServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plan omits presets that a server cannot provide; the audit compares with the weights themselves."""
    output = f"output={tmp_path}/cache"
    ended, out, _ = _run(capsys, server, folder, output, "--json", command="plan")
    assert (ended, list(json.loads(out)["presets"])) == (0, ["reference"])
    assert _run(capsys, server, folder, output)[0] == 0
    with pytest.raises(SystemExit) as stopped:
        run_command(app, ["audit", f"{tmp_path}/cache", f"data={folder}/set", f"teacher={folder}/teacher"])
    assert stopped.value.code == 0, capsys.readouterr().out


def test_the_weights_need_not_be_here(
    folder: Path, server: ReplayServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = folder / "teacher" / "model.safetensors"
    hidden = weights.rename(tmp_path / "weights")
    try:
        assert _run(capsys, server, folder, f"output={tmp_path}/cache")[0] == 0
    finally:
        hidden.rename(weights)
    assert open_cache(tmp_path / "cache").fingerprint["teacher"]["weights"] == {}


def test_nothing_is_written_before_the_server_has_answered(
    folder: Path, server: ReplayServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    away = ReplayServer(url="http://127.0.0.1:1")
    ended, _, err = _run(capsys, away, folder, f"output={tmp_path}/cache", "engine.server.patience_seconds=0")
    assert (ended, err.count("\n")) == (2, 1)
    assert "http://127.0.0.1:1: its version: no answer" in err
    assert not (tmp_path / "cache" / "cache.json").exists()
