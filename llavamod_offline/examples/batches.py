"""Shared by the examples: samples of a packed set as batches of model inputs. Replace this for your own data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from llavamod_offline.data.encode.chat_template import choose_template
from llavamod_offline.data.encode.collate import collate
from llavamod_offline.data.images import ImagePreprocessor
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.families.llava.checkpoint import sequence_encoder
from llavamod_offline.models.checkpoint import load_tokenizer
from teacher_cache import TeacherCache, check_labels


class Batches:
    """Reads samples by their keys, tokenizes them as the student does, and pads them into one batch."""

    def __init__(self, student: Path, data: Path) -> None:
        self.tokenizer = load_tokenizer(student)
        self.samples = SampleSet.open(data)
        template = choose_template("auto", lambda: self.tokenizer)  # the student's own: see its chat_template.jinja
        self._encoder = sequence_encoder(student, self.tokenizer, template, 2048)
        self._images = ImagePreprocessor.from_checkpoint(student, "pad")

    def make(self, keys: Sequence[str], roles: Sequence[str], cache: TeacherCache) -> dict[str, Tensor]:
        """Inputs and labels of all samples in each role, role by role, checked against the cache."""
        samples = [self.samples.read(self.samples.row_of(key)) for key in keys] * len(roles)
        items = [(key, role) for role in roles for key in keys]
        sequences = [self._encoder.encode(sample, role) for sample, (_, role) in zip(samples, items, strict=True)]
        pixels = [[self._images.pixels(image, name=sample.key) for image in sample.images] for sample in samples]
        inputs = collate(sequences, pixels, pad_id=int(self.tokenizer.pad_token_id)).model_inputs()
        check_labels(inputs["labels"], items, cache)  # wrong records never train silently
        return inputs
