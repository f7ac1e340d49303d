"""Answering with any image-text-to-text checkpoint of transformers, by its own processor and chat template.

For models from elsewhere: the prompt wording around the question, image handling and end tokens are the checkpoint's
own, as the protocol states. Shape suffixes as in `hf`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig

from eval.engines.hf import DTYPES, pick_dtype, settings_of
from eval.engines.protocol import Answer
from eval.example import Example
from llavamod_offline.data.images import decode_image
from llavamod_offline.errors import ModelError
from llavamod_offline.families.processor import loading
from llavamod_offline.models.checkpoint import check_folder, load_weights
from llavamod_offline.models.device import pick_device


class ProcessorEngine:
    """A local checkpoint folder with weights, processor and chat template; code in the folder is never run.

    This project's `template` and `image_aspect` have no effect. Errors: `ModelError` for an incomplete folder.
    """

    def __init__(
        self, folder: Path, *, template: str = "", image_aspect: str = "", dtype: str = "auto", device: str = "auto"
    ) -> None:
        check_folder(folder)
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder}: no config.json, so it is not a checkpoint folder")
        self.device = pick_device(device)
        self.dtype = pick_dtype(dtype, self.device)
        with loading(folder):
            self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        if not getattr(self.processor, "chat_template", None):
            raise ModelError(f"{folder}: its processor has no chat template: use engine=hf for a LLaVA student")
        self.processor.tokenizer.padding_side = "left"
        self.model = load_weights(AutoModelForImageTextToText, folder, dtype=DTYPES[self.dtype]).to(self.device)
        self.folder = folder
        ends = self.model.generation_config.eos_token_id or self.processor.tokenizer.eos_token_id
        self.end_ids = list(ends) if isinstance(ends, list | tuple) else [ends]
        if self.end_ids == [None]:
            raise ModelError(f"{folder}: neither generation_config.json nor the tokenizer names an end token")
        self.model.generation_config = GenerationConfig()  # else the folder's would set what `answer` leaves open

    def describe(self) -> dict[str, Any]:
        """The settings that determine the answers."""
        template, aspect = "the checkpoint's chat template", "the checkpoint's processor"
        return settings_of(self.folder, {"engine": "processor"}, template, aspect, self.dtype)

    def answer(self, examples: Sequence[Example[Any]], max_new_tokens: int) -> list[Answer]:
        """Answer a batch of questions greedily."""
        conversations, images = [], []
        for example in examples:
            parts: list[dict[str, str]] = [{"type": "text", "text": example.prompt}]
            found = []
            if example.source is not None:
                parts.insert(0, {"type": "image"})
                found.append(decode_image(example.source.read(), name=example.source.name))
            conversations.append([{"role": "user", "content": parts}])
            images.append(found)
        texts = self.processor.apply_chat_template(conversations, tokenize=False, add_generation_prompt=True)
        given: dict[str, Any] = {"images": images} if any(images) else {}
        start = self.processor.tokenizer.bos_token
        if start is not None and all(text.startswith(start) for text in texts):  # the tokenizer would add it again
            given["add_special_tokens"] = False
        inputs = self.processor(text=texts, **given, padding=True, return_tensors="pt").to(self.device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(DTYPES[self.dtype])
        settings = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=self.end_ids,
            pad_token_id=self.end_ids[0],
        )
        with torch.inference_mode():
            output_BX = self.model.generate(**inputs, generation_config=settings)
        generated_BG = output_BX[:, inputs["input_ids"].shape[1] :].tolist()
        return [self._answer(ids_G) for ids_G in generated_BG]

    def _answer(self, ids_G: list[int]) -> Answer:
        end = next((index for index, token in enumerate(ids_G) if token in self.end_ids), None)
        ids = ids_G if end is None else ids_G[:end]
        text = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
        return Answer(str(text).strip(), len(ids), "length" if end is None else "stop")
