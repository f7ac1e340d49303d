"""Images with what several students say about them, and which of the objects that they name are absent."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from llavamod_offline.demo.results import read_result
from llavamod_offline.ladder.table import TEACHER

IMAGES = 6
_MODELS = {
    TEACHER: "teacher",
    "sft-dense": "without teacher, dense",
    "dense-dense": "distilled, dense",
    "dense-sparse": "distilled, dense, then sparse",
    "kto_pair": "after kto_pair",
    "sigmoid": "after DPO",
}


def described_images(here: Path) -> list[dict[str, Any]]:
    """The first images of a seed's benchmark for which any of six models names an absent object.

    `image`: base64, as in the benchmark. `texts`: by model, its description as [part, whether it is an absent object].
    """
    benchmark = here / "benchmarks" / "object_halbench"
    notes = read_result(benchmark / "annotations" / "instances_val2014.json")
    names = {category["id"]: category["name"] for category in notes["categories"]}
    there: dict[str, set[str]] = defaultdict(set)
    for note in notes["annotations"]:
        there[str(note["image_id"])].add(names[note["category_id"]])
    answers = {model: _answers(here / "answers" / model / "object_halbench") for model in _MODELS}
    found = []
    with (benchmark / "obj_halbench_300_with_image.jsonl").open(encoding="utf-8") as questions:
        for line in questions:
            question = json.loads(line)
            image = str(question["image_id"])
            texts = {
                name: _marked(answers[model][image], set(names.values()) - there[image])
                for model, name in _MODELS.items()
            }
            if any(is_absent for parts in texts.values() for _, is_absent in parts):
                found.append({"image": question["image"], "question": question["question"], "texts": texts})
            if len(found) == IMAGES:
                break
    return found


def _answers(folder: Path) -> dict[str, str]:
    rows = map(json.loads, (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines())
    return {row["id"]: row["text"] for row in rows}


def _marked(text: str, absent: set[str]) -> list[tuple[str, bool]]:
    """A description in parts, each with whether it is the name of an absent object."""
    names = "|".join(map(re.escape, sorted(absent, key=len, reverse=True)))
    parts = re.split(rf"\b({names})\b", text, flags=re.IGNORECASE) if names else [text]
    return [(part, bool(place % 2)) for place, part in enumerate(parts) if part]
