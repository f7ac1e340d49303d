"""The page of a report, from top to bottom."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llavamod_offline.errors import CacheError, ConfigError
from llavamod_offline.pages.page import html_page
from llavamod_offline.storage.atomic import write_file
from teacher_cache.fingerprint import describe_tokenizer, differences
from teacher_cache.inspection.token_labels import TokenNames
from teacher_cache.read.reader import TeacherCache
from teacher_cache.report.browser import Browser, Shown
from teacher_cache.report.figures import byte_bars, distributions, fingerprint_fields, ranking_cards, total_tiles
from teacher_cache.report.rankings import Ranking, rank
from teacher_cache.report.scan import scan_cache
from teacher_cache.report.script import SCRIPT, STYLE
from teacher_cache.report.sets import CacheSets

POSITIONS = 1_000_000
SAMPLES = 24
_STRANGE = 5
_EVEN = "even"
_ROLES = ("response", "chosen", "rejected", "mismatched")


@dataclass(frozen=True)
class Report:
    """What was written: the file, its size in bytes, the samples in it, and how many positions its figures are over."""

    output: str
    bytes: int
    samples: int
    positions: int
    of_positions: int


def write_report(
    cache: TeacherCache,
    output: Path,
    *,
    data: Sequence[Path | str] = (),
    tokenizer: Path | None = None,
    samples: int = SAMPLES,
    positions: int = POSITIONS,
) -> Report:
    """Write the page of a cache; `data` are packed sets, `tokenizer` is the folder that names ids.

    `samples` evenly spaced ones are shown besides the strangest; distributions are over all positions, or over evenly
    spaced sequences with about `positions` of them. Errors: `ConfigError` for another ending than .html; `CacheError`
    if a sample of the sets is not what was captured, or the sets have none.
    """
    if output.suffix != ".html":
        raise ConfigError(f"{output}: a report's name ends with .html")
    sets = CacheSets(cache, data)
    names = TokenNames(tokenizer)
    _check_names(cache, names)
    scan = scan_cache(cache, sets, positions)
    rankings = rank(cache, scan, _STRANGE)
    browser = Browser(cache, names)
    chosen = _chosen(cache, rankings, samples)
    shown = [_shown(cache, sets, key, reasons) for key, reasons in chosen.items()]
    if sets and shown and not any(each.sample for each in shown):
        where = ", ".join(f"'{path}'" for path in data)
        raise CacheError(f"cache '{cache.path}': set {where} has none of its samples: give the set that was captured")
    for each in shown:
        browser.add(each)
    page = html_page(
        f"Teacher cache {cache.path.rstrip('/').rsplit('/', 1)[-1]}",
        f"{cache.positions:,} positions in {len(cache):,} sequences ({', '.join(cache.roles)}): what the teacher said, "
        "and how sure it was.",
        [
            ("How sure the teacher was", distributions(cache, scan, bool(sets))),
            ("The strangest and the longest", ranking_cards(cache, rankings)),
            ("What it takes, and what it was made from", byte_bars(cache) + fingerprint_fields(cache)),
            ("Samples", browser.html({_EVEN: "evenly spaced", **{r.slug: r.title.lower() for r in rankings}})),
        ],
        style=STYLE,
        script=SCRIPT,
        top=total_tiles(cache, scan),
    )
    content = page.encode()
    output.parent.mkdir(parents=True, exist_ok=True)
    write_file(output, content)
    return Report(str(output), len(content), len(shown), len(scan.entropy_N), cache.positions)


def _check_names(cache: TeacherCache, names: TokenNames) -> None:
    """Refuse a tokenizer that would call ids by other names. Errors: `CacheError`."""
    if names.tokenizer is None:
        return
    there, here = cache.fingerprint["tokenizer"], describe_tokenizer(names.tokenizer)
    sides = [{"tokenizer": {"vocabulary": side["vocabulary"]}} for side in (there, here)]
    found = differences(*sides, names=("cache", "now"))
    if found:
        raise CacheError(f"cache '{cache.path}': {found[0]}: give the folder of the teacher's tokenizer")


def _chosen(cache: TeacherCache, rankings: Sequence[Ranking], samples: int) -> dict[str, dict[str, str]]:
    """The keys to show with the reasons, by slug: evenly spaced ones and the strangest, in the order of the cache."""
    count = min(samples, len(cache))
    even = ((np.arange(count) + 0.5) * len(cache) / max(count, 1)).astype(np.int64).tolist()
    found: dict[str, dict[str, str]] = {key: {_EVEN: "evenly spaced"} for key, _ in cache.items(even)}
    for ranking in rankings:
        for place, ((key, _), value) in enumerate(zip(ranking.items, ranking.values, strict=True), 1):
            text = f"{ranking.title.lower()}, no. {place}: {value}"
            found.setdefault(key, {}).setdefault(ranking.slug, text)
    return found


def _shown(cache: TeacherCache, sets: CacheSets, key: str, reasons: Mapping[str, str]) -> Shown:
    roles = tuple(sorted((role for role in cache.roles if (key, role) in cache), key=_place))
    return Shown(key, roles, sets.sample((key, roles[0])) if sets else None, reasons)


def _place(role: str) -> tuple[int, str]:
    return (_ROLES.index(role) if role in _ROLES else len(_ROLES)), role
