"""LLaVA: a vision tower of a fixed resolution, a projector and a language model; also students built from parts."""
