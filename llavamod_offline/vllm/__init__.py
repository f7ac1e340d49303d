"""vLLM, driven with this project's own tokens and images; imported only where an engine asks for it."""
