"""`generate` as a whole: its set is like any other, it can be stopped at any moment, and it refuses in one line."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llavamod_offline.config import load_config
from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.rows import Located
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import ConfigError, DataError, LlavaModError
from teacher_cache.capture.run import run_capture
from teacher_cache.capture_setup import CaptureSetup
from teacher_cache.config import CacheTeacherConfig
from teacher_cache.engines.protocol import CaptureEngine
from teacher_cache.format.manifest import file_entries
from teacher_cache.generate import decode_loop as answers
from teacher_cache.generate.decode_loop import Written
from teacher_cache.generate.generated_set import WrittenSet
from teacher_cache.generate.run import generate
from teacher_cache.read.reader import open_cache
from tests.teacher_cache.capture.killer import fork_server, generate_and_die
from tests.teacher_cache.generate.reference import SOURCE_SAMPLES, Place, rows
from tests.tiny import tiny_samples

COMMAND = [sys.executable, "-c", "from teacher_cache.cli.main import main; main()"]


def test_again_there_is_nothing_to_do_and_no_weights_are_loaded(
    place: Place, greedy: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The capture uses the same loaded weights as the writing, loaded once, and none if everything exists already."""

    def times() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in place.folder.rglob("*") if file.is_file()}

    loads: list[str] = []

    load = CaptureSetup.load

    def counted(setup: CaptureSetup) -> CaptureEngine:
        loads.append(setup.engine)
        return load(setup)

    monkeypatch.setattr(CaptureSetup, "load", counted)
    first = place.generate()
    assert len(loads) == 1
    assert first.digest == SampleSet.open(greedy.set()).digest
    assert first.capture is not None
    assert first.capture.digest == open_cache(greedy.cache()).digest
    before = times()
    second = place.generate()
    assert second.capture is not None
    assert (second.written, second.tokens, second.capture.sequences, len(loads)) == (0, 0, 0, 1)
    assert (second.digest, second.capture.digest) == (first.digest, first.capture.digest)
    assert times() == before
    shutil.rmtree(place.cache())
    third = place.generate()
    assert third.capture is not None
    assert third.capture.digest == first.capture.digest


def test_a_set_may_be_written_for_another_teacher_to_capture(place: Place, greedy: Place) -> None:
    """And its writer can still capture it later."""
    done = place.generate("generate.capture=false")
    assert done.capture is None
    assert done.digest == SampleSet.open(greedy.set()).digest
    assert not place.cache().exists()
    again = place.generate()
    assert again.written == 0
    assert again.capture is not None
    assert again.capture.digest == open_cache(greedy.cache()).digest


@pytest.mark.slow
def test_killed_at_any_change_it_goes_on_to_the_same_set_and_cache(place: Place, greedy: Place) -> None:
    """SIGKILL before changes below their common folder: between answers, set and cache, and within each."""
    expected = {name: file_entries(path) for name, path in (("set", greedy.set()), ("cache", greedy.cache()))}

    def run_until(moment: int, folder: Path) -> int:
        here, there = fork_server().Pipe()
        arguments = dataclasses.replace(place, folder=folder).arguments()
        process = fork_server().Process(target=generate_and_die, args=(arguments, str(folder), moment, there))
        process.start()
        process.join()
        assert process.exitcode == (0 if moment == sys.maxsize else -signal.SIGKILL)
        changes: int = here.recv() if moment == sys.maxsize else 0
        return changes

    changes = run_until(sys.maxsize, place.folder / "counted")
    rng = random.Random(0)
    for moment in (2, *sorted(rng.sample(range(3, changes), 6)), changes):
        folder = place.folder / f"m{moment}"
        run_until(moment, folder)
        if rng.random() < 0.5:
            run_until(2, folder)
        again = dataclasses.replace(place, folder=folder)
        again.generate()
        found = {"set": file_entries(again.set()), "cache": file_entries(again.cache())}
        assert found == expected, f"killed before change {moment} of {changes}"
        assert not list(folder.glob(".*"))


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        (("output_set=null",), ConfigError, "no value for 'output_set'"),
        (("output_set=s3://bucket/own",), ConfigError, "a set is written to a local folder"),
        (("data=nowhere",), DataError, "'nowhere'"),
        (("data={pairs}",), DataError, "sample 'pair-0000' is a preference"),
        (("engine.kind=vllm_logprobs",), ConfigError, "engine.kind is 'vllm_logprobs', which cannot write answers"),
        (("slice=2/2",), ConfigError, "slice: in '2/2' the first number must be less"),
        (("generate.temperature=-1",), ConfigError, "generate.temperature is -1: must be 0 or more"),
        (("generate.top_p=0",), ConfigError, "generate.top_p is 0: must be above 0"),
        (("generate.max_new_tokens=0",), ConfigError, "generate.max_new_tokens is 0"),
        (("generate.key_suffix=.x",), ConfigError, "generate.key_suffix is '.x'"),
        (("generate.turns=first",), ConfigError, "generate.turns"),
        (("output_set={source}",), ConfigError, "is not a generated set"),
        (("output_set={folder}",), ConfigError, "exists and is not a set"),
    ],
)
def test_bad_settings_are_one_line_and_leave_nothing(
    place: Place, tmp_path_factory: pytest.TempPathFactory, settings: tuple[str], error: type[LlavaModError], words: str
) -> None:
    pairs = tmp_path_factory.mktemp("pairs") / "pairs"
    write_set(tiny_samples(2, preference=True), pairs)
    given = [setting.format(pairs=pairs, source=place.source, folder=place.folder) for setting in settings]
    with pytest.raises(error) as caught:
        place.generate(*given)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(place.folder.iterdir()) == []


def test_other_settings_into_the_same_set_are_refused_begun_or_finished(place: Place, greedy: Place) -> None:
    before = file_entries(greedy.set())
    with pytest.raises(ConfigError, match=r"was generated with other settings: generate.seed: was 0, now 1: set them"):
        greedy.generate("generate.seed=1")
    assert file_entries(greedy.set()) == before
    config = load_config(CacheTeacherConfig, (), place.arguments())

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WrittenSet, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(config)
    with pytest.raises(ConfigError, match=r"was begun with other settings: generate.temperature: was 0.0, now 0.5"):
        place.generate("generate.temperature=0.5")
    assert place.generate().written == 0
    assert file_entries(place.set()) == before


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("job.json", "{", r"job\.json: cannot be read \(.*\): remove .*\.own\.answers and run again"),
        ("prompts-000000.jsonl", "", r"prompts-000000\.jsonl: holds 0 of 4 answers: remove it and run again"),
        ("prompts-000000.jsonl", "{\n", r"prompts-000000\.jsonl: cannot be read"),
    ],
)
def test_damaged_answers_are_one_line(place: Place, name: str, content: str, words: str) -> None:
    place.generate("slice=1/3")
    (place.folder / ".own.answers" / name).write_text(content)
    with pytest.raises(DataError, match=words) as caught:
        place.generate()
    assert "\n" not in str(caught.value)


def test_a_damaged_set_is_one_line(place: Place) -> None:
    place.set().mkdir()
    (place.set() / "set.json").write_text("{")
    with pytest.raises(DataError, match=r"own/set\.json: cannot be read .*: remove .* and run again"):
        place.generate()


def test_two_that_begin_one_set_at_once_have_the_same_settings(place: Place) -> None:
    first, second = (WrittenSet(place.set(), {"generate": {"temperature": value}}) for value in (0.0, 1.0))
    first.begin()
    first.begin()
    with pytest.raises(ConfigError, match=r"was begun with other settings: generate.temperature: was 0.0, now 1.0"):
        second.begin()


def test_where_no_answer_ends_the_way_out_is_said_and_works(place: Place) -> None:
    with pytest.raises(DataError, match=r"did not end within generate\.max_new_tokens=1; .* remove .*\.own\.answers"):
        place.generate("generate.max_new_tokens=1")
    shutil.rmtree(place.folder / ".own.answers")
    assert place.generate().samples


def test_the_new_set_keeps_what_the_old_one_had_of_the_sources_and_rows_that_are_left(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training would refuse a weight for a source without samples."""
    prompts = [dataclasses.replace(sample, source=sample.key) for sample in rows(place.source)[:3]]
    weights = {"toy-0": 0.5, "toy-1": 2.0}
    licences = {"toy-1": "mit", "toy-2": "cc-by-4.0"}
    located = [Located(sample, "rows.json", 7 + row) for row, sample in enumerate(prompts)]
    write_set(located, place.folder / "weighed", weights=weights, licences=licences, max_side=64)

    def one_goes_on_and_on(engine: Any, prompts: Any, decoding: Any) -> list[Written]:
        return [Written((5, 6), ended=prompt.key != "toy-1") for prompt in prompts]

    monkeypatch.setattr(answers, "write_answers", one_goes_on_and_on)
    place.generate(data=place.folder / "weighed")
    assert set(SampleSet.open(place.set()).manifest["sources"]) == {"toy-0", "toy-2"}
    packed = SampleSet.open(place.set())
    assert (packed.manifest["weights"], packed.manifest["max_side"]) == ({"toy-0": 0.5}, 64)
    assert packed.manifest["licences"] == {"toy-2": "cc-by-4.0"}
    assert [packed.origin(key) for key in packed.keys] == [("rows.json", 7), ("rows.json", 9)]
    (rejected,) = map(json.loads, (place.set() / "rejected.jsonl").read_text().splitlines())
    assert (rejected["file"], rejected["row"]) == ("rows.json", 8)


def test_slices_answer_their_shards_and_the_whole_makes_the_set(place: Place, greedy: Place) -> None:
    """In any order, even if one slice never ran; the set and its cache equal those of one process."""
    shards = len(SampleSet.open(place.source).shard_names)
    assert shards == 3
    written = 0
    for part, left in ((2, 2), (0, 1), (2, 1)):
        done = place.generate(f"slice={part}/3")
        assert (done.digest, done.capture, done.shards_left) == (None, None, left)
        assert not place.set().exists()
        written += done.written
    whole = place.generate()
    assert written + whole.written == SOURCE_SAMPLES
    assert whole.written > 0
    assert (whole.digest, whole.shards_left) == (SampleSet.open(greedy.set()).digest, 0)
    assert whole.capture is not None
    assert whole.capture.digest == open_cache(greedy.cache()).digest
    assert not list(place.folder.glob(".*"))


def test_run_refuses_what_belongs_to_generate(place: Place) -> None:
    with pytest.raises(ConfigError, match="output_set belongs to `cache-teacher generate`"):
        run_capture(load_config(CacheTeacherConfig, (), place.arguments()))


def test_the_command_prints_one_json_object_and_its_status_tells_of_rejections(place: Place, greedy: Place) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*COMMAND, "generate", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)

    done = run(*greedy.arguments(), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["samples"], found["written"]) == (SOURCE_SAMPLES, 0)
    assert found["capture"]["digest"] == open_cache(greedy.cache()).digest
    done = run(*place.arguments("generate.max_new_tokens=4"))
    assert done.returncode == 3, done.stderr
    assert "unfinished answer, digest" in done.stdout
    done = run(*place.arguments("data=nowhere"))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
