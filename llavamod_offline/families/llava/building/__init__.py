"""Build a LLaVA student from a vision tower, a language model and a projector."""

from llavamod_offline.families.llava.building.llava import build_llava, build_tokenizer

__all__ = ["build_llava", "build_tokenizer"]
