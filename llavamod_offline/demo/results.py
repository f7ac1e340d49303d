"""The results of the demo's commands as one table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from llavamod_offline.demo.plan import Model, models

COLUMNS = {
    "name": "model",
    "shape": "shape",
    "params": "parameters",
    "activated_params": "activated",
    "accuracy": "accuracy",
    "pope_f1": "POPE F1",
    "hallucination": "hallucination",
    "seconds": "train s",
}


def summarise(output: Path, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Gather `rows` (one per model), `cache`, `routing` and the seconds of every step, from the commands' output files.

    `routing`: the upcycled student's last loss with its own and with random routing.

    `shape`: layers × hidden size, LM head rows. `accuracy`: on questions in GQA's form; `hallucination`: Object
    HalBench's share of descriptions that name absent objects.
    """
    caches = {
        name: read_result(output / "cache" / name / "cache.json") for name in ("general", "multitask", "preference")
    }
    positions = sum(cache["totals"]["positions"] for cache in caches.values())
    stored = sum(cache["totals"]["bytes"] for cache in caches.values())
    return {
        "rows": [_row(output, model) for model in models(output)],
        "cache": {"bytes_per_position": stored / positions, "positions": positions, "bytes": stored},
        "routing": {
            name: read_result(output / "train" / "mimic_sparse" / "summary.json")["metrics"][f"{name}_routing_loss"]
            for name in ("own", "random")
        },
        "seconds": dict(seconds),
    }


def as_cells(row: Mapping[str, Any]) -> list[str]:
    """A row of `summarise` as text, in the order of `COLUMNS`."""
    return [_cell(name, row[name]) for name in COLUMNS]


def curves(run: Path, metric: str) -> list[tuple[float, float]]:
    """(step, value) of one metric over a training run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line[metric]) for line in lines if metric in line]


def _row(output: Path, model: Model) -> dict[str, Any]:
    scores = {
        task: read_result(output / "eval" / model.slug / task / "score.json")["metrics"]
        for task in ("gqa", "pope", "object_halbench")
    }
    if model.run is None:
        params = activated = parameters_of(model.checkpoint)
        seconds = 0.0
    else:
        summary = read_result(model.run / "summary.json")
        params, activated, seconds = summary["parameters"], summary["activated_parameters"], summary["seconds"]
    text = read_result(model.checkpoint / "config.json")["text_config"]
    return {
        "name": model.name,
        "shape": f"{text['num_hidden_layers']} × {text['hidden_size']}, {text['vocab_size']}",
        "params": params,
        "activated_params": activated,
        "accuracy": scores["gqa"]["accuracy"],
        "pope_f1": scores["pope"]["f1_mean"],
        "hallucination": scores["object_halbench"]["response_hall"],
        "seconds": seconds,
    }


def parameters_of(checkpoint: Path) -> int:
    """The number of parameters in a folder's safetensors files, read from their headers."""
    total = 0
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, framework="np") as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total


def _cell(name: str, value: Any) -> str:
    if name in ("name", "shape"):
        return str(value)
    if value is None:
        return "undefined"
    if name in ("params", "activated_params"):
        return f"{value / 1e6:.2f} M"
    return f"{value:.0f}" if name == "seconds" else f"{value:.3f}"


def read_result(file: Path) -> dict[str, Any]:
    """The content of a command's output file."""
    content: dict[str, Any] = json.loads(file.read_text())
    return content
