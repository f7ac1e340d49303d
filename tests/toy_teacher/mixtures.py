"""What the toy teacher is trained on, round by round."""

from __future__ import annotations

import random

from llavamod_offline.data.sample import Turn
from llavamod_offline.toyworld.conversations import captioned_from_habit, chatted, quizzed
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
