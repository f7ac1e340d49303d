"""The process group and the DeepSpeed engine: one process without a launcher, or many under torchrun or `deepspeed`.

Both are context managers that clean up, so that a process can make several runs in turn.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llavamod_offline.errors import ConfigError

_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This process's rank among all processes of the run, their number in total and on this machine, and its device."""

    rank: int
    size: int
    local_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum `values` over all processes, in place; the result is the same on each."""
        if self.size > 1:
            torch.distributed.all_reduce(values)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """Concatenate the `values` [n] of all processes, the same number on each, on the CPU."""
        if self.size == 1:
            return values.cpu()
        parts = [torch.empty_like(values) for _ in range(self.size)]
        torch.distributed.all_gather(parts, values.contiguous())
        return torch.cat(parts).cpu()

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            torch.distributed.barrier()


@contextmanager
def process_group() -> Iterator[World]:
    """Enter the process group that the launcher describes, or one of this process alone.

    Errors: `ConfigError` if DeepSpeed is not installed, or some of a launcher's environment variables are missing.
    """
    present = [name for name in _LAUNCHER_VARIABLES if name in os.environ]
    launched = "RANK" in present and "WORLD_SIZE" in present
    if launched and len(present) < len(_LAUNCHER_VARIABLES):
        absent = next(name for name in _LAUNCHER_VARIABLES if name not in present)
        raise ConfigError(f"environment: {present[0]} is set but {absent} is not: start with torchrun, or unset both")
    local_rank = int(os.environ["LOCAL_RANK"]) if launched else 0
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    backend = "nccl" if on_gpu else "gloo"
    with _quiet(), _environment({} if launched else {"LOCAL_RANK": "0"}, default_accelerator=not on_gpu):
        _import_deepspeed()
        _end_threads_at_exit()
        if on_gpu:
            torch.cuda.set_device(device)
        if launched:
            torch.distributed.init_process_group(backend)
        else:
            # A store in memory needs no port, so runs cannot collide.
            store = torch.distributed.HashStore()  # type: ignore[attr-defined]
            torch.distributed.init_process_group(backend, rank=0, world_size=1, store=store)
        try:
            rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
            yield World(rank, size, int(os.environ.get("LOCAL_WORLD_SIZE", size)), device)
        finally:
            # Once an engine exists, DeepSpeed holds its own references to the group.
            communication = _import_deepspeed().comm
            owner = communication if communication.is_initialized() else torch.distributed
            owner.destroy_process_group()


@contextmanager
def make_engine(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    world: World,
    micro_size: int,
    micro_steps: int,
    zero_stage: int,
    offload: bool,
    dtype: torch.dtype,
    grad_clip: float,
) -> Iterator[Any]:
    """Yield a DeepSpeed engine around `module`, and destroy it afterwards.

    Gradients are accumulated over micro-batches in float32, whatever the `dtype` of the weights.
    """
    deepspeed = _import_deepspeed()
    zero: dict[str, Any] = {"stage": zero_stage}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": world.device.type == "cuda"}
    settings = {
        "train_micro_batch_size_per_gpu": micro_size,
        "gradient_accumulation_steps": micro_steps,
        "train_batch_size": micro_size * micro_steps * world.size,
        "gradient_clipping": grad_clip,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == torch.bfloat16, "immediate_grad_update": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }
    if zero_stage == 1:  # reduces accumulated gradients once per step; other stages reduce each micro-batch in `dtype`
        settings["communication_data_type"] = "fp32"
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)
    linear = torch.nn.functional.linear
    attributes = [(parameter, dict(vars(parameter))) for parameter in module.parameters()]
    with redirect_stdout(None):  # ZeRO 1 in bfloat16 prints its memory use
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    try:
        yield engine
    finally:
        engine.destroy()
        # What DeepSpeed leaves behind: ZeRO-3's own linear layer, which torch.compile does not accept; and hooks in
        # autograd's graph, which would keep all its objects, their memory and the process group alive.
        torch.nn.functional.linear = linear
        if not isinstance(engine.optimizer, torch.optim.Optimizer):
            vars(getattr(engine.optimizer, "parameter_offload", engine.optimizer)).clear()
            vars(engine.optimizer).clear()
        vars(engine).clear()
        vars(engine).update(vars(nn.Module()))
        for parameter, given in attributes:
            vars(parameter).clear()
            vars(parameter).update(given)


def apply_gradients(engine: Any, rate: float) -> float:
    """Clip the accumulated gradients and take AdamW's step at the given learning rate, times each group's `rate_scale`.

    Returns the norm before clipping. If it is not finite, the weights stay unchanged, except under ZeRO or bf16, where
    DeepSpeed reports the norm only after its step.
    """
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group.get("rate_scale", 1.0)
    if isinstance(engine.optimizer, torch.optim.Optimizer):
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if math.isfinite(norm):
            engine.step()
        return norm
    engine.step()
    return float(engine.get_global_grad_norm())


def _import_deepspeed() -> Any:
    """Import DeepSpeed, logging warnings to stderr and compiling nothing. Errors: `ConfigError` if not installed."""
    try:
        import deepspeed
    except ModuleNotFoundError as error:
        raise ConfigError("train-student needs deepspeed: pip install 'llavamod-offline[train]'") from error
    log = logging.getLogger("DeepSpeed")
    log.setLevel(logging.WARNING)
    for handler in log.handlers:
        if type(handler) is logging.StreamHandler:  # DeepSpeed's own handler, on stdout
            handler.stream = sys.stderr  # setStream would flush the old one, which may be closed
    # On a CPU, DeepSpeed would compile a C++ extension for all-reduces in shared memory at the first start (half a
    # minute, and it needs a compiler); gloo does the same here.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _end_threads_at_exit() -> None:
    """Have the threads of a process group end before the interpreter does.

    A gloo thread that drops a tensor while the interpreter shuts down aborts the process ("terminate called without an
    active exception"). The threads end with the group, which reference cycles among DeepSpeed's objects keep alive, as
    would the default arguments of torch.distributed.nn if it were imported inside the group.
    """
    importlib.import_module("torch.distributed.nn")
    atexit.unregister(gc.collect)
    atexit.register(gc.collect)


@contextmanager
def _environment(variables: dict[str, str], *, default_accelerator: bool) -> Iterator[None]:
    """Set environment variables temporarily; the accelerator's only if the user has not set it."""
    if default_accelerator and "DS_ACCELERATOR" not in os.environ:
        variables = {**variables, "DS_ACCELERATOR": "cpu"}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide deprecation warnings that DeepSpeed causes inside torch: users cannot act on them."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category, module=r"(torch|deepspeed|pydantic)\b.*")
        yield
