"""Mismatched responses: which sample they come from, and what the choice must not depend on."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
import random
from pathlib import Path
from typing import Any

import pytest

from llavamod_offline.data.encode.template import get_template
from llavamod_offline.data.encode.tokenize import SequenceEncoder
from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import DataError
from tests.tiny import tiny_samples, tiny_tokenizer

ASK = (Turn("user", "What?"),)


def mismatched(samples: list[Sample], folder: Path, **settings: Any) -> dict[str, str]:
    """Pack samples and read the response that each is paired with."""
    write_set(samples, folder, **settings)
    paired = SampleSet.open(folder).with_mismatched()
    return {sample.key: str(sample.mismatched) for sample in map(paired.read, range(len(paired)))}


def obvious(samples: list[Sample]) -> dict[str, str]:
    """The pairs as `mismatch.py` describes them, by going round the ring for each sample."""
    hashes = {sample.key: hashlib.sha256(b"mismatched\0" + sample.key.encode()).hexdigest() for sample in samples}
    ring = sorted(samples, key=lambda sample: hashes[sample.key])
    found = {}
    for place, sample in enumerate(ring):
        others = ring[place + 1 :] + ring[:place]
        texts = [other.rejected if int(hashes[sample.key], 16) % 2 else other.chosen for other in others]
        found[sample.key] = next(str(text) for text in texts if text not in (sample.chosen, sample.rejected))
    return found


def test_the_next_in_the_ring_gives_the_response_whatever_order_and_shards(tmp_path: Path) -> None:
    samples = tiny_samples(40, preference=True)
    expected = obvious(samples)
    assert mismatched(samples, tmp_path / "one") == expected
    random.Random(0).shuffle(samples)
    assert mismatched(samples, tmp_path / "many", shard_samples=3) == expected
    assert len(set(expected.values())) > 20
    own = {sample.key: (sample.chosen, sample.rejected) for sample in samples}
    assert not any(text in own[key] for key, text in expected.items())
    rejected = {sample.rejected for sample in samples}
    assert 10 < sum(text in rejected for text in expected.values()) < 30  # both kinds, about equally often


def test_responses_that_are_the_samples_own_are_passed_over(tmp_path: Path) -> None:
    """Among twenty samples with the same responses there is one with others: it is the partner of all of them."""
    samples = [Sample(f"same-{n}", ASK, chosen="Yes.", rejected=" No.") for n in range(20)]
    other = Sample("other", ASK, chosen="A dog.", rejected="A cat.")
    found = mismatched([*samples[:7], other, *samples[7:]], tmp_path / "set")
    assert {found[sample.key] for sample in samples} == {"A dog.", "A cat."}
    assert found["other"].strip() in ("Yes.", "No.")


def test_unpaired_answers_give_the_one_they_have(tmp_path: Path) -> None:
    """They share one ring with the pairs."""
    samples = tiny_samples(30, preference=True)
    halves = [
        dataclasses.replace(sample, chosen=None) if n % 2 else dataclasses.replace(sample, rejected=None)
        for n, sample in enumerate(samples[:20])
    ]
    mixed = [*halves, *samples[20:]]
    kept = {text for sample in mixed for text in (sample.chosen, sample.rejected) if text}
    found = mismatched(mixed, tmp_path / "set")
    assert set(found.values()) <= kept
    assert not any(found[sample.key] in (sample.chosen, sample.rejected) for sample in mixed)
    gone = [dataclasses.replace(s, chosen=s.chosen or s.rejected, rejected=s.rejected or s.chosen) for s in mixed]
    assert found == obvious(gone)


def test_a_set_without_another_response_is_refused(tmp_path: Path) -> None:
    write_set([Sample("alone", ASK, chosen="Yes.", rejected="No.")], tmp_path / "one")
    with pytest.raises(DataError, match=r"1 preference sample.*use a set of at least 2"):
        SampleSet.open(tmp_path / "one").with_mismatched()
    write_set([Sample(key, ASK, chosen="Yes.", rejected="No.") for key in "ab"], tmp_path / "same")
    paired = SampleSet.open(tmp_path / "same").with_mismatched()
    with pytest.raises(DataError, match=r"sample 'a' \(mismatched\): no other sample has a different response"):
        paired.read(0)


def test_conversations_have_none_and_a_pickled_set_keeps_its_pairs(tmp_path: Path) -> None:
    write_set([*tiny_samples(3), *tiny_samples(4, preference=True)], tmp_path / "mixed")
    plain = SampleSet.open(tmp_path / "mixed")
    paired = plain.with_mismatched()
    assert [paired.read(row).mismatched is None for row in range(7)] == [True] * 3 + [False] * 4
    assert paired.read(1) == plain.read(1)
    again = pickle.loads(pickle.dumps(paired))
    assert [again.read(row) for row in range(7)] == [paired.read(row) for row in range(7)]
    assert not plain.mismatched


def test_the_third_role_is_the_prompt_with_the_foreign_response() -> None:
    """The sample's own content is unchanged."""
    sample = tiny_samples(1, preference=True)[0]
    paired = dataclasses.replace(sample, mismatched="A dog.")
    assert (sample.roles, paired.roles) == (("chosen", "rejected"), ("chosen", "rejected", "mismatched"))
    assert paired.conversation("mismatched") == (*sample.turns, Turn("assistant", "A dog."))
    assert paired.content_hash == sample.content_hash
    tokenizer = tiny_tokenizer()
    encoder = SequenceEncoder(tokenizer, get_template("qwen"), image_token_id=399, image_tokens=9, max_length=512)
    sequences = [encoder.encode(paired, role) for role in paired.roles]
    first = [int(sequence.supervised_N[0]) for sequence in sequences]
    prompts = {tuple(s.input_ids_T[:at].tolist()) for s, at in zip(sequences, first, strict=True)}
    assert len(prompts) == 1
    assert tokenizer.decode(sequences[2].target_ids_N) == " A dog.<|endoftext|>"
    with pytest.raises(DataError, match="a conversation has no mismatched response"):
        dataclasses.replace(tiny_samples(1)[0], mismatched="A dog.")
