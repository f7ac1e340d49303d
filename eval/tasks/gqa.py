"""GQA, balanced test-dev: compositional questions with short answers (arXiv 1902.09506).

Files: `gqa/llava_gqa_testdev_balanced.jsonl` {question_id, image, text}; references
`gqa/testdev_balanced_questions.json` or, as LLaVA keeps it, `gqa/data/testdev_balanced_questions.json`
{id: {answer, isBalanced, types, groups}}; images `gqa/data/images/`.

Parsing (scripts/convert_gqa_for_eval.py, then GQA's own eval.py): remove all trailing ".", lower-case, then require an
exact match with the reference; spaces and articles stay. Only balanced questions count. A missing answer is wrong
(LLaVA-MoD's eval_gqa_1.py skips it, which shrinks the denominator).

Consistency, validity, plausibility and grounding need files that GQA 1.2 no longer ships. `distribution` is GQA's
chi-square over answer groups, divided by 100 (lower is better), over the questions that have a group (many do not).

Upload: GQA's own script takes [{questionId, prediction}].
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.example import Example, Scored, Verdict
from eval.files import FileImage, Row, as_row, find_file, read_jsonl, read_object
from eval.task import Headline, Task, Upload

_KINDS = ("types", "groups")


@dataclass(frozen=True)
class GqaReference:
    """The reference answer and the groups of its question; `group` is empty if it has none."""

    answer: str
    balanced: bool
    structural: str
    semantic: str
    group: str


def load(root: Path) -> list[Example[GqaReference]]:
    """Read questions and references. Errors: `EvalError` for a question without a reference."""
    file = _reference_file(root)
    references, images = read_object(file), root / "gqa" / "data" / "images"
    examples = []
    for row in read_jsonl(_question_file(root)):
        identifier = row.identifier("question_id")
        if identifier not in references:
            raise row.error(f"question '{identifier}' is not in {file.name}: use the balanced test-dev questions")
        examples.append(
            Example(
                id=identifier,
                prompt=row.text("text"),
                reference=_reference(as_row(file, f"question '{identifier}'", references[identifier])),
                image=row.text("image"),
                source=FileImage(images, (row.text("image"),)),
                aliases=(identifier,),
                question_id=row.values["question_id"],
            )
        )
    return examples


def reference_files(root: Path) -> list[Path]:
    """The question file and the references."""
    return [_question_file(root), _reference_file(root)]


def parse(text: str) -> str:
    """Remove trailing periods and lower-case."""
    return text.rstrip(".").lower()


def score(examples: Sequence[Example[GqaReference]], texts: Mapping[str, str | None]) -> Scored:
    """Accuracy over balanced questions: all, open, yes/no, and each type."""
    verdicts: dict[str, Verdict] = {}
    groups: dict[str, list[float]] = defaultdict(list)
    answered: list[tuple[GqaReference, str]] = []
    for example in examples:
        reference, text = example.reference, texts[example.id]
        if not reference.balanced:
            continue
        read_as = "" if text is None else parse(text)
        right = float(text is not None and read_as == reference.answer)
        verdicts[example.id] = Verdict(read_as, right)
        answered.append((reference, read_as))
        kind = "open" if reference.structural == "query" else "binary"
        for name in ("", f"_{kind}", f"_structural_{reference.structural}", f"_semantic_{reference.semantic}"):
            groups[f"accuracy{name}"].append(right)
    metrics: dict[str, float | None] = {"accuracy": None}
    metrics |= {name: sum(values) / len(values) for name, values in sorted(groups.items())}
    grouped = [(reference, answer) for reference, answer in answered if reference.group]
    if grouped:
        metrics["distribution"] = _distribution(grouped)
    left_out = len(examples) - len(verdicts)
    notes = (f"{left_out} unbalanced questions left out",) if left_out else ()
    empty = sum(1 for example in examples if texts[example.id] is not None and not parse(str(texts[example.id])))
    return Scored(metrics, empty, verdicts, notes)


def _distribution(answered: Sequence[tuple[GqaReference, str]]) -> float:
    """Chi-square of predicted against true answers, averaged over groups weighted by size, divided by 100."""
    true: dict[str, Counter[str]] = defaultdict(Counter)
    predicted: dict[str, Counter[str]] = defaultdict(Counter)
    for reference, answer in answered:
        true[reference.group][reference.answer] += 1
        predicted[reference.group][answer] += 1
    weighted = 0.0
    for group, counts in true.items():
        chi_square = sum((predicted[group][answer] - count) ** 2 / count for answer, count in counts.items())
        weighted += chi_square * counts.total()
    return weighted / len(answered) / 100


def _reference(row: Row) -> GqaReference:
    types, groups = (as_row(row.path, f"{row.place}, {name}", row.values.get(name) or {}) for name in _KINDS)
    return GqaReference(
        answer=row.text("answer"),
        balanced=bool(row.values.get("isBalanced", True)),
        structural=str(types.values.get("structural") or "unknown"),
        semantic=str(types.values.get("semantic") or "unknown"),
        group=str(groups.values.get("global") or ""),
    )


def _upload(examples: Sequence[Example[GqaReference]], texts: Mapping[str, str]) -> str:
    answers = [{"questionId": example.id, "prediction": parse(texts[example.id])} for example in examples]
    return json.dumps(answers, ensure_ascii=False)


def _question_file(root: Path) -> Path:
    return find_file(root, "gqa/llava_gqa_testdev_balanced.jsonl")


def _reference_file(root: Path) -> Path:
    return find_file(root, "gqa/testdev_balanced_questions.json", "gqa/data/testdev_balanced_questions.json")


TASK = Task(
    name="gqa",
    headlines=(Headline("gqa", "accuracy", "GQA", published={"LLaVA-MoD-1.8B": 0.587, "LLaVA-MoD-0.5B": 0.562}),),
    official_n=(12578,),
    max_new_tokens=128,
    protocol=(
        r"prompt: {question}\nAnswer the question using a single word or phrase. "
        "| answer: trailing '.' removed, lower case, equal to the reference; balanced questions"
    ),
    load=load,
    reference_files=reference_files,
    score=score,
    reference=lambda example: example.reference.answer,
    upload=Upload(".json", _upload),
)
