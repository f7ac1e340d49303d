"""MMBench's two languages: questions from its TSV, the letter that an answer means, CircularEval (arXiv 2307.06281).

The published TSV holds every question several times with its options rotated; the copies of question i have the indices
i, 1000000 + i, 2000000 + i, … So each row is asked once and nothing is rotated here (LLaVA's `--all-rounds` stays off).

`circular`: share of questions answered rightly in *every* rotation, the published figure. `vanilla`: share of questions
answered rightly in their first row.

Reading, without a language model: (1) the answer is a letter; (2) it begins with a letter, perhaps in parentheses, and
one of ").:,"; (3) exactly one letter stands alone in it, where an "A" among more than three words is taken for the
article; (4) exactly one option's text occurs in it; else it is not read, which is wrong. The official server asks
GPT-4 to read what (1) to (3) do not, so the share that is not read belongs beside every figure, in Chinese above all.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.example import Example, Scored, Verdict
from eval.files import EmbeddedImage, Row, read_tsv
from llavamod_offline.errors import EvalError

LETTERS = "ABCD"
ROTATION = 1_000_000
UNREAD = "Z"
# Cells that pandas, with which LLaVA reads the file, takes for missing.
_MISSING = {
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"),
    *("NULL", "NaN", "None", "n/a", "nan", "null"),
}
_LEADING = re.compile(r"\(?([A-D])[).:,]")
_ALONE = re.compile(r"(?<![A-Za-z0-9])[A-D](?![A-Za-z0-9])")


@dataclass(frozen=True)
class Reference:
    """The right letter, the options, the question that the row is a rotation of, and its categories."""

    answer: str
    options: tuple[str, ...]
    group: int
    category: str
    broad_category: str


def load_tsv(path: Path, suffix: str) -> list[Example[Reference]]:
    """Read every row of a TSV as an example. Errors: `EvalError` naming the row for a missing or odd field."""
    columns, rows = read_tsv(path, drop=("image",))
    for column in ("index", "question", "A", "B", "answer", "image"):
        if column not in columns:
            raise EvalError(f"{path}: no column '{column}': take the TSV of MMBench's dev split, which has answers")
    return [_example(row, columns, suffix) for row in rows]


def is_missing(cell: str) -> bool:
    """Whether a cell counts as empty, as pandas and then LLaVA's `is_none` decide it."""
    return cell in _MISSING or cell.lower() in ("nan", "none")


def parse(text: str, options: Sequence[str]) -> str:
    """Read an answer as a letter, or as "Z" where it cannot be read."""
    text = text.strip()
    if len(text) == 1 and text in LETTERS:
        return text
    leading = _LEADING.match(text)
    if leading:
        return str(leading.group(1))
    alone: set[str] = set(_ALONE.findall(text))
    if len(alone) == 1 and not (alone == {"A"} and len(text.split()) > 3):
        return alone.pop()
    named = [letter for letter, option in zip(LETTERS, options, strict=False) if option.lower() in text.lower()]
    return named[0] if len(named) == 1 else UNREAD


def score_rows(examples: Sequence[Example[Reference]], texts: Mapping[str, str | None]) -> Scored:
    """CircularEval and first-row accuracy, and CircularEval for each category."""
    verdicts, unread = {}, 0
    groups: dict[int, list[tuple[int, bool]]] = defaultdict(list)
    categories: dict[str, set[int]] = defaultdict(set)
    for example in examples:
        reference, text = example.reference, texts[example.id]
        letter = "" if text is None else parse(text, reference.options)
        unread += letter == UNREAD
        right = letter == reference.answer
        verdicts[example.id] = Verdict("" if letter == UNREAD else letter, float(right))
        groups[reference.group].append((int(example.id), right))
        for name in {reference.category, reference.broad_category} - {""}:
            categories[name].add(reference.group)
    all_right = {group: all(right for _, right in rows) for group, rows in groups.items()}
    first_right = {group: min(rows)[1] for group, rows in groups.items()}
    metrics: dict[str, float | None] = {
        "circular": _mean(list(all_right.values())),
        "vanilla": _mean(list(first_right.values())),
    }
    metrics |= {name: _mean([all_right[group] for group in found]) for name, found in sorted(categories.items())}
    notes = (
        f"{len(groups)} questions in {len(examples)} rows",
        f"{unread / max(len(examples), 1):.2%} of rows not read",
    )
    return Scored(metrics, unread, verdicts, notes)


def _mean(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def _example(row: Row, columns: tuple[str, ...], suffix: str) -> Example[Reference]:
    index, answer = row.text("index"), row.text("answer").strip()
    if not index.isdecimal():
        raise row.error(f"index '{index}' is no whole number")
    options: list[str] = []
    for letter in LETTERS:
        cell = row.values.get(letter, "")
        if is_missing(cell):
            break
        options.append(cell)
    if len(answer) != 1 or answer not in LETTERS[: len(options)]:
        raise row.error(f"answer '{answer}' is no letter of its {len(options)} options: take the dev split")
    hint = row.values.get("hint", "")
    lines = [] if is_missing(hint) else [hint]
    lines += [row.text("question"), *(f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False))]
    question = "\n".join(lines)  # what LLaVA's answer files record as the prompt
    return Example(
        id=index,
        prompt=question + suffix,
        reference=Reference(
            answer,
            tuple(options),
            int(index) % ROTATION,
            row.values.get("category", ""),
            row.values.get("l2-category", ""),
        ),
        image=index,
        source=EmbeddedImage(row.path, row.offset, "image", columns),
        aliases=(index,),
        question=question,
        question_id=int(index),
    )
