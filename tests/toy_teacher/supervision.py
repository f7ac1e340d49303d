"""Ground truth as numbers: what each patch of an image shows, to train the toy vision tower.

Shape suffixes: P patches of an image (6×6, two by two of them a cell), A attributes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llavamod_offline.toyworld.draw import IMAGE_SIDE
from llavamod_offline.toyworld.scene import BAR_HEIGHTS, COLOURS, NUMBERS, SHAPES, SIZES, WORDS, Scene

PATCHES_A_SIDE = 6
SIGN_TEXTS = (*WORDS, *NUMBERS)

# Attribute → number of classes; class 0 is "none".
ATTRIBUTES = {
    "shape": len(SHAPES) + 1,
    "colour": len(COLOURS) + 1,
    "size": len(SIZES) + 1,
    "sign": len(SIGN_TEXTS) + 1,
    "bar_colour": len(COLOURS) + 1,
    "bar_height": len(BAR_HEIGHTS) + 1,
}
PRESENCE_CLASSES = len(COLOURS) * len(SHAPES)


def patch_labels(scene: Scene) -> NDArray[np.int64]:
    """The class of every attribute at every patch, [A, P], patches in reading order."""
    labels_ASS = np.zeros((len(ATTRIBUTES), PATCHES_A_SIDE, PATCHES_A_SIDE), dtype=np.int64)
    for thing in scene.things:
        rows, columns = _patches_of(thing.cell)
        labels_ASS[0, rows, columns] = SHAPES.index(thing.shape) + 1
        labels_ASS[1, rows, columns] = COLOURS.index(thing.colour) + 1
        labels_ASS[2, rows, columns] = SIZES.index(thing.size) + 1
    if scene.sign:
        rows, columns = _patches_of(scene.sign.cell)
        labels_ASS[3, rows, columns] = SIGN_TEXTS.index(scene.sign.text) + 1
    for position, bar in enumerate(scene.bars):
        width = IMAGE_SIDE / PATCHES_A_SIDE
        centre = 8 + (position + 0.5) * ((IMAGE_SIDE - 12) // len(scene.bars))
        labels_ASS[4, :, int(centre / width)] = COLOURS.index(bar.colour) + 1
        labels_ASS[5, :, int(centre / width)] = BAR_HEIGHTS.index(bar.height) + 1
    return labels_ASS.reshape(len(ATTRIBUTES), -1)


def presence_labels(scene: Scene) -> NDArray[np.float32]:
    """Which (colour, shape) classes the image holds, as zeros and ones, [PRESENCE_CLASSES]."""
    present = np.zeros(PRESENCE_CLASSES, dtype=np.float32)
    for thing in scene.things:
        present[COLOURS.index(thing.colour) * len(SHAPES) + SHAPES.index(thing.shape)] = 1
    return present


def _patches_of(cell: int) -> tuple[slice, slice]:
    row, column = 2 * (cell // 3), 2 * (cell % 3)
    return slice(row, row + 2), slice(column, column + 2)
