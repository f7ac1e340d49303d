"""A capture before the teacher's weights are loaded: set, teacher and settings, checked against one another."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import pyarrow.compute as pc
import torch

from llavamod_offline.data.encode.template import AUTO
from llavamod_offline.data.sets.mismatched import PAIRING
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import ConfigError, DataError, ModelError
from llavamod_offline.families import Family, open_family
from llavamod_offline.models.checkpoint import id_count, vocabulary_size
from llavamod_offline.models.device import pick_device
from llavamod_offline.models.hub import checkpoint_folder
from llavamod_offline.processes import available_cores
from teacher_cache.engines.registry import ENGINES, describe_engine, engine_module
from teacher_cache.fingerprint import (
    describe_data,
    describe_sequence,
    describe_template,
    describe_tokenizer,
    describe_weights,
)
from teacher_cache.format.record import RecordSettings
from teacher_cache.format.schema import Codec, HiddenKind, HiddenPositions, WithoutImage
from teacher_cache.images.pool import ImagePool
from teacher_cache.images.waits import Waits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from llavamod_offline.data.encode.tokenize import Positions, SequenceEncoder, TokenizedSequence
    from llavamod_offline.data.sample import Sample
    from llavamod_offline.vllm.settings import VllmSettings
    from teacher_cache.config import Preset
    from teacher_cache.engines.protocol import CaptureEngine
    from teacher_cache.engines.server.settings import ServerSettings

_LOG = logging.getLogger(__name__)
_MOST_WORKERS = 4  # unless more are asked for: several teachers may share a host


class SetupValues(TypedDict):
    """What a capture is set up from: values of `config.CacheTeacherConfig`, with the preset resolved to `keep`."""

    data: str
    teacher: str
    template: str
    image_aspect: str
    max_length: int
    batch_size: int
    workers: int | None
    dtype: str
    device: str
    keep: Preset
    positions: Positions
    hidden: HiddenKind | None
    hidden_positions: HiddenPositions
    mismatched: bool
    without_image: WithoutImage | None
    seed: int
    engine: str
    attention: str
    device_map: str | None
    compile: bool
    vllm: VllmSettings
    url: str | None
    server: ServerSettings


@dataclass(frozen=True)
class CaptureSetup:
    """Everything about a capture that is known before the teacher's weights are loaded.

    `engine` names one of `engines.registry.ENGINES`; the fields after it configure that engine. `opened` opens the
    teacher's folder again, in another process. `waits`: how long the engine has waited.
    """

    samples: SampleSet
    teacher: Family
    settings: RecordSettings
    codec: Codec
    dtype: torch.dtype
    device: str
    fingerprint: dict[str, Any]
    positions: Positions
    hidden_positions: HiddenPositions | None
    seed: int
    engine: str
    batch_size: int
    workers: int
    attention: str
    device_map: str | None
    compile: bool
    vllm: VllmSettings
    opened: Callable[[], Family]
    url: str | None
    server: ServerSettings
    without_image: WithoutImage | None = None
    waits: Waits = field(default_factory=Waits)

    def load(self) -> CaptureEngine:
        """Load the teacher's weights. Errors: `ModelError` if they do not fit, `ConfigError` for a missing device."""
        return engine_module(self.engine).load_engine(self)

    def image_pool(self, images: Callable[[Sample], Any] | None = None) -> ImagePool:
        """A pool that prepares images ahead of the engine: as the teacher does, or by `images`, always in threads."""
        workers = self.workers if images is None else 0
        return ImagePool(images or self.teacher.images, workers=workers, opened=self.opened, waits=self.waits)

    def encode(self, sample: Sample, role: str) -> TokenizedSequence:
        """Tokenize one role. Errors: `DataError` if it is too long for the settings or for the teacher."""
        sequence = self.teacher.encode(sample, role)
        length, limit = len(sequence.input_ids_T), self.teacher.context_length
        if length > limit:
            raise DataError(f"sample '{sample.key}' ({role}): {length} tokens, the teacher takes {limit}")
        return sequence


def prepare_capture(**given: Unpack[SetupValues]) -> CaptureSetup:
    """Open set and teacher and check that they fit together, except the weights. Errors: a `LlavaModError`."""
    keep, seed, positions, served = given["keep"], given["seed"], given["positions"], ENGINES[given["engine"]].served
    folder = checkpoint_folder(given["teacher"], weights=not served)
    samples = SampleSet.open(given["data"])
    if given["mismatched"]:
        if not samples.has_preferences:
            raise ConfigError(
                f"capture.mismatched: set '{samples.path}' holds no preference samples: remove the setting"
            )
        samples = samples.with_mismatched()
    aspect, length = given["image_aspect"], given["max_length"]
    teacher = open_family(folder, given["template"], image_aspect=aspect, max_length=length)
    tokenizer, template = teacher.encoder.tokenizer, teacher.encoder.template
    if given["template"] == AUTO:
        _LOG.info("template: %s, that of %s", template.name, folder)
    vocab_size = _shared_vocabulary(folder, tokenizer, teacher.head_rows)
    forced_ids = _forced_ids(teacher.encoder, keep.forced_tokens)
    without_image = given["without_image"]
    if without_image is not None:
        _check_without_image(without_image, given["engine"], teacher, samples)
    settings, codec = _kept(keep, keep.temperature, forced_ids, vocab_size, given["hidden"], without_image is not None)
    device, dtype = given["device"], given["dtype"]
    if served:
        device = "cpu"
    if device == "auto":
        device = pick_device(device).type
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    hidden_positions = given["hidden_positions"] if given["hidden"] else None
    fingerprint = {
        "tokenizer": describe_tokenizer(tokenizer),
        "template": describe_template(template),
        "sequence": describe_sequence(teacher.encoder),
        "images": teacher.describe_images(),
        "teacher": describe_weights(folder, needed=not served),
        "engine": describe_engine(given, dtype, device),
        "capture": {
            **settings.stored(),
            "precision": codec.precision,
            "positions": positions,
            "hidden": given["hidden"],
            "hidden_positions": hidden_positions,
            "seed": seed,
            "vocab_size": vocab_size,
            **({"mismatched": PAIRING} if given["mismatched"] else {}),
            **({"without_image": without_image} if without_image is not None else {}),
        },
        "data": describe_data(samples),
    }
    return CaptureSetup(
        samples=samples,
        teacher=teacher,
        settings=settings,
        codec=codec,
        dtype=getattr(torch, dtype),
        device=device,
        fingerprint=fingerprint,
        positions=positions,
        hidden_positions=hidden_positions,
        seed=seed,
        engine=given["engine"],
        batch_size=given["batch_size"],
        workers=_workers(given["workers"], device),
        attention=given["attention"],
        device_map=given["device_map"],
        compile=given["compile"],
        vllm=given["vllm"],
        url=given["url"],
        server=given["server"],
        without_image=without_image,
        # Without its tool wording, which is not a plain value and which images do not need.
        opened=partial(
            open_family, folder, replace(template, tool_wording=None), image_aspect=aspect, max_length=length
        ),
    )


def follow_template(given: SetupValues, about: Mapping[str, Any] | None) -> SetupValues:
    """Resolve the template `auto` to a fingerprint's, if there is one, so that a capture continues as it began."""
    name = (about or {}).get("template", {}).get("name")
    return {**given, "template": name} if given["template"] == AUTO and isinstance(name, str) else given


def with_preset(setup: CaptureSetup, preset: Preset) -> CaptureSetup:
    """The same capture with another preset, unchanged but for its temperature; the fingerprint stays as it is."""
    temperature = setup.settings.temperature
    own = setup.codec
    settings, codec = _kept(preset, temperature, (), own.vocab_size, own.hidden, own.visual)
    return replace(setup, settings=settings, codec=codec)


def _kept(
    keep: Preset,
    temperature: float,
    forced: tuple[int, ...],
    vocab_size: int,
    hidden: HiddenKind | None,
    visual: bool,
) -> tuple[RecordSettings, Codec]:
    """What a record keeps, and how it is encoded."""
    own = () if temperature == 1.0 else (temperature,)
    temperatures = tuple(dict.fromkeys((*keep.temperatures, *own)))
    settings = RecordSettings(
        top_p=keep.top_p,
        min_prob=keep.min_prob,
        top_k=vocab_size if keep.top_k is None else min(keep.top_k, vocab_size),
        tail_samples_max=keep.tail_samples_max,
        tail_samples_per_mass=keep.tail_samples_per_mass,
        temperatures=temperatures,
        forced_ids=forced,
        temperature=temperature,
    )
    codec = Codec(
        vocab_size=vocab_size,
        temperatures=temperatures,
        precision=keep.precision,
        topk_limit=settings.top_k + len(forced),
        tail_limit=settings.tail_samples_max,
        forced_ids=forced,
        hidden=hidden,
        visual=visual,
    )
    return settings, codec


def _check_without_image(kind: WithoutImage, engine: str, teacher: Family, samples: SampleSet) -> None:
    """Refuse a second run without images where it is impossible or pointless. Errors: `ConfigError`."""
    if engine == "server":
        raise ConfigError(
            "capture.without_image: engine server has no second run without images: set engine.kind=hf or vllm"
        )
    if teacher.image_token_id is None:
        raise ConfigError(f"capture.without_image: {teacher.folder} is a teacher without images: remove the setting")
    if kind == "drop" and getattr(teacher, "needs_images", False):
        raise ConfigError(
            f"capture.without_image: {teacher.folder} takes no conversation without images: set it to blank"
        )
    if not pc.sum(samples.index.column("n_images")).as_py():
        raise ConfigError(f"capture.without_image: set '{samples.path}' has no images: remove the setting")


def _workers(given: int | None, device: str) -> int:
    """The number of processes that prepare images."""
    if given is not None:
        return given
    return 0 if device == "cpu" else min(_MOST_WORKERS, available_cores())


def _shared_vocabulary(teacher: Path, tokenizer: PreTrainedTokenizerFast, rows: int) -> int:
    """V: the ids that tokenizer and LM head share. Errors: `ModelError` if the tokenizer has ids beyond it."""
    largest = id_count(tokenizer) - 1
    if largest >= rows:
        raise ModelError(
            f"{teacher}: the tokenizer's largest id is {largest}, but the model's LM head has {rows} rows: "
            "use the tokenizer that belongs to the checkpoint, or resize its embeddings"
        )
    return vocabulary_size(tokenizer, rows)


def _forced_ids(encoder: SequenceEncoder, tokens: Sequence[str]) -> tuple[int, ...]:
    """The ids of the named tokens. Errors: `ConfigError` naming one that is not a single token."""
    for text in tokens:
        count = len(_ids_of(encoder, text))
        if count != 1:
            raise ConfigError(f"capture.forced_tokens: '{text}' is {count} tokens of this tokenizer, must be one")
    return tuple(_ids_of(encoder, text)[0] for text in tokens)


def _ids_of(encoder: SequenceEncoder, text: str) -> list[int]:
    known = encoder.tokenizer.get_vocab().get(text)
    return [known] if known is not None else encoder.answer_ids(text).tolist()
