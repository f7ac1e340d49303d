"""The fallback for models without a recording twin: records made from vLLM's `prompt_logprobs`.

Shape suffixes: T tokens of a prompt, N wanted rows, K most likely ids listed for each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llavamod_offline.vllm import plugin
from teacher_cache.engines.listed import describe_limits, listed_ids, listed_records
from teacher_cache.engines.vllm import engine
from teacher_cache.engines.vllm.wire import RecordReply, RecordRequest

if TYPE_CHECKING:
    from vllm.logprobs import FlatLogprobs

    from teacher_cache.capture_setup import CaptureSetup, SetupValues


class PromptLogprobs:
    """The generating runner: one token is generated and thrown away, the prompt's own log-probs are kept."""

    shares_prefixes = False

    def parameters(self, order: RecordRequest, *, reuse: bool) -> Any:
        """Ask for the most likely ids of every row; those of the last row are the generated token's alternatives."""
        from vllm import SamplingParams

        listed = listed_ids(order.settings.top_k, order.vocab_size)
        return SamplingParams(
            max_tokens=1,
            temperature=0.0,
            prompt_logprobs=listed,
            logprobs=listed,
            flat_logprobs=True,
            detokenize=False,
            skip_reading_prefix_cache=True,
        )

    def answer(self, order: RecordRequest, output: Any) -> RecordReply:
        """Records of the wanted rows. Column 0 of what vLLM lists is the actual token."""
        ids_TK, log_probs_TK = _table(output.prompt_logprobs)
        last_ids_K, last_log_probs_K = _table(output.outputs[0].logprobs)
        ids_NK = np.concatenate([ids_TK, last_ids_K])[order.rows_N]
        log_probs_NK = np.concatenate([log_probs_TK, last_log_probs_K])[order.rows_N]
        records, finite_N = listed_records(
            ids_NK[:, 1:],
            log_probs_NK[:, 1:],
            order.targets_N,
            log_probs_NK[:, 0],
            order.settings,
            vocab_size=order.vocab_size,
        )
        return RecordReply(records, finite_N, None)


def _table(flat: FlatLogprobs) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Ids and log-probs, one row for each position that has any; all rows are equally long."""
    starts, ends = np.asarray(flat.start_indices), np.asarray(flat.end_indices)
    rows = int((ends > starts).sum())
    width = int((ends - starts).max(initial=0))
    ids = np.asarray(flat.token_ids, np.int64).reshape(rows, width)
    return ids, np.asarray(flat.logprobs, np.float64).reshape(rows, width)


def load_engine(setup: CaptureSetup) -> engine.VllmCaptureEngine:
    """Start vLLM on the teacher to generate one token after each prompt; see `engine.load_engine`."""
    return engine.start_vllm(setup, PromptLogprobs(), plugin, spare=1, runner="generate", max_logprobs=-1)


def describe(given: SetupValues) -> dict[str, Any]:
    """The version and settings of vLLM, and what its records lack; see `registry.describe_engine`."""
    return {**engine.describe(given), "limits": describe_limits(given)}
