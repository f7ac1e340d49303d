"""Plans scaled to other numbers of samples."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from llavamod_offline.config import load_config
from llavamod_offline.errors import ConfigError
from teacher_cache.config import CacheTeacherConfig
from teacher_cache.plan.estimate import Plan, make_plan
from teacher_cache.plan.scale import parse_scale, scaled
from teacher_cache.plan.tables import print_scaled
from tests.teacher_cache.conftest import World


@pytest.fixture(scope="module")
def plan(world: World, tmp_path_factory: pytest.TempPathFactory) -> Plan:
    """A plan for 24 samples in five shards."""
    output = tmp_path_factory.mktemp("scale") / "c"
    return make_plan(load_config(CacheTeacherConfig, (), world.arguments(output)), samples=256, seconds=60.0)


def test_its_own_number_gives_the_cache_itself(plan: Plan, finished: Path) -> None:
    (same,) = scaled(plan, [24])
    assert (same.shards, same.sequences, same.positions) == (5, plan.sequences, plan.positions)
    assert same.bytes == pytest.approx(plan.total_bytes, abs=2)
    there = [path for path in finished.rglob("*") if path.is_file()]
    assert same.files == len(there)
    assert same.index_bytes == pytest.approx((finished / "cache.json").stat().st_size, rel=0.05)


def test_everything_grows_with_the_samples(plan: Plan) -> None:
    few, many = scaled(plan, [2_400, 2_400_000_000])
    assert (few.shards, many.shards) == (500, 500_000_000)
    for name in ("positions", "files", "write_requests", "index_bytes", "open_memory"):
        assert getattr(many, name) == pytest.approx(1e6 * getattr(few, name), rel=0.02), name
    assert many.machine_hours == pytest.approx(1e6 * few.machine_hours)
    assert (few.gpu_hours, many.gpu_hours) == (None, None)
    console = Console(file=io.StringIO(), width=120)
    print_scaled(console, [few, many])
    assert "500,000,000" in console.file.getvalue()  # type: ignore[attr-defined]


def test_numbers_are_read_as_people_write_them() -> None:
    assert parse_scale("5e6,1e9,1000") == [5_000_000, 1_000_000_000, 1000]
    for text in ("many", "0", "-1", "1e30", "nan", ""):
        with pytest.raises(ConfigError, match=r"--scale: '.*' is not a number of samples: write such as 5e6,1e9"):
            parse_scale(text)
