"""What a student of another family cannot do is refused before anything is written, by one line with the remedy."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.errors import LlavaModError
from tests.tiny import tiny_image, tiny_samples, write_tiny_language_model, write_tiny_tower
from tests.train.conftest import World, write_cache
from tests.train.student.family_world import WRITERS
from train.run import train


@pytest.fixture(scope="module")
def qwen3_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return WRITERS["qwen3_vl"](tmp_path_factory.mktemp("refused") / "qwen3_vl")


@pytest.fixture(scope="module")
def everywhere(world: World, qwen3_vl: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache") / "all", world.chats, qwen3_vl, "capture.positions=all")


def refusal(world: World, tmp_path: Path, stage: str, *settings: str) -> str:
    with pytest.raises(LlavaModError) as caught:
        train(world.config(stage, tmp_path / "run", *settings))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["image_aspect=pad"], r"image_aspect: 'pad' is for LLaVA students alone, .*: set it to auto"),
        (["trainable=[experts]"], r"belongs to 'experts' \(it has none\).* parts, vision, projector, text, embeddings"),
        (["trainable=[text]", "optim.part_lr={vision: 1e-5}"], r"optim\.part_lr: no trained parameter .* 'vision'"),
        (["student.lora.targets=[attention.qkv]", "student.lora.rank=2", "trainable=[]"], r"attention has k_proj"),
        (["template=llava_v1"], r"no token '</s>', which template 'llava_v1' needs"),
    ],
)
def test_settings_that_the_family_lacks(
    world: World, qwen3_vl: Path, tmp_path: Path, settings: list[str], problem: str
) -> None:
    assert re.search(problem, refusal(world, tmp_path, "sft", f"student.checkpoint={qwen3_vl}", *settings))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", ["visual_kl_weight", "relation_weight"])
def test_terms_that_compare_image_tokens(
    world: World, qwen3_vl: Path, everywhere: Path, tmp_path: Path, key: str
) -> None:
    settings = [
        f"student.checkpoint={qwen3_vl}",
        f"cache.path={everywhere}",
        f"loss.align.{key}=1",
        "loss.positions=response",
    ]
    if key == "relation_weight":
        hidden = ("capture.positions=all", "capture.hidden=float16")
        settings[1] = f"cache.path={write_cache(tmp_path / 'hidden', world.chats, qwen3_vl, *hidden)}"
    assert f"loss.align.{key}: the number of this student's image tokens" in refusal(
        world, tmp_path, "mimic_dense", *settings
    )


def test_features_of_answers_are_aligned_all_the_same(world: World, qwen3_vl: Path, tmp_path: Path) -> None:
    cache = write_cache(tmp_path / "cache", world.chats, qwen3_vl, "capture.hidden=float16")
    settings = (f"student.checkpoint={qwen3_vl}", f"cache.path={cache}", "loss.align.feature_weight=1", "steps=1")
    assert train(world.config("mimic_dense", tmp_path / "run", *settings)).finished


def test_a_cache_of_all_positions_whose_images_were_others(world: World, everywhere: Path, tmp_path: Path) -> None:
    student = WRITERS["qwen3_vl"](tmp_path / "student")
    file = student / "preprocessor_config.json"
    changed = json.loads(file.read_text()) | {"size": {"shortest_edge": 256, "longest_edge": 1024}}
    file.write_text(json.dumps(changed))
    said = refusal(world, tmp_path, "mimic_dense", f"student.checkpoint={student}", f"cache.path={everywhere}")
    assert re.search(r"the teacher cache does not fit this student: .*images.*: use the teacher's template", said)


def test_sparse_forms_that_transformers_has_not(world: World, tmp_path: Path) -> None:
    student = WRITERS["gemma3"](tmp_path / "gemma3")
    cache = write_cache(tmp_path / "cache", world.chats, student)
    said = refusal(world, tmp_path, "mimic_sparse", f"student.checkpoint={student}", f"cache.path={cache}")
    assert "a 'gemma3_text' text model cannot be made sparse" in said


def test_a_language_model_is_no_student_alone(world: World, tmp_path: Path) -> None:
    text = write_tiny_language_model(tmp_path / "text")
    said = refusal(world, tmp_path, "sft", f"student.checkpoint={text}")
    assert re.search(r"^student\.checkpoint: .* is a language model .*set student\.language_model to it, and", said)


QUANTISED: dict[str, dict[str, object]] = {
    "fp8": {"activation_scheme": "dynamic", "weight_block_size": [32, 32]},
    "awq": {"bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
    "gptq": {"bits": 4, "group_size": 32},
    "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "compressed-tensors": {"format": "pack-quantized", "config_groups": {}},
    "torchao": {"quant_type": "int4_weight_only"},
}


@pytest.mark.parametrize("method", QUANTISED)
@pytest.mark.parametrize("part", ["checkpoint", "language_model", "vision_tower"])
def test_quantised_weights_are_no_start(world: World, tmp_path: Path, method: str, part: str) -> None:
    """Even those that transformers would load and dequantise to full precision."""
    writers: dict[str, Callable[[Path], Path]] = {
        "checkpoint": lambda folder: WRITERS["qwen3_vl"](folder),
        "language_model": write_tiny_language_model,
        "vision_tower": write_tiny_tower,
    }
    parts = ["checkpoint"] if part == "checkpoint" else ["language_model", "vision_tower"]
    folders = {name: writers[name](tmp_path / name) for name in parts}
    config = folders[part] / "config.json"
    quantised = {"quant_method": method, **QUANTISED[method]}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": quantised}))
    settings = [f"student.{name}={folder}" for name, folder in folders.items()]
    cleared = [] if part == "checkpoint" else ["student.checkpoint=null"]
    said = refusal(world, tmp_path, "align" if cleared else "sft", *cleared, *settings)
    assert said.startswith(f"student.{part}: {folders[part]}: its weights are quantised ({method}), ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("policy", ["error", "drop"])
def test_samples_that_are_too_long_are_found_before_the_first_step(
    world: World, qwen3_vl: Path, tmp_path: Path, policy: str
) -> None:
    """By their image tokens, whose number the text does not show."""
    turns = (Turn("user", "<image>\n<image>\n<image>\nWhat?"), Turn("assistant", "No."))
    images = tuple(tiny_image(number, (400, 300)) for number in range(3))
    write_set([*tiny_samples(12), Sample("large", turns, images, ("png",) * 3)], tmp_path / "set")
    settings: tuple[str, ...] = (f"data.set={tmp_path / 'set'}", f"student.checkpoint={qwen3_vl}", "steps=1")
    settings += (f"data.too_long={policy}", "batch.global_size=4", "max_length=100")
    if policy == "drop":
        assert train(world.config("sft", tmp_path / "run", *settings)).samples_too_long == 1
        assert '"large"' in (tmp_path / "run" / "rejected.jsonl").read_text()
    else:
        said = refusal(world, tmp_path, "sft", *settings)
        assert re.search("'large': .* tokens, more than max_length 100: set data.too_long=drop", said)


def test_a_sample_that_the_family_cannot_take_is_named_before_the_first_step(
    world: World, qwen3_vl: Path, tmp_path: Path
) -> None:
    turns = (Turn("user", "<image>\nWhat?"), Turn("assistant", "No."))
    write_set([*tiny_samples(12), Sample("thin", turns, (tiny_image(0, (900, 2)),), ("png",))], tmp_path / "set")
    said = refusal(world, tmp_path, "sft", f"data.set={tmp_path / 'set'}", f"student.checkpoint={qwen3_vl}")
    assert "'thin'" in said


def test_a_paligemma_takes_samples_of_one_image_and_answer(world: World, tmp_path: Path) -> None:
    """Its prompts get bidirectional attention, and it has no chat template."""
    student = WRITERS["paligemma"](tmp_path / "paligemma")
    said = refusal(world, tmp_path, "sft", f"student.checkpoint={student}")
    assert re.search(r"sample 'tiny-\d+' \(response\): it has (no image|several answers)", said)
    fitting = [sample for sample in tiny_samples(24) if sample.images and len(sample.turns) == 2]
    write_set(fitting, tmp_path / "set")
    cache = write_cache(tmp_path / "cache", tmp_path / "set", student)
    settings = (f"student.checkpoint={student}", f"data.set={tmp_path / 'set'}", f"cache.path={cache}", "steps=2")
    assert train(world.config("mimic_dense", tmp_path / "run", *settings)).finished
