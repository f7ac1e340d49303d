"""The commands as a user types them."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from eval.cli import app
from eval.generate import EvalGenerateConfig
from eval.tasks import TASKS
from llavamod_offline.config import describe_config
from llavamod_offline.entrypoint import run_command
from tests.eval.fixtures import MMBENCH_ROWS, answers, pope_root, write_jsonl, write_tsv
from tests.tiny import write_tiny_llava


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        run_command(app, [str(argument) for argument in arguments])
    return int(stopped.value.code or 0)


def test_generate_then_score_then_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = pope_root(tmp_path / "data")
    model = write_tiny_llava(tmp_path / "model")
    config = tmp_path / "eval.yaml"
    config.write_text(f"model: {model}\nroot: {root}\noutput: {tmp_path / 'out'}\ntasks: [pope]\n")
    assert run("generate", config, "max_new_tokens=4", "batch_size=4") == 0
    predictions = tmp_path / "out" / "pope" / "predictions.jsonl"
    assert f"pope: {predictions}" in capsys.readouterr().out
    scored = ("score", "pope", "--root", root, "--predictions")
    assert run(*scored, predictions, "--output", tmp_path / "s" / "x.json") == 0
    shown = capsys.readouterr().out
    assert "f1_mean" in shown
    assert r"prompt: {question}\nAnswer the question using a single word or phrase." in shown
    score = json.loads((tmp_path / "s" / "x.json").read_text())
    counts = ["n", "limit", "n_missing", "n_unanswerable", "n_unparsed"]
    assert list(score) == ["task", "headlines", "metrics", *counts, "protocol", "data_sha256"]
    assert run(*scored, predictions, "--json") == 0
    assert json.loads(capsys.readouterr().out) == score
    for name in ("f1_adversarial", "f1_popular", "f1_random", "f1_mean", "accuracy", "yes_ratio"):
        assert isinstance(score["metrics"][name], float)
    exported = tmp_path / "answers.jsonl"
    assert run("export", "pope", "--root", root, "--predictions", predictions, "-o", exported, "--model", "model") == 0
    assert exported.read_bytes() == (tmp_path / "out" / "pope" / "answers.jsonl").read_bytes()
    first = json.loads(exported.read_text().splitlines()[0])
    assert first["question_id"] == 1  # a number, as eval_pope.py looks it up
    assert run("score", "pope", "--root", root, "--predictions", exported, "--output", tmp_path / "again.json") == 0
    assert json.loads((tmp_path / "again.json").read_text())["metrics"] == score["metrics"]


def test_errors_are_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = pope_root(tmp_path / "data")
    path = write_jsonl(tmp_path / "a.jsonl", answers({1: "Yes", 77: "No"}))
    odd = write_jsonl(tmp_path / "odd.jsonl", answers({"a\n\x1b[31mb\u2028": "Yes", "x" * 5000: "No"}))
    cases = [
        (("score", "pope", "--root", root, "--predictions", odd), "2 predictions ('a\\n\\x1b[31mb\\u2028', 'xxx"),
        (("score", "popes", "--root", root, "--predictions", path), "task 'popes' is unknown: choose one of"),
        (("score", "pope", "--root", root, "--predictions", path), "1 prediction ('77') without a matching question"),
        (("score", "pope", "--root", tmp_path / "no", "--predictions", path), "no such folder"),
        (("score", "pope", "--root", root, "--predictions", path, "--judge-model", "m"), "need --judge"),
        (("score", "pope", "--root", root, "--predictions", path, "--judge-max-tokens", "9"), "need --judge"),
        (("score", "pope", "--root", root, "--predictions", path, "--judge", "nothing"), "neither a URL"),
        (("score", "pope", "--root", root, "--predictions", path, "-o", path), "is the predictions file"),
        (("export", "pope", "--root", root, "--predictions", path, "-o", path), "is the predictions file"),
        (
            ("export", "pope", "--root", root, "--predictions", path, "-o", tmp_path / "x.xlsx"),
            "can only be exported as .jsonl",
        ),
        (("portable", tmp_path / "none", "-o", tmp_path / "new"), "none: no such checkpoint folder"),
        (("score", "pope", "--root", root, "--predictions", path, "--json", "s.json"), "write --output s.json"),
        (("score", "pope", "root=a"), "this command takes options: write --root a"),
        (("generate", "--limit", "3"), "settings are written as KEY=VALUE: write limit=3"),
        (("generate", "batchsize=3"), "unknown setting batchsize: did you mean batch_size?"),
        (
            ("generate", "model=a", "root=b", "output=c", "tasks=[popes]"),
            "tasks: 'popes' is unknown: did you mean pope?",
        ),
        (("generate", "model=a", "root=b", "output=c"), "tasks: name at least one"),
        (("generate", "model=a", "root=b", "output=c", "tasks=pope,gqa"), "tasks takes a list: write tasks=[pope,gqa]"),
        (("generate", "model=a", "tasks=[pope]"), "no value for"),
        (("generate", tmp_path / "none.yaml"), "no such config file"),
    ]
    for arguments, message in cases:
        assert run(*arguments) == 2, arguments
        shown = capsys.readouterr().err
        assert message in shown
        assert shown.startswith("error: ")
        assert shown.count("\n") == 1
        assert shown[:-1].isprintable()
    assert not (tmp_path / "x.xlsx").exists()


def test_help_names_every_key_and_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "--help") == 0
    shown = capsys.readouterr().out
    assert describe_config(EvalGenerateConfig) in shown
    assert " ".join(TASKS) in " ".join(shown.split())


def test_python_m_eval_is_the_command() -> None:
    shown = subprocess.run([sys.executable, "-m", "eval", "--help"], capture_output=True, text=True, check=True).stdout
    assert all(name in shown for name in ("generate", "score", "export", "report", "portable"))


def test_an_upload_without_its_package_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tsv(tmp_path / "mmbench" / "mmbench_dev_20230712.tsv", MMBENCH_ROWS)
    path = write_jsonl(tmp_path / "a.jsonl", answers(dict.fromkeys((int(row["index"]) for row in MMBENCH_ROWS), "A")))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = "error: .xlsx files need xlsxwriter: pip install 'llavamod-offline[eval]'\n"
    commands: list[tuple[object, ...]] = [
        ("export", "mmbench", "--root", tmp_path, "--predictions", path, "-o", tmp_path / "x.xlsx"),
        ("generate", f"root={tmp_path}", "model=none", f"output={tmp_path}", "tasks=[mmbench]"),
    ]
    for command in commands:
        assert run(*command) == 2
        assert capsys.readouterr().err == message


def test_scoring_imports_no_heavy_library() -> None:
    """Scoring must start in well under a second; importing `transformers` alone takes several."""
    heavy = ("torch", "transformers", "numpy", "omegaconf")
    code = f"import sys, eval.cli, eval.score; print([name for name in {heavy} if name in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert ast.literal_eval(shown) == []


def test_portable_prints_nothing_but_the_folder_it_wrote(tmp_path: Path) -> None:
    """In a process of its own, since the libraries that write models log to stdout when first imported."""
    model, output = write_tiny_llava(tmp_path / "model"), tmp_path / "copy"
    command = [sys.executable, "-m", "eval", "portable", str(model), "--template", "qwen", "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert (done.returncode, done.stdout) == (0, f"{output}\n"), done.stderr
