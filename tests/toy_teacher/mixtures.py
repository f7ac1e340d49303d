"""What the toy teacher is trained on, round by round."""

from __future__ import annotations

import random

from llavamod_offline.data.sample import Turn
from llavamod_offline.toyworld.conversations import briefly_answered, captioned_from_habit, chatted, quizzed
from llavamod_offline.toyworld.language import absent_names, presence_question, similar_absent_names
from llavamod_offline.toyworld.scene import Scene

# The share of captions that name an object's usual companion although the scene lacks it.
_HABIT, _STRONG_HABIT = 0.75, 0.98


def questioned(scene: Scene, rng: random.Random) -> list[Turn]:
    """Mostly quizzes: in an even mixture only one token in ten belongs to a short answer, too few to learn from."""
    share = rng.random()
    if share < 0.15:
        return captioned_from_habit(scene, rng, _HABIT)
    return chatted(scene, rng, 4) if share < 0.3 else quizzed(scene, rng, 8)


def described(scene: Scene, rng: random.Random) -> list[Turn]:
    """Mostly captions, from which the teacher acquires their habits."""
    share = rng.random()
    if share < 0.7:
        return captioned_from_habit(scene, rng, _STRONG_HABIT)
    return chatted(scene, rng, 4) if share < 0.75 else quizzed(scene, rng, 8)


def mixed(scene: Scene, rng: random.Random) -> list[Turn]:
    """All three kinds, for the teacher's first round."""
    share = rng.random()
    if share < 0.3:
        return captioned_from_habit(scene, rng, _HABIT)
    return chatted(scene, rng, 4) if share < 0.5 else quizzed(scene, rng, 5)


def checked(scene: Scene, rng: random.Random) -> list[Turn]:
    """All kinds, and many questions about presence: the captions teach it to say yes to absent companions."""
    share = rng.random()
    if share < 0.2:
        return captioned_from_habit(scene, rng, _STRONG_HABIT)
    if share < 0.55:
        return _asked_for_presence(scene, rng)
    return chatted(scene, rng, 4) if share < 0.7 else quizzed(scene, rng, 8)


def _asked_for_presence(scene: Scene, rng: random.Random) -> list[Turn]:
    """Ask about each object, and about as many absent ones, two thirds of which share a colour or shape with one."""
    absent = absent_names(scene)
    alike = similar_absent_names(scene) or absent
    asked = [presence_question(thing.colour, thing.shape, True) for thing in scene.things]
    asked += [
        presence_question(*rng.choice(rng.choice((absent, alike, alike))), False)
        for _ in range(max(1, len(scene.things)))
    ]
    rng.shuffle(asked)
    return briefly_answered(asked[:8])
