"""Make and check everything a run needs before its first step, in an order that finds mistakes early."""

from __future__ import annotations

import logging
import os
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from llavamod_offline.data.order.schedule import BatchSchedule
from llavamod_offline.data.order.stream import Order
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import ConfigError
from llavamod_offline.families.folder import context_length
from llavamod_offline.families.students.protocol import StudentFamily
from llavamod_offline.losses.bucketed_divergence import DivergenceSpec
from llavamod_offline.losses.cached_distillation import prior_of
from llavamod_offline.losses.tail_estimators import choose_tail, prepare_targets
from llavamod_offline.models.checkpoint import vocabulary_size
from llavamod_offline.models.lm_head import lm_head_of
from llavamod_offline.plural import counted
from train.config import TrainConfig
from train.data.batches import Loader, TrainBatch
from train.data.behaviour import check_written
from train.data.join import MISMATCHED, Join, join
from train.data.lengths import sequence_lengths
from train.data.mismatched_check import check_pairs
from train.data.prefetch import Prefetch
from train.data.sample_order import make_order, order_settings
from train.engine.choose import check_processes, choose_engine
from train.engine.deepspeed_engine import World
from train.engine.optim import choose_trainable, frozen_digest
from train.stages.alignment_setup import prepare_alignment
from train.stages.build import Objective, make_objective
from train.stages.student_pass import StudentPass
from train.student.lora import saved_modules
from train.student.make import open_student
from train.student.source import StudentSource, open_source, start_digest
from train.teachers import check_teachers, check_wording, is_aligned, open_teachers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llavamod_offline.data.encode.tokenize import Positions
    from teacher_cache.read.reader import TeacherCache
    from teacher_cache.read.several import Teachers
    from teacher_cache.student.end_of_turn import TokenIdSwap

_MOST_WORKERS = 8
_SHOWN_SEQUENCES = 100  # over which a warning averages the tail
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Setup:
    """A run that is ready to start; `contents` are the digests that a checkpoint to resume from must match."""

    samples: SampleSet
    student: PreTrainedModel
    family: StudentFamily
    objective: Objective
    loader: Loader
    joined: Join
    order: Order
    micro_size: int
    given_steps: int | None
    epochs: int
    zero_stage: int
    dtype: torch.dtype
    contents: dict[str, Any]

    @property
    def steps(self) -> int:
        """The number of optimiser steps: the configured one, or as many as the epochs take."""
        return self.given_steps or ceil(
            (self.epochs * self.order.per_epoch - self.order.offset) / self.order.batch_size
        )

    def micro_batches(self, world: World, start: int) -> Generator[TrainBatch]:
        """Yield this process's micro-batches from step `start` on; always close the generator."""
        schedule = BatchSchedule(
            self.order,
            start=start,
            stop=self.steps,
            rank=world.rank,
            world_size=world.size,
            micro_batch_size=self.micro_size,
        )
        return self.loader.batches(schedule)

    def holdout_batches(self, world: World) -> list[TrainBatch]:
        """Make micro-batches of this process's share of the held-out samples."""
        size, share = self.micro_size, len(self.joined.holdout) // world.size
        first = len(self.joined.rows) + world.rank * share
        places = list(range(first, first + share))
        return list(self.loader.batches([places[i : i + size] for i in range(0, len(places), size)])) if places else []


def named_contents(config: TrainConfig) -> dict[str, Any]:
    """Return the digests of the set, the cache and the starting checkpoint, without reading any sample or record.

    Errors: a `LlavaModError` if one of them is missing.
    """
    samples = SampleSet.open(config.data.set)
    cache = open_teachers(config, samples)
    return {
        "set_digest": samples.digest,
        "cache_digest": None if cache is None else cache.digest,
        "start_digest": start_digest(config.student),
    }


def settings_digest(*fingerprints: Mapping[str, Any]) -> str:
    """Hash the settings that caches were made with, but not the data they cover."""
    from teacher_cache.format.manifest import canonical, sha256_bytes

    kept = [{name: part for name, part in one.items() if name not in ("data", "engine")} for one in fingerprints]
    return sha256_bytes(canonical(kept[0] if len(kept) == 1 else kept))


def prepare(config: TrainConfig, world: World) -> Setup:
    """Open set, cache and checkpoint, join them, and make the student, without writing anything.

    Errors: a `LlavaModError` naming what does not fit and the key to change.
    """
    zero_stage, dtype = choose_engine(config.engine, world)
    check_processes(config.batch, config.data.holdout, world)
    source = open_source(config.student)
    samples = SampleSet.open(config.data.set)
    cache = open_teachers(config, samples)
    parts = () if cache is None else cache.parts
    aligns = is_aligned(config, parts, source.tokenizer)
    swap = check_teachers(config, parts, None if aligns else source.tokenizer)
    followed = None if not parts or aligns or config.cache.end_of_turn else parts[0].fingerprint["template"]
    if MISMATCHED in config.roles and samples.has_preferences:  # without preferences, the join refuses the set
        samples = samples.with_mismatched()
    student, family = open_student(config, source, followed, sharded=zero_stage == 3)
    if config.engine.gradient_checkpointing and not student.supports_gradient_checkpointing:
        raise ConfigError(
            f"engine.gradient_checkpointing: {type(student).__name__} does not support it: set it to false"
        )
    if family.image_tokens is None:
        _check_image_terms(config)
    encoder = family.encoder
    if not aligns:
        check_wording(config, parts, encoder, family.describe_images())
    measured: list[NDArray[np.int64]] = []
    context = context_length(student.config.get_text_config())

    def lengths(kept: NDArray[np.bool_]) -> NDArray[np.int64]:
        workers, limit = _workers(config, world), min(config.max_length, context)
        found = sequence_lengths(samples, kept, config.roles, family, limit=limit, workers=workers, world=world)
        measured.append(found)
        return measured[0]

    joined = join(
        samples,
        config.roles,
        cache,
        missing=config.cache.missing,
        holdout=config.data.holdout,
        seed=config.seed,
        lengths=lengths,
        max_length=config.max_length,
        context=context,
        too_long=config.data.too_long,
    )
    if cache is not None and MISMATCHED in config.roles:
        for part, rows in cache.assigned(joined.rows):
            check_pairs(samples, part, rows, family.encode, swap)
    settings = order_settings(
        samples,
        cache,
        window=config.data.window,
        weights=config.data.weights,
        image_tokens=family.image_tokens if config.data.group_by_length else None,
        by_tokens=config.data.group_by_length and family.image_tokens is None,
        by_modality=config.data.group_by_modality,
    )
    order = make_order(
        settings, samples, joined.rows, seed=config.seed, size=config.batch.global_size, measured_N=measured[0]
    )
    if config.batch.global_size > order.per_epoch and world.is_main:
        _LOG.warning(
            "batch.global_size: %d is more than the %s of an epoch, so every step repeats some: lower it",
            config.batch.global_size,
            counted(order.per_epoch, "sample"),
        )
    if cache is not None:
        cache.keep_shards(order.window or len(samples.shards))
    choose_trainable(student, config.trainable)
    if config.student.lora is not None and config.student.lora.keep_adapters:
        saved_modules(student)  # refuses what PEFT cannot save, before the first step
    head = lm_head_of(student)
    positions = "response" if aligns else _positions(config, cache)
    own_vocab_size = vocabulary_size(source.tokenizer, head.rows)
    cached_vocab_size = _cached_vocabulary(None if aligns else cache, swap, own_vocab_size)
    bridge = None
    if aligns:
        from teacher_cache.other_tokenizer.bridge import open_bridge

        bridge = open_bridge(parts[0], source.tokenizer, end_id=encoder.end_id, vocab_size=own_vocab_size)
    alignment = prepare_alignment(
        config.loss.align,
        parts[0] if parts else None,
        student_head=head,
        vocab_size=cached_vocab_size,
        encoder=encoder,
        seed=config.seed,
        device=world.device,
    )
    loader = Loader(
        samples,
        np.concatenate([joined.rows, joined.holdout]),
        family=family,
        roles=config.roles,
        cache=cache,
        records=joined.records,
        swap=swap,
        vocab_size=cached_vocab_size,
        positions=positions,
        states=None if alignment is None else alignment.states,
        masked_ids=_masked_ids(config, samples, source),
        bridge=bridge,
        visual_weight=config.loss.visual_weight,
        record_roles=config.roles[:1] if config.loss.distils(config.stage) else (),
        workers=_workers(config, world),
        pin_memory=world.device.type == "cuda",
        prefetch=Prefetch(order, samples, cache),
    )
    return Setup(
        samples=samples,
        student=student,
        family=family,
        objective=make_objective(
            config.stage,
            config.loss,
            vocab_size=own_vocab_size,
            forward=StudentPass(family.forward, "vision" in config.trainable or _adapts_vision(config)),
            **_tail(config, None if aligns else cache, swap, cached_vocab_size, samples=len(joined.rows)),
            positions=positions,
            alignment=alignment,
            paired=not samples.manifest.get("unpaired"),
            has_counterpart_V=None if bridge is None else torch.from_numpy(bridge.has_counterpart_V),
        ),
        loader=loader,
        joined=joined,
        order=order,
        micro_size=config.batch.micro_size,
        given_steps=config.steps,
        epochs=config.epochs,
        zero_stage=zero_stage,
        dtype=dtype,
        contents={
            "set_digest": samples.digest,
            "cache_digest": None if cache is None else cache.digest,
            "cache_settings": None if cache is None else settings_digest(*(part.fingerprint for part in parts)),
            "start_digest": start_digest(config.student),
            "kept_hash": joined.kept_hash,
            "order": settings.describe(),
            "frozen_digest": frozen_digest(student),
        },
    )


def _check_image_terms(config: TrainConfig) -> None:
    """Refuse alignment terms that compare image tokens if the student's images take varying numbers of them."""
    for key in ("visual_kl_weight", "relation_weight"):
        if getattr(config.loss.align, key):
            raise ConfigError(
                f"loss.align.{key}: the number of this student's image tokens depends on the image's size, and only "
                "LLaVA students are compared token by token: set it to 0"
            )


def _cached_vocabulary(cache: Teachers | None, swap: TokenIdSwap | None, own: int) -> int | None:
    """Count the ids that the records share with the student, which has `own` ids."""
    if cache is None:
        return None
    return min(cache.vocab_size if swap is None else swap.vocab_size(cache.vocab_size), own)


def _tail(
    config: TrainConfig, cache: Teachers | None, swap: TokenIdSwap | None, vocab_size: int | None, *, samples: int
) -> dict[str, Any]:
    """Choose the tail's estimator, and its prior for records that are read many times."""
    loss = config.loss
    if cache is None or not loss.distils(config.stage) or loss.kind == "policy_gradient":
        return {}
    if loss.tail != "auto":
        if loss.tail == "bucket" and loss.temperature != 1.0:
            _warn_of_unsampled_tail(cache.parts[0], loss.temperature)
        tail = loss.tail
    else:
        tail = choose_tail(
            loss.divergence, loss.temperature, sampled_at=cache.sampled_at, has_samples=cache.has_tail_samples
        )
    visits = config.steps * config.batch.global_size / max(samples, 1) if config.steps else config.epochs
    prior = prior_of(cache, epochs=visits, swap=swap, vocab_size=vocab_size) if tail == "samples" else None
    if prior is not None:
        _LOG.info(
            "few records, each read %.0f times: %.0f %% of each tail follows the teacher's mean tail, because "
            "students memorise the samples of so few records",
            visits,
            100 * prior.share,
        )
    return {"tail": tail, "prior": prior}


def _masked_ids(config: TrainConfig, samples: SampleSet, source: StudentSource) -> frozenset[int] | None:
    """The tokens that a loss on own answers leaves out; None without such a loss. Errors: `ConfigError` for the set."""
    loss = config.loss
    if not loss.on_own_answers:
        return None
    check_written(samples, key="loss.kind" if loss.kind == "policy_gradient" else "loss.positions")
    masks = loss.special_tokens == "mask" or (loss.special_tokens is None and config.cache.end_of_turn is not None)
    added = source.tokenizer.added_tokens_decoder if masks else {}
    return frozenset(number for number, token in added.items() if token.special)


def _warn_of_unsampled_tail(cache: TeacherCache, temperature: float) -> None:
    targets = cache.targets(np.arange(min(_SHOWN_SEQUENCES, len(cache))))
    tail_N = prepare_targets(targets, cache.vocab_size, spec=DivergenceSpec(), temperature=temperature)
    share = float(tail_N.full_log_probs_NE[:, -1].exp().mean())
    _LOG.warning(
        "loss.tail=bucket at temperature %g: %.0f %% of the teacher's probability lies outside the top-k there, whose "
        "shape is not learnt: capture with capture.temperature=%g to learn it",
        temperature,
        100 * share,
        temperature,
    )


def _positions(config: TrainConfig, cache: Teachers | None) -> Positions:
    """Choose the positions that batches hold: the supervised ones, or all that the cache records."""
    if cache is None or cache.positions_kept == "response" or not config.loss.distils(config.stage):
        return "response"
    if config.stage == "preference":
        raise ConfigError(
            f"loss.distill_weight: cache '{cache.path}' records all positions, not only responses: set it to 0, "
            "or capture with capture.positions=response"
        )
    return "all"


def _adapts_vision(config: TrainConfig) -> bool:
    lora = config.student.lora
    return lora is not None and any(target.partition(".")[0] == "vision" for target in lora.targets)


def _workers(config: TrainConfig, world: World) -> int:
    if config.workers is not None:
        return config.workers
    spare = len(os.sched_getaffinity(0)) // world.local_size - 1
    return max(0, min(_MOST_WORKERS, spare))
