"""Several answers per prompt, stop texts, a system turn, and limits by source."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import ConfigError
from teacher_cache.generate.generated_set import with_system
from teacher_cache.read.reader import open_cache
from tests.teacher_cache.generate.reference import SOURCE_SAMPLES, Place, Reference, rows

WARM = ("generate.temperature=1.0",)


def test_several_answers_to_a_prompt_differ_and_the_first_is_that_of_one_alone(place: Place) -> None:
    done = place.generate(*WARM, "generate.answers=3", "generate.capture=false")
    assert (done.written, done.samples + done.rejected) == (3 * SOURCE_SAMPLES, 3 * SOURCE_SAMPLES)
    alone = {sample.key: sample.turns for sample in _rows_of(place, "alone", *WARM, "generate.capture=false")}
    found = {sample.key: sample for sample in rows(place.set())}
    texts: dict[str, set[str]] = {}
    for key, sample in found.items():
        name, _, copy = key.rpartition("-")
        texts.setdefault(name, set()).add(sample.turns[-1].text)
        assert sample.generated is not None
        assert name == f"{sample.generated.key}-generated"
        if copy == "0":
            assert sample.turns == alone[name]
    assert {key.rpartition("-")[2] for key in found} == {"0", "1", "2"}
    assert any(len(own) > 1 for own in texts.values())
    again = place.generate(*WARM, "generate.answers=3", "generate.capture=false", "batch_size=2", name="again")
    assert again.digest == done.digest


def _rows_of(place: Place, name: str, *settings: str) -> list[Sample]:
    place.generate(*settings, name=name)
    return rows(place.set(name))


def test_an_answer_ends_before_the_text_that_stops_it(place: Place, greedy: Place) -> None:
    """Whichever comes first; such an answer has no log-probs, since its end was not sampled. Others are unchanged."""
    stop = [" is", "."]
    place.generate('generate.stop=[" is","."]', "generate.capture=false")
    found = {sample.key: sample for sample in rows(place.set())}
    rejected = [json.loads(line)["key"] for line in (place.set() / "rejected.jsonl").read_text().splitlines()]
    stopped = 0
    for whole in rows(greedy.set()):
        text = whole.turns[-1].text
        cut = re.split("|".join(map(re.escape, stop)), text)[0]
        if not cut.strip():
            assert whole.key.removesuffix("-generated") in rejected
            continue
        sample = found[whole.key]
        assert sample.turns[-1].text == cut
        assert sample.generated is not None
        assert whole.generated is not None
        if cut == text:
            assert sample.generated.behaviour_log_probs[0] == pytest.approx(whole.generated.behaviour_log_probs[0])
        else:
            stopped += 1
            assert sample.generated.behaviour_log_probs == (None,)
    assert stopped


def test_a_system_turn_is_put_before_conversations_that_have_none_and_kept(place: Place) -> None:
    own = (Turn("system", "Answer with one word."),)
    mixed = [
        dataclasses.replace(sample, turns=(*own, *sample.turns) if number % 2 else sample.turns)
        for number, sample in enumerate(rows(place.source))
    ]
    source = write_set(mixed, place.folder / "mixed").path
    place.generate("generate.system=Be brief.", data=source)
    reference = Reference()
    for old, new in zip(mixed, rows(place.set()), strict=True):
        before = old.turns if old.turns[0].role == "system" else (Turn("system", "Be brief."), *old.turns)
        assert new.turns[:-1] == before[:-1]
        assert new.turns[-1].text == reference.answer(before[:-1], old.images)
    assert len(open_cache(place.cache())) == SOURCE_SAMPLES


def test_a_system_turn_goes_behind_tools() -> None:
    tools, question, answer = Turn("tools", "[]"), Turn("user", "Which?"), Turn("assistant", "This.")
    without = Sample("a", (tools, question, answer))
    system = Turn("system", "Be brief.")
    assert with_system(without, "Be brief.").turns == (tools, system, question, answer)
    own = dataclasses.replace(without, turns=(tools, Turn("system", "s"), question, answer))
    assert with_system(own, "Be brief.") == own


def test_sources_have_limits_of_their_own(place: Place) -> None:
    """Other sources have the common limit; a rejection names the setting."""
    mixed = [
        dataclasses.replace(sample, source="short" if number % 2 else "long")
        for number, sample in enumerate(rows(place.source))
    ]
    source = write_set(mixed, place.folder / "mixed").path
    place.generate("generate.max_new_tokens_by_source={short: 1}", "generate.capture=false", data=source)
    assert set(SampleSet.open(place.set()).manifest["sources"]) == {"long"}
    lines = [json.loads(line) for line in (place.set() / "rejected.jsonl").read_text().splitlines()]
    assert len(lines) == SOURCE_SAMPLES // 2
    for line in lines:
        assert line["reason"] == "the answer did not end within generate.max_new_tokens_by_source.short=1"
    place.generate("generate.max_new_tokens=1", "generate.max_new_tokens_by_source={long: 80}", data=source, name="b")
    assert rows(place.set("b")) == [
        dataclasses.replace(sample, key=sample.key) for sample in rows(place.set("b")) if sample.source == "long"
    ]
    assert len(rows(place.set("b"))) == len(rows(place.set()))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("generate.answers=0",), "generate.answers is 0: must be at least 1"),
        (("generate.answers=2",), "generate.answers: greedy answers to a prompt are all the same"),
        (("generate.stop=['']",), "generate.stop: an empty text would end every answer"),
        (("generate.system= ",), "generate.system: is empty"),
        (("generate.max_new_tokens_by_source={toyworld: 0}",), "max_new_tokens_by_source.toyworld is 0"),
        (("generate.max_new_tokens_by_source={ocr: 9}",), "has no source 'ocr': name one of toyworld"),
    ],
)
def test_what_does_not_fit_is_one_line(place: Place, settings: tuple[str, ...], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        place.generate(*settings)
    assert "\n" not in str(caught.value)
    assert list(place.folder.iterdir()) == []
