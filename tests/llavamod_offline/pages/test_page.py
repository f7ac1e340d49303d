"""Pages: text stays text, nothing is loaded, no script runs but the page's own, images are inlined."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from html.parser import HTMLParser

import pytest
from PIL import Image

from llavamod_offline.errors import DataError
from llavamod_offline.pages.page import html_page, html_table, json_block, picture, thumbnail, tiles
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
        """What the page would fetch: every source and target that is neither inlined nor in the page."""
        values = [attrs.get(name) or "" for _, attrs in self.tags for name in ("src", "href", "data", "action")]
        return [value for value in values if value and not value.startswith(("data:image/", "#"))]

    @property
    def handlers(self) -> list[str]:
        """Attributes that would run something."""
        return [name for _, attrs in self.tags for name in attrs if name.startswith("on")]


def test_text_stays_text_and_only_the_pages_own_script_may_run() -> None:
    script = "document.title = 'it runs';"
    sections = [(HOSTILE, html_table([HOSTILE], [[HOSTILE]]) + tiles({HOSTILE: HOSTILE}))]
    page = Parsed(
        html_page(HOSTILE, HOSTILE, [*sections, ("Data", json_block("data", {HOSTILE: [HOSTILE]}))], script=script)
    )
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
    assert "script-src 'none'" in html_page("a", "b", [])


def test_a_thumbnail_is_small_and_knows_the_pictures_size() -> None:
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
    assert base64.b64encode(encoded).decode() in picture(encoded, description="it")
    with pytest.raises(DataError, match="'no picture'"):
        thumbnail(b"nothing", name="no picture")
