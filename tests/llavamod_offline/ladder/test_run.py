"""The ladder in miniature, from commands to page: results, resuming, and what it refuses."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from llavamod_offline.demo.scheduler import Step
from llavamod_offline.errors import ConfigError
from llavamod_offline.ladder import run as ladder
from llavamod_offline.ladder.plan import ladder_steps, plan_digest
from llavamod_offline.ladder.report import write_report
from llavamod_offline.ladder.results import COLUMNS, summarise
from llavamod_offline.ladder.run import parse_seeds
from llavamod_offline.ladder.seed import gather_seed, read_seed
from llavamod_offline.ladder.table import CACHES, CLAIMS, ROWS, RUNS, TEACHER

SEEDS = 5


ABSENT = "There is a red star and a small blue cross."


def write_results(output: Path, seed: int, rng: random.Random) -> dict[str, float]:
    """Write what a seed's commands write, with random numbers; distilled rows are better by 0.2."""
    here = output / f"seed-{seed}"
    for cache in CACHES:
        _write(here / "caches" / cache.name / "cache.json", {"totals": {"bytes": 300, "positions": 10}})
    for run in (*(run.name for run in RUNS), TEACHER):
        better = 0.0 if run.startswith("sft") else 0.2
        answers = here / "answers" / run
        values = {"accuracy": 0.5 + better, "f1_mean": 0.5, "response_hall": 0.3 - better, "object_hall": 0.1}
        metrics = {name: value + rng.uniform(0, 0.01) for name, value in values.items()}
        for task in ("gqa", "pope", "object_halbench"):
            _write(answers / task / "score.json", {"metrics": metrics})
        texts = {"7": "There is a small blue cross.", "8": ABSENT if run == "sigmoid" else "There is a blue cross."}
        lines = [json.dumps({"id": image, "text": text}) + "\n" for image, text in texts.items()]
        (answers / "object_halbench" / "predictions.jsonl").write_text("".join(lines))
        _write(answers / "unseen.json", {"kl": 0.3 - better + rng.uniform(0, 0.01), "calibration_error": 0.05})
        parameters = {"parameters": 2_000_000, "activated_parameters": 1_500_000}
        load = {"expert_load": [[0.4, 0.3, 0.2, 0.1]]} if "sparse" in run else {}
        _write(here / "train" / run / "summary.json", {**parameters, "metrics": load})
    benchmark = here / "benchmarks" / "object_halbench"
    categories = [{"id": 1, "name": "red star"}, {"id": 2, "name": "blue cross"}]
    there = [{"image_id": image, "category_id": 2} for image in (7, 8)]
    _write(benchmark / "annotations" / "instances_val2014.json", {"categories": categories, "annotations": there})
    questions = [{"image_id": image, "question": "Describe it.", "image": "/9j/"} for image in (7, 8)]
    lines = [json.dumps(question) + "\n" for question in questions]
    (benchmark / "obj_halbench_300_with_image.jsonl").write_text("".join(lines))
    return {step.name: 2.0 for step in ladder_steps(seed, quick=False)}


def _write(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def test_rows_claims_and_page_come_from_the_commands_files(tmp_path: Path) -> None:
    rng, results = random.Random(0), {}
    for seed in range(1, SEEDS + 1):
        steps = ladder_steps(seed, quick=False)
        gather_seed(tmp_path, seed, steps, write_results(tmp_path, seed, rng))
        results[seed] = read_seed(tmp_path, seed, steps) or {}
        assert read_seed(tmp_path, seed, steps[:-1]) is None  # results of other commands do not count
    summary = summarise(results)
    rows = {row["run"]: row for row in summary["rows"]}
    assert list(rows) == [TEACHER, *(row.run for row in ROWS)]
    distilled = rows["dense-dense"]
    assert distilled["columns"]["accuracy"]["mean"] == pytest.approx(0.705, abs=0.006)
    assert distilled["columns"]["accuracy"]["difference"] == pytest.approx(0.2, abs=0.02)
    assert distilled["columns"]["accuracy"]["p"] == 1 / 32
    assert distilled["columns"]["kl"]["p"] == 1 / 32  # lower is better
    assert distilled["seconds"] == 6.0  # alignment and both stages
    assert distilled["bytes_per_position"] == 30
    assert rows["sft-dense"]["bytes_per_position"] is None
    assert rows["sparse"]["expert_load"] == [[0.4, 0.3, 0.2, 0.1]]
    assert set(summary["claims"]) == {claim.name for claim in CLAIMS}
    assert summary["claims"]["kd_over_sft"]["holds"] is True
    assert summary["claims"]["kd_over_sft"]["seeds"] == SEEDS
    assert summary["claims"]["kd_over_sft"]["difference"] == pytest.approx(0.2, abs=0.02)
    (example,) = results[1]["examples"]  # image 7 is left out, since all its answers are right
    assert example["texts"]["after DPO"] == [
        ["There is a ", False], ["red star", True], [" and a small blue cross.", False]
    ]  # fmt: skip
    write_report(tmp_path / "report.html", summary, results[1]["examples"])
    page = (tmp_path / "report.html").read_text()
    for part in (*(claim.text for claim in CLAIMS), *(row.name for row in ROWS), *COLUMNS.values()):
        assert part.replace("&", "&amp;") in page
    assert '<b class="wrong">red star</b> and a small blue cross.' in page
    assert "expert 4" in page
    json.dumps(summary, allow_nan=False)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Step], Callable[..., list[str]]]:
    """The steps of each seed, which write words, and a function that runs the ladder and returns the words written."""
    words = tmp_path / "words"
    needs = {"a": (), "b": ("a",), "c": ("b",), "d": ()}
    parts = [Step(name, ("sh", "-c", f"echo {name}$SEED >> {words}"), needed) for name, needed in needs.items()]

    def steps(seed: int, *, quick: bool) -> list[Step]:
        return [
            Step(
                f"{seed}-{part.name}",
                tuple(word.replace("$SEED", str(seed)) for word in part.command),
                tuple(f"{seed}-{need}" for need in part.needs),
                group=seed,
            )
            for part in parts
        ]

    def gather(output: Path, seed: int, steps: list[Step], seconds: Mapping[str, float]) -> None:
        assert seconds.keys() >= {step.name for step in steps}
        _write(output / f"seed-{seed}" / "results.json", {"plan": plan_digest(steps), "examples": []})

    monkeypatch.setattr(ladder, "ladder_steps", steps)
    monkeypatch.setattr(ladder, "gather_seed", gather)
    monkeypatch.setattr(ladder, "summarise", lambda results: {"seeds": list(results), "claims": {}})
    monkeypatch.setattr(ladder, "write_report", lambda path, summary, examples: None)

    def said(*seeds: int, output: str = "ladder") -> list[str]:
        words.write_text("")
        found = json.loads(ladder.run_ladder(tmp_path / output, seeds=seeds, quick=True, at_once=1).read_text())
        assert set(found["seeds"]) >= set(seeds)
        return words.read_text().split()

    return parts, said


def test_a_command_that_has_ended_is_not_run_again_unless_it_is_typed_otherwise(
    tmp_path: Path, small: tuple[list[Step], Callable[..., list[str]]]
) -> None:
    """Real commands through the real scheduler; a truncated line of the log does not count."""
    parts, said = small
    assert said(1, 2) == ["a1", "b1", "c1", "d1", "a2", "b2", "c2", "d2"]  # seed by seed
    assert said(1) == []
    assert said(1, 2) == []
    parts[1] = Step("b", ("sh", "-c", parts[1].command[-1].replace("echo b", "echo other")), ("a",))
    assert said(1) == ["other1", "c1"]  # and the step that depends on it
    log = tmp_path / "ladder" / "steps.jsonl"
    log.write_text(log.read_text()[:-5])
    (tmp_path / "ladder" / "seed-1" / "results.json").unlink()
    assert said(1) == ["c1"]
    assert said(2) == ["other2", "c2"]  # running another seed has not undone anything


def test_seeds_that_are_added_do_not_hide_the_others(
    tmp_path: Path, small: tuple[list[Step], Callable[..., list[str]]], caplog: pytest.LogCaptureFixture
) -> None:
    """Unless other commands have made their results."""
    parts, said = small
    summary = tmp_path / "ladder" / "ladder.json"
    said(2)
    assert said(4, 5) == ["a4", "b4", "c4", "d4", "a5", "b5", "c5", "d5"]
    assert json.loads(summary.read_text())["seeds"] == [2, 4, 5]
    parts[3] = Step("d", ("sh", "-c", parts[3].command[-1].replace("echo d", "echo new")))
    assert said(4) == ["new4"]
    assert json.loads(summary.read_text())["seeds"] == [4]
    assert "seed-2/results.json: made by different commands from the current ones: not used" in caplog.text


def test_damaged_settings_are_one_line(tmp_path: Path, small: tuple[list[Step], Callable[..., list[str]]]) -> None:
    _, said = small
    said(1)
    (tmp_path / "ladder" / "settings.json").write_text("{")
    with pytest.raises(ConfigError, match=r"settings\.json: not the settings of a ladder: choose another folder"):
        said(1)


def test_a_seed_may_be_run_elsewhere(tmp_path: Path, small: tuple[list[Step], Callable[..., list[str]]]) -> None:
    """Its results alone are enough, in an empty folder or beside other seeds."""
    _, said = small
    assert said(2, output="elsewhere") == ["a2", "b2", "c2", "d2"]
    for output in ("ladder", "fresh"):
        shutil.copytree(tmp_path / "elsewhere" / "seed-2", tmp_path / output / "seed-2")
        assert said(2, output=output) == []
    assert said(1, 2) == ["a1", "b1", "c1", "d1"]


@pytest.mark.parametrize("content", ['{"plan"', "[]", "{}"])
def test_damaged_results_are_one_line(
    tmp_path: Path, small: tuple[list[Step], Callable[..., list[str]]], content: str
) -> None:
    """Their seed is not run again instead."""
    _, said = small
    assert said(1)
    (tmp_path / "ladder" / "seed-1" / "results.json").write_text(content)
    with pytest.raises(ConfigError, match=r"seed-1/results\.json: not the results of a seed: copy it again, or remove"):
        said(1)


def test_results_of_other_commands_are_named(
    small: tuple[list[Step], Callable[..., list[str]]], caplog: pytest.LogCaptureFixture
) -> None:
    parts, said = small
    said(1)
    parts[3] = Step("d", ("true",))
    said(1)
    assert "results.json: made by different commands from the current ones: not used" in caplog.text


def test_which_seeds() -> None:
    assert parse_seeds("5") == [1, 2, 3, 4, 5]
    assert parse_seeds("4-5") == [4, 5]
    for wrong in ("0", "5-4", "-3", "4-", "two", "1,3", "", "²"):
        with pytest.raises(ConfigError, match="give how many, such as 5, or a range"):
            parse_seeds(wrong)


def test_another_ladder_or_other_files_are_kept(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(ConfigError, match="not from a ladder"):
        ladder.run_ladder(tmp_path / "mine", seeds=[1], quick=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "settings.json").write_text('{"quick": false}')
    with pytest.raises(ConfigError, match="leave --quick out"):
        ladder.run_ladder(tmp_path / "full", seeds=[1], quick=True)
