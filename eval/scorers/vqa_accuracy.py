"""VQA accuracy: answers normalised as EvalAI does, against ten human answers.

The results equal those of the M4C evaluator that LLaVA ships (llava/eval/m4c_evaluator.py), oddities included:
  1. lower case; "," and "?" deleted; "'s" becomes " 's", so contractions with an "'s" are never found;
  2. line breaks and tabs become spaces;
  3. each of 21 punctuation marks is deleted if it is next to a space anywhere in the text, else becomes a space;
  4. the first 32 periods that no digit follows are deleted ("3." → "3", "1.5" stays, "a.com" → "acom");
  5. number words none, zero … ten become digits; a, an and the are deleted (so "A" is an empty answer); missing
     apostrophes of contractions are restored.
The official VQA evaluation, not used here, lacks step 1 and skips all steps if the ten answers are identical.

Accuracy of an answer: the mean, over the ten human answers, of min(1, how many of the *other* nine agree / 3), that is
0, .3, .6, .9 and 1 for 0, 1, 2, 3 and at least 4 of ten. The simpler min(n/3, 1) gives other values.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from eval.example import Example, Verdict

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_PERIODS_REMOVED = 32  # the original passes the flag re.UNICODE as the count of replacements
_PLAIN = re.compile(r"[a-z0-9 ]*")
_NUMBERS = {
    **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"},
    **{"seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}
_ARTICLES = {"a", "an", "the"}

# Word → contraction, where they differ by more than one apostrophe before the last letters.
_IRREGULAR = {
    "couldn'tve": "couldn't've",
    "couldnt've": "couldn't've",
    "hadnt've": "hadn't've",
    "hadn'tve": "hadn't've",
    "hed've": "he'd've",
    "he'dve": "he'd've",
    "itd've": "it'd've",
    "it'dve": "it'd've",
    "maam": "ma'am",
    "mightnt've": "mightn't've",
    "mightn'tve": "mightn't've",
    "notve": "not've",
    "oclock": "o'clock",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
    "shed've": "she'd've",
    "she'dve": "she'd've",
    "shouldnt've": "shouldn't've",
    "shouldn'tve": "shouldn't've",
    "somebody'd": "somebodyd",
    "somebodyd've": "somebody'd've",
    "somebody'dve": "somebody'd've",
    "someoned've": "someone'd've",
    "someone'dve": "someone'd've",
    "somethingd've": "something'd've",
    "something'dve": "something'd've",
    "thered've": "there'd've",
    "there'dve": "there'd've",
    "theyd've": "they'd've",
    "they'dve": "they'd've",
    "twas": "'twas",
    "wed've": "we'd've",
    "we'dve": "we'd've",
    "whod've": "who'd've",
    "who'dve": "who'd've",
    "wouldnt've": "wouldn't've",
    "wouldn'tve": "wouldn't've",
    "yall": "y'all",
    "yall'll": "y'all'll",
    "y'allll": "y'all'll",
    "yall'd've": "y'all'd've",
    "y'alld've": "y'all'd've",
    "y'all'dve": "y'all'd've",
    "youd've": "you'd've",
    "you'dve": "you'd've",
}
# The regular contractions, with their apostrophe.
_REGULAR = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's
isn't it'd it'll might've mightn't must've mustn't needn't oughtn't shan't should've shouldn't somebody'll
somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd
they'll they're they've wasn't we've weren't what'll what're what's what've when's where'd where's where've
who'd who'll who's who've why'll why're why's won't would've wouldn't you'd you'll you're you've
"""
_CONTRACTIONS = _IRREGULAR | {word.replace("'", ""): word for word in _REGULAR.split()}


@lru_cache(maxsize=2**17)
def normalise(answer: str) -> str:
    """Normalise an answer as EvalAI does (see above)."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    if not _PLAIN.fullmatch(text):
        text = _PERIOD.sub("", _without_punctuation(text), count=_PERIODS_REMOVED)
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def accuracy(answer: str, references: Sequence[str]) -> float:
    """The accuracy of a normalised answer against human answers, 0 to 1."""
    normalised = [normalise(reference) for reference in references]
    agreeing = normalised.count(answer)
    if not agreeing:
        return 0.0
    others = len(normalised) - agreeing
    return (agreeing * min(1.0, (agreeing - 1) / 3) + others * min(1.0, agreeing / 3)) / len(normalised)


def score_answers(examples: Sequence[Example[Any]], texts: Mapping[str, str | None]) -> tuple[dict[str, Verdict], int]:
    """Score texts by example id against `reference.answers`; returns verdicts, and how many texts become empty."""
    verdicts, empty = {}, 0
    for example in examples:
        text = texts[example.id]
        read_as = "" if text is None else normalise(text)
        empty += text is not None and not read_as
        verdicts[example.id] = Verdict(read_as, 0.0 if text is None else accuracy(read_as, example.reference.answers))
    return verdicts, empty


def counted(references: Sequence[str]) -> str:
    """Human answers with how often each was given, the most frequent first."""
    return ", ".join(f"{answer} ({count})" for answer, count in Counter(references).most_common())


def _without_punctuation(text: str) -> str:
    result = text
    for mark in _PUNCTUATION:
        if mark in text:
            beside_space = f"{mark} " in text or f" {mark}" in text
            result = result.replace(mark, "" if beside_space else " ")
    return result
