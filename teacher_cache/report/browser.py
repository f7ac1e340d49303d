"""Data of the sample browser: images, conversations, and every supervised token with the teacher's alternatives.

Without its script the page still shows all samples; the script adds alternatives and filters.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from llavamod_offline.data.encode.tokenize import NO_TARGET
from llavamod_offline.data.sample import IMAGE_PLACEHOLDER, Sample, Turn
from llavamod_offline.errors import DataError
from llavamod_offline.pages.page import thumbnail
from teacher_cache.format.record import Records
from teacher_cache.inspection.token_labels import TokenNames
from teacher_cache.read.reader import TeacherCache
from teacher_cache.report.sets import NO_SOURCE
from teacher_cache.visual.advantages import decode_advantages

ALTERNATIVES = 12
TAIL_IDS = 6
TOKENS = 1200  # most tokens shown per sequence
IMAGE_SIDE = 448
DARKEST = 4.0  # nats of entropy, or of visual advantage, at which the shade is full


@dataclass(frozen=True)
class Shown:
    """A sample to show: its key, the roles that have records, the sample if a set has it, and why it was chosen."""

    key: str
    roles: tuple[str, ...]
    sample: Sample | None
    reasons: Mapping[str, str]


class Browser:
    """Collects cards for the template, and each token's alternatives for the page's script."""

    def __init__(self, cache: TeacherCache, names: TokenNames) -> None:
        self.cache = cache
        self.names = names
        self.cards: list[dict[str, Any]] = []
        self.shrunk = 0
        self._labels: dict[int, str] = {}
        self._sequences: list[list[list[Any]]] = []

    @property
    def data(self) -> dict[str, Any]:
        """What the script reads: a label per id, and rows per sequence (see `_rows`)."""
        return {"names": self._labels, "sequences": self._sequences}

    def add(self, shown: Shown) -> None:
        """Add the card of a sample."""
        runs = {role: self._runs(shown.key, role) for role in shown.roles}
        sample, first = shown.sample, shown.roles[0]
        turns: Sequence[Turn] = ()
        if sample is not None:
            turns = sample.conversation(first) if first in sample.roles else sample.turns
        answers = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
        # With another template the runs may not match the turns: text and tokens are then shown separately.
        fits = bool(answers) and all(len(runs[role]) == len(answers) for role in shown.roles)
        self.cards.append(
            {
                "key": shown.key,
                "source": "" if sample is None else sample.source or NO_SOURCE,
                "reasons": shown.reasons,
                "images": [] if sample is None else self._images(sample),
                "turns": [
                    {
                        "role": turn.role,
                        "texts": turn.text.split(IMAGE_PLACEHOLDER),
                        "run": runs[first][answers.index(number)] if fits and number in answers else None,
                    }
                    for number, turn in enumerate(turns[:-1] if fits else turns)
                ],
                "separate": bool(turns) and not fits,
                "sides": [
                    {
                        "role": role,
                        "about": self.cache.sequence(shown.key, role),
                        "runs": runs[role][-1:] if fits else runs[role],
                    }
                    for role in shown.roles
                ],
            }
        )

    def _images(self, sample: Sample) -> list[dict[str, Any]]:
        images: list[dict[str, Any]] = []
        for number, encoded in enumerate(sample.images, 1):
            name = f"image {number} of {sample.key}"
            try:
                uri, size = thumbnail(encoded, name=name, side=IMAGE_SIDE)
            except DataError as error:
                images.append({"error": str(error)})
                continue
            self.shrunk += max(size) > IMAGE_SIDE
            images.append({"name": name, "uri": uri, "size": f"{size[0]} × {size[1]}"})
        return images

    def _runs(self, key: str, role: str) -> list[dict[str, Any]]:
        """The supervised tokens of a sequence, cut after each token equal to the last one: its answers."""
        records = self.cache.records([(key, role)])
        positions = np.flatnonzero(records.target_ids_N != NO_TARGET)
        ids = records.target_ids_N[positions].tolist()
        if not ids:
            return []
        rows = _rows(records, positions[:TOKENS].tolist())
        if self.cache.has_advantages:
            gained_N = decode_advantages(self.cache.advantage_codes([(key, role)]))[positions[:TOKENS]]
            for row, gained in zip(rows, gained_N.tolist(), strict=True):
                row.append(None if math.isnan(gained) else gained)
        for row in rows:
            for number in [row[0], *row[4], *row[8]]:
                self._labels.setdefault(number, self.names.label(number))
        self._sequences.append(rows)
        tokens = [
            {"index": index, **_token(row, piece.text, piece.kind)}
            for index, (row, piece) in enumerate(zip(rows, self.names.pieces(ids[:TOKENS]), strict=True))
        ]
        ends = [index + 1 for index, number in enumerate(ids) if number == ids[-1]]
        bounds = pairwise([0, *ends])
        runs = [{"sequence": len(self._sequences) - 1, "tokens": tokens[start:end], "more": 0} for start, end in bounds]
        runs[bisect(ends, len(tokens) - 1)]["more"] = len(ids) - len(tokens)
        return runs


def _rows(records: Records, positions: Sequence[int]) -> list[list[Any]]:
    """What the script shows of each position: target, log p, entropy, tail mass, the likeliest ids and their
    probabilities, number and mass of the other top-k ids, tail sample ids with counts, number of tail samples; and, if
    captured, the visual advantage (None: not measured)."""
    topk_N = np.concatenate([[0], np.cumsum(records.topk_counts_N, dtype=np.int64)])
    tails_N = np.concatenate([[0], np.cumsum(records.tail_counts_N, dtype=np.int64)])
    rows = []
    for at in positions:
        topk = slice(int(topk_N[at]), int(topk_N[at + 1]))
        probs_K = np.exp(records.topk_log_probs_H[topk].astype(np.float64))
        order = np.argsort(-probs_K, kind="stable")  # forced ids come last in the record
        shown, rest = order[:ALTERNATIVES], order[ALTERNATIVES:]
        sampled, times = np.unique(records.tail_ids_D[tails_N[at] : tails_N[at + 1]], return_counts=True)
        often = np.argsort(-times, kind="stable")[:TAIL_IDS]
        rows.append(
            [
                int(records.target_ids_N[at]),
                _short(float(records.target_log_probs_N[at])),
                _short(float(records.entropy_N[at])),
                _short(math.exp(float(records.tail_log_mass_N[at]))),
                records.topk_ids_H[topk][shown].tolist(),
                [_short(value) for value in probs_K[shown].tolist()],
                len(rest),
                _short(float(probs_K[rest].sum())),
                sampled[often].tolist(),
                times[often].tolist(),
                int(records.tail_counts_N[at]),
            ]
        )
    return rows


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _token(row: Sequence[Any], text: str, kind: str) -> dict[str, Any]:
    gained = row[11] if len(row) > 11 else None
    return {
        "shade": _shade(row[2]),
        "gain": None if gained is None else _shade(gained),
        "kind": kind,
        "off": bool(row[4]) and row[4][0] != row[0],
        "text": text.replace("\n", "↵\n") + (" " if kind == "name" else ""),
        "title": f"p {math.exp(row[1]):.3g} · entropy {row[2]:.3g} · tail {row[3]:.3g}"
        + ("" if gained is None else f" · image {gained:+.3g}"),
    }


def _shade(nats: float) -> float:
    return math.sqrt(min(max(nats, 0.0) / DARKEST, 1.0))
