"""The command `cache-teacher`: its output, its exit statuses, and that help is printed at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from llavamod_offline.config import describe_config
from llavamod_offline.entrypoint import run_command
from teacher_cache.cli.main import app
from teacher_cache.config import CacheTeacherConfig
from teacher_cache.format.manifest import file_entries
from teacher_cache.read.reader import open_cache
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
    config.write_text(f"data: {world.pairs}\nteacher: {world.teacher}\noutput: nowhere\ncapture: {{top_k: 9}}\n")
    status, out, _ = _call(capsys, "run", str(config), f"output={tmp_path}/c", "capture.top_p=0.5", "--json")
    assert status == 0
    summary = json.loads(out)
    assert summary["complete"]
    assert summary["sequences"] == 14
    capture = open_cache(tmp_path / "c").fingerprint["capture"]
    assert (capture["head_max"], capture["head_mass"]) == (9, 0.5)
    status, out, _ = _call(capsys, "run", str(config), f"output={tmp_path}/c", "capture.top_p=0.5")
    assert status == 0
    assert f"{tmp_path}/c: nothing to do" in out
    assert summary["digest"] in out


def test_run_of_a_slice_says_what_is_left(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = world.arguments(tmp_path / "c", data=world.pairs)
    status, out, _ = _call(capsys, "run", *arguments, "--slice", "1/2")
    assert status == 0
    assert "1 of 2 shards are done: run the other slices to finish" in out
    status, _, err = _call(capsys, "verify", str(tmp_path / "c"))
    assert (status, err.count("\n")) == (2, 1)


def test_rejections_are_pointed_out(
    world: World, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = open_cache(finished)
    lengths = sorted(cache.sequence(key, "response").n_tokens for key in cache.keys("response"))
    limit = lengths[len(lengths) // 2]
    arguments = world.arguments(tmp_path / "c", f"max_length={limit}")
    status, out, _ = _call(capsys, "run", *arguments)
    assert status == 3
    rejected = [json.loads(line) for line in (tmp_path / "c/rejected.jsonl").read_text().splitlines()]
    keys = [row["key"] for row in rejected]
    assert len(rejected) == sum(length > limit for length in lengths) > 3
    assert f", {len(rejected)} rejected" in out
    assert f"rejected {len(rejected)}: N tokens, more than max_length N" in out
    assert f"({', '.join(keys[:3])}, …)" in out
    assert f"rejected sequences and reasons: {tmp_path}/c/rejected.jsonl" in out
    status, out, _ = _call(capsys, "run", *arguments)
    assert (status, "nothing to do" in out) == (3, True)  # the cache still lacks the rejected ones


def test_a_run_that_rejects_too_much_stops_and_goes_on_when_allowed(
    world: World, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = open_cache(finished)
    lengths = sorted(cache.sequence(key, "response").n_tokens for key in cache.keys("response"))
    limit = lengths[6]
    short = sum(length <= limit for length in lengths)
    arguments = world.arguments(tmp_path / "c", f"max_length={limit}")
    status, out, err = _call(capsys, "run", *arguments, "--max-rejected", "0.2")
    assert (status, out, err.count("error: ")) == (2, "", 1)
    assert " of 5 sequences rejected, more than max_rejected=0.2 allows" in err
    assert "like 'tiny-0001' (sample 'tiny-0001' (response): " in err
    assert [path.name for path in (tmp_path / "c/shards").iterdir()] == ["samples-000000"]
    status, _, err = _call(capsys, "run", *arguments, "--max-rejected", "0.2")
    assert (status, err.count("\n")) == (2, 1)  # existing rejections count: no teacher is loaded
    assert " of 5 sequences rejected" in err
    status, out, _ = _call(capsys, "run", *arguments, "--max-rejected", "1", "--json")
    summary = json.loads(out)
    assert (status, summary["complete"], summary["totals"]["sequences"]) == (3, True, short)
    assert sum(reason["count"] for reason in summary["reasons"]) == summary["rejected"] < 24 - short
    assert summary["totals"]["rejected"] == 24 - short
    world.run(tmp_path / "unlimited", f"max_length={limit}")
    assert file_entries(tmp_path / "c") == file_entries(tmp_path / "unlimited")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["run", "data=a", "teacher=b", "output=c", "captur.seed=1"], "captur"),
        (["run", "data=a", "teacher=b"], "output=VALUE"),
        (["run", "missing.yaml"], "no such config file: missing.yaml"),
        (["run", "data=a", "teacher=b", "output=c"], "set 'a': no such folder"),
        (["inspect", "nowhere"], "cache 'nowhere': no such folder"),
        (["inspect", __file__], f"cache '{__file__}': a file, not a folder"),
        (["status", "nowhere"], "cache 'nowhere': no such folder"),
        (["verify", "nowhere"], "cache 'nowhere': no such folder"),
        (["retry", "nowhere", "batch_size=1"], "cache 'nowhere': no such folder"),
        (["plan", "data=a", "teacher=b", "output=c"], "set 'a': no such folder"),
        (["plan", "missing.yaml"], "no such config file: missing.yaml"),
        (["export", "nowhere", "--output", "x.parquet"], "cache 'nowhere': no such folder"),
        (["merge", "nowhere", "elsewhere", "--output", "x"], "cache 'nowhere': no such folder"),
        (["report", "nowhere", "-o", "x.html"], "cache 'nowhere': no such folder"),
        (["audit", "nowhere", "data=a", "teacher=b"], "cache 'nowhere': no such folder"),
        (["audit", "nowhere", "data=a"], "teacher=VALUE"),
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
    column = path / "shards/set-000001/columns.zarr/entropy"
    (damaged,) = [file for file in column.rglob("*") if file.is_file() and file.name != "zarr.json"]
    with damaged.open("r+b") as stream:
        stream.seek(5)
        stream.write(b"\x00\xff")
    status, out, _ = _call(capsys, "verify", str(path))
    assert status == 1
    assert f"{damaged.relative_to(path)}: damaged" in out
    assert "DAMAGED in 1 place: " in out
    assert f"`cache-teacher verify {path} --repair` removes" in out
    status, out, _ = _call(capsys, "verify", str(path), "--json")
    assert (status, json.loads(out)["ok"]) == (1, False)


def test_inspect_counts_every_byte(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = _call(capsys, "inspect", str(finished), "--json")
    assert status == 0
    about = json.loads(out)
    size = sum(file.stat().st_size for file in finished.rglob("*") if file.is_file())
    assert about["bytes"] == size
    assert sum(about["bytes_per_position_by_part"].values()) == pytest.approx(size / about["positions"], abs=0.01)
    assert {"entropy", "sequences", "metadata"} < set(about["bytes_per_position_by_part"])
    status, out, _ = _call(capsys, "inspect", str(finished))
    assert about["digest"] in out
    assert "entropy" in out


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
    assert all(len(token["topk"]) >= 1 for token in sequence["tokens"])
    status, out, _ = _call(capsys, *argv)
    assert "'<|endoftext|>'" in out
    status, out, _ = _call(capsys, *argv[:3])
    assert f"#{sequence['tokens'][0]['id']} " in out
    status, _, err = _call(capsys, "inspect", str(finished), "no-such-key")
    assert status == 2
    assert "no record of sample 'no-such-key'" in err


def test_only_a_field_of_the_fingerprint_can_be_allowed(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = _call(capsys, "run", *world.arguments(tmp_path / "c"), "--allow", "engine.troch")
    assert (status, err) == (
        2,
        "error: allow: the fingerprint has no field 'engine.troch': did you mean 'engine.torch'?\n",
    )
    assert not (tmp_path / "c").exists()


def test_plan_run_and_plan_again(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plan before the run, the comparison afterwards; the cache holds no undeclared files."""
    arguments = world.arguments(tmp_path / "c", data=world.pairs)
    status, out, err = _call(capsys, "plan", *arguments, "--json")
    assert (status, err) == (0, "")
    planned = json.loads(out)
    assert [path.name for path in tmp_path.iterdir()] == [".c.plan.jsonl"]
    status, out, _ = _call(capsys, "plan", *arguments, "--samples", "1", "--seconds", "0")
    assert status == 0
    assert "1 of 7 samples captured" in out.replace("\n", " ")
    _call(capsys, "plan", *arguments, "--file", str(tmp_path / "kept.jsonl"))
    _call(capsys, "run", *arguments, "--slice", "0/2")
    _call(capsys, "run", *arguments)
    assert not [path for path in (tmp_path / "c").rglob("*") if "plan" in path.name]
    assert _call(capsys, "verify", str(tmp_path / "c"))[0] == 0
    status, out, _ = _call(capsys, "plan", *arguments, "--json")
    assert status == 0
    fact = json.loads(out)
    assert fact["positions"] == planned["positions"] == fact["runs_positions"]
    assert (fact["runs"], fact["planned"]["probe"]["samples"]) == (2, 1)
    status, out, _ = _call(capsys, "plan", *arguments)
    assert (status, out.count("Plan and result")) == (0, 1)
    status, out, _ = _call(capsys, "plan", *arguments, "--file", str(tmp_path / "kept.jsonl"), "--json")
    assert json.loads(out)["runs"] == 0


def test_export_says_what_it_wrote_and_what_it_left_out(
    world: World, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["export", str(finished), "--output"]
    status, out, _ = _call(capsys, *argv, str(tmp_path / "a.parquet"))
    cache = open_cache(finished)
    assert status == 0
    first, second = out.splitlines()
    assert f"a.parquet: {cache.positions:,} positions of 24 sequences, " in first
    assert second.startswith("not in this layout: tail mass, tail samples, entropy, log normalisers; its ids hold 0.9")
    whole = ["--format", "axolotl", "--data", str(world.samples), "--tokenizer", str(world.teacher), "--top-k", "4"]
    status, out, _ = _call(capsys, *argv, str(tmp_path / "b.parquet"), *whole)
    assert status == 0
    assert out.endswith("; 18 sequences with images left out\n")
    status, out, _ = _call(capsys, *argv, str(tmp_path / "c.parquet"), *whole, "--json")
    assert (json.loads(out)["with_images"], json.loads(out)["top_k"]) == (18, 4)
    status, _, err = _call(capsys, *argv, str(tmp_path / "c.parquet"))
    assert (status, err.count("\n")) == (2, 1)


def test_merge_prints_the_new_names(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    data = Path(shutil.copytree(world.pairs, tmp_path / "pairs"))
    world.run(tmp_path / "a", data=data)
    world.run(tmp_path / "b")
    status, out, _ = _call(capsys, "merge", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "c"))
    assert status == 0
    assert "38 sequences in 7 shards of 2 caches" in out
    status, out, _ = _call(capsys, "verify", str(tmp_path / "c"), "--json")
    assert (status, json.loads(out)["sequences"]) == (0, 38)
    argv = ["merge", str(tmp_path / "a"), str(tmp_path / "c"), "--output", str(tmp_path / "d")]
    status, _, err = _call(capsys, *argv)
    assert (status, err.count("\n")) == (2, 1)
    assert "'pair-0000' (chosen) is in cache" in err


def test_report_says_what_it_wrote(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["report", str(finished), "-o", str(tmp_path / "r.html"), "--samples", "1"]
    status, out, err = _call(capsys, *argv)
    positions = open_cache(finished).positions
    assert (status, err) == (0, "")
    assert f"r.html: {(tmp_path / 'r.html').stat().st_size:,} bytes" in out
    assert f"distributions over all {positions:,} positions" in out
    status, out, _ = _call(capsys, *argv, "--positions", "20", "--json")
    assert status == 0
    assert json.loads(out)["positions"] < json.loads(out)["of_positions"] == positions


@pytest.mark.parametrize("command", ["run", "generate", "plan", "audit"])
def test_help_explains_every_setting(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = _call(capsys, command, "--help")
    assert status == 0
    assert describe_config(CacheTeacherConfig) in out


@pytest.mark.parametrize("command", ["run", "generate", "plan"])
def test_the_settings_are_printed_to_be_edited(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = _call(capsys, command, "teacher=t", "capture.top_k=7", "--print-config")
    assert status == 0
    assert "\ndata: ???\n" in out
    assert "\nteacher: t\n" in out
    assert "\n  top_k: 7\n" in out


@pytest.mark.parametrize("command", ["run", "generate", "plan", "audit"])
def test_an_option_that_is_a_setting_is_answered_with_what_to_write(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = ["cache"] if command == "audit" else []
    for option, written in (
        (["--data", "sets/x"], "data=sets/x"),
        (["--output=o"], "output=o"),
        (["-o", "o"], "output=o"),
        (["--batch-size", "3"], "batch_size=3"),
        (["--top-k"], "capture.top_k=VALUE"),
    ):
        status, _, err = _call(capsys, command, *before, *option)
        assert status == 2
        assert err.startswith(f"error: no such option: {option[0].split('=')[0]}; ")
        assert err.endswith(f"write {written}\n")


def test_help_has_examples_and_needs_no_heavy_import() -> None:
    code = "import sys; from teacher_cache.cli.main import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers', 'zarr', 'pyarrow', 'rich'} & set(sys.modules)"
    for command in ("run", "plan", "verify", "inspect", "export", "generate", "merge", "report", "audit"):
        done = subprocess.run(
            [sys.executable, "-c", code, command, "--help"], capture_output=True, text=True, check=True
        )
        assert "Example" in done.stdout
        assert f"cache-teacher {command}" in done.stdout
