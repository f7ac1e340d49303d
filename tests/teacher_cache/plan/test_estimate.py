"""Plans: what the probe estimates for the whole set, and the comparison with the finished cache."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from llavamod_offline.config import load_config
from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import CacheError, ConfigError, LlavaModError
from teacher_cache.capture.run import run_capture
from teacher_cache.config import CacheTeacherConfig
from teacher_cache.format.sequences import SequenceRecord
from teacher_cache.plan import probe
from teacher_cache.plan.estimate import (
    Plan,
    compare,
    finished_cache,
    make_plan,
    plan_file,
    read_plan,
    record_run,
    write_plan,
)
from teacher_cache.plan.probe import ProbedRun, even_rows
from teacher_cache.plan.tables import print_comparison, print_plan, readable_seconds
from teacher_cache.read.reader import open_cache
from tests.teacher_cache.conftest import World
from tests.tiny import tiny_samples, write_tiny_set


@given(total=st.integers(1, 5000), wanted=st.integers(1, 300))
def test_rows_are_evenly_spaced(total: int, wanted: int) -> None:
    rows = even_rows(total, wanted)
    assert len(rows) == min(total, wanted)
    assert min(rows) >= 0
    assert max(rows) < total
    gaps = np.diff(rows)
    assert len(gaps) == 0 or (gaps.min() >= 1 and gaps.max() - gaps.min() <= 1)


@pytest.fixture(autouse=True)
def _few_presets(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Probe no presets, which takes most of a plan's time, except in the tests about presets."""
    if "preset" not in request.node.name:
        monkeypatch.setattr(probe, "PRESETS", {})


def _config(world: World, output: Path, *overrides: str, data: Path | None = None) -> CacheTeacherConfig:
    return load_config(CacheTeacherConfig, (), world.arguments(output, *overrides, data=data))


def _plan(world: World, output: Path, *overrides: str, data: Path | None = None, **limits: Any) -> Plan:
    return make_plan(_config(world, output, *overrides, data=data), **{"samples": 256, "seconds": 60.0, **limits})


@pytest.mark.parametrize("name", ["samples", "pairs"])
def test_a_probe_of_everything_is_exact_in_number_and_close_in_bytes(world: World, tmp_path: Path, name: str) -> None:
    data = getattr(world, name)
    plan = _plan(world, tmp_path / "cache", data=data)
    assert not (tmp_path / "cache").exists()
    world.run(tmp_path / "cache", data=data)
    cache = open_cache(tmp_path / "cache")
    assert (plan.positions, plan.sequences, plan.rejected) == (cache.positions, len(cache), 0)
    assert plan.positions_error == 0.0
    assert plan.probe["samples"] == plan.samples == len(SampleSet.open(data))
    assert plan.total_bytes == pytest.approx(cache.bytes, rel=0.15)
    fact = compare(str(tmp_path / "cache"), cache, None)
    assert set(plan.bytes) == set(fact.bytes)
    assert sum(fact.bytes.values()) == cache.bytes
    assert plan.bytes["metadata"] == pytest.approx(fact.bytes["metadata"], rel=0.03)
    assert plan.gpu_hours is None
    assert set(plan.seconds) == {"prepare", "load", "capture", "write"}
    assert plan.total_seconds > 0
    assert plan.fingerprint == cache.fingerprint


def test_the_bytes_of_each_preset_are_planned(world: World, tmp_path: Path) -> None:
    plan = _plan(world, tmp_path / "cache", "capture.preset=compact")
    assert plan.presets["compact"] == pytest.approx(plan.total_bytes, rel=0.001)
    assert plan.presets["compact"] < plan.presets["standard"] < plan.presets["exhaustive"]
    for preset, size in plan.presets.items():
        world.run(tmp_path / preset, f"capture.preset={preset}")
        assert size == pytest.approx(open_cache(tmp_path / preset).bytes, rel=0.15)


def test_all_positions_are_planned(world: World, tmp_path: Path) -> None:
    plan = _plan(world, tmp_path / "cache", "capture.positions=all")
    world.run(tmp_path / "cache", "capture.positions=all")
    cache = open_cache(tmp_path / "cache")
    assert plan.positions == cache.positions
    assert plan.total_bytes == pytest.approx(cache.bytes, rel=0.15)


def test_a_few_samples_stand_for_a_large_set(world: World, tmp_path: Path) -> None:
    data = write_tiny_set(tmp_path / "set", 160, shard_samples=40)
    plan = _plan(world, tmp_path / "cache", "batch_size=4", data=data, samples=10)
    world.run(tmp_path / "cache", data=data)
    cache = open_cache(tmp_path / "cache")
    assert plan.probe["samples"] == 10
    assert 0 < plan.positions_error < 0.1
    assert abs(plan.positions / cache.positions - 1) < 3 * plan.positions_error
    assert plan.total_bytes == pytest.approx(cache.bytes, rel=0.2)


def test_a_short_time_captures_one_evenly_spaced_round(world: World, tmp_path: Path) -> None:
    plan = _plan(world, tmp_path / "cache", "batch_size=3", samples=24, seconds=0.0)
    assert plan.probe["samples"] == 12
    world.run(tmp_path / "cache")
    assert plan.positions == pytest.approx(open_cache(tmp_path / "cache").positions, rel=3 * plan.positions_error)


def test_rejections_are_planned(world: World, tmp_path: Path) -> None:
    lengths = sorted(
        open_cache(_captured(world, tmp_path / "all")).sequence(k, "response").n_tokens for k in _keys(world)
    )
    limit = f"max_length={lengths[15]}"
    plan = _plan(world, tmp_path / "cache", limit)
    world.run(tmp_path / "cache", limit)
    cache = open_cache(tmp_path / "cache")
    assert cache.totals["rejected"] > 0
    assert (plan.rejected, plan.sequences, plan.positions) == (cache.totals["rejected"], len(cache), cache.positions)
    with pytest.raises(CacheError, match="none of 24 samples could be captured"):
        _plan(world, tmp_path / "none", "max_length=10")


def _captured(world: World, output: Path) -> Path:
    world.run(output)
    return output


def _keys(world: World) -> list[str]:
    return SampleSet.open(world.samples).keys


def test_what_the_engine_rejects_is_counted_once(world: World, tmp_path: Path) -> None:
    """The engine rejects a broken image; tokenising rejects a preference's long answer."""
    samples = [s for s in tiny_samples(12) if s.images][:8]
    broken = dataclasses.replace(samples[3], images=(b"no image",) * len(samples[3].images))
    write_set([*samples[:3], broken, *samples[4:]], tmp_path / "broken")
    plan = _plan(world, tmp_path / "a", data=tmp_path / "broken")
    assert (plan.rejected, plan.sequences) == (1, 7)
    pairs = [
        Sample(f"p{n}", (Turn("user", "Say it."),), chosen="red.", rejected="red " * (200 if n == 2 else 1))
        for n in range(4)
    ]
    write_set(pairs, tmp_path / "pairs")
    plan = _plan(world, tmp_path / "b", "max_length=150", data=tmp_path / "pairs")
    assert (plan.rejected, plan.sequences) == (1, 7)


def test_the_standard_error_is_that_of_a_mean_over_samples(finished: Path) -> None:
    """Against its formula, with one of five samples rejected and two roles of one sample counted together."""
    records = open_cache(finished).records([("tiny-0001", "response")])
    captured = [
        SequenceRecord(key, role, "", "", 9, records)
        for key, role in (("a", "chosen"), ("a", "rejected"), ("b", "chosen"), ("c", "chosen"), ("d", "chosen"))
    ]
    positions, error = ProbedRun(5, captured, 1, 0.1).positions(20)
    count = len(records)
    assert positions == 5 * count
    values = count * np.array([2, 1, 1, 1, 0])
    assert error == pytest.approx(values.std(ddof=1) / np.sqrt(5) * np.sqrt(15 / 20) / count)
    assert ProbedRun(5, captured, 1, 0.1).positions(5) == (5 * count, 0.0)


def test_a_plan_is_kept_beside_the_cache_and_runs_add_to_it(world: World, tmp_path: Path) -> None:
    output = tmp_path / "caches/one"
    file = plan_file(str(output))
    assert file == tmp_path / "caches/.one.plan.jsonl"
    assert plan_file("s3://bucket/one") is None
    plan = _plan(world, output)
    write_plan(file, plan)
    assert list((tmp_path / "caches").iterdir()) == [file]
    assert read_plan(file) == (plan, [])
    assert finished_cache(str(output)) is None
    summaries = []
    for part in (0, 1):
        summaries.append(run_capture(_config(world, output, f"slice={part}/2")))
        record_run(file, summaries[-1])
    record_run(file, run_capture(_config(world, output)))  # a rerun with nothing left to do
    cache = finished_cache(str(output))
    assert cache is not None
    fact = compare(str(output), cache, file)
    assert fact.planned == plan
    assert (fact.runs, fact.runs_positions, fact.differences) == (2, cache.positions, [])
    assert fact.runs_seconds == pytest.approx(sum(summary.seconds for summary in summaries))
    write_plan(file, plan)
    assert compare(str(output), cache, file).runs == 0


def test_other_settings_than_planned_are_named(world: World, finished: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.jsonl"
    write_plan(file, _plan(world, tmp_path / "cache", "capture.top_k=8"))
    cache = open_cache(finished)
    fact = compare(str(finished), cache, file)
    difference = f"capture.top_k: plan 8, cache {cache.fingerprint['capture']['head_max']}"
    assert fact.differences == [difference]
    assert f"planned with other settings: {difference}" in _printed(print_comparison, fact).replace("\n", " ")


def test_a_plan_that_cannot_be_read_is_named(tmp_path: Path, finished: Path) -> None:
    file = tmp_path / "plan.jsonl"
    for content in ("", "{", '{"plan": {}}\n', '{"run": {}}\n', "[]\n"):
        file.write_text(content)
        with pytest.raises(ConfigError, match=r"plan\.jsonl: not a readable plan") as caught:
            compare(str(finished), open_cache(finished), file)
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="cannot write the plan"):
        write_plan(file / "below", _any_plan())


def test_an_unusable_set_or_teacher_is_refused_before_the_probe(world: World, tmp_path: Path) -> None:
    with pytest.raises(LlavaModError, match="no such folder"):
        _plan(world, tmp_path / "cache", data=tmp_path / "nowhere")


def _any_plan(**changes: Any) -> Plan:
    settings: dict[str, Any] = {
        "output": "caches/one",
        "device": "cpu",
        "jobs": 1,
        "samples": 1000,
        "sequences": 990,
        "positions": 100_000,
        "positions_error": 0.025,
        "rejected": 10,
        "bytes": {"head_ids": 2_000_000, "metadata": 1_000_000},
        "seconds": {"prepare": 10.0, "load": 20.0, "capture": 7170.0, "write": 0.0},
        "gpu_hours": None,
        "probe": {"samples": 64, "sequences": 64, "positions": 6400, "seconds": 12.5},
        "presets": {"compact": 2_000_000, "exhaustive": 900_000_000},
        "fingerprint": {},
    }
    return Plan(**{**settings, **changes})


def _printed(function: Any, *arguments: Any) -> str:
    stream = io.StringIO()
    function(Console(file=stream, width=80, highlight=False, markup=False, _environ={}), *arguments)
    assert max(len(line) for line in stream.getvalue().splitlines()) <= 80
    return stream.getvalue()


def test_what_is_printed_of_a_plan() -> None:
    text = _printed(print_plan, _any_plan(), Path("caches/.one.plan.jsonl"))
    for words in (
        "100,000 ± 2.5%",
        "990, plus 10 rejected",
        "3 MB, 30.00 bytes per position",
        "2 hours",
        "head_ids",
        "900 MB",
        "9,000.00",
    ):
        assert words in text
    assert "saved in caches/.one.plan.jsonl" in text
    assert "GPU" not in text
    text = _printed(print_plan, _any_plan(device="cuda", gpu_hours=2.0, jobs=4), None)
    assert "GPU-hours  2" in text
    assert "4, about 30 minutes each" in text
    assert "not saved" in text


def test_what_is_printed_of_a_comparison(finished: Path) -> None:
    cache = open_cache(finished)
    size = {"positions": cache.positions // 2, "bytes": {"metadata": cache.bytes}, "fingerprint": cache.fingerprint}
    fact = dataclasses.replace(compare(str(finished), cache, None), planned=_any_plan(**size))
    rows = [line.split() for line in _printed(print_comparison, fact).splitlines()]
    ratio = f"{cache.positions / (cache.positions // 2):.3f}"
    assert ["positions", f"{cache.positions // 2:,}", f"{cache.positions:,}", ratio] in rows
    assert ["bytes", f"{cache.bytes:,}", f"{cache.bytes:,}", "1.000"] in rows
    text = _printed(print_comparison, dataclasses.replace(fact, runs=1, runs_positions=cache.positions // 2))
    assert f"recorded runs: 1, with {cache.positions // 2 / cache.positions:.1%} of the positions in 0.0 s" in text
    complete = dataclasses.replace(fact, runs=2, runs_positions=cache.positions, runs_seconds=3600.0)
    assert ["seconds", "7,200", "3,600", "0.500"] in [
        line.split() for line in _printed(print_comparison, complete).splitlines()
    ]
    text = _printed(print_comparison, dataclasses.replace(fact, planned=None))
    assert "no saved plan" in text


def test_seconds_in_their_unit() -> None:
    assert [readable_seconds(value) for value in (0.5, 90.0, 7200.0, 259200.0)] == [
        "0.5 seconds",
        "1.5 minutes",
        "2 hours",
        "3 days",
    ]


def test_plans_survive_json(tmp_path: Path) -> None:
    plan = _any_plan(gpu_hours=1.5)
    assert Plan(**json.loads(json.dumps(dataclasses.asdict(plan)))) == plan
