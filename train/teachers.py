"""Open the teachers' caches of a run, and check that they fit its settings, its student and one another."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import CacheError, ConfigError
from llavamod_offline.losses.tail_estimators import choose_tail
from train.config import TrainConfig
from train.data.join import MISMATCHED
from train.stages.alignment_setup import check_cache

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from llavamod_offline.data.encode.tokenize import SequenceEncoder
    from teacher_cache.read.reader import TeacherCache
    from teacher_cache.read.several import Teachers
    from teacher_cache.student.end_of_turn import TokenIdSwap

_LOG = logging.getLogger(__name__)
OTHERS = "*"  # all sources that cache.path does not name


def open_teachers(config: TrainConfig, samples: SampleSet) -> Teachers | None:
    """Open the caches that `cache.path` names as a single one; None if it names none.

    Errors: `CacheError` if one cannot be opened; `ConfigError` if they cannot be read together.
    """
    paths, temperature = config.cache.path, config.loss.temperature
    if paths is None:
        return None
    from teacher_cache.read.reader import open_cache
    from teacher_cache.read.several import BySource, Mixture, SeveralCaches

    if isinstance(paths, str):
        return open_cache(paths, temperature=temperature)
    names = list(dict.fromkeys(paths if isinstance(paths, list) else paths.values()))
    parts = [open_cache(path, temperature=temperature) for path in names]
    parts_N = None if isinstance(paths, list) else _part_of_each(_numbers_of(paths, names), samples)
    if len(parts) == 1:
        return parts[0]
    by_samples = _reads_samples(config, parts)
    _check_together(config, parts, by_samples)
    if isinstance(paths, list):
        weights = np.array(config.cache.weights or [1.0] * len(parts), np.float64)
        return SeveralCaches(parts, Mixture(tuple((weights / weights.sum()).tolist()), by_samples))
    assert parts_N is not None
    first_rows = np.cumsum([0, *map(len, parts)])[:-1]
    return SeveralCaches(parts, BySource(_numbers_of(paths, names), parts_N, tuple(first_rows.tolist())))


def _numbers_of(paths: Mapping[str, str], names: Sequence[str]) -> dict[str, int]:
    """Map each source to the number of its cache."""
    return {source: names.index(path) for source, path in paths.items()}


def is_aligned(config: TrainConfig, parts: Sequence[TeacherCache], tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the student's tokens are aligned with the teacher's, because the tokenizers differ."""
    if config.cache.other_tokenizer is None or not parts:
        return False
    from teacher_cache.student.check import check_student

    try:
        check_student(parts[0].fingerprint, tokenizer)
    except CacheError:
        return True
    _LOG.info("cache.other_tokenizer: the student has the teacher's tokenizer, so there is nothing to align")
    return False


def check_teachers(
    config: TrainConfig, parts: Sequence[TeacherCache], tokenizer: PreTrainedTokenizerFast | None
) -> TokenIdSwap | None:
    """Check everything about each cache that does not need the student's weights; return the id swap that all share.

    `tokenizer`: the student's; None if it is not the teacher's, so that tokens will be aligned.
    Errors: `CacheError` for a tokenizer other than the student's, `ConfigError` for what a cache does not record.
    """
    swaps = []
    for part in parts:
        if tokenizer is not None:
            from teacher_cache.student.check import check_student

            with _naming(part, parts):
                allow, end_of_turn = config.cache.allow, config.cache.end_of_turn
                swaps.append(check_student(part.fingerprint, tokenizer, allow=allow, end_of_turn=end_of_turn))
        _check_records(config, part)
    if any(swap != swaps[0] for swap in swaps):
        raise ConfigError(
            f"cache.end_of_turn: it swaps different ids in cache '{parts[0].path}' from those in the others: use "
            "teachers with one tokenizer"
        )
    return swaps[0] if swaps else None


def check_wording(
    config: TrainConfig, parts: Sequence[TeacherCache], encoder: SequenceEncoder, images: Mapping[str, Any]
) -> None:
    """Check that the student words answers and, where it matters, prompts as each teacher did. Errors: `CacheError`."""
    if not parts:
        return
    from teacher_cache.student.check import check_answers, check_encoding

    allow, end_of_turn = config.cache.allow, config.cache.end_of_turn
    for part in parts:
        with _naming(part, parts):
            check_encoding(part.fingerprint, encoder, images, allow=allow, end_of_turn=end_of_turn)
            check_answers(part.fingerprint, encoder.template, allow=allow, end_of_turn=end_of_turn)


@contextmanager
def _naming(part: TeacherCache, parts: Sequence[TeacherCache]) -> Iterator[None]:
    """Say in an error which of several caches it is about."""
    try:
        yield
    except CacheError as error:
        if len(parts) == 1:
            raise
        raise CacheError(f"cache.path: '{part.path}': {error}") from error


def _reads_samples(config: TrainConfig, parts: Sequence[TeacherCache]) -> bool:
    """Whether the loss reads tails from their samples."""
    loss = config.loss
    if not loss.distils(config.stage) or loss.kind == "policy_gradient":
        return False
    if loss.tail != "auto":
        return loss.tail == "samples"
    sampled = [part for part in parts if part.has_tail_samples]
    at = sampled[0].sampled_at if sampled else 1.0
    return choose_tail(loss.divergence, loss.temperature, sampled_at=at, has_samples=bool(sampled)) == "samples"


def _check_together(config: TrainConfig, parts: Sequence[TeacherCache], by_samples: bool) -> None:
    """Refuse caches that cannot be read together. Errors: `ConfigError` naming the key and a cache."""
    first = parts[0]
    if config.loss.align.is_on:
        raise ConfigError(
            "loss.align: compares what one teacher computes, but cache.path names several: set its weights to 0, or "
            "cache.path to one cache"
        )
    if config.cache.other_tokenizer is not None:
        raise ConfigError(
            "cache.other_tokenizer: aligns the tokens of one teacher, but cache.path names several: name one cache, or "
            "set it to null"
        )
    for part in parts[1:]:
        if part.positions_kept != first.positions_kept:
            raise ConfigError(
                f"cache.path: '{first.path}' records positions '{first.positions_kept}', '{part.path}' "
                f"'{part.positions_kept}': capture both with the same capture.positions"
            )
    mixed = isinstance(config.cache.path, list)
    for number, part in enumerate(parts):
        if mixed and part.digest in [other.digest for other in parts[:number]]:
            raise ConfigError(f"cache.path: '{part.path}' is listed twice: list each cache once, and set cache.weights")
    if mixed and config.loss.temperature != 1.0 and config.loss.distils(config.stage):
        raise ConfigError(
            f"loss.temperature is {config.loss.temperature:g}, but distributions are mixed at temperature 1: set it to "
            "1, or cache.path to one cache or to a cache for each source"
        )
    for part in parts:
        if mixed and part.sampled_at != 1.0:
            raise ConfigError(
                f"cache.path: '{part.path}' was captured for temperature {part.sampled_at:g}, but distributions are "
                "mixed at temperature 1: capture it with capture.temperature=1"
            )
        if by_samples and not part.has_tail_samples and not part.is_exhaustive:
            raise ConfigError(
                f"cache.path: '{part.path}' has tails without samples, the others have samples: capture it with "
                "capture.tail_samples_max above 0, or set loss.tail to bucket for all"
            )
        if by_samples and part.has_tail_samples and part.sampled_at != config.loss.temperature:
            raise ConfigError(
                f"loss.temperature is {config.loss.temperature:g}, but cache '{part.path}' was captured for "
                f"{part.sampled_at:g}: capture all for one temperature, or set loss.tail to bucket"
            )


def _part_of_each(part_of: Mapping[str, int], samples: SampleSet) -> NDArray[np.int64]:
    """Return each sample's part, by its source. Errors: `ConfigError` for sources without a cache, or unknown ones."""
    sources = samples.index.column("source")
    known = sorted(sources.unique().to_pylist())
    unknown = [source for source in part_of if source not in known and source != OTHERS]
    if unknown:
        raise ConfigError(
            f"cache.path: set '{samples.path}' has no source '{unknown[0]}': choose from {', '.join(map(repr, known))}"
        )
    missing = [source for source in known if source not in part_of]
    if missing and OTHERS not in part_of:
        raise ConfigError(
            f"cache.path: names no cache for source '{missing[0]}' of set '{samples.path}': add it, or one for all "
            f'others as "{OTHERS}"'
        )
    numbers = {source: part_of.get(source, part_of.get(OTHERS, -1)) for source in known}
    return np.array([numbers[source] for source in sources.to_pylist()], np.int64)


def _check_records(config: TrainConfig, cache: TeacherCache) -> None:
    """Check that a cache records what the loss needs. Errors: `ConfigError` naming the key and the remedy."""
    if config.loss.temperature not in (1.0, *cache.temperatures) and config.loss.distils(config.stage):
        stored = ", ".join(f"{value:g}" for value in (1.0, *cache.fingerprint["capture"]["temperatures"]))
        raise ConfigError(
            f"loss.temperature: cache '{cache.path}' supports temperatures {stored}, not "
            f"{config.loss.temperature:g}: choose one of these, or capture again with "
            f"capture.temperature={config.loss.temperature:g}"
        )
    capture = cache.fingerprint["capture"]
    distributions = config.loss.distils(config.stage) and config.loss.kind != "policy_gradient"
    if distributions and (capture["head_max"], capture["draws_max"]) == (1, 0):
        key = "loss.distill_weight" if config.stage == "preference" else "cache.path"
        raise ConfigError(
            f"{key}: cache '{cache.path}' holds log-probs of its tokens but no distributions: "
            "capture with a capture.preset other than reference"
        )
    if config.loss.visual_weight and not cache.has_advantages:
        raise ConfigError(
            f"loss.visual_weight: cache '{cache.path}' does not say what images are worth: capture it with "
            "capture.without_image=blank or drop, or set it to 0"
        )
    check_cache(config.loss.align, cache)
    missing = sorted(set(config.roles) - set(cache.roles))
    if MISMATCHED in missing and len(missing) < len(config.roles):
        raise ConfigError(
            f"loss.kind: kto estimates its KL on mismatched responses, which cache '{cache.path}' lacks: "
            "capture with capture.mismatched=true, or set loss.kind to kto_pair"
        )
    unpaired = MISMATCHED in config.roles and len(missing) == 1  # all of its answers are of one kind
    if missing and not unpaired:
        raise ConfigError(
            f"cache.path: '{cache.path}' holds {', '.join(cache.roles)}, but stage {config.stage} needs "
            f"{', '.join(config.roles)}: set it to a cache of data.set"
        )
