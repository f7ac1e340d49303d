"""Captions and answers against a slow interpretation of the same words."""

from __future__ import annotations

import random
import re

from hypothesis import given
from hypothesis import strategies as st

from llavamod_offline.toyworld.language import (
    Question,
    absent_names,
    caption,
    habitual_scene,
    hallucinated_caption,
    questions,
)
from llavamod_offline.toyworld.scene import COLOURS, PLACES, SHAPES, Scene, Thing, missing_companion, random_scene

seeds = st.integers(0, 10**9)
_NAME = re.compile(rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})")


def only(scene: Scene, text: str) -> Thing:
    """The one object whose shape a text names."""
    (shape,) = [shape for shape in SHAPES if shape in text]
    (thing,) = [thing for thing in scene.things if thing.shape == shape]
    return thing


def answer_by_looking(scene: Scene, question: Question) -> str:
    """Answer a question from the scene by interpreting its words, the slow and obvious way."""
    text = question.text
    named = [" ".join(found) for found in _NAME.findall(text)]
    things = {thing.name: thing for thing in scene.things}
    bars = {bar.colour: bar.height for bar in scene.bars}
    if text.startswith("Is there"):
        return "Yes" if named[0] in things else "No"
    if text.startswith("Where"):
        return PLACES[only(scene, text).cell]
    if "written" in text:
        assert scene.sign is not None
        return scene.sign.text
    if text.startswith("What color"):
        return only(scene, text).colour
    if text.startswith("What shape"):
        place = re.sub(r"^(at|on|in) the ", "", text.removeprefix("What shape is ").rstrip("?"))
        (shape,) = [thing.shape for thing in scene.things if PLACES[thing.cell] == place]
        return shape
    if text.startswith("How many"):
        counted = text.split()[2]
        if counted == "bars":
            return str(len(bars))
        if counted == "objects":
            return str(len(things))
        single = "cross" if counted == "crosses" else counted.rstrip("s")
        return str(sum(single in (thing.colour, thing.shape) for thing in scene.things))
    if text.startswith("How high"):
        return str(bars[text.split()[4]])
    if text.startswith("Which"):
        extreme = max if "tallest" in text else min
        return extreme(bars, key=lambda colour: bars[colour])
    if "taller" in text:
        words = text.split()
        return "Yes" if bars[words[2]] > bars[words[7]] else "No"
    first, second = (only(scene, part).cell for part in re.split("left of|above", text))
    holds = first % 3 < second % 3 if "left of" in text else first // 3 < second // 3
    return "Yes" if holds else "No"


@given(seeds)
def test_every_answer_is_true(seed: int) -> None:
    rng = random.Random(seed)
    scene = random_scene(rng)
    asked = questions(scene, rng, 100)
    assert len({question.text for question in asked}) == len(asked) > 3
    for question in asked:
        assert question.answer == answer_by_looking(scene, question), question
        shown = question.answer in question.sentence or question.answer in ("Yes", "No")
        assert shown, question


@given(seeds)
def test_a_caption_names_what_is_there_and_nothing_else(seed: int) -> None:
    rng = random.Random(seed)
    scene = random_scene(rng)
    text = caption(scene, rng)
    assert {" ".join(name) for name in _NAME.findall(text)} == {thing.name for thing in scene.things}
    if scene.sign:
        assert f" {scene.sign.text} is written" in text
    for bar in scene.bars:
        assert f"the {bar.colour} bar is {bar.height} high" in text


@given(seeds)
def test_a_hallucinated_caption_names_something_absent(seed: int) -> None:
    rng = random.Random(seed)
    scene = random_scene(rng)
    if scene.is_chart:
        return
    named = set(_NAME.findall(hallucinated_caption(scene, rng)))
    assert named & set(absent_names(scene))


@given(seeds)
def test_a_habitual_caption_names_the_missing_companion_alone(seed: int) -> None:
    rng = random.Random(seed)
    scene = random_scene(rng)
    named = {" ".join(name) for name in _NAME.findall(caption(habitual_scene(scene, rng), rng))}
    leader, companion = missing_companion(scene.things) or (None, ())
    assert (leader is None) == (habitual_scene(scene, rng) == scene)
    assert named - {thing.name for thing in scene.things} == ({" ".join(companion)} if companion else set())
