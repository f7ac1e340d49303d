"""A checkpoint's own processor and whole model, as any user of transformers runs them: the reference for captures."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoFeatureExtractor, AutoModelForImageTextToText, AutoTokenizer

from llavamod_offline.data.images import decode_image
from llavamod_offline.data.sample import IMAGE_PLACEHOLDER, Sample
from tests.tiny_families import TinyFamily


@dataclass(frozen=True)
class PlainProcessor:
    """Processor and model of a folder; `adds_lines`: its chat template itself adds the line break after an image."""

    processor: Any
    model: Any
    adds_lines: bool

    def text(self, sample: Sample, role: str) -> str:
        """The whole conversation, as the chat template words it."""
        messages = []
        for turn in sample.conversation(role):
            text = turn.text.replace(f"{IMAGE_PLACEHOLDER}\n", IMAGE_PLACEHOLDER) if self.adds_lines else turn.text
            pieces = [piece for piece in re.split(f"({IMAGE_PLACEHOLDER})", text) if piece]
            parts = [
                {"type": "image"} if piece == IMAGE_PLACEHOLDER else {"type": "text", "text": piece} for piece in pieces
            ]
            messages.append({"role": turn.role, "content": parts})
        return str(self.processor.tokenizer.apply_chat_template(messages, tokenize=False))

    @torch.inference_mode()
    def log_probs(self, pairs: Sequence[tuple[Sample, str]], side: str) -> list[tuple[np.ndarray, torch.Tensor]]:
        """Run one padded batch of (sample, role): the token ids [T] and log-probs [T, LM head rows] of each."""
        images = [[decode_image(image, name=sample.key) for image in sample.images] for sample, _ in pairs]
        if type(self.processor).__name__ == "PaliGemmaProcessor":  # it has no chat template
            texts = [sample.turns[0].text.replace(f"{IMAGE_PLACEHOLDER}\n", IMAGE_PLACEHOLDER) for sample, _ in pairs]
            suffix = {"suffix": [sample.conversation(role)[1].text for sample, role in pairs]}
        else:
            texts, suffix = [self.text(sample, role) for sample, role in pairs], {}
        start = self.processor.tokenizer.bos_token
        inputs = self.processor(
            text=texts,
            images=images if any(images) else None,
            return_tensors="pt",
            padding=True,
            padding_side=side,
            **suffix,
            **({"add_special_tokens": False} if start and texts[0].startswith(start) else {}),
        )
        inputs.pop("labels", None)
        inputs = inputs.to(torch.float32)
        logits = self.model(**inputs).logits.float()
        found = []
        for ids, mask, rows in zip(inputs["input_ids"], inputs["attention_mask"], logits, strict=True):
            found.append((ids[mask.bool()].numpy(), rows[mask.bool()]))
        return found


def open_plain(tiny: TinyFamily, folder: Path) -> PlainProcessor:
    """Load a tiny family's folder; the processor has no part for videos, which would need torchvision."""
    kind = tiny.images["image_processor_type"]
    found = Path(transformers.__file__).parent.glob("models/*/image_processing_pil_*.py")
    module = next((file for file in found if f"class {kind}Pil(" in file.read_text()), None)
    if module is None:  # one that needs torchvision
        image_class = getattr(transformers, kind)
    else:
        name = f"transformers.models.{module.parent.name}.{module.stem}"
        image_class = getattr(importlib.import_module(name), f"{kind}Pil")
    images = image_class.from_pretrained(folder, local_files_only=True)
    processor_class = getattr(transformers, tiny.processor)
    _without_num2words(processor_class)
    made: Any = type(tiny.processor, (processor_class,), {"check_argument_for_proper_class": lambda *_: None})
    parts = {"image_processor": images, "tokenizer": AutoTokenizer.from_pretrained(folder, local_files_only=True)}
    with contextlib.suppress(OSError, ValueError, ImportError):
        parts["feature_extractor"] = AutoFeatureExtractor.from_pretrained(folder, local_files_only=True)
    parts = {name: part for name, part in parts.items() if name in made.get_attributes()}
    parts |= {name: None for name in made.get_attributes() if name not in parts}
    processor = made(**parts, **tiny.more, chat_template=tiny.chat_template)
    model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return PlainProcessor(processor, model.eval(), "<image>\n" in tiny.chat_template)


def _without_num2words(processor_class: Any) -> None:
    module: Any = importlib.import_module(processor_class.__module__)
    if hasattr(module, "num2words") and module.num2words is None:
        module.num2words = str
