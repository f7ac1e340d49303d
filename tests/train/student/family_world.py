"""Students of many families, and a slow reference of their training: the checkpoint's own processor and whole model.

Shape suffixes: T tokens of a sequence, N supervised ones, V ids.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from llavamod_offline.data.images import decode_image
from llavamod_offline.data.sample import IMAGE_PLACEHOLDER, Sample
from llavamod_offline.families import open_family
from llavamod_offline.families.processor import load_processor
from tests.tiny_families import TINY_FAMILIES
from tests.tiny_teachers import write_tiny_onevision, write_tiny_qwen_vl

WRITERS: dict[str, Callable[..., Path]] = {
    "llava_onevision": write_tiny_onevision,
    "qwen2_vl": lambda folder, **more: write_tiny_qwen_vl(folder, "2", **more),
    "qwen2_5_vl": write_tiny_qwen_vl,
    **{name: tiny.write for name, tiny in TINY_FAMILIES.items()},
}


def plain_processor(folder: Path) -> Any:
    """A folder's processor in transformers, without its video part, which needs torchvision."""
    processor = load_processor(folder, AutoConfig.from_pretrained(folder))
    if "SmolVLM" in type(processor).__name__:  # its chat template method queries the video part anyway
        processor.video_processor = SimpleNamespace(num_frames=1, fps=1, video_sampling={"num_frames": 1, "fps": 1})
    return processor


class PlainStudent:
    """A checkpoint's processor and model, run sample by sample."""

    def __init__(self, folder: Path, template: str = "auto") -> None:
        self.family = open_family(folder, template, image_aspect="auto", max_length=4096)
        self.processor = plain_processor(folder)
        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).train()
        self.vocab = len(self.family.encoder.tokenizer)

    def log_probs(self, sample: Sample, role: str) -> tuple[Tensor, Tensor]:
        """The log-probs [N, V] at the tokens of a sample's answers, and these tokens."""
        template = self.family.encoder.template
        text = "".join(segment.text for segment in template.render(sample.conversation(role)))
        images = [decode_image(image, name=sample.key) for image in sample.images]
        start = self.processor.tokenizer.bos_token
        inputs = self.processor(
            text=[text.replace(IMAGE_PLACEHOLDER, self.family.written)],
            images=[images] if images else None,
            return_tensors="pt",
            **({"add_special_tokens": False} if start and text.startswith(start) else {}),
        ).to(torch.float32)
        sequence = self.family.encode(sample, role)
        assert inputs["input_ids"][0].tolist() == sequence.input_ids_T.tolist()
        rows_N = torch.from_numpy(sequence.supervised_N) - 1
        logits_TV = self.model(**inputs).logits[0, :, : self.vocab].float()
        return logits_TV.log_softmax(-1)[rows_N], torch.from_numpy(sequence.target_ids_N)

    def cross_entropies(self, sample: Sample, role: str = "response") -> Tensor:
        """The negative log-probs of the tokens of a sample's answers, [N]."""
        log_probs_NV, targets_N = self.log_probs(sample, role)
        return -log_probs_NV.gather(1, targets_N[:, None])[:, 0]
