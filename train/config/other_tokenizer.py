"""Checks that a run's settings suit a student whose tokenizer is not its teacher's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from train.config.train import TrainConfig


def other_tokenizer_problems(config: TrainConfig) -> Iterable[str]:
    """Yield one line for each problem, naming the key to change."""
    loss, cache = config.loss, config.cache
    if cache.other_tokenizer is None:
        if loss.unmatched_weight is not None:
            yield "loss.unmatched_weight: not used with one tokenizer: remove it, or set cache.other_tokenizer to align"
        return
    if not config.stage.startswith("mimic"):
        yield f"cache.other_tokenizer: only the mimic stages align tokens, not {config.stage}: set it to null"
        return
    if loss.kind == "policy_gradient" or loss.positions == "written":
        yield (
            "cache.other_tokenizer: losses on written answers take the teacher's log-probs token by token: set it to "
            "null, or loss.kind to only_kd and loss.positions to auto"
        )
    if cache.end_of_turn is not None:
        yield "cache.end_of_turn: aligned tokens end turns by their role: remove it"
    if loss.tail not in ("auto", "bucket"):
        yield f"loss.tail: aligned tokens have their tail as one bucket, not as {loss.tail}: set it to auto"
    if loss.temperature != 1.0:
        yield (
            f"loss.temperature is {loss.temperature:g}: tokens are aligned at temperature 1 alone: set it to 1, or "
            "cache.other_tokenizer to null"
        )
    if loss.visual_weight:
        yield "loss.visual_weight: aligned tokens are not weighted: set it to 0, or cache.other_tokenizer to null"
    if loss.align.is_on:
        yield "loss.align: its terms compare tokens one by one: set its weights to 0, or other_tokenizer to null"
