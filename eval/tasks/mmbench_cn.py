"""MMBench, Chinese: `mmbench_cn/mmbench_dev_cn_20231003.tsv`, or in `mmbench/`; see `eval/scorers/mmbench.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.example import Example, Scored, first_line_key
from eval.files import find_file
from eval.scorers.mmbench import Reference, load_tsv, score_rows

NAME = "mmbench_cn"
HEADLINE = "circular"
OFFICIAL_N: tuple[int, ...] = (4329,)
MAX_NEW_TOKENS = 1024
PROTOCOL = (
    r"prompt: [{hint}\n]{question}\nA. …\nB. …\n请直接回答选项字母。 "
    "| answer: a letter, a leading letter, one letter standing alone, or one option's text, no language model; "
    "circular: right in every rotation"
)
_FILES = ("mmbench_cn/mmbench_dev_cn_20231003.tsv", "mmbench/mmbench_dev_cn_20231003.tsv")


def load(root: Path) -> list[Example[Reference]]:
    """Read every row of the TSV as an example."""
    return load_tsv(find_file(root, *_FILES), "\n请直接回答选项字母。")


def reference_files(root: Path) -> list[Path]:
    """The TSV."""
    return [find_file(root, *_FILES)]


question_key = first_line_key


def score(examples: Sequence[Example[Reference]], texts: Mapping[str, str | None]) -> Scored:
    """CircularEval and first-row accuracy."""
    return score_rows(examples, texts)
