"""Audits: the cache is what the teacher says, whatever the batches; another teacher, set or template is detected."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llavamod_offline.config import load_config
from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sample import Turn
from llavamod_offline.entrypoint import run_command
from llavamod_offline.errors import CacheError, ConfigError, LlavaModError
from teacher_cache.audit.run import LIMITS, Audit, audit_cache
from teacher_cache.cli.main import app
from teacher_cache.config import CacheTeacherConfig
from teacher_cache.read.reader import open_cache
from teacher_cache.write.merge import merge_caches
from tests.teacher_cache.conftest import FLOAT32, World
from tests.tiny import tiny_samples, write_tiny_llava

Auditor = Callable[..., Audit]


@pytest.fixture
def audit(world: World) -> Auditor:
    """A function that audits a cache of the world's samples, with overridden settings."""

    def run(cache: Path, *overrides: str, data: Path | None = None, **settings: object) -> Audit:
        config = load_config(CacheTeacherConfig, (), world.arguments(cache, *overrides, data=data))
        return audit_cache(open_cache(cache), config, **settings)  # type: ignore[arg-type]

    return run


@pytest.fixture(scope="session")
def other_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llava(tmp_path_factory.mktemp("other") / "teacher", seed=1)


def test_a_cache_is_what_the_teacher_says_up_to_its_encoding(finished: Path, audit: Auditor) -> None:
    done = audit(finished)
    cache = open_cache(finished)
    assert (done.ok, done.failures, done.notes) == (True, [], [])
    assert done.precision == cache.fingerprint["capture"]["precision"] == "fine"
    ((role, sequences, positions, same, control),) = [dataclasses.astuple(each) for each in done.agreement]
    assert (role, sequences, positions, same, control) == ("response", 24, cache.positions, 1.0, 1.0)
    figures = {each.figure: each for each in done.figures}
    assert list(figures) == ["target log-prob", "top-k log-probs", "tail mass", "entropy"]
    for each in figures.values():
        assert each.cache.max > 10 * each.control.max  # what shows is the encoding error,
        assert each.beyond.max < 1e-4  # and nothing more
        assert each.cache.max <= each.allowed.max + 1e-4
        assert each.cache.mean <= each.cache.p99 <= each.cache.max
    assert figures["top-k log-probs"].cache.count == cache.totals["heads"] + _forced(cache)


def _forced(cache: object) -> int:
    """The number of forced entries: unlikely ids, which are not counted among the heads."""
    from teacher_cache.read.reader import TeacherCache

    assert isinstance(cache, TeacherCache)
    return len(cache.records(cache.items()).topk_ids_H) - cache.totals["heads"]


def test_batches_of_one_and_of_sixteen_make_the_same_cache(world: World, tmp_path: Path, audit: Auditor) -> None:
    """In float32 to 1e-4 in every number, and in any precision up to rounding."""
    world.run(tmp_path / "exact", "batch_size=1", FLOAT32)
    done = audit(tmp_path / "exact", "batch_size=16", largest=1e-4, mean=1e-5, agreement=1.0)
    assert done.ok, done.failures
    assert all(each.allowed.max == 0.0 for each in done.figures)
    assert max(each.control.max for each in done.figures) > 0  # the batches' shapes show in the last digits
    for precision in ("coarse", "fine"):
        world.run(tmp_path / precision, "batch_size=1", f"capture.precision={precision}")
        assert audit(tmp_path / precision, "batch_size=16", largest=1e-4, mean=1e-5, agreement=1.0).ok


@pytest.mark.parametrize(
    "overrides", [("capture.preset=exhaustive",), ("capture.positions=all", "capture.preset=compact")]
)
def test_other_captures_and_both_roles(
    world: World, tmp_path: Path, audit: Auditor, overrides: tuple[str, ...]
) -> None:
    """What to record comes from the cache, not from the audit's settings."""
    world.run(tmp_path / "c", *overrides, "capture.forced_tokens=['7']", "capture.seed=3", data=world.pairs)
    done = audit(tmp_path / "c", data=world.pairs, largest=1e-4)
    assert done.ok, done.failures
    assert [each.role for each in done.agreement] == ["chosen", "rejected"]
    cache = open_cache(tmp_path / "c")
    entries = [each.cache.count for each in done.figures if each.figure == "top-k log-probs"]
    assert sum(entries) == len(cache.records(cache.items()).topk_ids_H)  # forced ids too
    assert sum(each.positions for each in done.agreement) == cache.positions


def test_another_teacher_is_refused_and_if_allowed_found_out(
    finished: Path, other_teacher: Path, audit: Auditor
) -> None:
    with pytest.raises(CacheError, match=r"teacher.weights.model.safetensors: cache \w+…?, now \w+") as caught:
        audit(finished, f"teacher={other_teacher}")
    assert "tokenizer" not in str(caught.value)
    done = audit(finished, f"teacher={other_teacher}", allow=["teacher"])
    assert not done.ok
    assert any("allowed: teacher.weights.model.safetensors" in note for note in done.notes)
    figures = {each.figure: each for each in done.figures}
    assert figures["target log-prob"].beyond.mean > 0.5
    assert figures["target log-prob"].control.max < 1e-3
    assert done.agreement[0].cache < 0.5
    assert any("equal most likely ids" in line for line in done.failures)
    assert any("largest difference beyond the encoding" in line for line in done.failures)


def test_a_number_that_was_changed_is_found(
    world: World, tmp_path: Path, audit: Auditor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No checksum can find it: the capture itself was wrong, at one position of each sequence."""
    from teacher_cache.engines import hf
    from teacher_cache.engines.make_records import begin_sequence_records as begin

    def wrong(*arguments: Any, **settings: Any) -> object:
        made = begin(*arguments, **settings)()
        for records, _ in made:
            records.target_log_probs_N[0] -= 0.3
        return lambda: made

    monkeypatch.setattr(hf, "begin_sequence_records", wrong)
    world.run(tmp_path / "c", FLOAT32, "batch_size=1")
    monkeypatch.undo()
    done = audit(tmp_path / "c", mean=1.0)
    assert [line.split(" beyond")[0] for line in done.failures] == ["response, target log-prob: largest difference"]
    assert audit(tmp_path / "c", mean=1.0, largest=0.31).ok


def test_what_was_captured_from_something_else_is_refused(
    world: World, finished: Path, tmp_path: Path, audit: Auditor
) -> None:
    cases: list[tuple[tuple[str, ...], Path | None, tuple[str, ...], str]] = [
        (("template=chatml",), None, (), r"template.name: cache qwen, now chatml"),
        (("max_length=99",), None, (), r"sequence.max_length: cache 2048, now 99"),
        (("image_aspect=square",), None, (), r"images.aspect: cache pad, now square"),
        ((), world.pairs, (), r"data.digest: cache"),
        ((), world.pairs, ("data",), r"has none of its samples"),
    ]
    for overrides, data, allow, words in cases:
        with pytest.raises(CacheError, match=words):
            audit(finished, *overrides, data=data, allow=allow)
    with pytest.raises(LlavaModError, match=r"supervised ids differ from the cache's"):
        audit(finished, "template=chatml", allow=["template"])
    with pytest.raises(ConfigError, match=r"the fingerprint has no field 'teachr': did you mean 'teacher'"):
        audit(finished, allow=["teachr"])
    changed = [
        dataclasses.replace(s, turns=(Turn("user", s.turns[0].text + "?"), *s.turns[1:])) for s in tiny_samples(24)
    ]
    write_set(changed, tmp_path / "changed")
    with pytest.raises(CacheError, match=r"its content in set .* differs from that captured in cache"):
        audit(finished, data=tmp_path / "changed", allow=["data"])


def test_sequences_are_drawn_evenly_over_the_shards(finished: Path, world: World, audit: Auditor) -> None:
    """24 samples in 5 shards: ten of them are two from each shard; another seed draws others."""
    from teacher_cache.audit.preconditions import draw_rows
    from teacher_cache.capture_setup import prepare_capture

    cache = open_cache(finished)
    job = prepare_capture(**load_config(CacheTeacherConfig, (), world.arguments(finished)).setup_values)
    drawn = [draw_rows(cache, job, 10, seed) for seed in (0, 1, 0)]
    assert drawn[0] == drawn[2] != drawn[1]
    for rows in drawn:
        assert len(set(rows)) == 10
        assert np.bincount([row // 5 for row in rows]).tolist() == [2] * 5
    assert draw_rows(cache, job, 1000, 0) == list(range(24))
    assert len(draw_rows(cache, job, 3, 0)) == 3
    assert audit(finished, sequences=3).agreement[0].sequences == 3


def test_a_merged_cache_is_audited_set_by_set(world: World, finished: Path, tmp_path: Path, audit: Auditor) -> None:
    world.run(tmp_path / "pairs", data=world.pairs)
    merge_caches([open_cache(finished), open_cache(tmp_path / "pairs")], str(tmp_path / "both"))
    done = audit(tmp_path / "both", data=world.pairs)
    assert done.ok, done.failures
    assert {each.role: each.sequences for each in done.agreement} == {"chosen": 7, "rejected": 7}
    world.run(tmp_path / "fewer", "capture.top_p=0.5", data=world.pairs)
    merged = str(tmp_path / "unlike")
    merge_caches([open_cache(finished), open_cache(tmp_path / "fewer")], merged, allow=["capture.top_p"])
    with pytest.raises(CacheError, match=r"merged from caches with different capture.top_p"):
        audit(Path(merged), data=world.pairs)


def test_a_sequence_that_the_teacher_rejects_now_is_a_failure(
    finished: Path, audit: Auditor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from teacher_cache.engines import hf

    problem = hf.HfCaptureEngine._problem

    def picky(self: hf.HfCaptureEngine, item: hf._BatchItem) -> str | None:
        return "a picture like that" if item.request.sample.key == "tiny-0004" else problem(self, item)

    monkeypatch.setattr(hf.HfCaptureEngine, "_problem", picky)
    done = audit(finished)
    assert done.failures == ["tiny-0004 (response): rejected by the teacher: a picture like that"]
    assert done.agreement[0].sequences == 23


def test_limits_follow_from_the_coarser_type(finished: Path, audit: Auditor) -> None:
    done = audit(finished, "dtype=bfloat16", sequences=4, largest=100.0, mean=100.0, agreement=0.0)
    assert done.ok
    assert any("engine.dtype: cache float32, now bfloat16" in note for note in done.notes)
    assert max(each.beyond.max for each in done.figures) > 1e-3  # a coarse dtype shows
    assert audit(finished, sequences=4).limits == LIMITS["float32"]
    assert audit(finished, "dtype=bfloat16", sequences=4).limits == LIMITS["bfloat16"]


def test_the_command_prints_tables_and_exits_by_the_verdict(
    world: World, finished: Path, other_teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def call(*argv: str) -> tuple[int, str, str]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run_command(app, argv)
        printed = capsys.readouterr()
        assert isinstance(stopped.value.code, int)
        return stopped.value.code, printed.out, printed.err

    arguments = ["audit", str(finished), f"data={world.samples}", f"teacher={world.teacher}", "--n", "6"]
    status, out, _ = call(*arguments)
    assert status == 0
    assert "response: 6 sequences" in out
    assert out.endswith("the cache equals the teacher within the limits\n")
    assert max(map(len, out.splitlines())) <= 80
    status, out, _ = call(*arguments, "batch_size=1", "--json")
    about = json.loads(out)
    assert (status, about["ok"], about["notes"]) == (
        0,
        True,
        ["batch_size is 1, so the control used the same shapes: raise it for a real control"],
    )
    status, out, _ = call(*arguments, f"teacher={other_teacher}", "--allow", "teacher")
    assert status == 1
    assert "DIFFERENT" in out
    status, out, err = call(*arguments, f"teacher={other_teacher}")
    assert (status, out, err.count("\n")) == (2, "", 1)
