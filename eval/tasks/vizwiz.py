"""VizWiz-VQA: questions that blind people asked about their photographs (arXiv 1802.08218).

The answers of the test split are hidden and its server is closed, so this task scores the validation split,
"VizWiz-val": references `vizwiz/Annotations/val.json` or `vizwiz/val.json` [{image, question, answers: [{answer}],
answerable}]; images `vizwiz/val/`; questions from `vizwiz/llava_val.jsonl` {question_id, image, text} if it exists,
otherwise built from the references. Published figures are for the test split.

Without these references, `vizwiz/llava_test.jsonl` and `vizwiz/test/` are answered and exported, but not scored.

Scoring as for TextVQA (`scorers/vqa_accuracy.py`). The server takes [{"image", "answer"}], normalised.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.example import SHORT_ANSWER, Example, Scored
from eval.files import FileImage, Row, as_row, find_file, read_jsonl, read_rows
from eval.scorers.vqa_accuracy import counted, normalise, score_answers
from eval.task import Headline, Task, Upload
from llavamod_offline.errors import EvalError

SUFFIX = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT_ANSWER
_LABELS = ("vizwiz/Annotations/val.json", "vizwiz/val.json")


@dataclass(frozen=True)
class VizWizReference:
    """The human answers, and whether the image answers the question; empty and None on the test split."""

    answers: tuple[str, ...]
    answerable: bool | None


def load(root: Path) -> list[Example[VizWizReference]]:
    """Read the validation split or, without its references, the test split's questions."""
    labels = _label_file(root)
    if labels is None:
        rows = read_jsonl(find_file(root, "vizwiz/llava_test.jsonl"))
        return [_example(root, "test", row, VizWizReference((), None)) for row in rows]
    references = {row.text("image"): (row, _reference(row)) for row in read_rows(labels)}
    questions = root / "vizwiz" / "llava_val.jsonl"
    if not questions.is_file():
        return [_example(root, "val", _question(row), reference) for row, reference in references.values()]
    examples = []
    for row in read_jsonl(questions):
        if row.text("image") not in references:
            raise row.error(f"image '{row.text('image')}' is not in {labels.name}: use the validation split of both")
        examples.append(_example(root, "val", row, references[row.text("image")][1]))
    return examples


def reference_files(root: Path) -> list[Path]:
    """The references, and the question file if it exists."""
    labels = _label_file(root)
    if labels is None:
        return [find_file(root, "vizwiz/llava_test.jsonl")]
    questions = root / "vizwiz" / "llava_val.jsonl"
    return [labels, questions] if questions.is_file() else [labels]


def score(examples: Sequence[Example[VizWizReference]], texts: Mapping[str, str | None]) -> Scored:
    """VQA accuracy over all, answerable and unanswerable questions."""
    if any(example.reference.answerable is None for example in examples):
        raise EvalError(
            "vizwiz: the test split's answers are hidden and its server is closed: "
            "put the validation split's val.json in vizwiz/Annotations, or use 'eval-student export'"
        )
    verdicts, empty = score_answers(examples, texts)
    groups: dict[str, list[float]] = {}
    for example in examples:
        kind = "answerable" if example.reference.answerable else "unanswerable"
        for name in ("accuracy", f"accuracy_{kind}"):
            groups.setdefault(name, []).append(verdicts[example.id].right)
    return Scored({name: sum(values) / len(values) for name, values in groups.items()}, empty, verdicts)


def _example(root: Path, split: str, row: Row, reference: VizWizReference) -> Example[VizWizReference]:
    image, identifier = row.text("image"), row.identifier("question_id")
    return Example(
        id=image,
        prompt=row.text("text"),
        reference=reference,
        image=image,
        source=FileImage(root / "vizwiz" / split, (image,)),
        aliases=tuple(dict.fromkeys((identifier, image))),
        question_id=row.values["question_id"],
    )


def _question(row: Row) -> Row:
    """Convert an annotation to a question in LLaVA's form."""
    values = {"question_id": row.text("image"), "image": row.text("image"), "text": row.text("question") + SUFFIX}
    return Row(row.path, row.place, values)


def _reference(row: Row) -> VizWizReference:
    items = row.values.get("answers")
    if not isinstance(items, list) or not items:
        raise row.error("no 'answers': those of the test split are hidden, use val.json")
    answers = tuple(as_row(row.path, f"{row.place}, answers", item).text("answer") for item in items)
    return VizWizReference(answers, bool(row.values.get("answerable", 1)))


def _upload(examples: Sequence[Example[VizWizReference]], texts: Mapping[str, str]) -> str:
    rows = [{"image": example.image, "answer": normalise(texts[example.id])} for example in examples]
    return json.dumps(rows, ensure_ascii=False)


def _label_file(root: Path) -> Path | None:
    return next((root / place for place in _LABELS if (root / place).is_file()), None)


TASK = Task(
    name="vizwiz",
    headlines=(
        Headline(
            "vizwiz",
            "accuracy",
            "VizWiz",
            published={"LLaVA-MoD-1.8B": 0.392},
            not_comparable="published on the test split, measured here on the validation split",
        ),
    ),
    official_n=(4319,),
    max_new_tokens=128,
    protocol=(
        r"VizWiz-val, not the published test split | prompt: {question}\nWhen the provided information is "
        r"insufficient, respond with 'Unanswerable'.\nAnswer the question using a single word or phrase. "
        "| answer: normalised as EvalAI does, leave-one-out accuracy over the human answers"
    ),
    load=load,
    reference_files=reference_files,
    score=score,
    reference=lambda example: counted(example.reference.answers),
    upload=Upload(".json", _upload),
)
