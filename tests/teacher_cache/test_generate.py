"""`generate` as a whole: the toy teacher answers, its answers are a set like any other, and their records fit them."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from llavamod_offline.config import load_config
from llavamod_offline.data.images import ImagePreprocessor
from llavamod_offline.data.pack import write_set
from llavamod_offline.data.sample import Generated, Sample, Turn
from llavamod_offline.data.shards import SampleSet
from llavamod_offline.data.template import get_template
from llavamod_offline.data.tokenise import SequenceEncoder
from llavamod_offline.demo.plan import TEACHER
from llavamod_offline.errors import ConfigError, DataError, LlavaModError
from llavamod_offline.models.checkpoint import load_llava, load_tokenizer, sequence_encoder
from llavamod_offline.toyworld.conversations import captioned, chatted, quizzed
from llavamod_offline.toyworld.draw import encode_scene
from llavamod_offline.toyworld.scene import random_scene
from teacher_cache.config import CacheConfig
from teacher_cache.engines import answers, load_engine
from teacher_cache.engines.answers import Written
from teacher_cache.engines.protocol import Engine
from teacher_cache.generate import Generation, generate
from teacher_cache.job import Job
from teacher_cache.manifest import file_entries
from teacher_cache.reader import open_cache
from teacher_cache.run import run_job
from teacher_cache.written_set import WrittenSet
from tests.teacher_cache.killer import fork_server, generate_and_die
from tests.tiny import tiny_samples

COMMAND = [sys.executable, "-c", "from teacher_cache.cli import main; main()"]
SOURCE_SAMPLES = 9


@dataclasses.dataclass(frozen=True)
class Place:
    """The prompts, and a folder where sets and caches are made of them."""

    source: Path
    folder: Path

    def arguments(self, *settings: str, name: str = "own", data: Path | None = None) -> list[str]:
        """The settings of a generation into `name` and `name-cache`."""
        places = [f"data={data or self.source}", f"output_set={self.set(name)}", f"output={self.cache(name)}"]
        return [*places, f"teacher={TEACHER}", "generate.max_new_tokens=80", "workers=1", *settings]

    def generate(self, *settings: str, **more: Any) -> Generation:
        """Generate in this process."""
        return generate(load_config(CacheConfig, (), self.arguments(*settings, **more)))

    def set(self, name: str = "own") -> Path:
        return self.folder / name

    def cache(self, name: str = "own") -> Path:
        return self.folder / f"{name}-cache"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions, chats of several turns and quizzes about toy scenes, in shards of four."""
    rng = random.Random(5)
    samples = []
    for number in range(SOURCE_SAMPLES):
        scene = random_scene(rng)
        turns = (captioned(scene, rng), chatted(scene, rng, 2), quizzed(scene, rng, 3))[number % 3]
        samples.append(Sample(f"toy-{number}", tuple(turns), (encode_scene(scene),), ("png",), source="toyworld"))
    folder = tmp_path_factory.mktemp("source") / "prompts"
    write_set(samples, folder, shard_samples=4)
    return folder


@pytest.fixture
def place(source: Path, tmp_path: Path) -> Place:
    return Place(source, tmp_path)


@pytest.fixture(scope="module")
def greedy(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Greedy answers to the last turns; tests must leave them as they are."""
    made = Place(source, tmp_path_factory.mktemp("greedy"))
    done = made.generate()
    assert (done.samples, done.rejected, done.written, done.retokenised) == (SOURCE_SAMPLES, 0, SOURCE_SAMPLES, 0)
    assert (done.capture.sequences, done.capture.rejected, done.capture.complete) == (SOURCE_SAMPLES, 0, True)
    return made


class Reference:
    """Plain `model.generate` with the toy teacher, one unpadded prompt at a time."""

    def __init__(self) -> None:
        self.model = load_llava(TEACHER)
        self.tokenizer = load_tokenizer(TEACHER)
        self.encoder: SequenceEncoder = sequence_encoder(TEACHER, self.tokenizer, get_template("qwen"), 2048)
        self.images = ImagePreprocessor.from_checkpoint(TEACHER, "pad")

    def answer(self, turns: Sequence[Turn], images: Sequence[bytes]) -> str:
        """The text of the answer that follows turns that end with the user."""
        ids = torch.from_numpy(self.encoder.encode_prompt(turns))[None]
        pixels = [torch.from_numpy(self.images.pixels(image, name="it")) for image in images]
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=80,
            eos_token_id=self.encoder.end_id,
            pad_token_id=self.encoder.end_id,
            suppress_tokens=[self.encoder.image_token_id],
        )
        output = self.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=torch.stack(pixels) if pixels else None,
            generation_config=settings,
        )
        written = output[0, ids.shape[1] :].tolist()
        assert written[-1] == self.encoder.end_id
        return str(self.tokenizer.decode(written[:-1])).removeprefix(" ")


def rows(folder: Path) -> list[Sample]:
    """All samples of a set."""
    packed = SampleSet.open(folder)
    return [packed.read(row, verify=True) for row in range(len(packed))]


def test_greedy_answers_are_those_of_plain_generate_and_replace_the_last_turn(greedy: Place) -> None:
    reference = Reference()
    manifest = json.loads((greedy.set() / "set.json").read_text())
    about = manifest["generated"]
    before = SampleSet.open(greedy.source)
    assert about["data"] == {"digest": before.digest, "samples": SOURCE_SAMPLES}
    assert about["teacher"] == open_cache(greedy.cache()).fingerprint["teacher"]
    assert about["generate"] == {
        "turns": "last",
        "temperature": 0.0,
        "top_p": 1.0,
        "max_new_tokens": 80,
        "seed": 0,
        "key_suffix": "-generated",
    }
    for old, new in zip(rows(greedy.source), rows(greedy.set()), strict=True):
        assert new.key == f"{old.key}-generated"
        assert (new.turns[:-1], new.images, new.source) == (old.turns[:-1], old.images, old.source)
        assert new.turns[-1].text == reference.answer(old.turns[:-1], old.images)
        assert isinstance(new.generated, Generated)
        assert (new.generated.key, new.generated.set_digest) == (old.key, before.digest)
        assert (new.generated.temperature, new.generated.max_new_tokens, new.generated.turns) == (0.0, 80, "last")
    assert not list(greedy.folder.glob(".*"))


def test_each_written_token_is_the_likeliest_of_its_record(greedy: Place) -> None:
    """The capture saw the same prompt and the same answer, in other batches."""
    cache = open_cache(greedy.cache())
    reference = Reference()
    for sample in rows(greedy.set()):
        answer = Sample("it", (Turn("user", "?"), sample.turns[-1]))
        length = len(reference.encoder.encode(answer, "response").target_ids_N)
        records = cache.records([(sample.key, "response")]).split(
            [1] * cache.sequence(sample.key, "response").n_positions
        )
        for record in records[-length:]:
            assert record.head_ids_H[0] == record.target_ids_N[0]
            assert np.isclose(record.head_log_probs_H[0], record.target_log_probs_N[0], atol=1e-3)


def test_all_turns_follow_one_another(place: Place) -> None:
    done = place.generate("generate.turns=all", "generate.key_suffix=''", "batch_size=3")
    assert done.samples == SOURCE_SAMPLES
    reference = Reference()
    for old, new in zip(rows(place.source), rows(place.set()), strict=True):
        assert new.key == old.key
        turns: list[Turn] = []
        for turn in old.turns:
            turns.append(turn if turn.role == "user" else Turn("assistant", reference.answer(turns, old.images)))
        assert new.turns == tuple(turns)


def test_every_turn_has_random_numbers_of_its_own(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []

    def watched(engine: Any, prompts: Any, decoding: Any) -> list[Written]:
        asked.extend((prompt.key, prompt.stream) for prompt in prompts)
        return write(engine, prompts, decoding)

    write = answers.write_answers
    monkeypatch.setattr(answers, "write_answers", watched)
    place.generate("generate.turns=all", "generate.temperature=1.0")
    assert len(set(asked)) == len(asked) > SOURCE_SAMPLES


def test_sampled_answers_are_the_same_whatever_the_batch(place: Place, greedy: Place) -> None:
    warm = ("generate.temperature=1.0", "generate.top_p=0.95")
    digests = [place.generate(*warm, f"batch_size={size}", name=f"b{size}").digest for size in (1, 4, 16)]
    assert len(set(digests)) == 1
    other = place.generate(*warm, "generate.seed=1", name="other")
    assert other.digest not in digests
    assert SampleSet.open(greedy.set()).digest not in digests


def test_again_there_is_nothing_to_do_and_no_weights_are_loaded(
    place: Place, greedy: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured with the very weights that wrote: they are loaded once; and not at all for what is there."""

    def times() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in place.folder.rglob("*") if file.is_file()}

    loads: list[str] = []

    def counted(job: Job, config: CacheConfig) -> Engine:
        loads.append(config.output)
        return load_engine(job, config)

    monkeypatch.setattr("teacher_cache.generate.load_engine", counted)
    first = place.generate()
    assert len(loads) == 1
    assert first.digest == SampleSet.open(greedy.set()).digest
    assert first.capture.digest == open_cache(greedy.cache()).digest
    before = times()
    second = place.generate()
    assert (second.written, second.tokens, second.capture.sequences, len(loads)) == (0, 0, 0, 1)
    assert (second.digest, second.capture.digest) == (first.digest, first.capture.digest)
    assert times() == before
    shutil.rmtree(place.cache())
    assert place.generate().capture.digest == first.capture.digest


@pytest.mark.slow
def test_killed_at_any_change_it_goes_on_to_the_same_set_and_cache(place: Place, greedy: Place) -> None:
    """SIGKILL before changes below the folder of both: between answers, set and cache, and within each."""
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


def test_answers_that_make_no_sample_are_rejected_with_the_reason(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every kind once; the others are kept, one of them though its text is read as other tokens."""
    tokenizer = load_tokenizer(TEACHER)

    def encode(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    part = next(number for number in range(len(tokenizer)) if tokenizer.decode([number]) == "\ufffd")
    letters = tuple(encode(letter)[0] for letter in " yes")
    assert tokenizer.decode(letters) == " yes"
    assert encode(" yes") != letters
    said = {
        "toy-0": Written((), ended=True),
        "toy-1": Written(encode(" \n"), ended=True),
        "toy-2": Written(encode(" A red"), ended=False),
        "toy-3": Written((*encode(" A"), part), ended=True),
        "toy-4": Written((*encode(" A"), tokenizer.convert_tokens_to_ids("<|im_end|>")), ended=True),
        "toy-5": Written(encode(" A red"), ended=False, finite=False),
        "toy-6": Written(letters, ended=True),
        "toy-7": Written(encode(" A <ima") + encode("ge> circle"), ended=True),
    }
    right = Written(encode(" A red circle."), ended=True)
    monkeypatch.setattr(
        answers, "write_answers", lambda engine, prompts, decoding: [said.get(prompt.key, right) for prompt in prompts]
    )
    done = place.generate()
    assert (done.samples, done.rejected, done.retokenised) == (2, 7, 1)
    assert done.rejected_by_kind == {"unfinished answer": 1, "unusable answer": 6}
    lines = [json.loads(line) for line in (place.set() / "rejected.jsonl").read_text().splitlines()]
    reasons = {line["key"]: line["reason"] for line in lines}
    assert reasons["toy-0"] == reasons["toy-1"] == "the answer is empty"
    assert reasons["toy-2"] == "the answer did not end within generate.max_new_tokens=80"
    assert reasons["toy-3"] == "the answer's tokens are no text: a part of a character stands alone"
    assert reasons["toy-4"].startswith("the answer holds '<|im_end|>', which is no text; template 'qwen' ends with")
    assert reasons["toy-5"] == "the teacher's logits are not finite (NaN or inf)"
    assert "'<image>' stands in an answer" in reasons["toy-7"]
    assert [(line["file"], line["row"]) for line in lines[:2]] == [("prompts-000000.tar", 0), ("prompts-000000.tar", 1)]
    assert [sample.turns[-1].text for sample in rows(place.set())] == ["yes", "A red circle."]
    assert set(open_cache(place.cache()).keys("response")) == {"toy-6-generated", "toy-8-generated"}


def test_long_answers_and_long_prompts_are_rejected(place: Place) -> None:
    """An answer that does not end is not taken as if it did; a prompt that leaves no room is not cut."""
    done = place.generate("generate.max_new_tokens=4")
    assert set(done.rejected_by_kind) == {"unfinished answer"}
    assert 0 < done.samples < SOURCE_SAMPLES
    longest = max(len(Reference().encoder.encode(sample, "response").input_ids_T) for sample in rows(place.source))
    done = place.generate(f"max_length={longest - 8}", name="short")
    lines = [json.loads(line) for line in (place.set("short") / "rejected.jsonl").read_text().splitlines()]
    assert any("tokens, more than max_length" in line["reason"] for line in lines)
    with pytest.raises(DataError, match=r"of 9 rows rejected, more than"):
        place.generate("generate.max_new_tokens=4", "max_rejected=0.01", name="strict")
    assert not place.set("strict").exists()


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        (("output_set=null",), ConfigError, "output_set is not set"),
        (("output_set=s3://bucket/own",), ConfigError, "a set is written to a local folder"),
        (("data=nowhere",), DataError, "'nowhere'"),
        (("data={pairs}",), DataError, "sample 'pair-0000' is a preference"),
        (("engine.kind=vllm_logprobs",), ConfigError, "engine.kind is 'vllm_logprobs', answers are written with hf"),
        (("slice=0/2",), ConfigError, "slice: answers are written in one process"),
        (("generate.temperature=-1",), ConfigError, "generate.temperature is -1, must be 0 or more"),
        (("generate.top_p=0",), ConfigError, "generate.top_p is 0, must lie above 0"),
        (("generate.max_new_tokens=0",), ConfigError, "generate.max_new_tokens is 0"),
        (("generate.key_suffix=.x",), ConfigError, "generate.key_suffix is '.x'"),
        (("generate.turns=first",), ConfigError, "generate.turns"),
        (("output_set={source}",), ConfigError, "is a set that no teacher wrote"),
        (("output_set={folder}",), ConfigError, "exists and is no set"),
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
    with pytest.raises(
        ConfigError, match=r"was generated with other settings: generate.seed: there 0, now 1: set them"
    ):
        greedy.generate("generate.seed=1")
    assert file_entries(greedy.set()) == before
    config = load_config(CacheConfig, (), place.arguments())

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WrittenSet, "finish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generate(config)
    with pytest.raises(ConfigError, match=r"was begun with other settings: generate.temperature: there 0.0, now 0.5"):
        place.generate("generate.temperature=0.5")
    assert place.generate().written == 0
    assert file_entries(place.set()) == before


def test_run_refuses_what_belongs_to_generate(place: Place) -> None:
    with pytest.raises(ConfigError, match="output_set belongs to `cache-teacher generate`"):
        run_job(load_config(CacheConfig, (), place.arguments()))


def test_the_command_prints_one_json_object_and_its_status_tells_of_rejections(place: Place, greedy: Place) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [*COMMAND, "generate", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

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
