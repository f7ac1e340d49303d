"""POPE: is an object in the image? Absent objects are chosen in three ways (arXiv 2305.10355).

Files: `pope/llava_pope_test.jsonl` {question_id, image, text, category}; labels
`pope/coco/coco_pope_{adversarial,popular,random}.json` {image, text, label} as JSON lines; images `pope/val2014/`.

Questions and labels are joined on (category, image, question), never by order: upstream replaced the label file of
"random" with one of a different length and order, so pairing them line by line scores noise (POPE #17, LLaVA #626).

Parsing (llava/eval/eval_pope.py): take the text before the first ".", delete commas, split at single spaces; "no" if a
word is exactly "No", "not" or "no", else "yes". An empty answer, "NO" and "nope" thus read as "yes"; answers without
"yes" or "no" in any case are also counted as unparsed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.example import Example, Scored, Verdict, first_line_key
from eval.files import FileImage, Row, find_file, read_jsonl
from eval.task import Headline, Task
from llavamod_offline.errors import EvalError

CATEGORIES = ("adversarial", "popular", "random")
_LABELS = "pope/coco/coco_pope_{}.json"
_NO_WORDS = {"No", "not", "no"}
_DECIDED = re.compile(r"\b(yes|no|not)\b", re.IGNORECASE)


@dataclass(frozen=True)
class PopeLabel:
    """Whether the object is in the image."""

    category: str
    yes: bool


def load(root: Path) -> list[Example[PopeLabel]]:
    """Read questions and labels. Errors: `EvalError` for a question without a label, or contradicting labels."""
    labels: dict[str, dict[tuple[str, str], bool]] = {}
    examples, images = [], root / "pope" / "val2014"
    for row in read_jsonl(_question_file(root)):
        category, image, prompt = row.text("category"), row.text("image"), row.text("text")
        if category not in CATEGORIES:
            raise row.error(f"category '{category}' is unknown: expected one of {', '.join(CATEGORIES)}")
        if category not in labels:
            labels[category] = _labels(_label_file(root, category))
        yes = labels[category].get((image, question_key(prompt)))
        if yes is None:
            asked = prompt.split("\n")[0]
            raise row.error(
                f"no label for '{asked}' of {image} in coco_pope_{category}.json: "
                "use the label files of POPE's commit e3e3926"
            )
        examples.append(
            Example(
                id=row.identifier("question_id"),
                prompt=prompt,
                reference=PopeLabel(category, yes),
                image=image,
                source=FileImage(images, (image,)),
                aliases=(row.identifier("question_id"),),
                question_id=row.values["question_id"],
            )
        )
    return examples


def reference_files(root: Path) -> list[Path]:
    """The question file and the label files that exist."""
    labels = (root / _LABELS.format(category) for category in CATEGORIES)
    return [_question_file(root), *(path for path in labels if path.is_file())]


def question_key(prompt: str) -> str:
    """The question in lower case, with the published typo "imange" corrected."""
    return first_line_key(prompt).replace("imange", "image")


def parse(text: str) -> str:
    """Read an answer as "yes" or "no"."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if _NO_WORDS.intersection(words) else "yes"


def score(examples: Sequence[Example[PopeLabel]], texts: Mapping[str, str | None]) -> Scored:
    """F1, accuracy, precision, recall and share of "yes", for each category and overall."""
    verdicts, unparsed = {}, 0
    counts = {category: [0, 0, 0, 0] for category in CATEGORIES}  # right yes, wrong yes, right no, wrong no
    for example in examples:
        label, text = example.reference, texts[example.id]
        said_yes = (parse(text) == "yes") if text is not None else not label.yes
        unparsed += text is not None and not _DECIDED.search(text)
        right = said_yes == label.yes
        counts[label.category][(0 if said_yes else 2) + (not right)] += 1
        verdicts[example.id] = Verdict("" if text is None else "yes" if said_yes else "no", float(right))
    asked = {category: count for category, count in counts.items() if sum(count)}
    metrics: dict[str, float | None] = {f"f1_{category}": _f1(count) for category, count in asked.items()}
    metrics["f1_mean"] = sum(_f1(count) for count in asked.values()) / len(asked) if asked else None
    total = [sum(column) for column in zip(*asked.values(), strict=True)] if asked else [0, 0, 0, 0]
    metrics |= _rates(total, "")
    for category, count in asked.items():
        metrics |= _rates(count, f"_{category}")
    return Scored(metrics, unparsed, verdicts)


def _f1(count: Sequence[int]) -> float:
    right_yes, wrong_yes, _, wrong_no = count
    return _ratio(2 * right_yes, 2 * right_yes + wrong_yes + wrong_no)


def _rates(count: Sequence[int], suffix: str) -> dict[str, float | None]:
    right_yes, wrong_yes, right_no, wrong_no = count
    return {
        f"accuracy{suffix}": _ratio(right_yes + right_no, sum(count)),
        f"yes_ratio{suffix}": _ratio(right_yes + wrong_yes, sum(count)),
        f"precision{suffix}": _ratio(right_yes, right_yes + wrong_yes),
        f"recall{suffix}": _ratio(right_yes, right_yes + wrong_no),
    }


def _ratio(part: int, whole: int) -> float:
    """A ratio, or 0 if the denominator is 0, as for a model that never says yes."""
    return part / whole if whole else 0.0


def _labels(path: Path) -> dict[tuple[str, str], bool]:
    labels: dict[tuple[str, str], bool] = {}
    for row in read_jsonl(path):
        key, yes = (row.text("image"), question_key(row.text("text"))), _is_yes(row)
        if labels.setdefault(key, yes) != yes:
            raise EvalError(f"{path}: {row.place}: contradicts an earlier label of the question: download it again")
    return labels


def _is_yes(row: Row) -> bool:
    label = row.text("label")
    if label not in ("yes", "no"):
        raise row.error(f"label '{label}' is neither yes nor no")
    return label == "yes"


def _question_file(root: Path) -> Path:
    return find_file(root, "pope/llava_pope_test.jsonl")


def _label_file(root: Path, category: str) -> Path:
    return find_file(root, _LABELS.format(category))


TASK = Task(
    name="pope",
    headlines=(Headline("pope", "f1_mean", "POPE F1", published={"LLaVA-MoD-1.8B": 0.870, "LLaVA-1.5-13B": 0.859}),),
    official_n=(8910,),
    max_new_tokens=128,
    protocol=(
        r"prompt: {question}\nAnswer the question using a single word or phrase. "
        "| answer: 'no' if a word of the first sentence is No, not or no, else 'yes'; positive class: yes; "
        "headline: mean F1 of the categories"
    ),
    load=load,
    reference_files=reference_files,
    score=score,
    reference=lambda example: "yes" if example.reference.yes else "no",
    question_key=question_key,
)
