"""Object HalBench: objects that a description mentions and the image does not show (CHAIR, as RLAIF-V runs it).

Files: `object_halbench/obj_halbench_300_with_image.jsonl` {image (base64), image_id, question}, `synonyms_refine.txt`,
and COCO 2014's annotations `object_halbench/annotations/captions_*.json` and `instances_*.json`.

Variant `chair_string`: objects are found by string matching (`scorers/chair.py`), deterministic and without a network;
an object mentioned twice counts twice. It is the official script without `--use_gpt`. The published figures come from
the variant that lets a language model extract the objects first (`chair_llm:MODEL`, see `eval/judged.py`), which counts
each object once: figures of different variants are never to be compared.

True objects of an image: the classes of its instances, and the objects that its captions mention.
`response_hall`: descriptions with an object that is not there / descriptions that mention any object ("CHAIRs_refine").
`object_hall`: mentions of objects that are not there / mentions of objects ("CHAIRi"). `response_hall_all` has all
descriptions below the line ("CHAIRs"); papers mix the two up. `object_recall`: true classes mentioned / true classes.
All are fractions; lower is better for the first three. A missing description counts as one false mention.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.example import Example, Scored, Verdict, first_line_key
from eval.files import EmbeddedImage, Row, as_row, find_file, read_jsonl, read_object
from eval.scorers.chair import Mention, ObjectVocabulary
from llavamod_offline.errors import EvalError

NAME = "object_halbench"
HEADLINE = "response_hall"
OFFICIAL_N: tuple[int, ...] = (300,)
MAX_NEW_TOKENS = 1024
PROTOCOL = (
    "prompt: {question} | variant: chair_string (treebank words, noun lemmas, synonym list; repeated mentions count); "
    "response_hall: over descriptions with an object; object_hall: over mentions"
)
_FOLDER = "object_halbench"


@dataclass(frozen=True)
class Reference:
    """The objects in an image, and the vocabulary that finds the objects in a description."""

    objects: frozenset[str]
    vocabulary: ObjectVocabulary


def load(root: Path) -> list[Example[Reference]]:
    """Read questions, and the true objects of their images from COCO's annotations.

    Errors: `EvalError` for an image without annotations, or a category that the synonym list lacks.
    """
    vocabulary = ObjectVocabulary.read(find_file(root, f"{_FOLDER}/synonyms_refine.txt"))
    file = _question_file(root)
    rows = read_jsonl(file, drop=("image",))
    images = {row.identifier("image_id") for row in rows}
    objects = _true_objects(root, vocabulary, images)
    examples = []
    for index, row in enumerate(rows):
        identifier = row.identifier("image_id")
        if identifier not in objects:
            raise row.error(f"image {identifier} is in no annotation file below {root / _FOLDER / 'annotations'}")
        examples.append(
            Example(
                id=identifier,
                prompt=row.text("question"),
                reference=Reference(frozenset(objects[identifier]), vocabulary),
                image=identifier,
                source=EmbeddedImage(file, row.offset, "image"),
                # RLAIF-V's answer files count the questions from 0
                aliases=(identifier,) if str(index) in images else (identifier, str(index)),
                question_id=index,
            )
        )
    return examples


def reference_files(root: Path) -> list[Path]:
    """The question file, the synonym list and the annotations."""
    synonyms = find_file(root, f"{_FOLDER}/synonyms_refine.txt")
    return [_question_file(root), synonyms, *_annotations(root, "captions"), *_annotations(root, "instances")]


question_key = first_line_key


def score(examples: Sequence[Example[Reference]], texts: Mapping[str, str | None]) -> Scored:
    """Hallucination rates of descriptions, by string matching."""
    mentions = {}
    for example in examples:
        text = texts[example.id]
        mentions[example.id] = None if text is None else example.reference.vocabulary.mentions(text)
    return rates(examples, texts, mentions)


def rates(
    examples: Sequence[Example[Reference]],
    texts: Mapping[str, str | None],
    mentions: Mapping[str, list[Mention] | None],
) -> Scored:
    """Hallucination rates from the objects found in each description; None is a missing description."""
    verdicts = {}
    mentioned = false = with_objects = with_false = recalled = true = words = 0
    for example in examples:
        found, objects = mentions[example.id], example.reference.objects
        true += len(objects)
        names = [None] if found is None else [mention.name for mention in found]
        wrong = [name for name in names if name not in objects]
        mentioned += len(names)
        false += len(wrong)
        with_objects += bool(names)
        with_false += bool(wrong)
        recalled += len(objects.intersection(name for name in names if name))
        words += len((texts[example.id] or "").strip().split(" "))
        shown = ", ".join(f"{name}!" if name in wrong else str(name) for name in names if name)
        verdicts[example.id] = Verdict(shown, float(not wrong))
    count = len(examples)
    metrics = {
        "response_hall": _ratio(with_false, with_objects),
        "object_hall": _ratio(false, mentioned),
        "response_hall_all": _ratio(with_false, count),
        "object_recall": _ratio(recalled, true),
        "mean_words": _ratio(words, count),
    }
    silent = count - with_objects
    return Scored(metrics, 0, verdicts, (f"{silent} descriptions mention no object of the list",) if silent else ())


def _ratio(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _true_objects(root: Path, vocabulary: ObjectVocabulary, images: set[str]) -> dict[str, set[str]]:
    objects: dict[str, set[str]] = defaultdict(set)
    for file in _annotations(root, "instances"):
        names = {row.whole("id"): row.text("name") for row in _items(file, "categories")}
        for annotation in _items(file, "annotations"):
            image = annotation.identifier("image_id")
            if image in images:
                name = names.get(annotation.whole("category_id"), "")
                if name not in vocabulary.synonyms:
                    raise annotation.error(f"category '{name}' is not in synonyms_refine.txt: add it there")
                objects[image].add(vocabulary.synonyms[name])
    for file in _annotations(root, "captions"):
        for annotation in _items(file, "annotations"):
            image = annotation.identifier("image_id")
            if image in images:
                objects[image].update(mention.name for mention in vocabulary.mentions(annotation.text("caption")))
    return objects


def _items(file: Path, name: str) -> Iterator[Row]:
    items = read_object(file).get(name)
    if not isinstance(items, list):
        raise EvalError(f"{file}: no list '{name}': take COCO's annotation files")
    for number, item in enumerate(items):
        yield as_row(file, f"{name}[{number}]", item)


def _annotations(root: Path, kind: str) -> list[Path]:
    folder = root / _FOLDER / "annotations"
    files = sorted(folder.glob(f"{kind}_*.json"))
    if not files:
        raise EvalError(f"{folder}: no {kind}_*.json: put COCO's annotations there (captions_val2014.json, …)")
    return files


def _question_file(root: Path) -> Path:
    return find_file(root, f"{_FOLDER}/obj_halbench_300_with_image.jsonl")
