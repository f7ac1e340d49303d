"""Answering with a LLaVA checkpoint in transformers: left-padded batches, key-value cache, greedy.

Shape suffixes: B questions of a batch, T tokens of the longest prompt, G generated tokens, I images, H and W their
pixels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from eval.engines.prompts import prompt_ids, read_answer
from eval.engines.protocol import Answer
from eval.example import Example
from llavamod_offline.data.encode.chat_template import choose_template
from llavamod_offline.data.images import AUTO_ASPECT, ImagePreprocessor
from llavamod_offline.errors import ConfigError
from llavamod_offline.models.checkpoint import load_llava, load_tokenizer, sequence_encoder
from llavamod_offline.models.device import pick_device
from llavamod_offline.models.export import never_answers
from llavamod_offline.models.hub import checkpoint_name

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class LlavaHfEngine:
    """A LLaVA folder in transformers, with this project's tokenization and image handling.

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
        self.model = load_llava(folder, dtype=DTYPES[self.dtype]).to(self.device)
        self.tokenizer = load_tokenizer(folder)
        limit = int(self.model.config.text_config.max_position_embeddings)
        self.encoder = sequence_encoder(
            self.model.config, self.tokenizer, choose_template(template, lambda: self.tokenizer), limit
        )
        self.images = ImagePreprocessor.from_checkpoint(folder, image_aspect)
        self.folder = folder
        self._suppressed = never_answers(self.model.config, self.tokenizer)

    def describe(self) -> dict[str, Any]:
        """The settings that determine the answers; batch size and device do not."""
        return settings_of(self.folder, {"engine": "hf"}, self.encoder.template.name, self.images.aspect, self.dtype)

    def answer(self, examples: Sequence[Example[Any]], max_new_tokens: int) -> list[Answer]:
        """Answer a batch of questions. Errors: `EvalError` for a prompt too long to leave space for an answer."""
        prompts = [prompt_ids(self.encoder, example, max_new_tokens) for example in examples]
        generated = self.generate(prompts, self._pixels(examples), max_new_tokens)
        return [read_answer(self.encoder, ids_G) for ids_G in generated]

    def generate(
        self, prompts: Sequence[Sequence[int]], pixels_I3HW: Tensor | None, max_new_tokens: int
    ) -> list[list[int]]:
        """Continue a batch of tokenized prompts, given the pixels of all their images, in order → G ids of each."""
        input_ids_BT, attention_BT = self._left_padded(prompts)
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
            output_BX = self.model.generate(
                input_ids=input_ids_BT,
                attention_mask=attention_BT,
                pixel_values=pixels_I3HW,
                generation_config=settings,
            )
        generated: list[list[int]] = output_BX[:, input_ids_BT.shape[1] :].tolist()
        return generated

    def _left_padded(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        longest = max(len(ids) for ids in prompts)
        input_ids_BT = torch.full((len(prompts), longest), self.encoder.end_id, dtype=torch.long)
        attention_BT = torch.zeros_like(input_ids_BT)
        for row, ids in enumerate(prompts):
            input_ids_BT[row, longest - len(ids) :] = torch.tensor(ids)
            attention_BT[row, longest - len(ids) :] = 1
        return input_ids_BT.to(self.device), attention_BT.to(self.device)

    def _pixels(self, examples: Sequence[Example[Any]]) -> Tensor | None:
        pixels = [
            torch.from_numpy(self.images.pixels(example.source.read(), name=example.source.name))
            for example in examples
            if example.source is not None
        ]
        return torch.stack(pixels).to(self.device, DTYPES[self.dtype]) if pixels else None


def settings_of(folder: Path, engine: dict[str, str], template: str, image_aspect: str, dtype: str) -> dict[str, Any]:
    """The result of `AnswerEngine.describe` for an `engine` of this name (and version)."""
    model = {"model": checkpoint_name(folder), "model_sha256": checkpoint_digest(folder)}
    return model | engine | {"template": template, "image_aspect": image_aspect, "dtype": dtype, "decoding": "greedy"}


def checkpoint_digest(folder: Path) -> str:
    """SHA-256 (hex) over the names, sizes and contents of a checkpoint's weights and configuration."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), folder / "config.json", folder / "tokenizer.json"]):
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
