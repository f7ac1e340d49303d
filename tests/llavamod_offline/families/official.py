"""The official way to a teacher's logits: the checkpoint's own processor over text and images, then the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from llavamod_offline.data.encode.template import get_template
from llavamod_offline.data.images import decode_image
from llavamod_offline.data.sample import IMAGE_PLACEHOLDER, Sample
from tests.tiny_teachers import write_tiny_llava_llama, write_tiny_onevision, write_tiny_qwen_vl

_QWEN_IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


class _NoVideo:
    """Processor constructors without their video part, which needs torchvision."""

    def __init__(self, processor_class: Any) -> None:
        self._class = processor_class

    def __call__(self, **settings: Any) -> Any:
        made = type(self._class.__name__, (self._class,), {"check_argument_for_proper_class": lambda *_: None})
        return made(**settings)


# LLaVAs by tower, feature selection and number of the tower's non-patch tokens.
LLAVAS = {
    "llava_llama": ("clip", "default", 1),
    "llava_siglip": ("siglip", "full", 0),
    "llava_siglip_default": ("siglip", "default", 0),
    "llava_dinov2": ("dinov2", "default", 1),
    "llava_dinov2_registers": ("dinov2_with_registers", "full", 5),
}
FAMILIES = (*LLAVAS, "qwen2_vl", "qwen2_5_vl", "llava_onevision")


@dataclass(frozen=True)
class Official:
    """Processor and model of a folder; `image` is how an image is written in text."""

    folder: Path
    processor: Any
    model: Any
    image: str

    def text(self, sample: Sample, role: str, template: str = "chatml") -> str:
        """The whole conversation as one text, one image token per image."""
        pieces = [segment.text for segment in get_template(template).render(sample.conversation(role))]
        return "".join(pieces).replace(IMAGE_PLACEHOLDER, self.image)

    @torch.inference_mode()
    def log_probs(self, pairs: Sequence[tuple[Sample, str]]) -> list[tuple[np.ndarray, torch.Tensor]]:
        """Run one padded batch of (sample, role): the token ids [T] and log-probs [T, LM head rows] of each."""
        images = [[decode_image(image, name=sample.key) for image in sample.images] for sample, _ in pairs]
        inputs = self.processor(
            text=[self.text(sample, role) for sample, role in pairs],
            images=images if any(images) else None,
            return_tensors="pt",
            padding=True,
            padding_side="right",
        )
        logits = self.model(**inputs).logits.float()
        found = []
        for ids, mask, rows in zip(inputs["input_ids"], inputs["attention_mask"], logits, strict=True):
            length = int(mask.sum())
            found.append((ids[:length].numpy(), rows[:length]))
        return found


def write_family(name: str, folder: Path) -> Path:
    """Write a tiny checkpoint of a family."""
    if name in LLAVAS:
        tower, strategy, _ = LLAVAS[name]
        return write_tiny_llava_llama(folder, tower=tower, strategy=strategy)
    if name == "llava_onevision":
        return write_tiny_onevision(folder)
    return write_tiny_qwen_vl(folder, "2" if name == "qwen2_vl" else "2.5")


def open_official(name: str, folder: Path) -> Official:
    """Load processor and model of a family's folder as transformers itself would."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    local = {"local_files_only": True}
    if name in LLAVAS:
        tower, strategy, extra = LLAVAS[name]
        kind = {"clip": CLIPImageProcessorPil, "siglip": SiglipImageProcessorPil}.get(tower, BitImageProcessorPil)
        processor = LlavaProcessor(
            image_processor=kind.from_pretrained(folder, **local),
            tokenizer=tokenizer,
            patch_size=7 if tower == "siglip" else 8,
            vision_feature_select_strategy=strategy,
            num_additional_image_tokens=extra,
        )
        return Official(folder, processor, _load(AutoModelForImageTextToText, folder), IMAGE_PLACEHOLDER)
    if name == "llava_onevision":
        processor = _NoVideo(LlavaOnevisionProcessor)(
            image_processor=LlavaOnevisionImageProcessorPil.from_pretrained(folder, **local),
            tokenizer=tokenizer,
            num_image_tokens=16,
            vision_feature_select_strategy="full",
            vision_aspect_ratio="anyres_max_4",
        )
        return Official(folder, processor, _load(LlavaOnevisionForConditionalGeneration, folder), IMAGE_PLACEHOLDER)
    kinds = {
        "qwen2_vl": (Qwen2VLProcessor, Qwen2VLForConditionalGeneration),
        "qwen2_5_vl": (Qwen2_5_VLProcessor, Qwen2_5_VLForConditionalGeneration),
    }
    processor_class, model_class = kinds[name]
    processor = _NoVideo(processor_class)(
        image_processor=Qwen2VLImageProcessorPil.from_pretrained(folder, **local), tokenizer=tokenizer
    )
    return Official(folder, processor, _load(model_class, folder), _QWEN_IMAGE)


def _load(model_class: Any, folder: Path) -> Any:
    return model_class.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
