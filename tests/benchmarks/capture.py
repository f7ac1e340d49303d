"""A capture against the bare forward pass of its teacher: what making records, reading and writing add to it.

    python -m tests.benchmarks.capture [--quick] --json FILE

`forward`: the teacher over prepared batches, the same as the engine's: hidden states of every token, and the LM head at
the supervised positions. `hf_capture`: from packed samples to records (tokens, images and tail samples included).
`run`: from packed samples to a finished cache on disk, as `cache-teacher run` makes one, except for `prepare` (which
hashes the weights) and `load`, which a run does once, whatever the size of its set.

The cases take turns, and the fastest round of each counts, since noise only ever makes a round slower. On a CPU one
thread runs the teacher, so that the rest of a capture has a core to itself, as it has beside a GPU; `…_cpu` are the
ratios of processor seconds summed over all threads, in which concurrent work is not free. `waiting_share` is the share
of a case's seconds in which the thread that runs the teacher waits for others to read, prepare or write.

Sizes: on a CPU the toy world's teacher (V = 600), a random one with 8 layers of 512 and V = 32,000, and a random
Qwen3-VL (`generic`: 6 layers of 256), which uses its own processor and runs as one model; on a GPU a random Qwen2-7B
(28 layers of 3,584, V = 152,064) with CLIP-L/336. Where vLLM is installed: the toy world's teacher, with records made
in vLLM's workers against `prompt_logprobs`.

What bounds making records on a CPU: of 5 to 8 ns per logit (`standard`, V = 32,000 and 151,646), exponentials and the
divisions before them take 40 %: one for T = 1.5, one for T = 4, one for T = 1 and 2 together, which also gives the
tail's weights. Finding the top-k takes 20 %, and the rest is single passes. PyTorch's topk over a whole row and sums in
float64 cost 10 % to 20 % more; so did a top-k over all slots where `min_prob` keeps only a few (half of the time at V =
600). Chunks of a few rows, which fit in the CPU's cache, are no faster: the overhead of each call outweighs the saving.
A toy teacher's run also waits for the images of each shard's first batch, which are not prepared ahead.

What bounds `vllm_pooler_vs_prompt_logprobs` on a CPU: the forward pass, which both need. In `results/capture.json`, a
position takes 0.33 ms with the pooler and 0.67 ms with `prompt_logprobs`; bare forward passes in HF take 0.29 ms, and
everything else in its capture 0.04 ms. If records cost nothing, the ratio would be at most 2.3.

Shape suffixes: B sequences in a batch, T tokens, D hidden size, N supervised positions in the batch, R of them in a
chunk.
"""

from __future__ import annotations

import importlib.util
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from llavamod_offline.config import load_config
from llavamod_offline.families.run import whole_hidden_states
from teacher_cache.capture.pipeline import capture_shards
from teacher_cache.capture.shard import capture_prepared, capture_rows, prepare_rows
from teacher_cache.capture_setup import CaptureSetup, prepare_capture
from teacher_cache.config import CacheTeacherConfig
from teacher_cache.engines.hf import HfCaptureEngine, length_batches
from teacher_cache.engines.make_records import rows_per_chunk
from teacher_cache.write.store import CacheStore
from tests.benchmarks.form import Row, finish, parse_arguments, waiting, write
from tests.benchmarks.worlds.capture import GENERIC, LARGE, MIDDLE, TOY, Size, random_loader, write_world

NAME = "capture"
CASES = ("forward", "hf_capture", "run")
# Only what prompt_logprobs can give, so that both record the same.
_LISTED = ("capture.temperatures=[]", "capture.tail_samples_max=0")


@dataclass(frozen=True)
class Batch:
    """The teacher's inputs for a batch, on the CPU, and its supervised positions."""

    inputs: dict[str, Tensor]
    which_N: Tensor
    where_N: Tensor


def prepared_batches(job: CaptureSetup, batch_size: int) -> list[Batch]:
    """Every batch of the set as the engine makes them, shard by shard."""
    batches = []
    for name in job.samples.shard_names:
        requests = prepare_rows(job, job.samples.rows_of(name)).requests
        for pairs in length_batches(requests, batch_size):
            sequences = [sequence for _, sequence in pairs]
            rows = [sequence.rows_and_targets("response")[0] for sequence in sequences]
            images = [job.teacher.images(request.sample) for request, _ in pairs]
            batches.append(
                Batch(
                    job.teacher.model_inputs(sequences, images),
                    torch.from_numpy(np.repeat(np.arange(len(rows)), [len(rows_N) for rows_N in rows])),
                    torch.from_numpy(np.concatenate(rows)),
                )
            )
    return batches


@torch.inference_mode()
def forward(engine: HfCaptureEngine, batches: list[Batch]) -> None:
    """Run the teacher over the batches, and its LM head at their supervised positions."""
    model, device = engine.model, engine.model.device
    for batch in batches:
        hidden_BTD = whole_hidden_states(model, batch.inputs)
        rows_ND = hidden_BTD[batch.which_N.to(device), batch.where_N.to(device)]
        for rows_RD in rows_ND.split(rows_per_chunk(engine.vocab_size, device.type)):
            engine.lm_head.logits(rows_RD)
    if device.type == "cuda":
        torch.cuda.synchronize()


def capture_all(job: CaptureSetup, engine: HfCaptureEngine) -> int:
    """Capture every shard and keep nothing; return the number of positions."""
    positions = 0
    for name in job.samples.shard_names:
        captured, rejected = capture_rows(job, engine, job.samples.rows_of(name))
        assert not rejected
        positions += sum(len(item.records) for item in captured)
    return positions


def make_cache(job: CaptureSetup, engine: HfCaptureEngine, output: Path) -> None:
    """Do what a run does once its teacher is loaded."""
    store = CacheStore.open(output, job.fingerprint, job.samples.shard_names)
    store.start()
    for _ in capture_shards(job, engine, store, store.missing(), lambda samples, positions: None):
        pass
    store.finalise()


def measure(size: Size, folder: Path, *, device: str, repeats: int) -> tuple[list[Row], dict[str, float]]:
    """Time all cases of one size; return rows and ratios."""
    teacher, data = write_world(folder, size)
    settings = [f"data={data}", f"teacher={teacher}", f"output={folder / 'cache'}", f"device={device}"]
    config = load_config(CacheTeacherConfig, (), [*settings, f"batch_size={size.batch_size}"])
    started = time.perf_counter()
    job = prepare_capture(**config.setup_values)
    fixed = {"prepare": time.perf_counter() - started}
    with ExitStack() as stack:
        if size.vision is not None:
            stack.enter_context(mock.patch.object(job.teacher, "load", random_loader(teacher, device)))
        started = time.perf_counter()
        engine = job.load()
        fixed["load"] = time.perf_counter() - started
    assert isinstance(engine, HfCaptureEngine)
    batches = prepared_batches(job, size.batch_size)
    outputs = iter(folder / f"cache-{number}" for number in range(repeats + 1))
    positions = capture_all(job, engine)  # warms up
    functions: dict[str, Callable[[], Any]] = {
        "forward": lambda: forward(engine, batches),
        "hf_capture": lambda: capture_all(job, engine),
        "run": lambda: make_cache(job, engine, next(outputs)),
    }
    wall: dict[str, list[float]] = {case: [] for case in CASES}
    processor: dict[str, list[float]] = {case: [] for case in CASES}
    waited: dict[str, list[float]] = {case: [] for case in CASES}
    for number in range(repeats):
        for case in CASES[number % 3 :] + CASES[: number % 3]:
            started, used = time.perf_counter(), time.process_time()
            with waiting() as waits:
                functions[case]()
            wall[case].append(time.perf_counter() - started)
            waited[case].append(sum(waits) / wall[case][-1])
            processor[case].append(time.process_time() - used)
    rows: list[Row] = [
        {
            "size": size.name,
            "case": case,
            "seconds": min(wall[case]),
            "slowest": max(wall[case]),
            "cpu_seconds": min(processor[case]),
            "positions_per_s": positions / min(wall[case]),
            "waiting_share": statistics.median(waited[case]),
        }
        for case in CASES
    ]
    rows += [{"size": size.name, "case": f"{case} (once)", "seconds": seconds} for case, seconds in fixed.items()]
    ratios = {f"run_waiting_share_{size.name}": statistics.median(waited["run"])}
    for case in CASES[1:]:
        ratios[f"{case}_vs_forward_{size.name}"] = min(wall[case]) / min(wall["forward"])
        ratios[f"{case}_vs_forward_{size.name}_cpu"] = min(processor[case]) / min(processor["forward"])
    if device != "cpu":  # its processor seconds are spent waiting
        ratios = {name: value for name, value in ratios.items() if not name.endswith("_cpu")}
    return rows, ratios


def measure_vllm(folder: Path, size: Size, device: str) -> tuple[list[Row], dict[str, float]]:
    """Records made in vLLM's workers against plain prompt_logprobs, in positions per second."""
    teacher, data = write_world(folder, size)
    rates: dict[str, float] = {}
    for kind in ("vllm", "vllm_logprobs"):
        settings = [f"data={data}", f"teacher={teacher}", f"output={folder / 'none'}", f"device={device}"]
        config = load_config(CacheTeacherConfig, (), [*settings, f"engine.kind={kind}", *_LISTED])
        job = prepare_capture(**config.setup_values)
        engine: Any = job.load()
        ready = [prepare_rows(job, job.samples.rows_of(name)) for name in job.samples.shard_names]
        capture_prepared(job, engine, ready[0], lambda samples, positions: None)
        started = time.perf_counter()
        positions = 0
        for prepared in ready[1:]:
            captured, _ = capture_prepared(job, engine, prepared, lambda samples, positions: None)
            positions += sum(len(item.records) for item in captured)
        rates[kind] = positions / (time.perf_counter() - started)
        engine.session.close()
    rows: list[Row] = [{"size": size.name, "case": kind, "positions_per_s": rate} for kind, rate in rates.items()]
    return rows, {"vllm_pooler_vs_prompt_logprobs": rates["vllm"] / rates["vllm_logprobs"]}


def main() -> None:
    """Measure and report."""
    arguments = parse_arguments(NAME, __doc__ or "")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = [TOY, MIDDLE, GENERIC] if device == "cpu" else [LARGE]
    if arguments.quick:
        sizes = [_shortened(size) for size in sizes]
    if device == "cpu":
        torch.set_num_threads(1)
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    settings = {
        "rounds": {size.name: size.rounds for size in sizes},
        "samples": {size.name: size.samples for size in sizes},
    }
    folder = Path(tempfile.mkdtemp(prefix="benchmark-capture-"))
    try:
        for size in sizes:
            found, more = measure(size, folder / size.name, device=device, repeats=size.rounds)
            rows, ratios = rows + found, ratios | more
            write(NAME, arguments, settings=settings, rows=rows, ratios=ratios)
        if importlib.util.find_spec("vllm") is not None:
            found, more = measure_vllm(folder / "vllm", _shortened(TOY) if arguments.quick else TOY, device)
            rows, ratios = rows + found, ratios | more
    finally:
        shutil.rmtree(folder)
    finish(NAME, arguments, settings=settings, rows=rows, ratios=ratios)


def _shortened(size: Size) -> Size:
    batch = size.batch_size // 2
    return replace(size, samples=2 * batch, shard_samples=batch, batch_size=batch, rounds=1)


if __name__ == "__main__":
    main()
