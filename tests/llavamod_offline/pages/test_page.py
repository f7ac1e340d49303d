"""Pages: text stays text, nothing is fetched, no script but the page's own runs, images are inlined."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from jinja2 import UndefinedError
from PIL import Image

from llavamod_offline.errors import DataError
from llavamod_offline.pages.page import data_uri, render, thumbnail
from tests.tiny import tiny_image

HOSTILE = "</script><script>alert(1)</script><img src=//evil.example onerror=alert(1)>\"'&\u2028"


class Parsed(HTMLParser):
    """What a browser would make of a page: tags with attributes, and the text of its scripts and elsewhere."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[str | None, str]] = []
        self.text = ""
        self._script: str | bool | None = False
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._script = dict(attrs).get("type") if tag == "script" else False

    def handle_data(self, data: str) -> None:
        if self._script is False:
            self.text += data
        else:
            assert not isinstance(self._script, bool)
            self.scripts.append((self._script, data))

    def handle_endtag(self, tag: str) -> None:
        self._script = False

    @property
    def loads(self) -> list[str]:
        """What the page would fetch: every source or link target that is neither inlined nor within the page."""
        values = [attrs.get(name) or "" for _, attrs in self.tags for name in ("src", "href", "data", "action")]
        return [value for value in values if value and not value.startswith(("data:image/", "#"))]

    @property
    def handlers(self) -> list[str]:
        """Attributes that would run a script."""
        return [name for _, attrs in self.tags for name in attrs if name.startswith("on")]


def render_body(folder: Path, body: str, **values: Any) -> str:
    """A page whose body is a piece of template."""
    template = folder / "page.html.jinja"
    template.write_text(
        '{% extends "base.html.jinja" %}{% import "parts.html.jinja" as parts %}{% block body %}'
        + body
        + "{% endblock %}"
    )
    return render(template, **{"title": "a", "lead": "b", **values})


def test_text_stays_text_and_only_the_pages_own_script_may_run(tmp_path: Path) -> None:
    script = "document.title = 'it runs';"
    (tmp_path / "own.js").write_text(script)
    body = (
        "<h2>{{ text }}</h2>{{ parts.table([text], [[text]]) }}{{ parts.tiles({text: text}) }}"
        '<script type="application/json" id="data">{{ {text: [text]}|tojson }}</script>'
    )
    page = Parsed(render_body(tmp_path, body, scripts=["own.js"], title=HOSTILE, lead=HOSTILE, text=HOSTILE))
    assert (page.loads, page.handlers) == ([], [])
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert [(kind, text) for kind, text in page.scripts if kind is None] == [(None, script)]
    ((_, data),) = [each for each in page.scripts if each[0] == "application/json"]
    assert json.loads(data) == {HOSTILE: [HOSTILE]}
    assert page.text.count(HOSTILE) == 8
    policy = next(attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert "script-src 'none'" in render_body(tmp_path, "")
    with pytest.raises(UndefinedError, match="missing"):
        render_body(tmp_path, "{{ missing }}")


def test_a_thumbnail_is_small_and_keeps_the_images_size() -> None:
    uri, size = thumbnail(tiny_image(0, (640, 200)), name="wide", side=320)
    assert size == (640, 200)
    head, data = uri.split(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (320, 100)
    encoded = tiny_image(1, (24, 16))
    uri, size = thumbnail(encoded, name="little")
    assert uri.startswith("data:image/png;base64,")
    small = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    assert (small.size, small.tobytes()) == (size, Image.open(io.BytesIO(encoded)).tobytes())
    assert data_uri(encoded) == f"data:image/png;base64,{base64.b64encode(encoded).decode()}"
    with pytest.raises(DataError, match="'no image'"):
        thumbnail(b"nothing", name="no image")
