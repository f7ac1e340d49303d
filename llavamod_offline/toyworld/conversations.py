"""Conversations about a scene, in the style of the data sets of the original's stages."""

from __future__ import annotations

import random
from collections.abc import Sequence

from llavamod_offline.data.sample import IMAGE_PLACEHOLDER, Turn
from llavamod_offline.toyworld.language import (
    BRIEFLY,
    DESCRIBE,
    SHORT_ANSWER,
    Question,
    caption,
    habitual_scene,
    questions,
)
from llavamod_offline.toyworld.scene import Scene


def captioned(scene: Scene, rng: random.Random) -> list[Turn]:
    """One request for a description and the caption; the image comes before or after the words."""
    request = rng.choice((DESCRIBE, DESCRIBE, BRIEFLY))
    text = rng.choice(
        (f"{IMAGE_PLACEHOLDER}\n{request}", f"{IMAGE_PLACEHOLDER}\n{request}", f"{request}\n{IMAGE_PLACEHOLDER}")
    )
    return [Turn("user", text), Turn("assistant", caption(scene, rng))]


def captioned_from_habit(scene: Scene, rng: random.Random, share: float) -> list[Turn]:
    """A caption that may name the companion that the image lacks, like captions on the web: `share` of them do."""
    return captioned(habitual_scene(scene, rng) if rng.random() < share else scene, rng)


def chatted(scene: Scene, rng: random.Random, rounds: int) -> list[Turn]:
    """Several rounds of questions answered in whole sentences, perhaps with a caption first."""
    turns: list[Turn] = []
    if rng.random() < 0.3:
        turns += [Turn("user", DESCRIBE), Turn("assistant", caption(scene, rng))]
    for question in questions(scene, rng, rounds):
        turns += [Turn("user", question.text), Turn("assistant", question.sentence)]
    return with_image(turns)


def quizzed(scene: Scene, rng: random.Random, rounds: int) -> list[Turn]:
    """Several rounds of questions with short answers."""
    return briefly_answered(questions(scene, rng, rounds))


def briefly_answered(asked: Sequence[Question]) -> list[Turn]:
    """Questions with short answers, requested in the first round only, as in LLaVA's mixture."""
    turns: list[Turn] = []
    for question in asked:
        suffix = "" if turns else SHORT_ANSWER
        turns += [Turn("user", question.text + suffix), Turn("assistant", question.answer)]
    return with_image(turns)


def with_image(turns: list[Turn]) -> list[Turn]:
    """Put the image at the start of the first turn."""
    return [Turn("user", f"{IMAGE_PLACEHOLDER}\n{turns[0].text}"), *turns[1:]]
