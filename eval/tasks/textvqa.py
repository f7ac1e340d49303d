"""TextVQA, validation: questions about text in images (arXiv 1904.08920).

Files: `textvqa/llava_textvqa_val_v051_ocr.jsonl` {question_id (the image's), image, text}; references
`textvqa/TextVQA_0.5.1_val.json` {"data": [{image_id, question, answers}]}; images `textvqa/train_images/`.

LLaVA's prompt contains the tokens that an OCR system read. They are worth about 12 points, so figures with and without
them are not comparable; the protocol counts the prompts that have them. Questions and references are joined on (image,
question in lower case), as in llava/eval/eval_textvqa.py; if that fails, ignoring differences in spacing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.example import Example, Scored
from eval.files import FileImage, as_row, find_file, read_jsonl, read_object
from eval.scorers.vqa_accuracy import counted, score_answers
from eval.task import Headline, Task
from llavamod_offline.errors import EvalError

_OCR = "Reference OCR token: "
_OLDER = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)


_Answers = tuple[tuple[str, ...], tuple[str, ...]]  # those of humans; the ids that lmms-eval knows the question by


@dataclass(frozen=True)
class TextVqaReference:
    """The human answers; `hinted`: the prompt contains the OCR tokens."""

    answers: tuple[str, ...]
    hinted: bool


def load(root: Path) -> list[Example[TextVqaReference]]:
    """Read questions and references. Errors: `EvalError` for a question without human answers."""
    answers, images = _answers(_reference_file(root)), root / "textvqa" / "train_images"
    examples, seen = [], Counter[str]()
    for row in read_jsonl(_question_file(root)):
        image_id, prompt = row.identifier("question_id"), row.text("text")
        asked, question = _asked(prompt).lower(), question_key(prompt)
        found = answers.get((image_id, asked)) or answers.get((image_id, question))
        if found is None:
            raise row.error(f"no human answers to '{question}' about {image_id} in {_reference_file(root).name}")
        given, official_ids = found
        seen[image_id] += 1
        examples.append(
            Example(
                id=f"{image_id}#{seen[image_id]}",
                prompt=prompt,
                reference=TextVqaReference(given, _OCR in prompt),
                image=row.text("image"),
                source=FileImage(images, (row.text("image"),)),
                aliases=(image_id, *official_ids),
                question_id=row.values["question_id"],
                question=question,
            )
        )
    return examples


def reference_files(root: Path) -> list[Path]:
    """The question file and the references."""
    return [_question_file(root), _reference_file(root)]


def question_key(prompt: str) -> str:
    """The question in lower case with single spaces, from any of the three published prompt forms."""
    return " ".join(_asked(prompt).lower().split())


def _asked(prompt: str) -> str:
    prompt = prompt.removeprefix("<image>\n")
    older = _OLDER.search(prompt) if prompt.startswith("OCR tokens: ") else None
    lines = prompt.split("\n")
    second = prompt.startswith(_OCR.strip()) and len(lines) > 1
    return older.group(1) if older else lines[1 if second else 0]


def score(examples: Sequence[Example[TextVqaReference]], texts: Mapping[str, str | None]) -> Scored:
    """VQA accuracy; a missing answer counts 0."""
    verdicts, empty = score_answers(examples, texts)
    hinted = sum(example.reference.hinted for example in examples)
    total = sum(verdict.right for verdict in verdicts.values())
    notes = (f"OCR tokens in {hinted} of {len(examples)} published prompts",)
    return Scored({"accuracy": total / len(verdicts) if verdicts else None}, empty, verdicts, notes)


def _answers(path: Path) -> dict[tuple[str, str], _Answers]:
    """By image and question."""
    data = read_object(path).get("data")
    if not isinstance(data, list):
        raise EvalError(f"{path}: no list 'data': use TextVQA_0.5.1_val.json")
    exact: dict[tuple[str, str], _Answers] = {}
    spaced: dict[tuple[str, str], _Answers] = {}
    for number, item in enumerate(data, 1):
        row = as_row(path, f"data, item {number}", item)
        image_id, question = row.identifier("image_id"), row.text("question").lower()
        given = tuple(row.texts("answers"))
        if not given:
            raise row.error("no 'answers': those of the test split are hidden, use TextVQA_0.5.1_val.json")
        names = (row.identifier("question_id"),) if "question_id" in row.values else ()
        for found, asked in ((exact, question), (spaced, " ".join(question.split()))):
            before = found.get((image_id, asked), ((), ()))[1]  # a question may be there twice
            found[image_id, asked] = given, (*before, *names)
    return spaced | exact


def _question_file(root: Path) -> Path:
    return find_file(root, "textvqa/llava_textvqa_val_v051_ocr.jsonl", "textvqa/llava_textvqa_val_v051.jsonl")


def _reference_file(root: Path) -> Path:
    return find_file(root, "textvqa/TextVQA_0.5.1_val.json")


TASK = Task(
    name="textvqa",
    headlines=(
        Headline("textvqa", "accuracy", "TextVQA", published={"LLaVA-MoD-1.8B": 0.585, "LLaVA-1.5-13B": 0.613}),
    ),
    official_n=(5000,),
    max_new_tokens=128,
    protocol=(
        r"prompt: {question}\nReference OCR token: {tokens}\nAnswer the question using a single word or phrase. "
        "| answer: normalised as EvalAI does, leave-one-out accuracy over the human answers (M4C evaluator)"
    ),
    load=load,
    reference_files=reference_files,
    score=score,
    reference=lambda example: counted(example.reference.answers),
    question_key=question_key,
)
