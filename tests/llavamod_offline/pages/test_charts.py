"""Charts: lengths and shares are honest, names are escaped."""

from __future__ import annotations

import math
import re

from llavamod_offline.pages.charts import BarPanel, bar_list, bar_panels, histograms, line_chart
from tests.llavamod_offline.pages.test_page import HOSTILE, Parsed


def test_bars_begin_at_zero_and_are_in_proportion() -> None:
    bars = [("a", 2.0, "2"), ("b", 1.0, "1"), (HOSTILE, 0.0, HOSTILE)]
    drawn = bar_list(HOSTILE, bars)
    assert re.findall(r"width:([\d.]+)%", drawn) == ["100.00", "50.00", "0.00"]
    assert (Parsed(drawn).loads, Parsed(drawn).handlers) == ([], [])
    panel = BarPanel(HOSTILE, "note", [("a", 1.0, "1"), ("b", 0.5, "½"), ("c", None, "–")], 1.0, [("mark", 0.5, "½")])
    drawn = bar_panels("label", [panel])
    assert re.findall(r'<rect x="8" y="\d+" width="([\d.]+)"', drawn) == ["210.0", "105.0", "0.0"]
    assert 'x1="113.0"' in drawn
    assert "script" not in [tag for tag, _ in Parsed(drawn).tags]


def test_histograms_are_on_one_scale_of_shares() -> None:
    series = {"a": ([3, 1, 0], "mean 1"), HOSTILE: ([2, 2, 4], HOSTILE), "none": ([0, 0, 0], "")}
    drawn = histograms("title", "note", (0.0, 0.5, 2.0, math.inf), series)
    # The tallest column is the 75 % of a; nothing is drawn for nothing.
    assert re.findall(r"height:([\d.]+)%", drawn) == ["100.0", "33.3", "33.3", "33.3", "66.7"]
    assert re.findall(r'title="([^"]*)"', drawn)[:3] == ["0 to 0.5: 75.0%", "0.5 to 2: 25.0%", "2 and more: 0.0%"]
    assert (Parsed(drawn).loads, Parsed(drawn).handlers) == ([], [])


def test_curves_leave_out_what_is_not_finite() -> None:
    drawn = line_chart("loss", {"a": [(0, 1.0), (1, math.nan), (2, 0.0)]}, x_label="step")
    (points,) = re.findall(r'points="([^"]*)"', drawn)
    assert points.count(",") == 2
    assert "nothing was logged" in line_chart("loss", {"a": []}, x_label="step")
