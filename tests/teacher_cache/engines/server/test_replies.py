"""Reading a prompt's log-probs: which numbers belong to which row, and which are not log-probs."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from llavamod_offline.errors import ModelError
from teacher_cache.engines.server.replies import ListedRows, check_log_probs, listed_rows, read_object
from tests.teacher_cache.engines.server.replaying import LISTED, RECORDED


def _entry(*triples: tuple[int, int, float | None]) -> dict[str, dict[str, Any]]:
    """Ids with their ranks and log-probs, in any order."""
    return {str(token): {"rank": rank, "logprob": number, "decoded_token": None} for token, rank, number in triples}


def _reply(*table: Any) -> dict[str, Any]:
    return {"choices": [{"prompt_logprobs": [None, *table]}]}


def test_the_token_that_follows_is_no_likely_id_unless_its_rank_says_so() -> None:
    ids_T = np.array([5, 9, 7, 3])
    reply = _reply(
        _entry((9, 40, -9.0), (2, 2, -1.5), (1, 1, -0.5)), _entry((7, 1, -0.1), (4, 2, -3.0)), _entry((3, 3, -5.0))
    )
    rows = listed_rows(reply, ids_T, np.array([0, 1]), 2, "x")
    assert rows.ids_NK.tolist() == [[1, 2], [7, 4]]
    assert rows.log_probs_NK.tolist() == [[-0.5, -1.5], [-0.1, -3.0]]
    assert rows.target_log_probs_N.tolist() == [-9.0, -0.1]
    with pytest.raises(ModelError, match="x: the server lists 0 of 2 ids at token 3"):
        listed_rows(reply, ids_T, np.array([2]), 2, "x")


def test_both_endpoints_of_a_real_server_are_read() -> None:
    for entry in json.loads(RECORDED.read_text())["replies"]:
        if entry["status"] == 200:
            body = entry["body"]
            ids = body["choices"][0].get("prompt_token_ids") or body["prompt_token_ids"]
            rows = listed_rows(body, np.array(ids), np.arange(len(ids) - 1), entry["listed"], "x")
            assert rows.ids_NK.shape == (len(ids) - 1, entry["listed"])
            assert (np.diff(rows.log_probs_NK, axis=1) <= 0).all()
            assert (rows.target_log_probs_N <= rows.log_probs_NK[:, 0]).all()
            check_log_probs(rows, 10_000, about="x")


def test_the_whole_vocabulary() -> None:
    reply = _reply(_entry((2, 1, -0.5), (0, 3, -9999.0), (1, 2, -1.5)))
    rows = listed_rows(reply, np.array([0, 1]), np.array([0]), -1, "x")
    assert rows.ids_NK.tolist() == [[2, 1, 0]]
    assert np.isneginf(rows.log_probs_NK[0, 2])


def test_a_number_that_json_lacks_is_not_finite() -> None:
    rows = listed_rows(_reply(_entry((1, 1, None), (2, 2, -1.0))), np.array([0, 1]), np.array([0]), 2, "x")
    assert np.isnan(rows.log_probs_NK[0, 0])
    check_log_probs(rows, 10, about="x")  # the sequence is rejected, not the server


@pytest.mark.parametrize("scale", [-20.0, 5.0])
def test_logits_are_refused(scale: float) -> None:
    """As with `--logprobs-mode raw_logits`: too small, or too large in sum."""
    rows = ListedRows(np.array([[1, 2]]), np.array([[scale, scale - 1]]), np.array([scale]))
    with pytest.raises(ModelError, match=r"x: what the server lists are not log-probs .*--logprobs-mode raw_logprobs"):
        check_log_probs(rows, 1000, about="x")


@pytest.mark.parametrize("content", [b"<html>", b"[1]", b""])
def test_what_is_no_object_is_refused(content: bytes) -> None:
    with pytest.raises(ModelError, match=r"engine\.url: its version: the reply is not (JSON|an object): correct the"):
        read_object(content, "its version")


def test_a_reply_without_log_probs_is_refused() -> None:
    with pytest.raises(ModelError, match="x: the server gives no log-probs of its prompt"):
        listed_rows({"choices": []}, np.array([0, 1]), np.array([0]), LISTED, "x")
