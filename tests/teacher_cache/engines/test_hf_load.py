"""Loading a teacher for the Hugging Face engine: effects of settings, and what is refused before the first batch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llavamod_offline.config import load_config
from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.errors import ConfigError, ModelError
from teacher_cache.capture.run import run_capture
from teacher_cache.capture_setup import prepare_capture
from teacher_cache.config import CacheTeacherConfig
from teacher_cache.engines.hf import HfCaptureEngine
from teacher_cache.engines.hf_load import load_engine
from teacher_cache.read.reader import open_cache
from tests.tiny import write_tiny_set
from tests.tiny_teachers import write_tiny_causal_lm, write_tiny_qwen_vl

_HAS_ACCELERATE = importlib.util.find_spec("accelerate") is not None


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("load")
    return write_tiny_qwen_vl(folder / "teacher"), write_tiny_set(folder / "pairs", 6, preference=True)


@pytest.fixture
def settings(world: tuple[Path, Path], tmp_path: Path) -> Callable[..., CacheTeacherConfig]:
    def make(name: str = "cache", *overrides: str, teacher: Path = world[0]) -> CacheTeacherConfig:
        given = [f"data={world[1]}", f"teacher={teacher}", f"output={tmp_path / name}", "template=chatml"]
        return load_config(CacheTeacherConfig, (), [*given, "capture.preset=exhaustive", *overrides])

    return make


def _load(config: CacheTeacherConfig) -> HfCaptureEngine:
    return load_engine(prepare_capture(**config.setup_values))


def _sums(config: CacheTeacherConfig) -> list[float]:
    run_capture(config)
    cache = open_cache(config.output)
    return [cache.sequence(f"pair-{n:04d}", role).sum_log_prob for n in range(6) for role in ("chosen", "rejected")]


def test_roles_share_their_prompt_where_the_decoder_lets_them(settings: Callable[..., CacheTeacherConfig]) -> None:
    assert _load(settings()).shared_prompts
    eager = _load(settings("eager", "engine.attention=eager"))
    assert not eager.shared_prompts
    assert eager.model.get_decoder().config._attn_implementation == "eager"


def test_attention_is_a_matter_of_rounding_and_of_the_fingerprint(settings: Callable[..., CacheTeacherConfig]) -> None:
    """With rows of their own and with shared rows: eager attention shares none."""
    plain, eager = settings("plain"), settings("eager", "engine.attention=eager")
    assert np.allclose(_sums(plain), _sums(eager), atol=1e-3)
    assert "attention" not in prepare_capture(**plain.setup_values).fingerprint["engine"]
    assert prepare_capture(**eager.setup_values).fingerprint["engine"]["attention"] == "eager"


def test_compiling_is_a_matter_of_the_fingerprint(settings: Callable[..., CacheTeacherConfig]) -> None:
    """In half precision, fused operations are not rounded in between."""
    assert "compile" not in prepare_capture(**settings().setup_values).fingerprint["engine"]
    assert (
        prepare_capture(**settings("compiled", "engine.compile=true").setup_values).fingerprint["engine"]["compile"]
        is True
    )


def test_a_sliding_window_shares_no_rows(settings: Callable[..., CacheTeacherConfig], tmp_path: Path) -> None:
    """Our own mask would not apply the window."""
    from transformers import AutoConfig

    folder = write_tiny_causal_lm(tmp_path / "teacher")
    assert _load(settings("whole", teacher=folder)).shared_prompts
    config = AutoConfig.from_pretrained(folder)
    config.use_sliding_window, config.sliding_window, config.max_window_layers = True, 8, 0
    config.layer_types = ["sliding_attention", "full_attention"]
    config.save_pretrained(folder)
    assert not _load(settings("sliding", teacher=folder)).shared_prompts


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
def test_a_compiled_decoder_says_the_same(
    settings: Callable[..., CacheTeacherConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced as on a GPU, but run without code generation, which takes a minute."""
    compiled_by = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda model, **given: compiled_by(model, backend="aot_eager", **given)
    )
    folder = write_tiny_causal_lm(tmp_path / "teacher")
    turns = (Turn("user", "How many?"),)
    write_set([Sample(f"pair-{n}", turns, (), (), "One.", "One or two.") for n in range(3)], tmp_path / "set")
    sums = []
    for name, compiled in (("plain", "false"), ("fast", "true")):
        chosen = (f"data={tmp_path / 'set'}", f"engine.compile={compiled}", "batch_size=6")
        run_capture(settings(name, *chosen, teacher=folder))
        cache = open_cache(str(tmp_path / name))
        sums.append([cache.sequence(f"pair-{n}", "rejected").sum_log_prob for n in range(3)])
    assert np.allclose(sums[0], sums[1], atol=1e-3)


def test_logits_that_are_more_than_a_head_are_refused(
    settings: Callable[..., CacheTeacherConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as capped or scaled logits: the LM head's output would not be the teacher's distribution."""
    from transformers import Qwen2ForCausalLM

    folder = write_tiny_causal_lm(tmp_path / "teacher")
    forward = Qwen2ForCausalLM.forward

    def capped(self: Any, **inputs: Any) -> Any:
        output = forward(self, **inputs)
        output.logits = 2.0 * torch.tanh(output.logits / 2.0)
        return output

    _load(settings("sound", teacher=folder))
    monkeypatch.setattr(Qwen2ForCausalLM, "forward", capped)
    with pytest.raises(ModelError, match="the logits of Qwen2ForCausalLM are not those of its LM head"):
        _load(settings("capped", teacher=folder))


@pytest.mark.skipif(not _HAS_ACCELERATE, reason="needs accelerate")
def test_a_device_map_changes_nothing(settings: Callable[..., CacheTeacherConfig]) -> None:
    assert np.allclose(_sums(settings("plain")), _sums(settings("mapped", "engine.device_map=auto")), atol=1e-5)


@pytest.mark.skipif(not _HAS_ACCELERATE, reason="needs accelerate")
def test_a_model_in_several_places_says_the_same(
    settings: Callable[..., CacheTeacherConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Parts offloaded to disk stand in for parts on other GPUs: both work through hooks."""
    from teacher_cache.engines import hf_load

    far = ("model.visual.blocks.1", "model.language_model.layers.1")
    near = ("model.visual.patch_embed", "model.visual.rotary_pos_emb", "model.visual.blocks.0", "model.visual.merger")
    decoder = ("embed_tokens", "layers.0", "norm", "rotary_emb")
    places = {
        **dict.fromkeys(far, "disk"),
        **dict.fromkeys((*near, *(f"model.language_model.{name}" for name in decoder), "lm_head"), "cpu"),
    }
    chosen = hf_load._load_settings
    plain, mapped = _sums(settings("plain")), settings("mapped", "engine.device_map=auto")
    monkeypatch.setattr(
        hf_load,
        "_load_settings",
        lambda *given: {**chosen(*given), "device_map": places, "offload_folder": str(tmp_path / "offloaded")},
    )
    model = _load(mapped).model
    assert {str(p.device) for p in model.get_decoder().layers[1].parameters()} == {"meta"}
    assert np.allclose(plain, _sums(mapped), atol=1e-5)
    places["lm_head"] = "disk"
    with pytest.raises(ModelError, match="the LM head does not fit on the devices"):
        _load(mapped)


@pytest.mark.parametrize(
    ("overrides", "missing", "problem"),
    [
        (
            ("engine.device_map=auto",),
            "accelerate",
            r"engine\.device_map is 'auto', which needs the package accelerate",
        ),
        (("engine.attention=flash_attention_2",), "flash_attn", "which needs the package flash-attn: pip install"),
    ],
)
def test_a_missing_package_is_named_with_its_setting(
    settings: Callable[..., CacheTeacherConfig],
    monkeypatch: pytest.MonkeyPatch,
    overrides: tuple[str, ...],
    missing: str,
    problem: str,
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == missing else found(name))
    with pytest.raises(ConfigError, match=problem):
        _load(settings("cache", *overrides))


def test_flash_attention_needs_a_gpu(
    settings: Callable[..., CacheTeacherConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: found("json" if name == "flash_attn" else name))
    with pytest.raises(ConfigError, match=r"needs a GPU and dtype=bfloat16 or float16: use sdpa"):
        _load(settings("cache", "engine.attention=flash_attention_2"))


@pytest.mark.parametrize("setting", ["engine.attention=paged", "engine.device_map=balanced", "image_aspect=tall"])
def test_unknown_choices_are_refused(settings: Callable[..., CacheTeacherConfig], setting: str) -> None:
    with pytest.raises(ConfigError, match=r": must be (one of|auto, or null)"):
        settings("cache", setting)


def test_a_tokenizer_with_ids_beyond_the_head_is_refused(
    settings: Callable[..., CacheTeacherConfig], tmp_path: Path
) -> None:
    """Before the weights are loaded, whatever the family."""
    from tests.tiny_teachers import QWEN_VL_TOKENS, tokenizer_with

    vision = write_tiny_qwen_vl(tmp_path / "vision", spare_rows=0)
    text = write_tiny_causal_lm(tmp_path / "text", spare_rows=0)
    for folder, tokens in ((vision, QWEN_VL_TOKENS), (text, ())):
        prepare_capture(**settings("cache", teacher=folder).setup_values)
        tokenizer_with(*tokens, "<|beyond|>").save_pretrained(folder)
        with pytest.raises(
            ModelError, match=r"the tokenizer's largest id is \d+, but the model's LM head has \d+ rows"
        ):
            prepare_capture(**settings("cache", teacher=folder).setup_values)
