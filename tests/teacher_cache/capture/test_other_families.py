"""Whole captures by teachers of other families: rejections, the fingerprint, and plans."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from llavamod_offline.config import load_config
from llavamod_offline.data.encode.template import get_template
from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.errors import ModelError
from llavamod_offline.families import open_family
from teacher_cache.capture.run import run_capture
from teacher_cache.config import CacheTeacherConfig
from teacher_cache.engines.hf import HfCaptureEngine
from teacher_cache.engines.protocol import Request
from teacher_cache.format.record import RecordSettings
from teacher_cache.format.rejection import Rejection
from teacher_cache.plan.estimate import make_plan
from teacher_cache.read.reader import open_cache
from tests.tiny import tiny_image, tiny_samples
from tests.tiny_teachers import write_tiny_onevision, write_tiny_qwen_vl


def _settings(teacher: Path, data: Path, output: Path, *overrides: str) -> CacheTeacherConfig:
    given = [f"data={data}", f"teacher={teacher}", f"output={output}", "template=chatml", *overrides]
    return load_config(CacheTeacherConfig, (), given)


def test_a_capture_and_its_plan(tmp_path: Path) -> None:
    teacher = write_tiny_qwen_vl(tmp_path / "teacher")
    samples = tiny_samples(12)
    turns = (Turn("user", "many words " * 600), Turn("assistant", "No."))
    write_set([*samples, Sample("long", turns)], tmp_path / "set")
    config = _settings(teacher, tmp_path / "set", tmp_path / "cache", "max_length=8192")
    plan = make_plan(config, samples=13, seconds=30)
    summary = run_capture(config)
    assert (summary.sequences, summary.rejected) == (12, 1)
    assert plan.positions == pytest.approx(summary.positions, rel=0.01)
    rejected = json.loads((tmp_path / "cache" / "rejected.jsonl").read_text())
    assert rejected["key"] == "long"
    assert "tokens, the teacher takes 1024" in rejected["reason"]
    images = open_cache(tmp_path / "cache").fingerprint["images"]
    assert (images["aspect"], images["tokens"], images["token_id"]) == ("own", "by size", 402)
    assert images["size"] == {"shortest_edge": 256, "longest_edge": 2304}
    again = run_capture(dataclasses.replace(config, output=str(tmp_path / "again"), workers=3))
    assert again.digest == summary.digest


@pytest.mark.parametrize("write", [write_tiny_qwen_vl, write_tiny_onevision])
def test_pictures_that_cannot_be_used_reject_their_samples_alone(tmp_path: Path, write: object) -> None:
    """One truncated, one with a damaged header, and one whose size differs from when it was tokenised."""
    folder = write(tmp_path / "teacher")  # type: ignore[operator]
    teacher = open_family(folder, get_template("chatml"), image_aspect="auto", max_length=1024)
    turns = (Turn("user", "<image>What?"), Turn("assistant", "A star."))
    samples = [Sample(f"s{n}", turns, (tiny_image(n, (40, 30)),), ("png",)) for n in range(4)]
    images = (samples[0].images[0][:-30], b"\x89PNG", tiny_image(2, (90, 20)), samples[3].images[0])
    shown = [dataclasses.replace(sample, images=(image,)) for sample, image in zip(samples, images, strict=True)]
    requests = [Request(n, shown[n], (teacher.encode(s, "response"),)) for n, s in enumerate(samples)]
    assert len(teacher.encode(shown[0], "response").input_ids_T)  # its header is intact
    engine = HfCaptureEngine(
        teacher.load(torch.float32),
        teacher,
        RecordSettings(0.9, 8, 4, 10.0, ()),
        vocab_size=len(teacher.encoder.tokenizer),
        seed=0,
        batch_size=4,
    )
    outcomes = {outcome.key: outcome for outcome in engine.capture(requests)}
    reasons = {key: outcome.reason for key, outcome in outcomes.items() if isinstance(outcome, Rejection)}
    assert reasons.keys() == {"s0", "s1", "s2"}
    assert "image 's0': cannot be decoded" in reasons["s0"]
    assert "image 's1': not a JPEG, PNG or WebP file" in reasons["s1"]
    assert "its sequence has" in reasons["s2"]


@pytest.mark.parametrize(
    ("setting", "value", "problem"),
    [
        ("patch_size", 8, "the image processor's patch_size is 8, but vision_config's patch_size is 4"),
        ("merge_size", 1, "the image processor's merge_size is 1, but vision_config's spatial_merge_size is 2"),
        ("image_processor_type", "CLIPImageProcessor", "image processor 'CLIPImageProcessor' is none of Qwen2VL"),
    ],
)
def test_another_models_processor_is_refused(tmp_path: Path, setting: str, value: object, problem: str) -> None:
    folder = write_tiny_qwen_vl(tmp_path / "teacher")
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {setting: value}))
    with pytest.raises(ModelError, match=problem):
        open_family(folder, get_template("chatml"), image_aspect="auto", max_length=64)


@pytest.mark.parametrize(
    ("file", "setting", "value", "problem"),
    [
        ("preprocessor_config.json", "size", {"height": 8, "width": 8}, "are not those of config.json"),
        ("preprocessor_config.json", "image_grid_pinpoints", [[16, 16]], "are not those of config.json"),
        ("config.json", "vision_aspect_ratio", "pad", "vision_aspect_ratio is 'pad', expected anyres_max_9 or similar"),
        ("config.json", "vision_feature_select_strategy", "default", "since the tower has no class token"),
    ],
)
def test_other_tiles_than_the_towers_are_refused(
    tmp_path: Path, file: str, setting: str, value: object, problem: str
) -> None:
    folder = write_tiny_onevision(tmp_path / "teacher")
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | {setting: value}))
    with pytest.raises(ModelError, match=problem):
        open_family(folder, get_template("chatml"), image_aspect="auto", max_length=64)
