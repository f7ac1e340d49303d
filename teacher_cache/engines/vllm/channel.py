"""The two ways in which an order reaches vLLM and an answer comes back."""

from __future__ import annotations

from typing import Any, Protocol

from teacher_cache.engines.vllm.wire import RecordReply, RecordRequest, unpack


class Channel(Protocol):
    """How to ask vLLM for the records of a prompt. `shares_prefixes`: it can leave out rows that it has computed."""

    shares_prefixes: bool

    def parameters(self, order: RecordRequest, *, reuse: bool) -> Any:
        """vLLM's parameters of the request; `reuse`: the prompt's beginning may come from the prefix cache."""
        ...

    def answer(self, order: RecordRequest, output: Any) -> RecordReply | None:
        """The answer in vLLM's output; None if some wanted row was not computed."""
        ...


class PooledRecords:
    """The pooling runner of a recording model, see `pooler`."""

    shares_prefixes = True

    def parameters(self, order: RecordRequest, *, reuse: bool) -> Any:
        """The order goes along as it is."""
        from vllm import PoolingParams

        from teacher_cache.engines.vllm.pooler import TASK

        return PoolingParams(task=TASK, skip_reading_prefix_cache=not reuse, extra_kwargs=order.to_arguments())

    def answer(self, order: RecordRequest, output: Any) -> RecordReply | None:
        """Unpack the tensor."""
        return unpack(output.outputs.data.numpy())
