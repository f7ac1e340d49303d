"""What the image adds to each token's log-prob, against plain runs of the model on samples built without it."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from llavamod_offline.config import load_config
from llavamod_offline.data.encode.tokenize import TokenizedSequence
from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import CacheError, ConfigError, LlavaModError
from teacher_cache.capture.run import run_capture
from teacher_cache.config import CacheTeacherConfig
from teacher_cache.engines.protocol import Outcome, Request
from teacher_cache.format.manifest import canonical, file_entries
from teacher_cache.format.rejection import Rejection
from teacher_cache.format.sequences import SequenceRecord
from teacher_cache.read.reader import TeacherCache, open_cache
from teacher_cache.verify.cache import verify_cache
from teacher_cache.verify.shard_check import ShardCheck
from teacher_cache.visual.advantages import NOT_MEASURED, decode_advantages, encode_advantages
from teacher_cache.visual.second_pass import drop_images, with_advantages
from tests.teacher_cache.conftest import World
from tests.tiny import tiny_image, tiny_samples, write_tiny_set
from tests.tiny_families import TINY_FAMILIES
from tests.train.reference import Reader

KINDS = ("blank", "drop")
EXACT = ("capture.preset=reference", "capture.precision=exact")


def made_without(sample: Sample, kind: str) -> Sample:
    """The sample with each image replaced by its mean colour, or without images."""
    if kind == "drop":
        turns = tuple(
            replace(t, text=t.text.replace("<image>\n", "").replace("\n<image>", "").replace("<image>", ""))
            for t in sample.turns
        )
        return replace(sample, turns=turns, images=(), image_extensions=())
    blanks = []
    for encoded in sample.images:
        image = Image.open(io.BytesIO(encoded)).convert("RGB")
        pixels = np.asarray(image).reshape(-1, 3).tolist()
        mean = tuple(round(sum(pixel[band] for pixel in pixels) / len(pixels)) for band in range(3))
        buffer = io.BytesIO()
        Image.new("RGB", image.size, mean).save(buffer, format="PNG")
        blanks.append(buffer.getvalue())
    return replace(sample, images=tuple(blanks), image_extensions=("png",) * len(blanks))


def advantages(cache: TeacherCache, item: tuple[str, str]) -> np.ndarray:
    return decode_advantages(cache.advantage_codes([item]))


@pytest.mark.parametrize("kind", KINDS)
def test_advantages_are_those_of_two_plain_runs(world: World, tmp_path: Path, kind: str) -> None:
    """Conversations and pairs, with zero to two images; those without images are not measured."""
    for name, data in (("conversations", world.samples), ("pairs", world.pairs)):
        summary = world.run(tmp_path / name, f"capture.without_image={kind}", data=data)
        assert summary.rejected == 0
        cache = open_cache(tmp_path / name)
        assert verify_cache(tmp_path / name).ok
        reader = Reader(world.teacher, data)
        for sample in map(SampleSet.open(data).read, range(7)):
            for role in sample.roles:
                codes_N = cache.advantage_codes([(sample.key, role)])
                if not sample.images:
                    assert (codes_N == NOT_MEASURED).all()
                    continue
                with torch.no_grad():
                    own_N, bare_N = (
                        reader.answer(shown, role).target_log_probs_N.numpy()
                        for shown in (sample, made_without(sample, kind))
                    )
                expected_N = np.clip(own_N - bare_N, -127 / 8, 127 / 8)
                assert np.abs(decode_advantages(codes_N) - expected_N).max() < 1 / 16 + 1e-3
        counts = np.bincount(cache.advantage_codes(cache.items()), minlength=256)
        assert cache.advantage_counts.tolist() == counts.tolist()


def test_records_are_those_of_a_capture_without_a_second_run(world: World, tmp_path: Path) -> None:
    """The fingerprint names the second run; everything else, and caches without one, are unchanged."""
    world.run(tmp_path / "with", "capture.without_image=drop", "capture.positions=all")
    world.run(tmp_path / "plain", "capture.positions=all")
    both = [open_cache(tmp_path / name) for name in ("with", "plain")]
    assert both[0].fingerprint["capture"].pop("without_image") == "drop"
    assert both[0].fingerprint == both[1].fingerprint
    for item in both[1].items()[:8]:
        one, other = (cache.records([item]) for cache in both)
        assert all(np.array_equal(getattr(one, name), getattr(other, name)) for name in vars(one))
        codes_N = both[0].advantage_codes([item])
        assert len(codes_N) == len(one)
        assert set(np.flatnonzero(codes_N)) <= set(np.flatnonzero(one.target_ids_N >= 0))
    with pytest.raises(CacheError, match=r"has no visual advantages: capture it with capture\.without_image"):
        both[1].advantage_codes(both[1].items()[:1])
    for kind in ("capture.without_image=blank", "capture.positions=all"):
        with pytest.raises(LlavaModError, match=r"capture\.without_image"):
            world.run(tmp_path / "with", kind)


def test_what_is_rejected_is_listed_once(world: World, tmp_path: Path) -> None:
    """Sequences with two images and too many tokens, which are shorter without their images."""
    for kind in KINDS:
        summary = world.run(tmp_path / kind, f"capture.without_image={kind}", "max_length=90")
        assert summary.rejected > 0
        assert summary.sequences + summary.rejected == 24
        assert verify_cache(tmp_path / kind).ok


def test_what_the_second_run_rejects_is_rejected(world: World, tmp_path: Path) -> None:
    """Answers with other tokens, second runs that fail or are missing; samples without images need none."""
    cache = world.run(tmp_path / "cache", data=write_tiny_set(tmp_path / "set", 6))
    assert cache.rejected == 0
    opened = open_cache(tmp_path / "cache")
    records = [
        SequenceRecord(key, role, "0" * 64, "0" * 64, 9, opened.records([(key, role)])) for key, role in opened.items()
    ]
    first, second, third, *others = records
    bare: list[Outcome] = [Rejection(first.key, first.role, "not finite"), second]
    seen = {first.key, second.key, third.key}
    kept, rejected = with_advantages(records, bare, seen)
    assert [(one.key, one.reason) for one in rejected] == [
        (first.key, "without its images: not finite"),
        (third.key, "without its images: not run"),
    ]
    assert [one.key for one in kept] == [second.key, *(one.key for one in others)]
    assert kept[0].advantages_N is not None
    assert (kept[0].advantages_N == 128).all()
    assert all(one.advantages_N is not None and not one.advantages_N.any() for one in kept[1:])
    sample = Sample("a", (Turn("user", "<image>\nWhat?"), Turn("assistant", "This.")), (tiny_image(0),), ("png",))
    sequence = TokenizedSequence("a", "response", np.arange(9), np.array([7, 8]))

    def another_answer(shown: Sample, role: str) -> TokenizedSequence:
        assert (shown.images, shown.turns[0].text) == ((), "What?")
        return replace(sequence, input_ids_T=np.arange(1, 10))

    request, refused = drop_images(Request(0, sample, (sequence,)), another_answer)
    assert request.sequences == ()
    assert "tokenized differently" in refused[0].reason


def test_what_has_no_images_is_refused_in_one_line(world: World, tmp_path: Path) -> None:
    write_set([s for s in tiny_samples(24) if not s.images], tmp_path / "text")
    for number, (settings, data, message) in enumerate(
        [
            (("capture.without_image=blank",), tmp_path / "text", "has no images: remove the setting"),
            (("capture.without_image=grey",), None, "capture.without_image is 'grey': must be"),
            (
                ("capture.without_image=drop", "engine.kind=server", "engine.url=http://localhost:1"),
                None,
                "engine server has no second run",
            ),
        ]
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            world.run(tmp_path / str(number), *settings, data=data)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / str(number)).exists()


def test_damage_is_found(world: World, tmp_path: Path) -> None:
    """Counts that differ from the array's, with all checksums right."""
    world.run(tmp_path / "cache", "capture.without_image=blank", data=write_tiny_set(tmp_path / "set", 4))
    (folder,) = (tmp_path / "cache" / "shards").iterdir()
    assert ShardCheck(folder, folder.name, None).problems == []
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["visual_counts"][128] += 1
    manifest["files"] = {name: entry for name, entry in file_entries(folder).items() if name != "manifest.json"}
    (folder / "manifest.json").write_bytes(canonical(manifest))
    (problem,) = ShardCheck(folder, folder.name, None).problems
    assert "visual_counts" in problem


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3", "smolvlm", "internvl"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_family_is_run_without_what_its_images_show(tmp_path: Path, name: str, kind: str) -> None:
    """The result equals a capture of a set whose samples were built that way by hand."""
    teacher = TINY_FAMILIES[name].write(tmp_path / "teacher")
    samples = [sample for sample in tiny_samples(6) if sample.images]
    write_set(samples, tmp_path / "shown")
    write_set([made_without(sample, kind) for sample in samples], tmp_path / "made")
    given = (f"teacher={teacher}", *EXACT)
    for data, more in (("shown", (f"capture.without_image={kind}",)), ("made", ())):
        where = (f"data={tmp_path / data}", f"output={tmp_path / (data + '-cache')}")
        assert run_capture(load_config(CacheTeacherConfig, (), [*where, *given, *more])).rejected == 0
    shown, made = (open_cache(tmp_path / f"{data}-cache") for data in ("shown", "made"))
    for item in shown.items():
        gained_N = shown.records([item]).target_log_probs_N - made.records([item]).target_log_probs_N
        expected_N = decode_advantages(encode_advantages(gained_N))
        assert np.abs(advantages(shown, item) - expected_N).max() <= 1 / 8 + 1e-6
        assert np.abs(expected_N).max() > 0 or len(expected_N) == 0
