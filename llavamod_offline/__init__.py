"""LLaVA-MoD Offline: samples, model families, losses, and everything else that teacher and student share."""

__version__ = "0.1.0"
