"""The command `cache-teacher`: what it prints, its exit statuses, and that help comes at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llavamod_offline.command import run_command
from teacher_cache.cli import app
from teacher_cache.reader import open_cache
from tests.teacher_cache.conftest import World


def _call(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_command(app, argv)
    printed = capsys.readouterr()
    status = stopped.value.code
    assert isinstance(status, int)
    return status, printed.out, printed.err


def test_run_from_a_yaml_file_with_overrides(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "capture.yaml"
    config.write_text(f"data: {world.pairs}\nteacher: {world.teacher}\noutput: nowhere\ncapture: {{head_max: 9}}\n")
    status, out, _ = _call(capsys, "run", str(config), f"output={tmp_path}/c", "capture.head_mass=0.5", "--json")
    assert status == 0
    summary = json.loads(out)
    assert summary["complete"]
    assert summary["sequences"] == 14
    capture = open_cache(tmp_path / "c").fingerprint["capture"]
    assert (capture["head_max"], capture["head_mass"]) == (9, 0.5)
    status, out, _ = _call(capsys, "run", str(config), f"output={tmp_path}/c", "capture.head_mass=0.5")
    assert status == 0
    assert f"{tmp_path}/c: nothing to do" in out
    assert summary["digest"] in out


def test_run_of_a_slice_says_what_is_left(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = world.arguments(tmp_path / "c", data=world.pairs)
    status, out, _ = _call(capsys, "run", *arguments, "--slice", "1/2")
    assert status == 0
    assert "1 of 2 shards are there: run the other slices to finish" in out
    status, _, err = _call(capsys, "verify", str(tmp_path / "c"))
    assert (status, err.count("\n")) == (2, 1)


def test_rejections_are_pointed_out(
    world: World, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = open_cache(finished)
    lengths = sorted(cache.sequence(key, "response").n_tokens for key in cache.keys("response"))
    limit = lengths[len(lengths) // 2]
    status, out, _ = _call(capsys, "run", *world.arguments(tmp_path / "c", f"max_length={limit}"))
    assert status == 0
    rejected = (tmp_path / "c/rejected.jsonl").read_text().splitlines()
    assert len(rejected) == sum(length > limit for length in lengths) > 0
    assert f", {len(rejected)} rejected" in out
    assert f"the rejected sequences and the reasons are in {tmp_path}/c/rejected.jsonl" in out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["run", "data=a", "teacher=b", "output=c", "captur.seed=1"], "captur"),
        (["run", "data=a", "teacher=b"], "output=VALUE"),
        (["run", "missing.yaml"], "missing.yaml: no such config file"),
        (["run", "data=a", "teacher=b", "output=c"], "set 'a': no such folder"),
        (["verify", "nowhere"], "cache 'nowhere'"),
        (["inspect", "nowhere"], "cache 'nowhere': no such folder"),
    ],
)
def test_errors_are_one_line_with_status_2(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = _call(capsys, *argv)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ")
    assert words in err
    assert list(tmp_path.iterdir()) == []


def test_verify_prints_the_verdict_and_exits_1_on_damage(
    finished: Path, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, _ = _call(capsys, "verify", str(finished), "--json")
    cache = open_cache(finished)
    assert status == 0
    assert json.loads(out) == {
        "ok": True,
        "shards": 5,
        "sequences": 24,
        "positions": cache.positions,
        "digest": cache.digest,
        "damage": [],
    }
    import shutil

    path = Path(shutil.copytree(small, tmp_path / "c"))
    with (path / "shards/set-000001/columns.zarr/entropy/c/0").open("r+b") as stream:
        stream.seek(5)
        stream.write(b"\x00\xff")
    status, out, _ = _call(capsys, "verify", str(path))
    assert status == 1
    assert "shards/set-000001/columns.zarr/entropy/c/0: damaged" in out
    assert "DAMAGED (1 findings)" in out
    status, out, _ = _call(capsys, "verify", str(path), "--json")
    assert (status, json.loads(out)["ok"]) == (1, False)


def test_inspect_counts_every_byte(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = _call(capsys, "inspect", str(finished), "--json")
    assert status == 0
    about = json.loads(out)
    size = sum(file.stat().st_size for file in finished.rglob("*") if file.is_file())
    assert about["bytes"] == size
    assert sum(about["bytes_per_position_by_part"].values()) == pytest.approx(size / about["positions"], abs=0.01)
    assert {"head_ids", "head_log_probs", "draw_ids", "sequences", "metadata"} <= set(
        about["bytes_per_position_by_part"]
    )
    status, out, _ = _call(capsys, "inspect", str(finished))
    assert about["digest"] in out
    assert "head_log_probs" in out


def test_inspect_shows_each_token_of_a_key_with_its_alternatives(
    world: World, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["inspect", str(finished), "tiny-0003", "--tokenizer", str(world.teacher)]
    status, out, _ = _call(capsys, *argv, "--json")
    assert status == 0
    (sequence,) = json.loads(out)
    cache = open_cache(finished)
    assert [token["id"] for token in sequence["tokens"]] == cache.target_ids("tiny-0003", "response").tolist()
    assert "".join(json.loads(f'"{token["token"][1:-1]}"') for token in sequence["tokens"][:2]).startswith(" The")
    assert all(len(token["head"]) >= 1 for token in sequence["tokens"])
    status, out, _ = _call(capsys, *argv)
    assert "'<|endoftext|>'" in out
    status, out, _ = _call(capsys, *argv[:3])
    assert f"#{sequence['tokens'][0]['id']} " in out
    status, _, err = _call(capsys, "inspect", str(finished), "no-such-key")
    assert status == 2
    assert "no record of sample 'no-such-key'" in err


def test_settings_lists_every_key_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = _call(capsys, "settings")
    assert status == 0
    assert "data: str = required" in out
    assert "capture.head_mass: float = 0.97" in out


def test_help_has_examples_and_needs_no_heavy_import() -> None:
    code = "import sys; from teacher_cache.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers', 'zarr', 'pyarrow'} & set(sys.modules)"
    for command in ("run", "verify", "inspect", "settings"):
        done = subprocess.run(
            [sys.executable, "-c", code, command, "--help"], capture_output=True, text=True, check=True
        )
        assert "Example" in done.stdout
        assert f"cache-teacher {command}" in done.stdout
