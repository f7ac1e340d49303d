"""Every kind of image has one outcome, the same in packing, capture and training."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from llavamod_offline.data.images import ImagePreprocessor, decode_image, image_extension, image_size
from llavamod_offline.data.parse.row_formats import row_to_sample
from llavamod_offline.data.rows import RowError
from llavamod_offline.errors import DataError
from tests.llavamod_offline.data.sources.hostile import bomb, gif
from tests.tiny import tiny_image, write_image_processor

RED, WHITE, BLUE = (255, 0, 0), (255, 255, 255), (0, 0, 255)


def encode(image: Image.Image, kind: str = "PNG", **settings: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format=kind, **settings)
    return stream.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(Image.new("RGB", (8, 4), RED), exif=exif)


def palette(**settings: Any) -> bytes:
    image = Image.new("P", (4, 4))
    image.putpalette([*RED, *BLUE])
    return encode(image, **settings)


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    return encode(
        frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {})
    )


JPG = tiny_image(0, (40, 40), "JPEG")
CMYK = encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)
SIXTEEN = encode(Image.fromarray(np.full((4, 4), 0x80FF, np.uint16)))

# Kind → the image and its format, size and upper left pixel, or words of the reason why it is refused.
OUTCOMES: dict[str, tuple[bytes, tuple[str, tuple[int, int], tuple[int, int, int]] | str]] = {
    "RGB": (encode(Image.new("RGB", (4, 2), RED)), ("png", (4, 2), RED)),
    "1x1": (encode(Image.new("RGB", (1, 1), RED)), ("png", (1, 1), RED)),
    "CMYK": (CMYK, ("jpg", (8, 8), RED)),
    "palette": (palette(), ("png", (4, 4), RED)),
    "palette with a transparent colour": (palette(transparency=0), ("png", (4, 4), WHITE)),
    "grey with transparency": (encode(Image.new("LA", (4, 4), (0, 0))), ("png", (4, 4), WHITE)),
    "black and white": (encode(Image.new("1", (4, 4), 1)), ("png", (4, 4), WHITE)),
    "16 bits": (SIXTEEN, ("png", (4, 4), (0x80, 0x80, 0x80))),
    "EXIF rotation": (turned(), ("png", (4, 8), RED)),
    "animated PNG": (animated("PNG"), ("png", (4, 4), RED)),
    "animated WebP": (animated("WEBP"), ("webp", (4, 4), RED)),
    "animated GIF": (gif(), "not a JPEG, PNG or WebP file: convert it"),
    "decompression bomb": (bomb(), "shrink it"),
    "a side of 9,001": (bomb(9_001, 9_001), "more than 9000 a side: shrink it"),
    "a line": (bomb(201, 1), "crop it"),
    "truncated JPEG": (JPG[: len(JPG) // 2], "cannot be decoded"),
    "truncated PNG": (tiny_image(1, (90, 90))[:-30], "cannot be decoded"),
    "empty": (b"", "is empty"),
    "text": (b"hello", "not a JPEG, PNG or WebP file"),
}


@pytest.mark.parametrize("kind", OUTCOMES)
def test_outcome(tmp_path: Path, kind: str) -> None:
    encoded, outcome = OUTCOMES[kind]
    write_image_processor(tmp_path)
    preprocessor = ImagePreprocessor.from_checkpoint(tmp_path)
    said = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "That."}]
    row = {"image": "x", "conversations": said}

    def pack() -> str:
        sample = row_to_sample(row, key="k", source="", read_image=lambda name: encoded)
        return sample.image_extensions[0]

    if isinstance(outcome, str):
        with pytest.raises(DataError, match=outcome):
            decode_image(encoded, name="x")
        with pytest.raises(RowError, match=outcome) as caught:
            pack()
        assert caught.value.kind == "undecodable image"
        with pytest.raises(DataError, match=outcome):
            preprocessor.pixels(encoded, name="x")
        return
    extension, size, colour = outcome
    image = decode_image(encoded, name="x")
    assert (image.mode, image.size, image_size(encoded, name="x")) == ("RGB", size, size)
    assert np.abs(np.asarray(image)[0, 0].astype(int) - colour).max() <= (6 if kind == "CMYK" else 0)
    assert extension == image_extension(encoded, name="x") == pack()
    plain = encode(image)
    assert np.array_equal(preprocessor.pixels(encoded, name="x"), preprocessor.pixels(plain, name="x"))
