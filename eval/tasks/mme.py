"""MME: two yes/no questions per image, fourteen categories (arXiv 2306.13394).

Files: `MME/llava_mme.jsonl` {question_id "category/file", image, text, category}; both questions of an image share a
`question_id`. References, whichever exists: the release, `MME/MME_Benchmark_release_version/CATEGORY/` with
`questions_answers_YN/*.txt` or `*.txt` (`question<TAB>Yes|No`), or the official tool's templates
`MME/eval_tool/Your_Results/CATEGORY.txt` (`file<TAB>question<TAB>Yes|No<TAB>`). Images are in the release's folders.

Questions and references are joined on (category, file name up to its first ".", question); the question is compared
without "Please answer yes or no." and LLaVA's suffix, with single spaces (one category has two before "Please").

Parsing (calculation.py of the official tool): strip spaces, as LLaVA's runners do, and lower-case; "yes" if the first
four characters contain "yes", else "no" if they contain "no" (so "not", "now" and "none" count), else wrong. Tabs and
line breaks in an answer, which break the official tool's files, are harmless here.

Category score: accuracy × 100 + share of images with both questions right × 100, at most 200. Perception is the sum
over ten categories, cognition over four; most published "MME" figures are perception alone.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.example import SHORT_ANSWER, Example, Scored, Verdict
from eval.files import FileImage, find_file, read_jsonl
from eval.task import Headline, Task
from llavamod_offline.errors import EvalError
from llavamod_offline.plural import counted

PERCEPTION = (
    *("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"),
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
_RELEASES = ("MME/MME_Benchmark_release_version", "MME/MME_Benchmark_release_version/MME_Benchmark")
_TEMPLATES = "MME/eval_tool/Your_Results"
_YES_NO = "Please answer yes or no."


@dataclass(frozen=True)
class MmeReference:
    """The right answer, and the image, which two questions share."""

    category: str
    image: str
    yes: bool


def load(root: Path) -> list[Example[MmeReference]]:
    """Read questions and references. Errors: `EvalError` for a question without one, or an image without two."""
    answers: dict[str, dict[tuple[str, str], bool]] = {}
    examples, seen = [], Counter[str]()
    for row in read_jsonl(_question_file(root)):
        identifier, prompt, file = row.identifier("question_id"), row.text("text"), row.text("image")
        category = identifier.split("/")[0]
        image, question = _stem(identifier), question_key(prompt)
        if category not in answers:
            answers[category] = dict(_answers(root, category))
        if (image, question) not in answers[category]:
            raise row.error(f"no answer to '{question}' about {identifier} among the references of '{category}'")
        seen[identifier] += 1
        reference = MmeReference(category, image, answers[category][image, question])
        source = FileImage(root, _image_names(category, file))
        name = f"{identifier}#{seen[identifier]}"
        examples.append(Example(name, prompt, reference, file, source, (identifier,), question, identifier))
    for (category, image), count in Counter((e.reference.category, e.reference.image) for e in examples).items():
        if count != 2:
            found = counted(count, "question")
            raise EvalError(f"{_question_file(root)}: image '{category}/{image}' has {found}, expected 2")
    return examples


def reference_files(root: Path) -> list[Path]:
    """The question file and the reference files of its categories."""
    categories = sorted({row.identifier("question_id").split("/")[0] for row in read_jsonl(_question_file(root))})
    return [_question_file(root), *(file for name in categories for file in _answer_files(root, name))]


def question_key(prompt: str) -> str:
    """The question with single spaces, without the two sentences that ask for a short answer."""
    text = prompt.removeprefix("<image>\n").replace(SHORT_ANSWER.strip(), " ").replace(_YES_NO, " ")
    return " ".join(text.split())


def parse(text: str) -> str:
    """Read an answer as "yes", "no" or "other"."""
    start = text.strip().lower()[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def score(examples: Sequence[Example[MmeReference]], texts: Mapping[str, str | None]) -> Scored:
    """Category scores, their sums, and the overall share of right answers."""
    images: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    verdicts, unparsed = {}, 0
    for example in examples:
        reference, text = example.reference, texts[example.id]
        read_as = "" if text is None else parse(text)
        right = read_as == ("yes" if reference.yes else "no")
        unparsed += read_as == "other"
        images[reference.category][reference.image].append(right)
        verdicts[example.id] = Verdict(read_as, float(right))
    categories: dict[str, float] = {}
    for category, answered in images.items():
        answers = [right for pair in answered.values() for right in pair]
        both = [all(pair) for pair in answered.values()]
        categories[category] = 100 * sum(answers) / len(answers) + 100 * sum(both) / len(both)
    metrics: dict[str, float | None] = {
        "perception": _sum(categories, PERCEPTION),
        "cognition": _sum(categories, COGNITION),
        "accuracy": sum(v.right for v in verdicts.values()) / len(verdicts) if verdicts else None,
    }
    known = [name for name in (*PERCEPTION, *COGNITION) if name in categories]
    others = sorted(set(categories) - set(known))
    metrics |= {name: categories[name] for name in (*known, *others)}
    notes = []
    if len(known) < len(PERCEPTION) + len(COGNITION):
        notes.append(f"{len(known)} of the 14 published categories, which are all that the sums cover")
    if others:
        notes.append(f"in no sum: {', '.join(others)}")
    return Scored(metrics, unparsed, verdicts, tuple(notes))


def _sum(categories: Mapping[str, float], names: Sequence[str]) -> float | None:
    found = [categories[name] for name in names if name in categories]
    return sum(found) if found else None


def _answers(root: Path, category: str) -> Iterator[tuple[tuple[str, str], bool]]:
    """Yield ((image, question), yes) from the release's files or the tool's templates."""
    for file in _answer_files(root, category):
        template = file.parent.name == "Your_Results"
        try:
            lines = file.read_bytes().decode("utf-8-sig").split("\n")  # splitlines() splits at more characters
        except (OSError, UnicodeDecodeError) as error:
            raise EvalError(f"{file}: cannot be read: {error}") from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            fields = line.rstrip("\t ").split("\t")
            image = _stem(fields.pop(0)) if template else _stem(file.name)
            fields = fields[:2] if template else fields  # filled-in templates have a third field, the answer
            if len(fields) != 2 or fields[1].strip().lower() not in ("yes", "no"):
                raise EvalError(f"{file}: line {number}: expected a question, a tab, and Yes or No")
            yield (image, question_key(fields[0])), fields[1].strip().lower() == "yes"


def _answer_files(root: Path, category: str) -> list[Path]:
    for release in _RELEASES:
        for folder in (root / release / category / "questions_answers_YN", root / release / category):
            names = sorted(name for name in os.listdir(folder) if name.endswith(".txt")) if folder.is_dir() else []
            if names:
                return [folder / name for name in names]
    return [find_file(root, f"{_TEMPLATES}/{category}.txt")]


def _image_names(category: str, file: str) -> tuple[str, ...]:
    """Where an image may be: at the question file's path, or in the category's `images` folder."""
    within = (file, f"{category}/images/{file.split('/')[-1]}")
    return tuple(f"{release}/{place}" for release in _RELEASES for place in within)


def _stem(name: str) -> str:
    return name.split("/")[-1].split(".")[0]


def _question_file(root: Path) -> Path:
    return find_file(root, "MME/llava_mme.jsonl")


TASK = Task(
    name="mme",
    headlines=(
        Headline(
            "mme",
            "perception",
            "MME perception",
            2000.0,
            percent=False,
            published={  # the first three are printed divided by 20
                "LLaVA-MoD-2B": 20 * 69.2,
                "LLaVA-MoD-1.8B": 20 * 66.7,
                "LLaVA-MoD-0.5B": 20 * 65.3,
                "LLaVA-1.5-13B": 1531.3,
            },
        ),
    ),
    official_n=(2374,),
    max_new_tokens=128,
    protocol=(
        r"prompt: {question without 'Please answer yes or no.'}\nAnswer the question using a single word or phrase. "
        "| answer: yes or no within the first 4 characters, else wrong; category = accuracy×100 + both-right×100; "
        "perception: sum over 10 categories; cognition: sum over 4"
    ),
    load=load,
    reference_files=reference_files,
    score=score,
    reference=lambda example: "yes" if example.reference.yes else "no",
    question_key=question_key,
    group=lambda example: (example.reference.category, example.reference.image),
)
