"""Checkpoints by Hub id: found where huggingface_hub keeps them, never downloaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import constants

from llavamod_offline.errors import ModelError
from llavamod_offline.families.llava.checkpoint import load_llava
from llavamod_offline.models.hub import checkpoint_folder, checkpoint_name, weight_files
from teacher_cache.fingerprint import describe_weights
from tests.hub import write_snapshot
from tests.tiny import write_tiny_llava, write_tiny_set


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and a working folder without checkpoints."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "hub"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llava(tmp_path_factory.mktemp("checkpoint") / "tiny")


def sharded(folder: Path) -> Path:
    """The same checkpoint in several shards."""
    target = folder.parent / "sharded"
    if not target.exists():
        load_llava(folder).save_pretrained(target, max_shard_size="100KB")
        for file in folder.iterdir():
            if file.suffix != ".safetensors" and not (target / file.name).exists():
                (target / file.name).write_bytes(file.read_bytes())
    assert len(list(target.glob("*.safetensors"))) > 1
    return target


def test_a_snapshot_is_found_by_id_and_revision(hub: Path, checkpoint: Path) -> None:
    first = write_snapshot(hub, "org/tiny", checkpoint)
    second = write_snapshot(hub, "org/tiny", sharded(checkpoint), revision="v2", commit="f" * 40)
    assert checkpoint_folder("org/tiny") == first
    assert checkpoint_folder("org/tiny@main") == first
    assert checkpoint_folder("org/tiny@v2") == checkpoint_folder(f"org/tiny@{'f' * 40}") == second
    assert checkpoint_name(checkpoint_folder("org/tiny")) == "org/tiny"
    assert checkpoint_name(checkpoint) == "tiny"
    assert describe_weights(first) == describe_weights(checkpoint)
    load_llava(second)


def test_a_folder_of_that_name_comes_first(hub: Path, checkpoint: Path) -> None:
    write_snapshot(hub, "org/tiny", checkpoint)
    Path("org/tiny").mkdir(parents=True)
    assert checkpoint_folder("org/tiny") == Path("org/tiny")
    for path in ("tiny", "/nowhere/tiny", "a/b/c", "./org/tiny2", "../org/tiny", "https://org/tiny"):
        assert checkpoint_folder(path) == Path(path)


@pytest.mark.parametrize(
    ("name", "command"),
    [("org/tiny", "`hf download org/tiny`"), ("org/tiny@v2", "`hf download org/tiny --revision v2`")],
)
def test_what_is_not_there_names_the_download(hub: Path, name: str, command: str) -> None:
    with pytest.raises(ModelError, match="nor a local snapshot of a Hub id") as caught:
        checkpoint_folder(name)
    assert str(caught.value).startswith(f"{name}: ")
    assert command in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("lacking", ["shard", "blob", "config.json", "index"])
def test_an_incomplete_snapshot_is_one_line(hub: Path, checkpoint: Path, lacking: str) -> None:
    snapshot = write_snapshot(hub, "org/tiny", sharded(checkpoint))
    shard = sorted(snapshot.glob("*.safetensors"))[-1]
    name = "config.json" if lacking == "config.json" else shard.name
    if lacking == "index":
        name = "model.safetensors.index.json"
        (snapshot / name).resolve().write_text("{")
    elif lacking == "blob":
        shard.resolve().unlink()
    else:
        (snapshot / name).unlink()
    with pytest.raises(ModelError, match=f"org/tiny: its local snapshot lacks {name}: run `hf download org/tiny`"):
        checkpoint_folder("org/tiny")


def test_a_snapshot_may_lack_weights_that_are_elsewhere(hub: Path, checkpoint: Path) -> None:
    """Like the snapshot of a teacher that runs on a server; everything else must be present."""
    snapshot = write_snapshot(hub, "org/tiny", sharded(checkpoint))
    for file in snapshot.glob("*.safetensors"):
        file.unlink()
    assert checkpoint_folder("org/tiny", weights=False) == snapshot
    assert describe_weights(snapshot, needed=False)["weights"] == {}
    with pytest.raises(ModelError, match="its local snapshot lacks"):
        checkpoint_folder("org/tiny")
    (snapshot / "config.json").unlink()
    with pytest.raises(ModelError, match=r"its local snapshot lacks config\.json"):
        checkpoint_folder("org/tiny", weights=False)


def test_a_folder_that_lacks_a_shard_is_one_line(tmp_path: Path, checkpoint: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for file in sharded(checkpoint).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    first, *_ = weight_files(folder)
    first.unlink()
    for use in (weight_files, describe_weights, load_llava):
        with pytest.raises(ModelError, match=f"{first.name} is missing: copy the checkpoint again"):
            use(folder)


@pytest.mark.slow
def test_commands_take_ids(tmp_path: Path, checkpoint: Path) -> None:
    """HF_HOME is respected, and no output names a folder of this machine."""
    write_snapshot(tmp_path / "home" / "hub", "org/tiny", checkpoint)
    write_tiny_set(tmp_path / "set", 8)
    env = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    env.pop("HF_HUB_CACHE", None)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *arguments], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
        )

    captured = run("teacher_cache", "run", "data=set", "teacher=org/tiny", "output=cache", "workers=1")
    assert captured.returncode == 0, captured.stderr
    settings = ("batch.global_size=4", "batch.micro_size=4", "steps=1", "workers=0")
    trained = run(
        "train",
        "mimic_dense",
        "data.set=set",
        "cache.path=cache",
        "student.checkpoint=org/tiny",
        "output=run",
        *settings,
    )
    assert trained.returncode == 0, trained.stderr
    for file in [*(tmp_path / "run" / "student").glob("*.json"), tmp_path / "cache" / "cache.json"]:
        assert str(tmp_path) not in file.read_text(), file
    assert "_name_or_path" not in json.loads((tmp_path / "run" / "student" / "config.json").read_text())
    missing = run("teacher_cache", "run", "data=set", "teacher=org/other", "output=other")
    assert missing.returncode == 2
    assert missing.stderr.count("\n") == 1
    assert "`hf download org/other`" in missing.stderr
