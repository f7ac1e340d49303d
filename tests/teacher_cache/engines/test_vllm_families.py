"""Every family of teachers in vLLM on a CPU, and the fallback for those that cannot be wrapped."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch

from llavamod_offline import toyworld
from llavamod_offline.data.encode.template import get_template
from llavamod_offline.data.encode.tokenize import Positions
from llavamod_offline.errors import ModelError
from llavamod_offline.families import open_family
from llavamod_offline.families.llava.checkpoint import load_llava
from llavamod_offline.families.llava.export import save_llava
from llavamod_offline.models.upcycle import upcycle
from llavamod_offline.vllm import plugin as plain
from llavamod_offline.vllm.families import EQUAL, check_family
from llavamod_offline.vllm.heads import check_same_head
from teacher_cache.engines.vllm.logprobs import PromptLogprobs
from teacher_cache.format.record import RecordSettings
from teacher_cache.format.rejection import Rejection
from tests.teacher_cache.engines.vllm_world import (
    HEAD_OF_32,
    Start,
    assert_listed,
    assert_same,
    start_world,
)
from tests.tiny import tiny_samples, write_tiny_llava
from tests.tiny_families import TINY_FAMILIES
from tests.tiny_teachers import (
    write_tiny_causal_lm,
    write_tiny_llava_llama,
    write_tiny_onevision,
    write_tiny_qwen_vl,
)
from tests.vllm_cpu import NEEDS_VLLM

pytestmark = NEEDS_VLLM


def _sparse_llava(folder: Path) -> Path:
    dense = write_tiny_llava(folder.parent / "dense", hidden=HEAD_OF_32)
    tokenizer = open_family(dense, get_template("qwen"), image_aspect="pad", max_length=64).encoder.tokenizer
    model = upcycle(load_llava(dense), layers="sparse", num_experts=4, top_k=2, seed=0)
    with torch.no_grad():  # make experts differ, so that the router's choice shows
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
    save_llava(model, folder, tokenizer=tokenizer, processor_source=dense)
    return folder


FAMILIES: dict[str, Callable[[Path], Path]] = {
    "toy_world": lambda folder: Path(toyworld.__file__).parent / "checkpoints" / "teacher",
    "llava_qwen2_moe": _sparse_llava,
    "llava_llama": write_tiny_llava_llama,
    "qwen2_vl": lambda folder: write_tiny_qwen_vl(folder, "2"),
    "qwen2_5_vl": lambda folder: write_tiny_qwen_vl(folder, "2.5"),
    "llava_onevision": write_tiny_onevision,
    "qwen2": write_tiny_causal_lm,
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_of_teachers(start: Start, tmp_path: Path, family: str) -> None:
    world = start(FAMILIES[family](tmp_path / "teacher"))
    samples = [*tiny_samples(16, seed=9), *tiny_samples(8, seed=9, preference=True)]
    if world.teacher.image_token_id is None:
        samples = [sample for sample in samples if not sample.images]
    assert_same(world.capture(world.hf(), samples), world.capture(world.vllm(), samples))


ALONE = "qwen3_vl_moe"  # vLLM sets up expert grouping once per process, for the first model if it has experts


@pytest.mark.parametrize("family", [family for family in EQUAL if family != ALONE])
def test_families_that_run_by_their_own_processors(start: Start, tmp_path: Path, family: str) -> None:
    """vLLM's processor of the family turns their images into arrays and tokens, in rows, columns and tiles."""
    folder = TINY_FAMILIES["pixtral" if family == "llava" else family].write(tmp_path / "teacher")
    if family == "cohere2_vision":  # with any other scale, `check_same_head` refuses it
        _edit_text_config(folder, logit_scale=1.0)
    world = start(folder, template="auto")
    check_family(world.teacher, device="cpu")
    check_same_head(folder)
    samples = [*tiny_samples(16, seed=9), *tiny_samples(8, seed=9, preference=True)]
    assert {0, 1, 2} <= {len(sample.images) for sample in samples}
    assert_same(world.capture(world.hf(), samples), world.capture(world.vllm(), samples))


def test_a_mixture_of_experts_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Its experts are stored as transformers 5 writes them, which differs from Qwen's published checkpoints."""
    folder = TINY_FAMILIES[ALONE].write(tmp_path / "teacher")
    process = get_context("spawn").Process(target=_compare, args=(folder,))
    process.start()
    process.join()
    assert process.exitcode == 0


def _compare(folder: Path) -> None:
    world = start_world(folder, template="auto")
    check_family(world.teacher, device="cpu")
    samples = [*tiny_samples(16, seed=9), *tiny_samples(8, seed=9, preference=True)]
    assert_same(world.capture(world.hf(), samples), world.capture(world.vllm(), samples))


@pytest.mark.parametrize("family", ["qwen3_vl", "smolvlm"])
def test_a_head_that_differs_from_what_it_is_tied_to_is_used(start: Start, tmp_path: Path, family: str) -> None:
    """As in transformers, whatever config.json says."""
    folder = TINY_FAMILIES[family].write(tmp_path / "teacher")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    _edit_text_config(folder, tie_word_embeddings=True)
    world = start(folder, template="auto")
    samples = tiny_samples(8, seed=9)
    assert_same(world.capture(world.hf(), samples), world.capture(world.vllm(), samples))


def _edit_text_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def test_an_image_that_vllm_would_write_differently_is_refused(start: Start, tmp_path: Path) -> None:
    world = start(TINY_FAMILIES[EQUAL[-1]].write(tmp_path / "teacher"), template="auto")
    sample = next(sample for sample in tiny_samples(8, seed=9) if sample.images)
    requests = world.requests([sample])
    ids = requests[0].sequences[0].input_ids_T.copy()
    ids[np.flatnonzero(ids == world.teacher.image_token_id)[0]] = 5
    sequences = (dataclasses.replace(requests[0].sequences[0], input_ids_T=ids),)
    with pytest.raises(ModelError, match=f"sample '{sample.key}': vLLM finds tokens of 0 of its .*: use the engine hf"):
        list(world.vllm().capture([dataclasses.replace(requests[0], sequences=sequences)]))


def test_the_fallback_gives_heads_masses_and_target_log_probs(start: Start, tmp_path: Path) -> None:
    folder = write_tiny_llava(tmp_path / "teacher", hidden=HEAD_OF_32)
    world = start(folder, models=plain, runner="generate", max_logprobs=-1)
    kept = RecordSettings(1.0, 12, 0, 1.0, ())
    samples = [*tiny_samples(20, seed=10), *tiny_samples(6, seed=10, preference=True)]
    modes: tuple[Positions, ...] = ("response", "all")
    for positions in modes:
        expected = world.capture(world.hf(kept=kept, positions=positions), samples)
        found = world.capture(world.vllm(kept=kept, channel=PromptLogprobs(), positions=positions), samples)
        assert all((one.records.entropy_N > 0).all() for one in found.values())
        assert_listed(expected, found)
    longest = max(len(s.input_ids_T) for r in world.requests(samples) for s in r.sequences)
    world.session.longest = longest - 1  # as if the checkpoint allowed no more
    outcomes = world.outcomes(world.vllm(kept=kept, channel=PromptLogprobs()), samples)
    reasons = {outcome.reason for outcome in outcomes if isinstance(outcome, Rejection)}
    assert reasons == {f"{longest} tokens, vLLM takes {longest - 1} here"}


def test_the_fallback_records_all_ids_beside_rows_beyond_the_tokenizer(start: Start, tmp_path: Path) -> None:
    world = start(
        write_tiny_llava(tmp_path / "teacher", hidden=HEAD_OF_32, head_rows=448),
        models=plain,
        runner="generate",
        max_logprobs=-1,
    )
    kept = RecordSettings(1.0, world.vocab_size, 0, 1.0, ())
    samples = tiny_samples(8, seed=10)
    found = world.capture(world.vllm(kept=kept, channel=PromptLogprobs()), samples)
    assert all((one.records.topk_counts_N == world.vocab_size).all() for one in found.values())
    assert_same(world.capture(world.hf(kept=kept), samples), found)
