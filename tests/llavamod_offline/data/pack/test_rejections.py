"""The reason that most rejections share is given in one line."""

from __future__ import annotations

import io
import json

from llavamod_offline.data.pack.rejections import Rejections
from llavamod_offline.data.rows import RejectedRow


def rejections(*reasons: str, image: str = "") -> Rejections:
    found = Rejections(io.StringIO())
    for row, reason in enumerate(reasons):
        found.add(RejectedRow("k", "missing image", reason, "rows.json", row, image))
    return found


def advise(missing: object) -> str:
    return f"try {missing}"


def test_the_reason_of_most() -> None:
    """Reasons that differ only in names and numbers count as one."""
    many = [f"image '{number}.jpg': {number} bytes, more than 7" for number in range(3)]
    assert rejections().diagnosis(advise) == ""
    assert rejections(*many, "empty").diagnosis(advise) == f"most for one reason, as in rows.json row 0: {many[0]}"
    assert rejections("empty", *many).diagnosis(advise) == f"most for one reason, as in rows.json row 1: {many[0]}"
    assert rejections(*many).diagnosis(advise) == f"all for one reason, as in rows.json row 0: {many[0]}"
    assert rejections("empty", "cut short", *many[:2]).diagnosis(advise) == "the first: rows.json row 0: empty"


def test_advice_for_missing_images() -> None:
    found = rejections("image 'a': no such file", "image 'b': no such file", image="a")
    assert found.diagnosis(advise).endswith("no such file: try ['a', 'a']")
    assert found.diagnosis(lambda missing: "").endswith("no such file")


def test_the_list() -> None:
    stream = io.StringIO()
    found = Rejections(stream)
    found.add(RejectedRow("k", "missing image", "no \ud800", "rows.json", 0, "a.jpg"))
    found.add(RejectedRow("l", "malformed row", "no", "rows.json", 1))
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [line.get("image") for line in lines] == ["a.jpg", None]
    assert found.kinds == {"missing image": 1, "malformed row": 1}
