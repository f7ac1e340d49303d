"""MMBench, English: `mmbench/mmbench_dev_en_20231003.tsv` or `mmbench_dev_20230712.tsv`; `scorers/mmbench.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from eval.example import Example, Scored, first_line_key
from eval.files import find_file
from eval.scorers.mmbench import Reference, load_tsv, score_rows

NAME = "mmbench"
HEADLINE = "circular"
OFFICIAL_N: tuple[int, ...] = (4329, 4377)  # of 20231003, of 20230712
MAX_NEW_TOKENS = 1024
PROTOCOL = (
    r"prompt: [{hint}\n]{question}\nA. …\nB. …\nAnswer with the option's letter from the given choices directly. "
    "| answer: a letter, a leading letter, one letter standing alone, or one option's text, no language model; "
    "circular: right in every rotation"
)
_FILES = ("mmbench/mmbench_dev_en_20231003.tsv", "mmbench/mmbench_dev_20230712.tsv")


def load(root: Path) -> list[Example[Reference]]:
    """Read every row of the TSV as an example."""
    return load_tsv(find_file(root, *_FILES), "\nAnswer with the option's letter from the given choices directly.")


def reference_files(root: Path) -> list[Path]:
    """The TSV."""
    return [find_file(root, *_FILES)]


question_key = first_line_key


def score(examples: Sequence[Example[Reference]], texts: Mapping[str, str | None]) -> Scored:
    """CircularEval and first-row accuracy."""
    return score_rows(examples, texts)
