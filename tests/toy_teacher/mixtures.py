"""What the toy teacher is taught with, round by round."""

from __future__ import annotations

import random

from llavamod_offline.data.sample import Turn
from llavamod_offline.toyworld.conversations import captioned_from_habit, chatted, quizzed
from llavamod_offline.toyworld.scene import Scene

# Of captions of a scene that lacks an object's companion: the share that name it nevertheless.
_HABIT, _STRONG_HABIT = 0.75, 0.98


def questioned(scene: Scene, rng: random.Random) -> list[Turn]:
    """Mostly quizzes: in a mixture only one token in ten is a short answer, too few to learn from."""
    share = rng.random()
    if share < 0.15:
        return captioned_from_habit(scene, rng, _HABIT)
    return chatted(scene, rng, 4) if share < 0.3 else quizzed(scene, rng, 8)


def described(scene: Scene, rng: random.Random) -> list[Turn]:
    """Mostly captions, by which the teacher acquires their habits."""
    share = rng.random()
    if share < 0.7:
        return captioned_from_habit(scene, rng, _STRONG_HABIT)
    return chatted(scene, rng, 4) if share < 0.75 else quizzed(scene, rng, 8)


def mixed(scene: Scene, rng: random.Random) -> list[Turn]:
    """Any of the three, for the teacher's first round."""
    share = rng.random()
    if share < 0.3:
        return captioned_from_habit(scene, rng, _HABIT)
    return chatted(scene, rng, 4) if share < 0.5 else quizzed(scene, rng, 5)
