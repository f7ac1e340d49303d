"""The report's page: figures against plain counting, every kind of cache, hostile samples, nothing fetched."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import CacheError, ConfigError
from llavamod_offline.models.checkpoint import load_tokenizer
from llavamod_offline.storage.folders import open_folder
from teacher_cache.read.reader import TeacherCache, open_cache
from teacher_cache.report.page import write_report
from teacher_cache.report.rankings import NEEDED, rank, unneeded_images
from teacher_cache.report.scan import scan_cache
from teacher_cache.report.sets import NO_SET, NO_SOURCE, CacheSets
from teacher_cache.visual.advantages import NOT_MEASURED, decode_advantages
from tests.llavamod_offline.pages.test_page import HOSTILE, Parsed
from tests.teacher_cache.conftest import World
from tests.tiny import tiny_image, tiny_samples, write_tiny_llava, write_tiny_set

EVERYTHING = 10**9


@pytest.fixture(scope="module")
def mixed(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A set of three sources, one without a name and one with hostile text everywhere, and its cache."""
    folder = tmp_path_factory.mktemp("mixed")
    samples = [dataclasses.replace(sample, source=("a", "b", "")[n % 3]) for n, sample in enumerate(tiny_samples(12))]
    turns = (Turn("user", f"<image>\n{HOSTILE}"), Turn("assistant", f"{HOSTILE} 😀"))
    hostile = Sample("hostile", turns, (tiny_image(5, (900, 90)),), ("png",), source=HOSTILE)
    write_set([*samples, hostile], folder / "set", shard_samples=5)
    world.run(folder / "cache", data=folder / "set")
    return folder / "set", folder / "cache"


def page_of(cache: TeacherCache, output: Path, **settings: Any) -> tuple[Parsed, dict[str, Any]]:
    """Write a page; return it as a browser parses it, and the data that its script reads."""
    write_report(cache, output, **settings)
    page = Parsed(output.read_text())
    ((_, data),) = [each for each in page.scripts if each[0] == "application/json"]
    assert (page.loads, page.handlers) == ([], [])
    return page, json.loads(data)


def cards(page: Parsed) -> list[dict[str, str | None]]:
    return [attrs for tag, attrs in page.tags if tag == "article"]


def tokens(page: Parsed) -> list[dict[str, str | None]]:
    found = [attrs for tag, attrs in page.tags if tag == "span" and (attrs.get("class") or "").startswith("t ")]
    return found[1:]  # the first one belongs to the legend


def test_figures_by_source_are_those_of_plain_counting(mixed: tuple[Path, Path]) -> None:
    data, where = mixed
    cache = open_cache(where)
    scan = scan_cache(cache, CacheSets(cache, [data]), EVERYTHING)
    packed = SampleSet.open(data)
    expected: dict[str, list[tuple[float, float, float, float]]] = {}
    for key in packed.keys:
        targets = cache.targets([(key, "response")])
        source = packed.read(packed.row_of(key)).source or NO_SOURCE
        for row in range(len(targets)):
            tail = math.exp(float(targets.tail_log_mass_N[row]))
            first = float(targets.topk_ids_NK[row, 0] == targets.target_ids_N[row])
            figures = (float(targets.entropy_N[row]), 1 - tail, -float(targets.target_log_probs_N[row]), first)
            expected.setdefault(source, []).append(figures)
    assert set(scan.groups) == set(expected) == {"a", "b", NO_SOURCE, HOSTILE}
    sizes = [len(expected[name]) for name in scan.groups]
    assert sizes == sorted(sizes, reverse=True)
    for place, name in enumerate(scan.groups):
        mine = scan.group_N == place
        columns = (scan.entropy_N, scan.topk_mass_N, scan.surprise_N, scan.chosen_N)
        found = np.stack([column[mine] for column in columns], 1)
        assert np.allclose(sorted(found.tolist()), sorted(expected[name]), atol=1e-6)


def test_the_strangest_are_those_of_plain_sorting(finished: Path) -> None:
    cache = open_cache(finished)
    scan = scan_cache(cache, CacheSets(cache, []), EVERYTHING)
    rankings = {ranking.slug: ranking for ranking in rank(cache, scan, 3)}
    items = cache.items()
    abouts = {item: cache.sequence(*item) for item in items}
    tails = {item: float(cache.targets([item]).tail_log_mass_N.exp().mean()) for item in items}
    by = {
        "entropy": lambda item: -abouts[item].mean_entropy,
        "unlikely": lambda item: abouts[item].sum_log_prob / abouts[item].n_positions,
        "tail": lambda item: -tails[item],
        "longest": lambda item: -abouts[item].n_tokens,
    }
    for slug, key in by.items():
        assert rankings[slug].items == tuple(sorted(items, key=key)[:3]), slug
        assert rankings[slug].of == 24
    longest = rankings["longest"]
    assert longest.values == tuple(str(abouts[item].n_tokens) for item in longest.items)


def test_a_large_cache_is_sampled_and_the_page_says_so(finished: Path, tmp_path: Path) -> None:
    cache = open_cache(finished)
    done = write_report(cache, tmp_path / "r.html", positions=-(-cache.positions // 4), samples=2)
    assert 0 < done.positions < cache.positions // 2
    text = Parsed((tmp_path / "r.html").read_text()).text
    assert f"{done.positions:,} of {cache.positions:,} positions, evenly spaced" in text
    assert "of 6 of 24 sequences" in text  # tails
    assert "of all 24 sequences" in text  # from the table of sequences
    assert done.bytes == (tmp_path / "r.html").stat().st_size


def test_hostile_samples_stay_text_with_their_tokens_and_images(
    world: World, mixed: tuple[Path, Path], tmp_path: Path
) -> None:
    data, where = mixed
    cache = open_cache(where)
    page, content = page_of(cache, tmp_path / "r.html", data=[data], tokenizer=world.teacher, samples=100)
    assert len(cards(page)) == len(cache)
    assert sum(tag == "script" for tag, _ in page.tags) == 2
    assert HOSTILE in page.text
    images = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    packed = SampleSet.open(data)
    assert len(images) == sum(packed.index.column("n_images").to_pylist())
    assert "images shrunk to 448 pixels for this page: 1" in page.text
    assert "900 × 90" in page.text
    # Every supervised token is on the page, in order, shaded by the teacher's entropy.
    assert len(tokens(page)) == cache.positions
    where_hostile = [number for number, card in enumerate(cards(page)) if card["id"] == "s-hostile"]
    rows = content["sequences"][where_hostile[0]]
    assert [row[0] for row in rows] == cache.target_ids("hostile", "response").tolist()
    assert "😀" in page.text
    assert cards(page)[where_hostile[0]]["data-source"] == HOSTILE


def test_hostile_vocabularies_stay_text_and_another_one_is_refused(
    world: World, finished: Path, tmp_path: Path
) -> None:
    teacher = write_tiny_llava(tmp_path / "teacher", head_rows=401)
    tokenizer = load_tokenizer(teacher)
    assert tokenizer.add_tokens([HOSTILE]) == 1
    tokenizer.save_pretrained(teacher)
    sample = Sample("a", (Turn("user", "What?"), Turn("assistant", f"It is {HOSTILE} there.")))
    write_set([sample], tmp_path / "set")
    world.run(tmp_path / "c", f"teacher={teacher}", "capture.preset=exhaustive", data=tmp_path / "set")
    cache = open_cache(tmp_path / "c")
    page, content = page_of(cache, tmp_path / "r.html", data=[tmp_path / "set"], tokenizer=teacher)
    assert 400 in [row[0] for row in content["sequences"][0]]
    assert content["names"]["400"] == repr(HOSTILE)
    assert page.text.count(HOSTILE) == 1
    assert sum(tag == "script" for tag, _ in page.tags) == 2
    with pytest.raises(
        CacheError, match=r"tokenizer.vocabulary: cache \w+…?, now \w+…?: pass the folder of the teacher"
    ):
        write_report(open_cache(finished), tmp_path / "r.html", tokenizer=teacher)


def test_alternatives_are_the_records(world: World, finished: Path, tmp_path: Path) -> None:
    cache = open_cache(finished)
    page, content = page_of(cache, tmp_path / "r.html", data=[world.samples], tokenizer=world.teacher, samples=100)
    items = [(str(card["id"])[2:], "response") for card in cards(page)]
    assert items == cache.items()
    for item, rows in zip(items, content["sequences"], strict=True):
        records = cache.records([item])
        for record, row in zip(records.split([1] * len(records)), rows, strict=True):
            assert row[1] == pytest.approx(float(record.target_log_probs_N[0]), rel=1e-3)
            assert row[2] == pytest.approx(float(record.entropy_N[0]), rel=1e-3)
            assert row[3] == pytest.approx(math.exp(float(record.tail_log_mass_N[0])), rel=1e-3)
            probs = dict(zip(record.topk_ids_H.tolist(), np.exp(record.topk_log_probs_H).tolist(), strict=True))
            ranked = sorted(probs, key=lambda number: -probs[number])
            assert len(row[4]) == min(len(ranked), 12)
            assert [probs[number] for number in row[4]] == [probs[number] for number in ranked[:12]]
            assert row[5] == pytest.approx([probs[number] for number in row[4]], rel=1e-3)
            assert row[6] == len(probs) - len(row[4])
            assert sum(row[5]) + row[7] == pytest.approx(sum(probs.values()), rel=1e-3)
            assert row[10] == int(record.tail_counts_N[0])
            assert set(row[8]) <= set(record.tail_ids_D.tolist())
    shown = {str(number) for rows in content["sequences"] for row in rows for number in (row[0], *row[4], *row[8])}
    assert set(content["names"]) == shown


@pytest.mark.parametrize(
    "overrides", [("capture.preset=exhaustive",), ("capture.tail_samples_max=0",), ("capture.positions=all",)]
)
def test_every_kind_of_cache_has_a_page(world: World, tmp_path: Path, overrides: tuple[str, ...]) -> None:
    world.run(tmp_path / "c", *overrides, data=world.pairs)
    cache = open_cache(tmp_path / "c")
    page, content = page_of(cache, tmp_path / "r.html", data=[world.pairs], tokenizer=world.teacher, samples=3)
    supervised = sum(len(cache.target_ids(*item)) for item in cache.items())
    if "capture.positions=all" in overrides:
        assert supervised < cache.positions
        assert "tiny, no target" in page.text
    else:
        assert supervised == cache.positions
    if "capture.preset=exhaustive" in overrides:
        row = content["sequences"][0][0]
        assert (len(row[4]), row[6], row[10]) == (12, cache.vocab_size - 12, 0)
        assert row[7] == pytest.approx(1 - sum(row[5]), abs=1e-2)
    # A sample's two responses, chosen first, each with its summed log-prob.
    assert len(content["sequences"]) == 2 * len(cards(page))
    for number, card in enumerate(cards(page)):
        key = str(card["id"])[2:]
        for side, role in enumerate(("chosen", "rejected")):
            answer = content["sequences"][2 * number + side]
            assert [row[0] for row in answer] == cache.target_ids(key, role).tolist()
            assert f"{abs(cache.sequence(key, role).sum_log_prob):.2f}" in page.text


def test_without_a_set_or_a_tokenizer_it_is_readable(finished: Path, tmp_path: Path) -> None:
    cache = open_cache(finished)
    page, _ = page_of(cache, tmp_path / "r.html", samples=1)
    assert "pass the packed set with --data" in page.text
    first = cache.target_ids(*cache.items([12])[0])
    assert f"#{first[0]}" in page.text
    assert "img" not in [tag for tag, _ in page.tags]
    with pytest.raises(ConfigError, match=r"must end with .html"):
        write_report(cache, tmp_path / "r.pdf")


def test_a_remote_cache(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAVAMOD_STAGING", str(tmp_path / "staging"))
    where = f"memory://{tmp_path.name}/c"
    folder = open_folder(where)
    for file in sorted(path for path in finished.rglob("*") if path.is_file()):
        folder.write(file.relative_to(finished).as_posix(), file.read_bytes())
    write_report(open_cache(where), tmp_path / "remote.html", samples=4)
    write_report(open_cache(finished), tmp_path / "local.html", samples=4)
    pages = [(tmp_path / f"{name}.html").read_text() for name in ("remote", "local")]
    assert pages[0].replace(where, "C").replace("cache c<", "cache cache<") == pages[1].replace(str(finished), "C")


def test_the_sets_must_be_those_that_were_captured(
    world: World, mixed: tuple[Path, Path], finished: Path, tmp_path: Path
) -> None:
    cache = open_cache(finished)
    with pytest.raises(CacheError, match=r"has none of its samples: pass the captured set"):
        write_report(cache, tmp_path / "r.html", data=[world.pairs])
    changed = [
        dataclasses.replace(sample, turns=(*sample.turns[:-1], Turn("assistant", "no"))) for sample in tiny_samples(24)
    ]
    write_set(changed, tmp_path / "changed")
    with pytest.raises(CacheError, match=r"'tiny-0000': its content in set .* differs from that captured in cache"):
        write_report(cache, tmp_path / "r.html", data=[tmp_path / "changed"])
    # With only one of several sets given, sources it lacks are shown as such.
    write_set(tiny_samples(8), tmp_path / "part")
    sets = CacheSets(cache, [world.pairs, tmp_path / "part"])
    assert sets.sources(cache.items()) == ["tiny"] * 8 + [NO_SET] * 16
    page, _ = page_of(cache, tmp_path / "r.html", data=[tmp_path / "part"], samples=24)
    assert NO_SET in page.text
    assert len(cards(page)) == 24


def test_many_sources_are_folded(world: World, tmp_path: Path) -> None:
    samples = [dataclasses.replace(sample, source=f"source {n}") for n, sample in enumerate(tiny_samples(11))]
    write_set(samples, tmp_path / "set")
    world.run(tmp_path / "c", data=tmp_path / "set")
    cache = open_cache(tmp_path / "c")
    page, _ = page_of(cache, tmp_path / "r.html", data=[tmp_path / "set"], samples=0)
    assert "all other sources (4)" in page.text
    assert sum((attrs.get("class") or "") == "hist" for _, attrs in page.tags) == 16


def test_tokens_are_shaded_by_what_the_image_adds(world: World, tmp_path: Path) -> None:
    """The list of samples that need no image is checked by plain counting; pages of other caches have neither."""
    data = write_tiny_set(tmp_path / "set", 9)
    world.run(tmp_path / "cache", "capture.without_image=blank", data=data)
    cache = open_cache(tmp_path / "cache")
    page, script = page_of(cache, tmp_path / "page.html", data=[data])
    most = {}
    for key, role in cache.items():
        gained_N = decode_advantages(cache.advantage_codes([(key, role)]))
        if not np.isnan(gained_N).all():
            most[key] = float(np.nanmax(gained_N))
    shown = [token["style"] or "" for token in tokens(page)]
    measured = int((cache.advantage_codes(cache.items()) != NOT_MEASURED).sum())
    assert sum("--v:" in style for style in shown) == measured > 0
    gains = [row[11] for rows in script["sequences"] for row in rows]
    assert sum(gain is not None for gain in gains) == measured
    scan = scan_cache(cache, CacheSets(cache, []), EVERYTHING)
    unneeded = [key for key, _ in cache.items(unneeded_images(scan).tolist())]
    assert set(unneeded) == {key for key, value in most.items() if value < NEEDED}
    assert [most[key] for key in unneeded] == sorted(most[key] for key in unneeded)
    text = (tmp_path / "page.html").read_text()
    assert f"{len(unneeded)} of {len(most)} sequences with images do not need them" in text
    assert all(key in text for key in unneeded)
    world.run(tmp_path / "plain", data=data)
    page_of(open_cache(tmp_path / "plain"), tmp_path / "plain.html", data=[data])
    assert "by-image" not in (tmp_path / "plain.html").read_text().split("</style>")[-1]
