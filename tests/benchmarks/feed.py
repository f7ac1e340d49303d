"""The loader feeding a training step: the share of time the step spends waiting for its micro-batches.

    python -m tests.benchmarks.feed [--quick] --json FILE

The steps are those of case `offline` in `step.py`, on micro-batches of 16 samples that `train.data.batches.Loader`
makes from 336×336 JPEGs and records, in shuffled order, as `train-student` reads them. On a GPU the student is the one
of `step.py` and 12 worker processes load; on a CPU it is a tiny one, and one process loads. `waiting_share`: seconds
until a micro-batch is ready and on the device, over all seconds. `fed_vs_resident`: the time of these steps over that
of as many on one micro-batch that stays on the device. The first steps, during which the workers start, are left out.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llavamod_offline.data.order.schedule import BatchSchedule
from llavamod_offline.families.llava.forward import LlavaForward
from llavamod_offline.losses.fused import distillation_from_hidden
from tests.benchmarks.data import BATCH, open_loader
from tests.benchmarks.form import Row, finish, parse_arguments
from tests.benchmarks.step import GPU, QUICK, Size, make_model
from tests.benchmarks.store import VOCABULARY
from tests.benchmarks.worlds.data import make_encoder, write_world
from train.data.batches import TrainBatch
from train.stages import mimic
from train.stages.student_pass import StudentPass

NAME = "feed"
FIRST = 1
TINY = replace(QUICK, tower=(32, 2, 2, 336, 14), vocab=VOCABULARY)


class Trainer:
    """A student and its optimiser."""

    def __init__(self, size: Size) -> None:
        self.device = size.device
        self._student = make_model(size, size.student, make_encoder().image_token_id)
        self._optimizer = torch.optim.AdamW([p for p in self._student.parameters() if p.requires_grad], lr=1e-6)
        distillation: Any = partial(distillation_from_hidden, tail="samples", kd_weight=1.0)
        self._loss: Any = mimic.make_loss(
            distillation=distillation, lm_weight=0.0, router_aux_coef=0.0, forward=StudentPass(LlavaForward())
        )

    def step(self, batch: TrainBatch) -> None:
        """Forward, backward and update."""
        self._optimizer.zero_grad(set_to_none=True)
        (self._loss(self._student, batch, None).loss / batch.positions).backward()
        self._optimizer.step()
        self.wait()

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    """Measure and report."""
    arguments = parse_arguments(NAME, __doc__ or "")
    on_gpu = torch.cuda.is_available()
    size, workers = (GPU if on_gpu else TINY), (12 if on_gpu else 1)
    batch, steps = (BATCH, 60) if on_gpu else (1, 2 if arguments.quick else 20)
    waits: list[float] = []
    steps_alone: list[float] = []
    whole: list[float] = []
    with tempfile.TemporaryDirectory(prefix="benchmark-feed-") as scratch:
        folder = Path(scratch)
        write_world(folder, (FIRST + steps) * batch, shard_samples=max(batch * 16, 32))
        trainer = Trainer(size)
        loader, order = open_loader(folder, workers=workers, batch_size=batch)
        batches = loader.batches(BatchSchedule(order, stop=FIRST + steps))
        resident: TrainBatch | None = None
        for number in range(FIRST + steps):
            started = time.perf_counter()
            resident = next(batches).to(trainer.device)
            trainer.wait()
            there = time.perf_counter()
            trainer.step(resident)
            if number >= FIRST:
                waits.append(there - started)
                whole.append(time.perf_counter() - started)
        assert resident is not None
        for _ in range(max(2, steps // 3)):
            started = time.perf_counter()
            trainer.step(resident)
            steps_alone.append(time.perf_counter() - started)
    seconds, alone = sum(whole) / steps, sum(steps_alone) / len(steps_alone)
    rows: list[Row] = [
        {"case": "fed", "seconds": seconds, "samples_per_s": batch / seconds},
        {"case": "waiting", "seconds": sum(waits) / steps},
        {"case": "resident", "seconds": alone, "samples_per_s": batch / alone},
    ]
    ratios = {"waiting_share": sum(waits) / sum(whole), "fed_vs_resident": seconds / alone}
    settings = {"student": repr(size.student), "tower": repr(size.tower), "workers": workers, "batch": batch}
    finish(NAME, arguments, settings=settings | {"steps": steps}, rows=rows, ratios=ratios)


if __name__ == "__main__":
    main()
