"""The pooler of a recording model: hidden states at the wanted rows → the LM head → records, on the model's device.

Shape suffixes: T rows of a step, N wanted rows of a sequence or of all that end in a step, R of them in a chunk, M
hidden states of a sequence, D their size, V ids.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from vllm.model_executor.layers.pooler import PoolingParamsUpdate

from teacher_cache.engines.make_records import begin_sequence_records, make_records, rows_per_chunk
from teacher_cache.engines.tail_samples import sequence_uniforms
from teacher_cache.engines.vllm.wire import NOTHING, RecordRequest, pack
from teacher_cache.format.record import RecordSettings

TASK = "token_classify"
_TRIAL = RecordSettings(1.0, 128, 64, 64.0, (1.5, 2.0, 4.0))


class RecordPooler(nn.Module):
    """Answers each request with the packed records of the rows its `RecordRequest` names (vLLM's `Pooler` interface).

    A prompt may come in pieces (chunked prefill), and its beginning from the prefix cache. Rows that were not computed
    here cannot be recorded: the answer is then `wire.NOTHING`.
    """

    def __init__(self, compute_logits: Callable[[Tensor], Tensor | None]) -> None:
        super().__init__()
        self._compute_logits = compute_logits

    def get_supported_tasks(self) -> set[str]:
        """The only vLLM task that returns something for each row."""
        return {TASK}

    def get_pooling_updates(self, task: str) -> Any:
        """Nothing is needed besides what the request says."""
        return PoolingParamsUpdate()

    def forward(self, hidden_states: Tensor, pooling_metadata: Any) -> list[Tensor | None]:
        """Keep the wanted rows of this step, [T, D]; answer the requests whose prompt ends in it."""
        cursor = pooling_metadata.get_pooling_cursor()
        if any(params.extra_kwargs is None for params in pooling_metadata.pooling_params):
            return self._trial(hidden_states, len(pooling_metadata.pooling_params))
        answers: list[Tensor | None] = [None] * len(pooling_metadata.pooling_params)
        ready: list[tuple[int, RecordRequest, Tensor]] = []
        step = zip(
            pooling_metadata.pooling_params,
            pooling_metadata.pooling_states,
            torch.split(hidden_states, cursor.num_scheduled_tokens_cpu.tolist()),
            cursor.seq_lens_cpu.tolist(),
            cursor.get_finished_mask(),
            strict=True,
        )
        for number, (params, state, states_TD, end, finished) in enumerate(step):
            order = RecordRequest.from_arguments(params.extra_kwargs)
            parts: list[tuple[int, Tensor]] = state.hidden_states_cache
            _keep(parts, order.rows_N, states_TD, end - len(states_TD))
            if not finished:
                continue
            kept, rows_ND = sum(len(rows) for _, rows in parts), [rows for _, rows in parts]
            state.clean()
            if kept == len(order.rows_N):
                ready.append((number, order, torch.cat(rows_ND) if rows_ND else hidden_states[:0]))
            else:
                answers[number] = torch.from_numpy(NOTHING.copy())
        for _, some in groupby(ready, key=lambda item: (item[1].settings, item[1].vocab_size)):
            for number, answer in self._answer(list(some)):
                answers[number] = torch.from_numpy(answer)
        return answers

    def _answer(self, ready: list[tuple[int, RecordRequest, Tensor]]) -> list[tuple[int, NDArray[np.int32]]]:
        """The records of sequences with the same record settings, all at once: their rows are chunked together."""
        settings, vocab_size = ready[0][1].settings, ready[0][1].vocab_size
        rows_ND = torch.cat([rows for _, _, rows in ready])
        finish = begin_sequence_records(
            rows_ND,
            [order.targets_N for _, order, _ in ready],
            [sequence_uniforms(order.seed, order.key, order.role, len(rows)) for _, order, rows in ready],
            settings,
            logits_of=lambda rows_RD: self._logits(rows_RD)[:, :vocab_size],
            vocab_size=vocab_size,
        )
        answers = []
        for (number, order, rows), (records, finite_N) in zip(ready, finish(), strict=True):
            states_MD = None
            if order.states_M is not None:
                states_MD = rows[torch.from_numpy(order.states_M).to(rows.device)].float().cpu().numpy()
            answers.append((number, pack(records, finite_N, states_MD)))
        return answers

    def _logits(self, rows_RD: Tensor) -> Tensor:
        logits_RV = self._compute_logits(rows_RD)
        assert logits_RV is not None, "logits are gathered on every rank"
        return logits_RV

    def _trial(self, hidden_states: Tensor, requests: int) -> list[Tensor | None]:
        """For vLLM's memory measurement at start-up: the largest chunk of rows that will ever be held at once."""
        width = self._logits(hidden_states[:1]).shape[-1]
        rows = min(len(hidden_states), rows_per_chunk(width, hidden_states.device.type))
        logits_RV = self._logits(hidden_states[:rows])
        targets_R = torch.zeros(rows, dtype=torch.int64, device=logits_RV.device)
        make_records(logits_RV, targets_R, torch.zeros_like(targets_R, dtype=torch.float64), _TRIAL)
        return [torch.from_numpy(NOTHING.copy())] * requests


def _keep(parts: list[tuple[int, Tensor]], rows_N: NDArray[np.int64], states_TD: Tensor, start: int) -> None:
    """Add the wanted rows among those from `start` on; rows recomputed after preemption replace the earlier ones."""
    first, last = np.searchsorted(rows_N, [start, start + len(states_TD)]).tolist()
    parts[:] = [(number, rows) for number, rows in parts if number + len(rows) <= first]
    if last > first:
        inside = torch.from_numpy(rows_N[first:last] - start).to(states_TD.device)
        parts.append((first, states_TD[inside]))  # indexing copies: vLLM reuses the buffer
