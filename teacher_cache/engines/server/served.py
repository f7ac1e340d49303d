"""What a server runs: its version and model, and its scores for a short text, by which the model is recognised."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llavamod_offline.errors import ConfigError, ModelError
from teacher_cache.engines.server.client import ServerClient, ServerRefusedError
from teacher_cache.engines.server.replies import listed_rows, prompt_token_ids, read_object

PROBE = "A red square lies left of two large circles. How many are there?"
_SAME_MODEL = 0.5  # nats; neither batching nor rounding changes the mean log-prob of the probe's tokens so much


@dataclass(frozen=True)
class ServedModel:
    """A model on a server.

    `system_fingerprint`: vLLM's, of its version and configuration, None if the server hides it. `longest`: the most
    tokens of a prompt, including the one generated after it. `probe_ids_T`: the tokens of `PROBE`, `probe_log_prob`
    their mean log-prob.
    """

    version: str
    name: str
    system_fingerprint: str | None
    longest: int
    probe_ids_T: NDArray[np.int64]
    probe_log_prob: float

    def check_same(self, other: ServedModel, *, url: str) -> None:
        """Refuse to continue with another model, as after a restart. Errors: `ModelError` with what differs."""
        for what in ("version", "name", "system_fingerprint", "longest"):
            before, now = getattr(self, what), getattr(other, what)
            if before != now:
                raise ModelError(f"{url}: the server has changed: its {what} was {before}, now {now}: {_AGAIN}")
        moved = abs(self.probe_log_prob - other.probe_log_prob)
        if not moved < _SAME_MODEL:
            raise ModelError(
                f"{url}: the server has another model under the name '{self.name}': a text's mean log-prob was "
                f"{self.probe_log_prob:.2f}, now {other.probe_log_prob:.2f}: {_AGAIN}"
            )


_AGAIN = "start it as it was, or capture into another output"


def ask_served(client: ServerClient, *, model: str | None, listed: int) -> ServedModel:
    """Ask a server for its model, and whether it lists so many ids of each distribution (-1: all).

    Errors: `ModelError` if it cannot be reached, refuses, or is not vLLM's; `ConfigError` if it has no such model.
    """
    version = read_object(client.get("/version", "its version"), "its version").get("version")
    models = read_object(client.get("/v1/models", "the list of its models"), "the list of its models").get("data")
    if not isinstance(version, str) or not isinstance(models, list):
        raise ModelError(f"{client.url}: it does not answer as vLLM's server does: correct engine.url")
    about = _chosen([entry for entry in models if isinstance(entry, dict)], model, client.url)
    name = str(about.get("id"))
    body = {
        "model": name,
        "prompt": PROBE,
        "add_special_tokens": False,
        "max_tokens": 1,
        "temperature": 0.0,
        "prompt_logprobs": listed,
        "return_token_ids": True,
    }
    try:
        reply = read_object(client.post("/v1/completions", body, "a first text").result(), "a first text")
    except ServerRefusedError as error:
        if "max allowed" not in error.reason:
            raise
        raise ConfigError(
            f"{error}: restart the server with --max-logprobs {listed}, or lower capture.top_k"
        ) from error
    what = f"{client.url}: a first text"
    ids_T = np.array(prompt_token_ids(reply, what), np.int64)
    rows = listed_rows(reply, ids_T, np.arange(len(ids_T) - 1), listed, what)
    fingerprint = reply.get("system_fingerprint")
    longest = about.get("max_model_len")
    return ServedModel(
        version=version,
        name=name,
        system_fingerprint=fingerprint if isinstance(fingerprint, str) else None,
        longest=int(longest) if longest else 2**31,
        probe_ids_T=ids_T,
        probe_log_prob=float(rows.target_log_probs_N.mean()),
    )


def _chosen(models: list[dict[str, Any]], name: str | None, url: str) -> dict[str, Any]:
    """The model of that name, or the only one; several names of one model count as one."""
    names = [str(entry.get("id")) for entry in models]
    if name is None and len({json.dumps([entry.get("root"), entry.get("parent")]) for entry in models}) == 1:
        return models[0]
    found = next((entry for entry in models if entry.get("id") == name), None)
    if found is None:
        wanted = "several models" if name is None else f"no model '{name}'"
        raise ConfigError(f"{url}: it has {wanted}: set engine.server.model to one of {', '.join(names)}")
    return found
