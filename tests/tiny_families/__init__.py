"""Tiny checkpoints of image-text families: random weights in real folders, with their processors and chat templates."""

from tests.tiny_families.form import TinyFamily
from tests.tiny_families.listed import LISTED
from tests.tiny_families.others import OTHERS

TINY_FAMILIES = {**LISTED, **OTHERS}
# Families whose processors import torchvision.
NEED_TORCHVISION = ("mistral3", "pixtral", "gemma4", "lfm2_vl", "cohere2_vision", "llama4", "lighton_ocr")
__all__ = ["NEED_TORCHVISION", "TINY_FAMILIES", "TinyFamily"]
