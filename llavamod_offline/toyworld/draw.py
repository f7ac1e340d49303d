"""Draw scenes as 96×96 images with Pillow, from plain shapes and a small bitmap font."""

from __future__ import annotations

import io
import math
import random

from PIL import Image, ImageDraw

from llavamod_offline.toyworld.scene import BAR_HEIGHTS, Scene, Sign, Thing

IMAGE_SIDE = 96
CELL_SIDE = IMAGE_SIDE // 3

_RGB = {
    "red": (214, 40, 40),
    "green": (46, 150, 60),
    "blue": (38, 84, 210),
    "yellow": (240, 205, 30),
    "purple": (136, 50, 168),
    "orange": (244, 128, 20),
}
_BACKGROUND_RGB = {"white": (250, 250, 250), "gray": (205, 208, 212), "cream": (245, 236, 214)}
_INK = (20, 20, 20)
_FAINT = 0.2  # share of a faint object's own colour
_RADIUS = {"small": 7, "large": 13}

# Three columns by five rows; each group of three characters is a row.
_GLYPHS = {
    "a": ".#. #.# ### #.# #.#", "b": "##. #.# ##. #.# ##.", "c": ".## #.. #.. #.. .##", "e": "### #.. ##. #.. ###",
    "f": "### #.. ##. #.. #..", "i": "### .#. .#. .#. ###", "k": "#.# #.# ##. #.# #.#", "l": "#.. #.. #.. #.. ###",
    "n": "##. #.# #.# #.# #.#", "o": ".#. #.# #.# #.# .#.", "p": "##. #.# ##. #.. #..", "r": "##. #.# ##. #.# #.#",
    "s": ".## #.. .#. ..# ##.", "t": "### .#. .#. .#. .#.", "x": "#.# #.# .#. #.# #.#",
    "0": "### #.# #.# #.# ###", "1": ".#. ##. .#. .#. ###", "2": "### ..# ### #.. ###", "3": "### ..# .## ..# ###",
    "4": "#.# #.# ### ..# ..#", "5": "### #.. ### ..# ###", "6": "### #.. ### #.# ###", "7": "### ..# .#. .#. .#.",
    "8": "### #.# ### #.# ###", "9": "### #.# ### ..# ###",
}  # fmt: skip


def draw_scene(scene: Scene) -> Image.Image:
    """Draw a scene as an RGB image of `IMAGE_SIDE` pixels a side; the same scene gives the same pixels."""
    image = Image.new("RGB", (IMAGE_SIDE, IMAGE_SIDE), _BACKGROUND_RGB[scene.background])
    canvas = ImageDraw.Draw(image)
    jitter = random.Random(scene.jitter_seed)
    if scene.is_chart:
        _draw_chart(canvas, scene)
    for thing in scene.things:
        _draw_thing(canvas, thing, jitter, _BACKGROUND_RGB[scene.background])
    if scene.sign:
        _draw_sign(canvas, scene.sign)
    return image


def encode_scene(scene: Scene, image_format: str = "PNG") -> bytes:
    """Draw a scene and encode it as an image file (`PNG`, `JPEG` or `WEBP`)."""
    buffer = io.BytesIO()
    draw_scene(scene).save(buffer, image_format, quality=92)
    return buffer.getvalue()


def _centre(cell: int) -> tuple[int, int]:
    return (cell % 3) * CELL_SIDE + CELL_SIDE // 2, (cell // 3) * CELL_SIDE + CELL_SIDE // 2


def _draw_thing(
    canvas: ImageDraw.ImageDraw, thing: Thing, jitter: random.Random, background: tuple[int, int, int]
) -> None:
    x, y = _centre(thing.cell)
    x, y = x + jitter.randint(-2, 2), y + jitter.randint(-2, 2)
    radius = _RADIUS[thing.size] + jitter.randint(-1, 1)
    fill = tuple(max(0, min(255, channel + jitter.randint(-14, 14))) for channel in _RGB[thing.colour])
    if thing.faint:
        fill = tuple(round(_FAINT * of + (1 - _FAINT) * under) for of, under in zip(fill, background, strict=True))
    box = (x - radius, y - radius, x + radius, y + radius)
    if thing.shape == "circle":
        canvas.ellipse(box, fill=fill)
    elif thing.shape == "square":
        side = round(radius * 0.85)
        canvas.rectangle((x - side, y - side, x + side, y + side), fill=fill)
    elif thing.shape == "cross":
        arm = max(2, radius // 3)
        canvas.rectangle((x - arm, y - radius, x + arm, y + radius), fill=fill)
        canvas.rectangle((x - radius, y - arm, x + radius, y + arm), fill=fill)
    elif thing.shape == "star":
        radii = (radius * 1.1, radius * 0.45)
        canvas.polygon(_ring(x, y, [radii[point % 2] for point in range(10)]), fill=fill)
    else:
        corners = 3 if thing.shape == "triangle" else 4
        canvas.polygon(_ring(x, y, [radius * 1.1] * corners), fill=fill)


def _ring(x: float, y: float, radii: list[float]) -> list[tuple[float, float]]:
    """Corners around a centre, the first straight up."""
    step = 2 * math.pi / len(radii)
    return [(x + r * math.sin(i * step), y - r * math.cos(i * step)) for i, r in enumerate(radii)]


def _draw_sign(canvas: ImageDraw.ImageDraw, sign: Sign) -> None:
    x, y = _centre(sign.cell)
    scale = 2 if sign.text.isalpha() else 4 if len(sign.text) == 1 else 3
    width = (4 * len(sign.text) - 1) * scale
    left, top = x - width // 2, y - 5 * scale // 2
    plate = (max(left - 3, x - 16), top - 3, min(left + width + 2, x + 15), top + 5 * scale + 2)
    canvas.rectangle(plate, fill=(255, 255, 255), outline=(120, 120, 120))
    for position, letter in enumerate(sign.text):
        for row, dots in enumerate(_GLYPHS[letter].split()):
            for column, dot in enumerate(dots):
                if dot == "#":
                    px, py = left + (4 * position + column) * scale, top + row * scale
                    canvas.rectangle((px, py, px + scale - 1, py + scale - 1), fill=_INK)


def _draw_chart(canvas: ImageDraw.ImageDraw, scene: Scene) -> None:
    base, unit, left = 90, 16, 8
    for level in range(1, len(BAR_HEIGHTS) + 1):
        canvas.line((left, base - level * unit, IMAGE_SIDE - 4, base - level * unit), fill=(165, 165, 165))
    width = (IMAGE_SIDE - left - 4) // len(scene.bars)
    for position, bar in enumerate(scene.bars):
        x = left + position * width + 4
        canvas.rectangle((x, base - bar.height * unit, x + width - 7, base), fill=_RGB[bar.colour])
    canvas.line((left, 6, left, base), fill=_INK, width=2)
    canvas.line((left, base, IMAGE_SIDE - 4, base), fill=_INK, width=2)
