"""A teacher made of real text: a 4-gram model over a byte-level BPE of Python's own standard library.

Every Python installation has the text; the tokenizer is trained on it, to 110,000 ids. The model interpolates with
absolute discounting (Ney, Essen and Kneser, 1994), is trained on nine files out of ten, and is evaluated on the rest.

Shape suffixes: N positions, V ids, C tokens of context.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

Ids = NDArray[np.int64]

_HELD_OUT = 10
_DISCOUNTS = (0.6, 0.7, 0.8)
_KEY_BITS = 20


def library_texts() -> list[str]:
    """The sources of the standard library, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    outside = {"site-packages", "dist-packages", "__pycache__"}
    texts = []
    for file in sorted(path for path in root.rglob("*.py") if not outside & set(path.parts)):
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError:  # the library's own tests include files in other encodings
            continue
    return texts


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE on the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=1, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenise(tokenizer: Tokenizer, texts: list[str]) -> tuple[Ids, Ids]:
    """The training tokens, and those of the held-out files."""
    ids = [np.array(encoded.ids, np.int64) for encoded in tokenizer.encode_batch(texts)]
    held = [piece for number, piece in enumerate(ids) if number % _HELD_OUT == 3]
    learned = [piece for number, piece in enumerate(ids) if number % _HELD_OUT != 3]
    return np.concatenate(learned), np.concatenate(held)


class NGram:
    """The interpolated model: `probs` gives whole distributions."""

    def __init__(self, ids: Ids, vocab_size: int) -> None:
        counts_V = np.bincount(ids, minlength=vocab_size).astype(np.float64)
        discounted_V = np.maximum(counts_V - 0.5, 0.0)
        self.unigram_V = (discounted_V + 0.5 * np.count_nonzero(counts_V) / vocab_size) / len(ids)
        self._tables = []
        for length in range(1, len(_DISCOUNTS) + 1):
            keys = _keys(np.lib.stride_tricks.sliding_window_view(ids, length)[: len(ids) - length])
            order = np.argsort(keys, kind="stable")
            self._tables.append((keys[order], ids[length:][order]))

    def probs(self, contexts_NC: Ids) -> NDArray[np.float64]:
        """The distribution after each context, [N, V]."""
        probs_NV = np.repeat(self.unigram_V[None], len(contexts_NC), 0)
        for length, discount, (keys, following) in zip((1, 2, 3), _DISCOUNTS, self._tables, strict=True):
            wanted_N = _keys(contexts_NC[:, contexts_NC.shape[1] - length :])
            first_N, last_N = (np.searchsorted(keys, wanted_N, side) for side in ("left", "right"))
            for row in np.flatnonzero(last_N > first_N):
                total = last_N[row] - first_N[row]
                ids, counts = np.unique(following[first_N[row] : last_N[row]], return_counts=True)
                probs_NV[row] *= discount * len(ids) / total
                probs_NV[row, ids] += (counts - discount) / total
        return probs_NV


def _keys(contexts_NC: Ids) -> NDArray[np.uint64]:
    """One integer for each context."""
    keys_N = np.zeros(len(contexts_NC), np.uint64)
    for column in contexts_NC.T:
        keys_N = (keys_N << np.uint64(_KEY_BITS)) | column.astype(np.uint64)
    return keys_N
