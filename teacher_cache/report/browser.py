"""The browser of samples: images, conversations, and every supervised token with the teacher's alternatives.

The page is whole without its script, which adds what a token's alternatives were, and a choice of samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from llavamod_offline.data.encode.tokenize import NO_TARGET
from llavamod_offline.data.sample import IMAGE_PLACEHOLDER, Sample, Turn
from llavamod_offline.errors import DataError
from llavamod_offline.pages.page import json_block, thumbnail
from teacher_cache.format.record import Records
from teacher_cache.inspection.token_labels import TokenNames
from teacher_cache.read.reader import TeacherCache
from teacher_cache.report.sets import NO_SOURCE

ALTERNATIVES = 12
DRAWS = 6
TOKENS = 1200  # most that are shown of a sequence
PICTURE_SIDE = 448
DARKEST = 4.0  # nats at which the shade of a token is full


@dataclass(frozen=True)
class Shown:
    """A sample of the page: its key, the roles that have records, the sample if there is a set, and why it is here."""

    key: str
    roles: tuple[str, ...]
    sample: Sample | None
    reasons: Mapping[str, str]


class Browser:
    """Collects cards, and what their tokens' alternatives were."""

    def __init__(self, cache: TeacherCache, names: TokenNames) -> None:
        self.cache = cache
        self.names = names
        self.cards: list[str] = []
        self.sources: set[str] = set()
        self._labels: dict[int, str] = {}
        self._sequences: list[list[list[Any]]] = []
        self._shrunk = 0

    def add(self, shown: Shown) -> None:
        """Add the card of a sample."""
        runs = {role: self._runs(shown.key, role) for role in shown.roles}
        source = "" if shown.sample is None else shown.sample.source or NO_SOURCE
        if source:
            self.sources.add(source)
        why = " ".join(shown.reasons)
        badges = "".join(f'<span class="badge">{escape(text)}</span>' for text in shown.reasons.values())
        origin = f'<span class="badge">{escape(source)}</span>' if source else ""
        self.cards.append(
            f'<article class="card sample" id="s-{escape(shown.key)}" data-why="{escape(why)}" '
            f'data-source="{escape(source)}"><header><h3>{escape(shown.key)}</h3>{origin}{badges}</header>'
            f'<div class="body">{self._pictures(shown.sample)}'
            f'<div class="talk">{self._conversation(shown, runs)}</div></div></article>'
        )

    def html(self, reasons: Mapping[str, str]) -> str:
        """The legend, the controls (for `reasons` by slug), the cards, and the data of the page's script."""
        choices = "".join(f'<option value="{slug}">{escape(title)}</option>' for slug, title in reasons.items())
        sources = "".join(f"<option>{escape(source)}</option>" for source in sorted(self.sources))
        by_source = f'<label>source <select id="source"><option value="">all</option>{sources}</select></label>'
        controls = (
            '<div class="controls" id="controls" hidden><label>show <select id="why"><option value="">all</option>'
            f"{choices}</select></label>{by_source if self.sources else ''}<label>find "
            '<input id="find" type="search" placeholder="key or words"></label>'
            '<span class="soft" id="count"></span></div>'
        )
        note = f"; {self._shrunk} pictures are shrunk to {PICTURE_SIDE} pixels for this page" if self._shrunk else ""
        data = {"names": self._labels, "sequences": self._sequences}
        return f"{_legend(note)}{controls}{''.join(self.cards)}{json_block('data', data)}"

    def _pictures(self, sample: Sample | None) -> str:
        if sample is None or not sample.images:
            return ""
        parts = []
        for number, encoded in enumerate(sample.images, 1):
            name = f"picture {number} of {sample.key}"
            try:
                uri, size = thumbnail(encoded, name=name, side=PICTURE_SIDE)
            except DataError as error:
                parts.append(f'<p class="wrong">{escape(str(error))}</p>')
                continue
            self._shrunk += max(size) > PICTURE_SIDE
            parts.append(f'<img alt="{escape(name)}" src="{uri}"><small>{size[0]} × {size[1]}</small>')
        return f'<div class="pictures">{"".join(parts)}</div>'

    def _conversation(self, shown: Shown, runs: Mapping[str, list[str]]) -> str:
        """The turns with their tokens; the roles' last answers side by side where there are several."""
        sample = shown.sample
        heads = {role: self._head(shown.key, role) for role in shown.roles}
        if sample is None:
            blocks = {role: heads[role] + "".join(runs[role]) for role in shown.roles}
            return _side_by_side(blocks)
        first = shown.roles[0]
        turns = sample.conversation(first) if first in sample.roles else sample.turns
        answers = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
        fitting = all(len(runs[role]) == len(answers) for role in shown.roles)
        if not fitting:  # another template than was thought of: text and tokens, each by itself
            blocks = {role: heads[role] + "".join(runs[role]) for role in shown.roles}
            return "".join(map(_turn, turns)) + '<small class="who">tokens as recorded</small>' + _side_by_side(blocks)
        place = {number: order for order, number in enumerate(answers)}
        shared = [
            _turn(turn) if number not in place else f'<div class="answer">{runs[first][place[number]]}</div>'
            for number, turn in enumerate(turns[:-1])
        ]
        if len(shown.roles) == 1:
            return heads[first] + "".join(shared) + _side_by_side({first: runs[first][-1]})
        return "".join(shared) + _side_by_side({role: heads[role] + runs[role][-1] for role in shown.roles})

    def _head(self, key: str, role: str) -> str:
        about = self.cache.sequence(key, role)
        total = f"Σ log p <b>{about.sum_log_prob:.2f}</b>".replace("-", "−")
        return (
            f'<small class="who"><b>{escape(role)}</b>: {total} · {about.n_tokens:,} tokens, '
            f"{about.n_positions:,} recorded with mean entropy {about.mean_entropy:.3f}</small>"
        )

    def _runs(self, key: str, role: str) -> list[str]:
        """The supervised tokens of a sequence, cut after each token of the kind that ends it: its answers."""
        records = self.cache.records([(key, role)])
        positions = np.flatnonzero(records.target_ids_N != NO_TARGET)
        hidden = len(positions) - TOKENS
        ids = records.target_ids_N[positions].tolist()
        if not ids:
            return []
        rows = _rows(records, positions[:TOKENS].tolist())
        for row in rows:
            for number in [row[0], *row[4], *row[8]]:
                self._labels.setdefault(number, self.names.label(number))
        self._sequences.append(rows)
        pieces = self.names.pieces(ids[:TOKENS])
        runs, current = [], ""
        for index, (row, piece) in enumerate(zip(rows, pieces, strict=True)):
            current += _token(index, row, piece.text, piece.kind)
            if ids[index] == ids[-1]:
                runs.append(current)
                current = ""
        if hidden > 0:
            current += f'<span class="soft"> … {hidden:,} more tokens</span>'
            runs += [""] * (ids[TOKENS:].count(ids[-1]) - 1)
        runs = [*runs, current] if current else runs
        number = len(self._sequences) - 1
        return [f'<p class="tokens" data-s="{number}">{run}</p>' for run in runs]


def _rows(records: Records, positions: Sequence[int]) -> list[list[Any]]:
    """What the script shows of each position: target, log p, entropy, tail mass, likely ids and their probabilities,
    how many more there are and their mass, drawn ids and how often, and the number of draws."""
    heads_N = np.concatenate([[0], np.cumsum(records.topk_counts_N, dtype=np.int64)])
    draws_N = np.concatenate([[0], np.cumsum(records.tail_counts_N, dtype=np.int64)])
    rows = []
    for at in positions:
        head = slice(int(heads_N[at]), int(heads_N[at + 1]))
        probs_K = np.exp(records.topk_log_probs_H[head].astype(np.float64))
        order = np.argsort(-probs_K, kind="stable")  # forced ids stand last in a head, whatever their probability
        shown, rest = order[:ALTERNATIVES], order[ALTERNATIVES:]
        drawn, times = np.unique(records.tail_ids_D[draws_N[at] : draws_N[at + 1]], return_counts=True)
        often = np.argsort(-times, kind="stable")[:DRAWS]
        rows.append(
            [
                int(records.target_ids_N[at]),
                _short(float(records.target_log_probs_N[at])),
                _short(float(records.entropy_N[at])),
                _short(math.exp(float(records.tail_log_mass_N[at]))),
                records.topk_ids_H[head][shown].tolist(),
                [_short(value) for value in probs_K[shown].tolist()],
                len(rest),
                _short(float(probs_K[rest].sum())),
                drawn[often].tolist(),
                times[often].tolist(),
                int(records.tail_counts_N[at]),
            ]
        )
    return rows


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _token(index: int, row: Sequence[Any], text: str, kind: str) -> str:
    shade = math.sqrt(min(max(row[2], 0.0) / DARKEST, 1.0))
    names = [kind, *(["off"] if row[4] and row[4][0] != row[0] else [])]
    shown = escape(text).replace("\n", "↵\n") + (" " if kind == "name" else "")
    title = f"p {math.exp(row[1]):.3g} · entropy {row[2]:.3g} · tail {row[3]:.3g}"
    return f'<span class="t {" ".join(names)}" data-i="{index}" style="--e:{shade:.2f}" title="{title}">{shown}</span>'


def _turn(turn: Turn) -> str:
    text = escape(turn.text).replace(escape(IMAGE_PLACEHOLDER), '<span class="badge">picture</span>')
    kind = "asked" if turn.role == "user" else "answer"
    return f'<div class="{kind}">{text}</div>'


def _side_by_side(blocks: Mapping[str, str]) -> str:
    cells = "".join(f'<div class="answer {escape(role)}">{block}</div>' for role, block in blocks.items())
    return f'<div class="sides">{cells}</div>' if len(blocks) > 1 else cells


def _legend(note: str) -> str:
    ticks = "".join(f"<span>{DARKEST * (part / 4) ** 2:g}</span>" for part in range(5))
    return (
        '<div class="legend"><span>entropy of the teacher, nats</span>'
        f'<div class="scale"><div class="ramp"></div><div class="ticks">{ticks}</div></div>'
        '<span><span class="t off" style="--e:0">dotted</span>: not the teacher\'s first choice</span>'
        f"</div><small>Each token's shade is the teacher's entropy before it{escape(note)}.</small>"
    )
