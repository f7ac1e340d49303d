"""What every test that needs vLLM shares: a mark that skips it where there is none, and settings for a small CPU."""

from __future__ import annotations

import importlib.util
import os

import pytest

from llavamod_offline.vllm.settings import VllmSettings

# vLLM compiles a few helpers on a CPU, which takes longer than any test; and it would bind threads to cores of its own.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

SETTINGS = VllmSettings(kv_cache_gib=0.1, max_num_seqs=16)
NEEDS_VLLM = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
    # Of others' making: what vLLM, and what it imports, warn about.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]
