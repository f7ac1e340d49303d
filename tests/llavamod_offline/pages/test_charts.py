"""Charts: lengths and shares are to scale, names are escaped."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

from llavamod_offline.pages.charts import CURVE_SCRIPTS, CURVE_STYLES, curves, histograms
from tests.llavamod_offline.pages.test_page import HOSTILE, Parsed, render_body


def test_bars_begin_at_zero_and_are_in_proportion(tmp_path: Path) -> None:
    rows = [("a", 2.0, "2"), ("b", 1.0, "1"), (HOSTILE, 0.0, HOSTILE), ("c", None, "–")]
    body = "{{ parts.bars(text, rows, 2.0, text, [(text, 0.5, '½')]) }}"
    drawn = render_body(tmp_path, body, rows=rows, text=HOSTILE)
    assert re.findall(r"width:([\d.]+)%", drawn) == ["100.00", "50.00", "0.00", "0.00"]
    assert re.findall(r"left:([\d.]+)%", drawn) == ["25.00"] * 4
    page = Parsed(drawn)
    assert (page.loads, page.handlers) == ([], [])
    assert "script" not in [tag for tag, _ in page.tags]
    assert page.text.count(HOSTILE) == 4  # title, note, name and text


def test_histograms_are_on_one_scale_of_shares(tmp_path: Path) -> None:
    series = {"a": ([3, 1, 0], "mean 1"), HOSTILE: ([2, 2, 4], HOSTILE), "none": ([0, 0, 0], "")}
    panels = histograms((0.0, 0.5, 2.0, math.inf), series)
    drawn = render_body(tmp_path, "{{ parts.histograms('title', 'note', panels) }}", panels=panels)
    # The tallest column is a's 75 %; empty bins draw nothing.
    assert re.findall(r"height:([\d.]+)%", drawn) == ["100.0", "33.3", "33.3", "33.3", "66.7"]
    assert re.findall(r'title="([^"]*)"', drawn)[:3] == ["0 to 0.5: 75.0%", "0.5 to 2: 25.0%", "2 or more: 0.0%"]
    assert (Parsed(drawn).loads, Parsed(drawn).handlers) == ([], [])


def test_curves_leave_out_what_is_not_finite(tmp_path: Path) -> None:
    chart = curves(HOSTILE, "nats", {HOSTILE: [(0, 1.0), (1, math.nan), (2, 0.0)], "b": [(3, 5.0)]}, colours=[4, 0])
    assert chart["steps"] == [0, 2, 3]
    assert [line["values"] for line in chart["series"]] == [[1.0, 0.0, None], [None, None, 5.0]]
    charts = [chart, curves("empty", "nats", {"a": []})]
    drawn = render_body(
        tmp_path, "{{ parts.curves(charts) }}", charts=charts, styles=CURVE_STYLES, scripts=CURVE_SCRIPTS
    )
    page = Parsed(drawn)
    assert (page.loads, page.handlers, [tag for tag, _ in page.tags].count("script")) == ([], [], 1)
    (shown,) = [attrs["data-chart"] for _, attrs in page.tags if "data-chart" in attrs]
    assert json.loads(shown or "") == chart
    assert "nothing was logged" in page.text


def test_what_falls_by_decades_is_drawn_on_a_logarithmic_scale() -> None:
    falling, level = {"a": [(1, 3.0)], "b": [(2, 0.3)]}, {"a": [(1, 3.0), (2, 0.4)]}
    assert curves("loss", "nats", falling, decades=True)["log"]
    assert not curves("loss", "nats", level, decades=True)["log"]
    assert not curves("loss", "nats", {"a": [(1, 3.0), (2, 0.0)]}, decades=True)["log"]
    assert not curves("loss", "nats", {"a": []}, decades=True)["log"]
    assert not curves("tokens", "per second", falling)["log"]


def test_a_table_names_its_columns_in_every_cell_and_its_rows_by_colour(tmp_path: Path) -> None:
    """On a phone, a row becomes a block of lines, each labelled with its column's name."""
    body = "{{ parts.table(header, rows, coloured=true) }}"
    page = Parsed(render_body(tmp_path, body, header=["run", HOSTILE], rows=[["a", "1"], ["b", "2"]]))
    assert [attrs.get("data-label") for tag, attrs in page.tags if tag == "td"] == [None, HOSTILE, None, HOSTILE]
    colours = [attrs["style"] for _, attrs in page.tags if attrs.get("class") == "key"]
    assert colours == ["--colour: var(--series-0)", "--colour: var(--series-1)"]
