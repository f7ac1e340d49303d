"""The ladder from commands to page, made small: results, resuming, and what it refuses."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from llavamod_offline.demo.scheduler import Step
from llavamod_offline.errors import ConfigError
from llavamod_offline.ladder import run as ladder
from llavamod_offline.ladder.plan import ladder_steps
from llavamod_offline.ladder.report import write_report
from llavamod_offline.ladder.results import COLUMNS, summarise
from llavamod_offline.ladder.table import CACHES, CLAIMS, ROWS, RUNS, TEACHER

SEEDS = 5


def write_results(output: Path) -> dict[str, float]:
    """Write what the commands write, with numbers drawn at random; distilled rows are better by 0.2."""
    rng = random.Random(0)
    for seed in range(1, SEEDS + 1):
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
            _write(answers / "unseen.json", {"kl": 0.3 - better + rng.uniform(0, 0.01), "calibration_error": 0.05})
            _write(here / "train" / run / "summary.json", {"parameters": 2_000_000, "activated_parameters": 1_500_000})
    return {step.name: 2.0 for step in ladder_steps(SEEDS, quick=False)}


def _write(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def test_rows_claims_and_page_come_from_the_commands_files(tmp_path: Path) -> None:
    seconds = write_results(tmp_path)
    summary = summarise(tmp_path, SEEDS, seconds)
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
    assert set(summary["claims"]) == {claim.name for claim in CLAIMS}
    assert summary["claims"]["kd_over_sft"]["holds"] is True
    assert summary["claims"]["kd_over_sft"]["seeds"] == SEEDS
    assert summary["claims"]["kd_over_sft"]["difference"] == pytest.approx(0.2, abs=0.02)
    page = write_report(tmp_path, summary).read_text()
    for part in (*(claim.text for claim in CLAIMS), *(row.name for row in ROWS), *COLUMNS.values()):
        assert part.replace("&", "&amp;") in page
    json.dumps(summary, allow_nan=False)


def test_a_command_that_has_ended_is_not_run_again_unless_it_is_typed_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real commands through the real scheduler; a torn line of the log counts as none."""
    words = tmp_path / "words"
    needs = {"a": (), "b": ("1-a",), "c": ("1-b",), "d": ()}
    steps = [Step(f"1-{name}", ("sh", "-c", f"echo {name} >> {words}"), needed) for name, needed in needs.items()]
    other_seed = Step("2-a", ("sh", "-c", f"echo second >> {words}"), ())
    monkeypatch.setattr(ladder, "ladder_steps", lambda seeds, *, quick: [*steps, *([other_seed] if seeds > 1 else [])])
    monkeypatch.setattr(ladder, "summarise", lambda output, seeds, seconds: {"seconds": seconds, "claims": {}})
    monkeypatch.setattr(ladder, "write_report", lambda output, summary: output / "report.html")
    output = tmp_path / "ladder"

    def said(seeds: int = 1) -> list[str]:
        words.write_text("")
        found = json.loads(ladder.run_ladder(output, seeds=seeds, quick=True, at_once=1).read_text())
        assert set(found["seconds"]) == {step.name for step in steps} | ({"2-a"} if seeds > 1 else set())
        return words.read_text().split()

    assert said(seeds=2) == ["a", "b", "c", "d", "second"]
    assert said() == []
    assert said(seeds=2) == []  # fewer seeds in between lost nothing
    steps[1] = Step("1-b", ("sh", "-c", f"echo other >> {words}"), ("1-a",))
    assert said() == ["other", "c"]  # and what needs it
    log = output / "steps.jsonl"
    log.write_text(log.read_text()[:-5])
    assert said() == ["c"]
    assert said(seeds=2) == []


def test_another_ladder_or_other_files_are_kept(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(ConfigError, match="not from a ladder"):
        ladder.run_ladder(tmp_path / "mine", seeds=1, quick=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "settings.json").write_text('{"quick": false}')
    with pytest.raises(ConfigError, match="leave --quick out"):
        ladder.run_ladder(tmp_path / "full", seeds=1, quick=True)
