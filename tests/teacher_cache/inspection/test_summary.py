"""`inspect`: histograms against plain counting, and tables that fit 80 columns and print their content literally."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.errors import CacheError
from llavamod_offline.losses.targets import EMPTY_ID
from teacher_cache.ask.compare import recorded_role
from teacher_cache.inspection import terminal as tables
from teacher_cache.inspection.summary import ENTROPY_EDGES, TOPK_MASS_EDGES, describe_cache, describe_key
from teacher_cache.read.reader import open_cache
from tests.teacher_cache.conftest import World
from tests.tiny import tiny_samples, write_tiny_set


def _counted(values: list[float], edges: tuple[float, ...]) -> list[int]:
    """How many values lie in each bin, the last including its upper edge, counted one by one."""
    counts = [0] * (len(edges) - 1)
    for value in values:
        below = [number for number in range(len(counts)) if edges[number] <= value]
        counts[below[-1] if below else 0] += 1
    return counts


def test_histograms_count_every_position(finished: Path) -> None:
    cache = open_cache(finished)
    found = describe_cache(cache)["histograms"]
    records = cache.records([(key, "response") for key in sorted(cache.keys("response"))])
    masses = [1.0 - math.exp(value) for value in records.tail_log_mass_N.tolist()]
    assert found["topk_mass"]["counts"] == _counted(masses, TOPK_MASS_EDGES)
    assert found["entropy"]["counts"] == _counted(records.entropy_N.tolist(), ENTROPY_EDGES)
    assert found["topk_mass"]["mean"] == pytest.approx(np.mean(masses))
    assert (found["sequences"], found["of_sequences"], found["positions"]) == (24, 24, cache.positions)
    assert sum(found["entropy"]["counts"]) == cache.positions
    assert json.loads(json.dumps(found))["entropy"]["edges"][-1] is None


def test_a_large_cache_is_sampled_evenly_and_says_so(finished: Path) -> None:
    cache = open_cache(finished)
    about = describe_cache(cache, sample_positions=cache.positions // 4)
    found = about["histograms"]
    assert found["sequences"] == 6
    keys = sorted(cache.keys("response"))[::4]  # keys are numbered in the order of the set
    records = cache.records([(key, "response") for key in keys])
    assert found["positions"] == len(records)
    assert found["entropy"]["counts"] == _counted(records.entropy_N.tolist(), ENTROPY_EDGES)
    assert "6 evenly spaced of 24 sequences" in _printed(tables.print_cache, about)


def _printed(function: Any, *arguments: Any, terminal: bool = False, width: int = 80) -> str:
    stream = io.StringIO()
    console = Console(
        file=stream, width=width, force_terminal=terminal, highlight=False, markup=False, emoji=False, _environ={}
    )
    function(console, *arguments)
    return stream.getvalue()


def test_pipes_get_plain_text_and_terminals_colour(finished: Path) -> None:
    about = describe_cache(open_cache(finished))
    plain, coloured = (_printed(tables.print_cache, about, terminal=terminal) for terminal in (False, True))
    assert "\x1b" not in plain
    assert "\x1b[" in coloured
    for text in (about["digest"], "capture.top_p", "0.97", "qwen", "float32", f"{about['positions']:,} positions"):
        assert text in plain


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("width", [80, 132])
def test_no_line_is_wider_than_the_terminal(world: World, finished: Path, terminal: bool, width: int) -> None:
    cache = open_cache(finished)
    for text in (
        _printed(tables.print_cache, describe_cache(cache), terminal=terminal, width=width),
        _printed(tables.print_sequences, describe_key(cache, "tiny-0002", _long_name), terminal=terminal, width=width),
    ):
        lines = Console(width=500).render_str(text).plain if not terminal else _without_colour(text)
        assert max(cell_len(line) for line in lines.splitlines()) <= width


def _long_name(number: int) -> str:
    return f"'[red]token[/red] {'x' * (number % 30)} 色色'"


def _without_colour(text: str) -> str:
    import re

    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_tokens_are_printed_as_they_are(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing in a token is interpreted as markup or an emoji's name."""
    sequences = describe_key(open_cache(finished), "tiny-0003", lambda number: f"[b]:cat:{number}")
    tables.print_sequences(tables.make_console(), sequences)
    assert f"[b]:cat:{sequences[0]['tokens'][0]['id']} " in capsys.readouterr().out


def test_a_key_shows_topk_ids_and_tail_samples(finished: Path) -> None:
    cache = open_cache(finished)
    (sequence,) = describe_key(cache, "tiny-0000", lambda number: f"#{number}")
    targets = cache.targets([("tiny-0000", "response")])
    assert len(sequence["tokens"]) == len(targets) == 8
    for row, token in enumerate(sequence["tokens"]):
        head = [number for number in targets.topk_ids_NK[row].tolist() if number != EMPTY_ID]
        assert [entry["id"] for entry in token["topk"]] == head
        drawn = {number for number in targets.tail_ids_NM[row].tolist() if number != EMPTY_ID}
        assert {entry["id"] for entry in token["tail_samples"]} == drawn
        assert len(token["tail_samples"]) == len(drawn)
        mass = sum(math.exp(entry["log_prob"]) for entry in token["topk"]) + token["tail_mass"]
        assert mass == pytest.approx(1.0, abs=1e-5)
        assert sum(entry["mass"] for entry in token["tail_samples"]) == pytest.approx(token["tail_mass"])
    text = _printed(tables.print_sequences, [sequence], width=120)
    first = sequence["tokens"][0]
    assert f"{first['topk'][0]['token']} {math.exp(first['topk'][0]['log_prob']):.3f}" in text
    assert f"{first['tail_samples'][0]['token']} {first['tail_samples'][0]['mass']:.3f}" in text
    assert f"{first['tail_mass']:.4f}" in text


def test_a_key_may_be_given_as_the_id_of_the_data_set(world: World, tmp_path: Path) -> None:
    """As in the rows, although a cache stores it with `/` and dots escaped."""
    write_set([replace(tiny_samples(1)[0], key="coco_x2Fa_x2Ejpg")], tmp_path / "set")
    world.run(tmp_path / "cache", data=tmp_path / "set")
    cache = open_cache(tmp_path / "cache")
    for given in ("coco/a.jpg", "coco_x2Fa_x2Ejpg"):
        (sequence,) = describe_key(cache, given, str)
        assert sequence["key"] == "coco_x2Fa_x2Ejpg"
        assert recorded_role(cache, given) == ("coco_x2Fa_x2Ejpg", "response")
    with pytest.raises(CacheError, match=r"no record of sample 'coco/b\.jpg'"):
        describe_key(cache, "coco/b.jpg", str)


def test_positions_without_a_token_are_shown(world: World, tmp_path: Path) -> None:
    world.run(tmp_path / "cache", "capture.positions=all", data=write_tiny_set(tmp_path / "set", 2))
    cache = open_cache(tmp_path / "cache")
    (sequence,) = describe_key(cache, "tiny-0000", lambda number: f"#{number}")
    assert len(sequence["tokens"]) == sequence["n_tokens"]
    supervised = [token["id"] for token in sequence["tokens"] if token["id"] >= 0]
    assert supervised == cache.target_ids("tiny-0000", "response").tolist()
    assert "8 supervised of" in _printed(tables.print_sequences, [sequence])
    json.dumps(sequence, allow_nan=False)
    json.dumps(describe_cache(cache), allow_nan=False)
