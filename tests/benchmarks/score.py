"""Scoring speed: seconds of `eval-student score` on 100,000 answers to a benchmark, and of starting it.

    python -m tests.benchmarks.score [--quick] --json FILE

Every row is the command as a user types it, from the start of its process to its end: reading questions, references and
answers, joining, scoring, the checksum of the benchmark's files. The benchmarks are made up, in the published formats,
and the answers are in LLaVA's: `pope` three questions per image; `gqa`; `textvqa` with OCR tokens in the prompts and
ten human answers per question; `mme` two questions per image, references in the official tool's format, one file per
category; `mmbench` 25,000 questions in four rotations.
`NAME_seconds`: the median over the repeats. `start_seconds`: the same command on six answers. `processor s` is the
process's CPU time, which other load on the machine changes less.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks.form import Row, finish, median_seconds, parse_arguments
from tests.eval.fixtures import MMBENCH_OPTIONS, SHORT, mmbench_row, write_json, write_jsonl, write_tsv

NAME = "score"
WORDS = ("red", "two", "a dog", "St. John's", "the left", "1,000", "stop", "well-known", "dont", "yes")
CATEGORIES = ("existence", "count", "position", "color", "posters")


def answer(question_id: str | int, prompt: str, text: str) -> dict[str, Any]:
    """An answer line as LLaVA's runners write it."""
    return {
        "question_id": question_id,
        "prompt": prompt,
        "text": text,
        "answer_id": "kJvQ3gTn7mZC4bX9wL2sPd",
        "model_id": "llava-v1.5-13b",
        "metadata": {},
    }


def write_pope(root: Path, count: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Write questions and labels; yield the answers."""
    questions: list[dict[str, Any]] = []
    for index, category in enumerate(("adversarial", "popular", "random")):
        labels = []
        for number in range(index, count, 3):
            image, text = f"COCO_val2014_{number // 6:012d}.jpg", f"Is there a dog{number} in the image?"
            labels.append({"question_id": number, "image": image, "text": text, "label": rng.choice(("yes", "no"))})
            questions.append({"question_id": number, "image": image, "text": text + SHORT, "category": category})
        write_jsonl(root / "pope" / "coco" / f"coco_pope_{category}.json", labels)
    write_jsonl(root / "pope" / "llava_pope_test.jsonl", questions)
    return (answer(row["question_id"], row["text"], rng.choice(("Yes", "No", "No, it is not."))) for row in questions)


def write_gqa(root: Path, count: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Write questions and references as long as the real ones; yield the answers."""
    references = {
        f"20{number:07d}": {
            "semantic": [{"operation": "select", "dependencies": [], "argument": "wall (1039893)"}] * 3,
            "entailed": [],
            "equivalent": [f"20{number:07d}"],
            "question": "What color is the wall behind the woman?",
            "imageId": f"n{number // 30}",
            "isBalanced": True,
            "groups": {"global": rng.choice(("color", "size", None)), "local": "13-wall_woman"},
            "answer": rng.choice(WORDS),
            "semanticStr": "select: wall (1039893)->relate: woman,behind,s (1039872) [0]->query: color [1]",
            "annotations": {"answer": {"0": "1039872"}, "question": {"4": "1039872"}, "fullAnswer": {"1": "1039872"}},
            "types": {"detailed": "relS", "semantic": "rel", "structural": rng.choice(("query", "verify"))},
            "fullAnswer": "The wall is red.",
        }
        for number in range(count)
    }
    write_json(root / "gqa" / "data" / "testdev_balanced_questions.json", references)
    prompt = f"What color is the wall behind the woman?{SHORT}"
    rows = [{"question_id": name, "image": "n1.jpg", "text": prompt, "category": "default"} for name in references]
    write_jsonl(root / "gqa" / "llava_gqa_testdev_balanced.jsonl", rows)
    return (answer(name, prompt, rng.choice(WORDS)) for name in references)


def write_textvqa(root: Path, count: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Write questions, two per image, each with ten human answers; yield the answers."""
    questions, data = [], []
    for number in range(count):
        image, asked = f"{number // 2:016x}", f"What is written on sign {number % 2}?"
        tokens = ", ".join(rng.choice(WORDS) for _ in range(12))
        text = f"{asked}\nReference OCR token: {tokens}{SHORT}"
        questions.append({"question_id": image, "image": f"{image}.jpg", "text": text, "category": "default"})
        given = [f"{rng.choice(WORDS)} {rng.randrange(50)}" for _ in range(10)]
        data.append({"image_id": image, "question": asked, "question_id": number, "answers": given})
    write_jsonl(root / "textvqa" / "llava_textvqa_val_v051_ocr.jsonl", questions)
    write_json(root / "textvqa" / "TextVQA_0.5.1_val.json", {"data": data})
    return (answer(row["question_id"], row["text"], f"{rng.choice(WORDS)} {rng.randrange(50)}.") for row in questions)


def write_mme(root: Path, count: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Write two questions per image and the official tool's templates; yield the answers."""
    questions: list[dict[str, Any]] = []
    lines: dict[str, list[str]] = {category: [] for category in CATEGORIES}
    for number in range(count // 2):
        category, name = CATEGORIES[number % len(CATEGORIES)], f"{number:06d}.jpg"
        for text, word in ((f"Is there dog {number} in the image?", "Yes"), (f"Is there cat {number} in it?", "No")):
            lines[category].append(f"{name}\t{text} Please answer yes or no.\t{word}\t\n")
            place = f"{category}/{name}"
            questions.append({"question_id": place, "image": place, "text": text + SHORT, "category": category})
    folder = root / "MME" / "eval_tool" / "Your_Results"
    folder.mkdir(parents=True)
    for category, written in lines.items():
        (folder / f"{category}.txt").write_text("".join(written))
    write_jsonl(root / "MME" / "llava_mme.jsonl", questions)
    return (answer(row["question_id"], row["text"], rng.choice(("Yes", "No"))) for row in questions)


def write_mmbench(root: Path, count: int, rng: random.Random) -> Iterator[dict[str, Any]]:
    """Write questions in four rotations, with images of a few hundred bytes; yield the answers."""
    rows = []
    for number in range(count // 4):
        for turn in range(4):
            options = MMBENCH_OPTIONS[-turn:] + MMBENCH_OPTIONS[:-turn] if turn else MMBENCH_OPTIONS
            rows.append(mmbench_row(turn * 1_000_000 + number, options, "ABCD"[turn], image="iVBORw0KGgo" * 40))
    write_tsv(root / "mmbench" / "mmbench_dev_20230712.tsv", rows)
    said = ("A", "B.", "(C)", "a red cat", "I cannot tell")
    return (answer(int(row["index"]), row["question"], rng.choice(said)) for row in rows)


WORLDS: dict[str, Callable[[Path, int, random.Random], Iterator[dict[str, Any]]]] = {
    "pope": write_pope,
    "gqa": write_gqa,
    "textvqa": write_textvqa,
    "mme": write_mme,
    "mmbench": write_mmbench,
}


def score(task: str, root: Path) -> dict[str, Any]:
    """Run the command and read what it wrote."""
    command = Path(sys.executable).with_name("eval-student")
    arguments: Sequence[str | Path] = (
        *("score", task, "--root", root),
        *("--predictions", root / "answers.jsonl", "--output", root / "score.json"),
    )
    subprocess.run([command, *arguments], check=True, stdout=subprocess.DEVNULL)
    result: dict[str, Any] = json.loads((root / "score.json").read_text())
    return result


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    """Measure and report."""
    arguments = parse_arguments(NAME, __doc__ or "")
    count, repeats = (1_000, 1) if arguments.quick else (100_000, 5)
    rng = random.Random(0)
    folder = Path(tempfile.mkdtemp(prefix="benchmark-score-"))
    try:
        for task, write in WORLDS.items():
            write_jsonl(folder / task / "answers.jsonl", write(folder / task, count, rng))
            assert score(task, folder / task)["n"] == count
        write_jsonl(folder / "start" / "answers.jsonl", write_pope(folder / "start", 6, rng))
        cases = {"start": ("pope", folder / "start")} | {task: (task, folder / task) for task in WORLDS}
        processor: dict[str, list[float]] = {name: [] for name in cases}

        def run(name: str) -> None:
            before = _children_seconds()
            score(*cases[name])
            processor[name].append(_children_seconds() - before)

        seconds = median_seconds({name: partial(run, name) for name in cases}, repeats=repeats)
    finally:
        shutil.rmtree(folder)
    rows: list[Row] = [
        {
            "case": name,
            "answers": 6 if name == "start" else count,
            "s": value,
            "processor s": statistics.median(processor[name]),
        }
        for name, value in seconds.items()
    ]
    ratios = {f"{name}_seconds": value for name, value in seconds.items()}
    settings = {"answers": count, "repeats": repeats, "load": os.getloadavg()[0]}
    finish(NAME, arguments, settings=settings, rows=rows, ratios=ratios)


if __name__ == "__main__":
    main()
