"""Shared by tests that need vLLM: a mark that skips them where it is not installed, and settings for a small CPU."""

from __future__ import annotations

import importlib.util
import os

import pytest

from llavamod_offline.vllm.settings import VllmSettings

# On a CPU, vLLM would compile a few helpers, which takes longer than any test, and pin threads to cores of its choice.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

SETTINGS = VllmSettings(kv_cache_gib=0.1, max_num_seqs=16)
NEEDS_VLLM = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make test-vllm"),
    # Not ours: warnings from vLLM and what it imports.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
]
