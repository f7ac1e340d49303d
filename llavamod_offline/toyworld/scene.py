"""Scenes of the toy world: the contents of an image, drawn at random from a seed.

An image is a 3×3 grid. A scene holds one to five objects (shape, colour, size, place) and perhaps a sign with a word
or number, or else a bar chart. Some objects are faint. A few objects usually stand beside another one, their companion:
captions that name it where it is missing hallucinate as real models' captions do (POPE, arXiv 2305.10355).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SIZES = ("small", "large")
PLACES = (
    "top left", "top", "top right",
    "left", "center", "right",
    "bottom left", "bottom", "bottom right",
)  # fmt: skip
WORDS = ("stop", "open", "exit", "sale", "taxi", "cafe", "bank", "fire")
NUMBERS = tuple(str(number) for number in range(1, 21))
BAR_HEIGHTS = (1, 2, 3, 4, 5)
BACKGROUNDS = ("white", "gray", "cream")

# Which object usually stands right behind which, in reading order.
COMPANIONS = {
    ("red", "circle"): ("blue", "star"),
    ("green", "square"): ("yellow", "triangle"),
    ("purple", "diamond"): ("orange", "cross"),
    ("blue", "triangle"): ("red", "square"),
}

CHART_SHARE = 0.2
SIGN_SHARE = 0.4
FAINT_SHARE = 0.15
LEADER_SHARE = 0.35  # of scenes, besides those that have one by chance
COMPANION_SHARE = 0.65  # of scenes with an object that has a companion


@dataclass(frozen=True)
class Thing:
    """One drawn object; `cell` counts the nine places in reading order. Faint: nearly of the background's colour."""

    shape: str
    colour: str
    size: str
    cell: int
    faint: bool = False

    @property
    def name(self) -> str:
        """Colour and shape, the class by which mentions of objects are scored."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Sign:
    """A white plate with a word or number."""

    text: str
    cell: int


@dataclass(frozen=True)
class Bar:
    """One bar of a chart, `height` in units of the chart's grid lines."""

    colour: str
    height: int


@dataclass(frozen=True)
class Scene:
    """The full contents of one image. `bars` is empty unless the scene is a chart."""

    things: tuple[Thing, ...]
    sign: Sign | None
    bars: tuple[Bar, ...]
    background: str
    jitter_seed: int

    @property
    def is_chart(self) -> bool:
        """Whether the image is a bar chart."""
        return bool(self.bars)


def random_scene(rng: random.Random) -> Scene:
    """Draw a scene; no two objects share both colour and shape, no two things share a cell."""
    background = rng.choice(BACKGROUNDS)
    jitter_seed = rng.getrandbits(32)
    if rng.random() < CHART_SHARE:
        colours = rng.sample(COLOURS, rng.choice((3, 4)))
        heights = rng.sample(BAR_HEIGHTS, len(colours))
        bars = tuple(Bar(colour, height) for colour, height in zip(colours, heights, strict=True))
        return Scene((), None, bars, background, jitter_seed)
    things = [
        Thing(shape, colour, rng.choice(SIZES), cell, rng.random() < FAINT_SHARE)
        for (colour, shape), cell in zip(_kinds(rng), rng.sample(range(len(PLACES)), len(PLACES)), strict=False)
    ]
    lacking = missing_companion(things)
    if lacking is not None and rng.random() < COMPANION_SHARE:
        leader, (colour, shape) = lacking
        things.append(Thing(shape, colour, rng.choice(SIZES), place_behind(leader, things), rng.random() < FAINT_SHARE))
    sign = None
    if rng.random() < SIGN_SHARE:
        sign = Sign(rng.choice(rng.choice((WORDS, NUMBERS))), rng.choice(free_cells(things)))
    return Scene(tuple(sorted(things, key=lambda thing: thing.cell)), sign, (), background, jitter_seed)


def missing_companion(things: Sequence[Thing]) -> tuple[Thing, tuple[str, str]] | None:
    """The first object whose companion is not there, and that companion's (colour, shape)."""
    present = {(thing.colour, thing.shape) for thing in things}
    for thing in things:
        companion = COMPANIONS.get((thing.colour, thing.shape))
        if companion is not None and companion not in present:
            return thing, companion
    return None


def place_behind(leader: Thing, things: Sequence[Thing], sign: Sign | None = None) -> int:
    """The first free cell behind an object in reading order, or else the last one before it."""
    free = free_cells(things, sign)
    return next((cell for cell in free if cell > leader.cell), free[-1])


def free_cells(things: Sequence[Thing], sign: Sign | None = None) -> list[int]:
    """The empty cells, in reading order."""
    taken = {thing.cell for thing in things} | ({sign.cell} if sign else set())
    return [cell for cell in range(len(PLACES)) if cell not in taken]


def _kinds(rng: random.Random) -> list[tuple[str, str]]:
    """One to four different (colour, shape), often one that has a companion."""
    kinds = rng.sample([(colour, shape) for colour in COLOURS for shape in SHAPES], rng.choice((1, 2, 3, 3, 4)))
    leader = rng.choice(sorted(COMPANIONS))
    if rng.random() < LEADER_SHARE and leader not in kinds:
        kinds[0] = leader
    return kinds
