"""The log-probs that a set's writer gave the tokens of its answers, aligned with a student's sequences.

Shape suffixes: N supervised tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from llavamod_offline.data.encode.tokenize import TokenizedSequence
from llavamod_offline.data.sample import Sample
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import ConfigError, DataError

_AGAIN = "write the set again with `cache-teacher generate`"


def check_written(samples: SampleSet, *, key: str) -> None:
    """Refuse a set that a loss on own answers cannot use; `key` is the setting that asks for one. `loss.kind` stands
    for the policy gradient, which needs answers drawn from the whole distribution. Errors: `ConfigError`.
    """
    wanted = f"{key}: {'policy_gradient' if key == 'loss.kind' else 'written'}"
    about = samples.manifest.get("generated")
    if about is None:
        raise ConfigError(
            f"{wanted} needs answers that the student wrote, but those of set '{samples.path}' were not written by a "
            "model: set data.set to a set of `cache-teacher generate teacher=STUDENT`"
        )
    if key == "loss.kind" and about["generate"]["temperature"] == 0:
        raise ConfigError(
            f"{wanted} needs sampled answers, but those of set '{samples.path}' are greedy: write them with "
            "generate.temperature=1, or set loss.kind to only_kd"
        )
    top_p = about["generate"].get("top_p", 1.0)
    if key == "loss.kind" and top_p != 1:
        raise ConfigError(
            f"{wanted} needs answers drawn from all tokens, but those of set '{samples.path}' were written with "
            f"generate.top_p={top_p:g}, which biases its gradient: write them with generate.top_p=1, or set loss.kind "
            "to only_kd and loss.positions to written"
        )
    if not any(_has_written(samples.read(row)) for row in range(len(samples))):
        raise ConfigError(
            f"{wanted}: nothing can be learnt from set '{samples.path}': each of its answers was ended by "
            f"generate.stop, or is tokenized differently from what was written: {_AGAIN}, without generate.stop"
        )


def _has_written(sample: Sample) -> bool:
    """Whether any turn has log-probs of its tokens; also true of a sample without any, an error when it is used."""
    log_probs = () if sample.generated is None else sample.generated.behaviour_log_probs
    return not log_probs or any(own is not None for own in log_probs)


def behaviour_log_probs(sample: Sample, sequence: TokenizedSequence, masked: Collection[int]) -> NDArray[np.float32]:
    """The writer's log-probs of a sequence's supervised tokens, [N]; NaN marks those to leave out of the loss.

    These are tokens of turns that the student did not write, of turns whose text tokenizes differently from what was
    written, and the ids in `masked`. Errors: `DataError` if the sample has no log-probs, or not one per token.
    """
    if sample.generated is None or not sample.generated.behaviour_log_probs:
        raise DataError(f"sample '{sample.key}': the set has no log-probs from the writer of its answers: {_AGAIN}")
    written = sample.generated.behaviour_log_probs
    ends = np.flatnonzero(np.diff(sequence.supervised_N) > 1) + 1
    turns = np.split(np.arange(len(sequence.supervised_N)), ends)[-len(written) :]
    found_N = np.full(len(sequence.supervised_N), np.nan, np.float32)
    for places, log_probs in zip(turns, written, strict=True):
        if log_probs is None:
            continue
        if len(log_probs) != len(places):
            raise DataError(
                f"sample '{sample.key}': log-probs of {len(log_probs)} tokens for an answer of {len(places)}: it was "
                f"written with another tokenizer or template: {_AGAIN}"
            )
        found_N[places] = log_probs
    found_N[np.isin(sequence.target_ids_N, list(masked))] = np.nan
    return found_N
