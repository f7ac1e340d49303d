"""Answers written in vLLM, on a CPU, against those of the Hugging Face writer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np

from llavamod_offline.config import load_config
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.demo.plan import TEACHER
from teacher_cache.capture.run import run_capture
from teacher_cache.config import CacheTeacherConfig
from teacher_cache.read.reader import open_cache
from tests.teacher_cache.generate.reference import SOURCE_SAMPLES, UNTRAINED, Place, rows
from tests.tiny_families import TINY_FAMILIES
from tests.vllm_cpu import NEEDS_VLLM

pytestmark = NEEDS_VLLM

IN_VLLM = ("engine.kind=vllm", "engine.vllm.kv_cache_gib=0.1", "engine.vllm.max_num_seqs=16")


def test_greedy_answers_are_those_of_the_hugging_face_writer(place: Place, greedy: Place) -> None:
    """In one batch and in several; the set is then captured in vLLM."""
    done = place.generate(*IN_VLLM)
    assert done.digest == SampleSet.open(greedy.set()).digest
    assert done.capture is not None
    assert done.capture.sequences == SOURCE_SAMPLES
    for one, other in zip(rows(place.set()), rows(greedy.set()), strict=True):
        assert one.generated is not None
        assert other.generated is not None
        for own, theirs in zip(one.generated.behaviour_log_probs, other.generated.behaviour_log_probs, strict=True):
            np.testing.assert_allclose(own or (), theirs or (), atol=2e-3)


def test_greedy_answers_of_a_family_with_a_processor_of_its_own(place: Place, tmp_path: Path) -> None:
    teacher = TINY_FAMILIES["qwen3_vl"].write(tmp_path / "teacher")
    given = (f"teacher={teacher}", *UNTRAINED, "generate.capture=false")
    found = [place.generate(*given, *engine, name=name) for name, engine in (("hf", ()), ("vllm", IN_VLLM))]
    assert found[0].samples >= SOURCE_SAMPLES // 2
    assert found[0].tokens >= 5 * found[0].samples
    assert (found[0].digest, found[0].rejected) == (found[1].digest, found[1].rejected)


def test_killed_it_goes_on_to_the_same_set(place: Place, greedy: Place) -> None:
    """SIGKILL to the command and all vLLM processes once the first shard's answers exist."""
    arguments = place.arguments(*IN_VLLM, "generate.capture=false")
    command = [sys.executable, "-c", "from teacher_cache.cli.main import main; main()", "generate", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    log = place.folder / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        while process.poll() is None and not list(place.folder.glob(".own.answers/*000000.jsonl")):
            time.sleep(0.005)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert list(place.folder.glob(".own.answers/*.jsonl")), log.read_text()
    done = place.generate(*IN_VLLM, "generate.capture=false")
    assert 0 < done.written < SOURCE_SAMPLES
    assert done.digest == SampleSet.open(greedy.set()).digest


def test_sampled_answers_have_their_log_probs_and_are_the_same_in_a_rerun(place: Place) -> None:
    """Under the distribution they were sampled from, which at temperature 1 is that of the capture."""
    given = (*IN_VLLM, "generate.temperature=1", "capture.precision=exact", "generate.capture=false")
    digests = [place.generate(*given, name=name).digest for name in ("a", "b")]
    assert digests[0] == digests[1]
    settings = (f"data={place.set('a')}", f"teacher={TEACHER}", f"output={place.cache('a')}", "capture.precision=exact")
    run_capture(load_config(CacheTeacherConfig, (), settings))
    cache = open_cache(place.cache("a"))
    for sample in rows(place.set("a")):
        assert sample.generated is not None
        (own,) = sample.generated.behaviour_log_probs
        if own is not None:
            found_N = cache.records([(sample.key, "response")]).target_log_probs_N
            np.testing.assert_allclose(own, found_N[-len(own) :], atol=2e-3)
