"""`cache-teacher generate`: the teacher answers the prompts of a set; its answers become a set, which is captured.

See `answer_rows.py` for how samples are answered, and `generated_set.py` for what is kept until the set is complete.
"""

from __future__ import annotations

import functools
import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import ConfigError, DataError
from llavamod_offline.grace import Grace
from llavamod_offline.models.device import pick_device
from llavamod_offline.progress import ProgressBar
from llavamod_offline.signals import keeping
from llavamod_offline.storage.folders import is_url, local_path
from llavamod_offline.storage.lock import locked, locked_beside
from teacher_cache.capture.run import run_capture
from teacher_cache.capture.summary import Summary
from teacher_cache.capture_setup import CaptureSetup, follow_template, prepare_capture
from teacher_cache.config import CacheTeacherConfig, GenerateConfig
from teacher_cache.engines.registry import ENGINES
from teacher_cache.fingerprint import check_allowed, writer_id
from teacher_cache.generate.answer_rows import Answerer
from teacher_cache.generate.generated_set import WrittenSet, begun_answers, made_from, written_sample
from teacher_cache.generate.writers import capture_engine, close_writer, load_writer
from teacher_cache.write.store import begun_fingerprint

if TYPE_CHECKING:
    from teacher_cache.capture.ray_pool import RayPool
    from teacher_cache.capture.shard import Progress
    from teacher_cache.capture_setup import SetupValues
    from teacher_cache.engines.hf import HfCaptureEngine
    from teacher_cache.generate.vllm_writer import VllmWriter

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generation:
    """What `generate` did. `written`, `tokens` and `retokenised` (samples with a text that `generate.stop` ended, or
    that tokenizes differently from what was written) count this call; `samples` and `rejected`, total and by kind, the
    whole set, once no shard is left without answers. `digest` and `capture` are None before that, and for a slice."""

    output_set: str
    samples: int
    rejected: int
    rejected_by_kind: dict[str, int]
    written: int
    tokens: int
    retokenised: int
    seconds: float
    tokens_per_second: float
    digest: str | None
    capture: Summary | None
    shards_left: int = 0


def generate(config: CacheTeacherConfig, *, allow: Sequence[str] = (), grace_seconds: float = 0.0) -> Generation:
    """Let the teacher answer every prompt that is not answered yet, pack the answers, and capture the new set.

    A rerun resumes where it was stopped. `allow`, `grace_seconds`: see `run.run_capture`.
    Errors: a `LlavaModError` before anything is written, if set, teacher and settings do not fit one another, or what
    is at `output_set`; `ConfigError` if more than `max_rejected` of the answers are rejected; those of `run_capture`.
    """
    _check(config)
    config = replace(config, output_set=str(local_path(str(config.output_set))))
    if config.engine.ray and grace_seconds:
        raise ConfigError("--grace: Ray's workers finish no shards when a run is stopped: remove it, or engine.ray")
    if not config.engine.ray:  # Ray's workers have devices of their own
        pick_device(config.device)
    target = Path(str(config.output_set)).absolute()
    part, parts = config.part
    mine = "" if parts == 1 else f"-{part}-of-{parts}"  # slices run side by side
    with locked(target.parent, f".{target.name}.answers.lock{mine}", output=config.output_set):
        with locked_beside(target):
            pass  # no other command is packing it; what a killed one left is cleared
        return _generate(config, allow, grace_seconds)


def _generate(config: CacheTeacherConfig, allow: Sequence[str], grace_seconds: float) -> Generation:
    """Answer, pack and capture; see `generate`."""
    started = time.perf_counter()
    given, output_set, (part, parts) = config.generate, str(config.output_set), config.part
    values = follow_template(config.setup_values, begun_answers(Path(output_set)) or begun_fingerprint(config.output))
    config = replace(config, template=values["template"])
    counts: Counter[str] = Counter()
    with ExitStack() as stack:
        pool = None
        if config.engine.ray:
            pool = stack.enter_context(_ray_pool(config, values, allow))
            values = pool.values
        setup = prepare_capture(**values)
        check_allowed(allow, setup.fingerprint)
        _check_samples(setup.samples, given)
        names = setup.samples.shard_names
        target = WrittenSet(Path(output_set), made_from(setup.fingerprint, given), allow=allow)
        engine = functools.cache(lambda: load_writer(setup))  # once, and not at all if all is done
        stack.enter_context(keeping(lambda: target.kept(names)))
        missing = target.missing(names[part::parts])
        if missing:
            target.begin()
            _LOG.info("%s: answers to %d of %d shards to write", target.path, len(missing), len(names))
            samples = given.answers * sum(map(len, map(setup.samples.rows_of, missing)))
            with Grace(grace_seconds) as grace, ProgressBar("generate", samples, "sample", also="tokens") as progress:
                if pool is None:
                    answered = _answer(setup, engine(), given, target, missing, progress.advance, grace)
                else:
                    pool.start(len(missing))
                    answered = (done.name for done in pool.capture(missing, progress.advance))
                for name in answered:
                    answers = target.read(name)
                    counts["written"] += len(answers)
                    counts["tokens"] += sum(answer.tokens for answer in answers)
                    counts["retokenised"] += sum(answer.retokenised for answer in answers)
        if parts == 1:
            writer = writer_id(target.about["teacher"])
            made = functools.partial(written_sample, given=given, teacher=writer, source=setup.samples.digest)
            target.finish(setup.samples, made, max_rejected=config.max_rejected)
    seconds = time.perf_counter() - started
    manifest = SampleSet.open(target.path).manifest if parts == 1 else {}
    captured = None
    if given.capture and parts == 1:
        capture = replace(config, data=str(target.path), output_set=None, generate=GenerateConfig())
        captured = run_capture(
            capture, allow=allow, load=lambda setup: capture_engine(setup, engine), grace_seconds=grace_seconds
        )
    return Generation(
        output_set=str(target.path),
        samples=manifest.get("samples", 0),
        rejected=manifest.get("rejected", 0),
        rejected_by_kind=manifest.get("rejected_by_kind", {}),
        **{name: counts[name] for name in ("written", "tokens", "retokenised")},
        seconds=round(seconds, 3),
        tokens_per_second=round(counts["tokens"] / seconds, 1),
        digest=manifest.get("digest"),
        capture=captured,
        shards_left=len(target.missing(names)),
    )


def _answer(
    setup: CaptureSetup,
    engine: HfCaptureEngine | VllmWriter,
    given: GenerateConfig,
    target: WrittenSet,
    names: Sequence[str],
    progress: Progress,
    grace: Grace,
) -> Iterator[str]:
    """Answer shards in this process; yields each once its answers are kept. vLLM then gives its memory back."""

    def advance(samples: int, tokens: int) -> None:
        grace.advance(samples)
        progress(samples, tokens)

    answerer = Answerer(setup, engine, given, advance)
    try:
        for name in names:
            rows = setup.samples.rows_of(name)
            grace.begin(f"shard '{name}'", given.answers * len(rows))
            target.commit(name, answerer.answer(rows))
            grace.end()
            grace.check()
            yield name
    finally:
        close_writer(engine)


def _ray_pool(config: CacheTeacherConfig, values: SetupValues, allow: Sequence[str]) -> RayPool:
    """Workers that answer shards."""
    from teacher_cache.capture.ray_pool import RayPool
    from teacher_cache.generate.answer_worker import AnswerWorker

    ray = config.engine
    return RayPool(
        values,
        str(config.output_set),
        allow,
        workers=ray.ray_workers,
        cpus=ray.cpus_per_worker,
        gpus=ray.gpus_per_worker,
        worker=AnswerWorker,
        more=(config.generate,),
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


def _check_samples(samples: SampleSet, given: GenerateConfig) -> None:
    """Refuse preferences, which have no assistant turn to write, and limits for sources that the set does not have.

    Errors: `DataError` naming the first preference, `ConfigError` naming the source.
    """
    known = sorted(samples.manifest["sources"])
    for source in given.max_new_tokens_by_source:
        if source not in known:
            raise ConfigError(
                f"generate.max_new_tokens_by_source: set '{samples.path}' has no source '{source}': name one of "
                f"{', '.join(known[:8])}"
            )
    kinds = samples.index.column("kind").to_pylist()
    first = next((row for row, kind in enumerate(kinds) if kind != "conversation"), None)
    if first is not None:
        raise DataError(
            f"set '{samples.path}': sample '{samples.keys[first]}' is a preference: answers are written to "
            "conversations: set data to a set of those"
        )
