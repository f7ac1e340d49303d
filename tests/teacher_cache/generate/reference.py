"""Prompts about toy scenes, the toy teacher's answers to them, and plain `model.generate` to compare with."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from llavamod_offline.config import load_config
from llavamod_offline.data.encode.template import get_template
from llavamod_offline.data.encode.tokenize import SequenceEncoder
from llavamod_offline.data.images import ImagePreprocessor
from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.demo.plan import TEACHER
from llavamod_offline.families.llava.checkpoint import load_llava, sequence_encoder
from llavamod_offline.models.checkpoint import load_tokenizer
from llavamod_offline.toyworld.conversations import captioned, chatted, quizzed
from llavamod_offline.toyworld.draw import encode_scene
from llavamod_offline.toyworld.scene import random_scene
from teacher_cache.config import CacheTeacherConfig
from teacher_cache.generate.run import Generation, generate

SOURCE_SAMPLES = 9
# For a teacher with random weights, which rarely ends an answer by itself.
UNTRAINED = ("template=auto", "generate.max_new_tokens=40", "generate.stop=[n]", "max_rejected=1.0")


@dataclasses.dataclass(frozen=True)
class Place:
    """The prompts, and a folder for the sets and caches made from them."""

    source: Path
    folder: Path

    def arguments(self, *settings: str, name: str = "own", data: Path | None = None) -> list[str]:
        """The settings of a generation into `name` and `name-cache`."""
        places = [f"data={data or self.source}", f"output_set={self.set(name)}", f"output={self.cache(name)}"]
        return [*places, f"teacher={TEACHER}", "generate.max_new_tokens=80", *settings]

    def generate(self, *settings: str, **more: Any) -> Generation:
        """Generate in this process."""
        return generate(load_config(CacheTeacherConfig, (), self.arguments(*settings, **more)))

    def set(self, name: str = "own") -> Path:
        return self.folder / name

    def cache(self, name: str = "own") -> Path:
        return self.folder / f"{name}-cache"


def write_prompts(folder: Path) -> Path:
    """Captions, chats of several turns and quizzes about toy scenes, in shards of four."""
    rng = random.Random(5)
    samples = []
    for number in range(SOURCE_SAMPLES):
        scene = random_scene(rng)
        turns = (captioned(scene, rng), chatted(scene, rng, 2), quizzed(scene, rng, 3))[number % 3]
        samples.append(Sample(f"toy-{number}", tuple(turns), (encode_scene(scene),), ("png",), source="toyworld"))
    return write_set(samples, folder, shard_samples=4).path


class Reference:
    """Runs plain `model.generate` with the toy teacher, one unpadded prompt at a time."""

    def __init__(self) -> None:
        self.model = load_llava(TEACHER)
        self.tokenizer = load_tokenizer(TEACHER)
        self.encoder: SequenceEncoder = sequence_encoder(TEACHER, self.tokenizer, get_template("qwen"), 2048)
        self.images = ImagePreprocessor.from_checkpoint(TEACHER, "pad")

    def answer(self, turns: Sequence[Turn], images: Sequence[bytes]) -> str:
        """The text of the answer to turns that end with the user's."""
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
