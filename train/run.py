"""One training run, from a configuration to an exported student; a process may call it several times."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from llavamod_offline.config import dump_config
from llavamod_offline.errors import ConfigError, first_line
from llavamod_offline.families.students.parts import model_parts
from llavamod_offline.models.upcycle import activated_parameters, total_parameters
from llavamod_offline.progress import ProgressBar
from llavamod_offline.signals import keeping
from llavamod_offline.storage import atomic
from llavamod_offline.storage.lock import LOCK_NAME, locked
from train.checkpoint import (
    Progress,
    checkpoint_folder,
    latest_checkpoint,
    load_optimizer,
    load_weights,
    read_progress,
    save_checkpoint,
    start_optimizer,
)
from train.config import TrainConfig
from train.data.join import rejection_lines
from train.data.resumed_order import Hashes, hash_keys, is_repaired, resume_order, write_hashes
from train.engine.deepspeed_engine import World, make_engine, process_group
from train.engine.optim import learning_rate, make_optimizer
from train.engine.zero3 import without_empty_experts
from train.loop import LoopEnd, LoopSettings, compare_routing, evaluate_loss, run_steps
from train.metrics import METRICS_NAME, MetricsLog
from train.report.model_card import model_card
from train.resume_check import accepted_contents, different_settings, is_remedy, refuse, settings_of
from train.run_summary import CONFIG_NAME, TrainSummary, as_begun, finished_summary, write_summary
from train.setup import Setup, named_contents, prepare
from train.stages.build import StudentWithLoss
from train.student.lora import adapter_size, merged, save_adapters
from train.tracking import tracker

logger = logging.getLogger(__name__)

STUDENT_NAME = "student"
ADAPTERS_NAME = "adapters"  # if student.lora.keep_adapters
_FOREIGN = {"set.json": "a packed set", "cache.json": "a cache", "job.json": "a cache", "config.json": "a checkpoint"}
REJECTED_NAME = "rejected.jsonl"


def train(config: TrainConfig) -> TrainSummary:
    """Train one stage, resuming from its last checkpoint if it has one, and export the student to `{output}/student`.

    If the run is finished already, only its summary is returned. Errors: a `LlavaModError` naming what to change,
    before the first step where possible.
    """
    config = as_begun(config)
    output, settings = Path(config.output), settings_of(asdict(config))
    _check_output(output)
    # Report a finished run without taking the lock (its disk may be read-only), unless a killed process left one.
    finished = _finished(config, settings, output)
    if finished is not None and not (output / LOCK_NAME).exists():
        return finished
    is_main = os.environ.get("RANK", "0") == "0"  # of several processes, the one that writes
    lock = locked(output) if is_main else nullcontext()
    with lock, keeping(lambda: _kept(output)), process_group() as world:
        return _finished(config, settings, output) or _train(config, settings, output, world)


def _check_output(output: Path) -> None:
    """Refuse the folder of a set, a cache or a checkpoint, which other commands replace as a whole."""
    for name, what in _FOREIGN.items():
        if (output / name).is_file():
            raise ConfigError(f"output: {output} is {what} ({name}): choose another folder")


def _finished(config: TrainConfig, settings: dict[str, Any], output: Path) -> TrainSummary | None:
    finished = finished_summary(output, settings, lambda: named_contents(config))
    if finished is not None:
        logger.info("%s: already finished, after %d steps", output, finished.steps)
    return finished


def _kept(output: Path) -> str:
    """Describe what a stopped run has saved; empty if nothing."""
    checkpoint = latest_checkpoint(output)
    return "" if checkpoint is None else f"the run is saved up to step {read_progress(checkpoint)[0].step} in {output}"


def _train(config: TrainConfig, settings: dict[str, Any], output: Path, world: World) -> TrainSummary:
    checkpoint = latest_checkpoint(output)
    progress, before = read_progress(checkpoint) if checkpoint is not None else (Progress(), {})
    changed = different_settings(before["settings"], settings) if checkpoint is not None else []
    refuse(output, [one for one in changed if not is_remedy(one.key)])
    setup = prepare(config, world)
    setup.loader.check_room()
    template, image_aspect = setup.family.encoder.template.name, setup.family.image_aspect
    config = replace(config, template=template, image_aspect=image_aspect)
    settings = settings | {"template": template, "image_aspect": image_aspect}
    student, objective = setup.student, setup.objective
    module = StudentWithLoss(student, objective)
    hashes = hash_keys(setup.samples.index.column("key").take(setup.joined.rows))
    if checkpoint is not None:
        repaired = partial(is_repaired, output, setup.samples)
        changed += accepted_contents(output, before, setup.contents, changed, repaired)
        logger.info("%s: resuming after step %d", output, progress.step)
        for one in changed:
            logger.warning("%s: %s", output, one)
        moved = before["kept_hash"] != setup.contents["kept_hash"]
        hashes = resume_order(output, setup.order, hashes, before, progress.step, moved=moved)
        load_weights(checkpoint, module)
    changes = [*before.get("changes", []), *(f"after step {progress.step}: {one}" for one in changed)]
    optim = config.optim
    optimizer = make_optimizer(
        module,
        model_parts(student),
        lr=optim.lr,
        part_lr=optim.rates,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
    )
    sizes = _sizes(setup)
    holdout = setup.holdout_batches(world)
    if world.is_main:
        _begin(output, dump_config(config), rejection_lines(setup.samples, setup.joined.too_long), hashes)
    micro_size = config.batch.micro_size
    micro_steps = config.batch.global_size // (micro_size * world.size)
    with ExitStack() as stack:
        if config.engine.gradient_checkpointing:
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        empty = stack.enter_context(without_empty_experts(student)) if setup.zero_stage == 3 else {}
        engine = stack.enter_context(
            make_engine(
                module,
                optimizer,
                world=world,
                micro_size=micro_size,
                micro_steps=micro_steps,
                zero_stage=setup.zero_stage,
                offload=config.engine.offload,
                dtype=setup.dtype,
                grad_clip=optim.grad_clip,
            )
        )
        start_optimizer(engine)
        if checkpoint is not None:
            load_optimizer(checkpoint, engine)
        log = None
        if world.is_main:
            track = stack.enter_context(tracker(config.tracker, output, asdict(config), resume_step=progress.step))
            log = stack.enter_context(MetricsLog(output, progress.step, track))

        def save(now: Progress) -> None:
            order = setup.order
            mark = asdict(order.mark(order.position(now.step)))
            place = {"numbered": order.is_numbered, "offset": order.offset, "mark": mark}
            identity = {"settings": settings, **setup.contents, **place, "changes": changes}
            save_checkpoint(
                output,
                engine,
                now,
                identity,
                keep_last=config.keep_last,
                world=world,
            )

        end = run_steps(
            engine,
            objective,
            stack.enter_context(closing(setup.micro_batches(world, progress.step))),
            settings=LoopSettings(
                steps=setup.steps,
                micro_steps=micro_steps,
                samples=setup.order.per_epoch,
                batch_size=config.batch.global_size,
                seed=config.seed,
                log_steps=config.log_steps,
                save_steps=config.save_steps,
                eval_steps=config.eval_steps,
                learning_rate=partial(
                    learning_rate,
                    steps=setup.steps,
                    peak=optim.lr,
                    warmup_ratio=optim.warmup_ratio,
                    schedule=optim.schedule,
                ),
                part_scales={part: rate / optim.lr for part, rate in optim.rates.items()},
            ),
            progress=progress,
            world=world,
            log=log,
            bar=stack.enter_context(
                ProgressBar(config.stage, setup.steps, "step", done=progress.step, silent=not world.is_main)
            ),
            save=save,
            evaluate=lambda: evaluate_loss(engine, objective, holdout, world),
            at_end=lambda micros: compare_routing(engine, objective, holdout or micros, world),
        )
        if not end.stopped:
            unsaved = _save_last(save, end.progress) if end.progress.step > progress.step else None
            card = model_card(
                settings,
                student,
                sizes=sizes[:2],
                steps=end.progress.step,
                samples=len(setup.joined.rows),
                digests={"set": setup.contents["set_digest"], "teacher cache": setup.contents["cache_digest"]},
                metrics=end.progress.entry,
                changes=changes,
            )
            kept = config.student.checkpoint if config.student.lora and config.student.lora.keep_adapters else None
            _export(output, engine, setup, empty, card, world, unsaved, kept)
    summary = _summary(config.stage, output, setup, end, sizes)
    if world.is_main and summary.finished:
        write_summary(output, summary, settings, setup.contents, changes)
        if not config.save_steps:
            shutil.rmtree(checkpoint_folder(output), ignore_errors=True)
    world.barrier()
    return summary


def _save_last(save: Callable[[Progress], None], progress: Progress) -> ConfigError | None:
    """Save the last checkpoint before the export; return the error if it does not fit on the disk: a student may."""
    try:
        save(progress)
    except ConfigError as error:
        logger.warning("%s; exporting without a last checkpoint", error)
        return error
    return None


def _begin(output: Path, config: str, rejected: str, hashes: Hashes) -> None:
    """Make the output folder and remove what a killed run left incomplete. Errors: `ConfigError`."""
    student = output / STUDENT_NAME
    if student.exists() and not (output / METRICS_NAME).is_file():
        raise ConfigError(f"output: {output} holds a student not written by train-student: choose another output")
    try:
        output.mkdir(parents=True, exist_ok=True)
        for name in (STUDENT_NAME, ADAPTERS_NAME):
            shutil.rmtree(output / name, ignore_errors=True)
            atomic.remove_leftovers(output, name)
        atomic.remove_leftovers(checkpoint_folder(output), "step-*")
        atomic.write_file(output / CONFIG_NAME, config)
        write_hashes(output, hashes)
        (output / REJECTED_NAME).unlink(missing_ok=True)
        if rejected:
            atomic.write_file(output / REJECTED_NAME, rejected)
    except OSError as error:
        raise ConfigError(f"output: {output} cannot be written ({error.strerror}): choose another output") from error


def _export(
    output: Path,
    engine: Any,
    setup: Setup,
    empty: dict[str, Tensor],
    card: str,
    world: World,
    unsaved: ConfigError | None,
    adapted: str | None,
) -> None:
    """Write the student as a Hugging Face folder, with its `empty` tensors; every process must call this.

    Adapters are merged into its weights, and also written for the checkpoint `adapted`, if that is given.
    Errors: `ConfigError` if it cannot be written; `unsaved` instead if the last checkpoint was not saved either.
    """
    state = None
    if engine.zero_optimization_stage() == 3:
        whole = engine._zero3_consolidated_16bit_state_dict() or {}
        own = (name for name in whole if name.startswith("student."))
        state = {name.removeprefix("student."): whole[name] for name in own} | empty
    if world.is_main:
        setup.student.eval()
        student = output / STUDENT_NAME
        try:
            if adapter_size(setup.student):
                whole = setup.student.state_dict() if state is None else state
                state = merged(setup.student, whole)
                if adapted is not None:
                    save_adapters(setup.student, whole, output / ADAPTERS_NAME, base=adapted)
            setup.family.save(setup.student, student, state_dict=state, card=card)
        except (OSError, SafetensorError) as error:
            raise unsaved or ConfigError(
                f"output: cannot write the student to {student} ({first_line(error)}): free disk space, then rerun the "
                "command, which only exports"
            ) from error
    world.barrier()


def _sizes(setup: Setup) -> tuple[int, int, int]:
    """Count all parameters, those active per token, and those trained, before an engine may shard them."""
    student = setup.student
    trained = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    adapters = adapter_size(student)  # merged into the exported student, so not counted
    return total_parameters(student) - adapters, activated_parameters(student) - adapters, trained


def _summary(stage: str, output: Path, setup: Setup, end: LoopEnd, sizes: tuple[int, int, int]) -> TrainSummary:
    return TrainSummary(
        stage=stage,
        output=str(output),
        student=str(output / STUDENT_NAME),
        finished=not end.stopped,
        steps=end.progress.step,
        seconds=end.progress.seconds,
        tokens=end.progress.tokens,
        positions=end.progress.positions,
        samples=len(setup.joined.rows),
        samples_without_record=setup.joined.missing,
        samples_too_long=len(setup.joined.too_long),
        parameters=sizes[0],
        activated_parameters=sizes[1],
        trained_parameters=sizes[2],
        cache_digest=setup.contents["cache_digest"],
        metrics=end.progress.entry,
    )
