"""Writes the page of a cache from its template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llavamod_offline.errors import CacheError, ConfigError
from llavamod_offline.pages.page import render
from llavamod_offline.plural import counted
from llavamod_offline.storage.atomic import write_file
from teacher_cache.fingerprint import describe_tokenizer, differences
from teacher_cache.inspection.token_labels import TokenNames
from teacher_cache.read.reader import TeacherCache
from teacher_cache.report.browser import DARKEST, IMAGE_SIDE, Browser, Shown
from teacher_cache.report.figures import bytes_per_part, distributions, fingerprint_fields, totals
from teacher_cache.report.rankings import NEEDED, Ranking, rank, unneeded_images
from teacher_cache.report.scan import Scan, scan_cache
from teacher_cache.report.sets import CacheSets

POSITIONS = 1_000_000
SAMPLES = 24
_RANKED = 5
_LISTED = 200  # keys whose images are not needed
_EVEN = "even"
_ROLES = ("response", "chosen", "rejected", "mismatched")


@dataclass(frozen=True)
class Report:
    """What was written: the file, its size in bytes, the samples in it, and the positions behind its figures."""

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
    """Write the page of a cache; `data` are packed sets, `tokenizer` is the folder whose tokenizer labels ids.

    Shows `samples` evenly spaced samples and the most unusual ones; distributions cover all positions, or evenly spaced
    sequences with about `positions` of them. Errors: `ConfigError` unless `output` ends with .html; `CacheError` if a
    sample differs from what was captured, or the sets have none of the samples.
    """
    if output.suffix != ".html":
        raise ConfigError(f"{output}: the name of a report must end with .html")
    sets = CacheSets(cache, data)
    names = TokenNames(tokenizer)
    _check_names(cache, names)
    scan = scan_cache(cache, sets, positions)
    rankings = rank(cache, scan, _RANKED)
    browser = Browser(cache, names)
    chosen = _chosen(cache, rankings, samples)
    shown = [_shown(cache, sets, key, reasons) for key, reasons in chosen.items()]
    if sets and shown and not any(each.sample for each in shown):
        where = ", ".join(f"'{path}'" for path in data)
        raise CacheError(f"cache '{cache.path}': set {where} has none of its samples: pass the captured set")
    for each in shown:
        browser.add(each)
    sources = sorted({card["source"] for card in browser.cards} - {""})
    parts = bytes_per_part(cache)
    page = render(
        Path(__file__).with_name("page.html.jinja"),
        styles=["page.css"],
        scripts=["page.js"],
        title=f"Teacher cache {cache.path.rstrip('/').rsplit('/', 1)[-1]}",
        lead=f"{counted(cache.positions, 'position')} in {counted(len(cache), 'sequence')} "
        f"({', '.join(cache.roles)}): what the teacher "
        "predicted, and how sure it was.",
        totals=totals(cache, scan),
        **distributions(cache, scan, bool(sets)),
        rankings=rankings,
        visual=_visual(cache, scan),
        sequences=len(cache),
        several_roles=len(cache.roles) > 1,
        parts_of_bytes=parts,
        largest_part=max((size for _, size, _ in parts), default=0.0),
        fingerprint=fingerprint_fields(cache),
        reasons={_EVEN: "evenly spaced", **{ranking.slug: ranking.title.lower() for ranking in rankings}},
        sources=dict(zip(sources, sources, strict=True)),
        cards=browser.cards,
        data=browser.data,
        shades=[DARKEST * (part / 4) ** 2 for part in range(5)],
        shrunk=browser.shrunk,
        image_side=IMAGE_SIDE,
    )
    content = page.encode()
    output.parent.mkdir(parents=True, exist_ok=True)
    write_file(output, content)
    return Report(str(output), len(content), len(shown), len(scan.entropy_N), cache.positions)


def _check_names(cache: TeacherCache, names: TokenNames) -> None:
    """Refuse a tokenizer with another vocabulary. Errors: `CacheError`."""
    if names.tokenizer is None:
        return
    there, here = cache.fingerprint["tokenizer"], describe_tokenizer(names.tokenizer)
    sides = [{"tokenizer": {"vocabulary": side["vocabulary"]}} for side in (there, here)]
    found = differences(*sides, names=("cache", "now"))
    if found:
        raise CacheError(f"cache '{cache.path}': {found[0]}: pass the folder of the teacher's tokenizer")


def _visual(cache: TeacherCache, scan: Scan) -> str:
    """Which answers do not need their image, in words; empty without visual advantages."""
    if not cache.has_advantages:
        return ""
    items = cache.items(unneeded_images(scan).tolist())
    measured = int((~np.isnan(scan.image_Q)).sum())
    said = (
        f"{len(items):,} of {counted(measured, 'sequence')} with images do not need them: no token of the answer gains "
    )
    named = ", ".join(key for key, _ in items[:_LISTED]) + (", …" if len(items) > _LISTED else "")
    return f"{said}{NEEDED:g} nats from the image" + (f": {named}." if items else ".")


def _chosen(cache: TeacherCache, rankings: Sequence[Ranking], samples: int) -> dict[str, dict[str, str]]:
    """The keys to show, each with its reasons by slug: evenly spaced and unusual ones."""
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
