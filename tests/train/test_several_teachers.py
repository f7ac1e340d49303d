"""Several teachers' caches of one set: their mixture, one cache per source, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sample import Sample
from llavamod_offline.errors import LlavaModError
from teacher_cache.read.reader import open_cache
from tests.tiny import tiny_samples, write_tiny_llava
from tests.train.conftest import EXHAUSTIVE, World, write_cache
from tests.train.reference import Reader, read_metrics
from train.run import train

SIZES = ("batch.global_size=24", "batch.micro_size=6", "steps=1")


@dataclass(frozen=True)
class Teachers:
    """A second teacher with the same tokenizer, a set of two sources, and both teachers' caches of it."""

    other: Path
    data: Path
    first_cache: Path
    other_cache: Path
    sampled: Path
    other_sampled: Path


@pytest.fixture(scope="module")
def teachers(world: World, tmp_path_factory: pytest.TempPathFactory) -> Teachers:
    root = tmp_path_factory.mktemp("teachers")
    other = write_tiny_llava(root / "other-teacher", hidden=32, layers=1, seed=3, tied=False)
    write_set([replace(s, source=("ocr", "coco")[n % 3 > 0]) for n, s in enumerate(tiny_samples(24))], root / "set")
    caches = [
        write_cache(root / f"{name}-{kind}", root / "set", teacher, *keep)
        for kind, keep in (("exhaustive", EXHAUSTIVE), ("sampled", ()))
        for name, teacher in (("first", world.teacher), ("other", other))
    ]
    return Teachers(other, root / "set", *caches)


def first_loss(world: World, teachers: Teachers, output: Path, *settings: str) -> float:
    train(world.config("mimic_dense", output, f"data.set={teachers.data}", *SIZES, *settings))
    return float(read_metrics(output)[0]["loss"])


def dense_loss(
    world: World, teachers: Teachers, mean: Callable[[Sample, torch.Tensor, torch.Tensor], torch.Tensor]
) -> float:
    """KL(mean of the teachers' distributions ‖ student) over all samples, each by plain forward passes."""
    student, *readers = (Reader(folder, teachers.data) for folder in (world.student, world.teacher, teachers.other))
    parts = []
    for row in range(24):
        sample = student.samples.read(row)
        with torch.no_grad():
            q_NV, one_NV, other_NV = (reader.answer(sample).log_probs_NV.double() for reader in (student, *readers))
        p_NV = mean(sample, one_NV.exp(), other_NV.exp())
        parts.append((torch.special.xlogy(p_NV, p_NV) - p_NV * q_NV).sum(-1))
    return float(torch.cat(parts).mean())


def test_a_student_learns_the_weighted_mean_of_its_teachers(world: World, teachers: Teachers, tmp_path: Path) -> None:
    paths = f"cache.path=[{teachers.first_cache},{teachers.other_cache}]"
    found = first_loss(world, teachers, tmp_path / "even", paths)
    assert found == pytest.approx(dense_loss(world, teachers, lambda _, p, r: (p + r) / 2), rel=1e-4)
    found = first_loss(world, teachers, tmp_path / "uneven", paths, "cache.weights=[3,1]")
    assert found == pytest.approx(dense_loss(world, teachers, lambda _, p, r: (3 * p + r) / 4), rel=1e-4)


def test_each_source_has_its_own_teacher(world: World, teachers: Teachers, tmp_path: Path) -> None:
    by_source = f'cache.path={{ocr: {teachers.other_cache}, "*": {teachers.first_cache}}}'
    expected = dense_loss(world, teachers, lambda sample, p, r: r if sample.source == "ocr" else p)
    assert first_loss(world, teachers, tmp_path / "run", by_source) == pytest.approx(expected, rel=1e-4)
    alone = first_loss(world, teachers, tmp_path / "alone", f"cache.path={teachers.first_cache}")
    for name, setting in (("one", f'{{"*": {teachers.first_cache}}}'), ("list", f"[{teachers.first_cache}]")):
        assert first_loss(world, teachers, tmp_path / name, f"cache.path={setting}") == pytest.approx(alone, rel=1e-6)


def test_records_that_sample_their_tails_are_mixed_and_chosen_too(
    world: World, teachers: Teachers, tmp_path: Path
) -> None:
    """The loss is about that from full distributions; the tail samples' noise averages out over 24 samples."""
    exact = dense_loss(world, teachers, lambda _, p, r: (p + r) / 2)
    mixed = f"cache.path=[{teachers.sampled},{teachers.other_sampled}]"
    for name, settings in (("samples", ()), ("bucket", ("loss.tail=bucket",)), ("js", ("loss.divergence=reverse_kl",))):
        found = first_loss(world, teachers, tmp_path / name, mixed, *settings)
        assert found > 0
        if name == "samples":
            assert found == pytest.approx(exact, rel=0.1)
    warm = write_cache(tmp_path / "warm", teachers.data, teachers.other, "capture.temperature=2")
    for number, paths in enumerate(
        (f"ocr: {teachers.first_cache}, coco: {warm}", f"coco: {warm}, ocr: {teachers.first_cache}")
    ):
        assert (
            first_loss(world, teachers, tmp_path / f"warm-{number}", f"cache.path={{{paths}}}", "loss.temperature=2")
            > 0
        )
    by_source = f"cache.path={{ocr: {teachers.other_sampled}, coco: {teachers.first_cache}}}"
    exact = dense_loss(world, teachers, lambda sample, p, r: r if sample.source == "ocr" else p)
    assert first_loss(world, teachers, tmp_path / "by_source", by_source) == pytest.approx(exact, rel=0.1)


def test_a_mixture_is_a_reference_for_preferences(world: World, teachers: Teachers, tmp_path: Path) -> None:
    """When training starts from the teacher itself, log-ratios are 0, also if it is listed with a copy of itself."""
    one = write_cache(tmp_path / "one", world.pairs, world.student)
    other = write_cache(tmp_path / "other", world.pairs, world.student, *EXHAUSTIVE)
    train(world.config("preference", tmp_path / "run", f"cache.path=[{one},{other}]", "loss.kind=sigmoid", "steps=1"))
    assert float(read_metrics(tmp_path / "run")[0]["loss"]) == pytest.approx(0.6931, abs=0.02)


def test_a_run_is_resumed_and_finished_with_the_same_caches_alone(
    world: World, teachers: Teachers, tmp_path: Path
) -> None:
    paths = [shutil.copytree(cache, tmp_path / cache.name) for cache in (teachers.sampled, teachers.other_sampled)]
    setting = f"cache.path=[{paths[0]},{paths[1]}]"
    first_loss(world, teachers, tmp_path / "run", setting, "cache.weights=[2,1]")
    moved = paths[1].rename(tmp_path / "moved")
    first_loss(world, teachers, tmp_path / "run", f"cache.path=[{paths[0]},{moved}]", "cache.weights=[2,1]")
    for changed, key in (
        ((f"cache.path=[{paths[0]},{teachers.other_cache}]", "cache.weights=[2,1]"), "cache.path"),
        ((f"cache.path=[{moved},{paths[0]}]", "cache.weights=[2,1]"), "cache.path"),
        ((f"cache.path=[{paths[0]},{moved}]", "cache.weights=[1,1]"), "cache.weights"),
        ((f"cache.path={paths[0]}",), "cache.path"),
    ):
        with pytest.raises(LlavaModError, match="finished run") as caught:
            first_loss(world, teachers, tmp_path / "run", *changed)
        assert f"{key}: " in str(caught.value)
    by_source = f'cache.path={{ocr: {moved}, "*": {paths[0]}}}'
    first_loss(world, teachers, tmp_path / "sources", by_source)
    swapped = f'cache.path={{ocr: {paths[0]}, "*": {moved}}}'
    with pytest.raises(LlavaModError, match=r"cache\.path: .*finished run"):
        first_loss(world, teachers, tmp_path / "sources", swapped)


def test_what_cannot_be_read_together_is_refused_in_one_line(world: World, teachers: Teachers, tmp_path: Path) -> None:
    one, other, sampled = teachers.first_cache, teachers.other_cache, teachers.sampled
    everywhere = write_cache(tmp_path / "all", teachers.data, teachers.other, "capture.positions=all")
    warm = write_cache(tmp_path / "warm", teachers.data, teachers.other, "capture.temperature=2")
    bare = write_cache(tmp_path / "bare", teachers.data, teachers.other, "capture.tail_samples_max=0")
    write_set(tiny_samples(24)[:20], tmp_path / "fewer")
    fewer = write_cache(tmp_path / "fewer-cache", tmp_path / "fewer", teachers.other)
    edited = [replace(s, turns=(*s.turns[:-1], replace(s.turns[-1], text="Something."))) for s in tiny_samples(24)]
    write_set(edited, tmp_path / "edited")
    answers = write_cache(tmp_path / "answers", tmp_path / "edited", teachers.other)
    strange = write_cache(tmp_path / "strange", teachers.data, _with_other_tokens(world.teacher, tmp_path / "tokens"))
    mixed = f"cache.path=[{sampled},{teachers.other_sampled}]"
    for number, (settings, message) in enumerate(
        [
            ((f"cache.path=[{one},{one}]",), f"'{one}' is listed twice"),
            ((f"cache.path=[{one},{one}/.]",), "is listed twice"),
            (("cache.path=[]",), "names no cache"),
            ((f"cache.path={{ocr: [{one}]}}",), "is not a path"),
            ((mixed, "cache.weights=[1]"), "cache.weights: 1 for the 2 caches"),
            ((mixed, "cache.weights=[1,0]"), "cache.weights: 0: must be above 0"),
            ((f"cache.path={one}", "cache.weights=[1]"), "only a list of caches is mixed"),
            ((f"cache.path={{ocr: {one}}}",), "names no cache for source 'coco'"),
            ((f'cache.path={{vqa: {one}, "*": {other}}}',), "has no source 'vqa': choose from 'coco', 'ocr'"),
            ((f"cache.path=[{one},{everywhere}]",), "records positions 'response', .* 'all'"),
            ((f"cache.path=[{sampled},{warm}]",), "'.*warm' was captured for temperature 2"),
            ((f"cache.path=[{sampled},{bare}]",), "'.*bare' has tails without samples"),
            ((f"cache.path=[{one},{fewer}]",), r"4 of 24 samples have no record in cache '.*fewer-cache'"),
            ((f"cache.path=[{sampled},{answers}]",), "in cache '.*answers' are not those in cache '.*first-sampled'"),
            ((f"cache.path=[{sampled},{strange}]",), "cache.path: '.*strange': .* tokenizer.vocabulary"),
            ((f"cache.path=[{one},{tmp_path / 'none'}]",), "no such folder"),
            ((mixed, "loss.temperature=2", "loss.tail=bucket"), "mixed at temperature 1"),
            ((mixed, "loss.align.feature_weight=1"), "compares what one teacher computes"),
        ]
    ):
        with pytest.raises(LlavaModError, match=message) as caught:
            first_loss(world, teachers, tmp_path / f"run-{number}", *settings)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / f"run-{number}" / "student").exists()


def _with_other_tokens(teacher: Path, folder: Path) -> Path:
    """The same teacher with two of its tokens swapped."""
    shutil.copytree(teacher, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    return folder


def test_coverage_may_be_dropped_and_is_counted(world: World, teachers: Teachers, tmp_path: Path) -> None:
    write_set([replace(s, source="ocr") for s in tiny_samples(24)[:20]], tmp_path / "fewer")
    fewer = write_cache(tmp_path / "cache", tmp_path / "fewer", teachers.other)
    settings = (f"cache.path=[{teachers.sampled},{fewer}]", "cache.missing=drop", "batch.global_size=20", "steps=1")
    config = world.config("mimic_dense", tmp_path / "run", f"data.set={teachers.data}", *settings)
    summary = train(config)
    assert (summary.samples, summary.samples_without_record) == (20, 4)
    assert len(open_cache(fewer)) == 20
