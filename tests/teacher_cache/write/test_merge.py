"""Merging: byte for byte as if captured at once; refused where that is impossible."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavamod_offline.config import load_config
from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.errors import CacheError, ConfigError
from teacher_cache.capture.run import run_capture
from teacher_cache.config import CacheTeacherConfig
from teacher_cache.inspection.export import export_cache
from teacher_cache.inspection.summary import bytes_by_part
from teacher_cache.plan.estimate import compare, finished_cache
from teacher_cache.read.reader import TeacherCache, open_cache
from teacher_cache.verify.cache import verify_cache
from teacher_cache.verify.repair import repair_cache, repair_lines
from teacher_cache.write.merge import merge_caches, merged_fingerprint, named_shards
from tests.teacher_cache.conftest import World
from tests.tiny import tiny_samples


@dataclass(frozen=True)
class Parts:
    """Caches of samples 0–9 and 10–17, whose shards have the same names, and a cache of all of them."""

    first: Path
    second: Path
    union: Path


@pytest.fixture(scope="module")
def parts(world: World, tmp_path_factory: pytest.TempPathFactory) -> Parts:
    folder = tmp_path_factory.mktemp("parts")
    samples = tiny_samples(18)
    for name, chosen in (("first", samples[:10]), ("second", samples[10:]), ("union", samples)):
        write_set(chosen, folder / name / "set", shard_samples=5)
        world.run(folder / name / "cache", data=folder / name / "set")
    return Parts(*(folder / name / "cache" for name in ("first", "second", "union")))


def _files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_merged_cache_is_as_if_captured_in_one(parts: Parts, tmp_path: Path) -> None:
    done = merge_caches([open_cache(parts.first), open_cache(parts.second)], str(tmp_path / "all"))
    verdict = verify_cache(tmp_path / "all")
    assert (verdict.damage, verdict.digest) == ([], done.digest)
    merged, union = open_cache(tmp_path / "all"), open_cache(parts.union)
    assert (merged.positions, len(merged)) == (union.positions, len(union)) == (done.positions, 18)
    items = [(key, "response") for key in sorted(union.keys("response"))]
    assert merged.keys("response") == union.keys("response")
    for name, values in vars(union.records(items)).items():
        np.testing.assert_array_equal(getattr(merged.records(items), name), values)
    for item in items:
        assert merged.sequence(*item) == union.sequence(*item)


def test_shards_stay_the_same_to_the_byte_and_take_no_more_room(parts: Parts, tmp_path: Path) -> None:
    output = tmp_path / "all"
    done = merge_caches([open_cache(parts.first), open_cache(parts.second)], str(output))
    assert open_cache(output).shard_names == ["set-000000", "set-000001", "set-000000_2", "set-000001_2"]
    assert done.renamed == {
        f"{parts.second}/set-000000": "set-000000_2",
        f"{parts.second}/set-000001": "set-000001_2",
    }
    for cache, suffix in ((parts.first, ""), (parts.second, "_2")):
        for name in ("set-000000", "set-000001"):
            there, here = cache / "shards" / name, output / "shards" / f"{name}{suffix}"
            before, after = _files(there), _files(here)
            if suffix:
                manifest = json.loads(before.pop("manifest.json"))
                assert json.loads(after.pop("manifest.json")) == {**manifest, "name": f"{name}_2"}
            assert after == before
            assert all(os.path.samefile(there / file, here / file) for file in after)


def test_without_hard_links_shards_are_copied(parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caches = [open_cache(parts.first), open_cache(parts.second)]
    linked = merge_caches(caches, str(tmp_path / "linked"))

    link = os.link

    def no_links(source: Path, target: Path) -> None:
        if parts.first.parent.parent in Path(source).parents:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        link(source, target)

    monkeypatch.setattr(os, "link", no_links)
    copied = merge_caches(caches, str(tmp_path / "copied"))
    assert copied.digest == linked.digest
    assert _files(tmp_path / "copied") == _files(tmp_path / "linked")
    file = "shards/set-000000/sequences.arrow"
    assert not os.path.samefile(parts.first / file, tmp_path / "copied" / file)


def test_an_interrupted_merge_goes_on(parts: Parts, tmp_path: Path) -> None:
    caches = [open_cache(parts.first), open_cache(parts.second)]
    whole = merge_caches(caches, str(tmp_path / "all"))
    (tmp_path / "all/cache.json").unlink()
    shutil.rmtree(tmp_path / "all/shards/set-000000_2")
    (tmp_path / "all/shards/.set-000000_2.999999999.tmp").mkdir()
    assert merge_caches(caches, str(tmp_path / "all")) == whole
    assert verify_cache(tmp_path / "all").ok
    assert merge_caches(caches, str(tmp_path / "all")) == whole


def test_a_merged_cache_that_lacks_a_shard_says_that_merging_restores_it(parts: Parts, tmp_path: Path) -> None:
    """No run can: it captures one set."""
    caches = [open_cache(parts.first), open_cache(parts.second)]
    digest = merge_caches(caches, str(tmp_path / "all")).digest
    (tmp_path / "all" / "shards" / caches[0].shard_names[0] / "sequences.arrow").unlink()  # a hard link
    *_, last = repair_lines("all", repair_cache(tmp_path / "all"))
    assert last.startswith("all: run `cache-teacher merge` of the same caches to write 1 missing shard, ")
    with pytest.raises(CacheError, match=r"unfinished .*: rerun `cache-teacher merge` of the same caches to finish it"):
        open_cache(tmp_path / "all")
    assert merge_caches(caches, str(tmp_path / "all")).digest == digest


def test_merged_caches_merge(world: World, parts: Parts, tmp_path: Path) -> None:
    merge_caches([open_cache(parts.first), open_cache(parts.second)], str(tmp_path / "two"))
    world.run(tmp_path / "pairs", data=world.pairs)
    caches = [open_cache(tmp_path / "two"), open_cache(tmp_path / "pairs")]
    done = merge_caches(caches, str(tmp_path / "three"))
    merged = open_cache(tmp_path / "three")
    assert verify_cache(tmp_path / "three").ok
    assert merged.roles == ("chosen", "rejected", "response")
    assert (len(merged), done.caches) == (18 + 14, 2)
    digests = [open_cache(path).fingerprint["data"]["digest"] for path in (parts.first, parts.second)]
    expected = {"digest": [*digests, caches[1].fingerprint["data"]["digest"]], "samples": 10 + 8 + 7}
    assert merged.fingerprint["data"] == expected
    assert {k: v for k, v in merged.fingerprint.items() if k != "data"} == {
        k: v for k, v in caches[0].fingerprint.items() if k != "data"
    }


def test_a_sequence_that_two_caches_have_is_named(parts: Parts, tmp_path: Path) -> None:
    caches = [open_cache(path) for path in (parts.second, parts.union)]
    with pytest.raises(
        CacheError, match=r"sample 'tiny-0010' \(response\) is in cache .*second.* and in .*union.* 7 more"
    ):
        merge_caches(caches, str(tmp_path / "all"))
    assert not (tmp_path / "all").exists()


def test_other_settings_are_refused_side_by_side_unless_allowed(world: World, parts: Parts, tmp_path: Path) -> None:
    data = parts.second.parent / "set"
    world.run(tmp_path / "other", "capture.seed=3", "max_length=999", data=data)
    caches = [open_cache(parts.first), open_cache(tmp_path / "other")]
    output = str(tmp_path / "all")
    with pytest.raises(CacheError) as caught:
        merge_caches(caches, output)
    names = (f"'{parts.first}'", f"'{tmp_path / 'other'}'")
    assert f"capture.seed: {names[0]} 0, {names[1]} 3; " in str(caught.value)
    assert f"sequence.max_length: {names[0]} 2048, {names[1]} 999" in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(CacheError, match=r"sequence\.max_length"):
        merge_caches(caches, output, allow=["capture.seed"])
    with pytest.raises(ConfigError, match=r"no field 'sequence\.length'"):
        merge_caches(caches, output, allow=["sequence.length"])
    assert not Path(output).exists()
    merge_caches(caches, output, allow=["capture.seed", "sequence"])
    assert verify_cache(Path(output)).ok
    fingerprint = open_cache(output).fingerprint
    assert fingerprint["capture"]["seed"] == [0, 3]
    assert fingerprint["sequence"] == {"max_length": [2048, 999], "longer": "rejected"}


@pytest.mark.parametrize(
    ("setting", "field"),
    [
        ("capture.temperature=2", "temperature"),
        ("capture.temperatures=[2.0]", "temperatures"),
        ("capture.tail_samples_max=3", "tail_samples_max"),
    ],
)
def test_what_decides_how_records_are_read_cannot_be_allowed(
    world: World, parts: Parts, tmp_path: Path, setting: str, field: str
) -> None:
    world.run(tmp_path / "other", setting, data=parts.second.parent / "set")
    caches = [open_cache(parts.first), open_cache(tmp_path / "other")]
    with pytest.raises(ConfigError, match=f"allow: capture.{field} decides how records are read"):
        merge_caches(caches, str(tmp_path / "all"), allow=["capture"])
    assert not (tmp_path / "all").exists()


def test_an_output_that_holds_something_else_is_left_alone(parts: Parts, tmp_path: Path) -> None:
    caches = [open_cache(parts.first), open_cache(parts.second)]
    shutil.copytree(parts.first, tmp_path / "busy")
    before = _files(tmp_path / "busy")
    with pytest.raises(CacheError, match="contains a cache with different settings"):
        merge_caches(caches, str(tmp_path / "busy"))
    assert _files(tmp_path / "busy") == before
    with pytest.raises(ConfigError, match="at least two caches"):
        merge_caches(caches[:1], str(tmp_path / "all"))


def test_caches_in_a_bucket_merge(world: World, parts: Parts, tmp_path: Path, bucket: str) -> None:
    """From disk and a bucket into a bucket: the same cache as on disk, and commands read it there."""
    run_capture(
        load_config(
            CacheTeacherConfig,
            (),
            [*world.arguments(tmp_path), f"data={parts.second.parent / 'set'}", f"output={bucket}/b"],
        )
    )
    done = merge_caches([open_cache(parts.first), open_cache(f"{bucket}/b")], f"{bucket}/all")
    local = merge_caches([open_cache(parts.first), open_cache(parts.second)], str(tmp_path / "all"))
    assert (done.digest, next(iter(done.renamed))) == (local.digest, f"{bucket}/b/set-000000")
    assert verify_cache(f"{bucket}/all").digest == local.digest
    merged = open_cache(f"{bucket}/all")
    assert finished_cache(f"{bucket}/all") is not None
    assert compare(f"{bucket}/all", merged, None).bytes == bytes_by_part(open_cache(tmp_path / "all"))
    export_cache(merged, tmp_path / "out.parquet", layout="table")
    export_cache(open_cache(tmp_path / "all"), tmp_path / "local.parquet", layout="table")
    assert (tmp_path / "out.parquet").read_bytes() == (tmp_path / "local.parquet").read_bytes()


@given(st.lists(st.lists(st.sampled_from(["a", "a_2", "a_3", "b"]), unique=True), max_size=4))
def test_every_shard_has_a_name_of_its_own(names: list[list[str]]) -> None:
    """Even if a name that would be free is a later shard's; the first shard with a name keeps it."""
    caches = cast("list[TeacherCache]", [SimpleNamespace(shard_names=some) for some in names])
    found = [(before, after) for _, before, after in named_shards(caches)]
    assert [before for before, _ in found] == [name for some in names for name in some]
    assert len({after for _, after in found}) == len(found)
    for name in {name for some in names for name in some}:
        assert next(after for before, after in found if before == name) == name


def test_fields_that_differ_become_lists() -> None:
    data = {"digest": "x", "samples": 1}
    left = {"a": {"f": 1, "g": [1, 2]}, "b": "same", "data": data}
    right = {"a": {"f": 2, "g": [1, 2], "h": 0}, "b": "same", "data": {"digest": ["y", "z"], "samples": 5}}
    assert merged_fingerprint([left, right]) == {
        "a": {"f": [1, 2], "g": [1, 2], "h": [None, 0]},
        "b": "same",
        "data": {"digest": ["x", "y", "z"], "samples": 6},
    }
