"""`train-student report`: the curves of one run, or of several side by side, as one self-contained page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median_high
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from llavamod_offline.errors import ConfigError
from llavamod_offline.pages.charts import CURVE_SCRIPTS, CURVE_STYLES, curves
from llavamod_offline.pages.page import render
from llavamod_offline.storage import atomic
from train.metrics import METRICS_NAME
from train.report.expert_load import expert_load
from train.run_summary import CONFIG_NAME, SUMMARY_NAME

Entry = dict[str, Any]
Points = list[tuple[float, float]]

# Section, chart title, unit, and the log fields to draw, by their names in the legend.
_CHARTS: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    ("Loss", "Loss and its terms", "nats per token", {
        "loss": "loss", "divergence": "divergence", "cross-entropy": "cross_entropy", "preference": "preference",
    }),
    ("Loss", "Loss on held-out samples", "nats per token", {"loss": "holdout_loss"}),
    ("Teacher", "True KL(teacher ‖ student)", "nats per token", {
        "kl": "kl", "of the tail": "tail_kl", "held out": "holdout_kl",
    }),
    ("Teacher", "Agreement with the teacher's top token", "share of positions", {"top-1 agreement": "top1_agreement"}),
    ("Teacher", "Mass beyond the recorded top-k", "mass", {"student": "student_tail", "teacher": "teacher_tail"}),
    ("Alignment", "Distance of projected features from the teacher's", "distance", {"distance": "feature_distance"}),
    ("Alignment", "KL(teacher ‖ student) at image tokens", "nats per token", {"kl": "visual_kl"}),
    ("Alignment", "Relations among an image's tokens", "1 − cosine", {"distance": "relation_distance"}),
    ("Preference", "Reward margin", "β·(r_w − r_l)", {"margin": "reward_margin"}),
    ("Preference", "Chosen response ahead", "share of pairs", {"accuracy": "reward_accuracy"}),
    ("Preference", "Reward of the chosen response", "β·r", {
        "p10": "chosen_reward.p10", "p50": "chosen_reward.p50", "p90": "chosen_reward.p90",
    }),
    ("Preference", "Reward of the rejected response", "β·r", {
        "p10": "rejected_reward.p10", "p50": "rejected_reward.p50", "p90": "rejected_reward.p90",
    }),
    ("Preference", "KTO's baseline, from mismatched responses", "nats per response", {"baseline": "kto_baseline"}),
    ("Routers", "Balance loss", "sum over sparse layers", {"balance": "balance"}),
    ("Routers", "Entropy of the gates", "nats, mean over layers", {"entropy": "gate_entropy"}),
    ("Routers", "Choices dropped for lack of capacity", "share, mean over layers", {"dropped": "drop_rate"}),
    ("Optimiser and speed", "Learning rate", "learning rate", {"learning rate": "lr"}),
    ("Optimiser and speed", "Gradient norm before clipping", "norm", {"norm": "grad_norm"}),
    ("Optimiser and speed", "Throughput", "tokens per second", {"tokens/s": "tokens_per_s"}),
    ("Optimiser and speed", "Time spent waiting for data", "share of the step", {"waiting": "data_wait_share"}),
)  # fmt: skip


# The units of quantities that may fall by orders of magnitude.
_FALLING = ("nats per token", "distance", "1 − cosine", "norm")


@dataclass(frozen=True)
class TrainingRun:
    """A run's log and summary; `summary` is empty until the run has finished, `stage` if it is not recorded."""

    name: str
    stage: str
    entries: list[Entry]
    summary: Mapping[str, Any]


def write_report(folders: Sequence[Path], output: Path) -> Path:
    """Write the page of one or several runs' folders. Errors: `ConfigError` naming a folder without a run."""
    runs = [replace(read_run(folder), name=name) for folder, name in zip(folders, _names(folders), strict=True)]
    sections: dict[str, list[dict[str, Any]]] = {}
    for section, title, unit, fields in _CHARTS:
        charts = [_chart(title, unit, fields, runs, stage) for stage in dict.fromkeys(run.stage for run in runs)]
        sections.setdefault(section, []).extend(chart for chart in charts if chart["steps"])
    loads = {run.name: expert_load(run.entries) for run in runs}
    page = render(
        Path(__file__).with_name("page.html.jinja"),
        styles=(*CURVE_STYLES, "page.css"),
        scripts=CURVE_SCRIPTS,
        title=f"Training: {', '.join(run.name for run in runs)}",
        lead=_lead(runs),
        figures=_figures(runs[0]) if len(runs) == 1 else {},
        header=["run", *_OVERVIEW],
        rows=[[run.name, *(field(run) for field in _OVERVIEW.values())] for run in runs],
        coloured=len(runs) > 1,
        sections=sections,
        loads={name: load for name, load in loads.items() if load},
    )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_file(output, page)
    except OSError as error:
        raise ConfigError(f"--output: {output} cannot be written ({error.strerror}): choose another file") from error
    return output


def read_run(folder: Path) -> TrainingRun:
    """Read a run's log, without an incomplete last line, and its summary. Errors: `ConfigError` without a log."""
    file = folder / METRICS_NAME
    if not file.is_file():
        raise ConfigError(f"run '{folder}': has no {METRICS_NAME}: pass the output folder of a train-student run")
    entries = []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            entry["step"] = int(entry["step"])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):  # a run in progress, or one that was killed
                break
            raise ConfigError(f"{file}: line {number} is not a log entry ({error!r}): the file is damaged") from error
        entries.append(entry)
    if not entries:
        raise ConfigError(f"run '{folder}': {METRICS_NAME} is empty: wait for the first step")
    try:
        summary = json.loads((folder / SUMMARY_NAME).read_bytes())
    except (OSError, ValueError):
        summary = {}
    summary = summary if isinstance(summary, dict) else {}
    return TrainingRun(folder.name, str(summary.get("stage") or _stage(folder)), entries, summary)


def _stage(folder: Path) -> str:
    """The stage of a run that has not finished, from its settings."""
    try:
        settings: Any = OmegaConf.to_container(OmegaConf.load(folder / CONFIG_NAME))
    except (OSError, ValueError, YAMLError, OmegaConfBaseException):
        return ""
    return str(settings.get("stage", "")) if isinstance(settings, dict) else ""


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, with as many parents as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(len(part) for part in parts) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ConfigError("the same run is listed twice: list each once")


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
    if "random_routing_loss" in last:
        figures["last loss, its own / random routing"] = (
            f"{last['own_routing_loss']:.4f} / {last['random_routing_loss']:.4f}"
        )
    if summary:
        figures |= {
            "tokens": f"{summary['tokens']:,}",
            "supervised positions": f"{summary['positions']:,}",
            "seconds": f"{summary['seconds']:,.0f}",
            "parameters": f"{summary['parameters']:,}",
            "activated parameters": f"{summary['activated_parameters']:,}",
        }
    return figures


def _chart(title: str, unit: str, fields: Mapping[str, str], runs: Sequence[TrainingRun], stage: str) -> dict[str, Any]:
    """The chart of some log fields of a stage's runs: a colour per field of one run, or per run of several."""
    if len(runs) > 1:  # one curve per run keeps them distinguishable
        name = "p50" if "p50" in fields else next(iter(fields))
        fields = {name: fields[name]}
        title = title if len(fields) == 1 and name in ("loss", "kl") else f"{title}: {name}"
    if len({run.stage for run in runs}) > 1:
        title = f"{title} ({stage or 'stage not recorded'})"
    found = [
        (name if len(runs) == 1 else run.name, max(number, place), _points(run.entries, path))
        for number, run in enumerate(runs)
        for place, (name, path) in enumerate(fields.items())
        if run.stage == stage
    ]
    found = [each for each in found if each[2]]
    series = {name: points for name, _, points in found}
    return curves(title, unit, series, colours=[at for _, at, _ in found], decades=unit in _FALLING)


def _points(entries: Sequence[Entry], path: str) -> Points:
    """The values of a (nested) log field over the steps; a list, such as one value per layer, is averaged."""
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


_OVERVIEW: dict[str, Callable[[TrainingRun], str]] = {
    "stage": lambda run: run.stage + ("" if run.summary else " (not finished)"),
    "steps": lambda run: f"{run.entries[-1]['step']:,}",
    "loss": lambda run: f"{run.entries[-1]['loss']:.4f}",
    "true KL": lambda run: f"{run.entries[-1]['kl']:.4f}" if "kl" in run.entries[-1] else "",
    "tokens/s": lambda run: f"{median_high([entry['tokens_per_s'] for entry in run.entries]):,.0f}",
    "waiting for data": lambda run: f"{median_high([entry['data_wait_share'] for entry in run.entries]):.1%}",
    "teacher cache": lambda run: str(run.summary.get("cache_digest") or "")[:12],
}
