"""ScienceQA, test split: multiple-choice questions from school science, half of them with an image (arXiv 2209.09513).

Files: `scienceqa/llava_test_CQM-A.json` [{id, image?, conversations}], `scienceqa/problems.json` {id: {choices,
answer}}, `scienceqa/pid_splits.json` {"test": [id]}; images `scienceqa/images/test/`.

Parsing (llava/eval/eval_science_qa.py): the whole answer is a letter A to E; else it begins with a letter and ". ";
else "The answer is X" followed by one more character occurs exactly once; else it is unparsed, hence wrong, as is a
letter beyond the choices. `img_accuracy`, the published figure, is over questions with an image according to the
question file (the official script looks at the answer's prompt, so missing answers change the denominator).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.example import Example, Scored, Verdict
from eval.files import FileImage, Row, as_row, find_file, read_object, read_rows
from eval.task import Headline, Task
from llavamod_offline.errors import EvalError
from llavamod_offline.plural import counted

SUFFIX = "\nAnswer with the option's letter from the given choices directly."
_LETTERS = "ABCDE"
_SENTENCE = re.compile(r"The answer is ([A-Z]).")


@dataclass(frozen=True)
class ScienceQaReference:
    """The right choice's index, how many there are, and whether the question has an image."""

    answer: int
    choices: int
    has_image: bool


def load(root: Path) -> list[Example[ScienceQaReference]]:
    """Read the test split. Errors: `EvalError` if the three files do not have the same questions."""
    file = find_file(root, "scienceqa/problems.json")
    problems, split = read_object(file), _test_split(root)
    examples = []
    for row in read_rows(_question_file(root)):
        identifier = row.identifier("id")
        if identifier not in split or identifier not in problems:
            raise row.error(f"question '{identifier}' is not in the test split of {file.parent}")
        examples.append(_example(root, row, as_row(file, f"problem '{identifier}'", problems[identifier])))
    absent = sorted(split - {example.id for example in examples})
    if absent:
        lost = counted(len(absent), "question")
        raise EvalError(f"{_question_file(root)}: lacks {lost} of the test split, first '{absent[0]}'")
    return examples


def reference_files(root: Path) -> list[Path]:
    """The question file, the problems and the split."""
    names = ("scienceqa/problems.json", "scienceqa/pid_splits.json")
    return [_question_file(root), *(find_file(root, name) for name in names)]


def parse(text: str) -> str | None:
    """Read an answer as a letter; None if it cannot be read."""
    if len(text) == 1 and text in _LETTERS:
        return text
    if len(text) >= 3 and text[0] in _LETTERS and text[1:3] == ". ":
        return text[0]
    found = _SENTENCE.findall(text)
    return str(found[0]) if len(found) == 1 else None


def score(examples: Sequence[Example[ScienceQaReference]], texts: Mapping[str, str | None]) -> Scored:
    """Accuracy over questions with an image, without one, and all."""
    verdicts, unparsed = {}, 0
    groups: dict[str, list[float]] = {"img_accuracy": [], "accuracy": [], "text_accuracy": []}
    for example in examples:
        reference, text = example.reference, texts[example.id]
        letter = None if text is None else parse(text)
        unparsed += text is not None and letter is None
        right = float(letter is not None and letter in _LETTERS[: reference.choices] and _index(letter, reference))
        verdicts[example.id] = Verdict(letter or "", right)
        groups["accuracy"].append(right)
        groups["img_accuracy" if reference.has_image else "text_accuracy"].append(right)
    metrics = {name: sum(values) / len(values) if values else None for name, values in groups.items()}
    return Scored(metrics, unparsed, verdicts, (f"{counted(len(groups['img_accuracy']), 'question')} with an image",))


def _index(letter: str, reference: ScienceQaReference) -> bool:
    return _LETTERS.index(letter) == reference.answer


def _example(root: Path, row: Row, problem: Row) -> Example[ScienceQaReference]:
    identifier, image = row.identifier("id"), row.values.get("image")
    conversations: Any = row.values.get("conversations")
    if not isinstance(conversations, list) or not conversations:
        raise row.error("field 'conversations' must be a list of messages")
    value = as_row(row.path, row.place, conversations[0]).text("value")
    choices = problem.texts("choices")
    return Example(
        id=identifier,
        prompt=value.replace("<image>", "").strip() + SUFFIX,
        reference=ScienceQaReference(problem.whole("answer"), len(choices), image is not None),
        image=row.text("image") if image is not None else "",
        source=FileImage(root / "scienceqa" / "images" / "test", (str(image),)) if image is not None else None,
        aliases=(identifier,),
        question_id=row.values["id"],
    )


def _llava_prompt(example: Example[ScienceQaReference]) -> str:
    """The prompt as LLaVA records it; its scoring script recognises questions with an image by `<image>`."""
    return f"<image>\n{example.prompt}" if example.source is not None else example.prompt


def _test_split(root: Path) -> set[str]:
    file = find_file(root, "scienceqa/pid_splits.json")
    return set(Row(file, "top level", read_object(file)).texts("test"))


def _question_file(root: Path) -> Path:
    return find_file(root, "scienceqa/llava_test_CQM-A.json")


TASK = Task(
    name="scienceqa",
    headlines=(
        Headline(
            "scienceqa",
            "img_accuracy",
            "ScienceQA-IMG",
            published={"LLaVA-MoD-1.8B": 0.680, "LLaVA-MoD-0.5B": 0.628, "LLaVA-1.5-13B": 0.716},
        ),
    ),
    official_n=(4241,),
    max_new_tokens=1024,
    protocol=(
        r"prompt: [Context: …\n]{question}\nA. …\nB. …\nAnswer with the option's letter from the given choices "
        "directly. | answer: a letter, 'X. …', or 'The answer is X' once; img_accuracy: over questions with an image"
    ),
    load=load,
    reference_files=reference_files,
    score=score,
    reference=lambda example: _LETTERS[example.reference.answer],
    llava_prompt=_llava_prompt,
)
