"""Reads the log-probs of a prompt in a server's reply.

Shape suffixes: T tokens of a prompt, N wanted rows, K most likely ids listed for each.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llavamod_offline.errors import ModelError

_NO_PROBABILITY = -9999.0  # what vLLM writes for log 0, which JSON lacks
_ROUNDING = 1e-3


@dataclass(frozen=True)
class ListedRows:
    """The most likely ids of N rows with their log-probs, and those of the tokens that follow the rows."""

    ids_NK: NDArray[np.int64]
    log_probs_NK: NDArray[np.float64]
    target_log_probs_N: NDArray[np.float64]


def read_object(content: bytes, about: str) -> dict[str, Any]:
    """Parse a reply as a JSON object. Errors: `ModelError` if it is not one."""
    try:
        found = json.loads(content)
    except ValueError as error:
        raise ModelError(f"engine.url: {about}: the reply is not JSON: correct the address") from error
    if not isinstance(found, dict):
        raise ModelError(f"engine.url: {about}: the reply is not an object: correct the address")
    return found


def prompt_token_ids(reply: Mapping[str, Any], about: str) -> Sequence[int]:
    """The prompt that the server ran. Errors: `ModelError` if it does not say."""
    found = _field(reply, "prompt_token_ids")
    if not isinstance(found, list):
        raise ModelError(f"{about}: the server does not say which tokens it ran: serve with vLLM 0.32 or later")
    return found


def listed_rows(
    reply: Mapping[str, Any], input_ids_T: NDArray[np.int64], rows_N: NDArray[np.int64], listed: int, about: str
) -> ListedRows:
    """Rows of a prompt; row r predicts the token at r + 1. `listed`: the number of ids asked for, -1 for all.

    Errors: `ModelError` if rows or ids are missing.
    """
    table = _field(reply, "prompt_logprobs")
    if not isinstance(table, list) or len(table) != len(input_ids_T):
        raise ModelError(f"{about}: the server gives no log-probs of its prompt: serve with vLLM 0.32 or later")
    ids, log_probs, targets = [], [], []
    for row in rows_N.tolist():
        entry, target = table[row + 1], str(input_ids_T[row + 1])
        if not isinstance(entry, dict):
            raise ModelError(f"{about}: the server gives no log-probs at token {row + 1}: serve with vLLM 0.32")
        most = len(entry) if listed < 0 else listed
        # The token that follows is always listed, whatever its rank.
        try:
            likely = sorted((value["rank"], int(token), value["logprob"]) for token, value in entry.items())
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"{about}: the server's log-probs at token {row + 1} cannot be read: serve with vLLM 0.32"
            ) from error
        likely = [item for item in likely if item[0] <= most]
        if target not in entry or len(likely) != most:
            raise ModelError(
                f"{about}: the server lists {len(likely)} of {most} ids at token {row + 1}: serve with vLLM 0.32"
            )
        ids.append([token for _, token, _ in likely])
        log_probs.append([number for _, _, number in likely])
        targets.append(entry[target]["logprob"])
    width = len(ids[0]) if ids else 0
    return ListedRows(
        np.array(ids, np.int64).reshape(len(ids), width),
        _numbers(log_probs).reshape(len(ids), width),
        _numbers(targets),
    )


def check_log_probs(rows: ListedRows, head_rows: int, *, about: str) -> None:
    """Refuse numbers that are not log-probs, such as those of a server that gives logits.

    The largest of `head_rows` probabilities is at least their mean, and their sum at most 1. Errors: `ModelError`.
    """
    finite_N = np.isfinite(rows.log_probs_NK).all(1)
    if not rows.log_probs_NK.shape[1] or not finite_N.any():
        return
    log_probs_NK = rows.log_probs_NK[finite_N]
    least = log_probs_NK.max(1).min()
    most = np.exp(np.minimum(log_probs_NK, 1.0)).sum(1).max()
    if least < -math.log(head_rows) - _ROUNDING or most > 1.0 + _ROUNDING:
        raise ModelError(
            f"{about}: what the server lists are not log-probs (a largest one of {least:.2f}, a sum of {most:.3g}): "
            "start it with --logprobs-mode raw_logprobs"
        )


def _field(reply: Mapping[str, Any], name: str) -> Any:
    """A field that the completions endpoint puts into its choice, the tokens endpoint beside it."""
    choices = reply.get("choices") or [{}]
    return choices[0].get(name) if choices[0].get(name) is not None else reply.get(name)


def _numbers(values: Any) -> NDArray[np.float64]:
    found = np.array(values, np.float64)  # None, which stands for NaN in JSON, becomes NaN
    return np.where(found <= _NO_PROBABILITY, -np.inf, found)
