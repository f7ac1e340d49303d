"""Images prepared in processes: bitwise equal to those from threads, and a clear end whatever happens to a process."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llavamod_offline.data.sample import Sample
from llavamod_offline.errors import DataError, ModelError
from llavamod_offline.families import Family, SampleImage, open_family
from teacher_cache.images.pool import ImagePool, begun_ahead
from tests.tiny import tiny_samples, write_tiny_llava

BROKEN = Sample("broken", tiny_samples(1)[0].turns, (b"no image",), ("png",))


class Prepared:
    """A family as a process sees it, which misbehaves on some samples."""

    def images(self, sample: Sample) -> list[SampleImage]:
        """Die, or return an image that holds the process id."""
        if sample.key == "deadly":
            os.kill(os.getpid(), signal.SIGKILL)
        odd = np.arange(6, dtype=np.int16).reshape(1, 2, 3).transpose(2, 0, 1)
        return [SampleImage({"process": np.array(os.getpid()), "odd": odd, "none": np.zeros((0, 3), np.float32)}, 1)]


def opened() -> Any:
    return Prepared()


@pytest.fixture
def pool() -> Iterator[ImagePool]:
    made = ImagePool(Prepared().images, workers=2, opened=opened)
    yield made
    made.close()


def named(key: str) -> Sample:
    sample = next(sample for sample in tiny_samples(8) if sample.images)
    return Sample(key, sample.turns, sample.images, sample.image_extensions)


def process_of(images: list[SampleImage]) -> int:
    return int(images[0].inputs["process"])


@pytest.mark.parametrize("ahead", [0, 2, 9])
def test_so_many_items_are_begun_before_one_is_given(ahead: int) -> None:
    begun: list[int] = []

    def begin(item: int) -> int:
        begun.append(item)
        return 10 * item

    for item, found in begun_ahead(range(5), begin, ahead=ahead):
        assert found == 10 * item
        assert begun == list(range(min(item + ahead + 1, 5)))
    assert begun == list(range(5))


def test_processes_prepare_as_threads_do(tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "teacher")
    again = partial(open_family, folder, "qwen", image_aspect="auto", max_length=512)
    family: Family = again()
    samples = [*tiny_samples(12), BROKEN]
    found: list[list[list[SampleImage]]] = []
    pools = [ImagePool(family.images), ImagePool(family.images, workers=2, opened=again)]
    for pool in pools:
        pool.begin()
        with pool.ahead() as prepare:
            coming = [prepare(sample) for sample in samples]
            found.append([one.result() for one in coming[:-1]])
            with pytest.raises(DataError, match="image 'broken': not a JPEG, PNG or WebP file"):
                coming[-1].result()
        assert pool.waits.seconds["images"] > 0
        pool.close()
    assert sum(map(len, found[0])) > 0
    for mine, theirs in zip(*found, strict=True):
        assert [image.tokens for image in mine] == [image.tokens for image in theirs]
        for one, other in zip(mine, theirs, strict=True):
            assert one.inputs.keys() == other.inputs.keys()
            for name, array in one.inputs.items():
                assert other.inputs[name].dtype == array.dtype
                assert np.array_equal(array, other.inputs[name])
    assert not multiprocessing.active_children()


def test_any_array_arrives(pool: ImagePool) -> None:
    with pool.ahead() as prepare:
        (image,) = prepare(named("a")).result()
    assert process_of([image]) != os.getpid()
    assert image.inputs["odd"].dtype == np.int16
    assert image.inputs["odd"].tolist() == [[[0, 3]], [[1, 4]], [[2, 5]]]
    assert image.inputs["none"].shape == (0, 3)
    image.inputs["odd"][:] = 7  # it is writable, like any array of its own


def test_a_process_that_is_killed_is_replaced(pool: ImagePool) -> None:
    with pool.ahead() as prepare:
        first = process_of(prepare(named("a")).result())
        os.kill(first, signal.SIGKILL)
        coming = [prepare(named(str(number))) for number in range(6)]
        later = {process_of(one.result()) for one in coming}
    assert first not in later


def test_a_sample_that_kills_processes_is_named_and_others_are_prepared(pool: ImagePool) -> None:
    with pool.ahead() as prepare:
        coming = [prepare(named(key)) for key in ("a", "deadly", "b", "c")]
        assert coming[0].result()
        with pytest.raises(ModelError, match="sample 'deadly': 3 processes died while they prepared its images"):
            coming[1].result()
        assert coming[2].result()
        assert coming[3].result()


def test_what_was_not_begun_is_dropped(pool: ImagePool) -> None:
    with pool.ahead() as prepare:
        coming = [prepare(named(str(number))) for number in range(50)]
        coming[0].result()
    assert any(one.future.cancelled() for one in coming)


def test_an_idle_process_that_dies_keeps_nobody_waiting(pool: ImagePool) -> None:
    """Not even this process's exit, which waits for all others."""
    with pool.ahead() as prepare:
        assert prepare(named("a")).result()
    children = multiprocessing.active_children()
    os.kill(int(children[0].pid or 0), signal.SIGKILL)
    for child in children:
        child.join()
    pool.close()
