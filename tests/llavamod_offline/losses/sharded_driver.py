"""One of several processes on shared batches: `torchrun … FILE WRAPPER TAIL HEAD STUDENT DATA CACHE OUTPUT`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.examples.batches import Batches
from llavamod_offline.families.llava.checkpoint import load_llava
from llavamod_offline.losses import CachedDistillation
from llavamod_offline.losses.kinds import TailEstimator
from teacher_cache import open_cache
from train.engine.deepspeed_engine import World, make_engine, process_group

Wrapped = tuple[Any, Callable[[Any], None]]  # the model, and the update step given its loss
Wrapper = Callable[[Any, float], AbstractContextManager[Wrapped]]
STEPS = 3
RATE = 0.05


def keys_with_one_image(data: Path) -> list[str]:
    """Samples with one image each, so that every process runs its tower."""
    index = SampleSet.open(data).index
    counts = zip(index["key"].to_pylist(), index["n_images"].to_pylist(), strict=True)
    return [key for key, count in counts if count == 1][:8]


def train(student: Path, data: Path, cache_path: Path, wrap: Wrapper, tail: TailEstimator, head: str) -> dict[str, Any]:
    """Train some steps of plain gradient descent over the same keys, every `size`-th in each process; return losses.

    `head`: `biased` gives the student an LM head with a bias.
    """
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    cache, batches, model = open_cache(cache_path), Batches(student, data), load_llava(student)
    model.model.vision_tower.requires_grad_(False)
    if head == "biased":
        model.lm_head.bias = torch.nn.Parameter(torch.linspace(-3, 3, model.lm_head.weight.shape[0]))
    distillation = CachedDistillation(cache, tail=tail)
    distillation.attach(model)
    keys = keys_with_one_image(data)
    items = sum(cache.sequence(key, "response").n_positions for key in keys)
    mine = keys[rank::size]
    losses = []
    with wrap(model, RATE) as (wrapped, update):
        for _ in range(STEPS):
            inputs = batches.make(mine, ["response"], cache)
            targets = cache.targets([(key, "response") for key in mine])
            output = wrapped(**inputs, targets=targets, num_items_in_batch=items)
            update(output.loss * size)  # wrappers average gradients over processes
            total = output.loss.detach().clone()
            if size > 1:
                dist.all_reduce(total)
            losses.append(float(total))
    return {"losses": losses}


def ddp(model: Any, rate: float) -> AbstractContextManager[Wrapped]:
    return plain(torch.nn.parallel.DistributedDataParallel(model), rate)


def fsdp(model: Any, rate: float) -> AbstractContextManager[Wrapped]:
    from torch.distributed.fsdp import fully_shard

    for layer in model.model.language_model.layers:
        fully_shard(layer)
    return plain(fully_shard(model), rate)


@contextmanager
def zero3(model: Any, rate: float) -> Iterator[Wrapped]:
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=rate)
    with make_engine(
        model,
        optimizer,
        world=World(dist.get_rank(), dist.get_world_size(), dist.get_world_size(), torch.device("cpu")),
        micro_size=4,
        micro_steps=1,
        zero_stage=3,
        offload=False,
        dtype=torch.float32,
        grad_clip=0.0,
    ) as engine:

        def update(loss: Any) -> None:
            engine.backward(loss)
            engine.step()

        yield engine, update


def plain(model: Any, rate: float) -> AbstractContextManager[Wrapped]:
    """The model without a wrapper."""
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=rate)

    def update(loss: Any) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return nullcontext((model, update))


if __name__ == "__main__":
    torch.set_num_threads(1)
    wrapper = {"ddp": ddp, "fsdp": fsdp, "zero3": zero3}[sys.argv[1]]
    student, data, cache, output = map(Path, sys.argv[4:])
    with process_group() as world:
        found = train(student, data, cache, wrapper, cast("TailEstimator", sys.argv[2]), sys.argv[3])
        output.with_suffix(f".{world.rank}").write_text(json.dumps(found))
