"""`cache-teacher generate`: the teacher answers the prompts of a set; its answers become a set, which is captured.

See `answer_rows.py` for how samples are answered, and `generated_set.py` for what is kept until the set is complete.
"""

from __future__ import annotations

import functools
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import ConfigError, DataError
from llavamod_offline.grace import Grace
from llavamod_offline.models.device import pick_device
from llavamod_offline.progress import ProgressBar
from llavamod_offline.signals import keeping
from llavamod_offline.storage.folders import is_url
from llavamod_offline.storage.lock import locked, locked_beside
from teacher_cache.capture.run import run_capture
from teacher_cache.capture.summary import Summary
from teacher_cache.capture_setup import CaptureSetup, follow_template, prepare_capture
from teacher_cache.config import CacheTeacherConfig, GenerateConfig
from teacher_cache.engines.hf import HfCaptureEngine
from teacher_cache.engines.registry import ENGINES
from teacher_cache.fingerprint import check_allowed, without_tokens, writer_id
from teacher_cache.generate.answer_rows import Answerer
from teacher_cache.generate.decode_loop import Decoding
from teacher_cache.generate.generated_set import WrittenSet, begun_answers, written_sample
from teacher_cache.write.store import begun_fingerprint

# The sections of a capture's fingerprint that also determine the answers.
_ABOUT = ("tokenizer", "template", "sequence", "images", "teacher", "engine", "data")

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generation:
    """What `generate` did. `written`, `tokens` and `retokenised` (samples whose texts tokenize differently from what
    was written) count this call; `samples` and `rejected`, total and by kind, the whole set."""

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


def generate(config: CacheTeacherConfig, *, allow: Sequence[str] = (), grace_seconds: float = 0.0) -> Generation:
    """Let the teacher answer every prompt that is not answered yet, pack the answers, and capture the new set.

    Run again, it resumes where it was stopped. `allow`, `grace_seconds`: see `run.run_capture`.
    Errors: a `LlavaModError` before anything is written, if set, teacher and settings do not fit one another, or what
    lies at `output_set`; `DataError` if more than `max_rejected` of the answers are rejected; those of `run_capture`.
    """
    _check(config)
    pick_device(config.device)
    target = Path(str(config.output_set)).absolute()
    with locked(target.parent, f".{target.name}.answers.lock", output=config.output_set):
        with locked_beside(target):
            pass  # no other command is packing it; what a killed one left is cleared
        return _generate(config, allow, grace_seconds)


def _generate(config: CacheTeacherConfig, allow: Sequence[str], grace_seconds: float) -> Generation:
    """Answer, pack and capture; see `generate`."""
    started = time.perf_counter()
    about_before = begun_answers(Path(str(config.output_set))) or begun_fingerprint(config.output)
    values = follow_template(config.setup_values, about_before)
    config = replace(config, template=values["template"])
    setup = prepare_capture(**values)
    check_allowed(allow, setup.fingerprint)
    _check_samples(setup.samples)
    given, names = config.generate, setup.samples.shard_names
    about = without_tokens({**{name: setup.fingerprint[name] for name in _ABOUT}, "generate": given.described})
    target = WrittenSet(Path(str(config.output_set)), about, allow=allow)
    decoding = Decoding(given.temperature, given.top_p, given.max_new_tokens, given.seed)
    engine = functools.cache(lambda: CaptureSetup.load(setup))  # once for both, and not at all if all is done
    counts: Counter[str] = Counter()
    with keeping(lambda: target.kept(names)):
        missing = target.missing(names)
        if missing:
            _LOG.info("%s: answers to %d of %d shards to write", target.path, len(missing), len(names))
            samples = sum(map(len, map(setup.samples.rows_of, missing)))
            with Grace(grace_seconds) as grace, ProgressBar("generate", samples, "sample", also="tokens") as progress:

                def advance(samples: int, tokens: int) -> None:
                    grace.advance(samples)
                    progress.advance(samples, tokens)

                answerer = Answerer(
                    setup, cast("HfCaptureEngine", engine()), decoding, given.turns, given.key_suffix, advance
                )
                for name in missing:
                    grace.begin(f"shard '{name}'", len(setup.samples.rows_of(name)))
                    answers = answerer.answer(setup.samples.rows_of(name))
                    target.commit(name, answers)
                    grace.end()
                    grace.check()
                    counts["written"] += len(answers)
                    counts["tokens"] += sum(answer.tokens for answer in answers)
                    counts["retokenised"] += sum(answer.retokenised for answer in answers)
        made = functools.partial(
            written_sample,
            decoding=decoding,
            turns=given.turns,
            key_suffix=given.key_suffix,
            teacher=writer_id(target.about["teacher"]),
            source=setup.samples.digest,
            round_number=given.round,
        )
        target.finish(setup.samples, made, max_rejected=config.max_rejected)
    seconds = time.perf_counter() - started
    manifest = SampleSet.open(target.path).manifest
    capture = replace(config, data=str(target.path), output_set=None, generate=GenerateConfig())
    captured = run_capture(capture, allow=allow, load=lambda setup: engine(), grace_seconds=grace_seconds)
    return Generation(
        output_set=str(target.path),
        samples=manifest["samples"],
        rejected=manifest["rejected"],
        rejected_by_kind=manifest["rejected_by_kind"],
        **{name: counts[name] for name in ("written", "tokens", "retokenised")},
        seconds=round(seconds, 3),
        tokens_per_second=round(counts["tokens"] / seconds, 1),
        digest=manifest["digest"],
        capture=captured,
    )


def _check(config: CacheTeacherConfig) -> None:
    if config.output_set is None:
        raise ConfigError("no value for 'output_set': write output_set=FOLDER for the new set")
    if is_url(config.output_set):
        raise ConfigError(f"output_set is '{config.output_set}': a set is written to a local folder: name one")
    if not ENGINES[config.engine.kind].writes_answers:
        raise ConfigError(
            f"config: engine.kind is '{config.engine.kind}', which cannot write answers: set engine.kind=hf"
        )
    for name, given in (("engine.ray", config.engine.ray), ("slice", config.part != (0, 1))):
        if given:
            raise ConfigError(
                f"config: {name}: answers are written in one process: remove it, and capture the set with `run`"
            )


def _check_samples(samples: SampleSet) -> None:
    """Refuse preferences, which have no assistant turn to write. Errors: `DataError` naming the first."""
    kinds = samples.index.column("kind").to_pylist()
    first = next((row for row, kind in enumerate(kinds) if kind != "conversation"), None)
    if first is not None:
        raise DataError(
            f"set '{samples.path}': sample '{samples.keys[first]}' is a preference: answers are written to "
            "conversations: set data to a set of those"
        )
