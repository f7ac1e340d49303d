"""Scenes and their images: what is drawn is what the scene says."""

from __future__ import annotations

import io
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from llavamod_offline.toyworld.draw import _RGB, CELL_SIDE, IMAGE_SIDE, draw_scene, encode_scene
from llavamod_offline.toyworld.scene import (
    COMPANION_SHARE,
    COMPANIONS,
    PLACES,
    Scene,
    Sign,
    Thing,
    missing_companion,
    place_behind,
    random_scene,
)
from tests.toy_teacher.supervision import ATTRIBUTES, patch_labels, presence_labels

scenes = st.integers(0, 10**9).map(lambda seed: random_scene(random.Random(seed)))


@given(scenes)
def test_nothing_shares_a_cell_or_a_name(scene: Scene) -> None:
    cells = [thing.cell for thing in scene.things] + ([scene.sign.cell] if scene.sign else [])
    assert len(set(cells)) == len(cells)
    assert len({thing.name for thing in scene.things}) == len(scene.things)
    assert all(0 <= cell < len(PLACES) for cell in cells)
    assert bool(scene.things) != scene.is_chart


@given(scenes)
def test_the_same_scene_gives_the_same_picture(scene: Scene) -> None:
    assert encode_scene(scene) == encode_scene(scene)
    decoded = Image.open(io.BytesIO(encode_scene(scene)))
    assert decoded.size == (IMAGE_SIDE, IMAGE_SIDE)


@pytest.mark.parametrize("colour", list(_RGB))
@pytest.mark.parametrize("shape", ["circle", "square", "triangle", "star", "cross", "diamond"])
def test_an_object_is_drawn_where_it_is_in_its_colour(shape: str, colour: str) -> None:
    scene = Scene((Thing(shape, colour, "large", 5),), None, (), "white", 7)
    pixels = np.asarray(draw_scene(scene)).astype(int)
    centre = pixels[CELL_SIDE + CELL_SIDE // 2, 2 * CELL_SIDE + CELL_SIDE // 2]
    assert np.abs(centre - _RGB[colour]).max() <= 14
    assert (pixels[: CELL_SIDE - 4] == 250).all()


def test_a_faint_object_is_nearly_of_the_backgrounds_colour() -> None:
    plain, faint = (
        np.asarray(draw_scene(Scene((Thing("square", "red", "large", 4, faint),), None, (), "white", 7))).astype(int)
        for faint in (False, True)
    )
    centre = CELL_SIDE + CELL_SIDE // 2
    contrast = [np.abs(pixels[centre, centre] - pixels[0, 0]).max() for pixels in (plain, faint)]
    assert 20 <= contrast[1] <= 0.25 * contrast[0]


def test_companions_are_usually_but_not_always_there() -> None:
    rng = random.Random(3)
    scenes = [scene for scene in (random_scene(rng) for _ in range(2000)) if not scene.is_chart]
    led = [scene for scene in scenes if {(thing.colour, thing.shape) for thing in scene.things} & set(COMPANIONS)]
    lacking = [scene for scene in scenes if missing_companion(scene.things) is not None]
    assert (
        abs(len(lacking) / len(led) - (1 - COMPANION_SHARE)) < 0.08
    )  # a few lack a second object's, or have it by chance
    assert 0.15 < len(lacking) / len(scenes) < 0.25


@given(scenes)
def test_a_companion_has_a_free_place_behind_its_object(scene: Scene) -> None:
    taken = {thing.cell for thing in scene.things} | ({scene.sign.cell} if scene.sign else set())
    for thing in scene.things:
        place = place_behind(thing, scene.things, scene.sign)
        assert place not in taken
        assert all(cell in taken for cell in range(thing.cell + 1, min(place, len(PLACES))))


def test_signs_differ_by_their_text() -> None:
    drawn = {encode_scene(Scene((), Sign(text, 4), (), "gray", 0)) for text in ("stop", "open", "7", "17")}
    assert len(drawn) == 4


@given(scenes)
def test_labels_of_patches_follow_the_scene(scene: Scene) -> None:
    labels = patch_labels(scene)
    assert labels.shape == (len(ATTRIBUTES), 36)
    for attribute, classes in enumerate(ATTRIBUTES.values()):
        assert labels[attribute].min() >= 0
        assert labels[attribute].max() < classes
    assert (labels[0] > 0).sum() == 4 * len(scene.things)
    assert len(set(labels[4].tolist()) - {0}) == len(scene.bars)
    assert presence_labels(scene).sum() == len(scene.things)
