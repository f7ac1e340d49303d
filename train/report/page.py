"""`train-student report`: the curves of one run, or of several side by side, as one self-contained page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavamod_offline.errors import ConfigError
from llavamod_offline.pages.charts import line_chart
from llavamod_offline.pages.page import html_page, html_table, tiles
from llavamod_offline.storage import atomic
from train.metrics import METRICS_NAME
from train.report.expert_load import expert_load_picture
from train.run_summary import SUMMARY_NAME

Entry = dict[str, Any]
Points = list[tuple[float, float]]

# Section, chart title, and what it draws of each entry, by the names that the legend shows.
_CHARTS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Loss", "Loss, and its parts as they are added", {
        "loss": "loss", "divergence": "divergence", "cross-entropy": "cross_entropy", "preference": "preference",
    }),
    ("Loss", "Loss on held-out samples", {"loss": "holdout_loss"}),
    ("Teacher", "True KL(teacher ‖ student), nats a token", {"kl": "kl", "held out": "holdout_kl"}),
    ("Teacher", "Share of positions with the teacher's first choice", {"top-1 agreement": "top1_agreement"}),
    ("Teacher", "Mass beyond the recorded heads", {"student": "student_tail", "teacher": "teacher_tail"}),
    ("Alignment", "Distance of projected features from the teacher's", {"distance": "feature_distance"}),
    ("Alignment", "KL(teacher ‖ student) at image tokens, nats a token", {"kl": "visual_kl"}),
    ("Alignment", "1 − cosine of the relations among an image's tokens", {"distance": "relation_distance"}),
    ("Preference", "Reward margin, β·(r_w − r_l)", {"margin": "reward_margin"}),
    ("Preference", "Share of pairs with the chosen response ahead", {"accuracy": "reward_accuracy"}),
    ("Preference", "β·r of the chosen response", {"p10": "chosen_reward.p10", "p50": "chosen_reward.p50",
                                                  "p90": "chosen_reward.p90"}),
    ("Preference", "β·r of the rejected response", {"p10": "rejected_reward.p10", "p50": "rejected_reward.p50",
                                                    "p90": "rejected_reward.p90"}),
    ("Routers", "Balance loss, summed over the sparse layers", {"balance": "balance"}),
    ("Routers", "Entropy of the gates, nats, mean of the layers", {"entropy": "gate_entropy"}),
    ("Routers", "Choices dropped for lack of capacity, mean of the layers", {"dropped": "drop_rate"}),
    ("Optimiser and speed", "Learning rate", {"learning rate": "lr"}),
    ("Optimiser and speed", "Gradient norm before clipping", {"norm": "grad_norm"}),
    ("Optimiser and speed", "Tokens a second", {"tokens/s": "tokens_per_s"}),
    ("Optimiser and speed", "Share of a step spent waiting for data", {"waiting": "data_wait_share"}),
)  # fmt: skip


@dataclass(frozen=True)
class TrainingRun:
    """A run as its folder tells of it; `summary` is empty while it is not finished."""

    name: str
    entries: list[Entry]
    summary: Mapping[str, Any]


def write_report(folders: Sequence[Path], output: Path) -> Path:
    """Write the page of one or several runs' folders. Errors: `ConfigError` naming a folder that is no run's."""
    runs = [read_run(folder) for folder in folders]
    names = _names(folders)
    runs = [TrainingRun(name, run.entries, run.summary) for name, run in zip(names, runs, strict=True)]
    sections = [("Runs", _overview(runs))]
    for section in dict.fromkeys(section for section, _, _ in _CHARTS):
        charts = [_chart(title, kinds, runs) for part, title, kinds in _CHARTS if part == section]
        content = "".join(chart for chart in charts if chart)
        pictures = "".join(_expert_pictures(runs)) if section == "Routers" else ""
        if content or pictures:
            sections.append((section, (f'<div class="grid">{content}</div>' if content else "") + pictures))
    top = tiles(_figures(runs[0])) if len(runs) == 1 else ""
    title = f"Training: {', '.join(names)}"
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_file(output, html_page(title, _lead(runs), sections, top=top))
    except OSError as error:
        raise ConfigError(f"--output: {output} cannot be written ({error.strerror}): choose another file") from error
    return output


def read_run(folder: Path) -> TrainingRun:
    """Read a run's log, up to a line that is being written, and its summary. Errors: `ConfigError` if it has no log."""
    file = folder / METRICS_NAME
    if not file.is_file():
        raise ConfigError(f"run '{folder}': has no {METRICS_NAME}: give the output folder of a train-student run")
    entries = []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            entry["step"] = int(entry["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):  # a run in progress, or one that was killed
                break
            raise ConfigError(f"{file}: line {number} is no log entry ({error!r}): the file is damaged") from error
        entries.append(entry)
    if not entries:
        raise ConfigError(f"run '{folder}': {METRICS_NAME} is empty: the first step is not done yet")
    try:
        summary = json.loads((folder / SUMMARY_NAME).read_bytes())
    except (OSError, ValueError):
        summary = {}
    return TrainingRun(folder.name, entries, summary if isinstance(summary, dict) else {})


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, as long as they must be to differ."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(len(part) for part in parts) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError("the same run is given twice: name each once")


def _lead(runs: Sequence[TrainingRun]) -> str:
    steps = ", ".join(f"{run.entries[-1]['step']:,}" for run in runs)
    unfinished = [run.name for run in runs if not run.summary]
    return f"{steps} steps" + (f"; not finished: {', '.join(unfinished)}" if unfinished else "")


def _figures(run: TrainingRun) -> dict[str, str]:
    last, summary = run.entries[-1], run.summary
    figures = {"steps": f"{last['step']:,}", "last loss": f"{last['loss']:.4f}"}
    if "kl" in last:
        figures["last true KL, nats"] = f"{last['kl']:.4f}"
    if "holdout_loss" in last:
        figures["loss on held-out samples"] = f"{last['holdout_loss']:.4f}"
    if summary:
        figures |= {
            "tokens": f"{summary['tokens']:,}",
            "supervised positions": f"{summary['positions']:,}",
            "seconds": f"{summary['seconds']:,.0f}",
            "parameters": f"{summary['parameters']:,}",
            "of them activated": f"{summary['activated_parameters']:,}",
        }
    return figures


def _overview(runs: Sequence[TrainingRun]) -> str:
    fields: dict[str, Callable[[TrainingRun], str]] = {
        "stage": lambda run: str(run.summary.get("stage", "not finished")),
        "steps": lambda run: f"{run.entries[-1]['step']:,}",
        "loss": lambda run: f"{run.entries[-1]['loss']:.4f}",
        "true KL": lambda run: f"{run.entries[-1]['kl']:.4f}" if "kl" in run.entries[-1] else "",
        "tokens/s": lambda run: f"{_median([entry['tokens_per_s'] for entry in run.entries]):,.0f}",
        "waiting for data": lambda run: f"{_median([entry['data_wait_share'] for entry in run.entries]):.1%}",
        "teacher cache": lambda run: str(run.summary.get("cache_digest") or "")[:12],
    }
    return html_table(["run", *fields], [[run.name, *(field(run) for field in fields.values())] for run in runs])


def _chart(title: str, kinds: Mapping[str, str], runs: Sequence[TrainingRun]) -> str:
    series = {}
    if len(runs) > 1:  # one curve a run, or nobody could tell them apart
        kinds = {name: path for name, path in kinds.items() if name == ("p50" if "p50" in kinds else next(iter(kinds)))}
    for run in runs:
        for name, path in kinds.items():
            points = _points(run.entries, path)
            if points:
                series[name if len(runs) == 1 else f"{run.name}: {name}"] = points
    return line_chart(title, series, x_label="step") if series else ""


def _points(entries: Sequence[Entry], path: str) -> Points:
    """The values of a (nested) log field over the steps; of a list, such as one a layer, the mean."""
    points = []
    for entry in entries:
        value: Any = entry
        for part in path.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, list):
            value = sum(value) / len(value) if value else None
        if isinstance(value, int | float) and math.isfinite(value):
            points.append((float(entry["step"]), float(value)))
    return points


def _expert_pictures(runs: Sequence[TrainingRun]) -> list[str]:
    about = "Load of the experts over training"
    titles = [about if len(runs) == 1 else f"{about}: {run.name}" for run in runs]
    return [expert_load_picture(run.entries, title=title) for run, title in zip(runs, titles, strict=True)]


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
