"""The comparison page: figures, differences, what may not be compared, disagreements, hostile text."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from eval.judge import Message, Reply
from eval.predictions import Prediction, prediction_line
from eval.report.report import write_report
from eval.score import TaskScore, score_task, sidecar
from eval.tasks import TASKS, get_task
from llavamod_offline.errors import ConfigError, EvalError
from tests.eval.fixtures import gqa_root, halbench_root, mmhal_root, pope_root

REFERENCES = {str(n): {"answer": "red", "isBalanced": True, "types": {"structural": "query"}} for n in range(5)}


def write_run(folder: Path, root: Path, task: str, text: dict[str, str], default: str) -> None:
    lines = []
    for example in get_task(task).load(root):
        answer = text.get(example.id, default)
        made = Prediction(answer, example.prompt, example.id, None, task, example.image, 1, "stop")
        lines.append(prediction_line(made))
    path = folder / task / "predictions.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(lines))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    data = halbench_root(tmp_path / "data", ("dog", "cat"), {11: (["dog"], ["A dog."])})
    return mmhal_root(gqa_root(pope_root(data), REFERENCES), 2)


@pytest.fixture
def runs(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """GQA 3/5 each, disagreeing on questions 1 and 2; GQA counts as the published set, the others do not."""
    monkeypatch.setitem(TASKS, "gqa", replace(TASKS["gqa"], official_n=(5,)))
    one, two = tmp_path / "runs" / "dense", tmp_path / "runs" / "sparse"
    write_run(one, root, "gqa", {"1": "</script><img src=x onerror=alert(1)>", "0": "blue"}, "red")
    write_run(two, root, "gqa", {"2": "blue", "0": "blue"}, "red")
    for run in (one, two):
        write_run(run, root, "pope", {}, "Yes")
        write_run(run, root, "object_halbench", {}, "A dog with a cat.")
    return [one, two]


class Page(HTMLParser):
    """What a browser would fetch, and the sample data."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.samples = ""
        self._in_samples = False
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._in_samples = ("id", "samples") in attrs
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        if self._in_samples:
            self.samples += data

    def handle_endtag(self, tag: str) -> None:
        self._in_samples = False


def gaps(cell: str) -> list[str] | None:
    """The differences shown in a cell of the table."""
    found = re.search(r"data-gaps='([^']*)'", cell)
    return None if found is None else list(json.loads(unescape(found[1])))


def test_the_page_shows_figures_differences_and_published_ones(root: Path, runs: list[Path], tmp_path: Path) -> None:
    write_report(runs, root, tmp_path / "report.html")
    content = (tmp_path / "report.html").read_text()
    cells = re.findall(r'<td data-label="GQA ↑"(?: class="none")?>(.*?)</td>', content)
    assert [(cell.split("<")[0], gaps(cell)) for cell in cells] == [
        ("60.0", ["+0.0", "+0.0"]),  # against each run as the baseline
        ("60.0", ["+0.0", "+0.0"]),
        ("–", None),
        ("58.7", ["−1.3", "−1.3"]),  # LLaVA-MoD-1.8B's
        ("56.2", ["−3.8", "−3.8"]),
        ("–", None),
    ]
    assert '<td data-label="POPE F1 ↑">87.0†</td>' in content  # on questions other than the published ones
    assert "published on 8910 questions, measured here on 12; not comparable" in content
    assert (
        '<td data-label="Object HalBench response ↓">11.2†</td>' in content
    )  # another variant of Object HalBench: no difference
    assert "not comparable" in content
    assert "questions" in content
    assert "data sha256" in content
    assert content.count("width:80.00%") >= 2  # GQA's bars, on a scale of 1.25 × 60 %


def test_the_page_loads_nothing_and_hostile_text_stays_text(root: Path, runs: list[Path], tmp_path: Path) -> None:
    write_report(runs, root, tmp_path / "report.html")
    content = (tmp_path / "report.html").read_text()
    page = Page(content)
    assert page.links == []
    assert "img" not in page.tags
    assert "b" in page.tags
    assert re.findall(r"https?://", content) == []
    samples = json.loads(page.samples)
    texts = [a["text"] for t in samples["tasks"] for s in t["samples"] for a in s["answers"] if a]
    assert "</script><img src=x onerror=alert(1)>" in texts


def test_the_browser_holds_what_two_runs_disagree_on_with_images(root: Path, runs: list[Path], tmp_path: Path) -> None:
    write_report(runs, root, tmp_path / "report.html")
    samples = json.loads(Page((tmp_path / "report.html").read_text()).samples)
    assert samples["runs"] == ["dense", "sparse"]
    assert [task["task"] for task in samples["tasks"]] == ["gqa"]  # on POPE they agree
    shown = {sample["id"]: sample for sample in samples["tasks"][0]["samples"]}
    assert sorted(shown) == ["1", "2"]
    assert [answer["right"] for answer in shown["2"]["answers"]] == [1.0, 0.0]
    assert shown["1"]["image"].startswith("data:image/png;base64,")
    assert shown["1"]["prompt"].startswith("What is 1?")
    assert shown["1"]["reference"] == "red"
    write_report(runs, root, tmp_path / "few.html", samples=1)
    few = json.loads(Page((tmp_path / "few.html").read_text()).samples)
    assert len(few["tasks"][0]["samples"]) == 1


def test_markdown(root: Path, runs: list[Path], tmp_path: Path) -> None:
    write_report(runs, root, tmp_path / "report.md")
    lines = (tmp_path / "report.md").read_text().splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert table[0].startswith("| model | GQA ↑ | POPE F1 ↑ |")
    assert table[2].startswith("| **dense** | 60.0 |")
    assert table[3].startswith("| **sparse** | 60.0 (+0.0) |")
    assert any("*LLaVA-MoD-2B* (published)" in line and "11.2†" in line for line in table)
    assert sum("n 5, missing 0, unparsed 0" in line for line in lines) == 2


def test_one_run_shows_its_mistakes_and_mmhal_waits_for_its_judge(root: Path, runs: list[Path], tmp_path: Path) -> None:
    write_run(runs[0], root, "mmhal", {}, "A cat.")
    write_report(runs[:1], root, tmp_path / "report.html")
    content = (tmp_path / "report.html").read_text()
    assert "Where they disagree" not in content
    assert "baseline" not in content.split("<script>")[0].split("<body>")[1]
    shown = {each["task"]: each["samples"] for each in json.loads(Page(content).samples)["tasks"]}
    assert [(sample["id"], sample["reference"]) for sample in shown["gqa"]] == [("0", "red"), ("1", "red")]
    assert {sample["reference"] for sample in shown["pope"]} == {"no"}
    assert [sample["reference"] for sample in shown["object_halbench"]] == ["dog"]
    assert "mmhal: not scored: no predictions.judge.jsonl: score it with --judge first" in content


def test_errors(root: Path, runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must end in .html or .md"):
        write_report(runs, root, tmp_path / "report.pdf")
    with pytest.raises(ConfigError, match="a run is named twice"):
        write_report([runs[0], runs[0]], root, tmp_path / "report.md")
    with pytest.raises(EvalError, match=r"has no TASK/predictions.jsonl"):
        write_report([tmp_path], root, tmp_path / "report.md")
    _cut(runs[1])
    for task in ("pope", "object_halbench"):
        shutil.rmtree(runs[1] / task)
    with pytest.raises(EvalError, match=r"nothing can be scored: sparse: gqa: .*1 question .* without a prediction"):
        write_report([runs[1]], root, tmp_path / "report.md")
    assert not (tmp_path / "report.md").exists()


def _cut(run: Path) -> None:
    """Leave out the last answer of GQA."""
    path = run / "gqa" / "predictions.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1]))


@pytest.mark.parametrize("suffix", ["md", "html"])
def test_what_cannot_be_scored_is_listed_with_the_reason(
    root: Path, runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """And a metric that is undefined is shown as such."""
    _cut(runs[1])
    plain = score_task

    def undefined(task: str, *rest: Any, **settings: Any) -> TaskScore:
        score = plain(task, *rest, **settings)
        return replace(score, metrics={**score.metrics, "odd": None}) if task == "pope" else score

    monkeypatch.setattr("eval.report.comparison.score_task", undefined)
    write_report(runs, root, tmp_path / f"report.{suffix}")
    text = (tmp_path / f"report.{suffix}").read_text()
    assert "gqa: not scored: " in text
    assert "without a prediction" in text


def test_a_run_that_cannot_be_scored_does_not_stop_the_page(root: Path, runs: list[Path], tmp_path: Path) -> None:
    _cut(runs[0])
    for task in ("pope", "object_halbench"):
        shutil.rmtree(runs[0] / task)
    write_report(runs, root, tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert "| **dense** | – |" in text
    assert "**dense**, gqa: not scored: " in text
    write_report(runs, root, tmp_path / "report.html")


@pytest.mark.parametrize("suffix", ["md", "html"])
def test_scores_of_different_questions_are_not_compared(
    root: Path, runs: list[Path], tmp_path: Path, suffix: str
) -> None:
    """Such as those of a run with a limit."""
    path = runs[1] / "gqa" / "predictions.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:2]))
    sidecar(path).write_text('{"limit": 2}')
    write_report(runs, root, tmp_path / f"report.{suffix}")
    text = unescape((tmp_path / f"report.{suffix}").read_text())
    assert "‡ GQA: not all runs are measured alike (dense: 5 questions, data sha256 " in text
    assert "; sparse: 2 questions, " in text
    if suffix == "md":
        assert "| **sparse** | 50.0‡ | " in text
    else:
        _, sparse, *_ = re.findall(r'<td data-label="GQA ↑"(?: class="none")?>(.*?)</td>', text)
        assert gaps(sparse) == ["‡", "+0.0"]


def test_scores_of_different_judges_are_not_compared(root: Path, runs: list[Path], tmp_path: Path) -> None:
    for folder, model in zip(runs, ("harsh", "kind"), strict=True):
        write_run(folder, root, "mmhal", {}, "A cat.")
        judged = Judged(model, "Rating: 6" if model == "kind" else "Rating: 0")
        score_task("mmhal", root, folder / "mmhal" / "predictions.jsonl", judge=judged)
    write_report(runs, root, tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text()
    assert "6.00‡" in text
    assert "judged by harsh at temperature 0, template mmhal-default-1" in text
    path = runs[1] / "mmhal" / "predictions.jsonl"
    score_task("mmhal", root, path, judge=Judged("harsh", "Rating: 1"))
    write_report(runs, root, tmp_path / "report.md")
    assert "sparse**, mmhal: not scored: " in (tmp_path / "report.md").read_text()
    assert "name one with --judge-model" in (tmp_path / "report.md").read_text()
    write_report(runs, root, tmp_path / "report.md", judge_model="harsh")
    assert "1.00 (+1.00)" in (tmp_path / "report.md").read_text()


def test_a_judge_that_was_asked_in_other_words_is_read_with_these(root: Path, runs: list[Path], tmp_path: Path) -> None:
    template = tmp_path / "own.txt"
    template.write_text("{image_content} {question} {gt_answer} {model_answer}")
    write_run(runs[0], root, "mmhal", {}, "A cat.")
    path = runs[0] / "mmhal" / "predictions.jsonl"
    score_task("mmhal", root, path, judge=Judged("m", "Rating: 3"), judge_template=template)
    write_report(runs[:1], root, tmp_path / "report.md")
    assert "give the template it was asked with (--judge-template)" in (tmp_path / "report.md").read_text()
    write_report(runs[:1], root, tmp_path / "report.md", judge_template=template)
    assert "template own.txt (sha256 " in (tmp_path / "report.md").read_text()


@dataclass
class Judged:
    """A judge with one opinion."""

    model: str
    opinion: str

    def complete(self, messages: Sequence[Message]) -> Reply:
        return Reply(self.opinion)


def test_runs_of_the_same_name_are_told_apart(root: Path, tmp_path: Path) -> None:
    folders = [tmp_path / "a" / "eval", tmp_path / "b" / "eval"]
    for folder in folders:
        write_run(folder, root, "gqa", {}, "red")
    write_report(folders, root, tmp_path / "report.md")
    assert "**a/eval**" in (tmp_path / "report.md").read_text()
