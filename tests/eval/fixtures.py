"""Small hand-made benchmarks in the published file formats."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.example import Example, Scored
from tests.tiny import tiny_image

SHORT = "\nAnswer the question using a single word or phrase."


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write JSON lines, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def write_json(path: Path, content: Any) -> Path:
    """Write one JSON value, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_image(path: Path, seed: int = 0) -> None:
    """Write a small image, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tiny_image(seed))


def answers(texts: Mapping[str | int, str], prompts: Mapping[str | int, str] | None = None) -> list[dict[str, Any]]:
    """LLaVA-style answers by question id."""
    return [
        {"question_id": key, "prompt": (prompts or {}).get(key, "Q"), "text": text, "answer_id": "x", "metadata": {}}
        for key, text in texts.items()
    ]


def scored(task: Any, root: Path, texts: Mapping[str, str | None]) -> Scored:
    """Load a benchmark (a task or its module) and score texts by example id."""
    examples: Sequence[Example[Any]] = task.load(root)
    result: Scored = task.score(examples, texts)
    return result


def pope_root(root: Path, labels: Sequence[str] = ("yes", "no", "yes", "no")) -> Path:
    """POPE with one question per label in each category; ids run on across categories."""
    questions = []
    for index, category in enumerate(("adversarial", "popular", "random")):
        rows = []
        for number, label in enumerate(labels):
            image, text = f"COCO_val2014_{number:012d}.png", f"Is there a dog{number} in the image?"
            rows.append({"question_id": number + 1, "image": image, "text": text, "label": label})
            questions.append(
                {
                    "question_id": index * len(labels) + number + 1,
                    "image": image,
                    "text": text + SHORT,
                    "category": category,
                }
            )
            write_image(root / "pope" / "val2014" / image, number)
        write_jsonl(root / "pope" / "coco" / f"coco_pope_{category}.json", rows)
    write_jsonl(root / "pope" / "llava_pope_test.jsonl", questions)
    return root


def gqa_root(root: Path, references: Mapping[str, Mapping[str, Any]], *, below: str = "gqa/data") -> Path:
    """GQA with the given references; all questions share one image."""
    write_image(root / "gqa" / "data" / "images" / "n1.jpg")
    write_json(root / below / "testdev_balanced_questions.json", references)
    rows = [{"question_id": key, "image": "n1.jpg", "text": f"What is {key}?{SHORT}"} for key in references]
    write_jsonl(root / "gqa" / "llava_gqa_testdev_balanced.jsonl", rows)
    return root


def halbench_root(
    root: Path,
    synonyms: Sequence[str],
    images: Mapping[int, tuple[Sequence[str], Sequence[str]]],
) -> Path:
    """Object HalBench; `images` maps an image id to the categories of its instances and its captions."""
    folder = root / "object_halbench"
    write_jsonl(
        folder / "obj_halbench_300_with_image.jsonl",
        [
            {
                "image": base64.b64encode(tiny_image(image)).decode(),
                "image_id": image,
                "question": "Provide a thorough description of the given image.",
            }
            for image in images
        ],
    )
    (folder / "synonyms_refine.txt").write_text("\n".join(synonyms) + "\n")
    names = sorted({name for categories, _ in images.values() for name in categories})
    instances = {
        "categories": [{"id": number, "name": name} for number, name in enumerate(names)],
        "annotations": [
            {"image_id": image, "category_id": names.index(name)}
            for image, (categories, _) in images.items()
            for name in categories
        ],
    }
    captions = {
        "annotations": [
            {"image_id": image, "caption": caption} for image, (_, texts) in images.items() for caption in texts
        ]
    }
    write_json(folder / "annotations" / "instances_val2014.json", instances)
    write_json(folder / "annotations" / "captions_val2014.json", captions)
    return root


def mmhal_root(root: Path, count: int) -> Path:
    """MMHal with `count` questions, of kind `attribute` in the first half and `other` in the second."""
    folder = root / "mmhal"
    rows = []
    for number in range(count):
        rows.append(
            {
                "question_type": "attribute" if number < count / 2 else "other",
                "question_topic": "outdoor",
                "image_id": f"id{number}",
                "image_src": f"https://example.org/{number}_o.jpg",
                "image_content": ["Cat", "Tree"],
                "question": f"Question {number}?",
                "gt_answer": f"Answer {number}.",
                "model_answer": "",
            }
        )
        write_image(folder / "images" / f"id{number}.jpg", number)
    write_json(folder / "response_template.json", rows)
    return root


def science_root(root: Path) -> Path:
    """Two questions with an image, one without; right answers B, A, C."""
    rows = [("4", "B", True), ("5", "A", True), ("11", "C", False)]
    questions, problems = [], {}
    for name, letter, pictured in rows:
        value = ("<image>\n" if pictured else "") + f"Context: c\nQuestion {name}?\nA. x\nB. y\nC. z"
        row = {"id": name, "conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": letter}]}
        write_image(root / "scienceqa" / "images" / "test" / name / "image.png")
        questions.append({**row, "image": f"{name}/image.png"} if pictured else row)
        problems[name] = {"choices": ["x", "y", "z"], "answer": "ABC".index(letter), "image": None}
    write_json(root / "scienceqa" / "llava_test_CQM-A.json", questions)
    write_json(root / "scienceqa" / "problems.json", {**problems, "99": {"choices": [], "answer": 0}})
    write_json(root / "scienceqa" / "pid_splits.json", {"test": [name for name, *_ in rows], "train": ["99"]})
    return root


MMBENCH_COLUMNS = (
    *("index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "source", "l2-category"),
    *("comment", "split"),
)
MMBENCH_OPTIONS = ("a red cat", "a dog", "two birds", "none of them")


def mmbench_row(index: int, options: tuple[str, ...], answer: str, **changes: str) -> dict[str, str]:
    """A row of MMBench's file."""
    values = dict.fromkeys(MMBENCH_COLUMNS, "") | dict(zip("ABCD", options, strict=False))
    image = base64.b64encode(tiny_image(index % 1_000_000)).decode()
    values |= {"index": str(index), "question": f'What is "it" {index % 1_000_000}?', "answer": answer, "image": image}
    return values | {"category": "identity", "l2-category": "coarse", "split": "dev"} | changes


MMBENCH_ROWS = [
    mmbench_row(1, MMBENCH_OPTIONS, "A"),
    mmbench_row(1_000_001, ("none of them", *MMBENCH_OPTIONS[:3]), "B"),
    mmbench_row(2_000_001, ("two birds", "none of them", *MMBENCH_OPTIONS[:2]), "C"),
    mmbench_row(2, ("yes", "no"), "B", hint="Line one\nline two", category="count"),
    mmbench_row(1_000_002, ("no", "yes"), "A", hint="Line one\nline two", category="count"),
]


def write_tsv(path: Path, rows: list[dict[str, str]], columns: tuple[str, ...] = MMBENCH_COLUMNS) -> Path:
    """Write MMBench's file, making the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter="\t", lineterminator="\n")
    writer.writerows([columns, *([values[name] for name in columns] for values in rows)])
    path.write_text(buffer.getvalue())
    return path
