"""Answering in transformers with this project's prompts and images: left-padded batches, key-value cache, greedy.

Shape suffixes: B questions of a batch, T tokens of the longest prompt, G generated tokens.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from eval.engines.prompts import asked_sample, never_answers, prompt_sequence, read_answer
from eval.engines.protocol import Answer
from eval.example import Example
from llavamod_offline.data.encode.tokenize import TokenizedSequence
from llavamod_offline.data.images import AUTO_ASPECT
from llavamod_offline.errors import ConfigError
from llavamod_offline.families import SampleImage, open_family
from llavamod_offline.families.folder import joins
from llavamod_offline.families.run import check_model, on_model
from llavamod_offline.models.device import pick_device
from llavamod_offline.models.hub import checkpoint_name
from llavamod_offline.models.loading.adapter import adapter_files

_DESCRIBING = (
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *("chat_template.json", "processor_config.json", "preprocessor_config.json"),
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class HfEngine:
    """A checkpoint folder of any family in transformers.

    Errors: `ModelError` for the folder, `ConfigError` for the settings.
    """

    def __init__(
        self,
        folder: Path,
        *,
        template: str = "auto",
        image_aspect: str = AUTO_ASPECT,
        dtype: str = "auto",
        device: str = "auto",
    ) -> None:
        self.device = pick_device(device)
        self.dtype = pick_dtype(dtype, self.device)
        self.folder = folder
        self.family = open_family(folder, template, image_aspect=image_aspect, max_length=sys.maxsize)
        self.encoder = self.family.encoder
        self.model = self.family.load(DTYPES[self.dtype]).to(self.device)
        check_model(self.family, self.model)
        self._suppressed = never_answers(self.family)
        self._joins = joins(self.family)
        self.model.generation_config = GenerationConfig()  # else the folder's would set what `generate` leaves open

    def describe(self) -> dict[str, Any]:
        """The settings that determine the answers; batch size and device do not."""
        aspect = self.family.describe_images().get("aspect", "")
        return settings_of(self.folder, {"engine": "hf"}, self.encoder.template.name, aspect, self.dtype)

    def answer(self, examples: Sequence[Example[Any]], max_new_tokens: int) -> list[Answer]:
        """Answer a batch of questions. Errors: `EvalError` for a prompt too long to leave space for an answer."""
        samples = [asked_sample(example) for example in examples]
        prompts = [prompt_sequence(self.family, sample, max_new_tokens) for sample in samples]
        images = [self.family.images(sample) for sample in samples]
        size = len(prompts) if self._joins else 1
        generated: list[list[int]] = []
        for start in range(0, len(prompts), size):
            these = slice(start, start + size)
            generated += self.generate(prompts[these], images[these], max_new_tokens)
        return [read_answer(self.encoder, ids_G) for ids_G in generated]

    def generate(
        self, prompts: Sequence[TokenizedSequence], images: Sequence[Sequence[SampleImage]], max_new_tokens: int
    ) -> list[list[int]]:
        """Continue a batch of tokenized prompts, given the images of each; returns G ids for each."""
        inputs = on_model(self.model, self.family.model_inputs(prompts, images, left=True))
        settings = GenerationConfig(
            do_sample=False,
            num_beams=1,
            use_cache=True,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.encoder.end_id,
            pad_token_id=self.encoder.end_id,
            suppress_tokens=self._suppressed or None,
        )
        with torch.inference_mode():
            output_BX = self.model.generate(**inputs, generation_config=settings)
        generated: list[list[int]] = output_BX[:, inputs["input_ids"].shape[1] :].tolist()
        return generated


def settings_of(folder: Path, engine: dict[str, str], template: str, image_aspect: str, dtype: str) -> dict[str, Any]:
    """The result of `AnswerEngine.describe` for an `engine` of this name (and version)."""
    model = {"model": checkpoint_name(folder), "model_sha256": checkpoint_digest(folder)}
    return model | engine | {"template": template, "image_aspect": image_aspect, "dtype": dtype, "decoding": "greedy"}


def checkpoint_digest(folder: Path) -> str:
    """SHA-256 (hex) over the names and contents of a checkpoint's weights and whatever else determines its answers.

    That is its configuration, tokenizer, chat template, processor and adapter.
    """
    digest = hashlib.sha256()
    described = [file for file in map(folder.joinpath, _DESCRIBING) if file.is_file()]
    for file in [*sorted([*folder.glob("*.safetensors"), *described]), *adapter_files(folder)]:
        with file.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        digest.update(f"{file.name}\0{content}\n".encode())
    return digest.hexdigest()


def pick_dtype(name: str, device: torch.device) -> str:
    """Resolve a precision; `auto` is float32 on a CPU, else bfloat16. Errors: `ConfigError` if it is unknown."""
    if name == "auto":
        return "float32" if device.type == "cpu" else "bfloat16"
    if name not in DTYPES:
        raise ConfigError(f"dtype '{name}' is unknown: choose auto, {', '.join(DTYPES)}")
    return name
