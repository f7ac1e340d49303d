"""Fused LM head and divergence against dense distillation and against cross-entropy without a teacher.

    python -m tests.benchmarks.loss [--quick] --json FILE

Shape suffixes: N positions, D hidden size, V vocabulary, K top-k slots, M tail samples.

Cases, each a forward and a backward pass: `ours` (forward KL, tail by its samples), other readings and
divergences, `ce` (cross-entropy by the same chunked method), `dense` (distillation from full teacher logits as trainers
write it: both models return their logits, and the loss is `kl_div` of two softmaxes), `dense_lean` (the same, keeping
nothing that the gradient does not need), `torch` (PyTorch's linear_cross_entropy in chunks of our size) and, on a GPU,
`liger`. Both dense cases include the teacher's LM head.

`time_vs_…` compares each case's fastest round, with rounds taken in turn in one process: on a GPU in seconds, on a CPU
in processor seconds of all threads, which other work on a shared machine changes little; both are in the table.
`memory_vs_…` compares what a pass needs beyond its inputs: on a CPU the peak resident memory of a process of its own,
on a GPU `torch.cuda.max_memory_allocated`.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from llavamod_offline.losses.fused import cross_entropy_from_hidden, distillation_from_hidden
from llavamod_offline.losses.targets import SparseTargets
from tests.benchmarks.form import Row, finish, least_seconds, parse_arguments, reset_peak, resident_bytes, write
from tests.benchmarks.worlds.targets import random_targets

NAME = "loss"
HEAD = 32
DRAWS = 8
CASES = ("ours", "bucket", "samples", "js", "kd_lm", "ce", "dense", "dense_lean", "torch", "liger")
RIVALS = ("ce", "dense", "dense_lean", "torch", "liger")
AT_FIRST_SIZE = ("samples", "js", "kd_lm")


@dataclass(frozen=True)
class Size:
    """The size of a measurement."""

    n: int
    d: int
    v: int

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32


@dataclass(frozen=True)
class Inputs:
    """Hidden states and an LM head that require gradients, and records of 32 ids with a few tail samples."""

    hidden_ND: Tensor
    weight_VD: Tensor
    targets: SparseTargets


def make_inputs(size: Size) -> Inputs:
    """Random inputs."""
    n, d, v = size.n, size.d, size.v
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(n, d, generator=generator).to(size.device, size.dtype)
    weight_VD = (torch.randn(v, d, generator=generator) / d**0.5).to(size.device, size.dtype)
    targets = random_targets(generator, n=n, vocab_size=v, head=HEAD, draws=DRAWS).to(size.device)
    return Inputs(hidden_ND.requires_grad_(), weight_VD.requires_grad_(), targets)


def why_not(name: str, size: Size) -> str | None:
    """Why a rival cannot run here; None if it can."""
    if name == "torch" and not hasattr(torch.nn.functional, "linear_cross_entropy"):
        return "this PyTorch has no linear_cross_entropy"
    if name == "liger" and size.device.type != "cuda":
        return "Liger's kernels need a GPU"
    if name == "liger" and importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return None


def make_case(name: str, inputs: Inputs) -> Callable[[], None]:
    """One forward and backward pass of a case."""
    hidden_ND, weight_VD, targets = inputs.hidden_ND, inputs.weight_VD, inputs.targets
    teacher_hidden_ND, teacher_weight_VD = hidden_ND.detach().clone(), weight_VD.detach()
    ids_N = targets.target_ids_N

    def ours() -> Tensor:
        return distillation_from_hidden(hidden_ND, weight_VD, targets, tail="samples").loss_sum

    def dense() -> Tensor:
        teacher_logits_NV = (teacher_hidden_ND @ teacher_weight_VD.T).float()
        logits_NV = (hidden_ND @ weight_VD.T).float()
        return torch.nn.functional.kl_div(logits_NV.log_softmax(-1), teacher_logits_NV.softmax(-1), reduction="sum")

    def dense_lean() -> Tensor:
        teacher_NV = (teacher_hidden_ND @ teacher_weight_VD.T).float().softmax(-1)
        return -(teacher_NV * (hidden_ND @ weight_VD.T).float().log_softmax(-1)).sum()

    def torchs() -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=256)
        return torch.nn.functional.linear_cross_entropy(hidden_ND, weight_VD, ids_N, reduction="sum", options=options)

    def liger() -> Tensor:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        loss: Tensor = liger_fused_linear_cross_entropy(hidden_ND, weight_VD, ids_N, reduction="sum")
        return loss

    functions: dict[str, Callable[[], Tensor]] = {
        "ours": ours,
        "bucket": lambda: distillation_from_hidden(hidden_ND, weight_VD, targets).loss_sum,
        "samples": lambda: distillation_from_hidden(hidden_ND, weight_VD, targets, tail="samples").loss_sum,
        "js": lambda: distillation_from_hidden(hidden_ND, weight_VD, targets, divergence="js").loss_sum,
        "kd_lm": lambda: distillation_from_hidden(hidden_ND, weight_VD, targets, lm_weight=1.0).loss_sum,
        "ce": lambda: cross_entropy_from_hidden(hidden_ND, weight_VD, ids_N).loss_sum,
        "dense": dense,
        "dense_lean": dense_lean,
        "torch": torchs,
        "liger": liger,
    }
    function = functions[name]

    def run() -> None:
        hidden_ND.grad = weight_VD.grad = None
        function().backward()
        if hidden_ND.is_cuda:
            torch.cuda.synchronize()

    return run


def peaks_mib(names: list[str], size: Size, inputs: Inputs, *, apart: bool) -> dict[str, float]:
    """Peak memory of one pass of each case beyond its inputs, in MiB.

    On a CPU measured in a fresh process for each case if `apart`, else in one for all.
    """
    if size.device.type == "cuda":
        return {name: _peak_on_gpu(name, inputs) for name in names}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1 if apart else None) as pool:
        return {name: pool.apply(_peak_here, (name, size)) for name in names}


def _peak_on_gpu(name: str, inputs: Inputs) -> float:
    case = make_case(name, inputs)
    inputs.hidden_ND.grad = inputs.weight_VD.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    case()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _peak_here(name: str, size: Size) -> float:
    case = make_case(name, make_inputs(size))
    reset_peak()
    before = resident_bytes()
    case()
    return (resident_bytes(peak=True) - before) / 2**20


def sizes(quick: bool) -> tuple[list[Size], int]:
    """The sizes to measure, and the number of rounds."""
    if quick:
        return [Size(64, 128, 8_192)], 2
    if torch.cuda.is_available():
        return [Size(8_192, 1_536, 151_936), Size(8_192, 3_584, 151_936)], 10
    return [Size(512, 896, 151_646), Size(2_048, 896, 151_646)], 2


def main() -> None:
    """Measure and report."""
    arguments = parse_arguments(NAME, __doc__ or "")
    measured, repeats = sizes(arguments.quick)
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    settings = {"V": measured[0].v, "head": HEAD, "draws": DRAWS, "dtype": str(measured[0].dtype)}
    for size in measured:
        inputs = make_inputs(size)
        wanted = [name for name in CASES if size == measured[0] or name not in AT_FIRST_SIZE]
        cases = [name for name in wanted if why_not(name, size) is None]
        least = least_seconds({name: make_case(name, inputs) for name in cases}, repeats=repeats)
        on_gpu = size.device.type == "cuda"
        seconds = {name: wall if on_gpu else worked for name, (wall, worked) in least.items()}
        if not on_gpu:
            inputs.hidden_ND.grad = inputs.weight_VD.grad = None
        memory = peaks_mib(cases, size, inputs, apart=not arguments.quick)
        at = {"N": size.n, "D": size.d}
        rows += [
            {**at, "case": name, "seconds": least[name][0], "cpu_seconds": least[name][1], "MiB": memory[name]}
            for name in cases
        ]
        skipped = {name: why_not(name, size) for name in wanted if name not in cases}
        rows += [{**at, "case": name, "seconds": f"skipped: {why}"} for name, why in skipped.items()]
        place = f"{size.n}_{size.d}"
        for rival in (name for name in RIVALS if name in cases):
            ratios[f"time_vs_{rival}_{place}"] = seconds["ours"] / seconds[rival]
            ratios[f"memory_vs_{rival}_{place}"] = memory["ours"] / max(memory[rival], 1e-9)
        del inputs
        write(NAME, arguments, settings=settings, rows=rows, ratios=ratios)  # a later size may run out of time
    for name in ("time_vs_ce", "memory_vs_ce", "time_vs_dense", "memory_vs_dense"):
        ratios[name] = ratios[f"{name}_{place}"]
    finish(NAME, arguments, settings=settings, rows=rows, ratios=ratios)


if __name__ == "__main__":
    main()
