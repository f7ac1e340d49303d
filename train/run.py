"""One training run from a configuration to an exported student; may be called several times in a process."""

from __future__ import annotations

import logging
import shutil
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from llavamod_offline.config import dump_config
from llavamod_offline.errors import ConfigError
from llavamod_offline.models.checkpoint import save_student
from llavamod_offline.models.upcycle import activated_parameters, total_parameters
from llavamod_offline.storage import atomic
from train.checkpoint import (
    Progress,
    checkpoint_folder,
    latest_checkpoint,
    load_optimizer,
    load_shrinkage,
    load_weights,
    read_progress,
    save_checkpoint,
    start_optimizer,
)
from train.config import TrainConfig
from train.data.join import Join, rejection_lines
from train.engine.deepspeed_engine import World, make_engine, process_group
from train.engine.optim import learning_rate, make_optimizer
from train.engine.zero3 import without_empty_experts
from train.loop import LoopEnd, LoopSettings, evaluate_loss, run_steps
from train.metrics import METRICS_NAME, MetricsLog, ProgressLine
from train.model_card import model_card
from train.resume_check import check_contents, check_settings
from train.run_summary import TrainSummary, finished_summary, write_summary
from train.setup import Setup, prepare
from train.stages.build import StudentWithLoss
from train.tracking import tracker

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.yaml"
STUDENT_NAME = "student"
REJECTED_NAME = "rejected.jsonl"


def train(config: TrainConfig) -> TrainSummary:
    """Train a stage, or go on where an earlier call was stopped, and export the student to `{output}/student`.

    A finished run is not repeated: its summary is returned. Errors: a `LlavaModError` naming what to change, before the
    first step wherever that can be known by then.
    """
    output = Path(config.output)
    finished = finished_summary(output, config)
    if finished is not None:
        logger.info("%s: finished already, after %d steps", output, finished.steps)
        return finished
    with process_group() as world:
        return _train(config, output, world)


def _train(config: TrainConfig, output: Path, world: World) -> TrainSummary:
    checkpoint = latest_checkpoint(output)
    progress, before = read_progress(checkpoint) if checkpoint is not None else (Progress(), {})
    if checkpoint is not None:
        check_settings(output, before["settings"], config)
    setup = prepare(config, world)
    student, module = setup.student, StudentWithLoss(setup.student, setup.stage)
    if checkpoint is not None:
        check_contents(output, before, setup.identity)
        load_weights(checkpoint, module)
        if setup.stage.shrinkage is not None:
            load_shrinkage(checkpoint, setup.stage.shrinkage)
        logger.info("%s: going on after step %d", output, progress.step)
    sizes = _sizes(setup)
    holdout = setup.holdout_batches(config, world)
    if world.is_main:
        _begin(config, output, setup.joined)
    with ExitStack() as stack:
        if config.engine.gradient_checkpointing:
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        empty = stack.enter_context(without_empty_experts(student)) if setup.zero_stage == 3 else {}
        engine = stack.enter_context(_engine(config, setup, module, world))
        start_optimizer(engine)
        if checkpoint is not None:
            load_optimizer(checkpoint, engine)
        log = _log(stack, config, output, progress.step) if world.is_main else None
        title = f"{config.stage}"
        line = stack.enter_context(ProgressLine(title, setup.steps, progress.step, silent=not world.is_main))

        def save(now: Progress) -> None:
            save_checkpoint(
                output,
                engine,
                now,
                setup.identity,
                shrinkage=setup.stage.shrinkage,
                keep_last=config.keep_last,
                world=world,
            )

        end = run_steps(
            engine,
            setup.stage,
            stack.enter_context(closing(setup.micro_batches(config, world, progress.step))),
            settings=_loop_settings(config, setup.steps, world),
            progress=progress,
            world=world,
            log=log,
            line=line,
            save=save,
            evaluate=lambda: evaluate_loss(engine, setup.stage, holdout, world),
        )
        if not end.stopped:
            card = _card(config, setup, end, sizes[:2])
            _export(output, engine, setup, empty, card, world)
    summary = _summary(config, output, setup, end, sizes)
    if world.is_main and summary.finished:
        write_summary(output, summary, config)
    world.barrier()
    return summary


def _begin(config: TrainConfig, output: Path, joined: Join) -> None:
    """Make the output folder, and clear what a killed run may have left half done. Errors: `ConfigError`."""
    student = output / STUDENT_NAME
    if student.exists() and not (output / METRICS_NAME).is_file():
        raise ConfigError(f"output: {output} holds a student that is no run's: choose another output")
    try:
        output.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(student, ignore_errors=True)
        atomic.remove_leftovers(output, STUDENT_NAME)
        atomic.remove_leftovers(checkpoint_folder(output), "step-*")
        atomic.write_file(output / CONFIG_NAME, dump_config(config))
        if joined.too_long:
            atomic.write_file(output / REJECTED_NAME, rejection_lines(joined.too_long))
    except OSError as error:
        raise ConfigError(f"output: {output} cannot be written ({error.strerror}): choose another output") from error


def _log(stack: ExitStack, config: TrainConfig, output: Path, resume_step: int) -> MetricsLog:
    track = stack.enter_context(tracker(config.tracker, output, asdict(config), resume_step=resume_step))
    return stack.enter_context(MetricsLog(output, resume_step, track))


def _engine(config: TrainConfig, setup: Setup, module: StudentWithLoss, world: World) -> AbstractContextManager[Any]:
    optim = config.optim
    optimizer = make_optimizer(module, lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay)
    return make_engine(
        module,
        optimizer,
        world=world,
        micro_size=config.batch.micro_size,
        micro_steps=_micro_steps(config, world),
        zero_stage=setup.zero_stage,
        offload=config.engine.offload,
        dtype=setup.dtype,
        grad_clip=optim.grad_clip,
    )


def _loop_settings(config: TrainConfig, steps: int, world: World) -> LoopSettings:
    optim = config.optim
    return LoopSettings(
        steps=steps,
        micro_steps=_micro_steps(config, world),
        seed=config.seed,
        log_steps=config.log_steps,
        save_steps=config.save_steps,
        eval_steps=config.eval_steps,
        learning_rate=lambda step: learning_rate(
            step, steps=steps, peak=optim.lr, warmup_ratio=optim.warmup_ratio, schedule=optim.schedule
        ),
    )


def _micro_steps(config: TrainConfig, world: World) -> int:
    return config.batch.global_size // (config.batch.micro_size * world.size)


def _card(config: TrainConfig, setup: Setup, end: LoopEnd, sizes: tuple[int, int]) -> str:
    identity = setup.identity
    return model_card(
        config,
        setup.student,
        sizes=sizes,
        steps=end.progress.step,
        samples=len(setup.joined.rows),
        digests={"set": identity["set_digest"], "teacher cache": identity["cache_digest"]},
        metrics=end.last,
    )


def _export(output: Path, engine: Any, setup: Setup, empty: dict[str, Tensor], card: str, world: World) -> None:
    """Write the student as a Hugging Face folder, its `empty` tensors too; every process must call it."""
    state = None
    if engine.zero_optimization_stage() == 3:
        whole = engine._zero3_consolidated_16bit_state_dict() or {}
        own = (name for name in whole if name.startswith("student."))
        state = {name.removeprefix("student."): whole[name] for name in own} | empty
    if world.is_main:
        setup.student.eval()
        save_student(
            setup.student,
            output / STUDENT_NAME,
            tokenizer=setup.source.tokenizer,
            processor_source=setup.source.processor,
            state_dict=state,
            card=card,
            template=setup.template,
        )
    world.barrier()


def _sizes(setup: Setup) -> tuple[int, int, int]:
    """Parameters, those a token passes, and those trained; counted before an engine may shard them."""
    student = setup.student
    trained = sum(parameter.numel() for parameter in student.parameters() if parameter.requires_grad)
    return total_parameters(student), activated_parameters(student), trained


def _summary(
    config: TrainConfig, output: Path, setup: Setup, end: LoopEnd, sizes: tuple[int, int, int]
) -> TrainSummary:
    return TrainSummary(
        stage=config.stage,
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
        cache_digest=setup.identity["cache_digest"],
        metrics=end.last,
    )
