"""Object HalBench: objects that a description mentions and the image does not show (CHAIR, as RLAIF-V runs it).

Files: `object_halbench/obj_halbench_300_with_image.jsonl` {image (base64), image_id, question}, `synonyms_refine.txt`,
and COCO 2014's annotations `object_halbench/annotations/captions_*.json` and `instances_*.json`.

Variant `chair_string` finds objects by string matching (`scorers/chair.py`): deterministic, no network; an object
mentioned twice counts twice. It is the official script without `--use_gpt`.
Variant `chair_llm:MODEL` (`--use_gpt`), used for the published figures: a judge lists the objects that a
description states as visible, as a JSON list, and each object counts once. Answers of at most three words mention no
object. The original takes noun spans from spaCy; here an object's whole name, or else its last word, is looked up.
Replies without a JSON list are unparsed, and their descriptions count as one false mention; if more than 2 % are, all
metrics are withheld. Figures of the two variants are not comparable.

True objects of an image: the classes of its instances, and the objects that its captions mention.
`response_hall`: descriptions with a hallucinated object / descriptions that mention any object ("CHAIRs_refine").
`object_hall`: mentions of hallucinated objects / mentions of objects ("CHAIRi"). `response_hall_all` divides by all
descriptions ("CHAIRs"); papers confuse the two. `object_recall`: true classes mentioned / true classes.
All are fractions; lower is better for the first three. A missing description counts as one false mention.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from eval.example import Example, Scored, Verdict
from eval.files import EmbeddedImage, Row, as_row, find_file, read_jsonl, read_object
from eval.judge_template import JudgeTemplate
from eval.scorers.chair import Mention, ObjectVocabulary, parse_objects
from eval.task import Headline, Judging, Task, withhold_unreadable
from llavamod_offline.errors import EvalError

_FOLDER = "object_halbench"
_OTHER_VARIANT = "published with objects found by GPT-3.5 (how they were found here: see the protocols)"
_SHORT_ANSWER_WORDS = 3
DEFAULT_TEMPLATE = JudgeTemplate(
    "object-halbench-default-1",
    """Below is a request about an image and the answer to it. List every physical object that the answer says can be
seen in the image.

Request: {question}
Answer: {answer}

Take only objects that the answer itself names, one entry for each kind, in the singular, without colour, material, size
or number. Leave out what the answer denies, supposes, or names only in general. Reply with a JSON list of strings and
nothing else, for example ["cat", "dining table"]; reply [] if there is none.
""",
    ("question", "answer"),
)


@dataclass(frozen=True)
class HalbenchReference:
    """The objects in an image, and the vocabulary that finds the objects in a description."""

    objects: frozenset[str]
    vocabulary: ObjectVocabulary


def load(root: Path) -> list[Example[HalbenchReference]]:
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
            raise row.error(f"image {identifier} is not annotated in {root / _FOLDER / 'annotations'}")
        examples.append(
            Example(
                id=identifier,
                prompt=row.text("question"),
                reference=HalbenchReference(frozenset(objects[identifier]), vocabulary),
                image=identifier,
                source=EmbeddedImage(file, row.offset, "image"),
                # RLAIF-V's answer files number the questions from 0
                aliases=(identifier,) if str(index) in images else (identifier, str(index)),
                question_id=index,
            )
        )
    return examples


def reference_files(root: Path) -> list[Path]:
    """The question file, the synonym list and the annotations."""
    synonyms = find_file(root, f"{_FOLDER}/synonyms_refine.txt")
    return [_question_file(root), synonyms, *_annotations(root, "captions"), *_annotations(root, "instances")]


def score(examples: Sequence[Example[HalbenchReference]], texts: Mapping[str, str | None]) -> Scored:
    """Hallucination rates of descriptions, by string matching."""
    mentions = {}
    for example in examples:
        text = texts[example.id]
        mentions[example.id] = None if text is None else example.reference.vocabulary.mentions(text)
    return rates(examples, texts, mentions)


def judge_slots(example: Example[HalbenchReference], text: str) -> dict[str, str] | None:
    """The values of the judge's template; None for a short answer."""
    return {"question": example.prompt, "answer": text} if len(text.split()) > _SHORT_ANSWER_WORDS else None


def score_judged(
    examples: Sequence[Example[HalbenchReference]], texts: Mapping[str, str | None], replies: Mapping[str, str]
) -> Scored:
    """Hallucination rates from the judge's lists of objects by example id; answers without a reply are short."""
    mentions: dict[str, list[Mention] | None] = {}
    unparsed = 0
    for example in examples:
        objects = parse_objects(replies.get(example.id, "[]"))
        unparsed += objects is None
        known = objects is not None and texts[example.id] is not None
        mentions[example.id] = example.reference.vocabulary.named(objects or []) if known else None
    return withhold_unreadable(replace(rates(examples, texts, mentions), n_unparsed=unparsed), len(examples))


def rates(
    examples: Sequence[Example[HalbenchReference]],
    texts: Mapping[str, str | None],
    mentions: Mapping[str, list[Mention] | None],
) -> Scored:
    """Hallucination rates from the objects found in each description; None counts as one false mention."""
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
    return Scored(metrics, 0, verdicts, (f"{silent} descriptions mention no object in the list",) if silent else ())


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
        raise EvalError(f"{file}: no list '{name}': use COCO's annotation files")
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


TASK = Task(
    name="object_halbench",
    headlines=(
        Headline(
            "object_halbench",
            "response_hall",
            "Object HalBench response",
            lower_is_better=True,
            published={"LLaVA-MoD-2B": 0.112},
            not_comparable=_OTHER_VARIANT,
        ),
        Headline(
            "object_halbench",
            "object_hall",
            "Object HalBench object",
            lower_is_better=True,
            published={"LLaVA-MoD-2B": 0.059},
            not_comparable=_OTHER_VARIANT,
        ),
    ),
    official_n=(300,),
    max_new_tokens=1024,
    protocol=(
        "prompt: {question} | variant: chair_string (treebank words, noun lemmas, synonym list; repeated mentions "
        "count); response_hall: over descriptions with an object; object_hall: over mentions"
    ),
    load=load,
    reference_files=reference_files,
    score=score,
    reference=lambda example: ", ".join(sorted(example.reference.objects)),
    judging=Judging(DEFAULT_TEMPLATE, judge_slots, score_judged, "prompt: {question} | variant: chair_llm:JUDGE"),
)
