"""MMBench, English and Chinese: questions from its TSV, answer letters, CircularEval (arXiv 2307.06281).

Files: `mmbench/mmbench_dev_en_20231003.tsv` or `mmbench/mmbench_dev_20230712.tsv`; Chinese:
`mmbench_dev_cn_20231003.tsv` in `mmbench_cn/` or `mmbench/`.

The published TSV contains every question several times with rotated options; the copies of question i have the indices
i, 1000000 + i, 2000000 + i, … So each row is asked once, without rotating (LLaVA's `--all-rounds` stays off).

`circular`, the published figure: share of questions answered correctly in *every* rotation. `vanilla`: share of
questions answered correctly in their first row.

Parsing, without a language model: (1) the answer is a letter; (2) it begins with a letter, perhaps in parentheses, and
one of ").:,"; (3) it contains exactly one letter standing alone, where an "A" among more than three words is read as
the article; (4) it contains exactly one option's text; else it is unparsed, hence wrong. The official server has GPT-4
read what (1) to (3) cannot, so quote the unparsed share with every figure, especially in Chinese.

Upload: the TSV as .xlsx without images and categories, with a column `prediction`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.example import Example, Scored, Verdict
from eval.export.xlsx import spreadsheet
from eval.files import EmbeddedImage, Row, find_file, read_table
from eval.task import Headline, Task, Upload
from llavamod_offline.errors import EvalError

LETTERS = "ABCD"
ROTATION = 1_000_000
UNREAD = "Z"
_DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")  # columns that the upload lacks
_PREDICTION = 6  # where the official converter inserts the column
# Cells that pandas, with which LLaVA reads the file, treats as missing.
_MISSING = {
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"),
    *("NULL", "NaN", "None", "n/a", "nan", "null"),
}
_LEADING = re.compile(r"\(?([A-D])[).:,]")
_ALONE = re.compile(r"(?<![A-Za-z0-9])[A-D](?![A-Za-z0-9])")


@dataclass(frozen=True)
class MmbenchReference:
    """The right letter, the options, the index of the unrotated question, and its categories."""

    answer: str
    options: tuple[str, ...]
    group: int
    category: str
    broad_category: str


def load_tsv(path: Path, suffix: str) -> list[Example[MmbenchReference]]:
    """Read every row of a TSV as an example. Errors: `EvalError` naming the row for a missing or invalid field."""
    columns, rows = read_table(path, drop=("image",))
    for column in ("index", "question", "A", "B", "answer"):  # scoring needs no images
        if column not in columns:
            raise EvalError(f"{path}: no column '{column}': use the TSV of MMBench's dev split, which has answers")
    return [_example(row, columns, suffix) for row in rows]


def is_missing(cell: str) -> bool:
    """Whether a cell counts as empty to pandas and LLaVA's `is_none`."""
    return cell in _MISSING or cell.lower() in ("nan", "none")


def parse(text: str, options: Sequence[str]) -> str:
    """Read an answer as a letter, or as "Z" if it cannot be read."""
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


def score(examples: Sequence[Example[MmbenchReference]], texts: Mapping[str, str | None]) -> Scored:
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


def _worded(example: Example[MmbenchReference]) -> str:
    reference = example.reference
    return f"{reference.answer}. {reference.options[LETTERS.index(reference.answer)]}"


def _mean(values: Sequence[bool]) -> float | None:
    return sum(values) / len(values) if values else None


def _example(row: Row, columns: tuple[str, ...], suffix: str) -> Example[MmbenchReference]:
    index, answer = row.text("index"), row.text("answer").strip()
    if not index.isdecimal():
        raise row.error(f"index '{index}' is not a whole number")
    options: list[str] = []
    for letter in LETTERS:
        cell = row.values.get(letter, "")
        if is_missing(cell):
            break
        options.append(cell)
    if len(answer) != 1 or answer not in LETTERS[: len(options)]:
        raise row.error(f"answer '{answer}' is not the letter of one of its {len(options)} options: use the dev split")
    hint = row.values.get("hint", "")
    lines = [] if is_missing(hint) else [hint]
    lines += [row.text("question"), *(f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False))]
    question = "\n".join(lines)  # LLaVA's answer files record this as the prompt
    return Example(
        id=index,
        prompt=question + suffix,
        reference=MmbenchReference(
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


def _upload(examples: Sequence[Example[MmbenchReference]], texts: Mapping[str, str]) -> bytes:
    source = examples[0].source
    assert isinstance(source, EmbeddedImage)
    columns, rows = read_table(source.path, drop=_DROPPED)
    kept = [column for column in columns if column not in _DROPPED]
    table: list[list[str | int | None]] = [[*kept[:_PREDICTION], "prediction", *kept[_PREDICTION:]]]
    for row in rows:
        cells: list[str | int | None] = [row.text(column) or None for column in kept]
        cells[kept.index("index")] = int(row.text("index"))
        table.append([*cells[:_PREDICTION], texts[row.text("index")], *cells[_PREDICTION:]])
    return spreadsheet(table)


def _task(
    name: str, title: str, n: tuple[int, ...], request: str, files: Sequence[str], published: Mapping[str, float]
) -> Task:
    return Task(
        name=name,
        headlines=(Headline(name, "circular", title, published=published),),
        official_n=n,
        max_new_tokens=1024,
        protocol=(
            rf"prompt: [{{hint}}\n]{{question}}\nA. …\nB. …\n{request} "
            "| answer: a letter, a leading letter, one letter standing alone, or one option's text, no language model; "
            "circular: right in every rotation"
        ),
        load=lambda root: load_tsv(find_file(root, *files), f"\n{request}"),
        reference_files=lambda root: [find_file(root, *files)],
        score=score,
        reference=_worded,
        llava_prompt=lambda example: example.question,
        upload=Upload(".xlsx", _upload, package="xlsxwriter"),
        group=lambda example: example.reference.group,
    )


ENGLISH = _task(
    "mmbench",
    "MMBench",
    (4329, 4377),  # of 20231003, of 20230712
    "Answer with the option's letter from the given choices directly.",
    ("mmbench/mmbench_dev_en_20231003.tsv", "mmbench/mmbench_dev_20230712.tsv"),
    {"LLaVA-MoD-2B": 0.689, "LLaVA-MoD-1.8B": 0.663, "LLaVA-MoD-0.5B": 0.588, "LLaVA-1.5-13B": 0.677},
)
CHINESE = _task(
    "mmbench_cn",
    "MMBench-CN",
    (4329,),
    "请直接回答选项字母。",
    ("mmbench_cn/mmbench_dev_cn_20231003.tsv", "mmbench/mmbench_dev_cn_20231003.tsv"),
    {"LLaVA-MoD-1.8B": 0.619},
)
