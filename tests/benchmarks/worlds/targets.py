"""Random records for benchmarks of losses and steps: the cost does not depend on which ids and numbers they hold.

Shape suffixes: N positions, K top-k slots, M tail sample slots.
"""

from __future__ import annotations

import torch

from llavamod_offline.losses.targets import SparseTargets


def random_targets(
    generator: torch.Generator,
    *,
    n: int,
    vocab_size: int,
    head: int,
    draws: int,
) -> SparseTargets:
    """`n` records with a top-k of `head` ids and `draws` tail samples; the likeliest id is the actual token."""
    ids_NK = torch.randint(vocab_size - draws - head, (n, 1), generator=generator) + torch.arange(head + draws)
    log_probs_NK = torch.randn(n, head, generator=generator).log_softmax(-1).sort(descending=True).values - 0.05
    return SparseTargets(
        topk_ids_NK=ids_NK[:, :head],
        topk_log_probs_NK=log_probs_NK,
        tail_log_mass_N=torch.log1p(-log_probs_NK.exp().sum(-1)),
        tail_ids_NM=ids_NK[:, head:],
        tail_weights_NM=torch.full((n, draws), 1 / draws),
        target_ids_N=ids_NK[:, 0],
        target_log_probs_N=log_probs_NK[:, 0],
        entropy_N=torch.full((n,), 2.0),
        log_normalisers_NS=torch.zeros(n, 0),
        temperatures=(),
        vocab_size=vocab_size,
    )
