"""Finding objects in captions. Source: RLAIF-V's eval/eval_gpt_obj_halbench.py without --use_gpt; NLTK; WordNet 3.0."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.scorers.chair import ObjectVocabulary, treebank_words
from llavamod_offline.errors import EvalError

SYNONYMS = """person, girl, man, people, woman, child
dog, puppy
cat
bird, goose
bear
teddy bear, teddybear
train, locomotive
bus
airplane, plane, jet
tie, bow, bow tie
chair, seat
toilet
wine glass
knife
cell phone, phone, smartphone, iPhone
dining table, table, desk
vase
hot dog
stove top oven, oven
"""


@pytest.fixture
def vocabulary(tmp_path: Path) -> ObjectVocabulary:
    path = tmp_path / "synonyms.txt"
    path.write_text(SYNONYMS)
    return ObjectVocabulary.read(path)


def names(vocabulary: ObjectVocabulary, caption: str) -> list[str]:
    return [mention.name for mention in vocabulary.mentions(caption)]


@pytest.mark.parametrize(
    ("caption", "objects"),
    [
        # synonyms map to the class; every mention counts
        ("A puppy chases a Dog and another dog.", ["dog", "dog", "dog"]),
        ("A girl, two women and three children.", ["person", "person", "person"]),
        # plurals, regular and irregular
        ("Buses, knives, geese, planes and people", ["bus", "knife", "bird", "airplane", "person"]),
        # WordNet: "men" is a noun of its own, "vas" the shortest noun for "vases", "smartphones" unknown
        ("Some men with vases and smartphones", []),
        # two-word names
        ("a wine glass on the dining table", ["wine glass", "dining table"]),
        ("two wine glasses", ["wine glass"]),
        ("a glass of wine", []),
        ("a hot dog", ["hot dog"]),
        ("a teddy bear", ["teddy bear"]),
        ("a baby bear and an adult cat", ["bear", "cat"]),
        ("a passenger train and a passenger jet", ["train", "airplane"]),
        ("a man in a bow tie", ["person", "tie"]),
        ("train tracks beside home plate", []),
        # a toilet seat is no chair, wherever it appears in the caption
        ("the toilet seat is up", ["toilet"]),
        ("a seat, far away from the toilet", ["toilet"]),
        ("a seat", ["chair"]),
        # three-word names never match, nor do capitals
        ("a stove top oven", ["stove top oven"]),
        ("an iPhone and a phone", ["cell phone"]),
        # the treebank leaves "a/b" and "a-b" whole
        ("a dog/cat or dog-like cat", ["cat"]),
        ('The dog\'s tail, (a cat) "bus" **table**: person.', ["dog", "cat", "bus", "dining table", "person"]),
    ],
)
def test_mentions(vocabulary: ObjectVocabulary, caption: str, objects: list[str]) -> None:
    assert names(vocabulary, caption) == objects


def test_words_are_split_as_the_treebank_does() -> None:
    text = "The man's dog isn't here, \"the cats\" (two) sit... at 3,000: boys' toys--yes. Fine"
    assert " ".join(treebank_words(text)) == (
        "the man 's dog is n't here , \" the cats \" ( two ) sit ... at 3,000 : boys ' toys -- yes . fine"
    )


def test_objects_of_two_words_as_a_drawn_world_has_them(tmp_path: Path) -> None:
    path = tmp_path / "synonyms.txt"
    path.write_text("red circle, red disc\nblue square\n")
    vocabulary = ObjectVocabulary.read(path)
    caption = "Two red circles, a red disc, a blue circle and big blue squares. A red square."
    assert names(vocabulary, caption) == ["red circle", "red circle", "blue square"]


def test_an_empty_or_missing_list_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    for name in ("empty.txt", "missing.txt"):
        with pytest.raises(EvalError, match=name):
            ObjectVocabulary.read(tmp_path / name)
