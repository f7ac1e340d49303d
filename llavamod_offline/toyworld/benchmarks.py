"""Benchmarks of the toy world in the official folder layouts of POPE, GQA, MME and Object HalBench."""

from __future__ import annotations

import base64
import json
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llavamod_offline.toyworld.draw import encode_scene
from llavamod_offline.toyworld.language import (
    DESCRIBE,
    SHORT_ANSWER,
    Question,
    absent_names,
    caption,
    presence_question,
    questions,
)
from llavamod_offline.toyworld.scene import COLOURS, COMPANIONS, SHAPES, Scene, random_scene

_YES_NO_MME = " Please answer yes or no."
_MME_KINDS = {"presence": "existence", "relation": "position"}


def write_benchmarks(root: Path, *, images: int, seed: int) -> None:
    """Write all four benchmarks below `root`, over `images` images each.

    POPE has its three rounds over half as many, Object HalBench three times as many: one description tells little.
    """
    rng = random.Random(seed)
    _write_pope(root / "pope", _object_scenes(-(-images // 2), rng), rng)
    _write_gqa(root / "gqa", [random_scene(rng) for _ in range(images)], rng)
    _write_mme(root / "MME", _object_scenes(images, rng), rng)
    _write_object_halbench(root / "object_halbench", _object_scenes(3 * images, rng), rng)


def _object_scenes(count: int, rng: random.Random) -> list[Scene]:
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = random_scene(rng)
        if not scene.is_chart:
            scenes.append(scene)
    return scenes


def _write_pope(folder: Path, scenes: Sequence[Scene], rng: random.Random) -> None:
    """Ask about as many absent as present objects: random, the most frequent, or the most easily assumed present."""
    frequency = Counter((thing.colour, thing.shape) for scene in scenes for thing in scene.things)
    rows: list[dict[str, Any]] = []
    for category in ("adversarial", "popular", "random"):
        labels: list[dict[str, Any]] = []
        for index, scene in enumerate(scenes):
            image = f"COCO_val2014_{index:012d}.jpg"
            if category == "adversarial":
                _write(folder / "val2014" / image, encode_scene(scene, "JPEG"))
            present = [(thing.colour, thing.shape) for thing in scene.things][:3]
            asked = [(*name, True) for name in rng.sample(present, len(present))]
            asked += [(*name, False) for name in _absent(scene, category, frequency, rng)[: len(present)]]
            for colour, shape, label in asked:
                text = presence_question(colour, shape, label).text
                labels.append({"question_id": len(labels) + 1, "image": image, "text": text, "label": _yes_no(label)})
                rows.append(
                    {"question_id": len(rows) + 1, "image": image, "text": text + SHORT_ANSWER, "category": category}
                )
        _write_jsonl(folder / "coco" / f"coco_pope_{category}.json", labels)
    _write_jsonl(folder / "llava_pope_test.jsonl", rows)


def _absent(
    scene: Scene, category: str, frequency: Counter[tuple[str, str]], rng: random.Random
) -> list[tuple[str, str]]:
    names = absent_names(scene)
    rng.shuffle(names)
    if category == "popular":
        names.sort(key=lambda name: -frequency[name])
    if category == "adversarial":  # first what usually accompanies present objects, then what resembles them
        names.sort(key=lambda name: -sum(name[0] == t.colour or name[1] == t.shape for t in scene.things))
        names.sort(key=lambda name: not any(COMPANIONS.get((t.colour, t.shape)) == name for t in scene.things))
    return names


def _write_gqa(folder: Path, scenes: Sequence[Scene], rng: random.Random) -> None:
    rows: list[dict[str, Any]] = []
    answers: dict[str, dict[str, Any]] = {}
    for index, scene in enumerate(scenes):
        image = f"n{index:06d}.jpg"
        _write(folder / "data" / "images" / image, encode_scene(scene, "JPEG"))
        for question in questions(scene, rng, 5):
            identifier = f"{len(rows):08d}"
            rows.append(
                {"question_id": identifier, "image": image, "text": question.text + SHORT_ANSWER, "category": "default"}
            )
            verify = question.answer in ("Yes", "No")
            answers[identifier] = {
                "question": question.text,
                "answer": question.answer.lower(),
                "imageId": image.removesuffix(".jpg"),
                "isBalanced": True,
                "types": {"structural": "verify" if verify else "query", "semantic": question.kind},
                "groups": {"global": question.kind},
            }
    _write_jsonl(folder / "llava_gqa_testdev_balanced.jsonl", rows)
    _write(folder / "testdev_balanced_questions.json", json.dumps(answers, indent=1).encode())


def _write_mme(folder: Path, scenes: Sequence[Scene], rng: random.Random) -> None:
    """Two questions per image, one answered yes and one answered no."""
    rows = []
    for index, scene in enumerate(scenes):
        asked = questions(scene, rng, 40)
        for kind, category in _MME_KINDS.items():
            pair = _yes_and_no([question for question in asked if question.kind == kind])
            if not pair:
                continue
            name = f"{category}/{index:04d}.png"
            _write(folder / "MME_Benchmark_release_version" / name, encode_scene(scene))
            truth = "".join(f"{question.text}{_YES_NO_MME}\t{question.answer}\n" for question in pair)
            _write(folder / "MME_Benchmark_release_version" / category / f"{index:04d}.txt", truth.encode())
            for question in pair:
                text = question.text + SHORT_ANSWER
                rows.append({"question_id": name, "image": name, "text": text, "category": category})
    _write_jsonl(folder / "llava_mme.jsonl", rows)


def _yes_and_no(asked: Sequence[Question]) -> list[Question]:
    pair = [next((q for q in asked if q.answer == answer), None) for answer in ("Yes", "No")]
    return [question for question in pair if question] if all(pair) else []


def _write_object_halbench(folder: Path, scenes: Sequence[Scene], rng: random.Random) -> None:
    names = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    rows, instances, captions = [], [], []
    for index, scene in enumerate(scenes):
        image = base64.b64encode(encode_scene(scene, "JPEG")).decode()
        rows.append({"image_id": index, "question": DESCRIBE, "image": image})
        instances += [{"image_id": index, "category_id": names.index(thing.name) + 1} for thing in scene.things]
        captions += [{"image_id": index, "caption": caption(scene, rng)} for _ in range(5)]
    images = [{"id": index, "file_name": f"{index:012d}.jpg"} for index in range(len(scenes))]
    categories = [{"id": number + 1, "name": name} for number, name in enumerate(names)]
    _write_jsonl(folder / "obj_halbench_300_with_image.jsonl", rows)
    _write(folder / "synonyms_refine.txt", "".join(f"{name}\n" for name in names).encode())
    annotations = {"images": images, "categories": categories, "annotations": instances}
    _write(folder / "annotations" / "instances_val2014.json", json.dumps(annotations).encode())
    spoken = {"images": images, "annotations": captions}
    _write(folder / "annotations" / "captions_val2014.json", json.dumps(spoken).encode())


def _yes_no(answer: bool) -> str:
    return "yes" if answer else "no"


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def _write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    _write(path, "".join(json.dumps(row) + "\n" for row in rows).encode())
