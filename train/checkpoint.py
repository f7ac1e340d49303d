"""Resumable checkpoints: the trained tensors, AdamW's state and the run's identity, in safetensors and JSON.

    {output}/checkpoints/step-00001000/   appears whole or not at all; the highest number is the latest
        weights.safetensors               the trained parameters, full and in float32, by name, including those of an
                                          alignment projection
        optimizer.safetensors             `{name}/exp_avg`, `{name}/exp_avg_sq`, `{name}/step`
        state.json                        step, counters, and the run's identity (see `resume_check.py`)

Frozen parameters are represented by a digest in the run's identity. Tensors are stored unsharded, so a run can resume
with another ZeRO stage or number of processes. The order of samples, the learning rate and random numbers are functions
of (seed, step), so they need no state.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llavamod_offline.errors import ConfigError, ModelError, first_line
from llavamod_offline.storage import atomic
from train.engine.deepspeed_engine import World

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Progress:
    """A run's progress: optimiser steps done, tokens and positions seen, seconds spent on them; and the last step's
    log entry, for a rerun that only exports."""

    step: int = 0
    tokens: int = 0
    positions: int = 0
    seconds: float = 0.0
    entry: dict[str, Any] = field(default_factory=dict)


def checkpoint_folder(output: Path) -> Path:
    """Return the folder of a run's checkpoints."""
    return output / "checkpoints"


def latest_checkpoint(output: Path) -> Path | None:
    """Return the checkpoint to resume from, the one with the highest step."""
    found = sorted(path for path in checkpoint_folder(output).glob("step-*") if path.is_dir())
    return found[-1] if found else None


def read_progress(checkpoint: Path) -> tuple[Progress, dict[str, Any]]:
    """Read a checkpoint's progress and the identity of its run. Errors: `ModelError` if it is damaged."""
    try:
        state = json.loads((checkpoint / "state.json").read_bytes())
        return Progress(**state["progress"]), dict(state["identity"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{checkpoint}: damaged checkpoint ({error!r}): remove the folder and rerun") from error


def save_checkpoint(
    output: Path,
    engine: Any,
    progress: Progress,
    identity: dict[str, Any],
    *,
    keep_last: int,
    world: World,
) -> None:
    """Write a checkpoint and remove all but the last `keep_last`; every process must call this.

    Errors: `ConfigError` in the main process, after the barrier, if it cannot be written; earlier checkpoints are kept.
    """
    weights = {name: _cpu(tensor) for name, tensor in _full_weights(engine) if world.is_main}
    moments = {name: _cpu(tensor) for name, tensor in _full_moments(engine) if world.is_main}
    failure: OSError | SafetensorError | None = None
    if world.is_main:
        folder = checkpoint_folder(output)
        state = json.dumps({"progress": asdict(progress), "identity": identity}, indent=2)
        try:
            _write(folder / f"step-{progress.step:08d}", weights, moments, state)
            for old in sorted(folder.glob("step-*"))[:-keep_last]:
                shutil.rmtree(old)
        except (OSError, SafetensorError) as error:
            failure = error
    world.barrier()
    if failure is not None:
        last = latest_checkpoint(output)
        resume = "rerun the command" if last is None else f"rerun the command to resume from {last.name}"
        raise ConfigError(
            f"output: cannot write a checkpoint to {checkpoint_folder(output)} ({first_line(failure)}): free disk "
            f"space, then {resume}"
        ) from failure


def load_weights(checkpoint: Path, module: nn.Module) -> None:
    """Load a checkpoint's trained tensors into a module before an engine wraps it. Errors: `ModelError`."""
    weights = _load(checkpoint / "weights.safetensors")
    trained = dict(_trained(module))
    if {name: tuple(p.shape) for name, p in trained.items()} != {n: tuple(w.shape) for n, w in weights.items()}:
        raise ModelError(f"{checkpoint}: its tensors are not the ones that this run trains: choose another output")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])


def load_optimizer(checkpoint: Path, engine: Any) -> None:
    """Load a checkpoint's optimiser state (and float32 weights, if the engine keeps its own) into a new engine."""
    moments = _load(checkpoint / "optimizer.safetensors")
    weights = _load(checkpoint / "weights.safetensors")
    inner = _inner_optimizer(engine)
    if inner is engine.optimizer:
        for name, parameter in _trained(engine.module):
            if f"{name}/step" in moments:
                state = {key: moments[f"{name}/{key}"].to(parameter.device) for key in _MOMENTS}
                inner.state[parameter] = {"step": moments[f"{name}/step"].clone(), **state}
        return
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    start_optimizer(engine, next(tensor for name, tensor in moments.items() if name.endswith("/step")))
    for name, parameter in _trained(engine.module):
        safe_set_full_fp32_param(parameter, weights[name])
        for key in _MOMENTS:
            safe_set_full_optimizer_state(parameter, moments[f"{name}/{key}"], key)


def _write(target: Path, weights: dict[str, Tensor], moments: dict[str, Tensor], state: str) -> None:
    shutil.rmtree(target, ignore_errors=True)
    with atomic.new_folder(target) as aside:
        save_file(weights, aside / "weights.safetensors")
        save_file(moments, aside / "optimizer.safetensors")
        (aside / "state.json").write_text(state)


def _full_weights(engine: Any) -> Iterator[tuple[str, Tensor]]:
    if _inner_optimizer(engine) is engine.optimizer:
        yield from ((name, parameter.detach()) for name, parameter in _trained(engine.module))
        return
    from deepspeed.utils import safe_get_full_fp32_param

    for name, parameter in _trained(engine.module):
        yield name, safe_get_full_fp32_param(parameter)


def _full_moments(engine: Any) -> Iterator[tuple[str, Tensor]]:
    inner = _inner_optimizer(engine)
    if inner is engine.optimizer:
        for name, parameter in _trained(engine.module):
            for key, value in inner.state.get(parameter, {}).items():
                yield f"{name}/{key}", value
        return
    from deepspeed.utils import safe_get_full_optimizer_state

    step = next(state["step"] for state in inner.state.values())
    for name, parameter in _trained(engine.module):
        for key in _MOMENTS:
            yield f"{name}/{key}", safe_get_full_optimizer_state(parameter, key)
        yield f"{name}/step", step.clone()


def start_optimizer(engine: Any, step: Tensor | None = None) -> None:
    """Initialise the state of a wrapped AdamW as its first step would, at `step` (default 0).

    DeepSpeed links parameters to their moments during its first step, before our second parameter group has any; with
    the state created beforehand, it links all of them.
    """
    wrapper, inner = engine.optimizer, _inner_optimizer(engine)
    if wrapper is inner:
        return
    step = torch.zeros(()) if step is None else step
    flats = getattr(wrapper, "fp32_partitioned_groups_flat", None)  # ZeRO-3's; other stages pass theirs to AdamW
    for flat in flats or [tensor for group in inner.param_groups for tensor in group["params"]]:
        inner.state[flat] = {"step": step.clone(), **{key: torch.zeros_like(flat) for key in _MOMENTS}}
    link = getattr(wrapper, "_lazy_init_hp_params_optimizer_state", None)
    if link is not None:
        wrapper._hp_optimizer_states_linked = False
        link()


def _trained(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """List a module's trained parameters by name, without the prefix `student.`."""
    return [(name.removeprefix("student."), p) for name, p in module.named_parameters() if p.requires_grad]


def _inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """Return the torch optimiser, which DeepSpeed wraps under ZeRO and bf16 only."""
    optimizer = engine.optimizer
    return optimizer if isinstance(optimizer, torch.optim.AdamW) else optimizer.optimizer


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: damaged checkpoint ({error}): remove its folder and rerun") from error


def _cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).contiguous()
