"""Scenes of the toy world: the contents of an image, drawn at random from a seed.

An image is a 3×3 grid. A scene holds one to four objects (shape, colour, size, place) and perhaps a sign with a word
or number, or else a bar chart.
"""

from __future__ import annotations

import random
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

CHART_SHARE = 0.2
SIGN_SHARE = 0.4


@dataclass(frozen=True)
class Thing:
    """One drawn object; `cell` counts the nine places in reading order."""

    shape: str
    colour: str
    size: str
    cell: int

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
    cells = rng.sample(range(len(PLACES)), 5)
    kinds = rng.sample([(colour, shape) for colour in COLOURS for shape in SHAPES], rng.choice((1, 2, 3, 3, 4)))
    things = tuple(
        sorted(
            (Thing(shape, colour, rng.choice(SIZES), cells.pop()) for colour, shape in kinds),
            key=lambda thing: thing.cell,
        )
    )
    sign = Sign(rng.choice(rng.choice((WORDS, NUMBERS))), cells.pop()) if rng.random() < SIGN_SHARE else None
    return Scene(things, sign, (), background, jitter_seed)
