"""Whole captures by teachers that use their own processors, and what is refused by one line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from llavamod_offline.config import load_config
from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.errors import ConfigError, LlavaModError, ModelError
from llavamod_offline.families import open_family
from llavamod_offline.vllm.families import check_family
from teacher_cache.ask.model import AskedModel, AskedQuestion
from teacher_cache.audit.run import audit_cache
from teacher_cache.capture.run import run_capture
from teacher_cache.config import CacheTeacherConfig
from teacher_cache.plan.estimate import make_plan
from teacher_cache.read.reader import open_cache
from tests.tiny import tiny_image, tiny_samples
from tests.tiny_families import TINY_FAMILIES
from tests.tiny_teachers import write_tiny_causal_lm


def settings(teacher: Path, data: Path, output: Path, *overrides: str) -> CacheTeacherConfig:
    given = [f"data={data}", f"teacher={teacher}", f"output={output}", "device=cpu", *overrides]
    return load_config(CacheTeacherConfig, (), given)


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3", "smolvlm", "qwen3_5"])
def test_planned_captured_and_audited(tmp_path: Path, name: str) -> None:
    teacher = TINY_FAMILIES[name].write(tmp_path / "teacher")
    samples = tiny_samples(12)
    extreme = Sample(
        "extreme", (Turn("user", "<image>\nWhat?"), Turn("assistant", "No.")), (tiny_image(0, (900, 2)),), ("png",)
    )
    write_set([*samples, extreme], tmp_path / "set")
    config = settings(teacher, tmp_path / "set", tmp_path / "cache")
    plan = make_plan(config, samples=13, seconds=60)
    summary = run_capture(config)
    assert summary.rejected == 1
    assert "image 'extreme': 900×2 pixels" in (tmp_path / "cache" / "rejected.jsonl").read_text()
    assert plan.positions == pytest.approx(summary.positions, rel=0.01)
    cache = open_cache(tmp_path / "cache")
    assert cache.fingerprint["template"]["name"] == "tokenizer"
    assert (cache.fingerprint["images"]["tokens"], cache.fingerprint["images"]["aspect"]) == ("by size", "own")
    other = dataclasses.replace(config, batch_size=3)
    assert audit_cache(cache, other).ok
    again = run_capture(dataclasses.replace(config, output=str(tmp_path / "again"), workers=1))
    assert again.digest == summary.digest


def test_a_processor_of_another_model_is_one_line_that_names_the_folder(tmp_path: Path) -> None:
    """Its patches have another size, so the model cannot run on its output."""
    folder = TINY_FAMILIES["qwen3_vl"].write(tmp_path / "teacher")
    edit(folder / "preprocessor_config.json", patch_size=8)
    write_set(tiny_samples(4), tmp_path / "set")
    with pytest.raises(ModelError, match=rf"^{folder}: the model cannot take its processor's output: "):
        run_capture(settings(folder, tmp_path / "set", tmp_path / "cache"))
    with pytest.raises(ModelError, match="the model cannot take its processor's output"):
        AskedModel(str(folder), device="cpu")


def test_an_image_token_that_the_processor_does_not_write_is_refused(tmp_path: Path) -> None:
    folder = TINY_FAMILIES["internvl"].write(tmp_path / "teacher")
    edit(folder / "config.json", image_token_id=3)
    with pytest.raises(ModelError, match="image_token_id is 3, which its processor does not write for an image"):
        open_family(folder, "auto", image_aspect="auto", max_length=99)


@pytest.mark.parametrize(
    ("model_type", "problem"),
    [
        ("florence2", "florence2 is an encoder-decoder: choose a teacher that is a decoder"),
        ("molmo", "for which transformers has neither an image-text model nor a language model"),
    ],
)
def test_other_kinds_of_models_are_refused(tmp_path: Path, model_type: str, problem: str) -> None:
    folder = TINY_FAMILIES["qwen3_vl"].write(tmp_path / "teacher")
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "auto_map": {"AutoConfig": "code.C"}}))
    (folder / "code.py").write_text("raise SystemExit('this code must not run')")
    with pytest.raises(ModelError, match=problem) as caught:
        open_family(folder, "chatml", image_aspect="auto", max_length=99)
    assert "\n" not in str(caught.value)


def test_a_processor_that_is_code_in_the_folder_is_refused(tmp_path: Path) -> None:
    folder = TINY_FAMILIES["qwen3_vl"].write(tmp_path / "teacher")
    for name in ("processor_config.json", "preprocessor_config.json"):
        edit(folder / name, processor_class="TheirProcessor", auto_map={"AutoProcessor": "code.TheirProcessor"})
    (folder / "code.py").write_text("raise SystemExit('this code must not run')")
    with pytest.raises(ModelError, match="transformers has no processor TheirProcessor, and code in the"):
        open_family(folder, "chatml", image_aspect="auto", max_length=99)


def test_a_template_whose_tokens_the_tokenizer_lacks_is_refused(tmp_path: Path) -> None:
    folder = TINY_FAMILIES["qwen3_vl"].write(tmp_path / "teacher")
    with pytest.raises(LlavaModError, match=r"the tokenizer has no token '</s>', which template 'llava_v1' needs"):
        open_family(folder, "llava_v1", image_aspect="auto", max_length=99)


@pytest.mark.parametrize(
    ("name", "device", "reason"),
    [
        ("qwen3_5", "cpu", "its linear attention needs bfloat16 on a CPU"),
        ("gemma3", "cpu", r"its image tokens see one another, and vLLM's CPUPlatform\.get_attn_backend_cls chooses .*"),
        ("gemma3", "cuda", "its numbers there were not compared with those of transformers"),
        ("aya_vision", "cuda", r"vLLM 0\.32 has no model of this type"),
    ],
)
def test_vllm_is_refused_by_one_line_that_says_why(tmp_path: Path, name: str, device: str, reason: str) -> None:
    family = open_family(TINY_FAMILIES[name].write(tmp_path / "teacher"), "auto", image_aspect="auto", max_length=99)
    with pytest.raises(ConfigError, match=rf"no {name} by vLLM: {reason}: set the engine to hf \(engine\.kind=hf\)"):
        check_family(family, device=device)


def test_vllm_is_refused_for_a_language_model_whose_numbers_differ_there(tmp_path: Path) -> None:
    folder = write_tiny_causal_lm(tmp_path / "teacher", "lfm2", layer_types=["conv", "full_attention"])
    family = open_family(folder, "qwen", image_aspect="auto", max_length=99)
    with pytest.raises(ConfigError, match=r"no lfm2 by vLLM: its numbers there differ .* by a nat: set the engine to"):
        check_family(family, device="cuda")


def test_images_may_be_padded_to_squares_first(tmp_path: Path) -> None:
    folder = TINY_FAMILIES["qwen3_vl"].write(tmp_path / "teacher")
    own, padded = (open_family(folder, "auto", image_aspect=aspect, max_length=999) for aspect in ("auto", "pad"))
    turns = (Turn("user", "<image>a"), Turn("assistant", "b"))
    wide, square = (Sample("k", turns, (tiny_image(1, size),), ("png",)) for size in ((60, 20), (60, 60)))
    lengths = [[len(family.encode(s, "response").input_ids_T) for s in (wide, square)] for family in (own, padded)]
    assert lengths[0][0] < lengths[0][1] == lengths[1][0] == lengths[1][1]
    assert padded.describe_images()["aspect"] == "pad"
    assert padded.images(wide)[0].tokens == padded.images(square)[0].tokens


def test_a_question_without_and_with_images_is_answered(tmp_path: Path) -> None:
    model = AskedModel(str(TINY_FAMILIES["qwen3_vl"].write(tmp_path / "teacher")), device="cpu")
    (tmp_path / "a.png").write_bytes(tiny_image(1, (50, 40)))
    said = []
    for files in ([], [tmp_path / "a.png"], [tmp_path / "a.png"] * 2):
        question = AskedQuestion.read("What is it?", files)
        pieces: list[str] = []
        answer = model.answer(question, 8, pieces.append)
        assert "".join(pieces) == answer.text
        ids = [int(log_probs_V.argmax()) for log_probs_V in model.log_probs(question, [5, 6])]
        said.append((answer.text, tuple(ids)))
    assert len(set(said)) == 3
