"""Run vLLM with this project's tokens and images; imported only by engines that need it."""
