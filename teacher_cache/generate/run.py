"""`cache-teacher generate`: the teacher answers the prompts of a set; its answers become a set, which is captured.

See `answer_rows.py` for how samples are answered, and `generated_set.py` for what is kept until the set is complete.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import ConfigError, DataError
from llavamod_offline.storage.folders import is_url
from teacher_cache.capture.progress import ProgressBar
from teacher_cache.capture.run import Summary, run_capture
from teacher_cache.capture_setup import prepare_capture
from teacher_cache.config import GenerateConfig
from teacher_cache.engines import load_engine
from teacher_cache.engines.registry import engine_module
from teacher_cache.fingerprint import check_allowed
from teacher_cache.format.manifest import canonical
from teacher_cache.generate.answer_rows import Answerer
from teacher_cache.generate.generated_set import WrittenSet

if TYPE_CHECKING:
    from teacher_cache.config import CacheTeacherConfig
    from teacher_cache.engines.hf import HfCaptureEngine

# What of a capture's fingerprint decides the answers, too.
_ABOUT = ("tokenizer", "template", "sequence", "images", "teacher", "engine", "data")

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generation:
    """What `generate` did. `written`, `tokens` and `retokenised` (samples whose texts are read as other tokens than
    were written) are this call's; `samples` and `rejected`, in all and by kind, the whole set's."""

    output_set: str
    samples: int
    rejected: int
    rejected_by_kind: dict[str, int]
    written: int
    tokens: int
    retokenised: int
    seconds: float
    tokens_per_second: float
    digest: str
    capture: Summary


def generate(config: CacheTeacherConfig, *, allow: Sequence[str] = ()) -> Generation:
    """Let the teacher answer every prompt that is not answered yet, pack the answers, and capture the new set.

    Run again, it resumes where it was stopped. `allow`: see `run.run_capture`.
    Errors: a `LlavaModError` before anything is written, if set, teacher and settings do not fit one another, or what
    lies at `output_set`; `DataError` if more than `max_rejected` of the answers are rejected; those of `run_capture`.
    """
    started = time.perf_counter()
    _check(config)
    setup = prepare_capture(config)
    check_allowed(allow, setup.fingerprint)
    _check_samples(setup.samples)
    settings = config.generate
    about = {**{name: setup.fingerprint[name] for name in _ABOUT}, "generate": asdict(settings)}
    target = WrittenSet(Path(str(config.output_set)), about, allow=allow)
    engine = functools.cache(lambda: load_engine(setup, config))  # once for both, and not at all if all is done
    counts: Counter[str] = Counter()
    missing = target.missing(setup.samples.shard_names)
    if missing:
        _LOG.info("%s: answers to %d of %d shards to write", target.path, len(missing), len(setup.samples.shard_names))
        with ProgressBar(sum(len(setup.samples.rows_of(name)) for name in missing), "generate", "tokens") as progress:
            answerer = Answerer(setup, cast("HfCaptureEngine", engine()), settings, progress.update)
            for name in missing:
                answers = answerer.answer(setup.samples.rows_of(name))
                target.commit(name, answers)
                counts["written"] += len(answers)
                counts["tokens"] += sum(answer.tokens for answer in answers)
                counts["retokenised"] += sum(answer.retokenised for answer in answers)
    target.finish(setup.samples, settings, _identity(target.about["teacher"]), max_rejected=config.max_rejected)
    seconds = time.perf_counter() - started
    made = SampleSet.open(target.path).manifest
    capture = replace(config, data=str(target.path), output_set=None, generate=GenerateConfig())
    captured = run_capture(capture, allow=allow, load=lambda setup, config: engine())
    return Generation(
        output_set=str(target.path),
        samples=made["samples"],
        rejected=made["rejected"],
        rejected_by_kind=made["rejected_by_kind"],
        written=counts["written"],
        tokens=counts["tokens"],
        retokenised=counts["retokenised"],
        seconds=round(seconds, 3),
        tokens_per_second=round(counts["tokens"] / seconds, 1),
        digest=made["digest"],
        capture=captured,
    )


def _check(config: CacheTeacherConfig) -> None:
    if config.output_set is None:
        raise ConfigError("config: output_set is not set: name the folder for the new set")
    if is_url(config.output_set):
        raise ConfigError(f"config: output_set is '{config.output_set}': a set is written to a local folder: name one")
    if not engine_module(config.engine.kind).WRITES_ANSWERS:
        raise ConfigError(
            f"config: engine.kind is '{config.engine.kind}', which cannot write answers: set engine.kind=hf"
        )
    if config.engine.ray:
        raise ConfigError(
            "config: engine.ray: answers are written in one process: remove it, and capture the set with `run`"
        )
    if config.part != (0, 1):
        raise ConfigError(
            "config: slice: answers are written in one process: remove it, and capture the set with `run`"
        )


def _check_samples(samples: SampleSet) -> None:
    """Refuse preferences, which have no assistant's turn to be written. Errors: `DataError` naming the first."""
    kinds = samples.index.column("kind").to_pylist()
    if "preference" in kinds:
        raise DataError(
            f"set '{samples.path}': sample '{samples.keys[kinds.index('preference')]}' is a preference: answers are "
            "written to conversations: set data to a set of those"
        )


def _identity(teacher: Any) -> str:
    """One SHA-256 (hex) for a checkpoint's configuration and weights."""
    return hashlib.sha256(canonical(teacher)).hexdigest()
