"""The size of an image from its header: what decoding would give, without decoding."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import pytest
from PIL import Image, PngImagePlugin

from llavamod_offline.data.images import decode_image, image_size
from llavamod_offline.errors import DataError
from tests.tiny import tiny_image

_KINDS = ("JPEG", "PNG", "WEBP")


def _encode(kind: str, size: tuple[int, int] = (32, 17), mode: str = "RGB", **settings: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, format=kind, **settings)
    return buffer.getvalue()


def _turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("orientation", range(10))
def test_the_size_is_the_decoded_ones(kind: str, orientation: int) -> None:
    for encoded in (_encode(kind, exif=_turned(orientation)), _encode(kind)):
        assert image_size(encoded, name="x") == decode_image(encoded, name="x").size
    assert image_size(_encode(kind, exif=_turned(6)), name="x") == (17, 32)


def _with_chunk_at_the_end(encoded: bytes, name: bytes, content: bytes) -> bytes:
    chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return encoded[:-12] + chunk + encoded[-12:]


def test_a_png_may_say_at_its_end_how_it_is_turned() -> None:
    exif = _turned(8).tobytes().removeprefix(b"Exif\0\0")
    raw = b"Raw profile type exif\0\0\nexif\n      " + str(len(exif)).encode() + b"\n" + exif.hex().encode() + b"\n"
    packet = b'<x:xmpmeta><rdf:Description tiff:Orientation="5"/></x:xmpmeta>'
    xmp = b"XML:com.adobe.xmp\0\0\0\0\0" + packet
    for name, content in ((b"eXIf", exif), (b"tEXt", raw.replace(b"exif\0\0\n", b"exif\0\n")), (b"iTXt", xmp)):
        encoded = _with_chunk_at_the_end(_encode("PNG"), name, content)
        assert decode_image(encoded, name="x").size == (17, 32), name
        assert image_size(encoded, name="x") == (17, 32), name


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "I;16"])
def test_the_mode_does_not_matter(mode: str) -> None:
    assert image_size(_encode("PNG", mode=mode), name="x") == (32, 17)


def test_text_in_a_png_says_nothing() -> None:
    about = PngImagePlugin.PngInfo()
    about.add_text("Comment", "eXIf")
    assert image_size(_encode("PNG", pnginfo=about), name="x") == (32, 17)


@pytest.mark.parametrize("kind", _KINDS)
def test_pixels_are_not_read(kind: str) -> None:
    whole = tiny_image(3, (300, 200), kind)
    assert image_size(whole[: len(whole) * 3 // 4] if kind != "WEBP" else whole, name="x") == (300, 200)


@pytest.mark.parametrize(
    ("encoded", "problem"),
    [
        (b"", "is empty"),
        (b"GIF89a" + bytes(50), "not a JPEG, PNG or WebP file"),
        (_encode("PNG", (9001, 50)), "9001×50 pixels, more than 9000 a side"),
        (_encode("PNG", (1, 300)), "1×300 pixels, longer than 200:1"),
    ],
)
def test_what_decoding_refuses_by_the_header_is_refused(encoded: bytes, problem: str) -> None:
    for read in (image_size, decode_image):
        with pytest.raises(DataError, match=rf"image 'x': {problem}"):
            read(encoded, name="x")
