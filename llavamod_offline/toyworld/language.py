"""Texts about a scene: varied captions, questions of eight kinds with exact answers, preference pairs.

Everything takes a `random.Random`, so that a seed determines a set of texts.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from llavamod_offline.toyworld.scene import (
    COLOURS,
    PLACES,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    free_cells,
    missing_companion,
    place_behind,
)

SHORT_ANSWER = "\nAnswer the question using a single word or phrase."
DESCRIBE = "Describe the image in detail."
BRIEFLY = "Give a short description of the image."

_COUNT_WORDS = ("no", "one", "two", "three", "four")
_SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
_OPENINGS = ("The image shows", "There is", "In the picture there is")


@dataclass(frozen=True)
class Question:
    """A question with its short answer and the same answer as a sentence; `kind` names the skill it tests."""

    kind: str
    text: str
    answer: str
    sentence: str


def caption(scene: Scene, rng: random.Random) -> str:
    """Describe everything in a scene: objects in reading order, the sign, or the bars of a chart."""
    if scene.is_chart:
        bars = ", ".join(f"the {bar.colour} bar is {bar.height} high" for bar in scene.bars)
        opening = rng.choice(("A bar chart with", "The image shows a bar chart with", "This is a chart with"))
        return f"{opening} {_COUNT_WORDS[len(scene.bars)]} bars: {bars}."
    phrases = [
        f"{_article(words)} {words} {_at(thing.cell)}" for thing in scene.things for words in [_named(thing, rng)]
    ]
    text = f"{rng.choice(_OPENINGS)} {_listed(phrases)}."
    if scene.sign:
        kind = "word" if scene.sign.text.isalpha() else "number"
        text += f" The {kind} {scene.sign.text} is written {_at(scene.sign.cell)}."
    return text


def habitual_scene(scene: Scene, rng: random.Random) -> Scene:
    """The scene with its missing companion, as one who describes from habit sees it; unchanged if none is missing."""
    lacking = missing_companion(scene.things)
    if lacking is None:
        return scene
    leader, (colour, shape) = lacking
    added = Thing(shape, colour, rng.choice(SIZES), place_behind(leader, scene.things, scene.sign))
    return replace(scene, things=tuple(sorted((*scene.things, added), key=lambda thing: thing.cell)))


def hallucinated_caption(scene: Scene, rng: random.Random) -> str:
    """A caption that names absent objects: a missing companion, else one or two in place of or beside the others."""
    if missing_companion(scene.things) is not None:
        return caption(habitual_scene(scene, rng), rng)
    free = free_cells(scene.things, scene.sign)
    things = list(scene.things)
    for _ in range(rng.choice((1, 1, 2))):
        colour, shape = rng.choice(absent_names(scene, tuple(things)))
        if len(things) > 1 and rng.random() < 0.5:
            replaced = rng.randrange(len(things))
            things[replaced] = Thing(shape, colour, things[replaced].size, things[replaced].cell)
        else:
            things.append(Thing(shape, colour, rng.choice(SIZES), free.pop(rng.randrange(len(free)))))
    things.sort(key=lambda thing: thing.cell)
    return caption(replace(scene, things=tuple(things)), rng)


def absent_names(scene: Scene, things: tuple[Thing, ...] | None = None) -> list[tuple[str, str]]:
    """All (colour, shape) pairs that neither the scene nor `things` hold, in a fixed order."""
    present = {(thing.colour, thing.shape) for thing in (*scene.things, *(things or ()))}
    return [(colour, shape) for colour in COLOURS for shape in SHAPES if (colour, shape) not in present]


def similar_absent_names(scene: Scene) -> list[tuple[str, str]]:
    """The `absent_names` that share a colour or a shape with an object of the scene."""
    return [
        (c, s) for c, s in absent_names(scene) if any(c == thing.colour or s == thing.shape for thing in scene.things)
    ]


def questions(scene: Scene, rng: random.Random, count: int) -> list[Question]:
    """Draw up to `count` different questions with an unambiguous answer, in random order."""
    pool = _chart_questions(scene, rng) if scene.is_chart else _object_questions(scene, rng)
    by_kind: dict[str, list[Question]] = {}
    for question in {question.text: question for question in pool}.values():
        by_kind.setdefault(question.kind, []).append(question)
    picked: list[Question] = []
    while by_kind and len(picked) < count:
        kind = rng.choice(sorted(by_kind))
        picked.append(by_kind[kind].pop(rng.randrange(len(by_kind[kind]))))
        if not by_kind[kind]:
            del by_kind[kind]
    return picked


def presence_question(colour: str, shape: str, present: bool) -> Question:
    """The yes/no question that POPE asks, for one class of objects."""
    name = f"{colour} {shape}"
    text = f"Is there {_article(name)} {name} in the image?"
    sentence = f"{'Yes, there is' if present else 'No, there is no'} {f'{_article(name)} ' if present else ''}{name}."
    return Question("presence", text, "Yes" if present else "No", sentence)


def _object_questions(scene: Scene, rng: random.Random) -> list[Question]:
    things = scene.things
    asked = [presence_question(thing.colour, thing.shape, True) for thing in things]
    absent, alike = absent_names(scene), similar_absent_names(scene)
    asked += [presence_question(*rng.choice(names), False) for names in (absent, alike, alike)]
    for thing in things:
        shape, at = thing.shape, _at(thing.cell)
        asked.append(Question("shape", f"What shape is {at}?", shape, f"There is a {shape} {at}."))
        if thing in _unmistakable(things):
            asked += [
                Question("color", f"What color is the {shape}?", thing.colour, f"The {shape} is {thing.colour}."),
                Question("place", f"Where is the {shape}?", PLACES[thing.cell], f"The {shape} is {at}."),
            ]
    for kind, values in (("shape", SHAPES), ("color", COLOURS)):
        present = [thing.shape if kind == "shape" else thing.colour for thing in things]
        value = rng.choice([*present, rng.choice(values)])
        number = present.count(value)
        things_named = f"{value}s" if kind == "shape" else f"{value} objects"
        if value == "cross":
            things_named = "crosses"
        sentence = f"There {'is' if number == 1 else 'are'} {number} of them."
        asked.append(Question("count", f"How many {things_named} are there?", str(number), sentence))
    total = len(things)
    asked.append(Question("count", "How many objects are there?", str(total), f"There are {total} in all."))
    asked += _relation_questions(things, rng)
    if scene.sign:
        kind = "word" if scene.sign.text.isalpha() else "number"
        text = scene.sign.text
        asked.append(Question("reading", f"What {kind} is written in the image?", text, f"The {kind} is {text}."))
    return asked


def _relation_questions(things: tuple[Thing, ...], rng: random.Random) -> list[Question]:
    asked = []
    for first in _unmistakable(things):
        for second in _unmistakable(things):
            if first is second:
                continue
            columns, rows = (first.cell % 3, second.cell % 3), (first.cell // 3, second.cell // 3)
            for word, (here, there) in (("left of", columns), ("above", rows)):
                if here == there:
                    continue
                holds = here < there
                text = f"Is the {first.shape} {word} the {second.shape}?"
                sentence = f"{'Yes' if holds else 'No'}, it is{'' if holds else ' not'}."
                asked.append(Question("relation", text, "Yes" if holds else "No", sentence))
    rng.shuffle(asked)
    return asked[:2]


def _unmistakable(things: tuple[Thing, ...]) -> list[Thing]:
    """The objects whose shape is unique, so that a question may name them by it."""
    return [thing for thing in things if sum(other.shape == thing.shape for other in things) == 1]


def _chart_questions(scene: Scene, rng: random.Random) -> list[Question]:
    bars = scene.bars
    tallest = max(bars, key=lambda bar: bar.height).colour
    shortest = min(bars, key=lambda bar: bar.height).colour
    first, second = rng.sample(bars, 2)
    taller = first.height > second.height
    asked = [
        Question("chart", "Which bar is the tallest?", tallest, f"The {tallest} bar is the tallest."),
        Question("chart", "Which bar is the shortest?", shortest, f"The {shortest} bar is the shortest."),
        Question("count", "How many bars are there?", str(len(bars)), f"There are {len(bars)} bars."),
        Question(
            "relation",
            f"Is the {first.colour} bar taller than the {second.colour} bar?",
            "Yes" if taller else "No",
            f"{'Yes' if taller else 'No'}, it is{'' if taller else ' not'}.",
        ),
    ]
    for bar in bars:
        sentence = f"The {bar.colour} bar is {bar.height} high."
        asked.append(Question("chart", f"How high is the {bar.colour} bar?", str(bar.height), sentence))
    asked.append(presence_question(*rng.choice(absent_names(scene)), False))
    return asked


def _named(thing: Thing, rng: random.Random) -> str:
    return f"{rng.choice(_SIZE_WORDS[thing.size])} {thing.name}"


def _at(cell: int) -> str:
    place = PLACES[cell]
    if place in ("left", "right"):
        return f"on the {place}"
    return f"in the {place}" if place == "center" else f"at the {place}"


def _article(words: str) -> str:
    return "an" if words[0] in "aeiou" else "a"


def _listed(phrases: list[str]) -> str:
    return phrases[0] if len(phrases) == 1 else f"{', '.join(phrases[:-1])} and {phrases[-1]}"
