"""VizWiz-VQA: questions that blind people asked about their photographs (arXiv 1802.08218).

The answers of the test split are hidden, and the server that scored them is closed. So figures here are of the
validation split, "VizWiz-val": references `vizwiz/Annotations/val.json` or `vizwiz/val.json` [{image, question,
answers: [{answer}], answerable}]; images `vizwiz/val/`; questions from `vizwiz/llava_val.jsonl` {question_id, image,
text} where that is there, else made from the references. Published figures are of the test split.

Without those references, `vizwiz/llava_test.jsonl` and `vizwiz/test/` are answered and exported, but not scored.

Answers are scored as TextVQA's (`scorers/vqa_accuracy.py`). The server takes [{"image", "answer"}], normalised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.example import SHORT_ANSWER, Example, Scored, Verdict, first_line_key
from eval.files import FileImage, Row, as_row, find_file, read_jsonl, read_rows
from eval.scorers.vqa_accuracy import accuracy, normalise
from llavamod_offline.errors import EvalError

NAME = "vizwiz"
HEADLINE = "accuracy"
OFFICIAL_N: tuple[int, ...] = (4319,)
MAX_NEW_TOKENS = 128
SUFFIX = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT_ANSWER
PROTOCOL = (
    r"VizWiz-val, not the published test split | prompt: {question}\nWhen the provided information is insufficient, "
    r"respond with 'Unanswerable'.\nAnswer the question using a single word or phrase. "
    "| answer: normalised as EvalAI does, leave-one-out accuracy over the human answers"
)
_LABELS = ("vizwiz/Annotations/val.json", "vizwiz/val.json")


@dataclass(frozen=True)
class Reference:
    """What people answered, and whether the image answers the question; None of either on the test split."""

    answers: tuple[str, ...]
    answerable: bool | None


def load(root: Path) -> list[Example[Reference]]:
    """Read the validation split, or, where its references are not there, the test split's questions."""
    labels = _label_file(root)
    if labels is None:
        rows = read_jsonl(find_file(root, "vizwiz/llava_test.jsonl"))
        return [_example(root, "test", row, Reference((), None)) for row in rows]
    references = {row.text("image"): (row, _reference(row)) for row in read_rows(labels)}
    questions = root / "vizwiz" / "llava_val.jsonl"
    if not questions.is_file():
        return [_example(root, "val", _question(row), reference) for row, reference in references.values()]
    examples = []
    for row in read_jsonl(questions):
        if row.text("image") not in references:
            raise row.error(f"picture '{row.text('image')}' is not in {labels.name}: take the validation split of both")
        examples.append(_example(root, "val", row, references[row.text("image")][1]))
    return examples


def reference_files(root: Path) -> list[Path]:
    """The references, and the question file where one is there."""
    labels = _label_file(root)
    if labels is None:
        return [find_file(root, "vizwiz/llava_test.jsonl")]
    questions = root / "vizwiz" / "llava_val.jsonl"
    return [labels, questions] if questions.is_file() else [labels]


question_key = first_line_key


def score(examples: Sequence[Example[Reference]], texts: Mapping[str, str | None]) -> Scored:
    """VQA accuracy over all questions, over those that the image answers and over those that it does not."""
    if any(example.reference.answerable is None for example in examples):
        raise EvalError(
            "vizwiz: the test split's answers are hidden and its server is closed: "
            "put the validation split's val.json in vizwiz/Annotations, or use 'eval-student export'"
        )
    verdicts, groups = {}, dict[str, list[float]]()
    for example in examples:
        text = texts[example.id]
        read_as = "" if text is None else normalise(text)
        right = 0.0 if text is None else accuracy(read_as, example.reference.answers)
        verdicts[example.id] = Verdict(read_as, right)
        kind = "answerable" if example.reference.answerable else "unanswerable"
        for name in ("accuracy", f"accuracy_{kind}"):
            groups.setdefault(name, []).append(right)
    empty = sum(1 for example in examples if texts[example.id] is not None and not verdicts[example.id].read_as)
    return Scored({name: sum(values) / len(values) for name, values in groups.items()}, empty, verdicts)


def _example(root: Path, split: str, row: Row, reference: Reference) -> Example[Reference]:
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
    """A question in LLaVA's form from an annotation."""
    values = {"question_id": row.text("image"), "image": row.text("image"), "text": row.text("question") + SUFFIX}
    return Row(row.path, row.place, values)


def _reference(row: Row) -> Reference:
    items = row.values.get("answers")
    if not isinstance(items, list) or not items:
        raise row.error("no 'answers': the test split's are hidden, take val.json")
    answers = tuple(as_row(row.path, f"{row.place}, answers", item).text("answer") for item in items)
    return Reference(answers, bool(row.values.get("answerable", 1)))


def _label_file(root: Path) -> Path | None:
    return next((root / place for place in _LABELS if (root / place).is_file()), None)
