"""Models whose published figures stand beside one's own; the figures are in the tasks' headlines."""

from __future__ import annotations

from dataclasses import dataclass

SOURCES = {
    "LLaVA-MoD-2B": "LLaVA-MoD, arXiv 2408.15881",
    "LLaVA-MoD-1.8B": "as quoted by LLaVA-KD, arXiv 2410.16236",
    "LLaVA-MoD-0.5B": "as quoted by LLaVA-KD, arXiv 2410.16236",
    "LLaVA-1.5-13B": "LLaVA's MODEL_ZOO",
}


@dataclass(frozen=True)
class Published:
    """A model's published figures by `Headline.key`."""

    model: str
    source: str
    figures: dict[str, float]
