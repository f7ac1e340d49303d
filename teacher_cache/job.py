"""`cache-teacher run`: a packed set and a teacher → a cache, shard by shard, resumable at any moment."""

from __future__ import annotations

import dataclasses
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from tqdm import tqdm

from llavamod_offline.data.images import ImagePreprocessor
from llavamod_offline.data.shards import SampleSet
from llavamod_offline.data.template import get_template
from llavamod_offline.errors import CacheError, ConfigError, DataError, ModelError
from llavamod_offline.models.checkpoint import (
    load_config,
    load_llava,
    load_tokenizer,
    sequence_encoder,
    vocabulary_size,
)
from teacher_cache.codec import Codec
from teacher_cache.engines.hf import HfEngine
from teacher_cache.engines.protocol import Engine, Request
from teacher_cache.fingerprint import describe_template, describe_tokenizer, describe_weights
from teacher_cache.reader import open_cache
from teacher_cache.record import RecordSettings
from teacher_cache.sequences import SequenceRecord
from teacher_cache.store import CacheStore, Rejection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from llavamod_offline.data.sample import Sample
    from llavamod_offline.data.tokenise import Sequence as TokenSequence
    from llavamod_offline.data.tokenise import SequenceEncoder
    from teacher_cache.config import CacheConfig

_LOG = logging.getLogger(__name__)


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
class _Job:
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
    job = _prepare(config)
    output = Path(config.output)
    store = CacheStore.open(output, job.fingerprint, job.samples.shard_names, allow=allow)
    part, parts = config.part
    mine = set(job.samples.shard_names[part::parts])
    missing = [name for name in store.missing() if name in mine]
    engine = _engine(job, config) if missing else None
    store.start()
    counts = dict.fromkeys(("sequences", "positions", "rejected"), 0)
    if engine is not None:
        _LOG.info("%s: %d of %d shards to capture", output, len(missing), len(job.samples.shard_names))
        with _Progress(sum(len(job.samples.rows_of(name)) for name in missing)) as progress:
            for name in missing:
                captured, rejected = _capture_shard(job, engine, name, progress.update)
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
        output=str(output),
        complete=cache is not None,
        shards_done=len(job.samples.shard_names) - len(left),
        shards_total=len(job.samples.shard_names),
        **counts,
        seconds=round(seconds, 3),
        positions_per_second=round(counts["positions"] / seconds, 1),
        bytes_per_position=round(open_cache(output).bytes_per_position, 3) if cache else None,
        digest=cache["digest"] if cache else None,
        totals=cache["totals"] if cache else None,
    )


def _prepare(config: CacheConfig) -> _Job:
    teacher = Path(config.teacher)
    samples = SampleSet.open(Path(config.data))
    template = get_template(config.template)
    model_config = load_config(teacher)
    tokenizer = load_tokenizer(teacher)
    encoder = sequence_encoder(model_config, tokenizer, template, config.max_length)
    preprocessor = ImagePreprocessor.from_checkpoint(teacher, aspect=config.image_aspect)
    vocab_size = _shared_vocabulary(teacher, tokenizer, int(model_config.text_config.vocab_size))
    device = config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    settings = RecordSettings(
        head_mass=config.capture.head_mass,
        head_max=config.capture.head_max,
        draws_max=config.capture.draws_max,
        draws_per_mass=config.capture.draws_per_mass,
        temperatures=tuple(config.capture.temperatures),
        forced_ids=tuple(_token_id(tokenizer, text) for text in config.capture.forced_tokens),
    )
    codec = Codec(
        vocab_size=vocab_size,
        temperatures=settings.temperatures,
        log_probs="float16" if config.capture.log_probs == "float16" else "float32",
        head_limit=min(settings.head_max, vocab_size) + len(settings.forced_ids),
        draw_limit=settings.draws_max,
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
            "log_probs": codec.log_probs,
            "positions": config.capture.positions,
            "seed": config.capture.seed,
            "vocab_size": vocab_size,
        },
        "data": {"digest": samples.digest, "samples": len(samples)},
    }
    return _Job(
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


def _shared_vocabulary(teacher: Path, tokenizer: PreTrainedTokenizerFast, rows: int) -> int:
    """V = min(len(tokenizer), rows of the head). Errors: `ModelError` if the tokenizer has ids beyond the head."""
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise ModelError(
            f"{teacher}: the tokenizer's largest id is {largest}, but the model's head has {rows} rows: "
            "use the tokenizer that belongs to the checkpoint, or resize its embeddings"
        )
    return vocabulary_size(tokenizer, rows)


def _token_id(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    known = tokenizer.get_vocab().get(text)
    ids = [known] if known is not None else tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ConfigError(f"capture.forced_tokens: '{text}' is {len(ids)} tokens of this tokenizer, must be one")
    return int(ids[0])


def _engine(job: _Job, config: CacheConfig) -> Engine:
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
    )


def _capture_shard(
    job: _Job, engine: Engine, name: str, progress: Callable[[int, int], None]
) -> tuple[list[SequenceRecord], list[Rejection]]:
    """Capture one data shard; both lists are in the order of the set, roles in the order of the sample."""
    requests: list[Request] = []
    captured: list[SequenceRecord] = []
    rejected: list[Rejection] = []
    order: dict[tuple[str, str], int] = {}
    for row in job.samples.rows_of(name):
        sample = job.samples.read(row, verify=True)
        sequences = []
        for role in sample.roles:
            order[sample.key, role] = len(order)
            try:
                sequences.append(_encode(job, sample, role))
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


def _encode(job: _Job, sample: Sample, role: str) -> TokenSequence:
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
