"""How images become square; without torch, for the settings."""

from __future__ import annotations

from typing import Literal

ImageAspect = Literal["auto", "pad", "square"]
