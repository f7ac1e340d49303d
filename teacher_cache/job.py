"""`cache-teacher run`: a packed set and a teacher → a cache, shard by shard, resumable at any moment."""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from tqdm import tqdm

from llavamod_offline.data.images import ImagePreprocessor
from llavamod_offline.data.shards import SampleSet
from llavamod_offline.data.template import Template, get_template
from llavamod_offline.errors import CacheError, ConfigError, DataError, ModelError
from llavamod_offline.models.checkpoint import (
    load_config,
    load_llava,
    load_tokenizer,
    sequence_encoder,
    vocabulary_size,
)
from teacher_cache.codec import Codec, HiddenKind
from teacher_cache.engines.hf import HfEngine
from teacher_cache.engines.protocol import Engine, Request
from teacher_cache.fingerprint import check_allowed, describe_template, describe_tokenizer, describe_weights
from teacher_cache.manifest import cache_bytes
from teacher_cache.record import RecordSettings
from teacher_cache.sequences import SequenceRecord
from teacher_cache.store import CacheStore, Rejection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from llavamod_offline.data.sample import Sample
    from llavamod_offline.data.tokenise import Sequence as TokenSequence
    from llavamod_offline.data.tokenise import SequenceEncoder
    from teacher_cache.config import CacheConfig
    from teacher_cache.presets import Preset

_LOG = logging.getLogger(__name__)
_FORCED_WORDS = ("yes", "no", "Yes", "No", "A", "B", "C", "D")


@dataclass(frozen=True)
class Summary:
    """What a run did. `sequences`, `positions` and `rejected` are this run's; the rest is the whole cache's."""

    output: str
    complete: bool
    shards_done: int
    shards_total: int
    sequences: int
    positions: int
    rejected: int
    seconds: float
    positions_per_second: float
    bytes_per_position: float | None
    digest: str | None
    totals: dict[str, int] | None


@dataclass(frozen=True)
class Job:
    """Everything about a capture that is known before the teacher's weights are loaded."""

    samples: SampleSet
    teacher: Path
    encoder: SequenceEncoder
    preprocessor: ImagePreprocessor
    settings: RecordSettings
    codec: Codec
    context_length: int
    dtype: torch.dtype
    device: str
    fingerprint: dict[str, Any]


def run_job(config: CacheConfig, *, allow: Sequence[str] = ()) -> Summary:
    """Capture every shard of the set that the cache lacks, and finish the cache once all are there.

    `allow` names fingerprint fields that may differ from those of an unfinished cache.
    Errors: a `LlavaModError` before anything is written, if set, teacher and settings do not fit one another or the
    cache that is there; later only if the disk or the device's memory gives out. The cache can always be resumed.
    """
    started = time.perf_counter()
    job = prepare_job(config)
    output = config.output
    check_allowed(allow, job.fingerprint)
    store = CacheStore.open(output, job.fingerprint, job.samples.shard_names, allow=allow)
    part, parts = config.part
    mine = set(job.samples.shard_names[part::parts])
    missing = [name for name in store.missing() if name in mine]
    engine = load_engine(job, config) if missing else None
    store.start()
    counts = dict.fromkeys(("sequences", "positions", "rejected"), 0)
    if engine is not None:
        _LOG.info("%s: %d of %d shards to capture", output, len(missing), len(job.samples.shard_names))
        with _Progress(sum(len(job.samples.rows_of(name)) for name in missing)) as progress:
            for name in missing:
                captured, rejected = capture_rows(job, engine, job.samples.rows_of(name), progress.update)
                store.commit(name, captured, rejected, job.codec)
                counts["sequences"] += len(captured)
                counts["positions"] += sum(len(item.records) for item in captured)
                counts["rejected"] += len(rejected)
    left = store.missing()
    cache = store.finalise() if not left else None
    if cache is not None and not cache["totals"]["sequences"]:
        raise CacheError(f"{output}: not one sequence could be captured: {output}/rejected.jsonl has the reasons")
    seconds = time.perf_counter() - started
    return Summary(
        output=output,
        complete=cache is not None,
        shards_done=len(job.samples.shard_names) - len(left),
        shards_total=len(job.samples.shard_names),
        **counts,
        seconds=round(seconds, 3),
        positions_per_second=round(counts["positions"] / seconds, 1),
        bytes_per_position=round(cache_bytes(cache) / max(cache["totals"]["positions"], 1), 3) if cache else None,
        digest=cache["digest"] if cache else None,
        totals=cache["totals"] if cache else None,
    )


def prepare_job(config: CacheConfig) -> Job:
    """Open set and teacher and check that they fit one another, all but the weights. Errors: a `LlavaModError`."""
    teacher = Path(config.teacher)
    samples = SampleSet.open(Path(config.data))
    template = get_template(config.template)
    model_config = load_config(teacher)
    tokenizer = load_tokenizer(teacher)
    encoder = sequence_encoder(model_config, tokenizer, template, config.max_length)
    preprocessor = ImagePreprocessor.from_checkpoint(teacher, aspect=config.image_aspect)
    vocab_size = _shared_vocabulary(teacher, tokenizer, int(model_config.text_config.vocab_size))
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    settings, codec = _kept(
        config.capture.resolved,
        temperatures=tuple(config.capture.temperatures),
        forced_ids=_forced_ids(tokenizer, config.capture.forced_tokens, template),
        vocab_size=vocab_size,
        hidden=config.capture.hidden,
    )
    dtype = config.dtype if config.dtype != "auto" else "float32" if device == "cpu" else "bfloat16"
    fingerprint = {
        "tokenizer": describe_tokenizer(tokenizer),
        "template": describe_template(template),
        "sequence": {"max_length": config.max_length, "longer": "rejected"},
        "images": {**preprocessor.describe(), "tokens": encoder.image_tokens, "token_id": encoder.image_token_id},
        "teacher": describe_weights(teacher),
        "engine": {
            "name": "hf",
            "dtype": dtype,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
        "capture": {
            **dataclasses.asdict(settings),
            "temperatures": list(settings.temperatures),
            "forced_ids": list(settings.forced_ids),
            "precision": codec.precision,
            "positions": config.capture.positions,
            "hidden": config.capture.hidden,
            "hidden_positions": config.capture.hidden_positions if config.capture.hidden else None,
            "seed": config.capture.seed,
            "vocab_size": vocab_size,
        },
        "data": {"digest": samples.digest, "samples": len(samples)},
    }
    return Job(
        samples=samples,
        teacher=teacher,
        encoder=encoder,
        preprocessor=preprocessor,
        settings=settings,
        codec=codec,
        context_length=int(getattr(model_config.text_config, "max_position_embeddings", 0) or sys.maxsize),
        dtype=getattr(torch, dtype),
        device=device,
        fingerprint=fingerprint,
    )


def with_preset(job: Job, preset: Preset) -> Job:
    """The same capture that keeps something else of each distribution; its fingerprint stays as it is."""
    settings, codec = _kept(
        preset,
        temperatures=job.settings.temperatures,
        forced_ids=job.settings.forced_ids,
        vocab_size=job.codec.vocab_size,
        hidden=job.codec.hidden,
    )
    return dataclasses.replace(job, settings=settings, codec=codec)


def _kept(
    capture: Preset,
    *,
    temperatures: tuple[float, ...],
    forced_ids: tuple[int, ...],
    vocab_size: int,
    hidden: HiddenKind | None,
) -> tuple[RecordSettings, Codec]:
    """What a record keeps, and how it is encoded."""
    settings = RecordSettings(
        head_mass=capture.head_mass,
        head_min_prob=capture.head_min_prob,
        head_max=vocab_size if capture.head_max is None else min(capture.head_max, vocab_size),
        draws_max=capture.draws_max,
        draws_per_mass=capture.draws_per_mass,
        temperatures=temperatures,
        forced_ids=forced_ids,
    )
    codec = Codec(
        vocab_size=vocab_size,
        temperatures=temperatures,
        precision=capture.precision,
        head_limit=settings.head_max + len(forced_ids),
        draw_limit=settings.draws_max,
        forced_ids=forced_ids,
        hidden=hidden,
    )
    return settings, codec


def _shared_vocabulary(teacher: Path, tokenizer: PreTrainedTokenizerFast, rows: int) -> int:
    """V = min(len(tokenizer), rows of the head). Errors: `ModelError` if the tokenizer has ids beyond the head."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise ModelError(
            f"{teacher}: the tokenizer's largest id is {largest}, but the model's head has {rows} rows: "
            "use the tokenizer that belongs to the checkpoint, or resize its embeddings"
        )
    return vocabulary_size(tokenizer, rows)


def _forced_ids(tokenizer: PreTrainedTokenizerFast, tokens: list[str] | None, template: Template) -> tuple[int, ...]:
    """The ids of tokens that are named, or of those that go without saying. Errors: `ConfigError` naming a token."""
    if tokens is None:
        words = (template.end, *(template.answer_prefix + word for word in _FORCED_WORDS))
        found = [_ids_of(tokenizer, text) for text in words]
        return tuple(dict.fromkeys(ids[0] for ids in found if len(ids) == 1))
    for text in tokens:
        count = len(_ids_of(tokenizer, text))
        if count != 1:
            raise ConfigError(f"capture.forced_tokens: '{text}' is {count} tokens of this tokenizer, must be one")
    return tuple(_ids_of(tokenizer, text)[0] for text in tokens)


def _ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    known = tokenizer.get_vocab().get(text)
    return [known] if known is not None else list(tokenizer(text, add_special_tokens=False)["input_ids"])


def load_engine(job: Job, config: CacheConfig) -> Engine:
    """Load the teacher's weights. Errors: `ModelError` if they do not fit, `ConfigError` if the device is not there."""
    model = load_llava(job.teacher, dtype=job.dtype)
    rows = int(model.get_output_embeddings().weight.shape[0])
    if rows < job.codec.vocab_size:
        raise ModelError(f"{job.teacher}: the head has {rows} rows, config.json says {job.codec.vocab_size} or more")
    try:
        model.to(job.device)
    except (RuntimeError, AssertionError) as error:  # torch raises either for a device that is not there
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"device '{job.device}': cannot be used: {reason}: set device=cpu or cuda") from error
    return HfEngine(
        model,
        job.preprocessor,
        job.settings,
        vocab_size=job.codec.vocab_size,
        seed=config.capture.seed,
        batch_size=config.batch_size,
        workers=config.workers,
        positions=config.capture.positions,
        hidden_positions=config.capture.hidden_positions if config.capture.hidden else None,
    )


def capture_rows(
    job: Job,
    engine: Engine,
    rows: Iterable[int],
    progress: Callable[[int, int], None] = lambda samples, positions: None,
) -> tuple[list[SequenceRecord], list[Rejection]]:
    """Capture some rows of the set, such as a shard's; both lists are in their order, roles in that of the sample."""
    requests: list[Request] = []
    captured: list[SequenceRecord] = []
    rejected: list[Rejection] = []
    order: dict[tuple[str, str], int] = {}
    for row in rows:
        sample = job.samples.read(row, verify=True)
        sequences = []
        for role in sample.roles:
            order[sample.key, role] = len(order)
            try:
                sequences.append(encode(job, sample, role))
            except DataError as error:
                rejected.append(Rejection(sample.key, role, str(error)))
        if sequences:
            requests.append(Request(row, sample.key, sample.content_hash, tuple(sequences)))
        else:
            progress(1, 0)
    left = {request.key: len(request.sequences) for request in requests}
    for outcome in engine.capture(requests, job.samples.read):
        left[outcome.key] -= 1
        if isinstance(outcome, Rejection):
            rejected.append(outcome)
            progress(left[outcome.key] == 0, 0)
        else:
            captured.append(outcome)
            progress(left[outcome.key] == 0, len(outcome.records))
    captured.sort(key=lambda item: order[item.key, item.role])
    rejected.sort(key=lambda item: order[item.key, item.role])
    return captured, rejected


def encode(job: Job, sample: Sample, role: str) -> TokenSequence:
    """Tokenise one role of a sample. Errors: `DataError` if it is too long for the settings or for the teacher."""
    sequence = job.encoder.encode(sample, role)
    length = len(sequence.input_ids_T)
    if length > job.context_length:
        raise DataError(f"sample '{sample.key}' ({role}): {length} tokens, the teacher takes {job.context_length}")
    return sequence


class _Progress:
    """A bar over samples that also shows positions per second."""

    def __init__(self, samples: int) -> None:
        self._bar = tqdm(total=samples, unit="sample", desc="capture", disable=not sys.stderr.isatty())
        self._positions = 0
        self._started = time.perf_counter()

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, samples: int, positions: int) -> None:
        """Count finished samples and positions."""
        self._positions += positions
        rate = self._positions / (time.perf_counter() - self._started)
        self._bar.set_postfix_str(f"{rate:.0f} positions/s", refresh=False)
        self._bar.update(int(samples))
