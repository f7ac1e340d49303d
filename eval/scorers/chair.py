"""Finding the objects that a caption mentions by string matching (CHAIR, arXiv 1809.02156).

The rules are those of RLAIF-V's `eval/eval_gpt_obj_halbench.py`: lower case, Penn Treebank words, each word's WordNet
noun lemma, then pairs of words, then the synonym list.

WordNet itself is not needed. Its lemmatiser takes the shortest noun among a word and the forms from its suffix rules.
Whether a form is a noun matters only for forms in the synonym list, and for the few exceptions in `_LEMMAS`. So "men",
"vases" and "smartphones" name no object, as in the original.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from llavamod_offline.errors import EvalError

_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
_VEHICLES = ("jet", "train")
_PAIRS = {
    "home plate": "home plate",
    "train track": "train track",
    "bow tie": "tie",
    "toilet seat": "toilet",
    "wine glas": "wine glass",
    **{f"{age} {animal}": animal for animal in _ANIMALS for age in ("baby", "adult")},
    **{f"passenger {vehicle}": vehicle for vehicle in _VEHICLES},
}

# WordNet's plural suffixes of nouns and their replacements.
_SUFFIXES = (
    *(("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"), ("shes", "sh")),
    *(("men", "man"), ("ies", "y")),
)
# WordNet 3.0's lemmas of COCO's words and plurals where they differ from the rules above: irregular plurals; plurals
# that match a shorter noun ("vas" is a vessel of the body) or are nouns themselves ("men"); plurals of unknown words,
# which stay as they are.
_LEMMAS = {
    **{"children": "child", "grandchildren": "grandchild", "women": "woman", "brethren": "brother", "oxen": "ox"},
    **{"geese": "goose", "mice": "mouse", "knives": "knife", "pocketknives": "pocketknife", "calves": "calf"},
    **{"thieves": "thief", "buffaloes": "buffalo", "flamingoes": "flamingo", "taxies": "taxi", "busses": "bus"},
    **{"men": "men", "vases": "vas", "sports": "sport", "glass": "glass"},
    **{
        plural: plural
        for plural in (
            *("bluejays", "brindles", "coworkers", "firetrucks", "hairdryers", "lenovos", "longboards", "macbooks"),
            *("netbooks", "paddleboats", "pitbulls", "riverboats", "sailboards", "shortboards", "skimboards"),
            *("smartphones", "soliders", "stovetops", "teddybears", "televisons"),
        )
    },
}

_SPLITS = (
    (re.compile(r"(\.\.\.|--)"), r" \1 "),
    (re.compile(r"([;@#$%&?!*\"()\[\]{}<>`«»“”„‘’])"), r" \1 "),
    (re.compile(r"([:,])(?=\D|$)"), r" \1 "),
    (re.compile(r"(?<!\.)\.(?=[\"')\]}>]*(\s|$))"), " . "),
    (re.compile(r"(?<=[^' ])('(?:s|m|d|ll|re|ve)?)(?=\s|$)"), r" \1"),
    (re.compile(r"n't(?=\s|$)"), " n't"),
)


@dataclass(frozen=True)
class Mention:
    """A word (or pair of words) of a caption that names an object, and the object's class."""

    word: str
    name: str


class ObjectVocabulary:
    """A synonym list: each line an object's name followed by its synonyms, separated by commas."""

    def __init__(self, synonyms: dict[str, str]) -> None:
        self.synonyms = synonyms
        pairs = {word: word for word in synonyms if len(word.split(" ")) >= 2}
        self.pairs = pairs | _PAIRS
        self.words = {part for word in (*synonyms, *self.pairs) for part in word.split(" ")}

    @classmethod
    def read(cls, path: Path) -> ObjectVocabulary:
        """Read `synonyms_refine.txt`. Errors: `EvalError` if it is missing or empty."""
        try:
            lines = path.read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise EvalError(f"{path}: the synonym list cannot be read: {error}") from error
        synonyms: dict[str, str] = {}
        for line in lines:
            words = [word.strip() for word in line.strip().split(", ") if word.strip()]
            synonyms |= dict.fromkeys(words, next(iter(words), ""))
        if not synonyms:
            raise EvalError(f"{path}: the synonym list is empty: write one object per line, 'name, synonym, synonym'")
        return cls(synonyms)

    def mentions(self, caption: str) -> list[Mention]:
        """The objects a caption mentions, in order, with repetitions."""
        words, _ = self._joined([self.lemma(word) for word in treebank_words(caption)])
        # "the seat of the toilet" is not a chair
        if "toilet" in words and "seat" in words:
            words = [word for word in words if word != "seat"]
        return [Mention(word, self.synonyms[word]) for word in words if word in self.synonyms]

    def named(self, objects: Sequence[str]) -> list[Mention]:
        """The objects of a judge's list, each once: known pairs of words, or the whole name, or its last word."""
        found: dict[str, str] = {}
        for name in objects:
            words = [self.lemma(word) for word in treebank_words(name)]
            _, pairs = self._joined(words)
            known = [word for word in pairs or [" ".join(words)] if word in self.synonyms]
            if not known and not pairs:
                known = [word for word in words[-1:] if word in self.synonyms]
            found |= {word: self.synonyms[word] for word in known}
        return [Mention(word, name) for word, name in found.items() if not (word == "seat" and "toilet" in found)]

    def lemma(self, word: str) -> str:
        """The shortest singular of a word that the list contains, or the word itself."""
        if word in _LEMMAS:
            return _LEMMAS[word]
        forms = [word] + [
            word.removesuffix(ending) + replacement for ending, replacement in _SUFFIXES if word.endswith(ending)
        ]
        return min((form for form in forms if form in self.words), key=len, default=word)

    def _joined(self, words: list[str]) -> tuple[list[str], list[str]]:
        """Replace known pairs of adjacent words by their meaning, left to right; returns all words, and the pairs."""
        joined, pairs, index = [], [], 0
        while index < len(words):
            pair = " ".join(words[index : index + 2])
            joined.append(self.pairs.get(pair, words[index]))
            pairs += joined[-1:] if pair in self.pairs else []
            index += 2 if pair in self.pairs else 1
        return joined, pairs


def parse_objects(reply: str) -> list[str] | None:
    """The JSON list of a judge's reply: all of it, its last line, or the text in its brackets; None without one."""
    text = reply.strip()
    start, end = text.find("["), text.rfind("]")
    for candidate in (text, text.split("\n")[-1], text[start : end + 1] if 0 <= start < end else ""):
        try:
            found = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        if isinstance(found, list) and all(isinstance(item, str) for item in found):
            return found
    return None


def treebank_words(text: str) -> list[str]:
    """Lower-case text and split it into words and punctuation as the Penn Treebank does; "a/b" stays one word."""
    text = text.lower()
    for pattern, replacement in _SPLITS:
        text = pattern.sub(replacement, text)
    return text.split()
