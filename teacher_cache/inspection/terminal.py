"""Tables for a terminal: coloured there, plain text in a pipe, never wider than the terminal (80 columns in a pipe)."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llavamod_offline.plural import counted
from teacher_cache.fingerprint import flatten

_ALTERNATIVES = 6
_TAIL_SAMPLES = 4
_BAR = 24
_NUMBERS = 19  # the width of p, entropy and tail together
_HASH = 64
Justify = Literal["left", "right"]


def make_console() -> Console:
    """A console on standard output that prints text as it is, without interpreting markup."""
    return Console(file=sys.stdout, highlight=False, markup=False, emoji=False)


def make_table(console: Console, title: str, columns: Sequence[tuple[str, Justify]], **widths: int) -> Table:
    """Print a title and make the empty table that follows it; `widths` fixes the widths of the named columns."""
    console.print(Text(title, "bold"))
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, pad_edge=False, header_style="dim")
    for name, justify in columns:
        table.add_column(name, justify=justify, width=widths.get(name), overflow="fold")
    return table


def add_row(table: Table, *cells: object) -> None:
    """Add a row of plain text, without interpreting markup."""
    table.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in cells))


def print_pairs(console: Console, pairs: Iterable[tuple[str, object]]) -> None:
    """Print names with their values, one per line; long values wrap within their column."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs:
        grid.add_row(Text(name), Text(str(value)))
    console.print(grid)


def print_cache(console: Console, about: dict[str, Any]) -> None:
    """Print the result of `summary.describe_cache`."""
    print_pairs(
        console,
        [
            ("cache", f"{about['path']} (format {about['format_version']})"),
            ("digest", about["digest"]),
            (
                "content",
                f"{counted(about['positions'], 'position')} in {counted(about['sequences'], 'sequence')} "
                f"({', '.join(about['roles'])}), {counted(about['shards'], 'shard')}, {about['rejected']:,} rejected",
            ),
            (
                "size",
                f"{readable_bytes(about['bytes'])}, {about['bytes_per_position']:.2f} bytes per position in total",
            ),
            (
                "per position",
                f"{about['topk_ids_per_position']:.2f} top-k ids, "
                f"{about['tail_samples_per_position']:.2f} tail samples",
            ),
        ],
    )
    console.print()
    print_parts(console, "Bytes per position", about["bytes_per_position_by_part"])
    _print_histograms(console, about["histograms"])
    _print_fingerprint(console, about["fingerprint"])


def print_parts(console: Console, title: str, parts: dict[str, float]) -> None:
    """Print the size of each part, with its share."""
    table = make_table(console, title, [("part", "left"), ("bytes", "right"), ("share", "right"), ("", "left")])
    total = sum(parts.values())
    for name, size in parts.items():
        share = size / total if total else 0.0
        add_row(table, name, f"{size:,.3f}", f"{share:.1%}", _bar(console, share))
    add_row(table, Text("all", "bold"), Text(f"{total:,.3f}", "bold"), "", "")
    console.print(table)
    console.print()


def print_sequences(console: Console, sequences: Sequence[dict[str, Any]]) -> None:
    """Print the result of `summary.describe_key`: likely alternatives, and the mass of each tail sample."""
    for sequence in sequences:
        tokens = sequence["tokens"]
        supervised = sum(token["id"] >= 0 for token in tokens)
        title = (
            f"{sequence['key']} ({sequence['role']}): {supervised} supervised of {sequence['n_tokens']} tokens, "
            f"Σ log p {sequence['sum_log_prob']:.4f}, mean entropy {sequence['mean_entropy']:.4f}"
        )
        columns: list[tuple[str, Justify]] = [
            ("#", "right"),
            ("token", "left"),
            ("p", "right"),
            ("entropy", "right"),
            ("tail", "right"),
            ("alternatives", "left"),
            ("tail samples", "left"),
        ]
        borders = 20 if console.is_terminal else 12
        left = max(console.width - len(str(len(tokens))) - _NUMBERS - borders, 24)
        token_width, tail_samples_width = left // 4, left // 4
        others_width = left - token_width - tail_samples_width
        table = make_table(
            console,
            title,
            columns,
            token=token_width,
            alternatives=others_width,
            **{"tail samples": tail_samples_width},
        )
        for number, token in enumerate(tokens):
            others = [entry for entry in token["topk"] if entry["id"] != token["id"]]
            add_row(
                table,
                number,
                Text(token["token"], "bold"),
                f"{math.exp(token['log_prob']):.4f}" if token["id"] >= 0 else "",
                f"{token['entropy']:.3f}",
                f"{token['tail_mass']:.4f}",
                _filled([f"{e['token']} {math.exp(e['log_prob']):.3f}" for e in others], _ALTERNATIVES, others_width),
                _filled(
                    [f"{e['token']} {e['mass']:.3f}" for e in token["tail_samples"]], _TAIL_SAMPLES, tail_samples_width
                ),
            )
        console.print(table)
        console.print()


def readable_bytes(size: float) -> str:
    """Bytes in the largest decimal unit that gives at least 1."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(size) < 1000:
            return f"{size:,.0f} {unit}" if unit == "bytes" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"


def _filled(entries: list[str], limit: int, width: int) -> str:
    """Fill lines of `width` with the first `limit` entries, unbroken where they fit, then the number of others."""
    more = len(entries) - limit
    lines = [""]
    for entry in [*entries[:limit], *([f"+{more:,}"] if more > 0 else [])]:
        longer = f"{lines[-1]}  {entry}" if lines[-1] else entry
        if cell_len(longer) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(entry)
    return "\n".join(lines)


def _print_histograms(console: Console, histograms: dict[str, Any]) -> None:
    some, every = histograms["sequences"], histograms["of_sequences"]
    whole = "all sequences" if some == every else f"{some:,} evenly spaced of {every:,} sequences"
    over = f"{whole}, {histograms['positions']:,} positions"
    for name, title, unit in (("topk_mass", "Top-k mass", ""), ("entropy", "Entropy", " nats")):
        histogram = histograms[name]
        edges, counts = histogram["edges"], histogram["counts"]
        total = max(sum(counts), 1)
        heading = f"{title} (mean {histogram['mean']:.4f}{unit}; {over})"
        table = make_table(console, heading, [("from", "right"), ("to", "right"), ("share", "right"), ("", "left")])
        for low, high, count in zip(edges, edges[1:], counts, strict=False):
            upper = "" if high is None else f"{high:g}"
            add_row(table, f"{low:g}", upper, f"{count / total:.1%}", _bar(console, count / total))
        console.print(table)
        console.print()


def _print_fingerprint(console: Console, fingerprint: dict[str, Any]) -> None:
    table = make_table(console, "Fingerprint", [("field", "left"), ("value", "left")])
    for section in ("engine", "teacher", "template", "sequence", "images", "tokenizer", "capture", "data"):
        for field, value in flatten({section: fingerprint.get(section, {})}):
            add_row(table, field, _shown(value))
    console.print(table)


def _shown(value: Any) -> str:
    text = ", ".join(map(_shown, value)) or "none" if isinstance(value, list) else str(value)
    return f"{text[:16]}…" if len(text) == _HASH and set(text) <= set("0123456789abcdef") else text


def _bar(console: Console, share: float) -> Text:
    return Text(("█" if console.is_terminal else "#") * round(share * _BAR), "cyan")
