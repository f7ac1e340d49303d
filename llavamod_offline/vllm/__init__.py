"""vLLM, driven with this project's own tokens and pictures; imported only where an engine asks for it."""
