"""Images as rows name or hold them: paths, bytes, `{bytes, path}` structs, data URLs, and lists of those."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llavamod_offline.data.images import image_extension
from llavamod_offline.data.rows import RowError
from llavamod_offline.errors import DataError

ReadImage = Callable[[str], bytes]

SOURCES = ("bytes", "base64", "path", "url", "image", "file_name")  # fields of a struct, the most reliable first


@dataclass(frozen=True)
class RowImage:
    """An image of a row: its name, as in the row, and its bytes if the row holds them."""

    name: str
    content: bytes | None = None


def row_images(value: Any, field: str) -> tuple[RowImage, ...]:
    """The images of a field, in order; none if it is missing or empty. Errors: `RowError` naming the field."""
    if value is None:
        return ()
    return tuple(_image(each, field) for each in (value if isinstance(value, list | tuple) else [value]))


def load_images(images: Iterable[RowImage], read_image: ReadImage) -> tuple[bytes, ...]:
    """The bytes of images, read by name where the row does not hold them. Errors: those of `read_image`."""
    return tuple(read_image(image.name) if image.content is None else image.content for image in images)


def image_extensions(
    contents: Iterable[bytes], images: Iterable[RowImage], max_side: int | None = None
) -> tuple[str, ...]:
    """Decode images and return their formats. `max_side`: see `decode_image`. Errors: `RowError` naming the image."""
    found = []
    for content, image in zip(contents, images, strict=True):
        try:
            found.append(image_extension(content, name=image.name, max_side=max_side))
        except DataError as error:
            raise RowError("undecodable image", str(error), image.name if image.content is None else "") from error
    return tuple(found)


def _image(value: Any, field: str) -> RowImage:
    if isinstance(value, bytes):
        return RowImage("image", value)
    if isinstance(value, str):
        return _from_data_url(value, field) if value.startswith("data:") else RowImage(value.removeprefix("file://"))
    if isinstance(value, Mapping):
        return _from_struct(value, field)
    raise RowError("malformed row", f"field '{field}' must hold paths, bytes, or objects with 'path' or 'bytes'")


def _from_struct(value: Mapping[str, Any], field: str) -> RowImage:
    names = [value[field] for field in ("path", "file_name") if isinstance(value.get(field), str) and value[field]]
    name = names[0] if names else "image"
    source = next((source for source in SOURCES if value.get(source) is not None), None)
    if source is None:
        raise RowError("missing image", f"field '{field}' holds no bytes and no path")
    content = value[source]
    if source == "bytes" and isinstance(content, bytes):
        return RowImage(name, content)
    if source in ("bytes", "base64") and isinstance(content, str):
        return RowImage(name, _from_base64(content, field))
    return _image(content, field)


def _from_data_url(url: str, field: str) -> RowImage:
    head, comma, content = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise RowError("malformed row", f"field '{field}' has a data URL that is not base64")
    return RowImage("image", _from_base64(content, field))


def _from_base64(content: str, field: str) -> bytes:
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RowError("undecodable image", f"field '{field}' is not valid base64: {error}") from error
