"""Pictures made smaller while packing, where that is asked for."""

from __future__ import annotations

import io
from dataclasses import replace
from typing import Any

from PIL import Image

from llavamod_offline.data.images import decode_image, image_size
from llavamod_offline.data.sample import Sample, Size

# Near enough to lossless that a vision tower's pixels differ by resizing alone; the same bytes from the same Pillow.
_ENCODINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    "png": ("PNG", {}),
    "webp": ("WEBP", {"quality": 95, "method": 4}),
}


def shrink_sample(sample: Sample, max_side: int) -> tuple[Sample, tuple[Size | None, ...]]:
    """Re-encode those images of a sample that have a side longer than `max_side` pixels; the others keep their bytes.

    Gives the sample, and the (width, height) that each image had if it was re-encoded, else None. An image keeps its
    format; it is decoded as everywhere (see `images.py`), so that its orientation and transparency are settled.
    """
    shrunk = [
        shrink_image(image, extension, max_side)
        for image, extension in zip(sample.images, sample.image_extensions, strict=True)
    ]
    if not any(size for _, size in shrunk):
        return sample, ()
    return replace(sample, images=tuple(image for image, _ in shrunk)), tuple(size for _, size in shrunk)


def shrink_image(encoded: bytes, extension: str, max_side: int) -> tuple[bytes, Size | None]:
    """One image, and the size that it had if it was made smaller."""
    width, height = image_size(encoded, name=extension)
    if max(width, height) <= max_side:
        return encoded, None
    scale = max_side / max(width, height)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    smaller = decode_image(encoded, name=extension).resize(size, Image.Resampling.LANCZOS)
    kind, settings = _ENCODINGS[extension]
    stream = io.BytesIO()
    smaller.save(stream, format=kind, **settings)
    return stream.getvalue(), (width, height)
