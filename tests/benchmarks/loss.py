"""Head and divergence in one against dense distillation and against cross-entropy by the same chunked method.

    python -m tests.benchmarks.loss [--quick] --json FILE

Letters: N positions, D hidden size, V vocabulary, K slots of the head.

`time_vs_…` compares medians measured in turn in one process; `memory_vs_…` compares how far each case raises the peak
resident memory of a process of its own beyond its inputs.
"""

from __future__ import annotations

import multiprocessing
import resource
from collections.abc import Callable

import torch
from torch import Tensor

from llavamod_offline.losses.fused import cross_entropy_from_hidden, distillation_from_hidden
from llavamod_offline.losses.targets import SparseTargets
from tests.benchmarks.form import Row, finish, median_seconds, parse_arguments

NAME = "loss"
HEAD = 32
DRAWS = 8
CASES = ("ours", "ce", "dense")

Inputs = tuple[Tensor, Tensor, SparseTargets]


def make_inputs(n: int, d: int, v: int) -> Inputs:
    """Hidden states and a head that want gradients, and records of a head of 32 ids with a few tail draws."""
    generator = torch.Generator().manual_seed(0)
    hidden_ND = torch.randn(n, d, generator=generator).requires_grad_()
    weight_VD = (torch.randn(v, d, generator=generator) / d**0.5).requires_grad_()
    ids_NK = torch.randint(v - DRAWS - HEAD, (n, 1), generator=generator) + torch.arange(HEAD + DRAWS)
    log_probs_NK = torch.randn(n, HEAD, generator=generator).log_softmax(-1).sort(descending=True).values - 0.05
    targets = SparseTargets(
        head_ids_NK=ids_NK[:, :HEAD],
        head_log_probs_NK=log_probs_NK,
        tail_log_mass_N=torch.log1p(-log_probs_NK.exp().sum(-1)),
        draw_ids_NM=ids_NK[:, HEAD:],
        draw_weights_NM=torch.full((n, DRAWS), 1 / DRAWS),
        target_ids_N=ids_NK[:, 0],
        target_log_probs_N=log_probs_NK[:, 0],
        entropy_N=torch.full((n,), 2.0),
        log_normalisers_NS=torch.zeros(n, 0),
        temperatures=(),
        vocab_size=v,
    )
    return hidden_ND, weight_VD, targets


def make_case(name: str, inputs: Inputs) -> Callable[[], None]:
    """One forward and backward pass of a case."""
    hidden_ND, weight_VD, targets = inputs
    teacher_hidden_ND, teacher_weight_VD = hidden_ND.detach().clone(), weight_VD.detach()

    def ours() -> Tensor:
        return distillation_from_hidden(hidden_ND, weight_VD, targets).loss_sum

    def ce() -> Tensor:
        return cross_entropy_from_hidden(hidden_ND, weight_VD, targets.target_ids_N).loss_sum

    def dense() -> Tensor:
        """Full teacher logits, as a teacher in memory gives them; their matrix product is part of the cost."""
        teacher_NV = (teacher_hidden_ND @ teacher_weight_VD.T).softmax(-1)
        return -(teacher_NV * (hidden_ND @ weight_VD.T).log_softmax(-1)).sum()

    function = {"ours": ours, "ce": ce, "dense": dense}[name]

    def run() -> None:
        hidden_ND.grad = weight_VD.grad = None
        function().backward()

    return run


def peak_mib(name: str, n: int, d: int, v: int) -> float:
    """MiB by which one pass raises the peak of a fresh process above its inputs."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_here, (name, n, d, v))


def _peak_here(name: str, n: int, d: int, v: int) -> float:
    case = make_case(name, make_inputs(n, d, v))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    case()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    """Measure and report."""
    arguments = parse_arguments(NAME, __doc__ or "")
    v, d = (8_192, 128) if arguments.quick else (151_646, 896)
    sizes, repeats = ((64,), 2) if arguments.quick else ((512, 2_048), 5)
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    for n in sizes:
        inputs = make_inputs(n, d, v)
        seconds = median_seconds({case: make_case(case, inputs) for case in CASES}, repeats=repeats)
        del inputs
        memory = {case: peak_mib(case, n, d, v) for case in CASES}
        rows += [{"N": n, "case": case, "seconds": seconds[case], "MiB": memory[case]} for case in CASES]
        for rival in ("ce", "dense"):
            ratios[f"time_vs_{rival}_{n}"] = seconds["ours"] / seconds[rival]
            ratios[f"memory_vs_{rival}_{n}"] = memory["ours"] / max(memory[rival], 1e-9)
    for name in ("time_vs_ce", "memory_vs_ce", "time_vs_dense", "memory_vs_dense"):
        ratios[name] = ratios[f"{name}_{sizes[-1]}"]
    finish(NAME, arguments, settings={"D": d, "V": v, "head": HEAD, "draws": DRAWS}, rows=rows, ratios=ratios)


if __name__ == "__main__":
    main()
