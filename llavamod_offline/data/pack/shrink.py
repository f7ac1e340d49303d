"""Shrink large images while packing, if requested."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

from PIL import Image

from llavamod_offline.data.images import decode_image, image_size
from llavamod_offline.data.sample import Sample, Size

# Nearly lossless, so that a vision tower's pixels differ by resizing only; deterministic for one version of Pillow.
_ENCODINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    "png": ("PNG", {}),
    "webp": ("WEBP", {"quality": 95, "method": 4}),
}


def shrink_sample(sample: Sample, max_side: int) -> tuple[Sample, tuple[Size | None, ...]]:
    """Re-encode a sample's images with a side longer than `max_side` pixels; the others keep their bytes.

    Result: the sample, and each image's original (width, height), None if unchanged. An image keeps its format;
    decoding (see `images.py`) applies its orientation and transparency.
    """
    named = [f"{sample.key}.{number}" for number in range(len(sample.images))]
    shrunk = [
        shrink_image(image, extension, max_side, name=name)
        for image, extension, name in zip(sample.images, sample.image_extensions, named, strict=True)
    ]
    if not any(size for _, size in shrunk):
        return sample, ()
    return replace(sample, images=tuple(image for image, _ in shrunk)), tuple(size for _, size in shrunk)


def shrink_image(encoded: bytes, extension: str, max_side: int, *, name: str) -> tuple[bytes, Size | None]:
    """One image, and its original size if it was shrunk. `name`: for errors, which are those of `decode_image`."""
    width, height = image_size(encoded, name=name, max_side=max_side)
    if max(width, height) <= max_side:
        return encoded, None
    scale = max_side / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    smaller = decode_image(encoded, name=name, max_side=max_side).resize(size, Image.Resampling.LANCZOS)
    kind, settings = _ENCODINGS[extension]
    stream = io.BytesIO()
    smaller.save(stream, format=kind, **settings)
    return stream.getvalue(), (width, height)
