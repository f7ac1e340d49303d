"""Take a step over 128 micro-batches in the engine, in bfloat16: `accumulation_driver.py ZERO_STAGE OFFLOAD`.

Prints the relative errors of the step and of the gradient norm that the engine reports, and at exit the number of
threads left by communication; run alone or by torchrun.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
from pathlib import Path

import torch
from torch import nn

from train.engine.deepspeed_engine import apply_gradients, make_engine, process_group

MICRO_STEPS = 128
INPUTS = 64


def errors(zero_stage: int, *, offload: bool) -> tuple[float, float]:
    """The errors of step and norm against float64.

    The loss is linear, so that a micro-batch's gradient is exactly its input. Its mean is far from 0: in bfloat16 the
    sum soon drops the low bits of each addend.
    """
    with process_group() as world:
        from deepspeed.utils import safe_get_full_fp32_param

        generator = torch.Generator().manual_seed(0)
        inputs = 1 + torch.randn(world.size, MICRO_STEPS, INPUTS, generator=generator)
        inputs = inputs.to(world.device, torch.bfloat16)
        exact_D = inputs.double().mean((0, 1))
        module = nn.Linear(INPUTS, 1, bias=False)
        nn.init.zeros_(module.weight)
        with make_engine(
            module,
            torch.optim.SGD(module.parameters(), lr=1.0),
            world=world,
            micro_size=1,
            micro_steps=MICRO_STEPS,
            zero_stage=zero_stage,
            offload=offload,
            dtype=torch.bfloat16,
            grad_clip=0.0,
        ) as engine:
            for place, input_D in enumerate(inputs[world.rank]):
                last = place == MICRO_STEPS - 1
                engine.set_gradient_accumulation_boundary(is_boundary=last)
                engine.backward(engine(input_D[None]).sum() / MICRO_STEPS, scale_wrt_gas=False)
                if not last:
                    engine.step()
            norm = apply_gradients(engine, rate=1.0)
            taken_D = -safe_get_full_fp32_param(module.weight).flatten().double()
        exact = float(exact_D.norm())
        return float((taken_D - exact_D).norm()) / exact, abs(norm - exact) / exact


def print_threads() -> None:
    """The interpreter ends next: a thread that still needs it would abort the process."""
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    sys.stdout.write(f"{sum('gloo' in name for name in names)}\n")  # in one write: two processes share stdout


if __name__ == "__main__":
    atexit.register(print_threads)
    found = errors(int(sys.argv[1]), offload=sys.argv[2] == "1")
    if os.environ.get("RANK", "0") == "0":
        sys.stdout.write(json.dumps(found) + "\n")
