"""Scoring with a judge: MMHal-Bench, and Object HalBench's variant in which a language model finds the objects.

`chair_llm:MODEL` (RLAIF-V's `--use_gpt`): the judge lists the objects that a description states as visible, as a JSON
list; answers of at most three words mention none; each object counts once a description. Where the original takes noun
spans from spaCy, an object's whole name, or else its last word, is looked up here. Replies that are no JSON list are
unparsed and their descriptions count as one false mention; above 2 % of them there is no headline.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.example import Example, Scored
from eval.judge import Judge, ask
from eval.judge_template import JudgeTemplate
from eval.scorers.chair import Mention, ObjectVocabulary, treebank_words
from eval.tasks import mmhal, object_halbench
from llavamod_offline.errors import ConfigError

SHORT_ANSWER_WORDS = 3
HALBENCH_SLOTS = ("question", "answer")
HALBENCH_TEMPLATE = JudgeTemplate(
    "object-halbench-default-1",
    """Below is a request about an image and the answer to it. List every physical object that the answer says can be
seen in the image.

Request: {question}
Answer: {answer}

Take only objects that the answer itself names, one entry for each kind, in the singular, without colour, material, size
or number. Leave out what the answer denies, supposes, or names only in general. Reply with a JSON list of strings and
nothing else, for example ["cat", "dining table"]; reply [] if there is none.
""",
    HALBENCH_SLOTS,
)


def score_with_judge(
    task: str,
    examples: Sequence[Example[Any]],
    texts: Mapping[str, str | None],
    judge: Judge,
    *,
    record: Path,
    template_file: Path | None = None,
) -> tuple[Scored, str]:
    """Score a task with a judge → the score, and what the protocol says of the judge.

    Errors: `ConfigError` for a task that takes no judge, or a template that lacks a place; `EvalError` for the judge.
    """
    if task == mmhal.NAME:
        template = _template(mmhal.DEFAULT_TEMPLATE, template_file)
        questions = _questions(template, examples, texts, mmhal.judge_slots)
        scored = mmhal.score_judged(examples, texts, ask(judge, questions, record))
        return scored, _protocol(judge, template)
    if task == object_halbench.NAME:
        template = _template(HALBENCH_TEMPLATE, template_file)
        questions = _questions(template, examples, texts, _halbench_slots)
        scored = score_halbench(examples, texts, ask(judge, questions, record))
        return scored, f"variant: chair_llm:{judge.model} | {_protocol(judge, template)}"
    raise ConfigError(f"task '{task}' takes no judge: leave --judge out (mmhal and object_halbench take one)")


def score_halbench(
    examples: Sequence[Example[object_halbench.Reference]],
    texts: Mapping[str, str | None],
    replies: Mapping[str, str],
) -> Scored:
    """Hallucination rates from the judge's lists of objects by example id; answers without a reply are short."""
    mentions: dict[str, list[Mention] | None] = {}
    unparsed = 0
    for example in examples:
        if texts[example.id] is None:
            mentions[example.id] = None
        elif example.id not in replies:
            mentions[example.id] = []
        else:
            objects = parse_objects(replies[example.id])
            unparsed += objects is None
            vocabulary = example.reference.vocabulary
            mentions[example.id] = None if objects is None else _unique_mentions(objects, vocabulary)
    scored = object_halbench.rates(examples, texts, mentions)
    metrics, notes = scored.metrics, scored.notes
    if unparsed > mmhal.UNPARSED_ALLOWED * len(examples):
        metrics = dict.fromkeys(metrics, None)
        notes += (f"no headline: {unparsed} of {len(examples)} replies of the judge cannot be read (2 % at most)",)
    return Scored(metrics, unparsed, scored.verdicts, notes)


def parse_objects(reply: str) -> list[str] | None:
    """The JSON list of a reply: all of it, its last line, or what stands between its brackets; None without one."""
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


def _unique_mentions(objects: Sequence[str], vocabulary: ObjectVocabulary) -> list[Mention]:
    found: dict[str, Mention] = {}
    for name in objects:
        for mention in _object_mentions(name, vocabulary):
            found.setdefault(mention.word, mention)
    words = set(found)
    return [mention for word, mention in found.items() if not (word == "seat" and "toilet" in words)]


def _object_mentions(name: str, vocabulary: ObjectVocabulary) -> list[Mention]:
    """Pairs of words that the list knows; else the whole name; else its last word."""
    words = [vocabulary.lemma(word) for word in treebank_words(name)]
    pairs = vocabulary.pairs_in(words)
    candidates = pairs or [" ".join(words)]
    mentions = [Mention(word, vocabulary.synonyms[word]) for word in candidates if word in vocabulary.synonyms]
    if not mentions and not pairs and words and words[-1] in vocabulary.synonyms:
        mentions = [Mention(words[-1], vocabulary.synonyms[words[-1]])]
    return mentions


def _halbench_slots(example: Example[object_halbench.Reference], text: str) -> dict[str, str] | None:
    if len(text.split()) <= SHORT_ANSWER_WORDS:
        return None
    return {"question": example.prompt, "answer": text}


def _questions(
    template: JudgeTemplate, examples: Sequence[Example[Any]], texts: Mapping[str, str | None], slots: Any
) -> dict[str, str]:
    questions = {}
    for example in examples:
        text = texts[example.id]
        values = None if text is None else slots(example, text)
        if values is not None:
            questions[example.id] = template.fill(values)
    return questions


def _template(default: JudgeTemplate, file: Path | None) -> JudgeTemplate:
    return default if file is None else JudgeTemplate.read(file, default.slots)


def _protocol(judge: Judge, template: JudgeTemplate) -> str:
    return f"judge: {judge.model} at temperature 0, template {template.name} (sha256 {template.sha256})"
