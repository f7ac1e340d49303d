"""Twins of vLLM's models that answer with records: `RecordsX` of this module is vLLM's X, for the pooling runner."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.interfaces_base import VllmModelForPooling

from llavamod_offline.vllm.models import twin, vllm_model
from teacher_cache.engines.vllm.plugin import PREFIX
from teacher_cache.engines.vllm.pooler import RecordPooler


def __getattr__(name: str) -> type:
    if not name.startswith(PREFIX):
        raise AttributeError(name)
    base = vllm_model(name.removeprefix(PREFIX))

    def start(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
        base.__init__(self, vllm_config=vllm_config, prefix=prefix)
        self.pooler = RecordPooler(self.compute_logits)

    return twin(base, name, VllmModelForPooling, __init__=start, __module__=__name__)
