"""Small softmax regressions: a teacher that gives full distributions, and a student to train fully.

- `ngram`: the 4-gram model of Python's standard library with 2,000 ids; the student embeds three tokens and has two
  layers. Half of the contexts are from text that the teacher was trained on.
- `low_rank_D`: Zipf biases and 64 tanh features of random contexts, 2,000 ids; the student has two layers that end in D
  features, too few to match the teacher.
- `toy`: the toy teacher that ships with the package; the student learns an LM head on the hidden states of the toy
  student at the beginning of its training.
- with a folder, any causal language model (`model`): a projection and an LM head on its own hidden states.

Shape suffixes: N contexts, B contexts in a batch, C numbers in a context, V ids, F features of a teacher, D of a
student.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from tests.benchmarks.teachers.ngram import NGram, library_texts, tokenise, train_tokenizer
from tests.benchmarks.teachers.worlds import World, causal_world, toy_world


class SoftMax(nn.Module):
    """A student: a context's features with a constant 1 appended, and an LM head."""

    def __init__(self, features: nn.Module, size: int, vocab_size: int, *, scale: float) -> None:
        super().__init__()
        self.features = features
        self.head_VD = nn.Parameter(torch.randn(vocab_size, size + 1) * scale)

    def forward(self, contexts_BC: Tensor) -> Tensor:
        """The features, [B, D]."""
        found_BD = self.features(contexts_BC)
        return torch.cat([found_BD, torch.ones_like(found_BD[:, :1])], 1)


@dataclass(frozen=True)
class Task:
    """A teacher and its student. `contexts(n, generator)` gives [n, C]; `log_probs` maps these to [n, V]."""

    name: str
    vocab_size: int
    rate: float
    batch: int
    contexts: Callable[[int, torch.Generator], Tensor]
    log_probs: Callable[[Tensor], Tensor]
    student: Callable[[], SoftMax]


class _Tokens(nn.Module):
    """Features from three embedded tokens and two layers."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList(nn.Embedding(vocab_size, 32) for _ in range(3))
        self.layers = nn.Sequential(nn.Linear(96, 128), nn.GELU(), nn.Linear(128, 64))

    def forward(self, contexts_BC: Tensor) -> Tensor:
        pieces = [embed(contexts_BC[:, place]) for place, embed in enumerate(self.embeddings)]
        found: Tensor = self.layers(torch.cat(pieces, 1))
        return found


def ngram_task(vocab_size: int = 2_000, files: int | None = None) -> Task:
    """The 4-gram teacher."""
    texts = library_texts()[:files]
    tokenizer = train_tokenizer(texts, vocab_size)
    learned, held = tokenise(tokenizer, texts)
    model, size = NGram(learned, tokenizer.get_vocab_size()), tokenizer.get_vocab_size()

    def contexts(n: int, generator: torch.Generator) -> Tensor:
        known_N = torch.rand(n, generator=generator) < 0.5
        places_N = torch.randint(2**40, (n,), generator=generator).numpy()
        found = np.empty((n, 3), np.int64)
        for ids, rows_N in ((learned, known_N.numpy()), (held, ~known_N.numpy())):
            starts = places_N[rows_N] % (len(ids) - 4)
            found[rows_N] = ids[starts[:, None] + np.arange(3)]
        return torch.from_numpy(found)

    def log_probs(contexts_NC: Tensor) -> Tensor:
        return torch.from_numpy(np.log(model.probs(contexts_NC.numpy()))).float()

    return Task("ngram", size, 3e-3, 128, contexts, log_probs, lambda: SoftMax(_Tokens(size), 64, size, scale=0.02))


def low_rank_task(rank: int, vocab_size: int = 2_000) -> Task:
    """A teacher with 64 features, and a student with fewer."""
    fixed = torch.Generator().manual_seed(1_000)
    mix_CF = torch.randn(32, 64, generator=fixed) / 32**0.5 * 1.5
    weight_VF = torch.randn(vocab_size, 64, generator=fixed) * 0.4
    zipf_V = -torch.arange(1, vocab_size + 1).float().log()[torch.randperm(vocab_size, generator=fixed)]

    def log_probs(contexts_NC: Tensor) -> Tensor:
        return (torch.tanh(contexts_NC @ mix_CF) @ weight_VF.T + zipf_V).log_softmax(-1)

    def student() -> SoftMax:
        layers = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, rank))
        return SoftMax(layers, rank, vocab_size, scale=0.02)

    return Task(
        f"low_rank_{rank}",
        vocab_size,
        1e-2,
        128,
        lambda n, generator: torch.randn(n, 32, generator=generator),
        log_probs,
        student,
    )


def toy_task(sequences: int) -> Task:
    """The toy teacher, over its student's hidden states."""
    world = toy_world(sequences)
    return _hidden_task(world, rank=None)


def model_task(folder: str, student: str, sequences: int) -> Task:
    """A causal language model in a folder; `student` as `worlds.causal_world` takes it."""
    return _hidden_task(causal_world(folder, sequences, student), rank=64)


def _hidden_task(world: World, *, rank: int | None) -> Task:
    """Contexts are positions in a world's text; students take the hidden states there."""
    rows = [world.rows(number) for number in range(world.sequences)]
    log_probs_NV = torch.cat([row.log_probs_NV for row in rows])
    found = [row.student_hidden_ND if row.student_hidden_ND is not None else row.hidden_ND for row in rows]
    hidden_ND = torch.cat([hidden for hidden in found if hidden is not None])
    hidden_ND = (hidden_ND - hidden_ND.mean(0)) / hidden_ND.std(0).clamp(min=1e-6)
    size = hidden_ND.shape[1]

    class Places(nn.Module):
        """The hidden states at positions of the text."""

        def forward(self, places_BC: Tensor) -> Tensor:
            return hidden_ND[places_BC[:, 0]]

    def student() -> SoftMax:
        features: nn.Module = Places() if rank is None else nn.Sequential(Places(), nn.Linear(size, rank))
        return SoftMax(features, rank or size, world.vocab_size, scale=0.0 if rank is None else 0.02)

    return Task(
        world.name,
        world.vocab_size,
        3e-3,
        128,
        lambda n, generator: torch.randint(len(hidden_ND), (n, 1), generator=generator),
        lambda places_NC: log_probs_NV[places_NC[:, 0]],
        student,
    )
