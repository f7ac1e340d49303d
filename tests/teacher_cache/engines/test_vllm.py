"""The vLLM engines against the Hugging Face engine, on a CPU: the same teachers give the same records."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llavamod_offline.data.encode.template import get_template
from llavamod_offline.data.encode.tokenize import Positions
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.errors import ConfigError, ModelError
from llavamod_offline.families import open_family
from llavamod_offline.families.llava.checkpoint import load_llava
from llavamod_offline.families.llava.export import save_llava
from llavamod_offline.vllm import plugin as plain
from llavamod_offline.vllm.session import Session
from teacher_cache.format.record import Records, RecordSettings
from teacher_cache.format.rejection import Rejection
from teacher_cache.format.schema import HiddenPositions
from teacher_cache.format.sequences import SequenceRecord
from teacher_cache.visual.second_pass import blank_requests, drop_images, targets_alone, with_advantages
from tests.teacher_cache.engines.vllm_world import HEAD_OF_32, TOLERANCE, Start, World, assert_same
from tests.tiny import tiny_image, tiny_samples, write_tiny_llava
from tests.vllm_cpu import NEEDS_VLLM, SETTINGS

pytestmark = NEEDS_VLLM


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # An LM head with more rows than the tokenizer has ids: the surplus must not enter any distribution.
    return write_tiny_llava(tmp_path_factory.mktemp("vllm") / "teacher", hidden=HEAD_OF_32, head_rows=448)


@pytest.fixture(scope="module")
def world(start: Start, folder: Path) -> World:
    return start(folder)


def _toy_samples() -> list[Sample]:
    return [*tiny_samples(100, seed=1), *tiny_samples(50, seed=2, preference=True)]


def test_two_hundred_sequences_get_the_records_of_the_hugging_face_engine(world: World) -> None:
    samples = _toy_samples()
    assert {0, 1, 2} <= {len(sample.images) for sample in samples}
    captured = world.capture(world.vllm(), samples)
    assert len(captured) == 200
    assert_same(world.capture(world.hf(), samples), captured)


def test_pictures_reach_the_model_as_they_are(world: World) -> None:
    """The same question about other pixels gives other records: the comparison above is not blind to images."""
    turns = (Turn("user", "<image>\nWhat?"), Turn("assistant", "It is a red circle."))
    pictures = [tiny_image(seed, size) for seed, size in ((1, (32, 24)), (2, (32, 24)), (1, (24, 32)))]
    samples = [Sample(f"p{number}", turns, (image,), ("png",)) for number, image in enumerate(pictures)]
    captured = world.capture(world.vllm(), samples)
    assert_same(world.capture(world.hf(), samples), captured)
    seen = [captured[f"p{number}", "response"].records.target_log_probs_N for number in range(3)]
    assert min(np.abs(seen[0] - seen[1]).max(), np.abs(seen[0] - seen[2]).max()) > 100 * TOLERANCE


@pytest.mark.parametrize(("positions", "hidden"), [("all", "recorded"), ("all", "image"), ("response", "recorded")])
def test_all_positions_and_hidden_states(world: World, positions: Positions, hidden: HiddenPositions) -> None:
    samples = [*tiny_samples(8, seed=3), *tiny_samples(3, seed=3, preference=True)]
    settings = {"positions": positions, "hidden_positions": hidden}
    expected, captured = world.capture(world.hf(**settings), samples), world.capture(world.vllm(**settings), samples)
    assert_same(expected, captured)
    for name, one in expected.items():
        other = captured[name]
        assert one.hidden is not None
        assert other.hidden is not None
        assert np.array_equal(one.hidden.rows_M, other.hidden.rows_M)
        if len(one.hidden.rows_M):
            assert np.allclose(one.hidden.states_MD, other.hidden.states_MD, rtol=0, atol=TOLERANCE)


def test_settings_of_a_copy_are_its_own(world: World) -> None:
    """A plan captures the same samples with several settings."""
    samples = tiny_samples(3, seed=4)
    engine = world.vllm()
    engine.settings = RecordSettings(1.0, world.vocab_size, 0, 1.0, ())
    for record in world.capture(engine, samples).values():
        assert (record.records.topk_counts_N == world.vocab_size).all()
        assert np.isneginf(record.records.tail_log_mass_N).all()


@pytest.mark.parametrize("kind", ["blank", "drop"])
def test_what_images_are_worth(world: World, kind: str) -> None:
    """Log-probs of the same answers without the images' content, from a second run of the same engine."""
    samples = [sample for sample in tiny_samples(12, seed=4) if sample.images]
    shown = world.requests(samples)
    if kind == "blank":
        bare = blank_requests(shown, 2)
    else:
        bare = [drop_images(request, world.teacher.encode)[0] for request in shown]
    advantages = []
    for engine in (world.hf(), world.vllm()):
        captured = [outcome for outcome in engine.capture(shown) if isinstance(outcome, SequenceRecord)]
        keys = {sample.key for sample in samples}
        found, rejected = with_advantages(captured, targets_alone(engine).capture(bare), keys)
        assert not rejected
        advantages.append({record.key: record.advantages_N for record in found})
    ours, theirs = advantages
    assert ours.keys() == theirs.keys() == {sample.key for sample in samples}
    codes = [(ours[key], theirs[key]) for key in ours]
    assert all(one is not None and other is not None for one, other in codes)
    apart = np.concatenate([np.abs(one.astype(int) - other.astype(int)) for one, other in codes])  # type: ignore[union-attr]
    assert apart.max() <= 1  # on the boundary between two codes
    assert (apart > 0).mean() < 0.02
    assert len(np.unique(np.concatenate([one for one, _ in codes]))) > 3


def test_a_capture_made_again_is_the_same(world: World) -> None:
    samples = [*tiny_samples(6, seed=5), *tiny_samples(6, seed=5, preference=True)]
    engine = world.vllm()
    first, second = world.capture(engine, samples), world.capture(engine, samples)
    assert list(first) == list(second)
    for name, one in first.items():
        for field in dataclasses.fields(Records):
            left, right = getattr(one.records, field.name), getattr(second[name].records, field.name)
            assert np.array_equal(left, right), (name, field.name)


def test_samples_that_cannot_be_used_are_rejected_alone(world: World) -> None:
    """A broken image, and an id beyond the vocabulary, with the same reasons as in the Hugging Face engine."""
    samples = tiny_samples(6, seed=6, preference=True)
    assert samples[1].images
    broken = dataclasses.replace(samples[1], images=(b"\x89PNG broken",))
    requests = world.requests(samples)
    first = requests[2].sequences[0]
    ids = first.input_ids_T.copy()
    ids[first.supervised_N[0]] = world.vocab_size + 3
    sequences = (dataclasses.replace(first, input_ids_T=ids), *requests[2].sequences[1:])
    requests[2] = dataclasses.replace(requests[2], sequences=sequences)

    requests[1] = dataclasses.replace(requests[1], sample=broken)
    outcomes = [{(o.key, o.role): o for o in e.capture(requests)} for e in (world.hf(), world.vllm())]
    for found in outcomes:
        rejected = {name for name, outcome in found.items() if isinstance(outcome, Rejection)}
        assert rejected == {(samples[1].key, "chosen"), (samples[1].key, "rejected"), (samples[2].key, "chosen")}
    for name, outcome in outcomes[0].items():
        if isinstance(outcome, Rejection):
            assert outcome == outcomes[1][name]
    records = [{n: o for n, o in found.items() if isinstance(o, SequenceRecord)} for found in outcomes]
    assert_same(*records)


def test_a_defect_while_images_are_prepared_is_no_rejection(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = tiny_samples(4, seed=6)

    def images(sample: Sample) -> Any:
        raise RuntimeError("disk on fire")

    with monkeypatch.context() as patched:
        patched.setattr(world.teacher, "images", images)
        with pytest.raises(RuntimeError, match="disk on fire"):
            list(world.vllm().capture(world.requests(samples)))
    assert len(world.capture(world.vllm(), samples)) == 4


def test_a_prompt_that_vllm_changes_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    step = world.session.engine.step

    def expanding() -> list[Any]:
        outputs: list[Any] = step()
        for output in outputs:
            output.prompt_token_ids = [*output.prompt_token_ids, 0]
        return outputs

    samples = tiny_samples(30, seed=7)
    with monkeypatch.context() as patched:
        patched.setattr(world.session.engine, "step", expanding)
        with pytest.raises(ModelError, match=r"sample 'tiny-\d+': vLLM ran a prompt of \d+ tokens, ours has \d+"):
            world.capture(world.vllm(), samples)
    # Nothing is left behind for the next capture.
    assert not world.session.engine.has_unfinished_requests()
    assert_same(world.capture(world.hf(), samples), world.capture(world.vllm(), samples))


def test_a_picture_that_takes_other_tokens_in_vllm_is_refused(start: Start, folder: Path) -> None:
    """As when vLLM reads a configuration differently: our sequences have 8 tokens for an image that has 9 there."""
    world = start(folder)
    teacher = world.teacher
    images = teacher.images
    teacher.encoder.image_tokens = 8
    teacher.images = lambda sample: [dataclasses.replace(p, tokens=8) for p in images(sample)]  # type: ignore[method-assign]
    with pytest.raises(ModelError, match=r"vLLM makes \[9.*\] tokens from images that take \[8.*\] in our sequences"):
        world.capture(world.vllm(), tiny_samples(1, seed=7))


def test_prompts_in_pieces_and_prefixes_from_the_cache(start: Start, folder: Path) -> None:
    """Steps of at most 48 tokens, in blocks of 32: nearly every prompt is split, images too."""
    world = start(folder, dataclasses.replace(SETTINGS, max_num_batched_tokens=48, max_num_seqs=4, block_size=32))
    long = " ".join(["Which colour has the large square on the left?"] * 6)
    samples = [*tiny_samples(12, seed=8), *(_with_prompt(s, long) for s in tiny_samples(12, seed=8, preference=True))]
    expected = world.capture(world.hf(), samples)
    cached = _watch(world)
    engine = world.vllm()
    assert_same(expected, world.capture(engine, samples))
    reused = [name for name, tokens in cached.items() if tokens]
    assert len(reused) >= 6
    assert {tokens % 32 for tokens in cached.values()} == {0}
    assert sum(cached.values()) > 32 * len(reused)
    # If a recorded row may lie in the shared prefix, it is computed again, and the engine must notice by itself.
    engine._may_share = lambda first, second: True  # type: ignore[method-assign]
    engine.positions = "all"
    runs = _watch_runs(world)
    both = world.hf(positions="all")
    assert_same(world.capture(both, samples), world.capture(engine, samples))
    assert runs[-1] >= 6


def test_a_prompt_that_is_begun_again_counts_once() -> None:
    """vLLM may preempt a request and recompute its rows, starting from any of them."""
    from teacher_cache.engines.vllm.pooler import _keep

    wanted_N = np.array([2, 3, 6, 7, 9])
    rows_TD = torch.arange(10.0)[:, None]
    parts: list[tuple[int, torch.Tensor]] = []
    for start, stop in ((0, 5), (5, 8), (0, 3), (3, 3), (3, 7), (7, 10)):
        _keep(parts, wanted_N, rows_TD[start:stop] + 100 * (stop > 9), start)
    assert torch.cat([rows for _, rows in parts])[:, 0].tolist() == [2, 3, 6, 107, 109]


def _with_prompt(sample: Sample, text: str) -> Sample:
    turns = (Turn("user", f"{sample.turns[0].text} {text}"), *sample.turns[1:])
    return dataclasses.replace(sample, turns=turns)


def _watch(world: World) -> dict[str, int]:
    """Record how many tokens each request takes from the prefix cache, by request number."""
    cached: dict[str, int] = {}
    step = world.session.engine.step

    def watched() -> Any:
        outputs = step()
        cached.update({output.request_id: output.num_cached_tokens for output in outputs})
        return outputs

    world.session.engine.step = watched
    return cached


def _watch_runs(world: World) -> list[int]:
    """Record how many requests each call of `run` submits."""
    counts: list[int] = []
    run = world.session.run

    def watched(requests: Any) -> Any:
        counts.append(0)
        number = len(counts) - 1

        def counted() -> Iterator[Any]:
            for request in requests:
                counts[number] += 1
                yield request

        return run(counted())

    world.session.run = watched  # type: ignore[method-assign]
    return counts


def test_a_sequence_with_logits_that_are_not_finite_is_rejected_alone(start: Start, tmp_path: Path) -> None:
    """One token's embedding is NaN in the checkpoint: only sequences that contain it are lost, in either engine."""
    sound = write_tiny_llava(tmp_path / "sound", hidden=HEAD_OF_32, tied=False)
    model = load_llava(sound)
    teacher = open_family(sound, get_template("qwen"), image_aspect="pad", max_length=512)
    poison = teacher.encoder.tokenizer("purple zebra", add_special_tokens=False)["input_ids"][-1]
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = float("nan")
    save_llava(model, tmp_path / "ill", tokenizer=teacher.encoder.tokenizer, processor_source=sound)
    world = start(tmp_path / "ill")
    bad = Sample("bad", (Turn("user", "purple zebra?"), Turn("assistant", "A purple zebra.")))
    samples = [*tiny_samples(8, seed=5), bad]
    outcomes = [world.outcomes(engine, samples) for engine in (world.hf(), world.vllm())]
    for found in outcomes:
        rejected = [outcome for outcome in found if isinstance(outcome, Rejection)]
        assert [item.key for item in rejected] == ["bad"]
        assert "not finite (NaN or inf), first at position" in rejected[0].reason
    assert_same(*({(o.key, o.role): o for o in found if isinstance(o, SequenceRecord)} for found in outcomes))


def test_what_vllm_cannot_run_is_one_line(start: Start, folder: Path, tmp_path: Path) -> None:
    for device, problem in (("cuda", "this vLLM runs only on 'cpu': set device=cpu"), ("cpu:1", "set device=cpu and")):
        with pytest.raises(ConfigError, match=f"device '{device}': .*{problem}"):
            Session(folder, SETTINGS, prefix="", register=plain.register, dtype="float32", device=device, max_length=64)
    torn = shutil.copytree(folder, tmp_path / "torn")
    with safe_open(torn / "model.safetensors", "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys() if "layers.1.mlp" not in name}  # noqa: SIM118
    save_file(tensors, torn / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"torn: tensors: \d+ missing tensors?, first '.*layers\.1\.mlp"):
        start(torn)
    thin = start(write_tiny_llava(tmp_path / "thin", hidden=HEAD_OF_32 // 2))
    with pytest.raises(ModelError, match=r"vLLM failed: Unsupported CPU attention .*head_dim=16.*: use the engine hf"):
        thin.capture(thin.vllm(), tiny_samples(1))
    unknown = shutil.copytree(folder, tmp_path / "unknown")
    config = json.loads((unknown / "config.json").read_text())
    (unknown / "config.json").write_text(json.dumps({**config, "architectures": ["NewModel"]}))
    with pytest.raises(ModelError, match=r"unknown/config\.json: vLLM has no model for architectures \['NewModel'\]"):
        start(unknown)
