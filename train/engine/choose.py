"""The ZeRO stage and the dtype of a run, and checks of its number of processes."""

from __future__ import annotations

import torch

from llavamod_offline.errors import ConfigError
from train.config.train import BatchConfig, TrainEngineConfig
from train.engine.deepspeed_engine import World


def choose_engine(chosen: TrainEngineConfig, world: World) -> tuple[int, torch.dtype]:
    """Choose the ZeRO stage and the weights' dtype where the configuration leaves them open. Errors: `ConfigError`."""
    on_gpu = world.device.type == "cuda"
    dtype = torch.bfloat16 if chosen.dtype == "bfloat16" or (chosen.dtype == "auto" and on_gpu) else torch.float32
    if chosen.attention == "flash_attention_2" and not (on_gpu and dtype == torch.bfloat16):
        raise ConfigError("engine.attention: flash_attention_2 needs a GPU and engine.dtype=bfloat16: use sdpa")
    least = 1 if dtype == torch.bfloat16 else 0  # ZeRO keeps the float32 weights that bfloat16 needs
    if chosen.zero_stage is None:
        return (2 if world.size > 1 or chosen.offload else least), dtype
    if chosen.zero_stage < least:
        raise ConfigError(
            "engine.zero_stage: 0 keeps no float32 weights for bfloat16 training: set it to 1, 2, 3 or null"
        )
    return chosen.zero_stage, dtype


def check_processes(batch: BatchConfig, holdout: int, world: World) -> None:
    """Check what depends on the number of processes. Errors: `ConfigError`."""
    processes = world.size
    if batch.global_size % (batch.micro_size * processes):
        raise ConfigError(
            f"batch.global_size: {batch.global_size} is not a multiple of batch.micro_size {batch.micro_size} × "
            f"{processes} processes: change one of them"
        )
    if holdout % processes:
        raise ConfigError(f"data.holdout: {holdout} is not a multiple of the {processes} processes: change one of them")
