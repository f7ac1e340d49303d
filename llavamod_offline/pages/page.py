"""Self-contained HTML pages from Jinja2 templates: style, script, data and images are inlined, nothing is fetched.

Templates escape text; `tojson` keeps data from ending its script block. A page's security policy allows
only its own script, by hash.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

THUMBNAIL_SIDE = 320
_LOSSLESS_SIDE = 96  # smaller images are stored losslessly
_HERE = Path(__file__).parent


def render(template: Path, *, styles: Sequence[str] = (), scripts: Sequence[str] = (), **values: Any) -> str:
    """Render a template that extends `base.html.jinja`.

    `styles`, `scripts`: names of files to inline, found beside the template or in `assets`.
    """
    loader = FileSystemLoader([template.parent, _HERE / "templates", _HERE / "assets"])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "separators": (",", ":"), "allow_nan": False}
    style, script = (
        "".join(loader.get_source(environment, name)[0] for name in names) for names in (("base.css", *styles), scripts)
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template.name).render(
        style=style, script=script, script_source=f"'sha256-{digest}'" if script else "'none'", **values
    )


def thumbnail(encoded: bytes, *, name: str, side: int = THUMBNAIL_SIDE) -> tuple[str, tuple[int, int]]:
    """A copy of an image with no side longer than `side`, as a data URI, and the original (width, height).

    Errors: `DataError` naming it if it cannot be decoded.
    """
    from llavamod_offline.data.images import decode_image

    image = decode_image(encoded, name=name)
    size = image.size
    image.thumbnail((side, side))
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if max(image.size) <= _LOSSLESS_SIDE else "JPEG", quality=85)
    return data_uri(buffer.getvalue()), size


def data_uri(encoded: bytes) -> str:
    """An image file as a data URI."""
    kind = "png" if encoded.startswith(b"\x89PNG") else "webp" if encoded[8:12] == b"WEBP" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"
