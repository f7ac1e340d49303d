"""Models whose logits differ between vLLM and transformers are refused before vLLM starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig, Cohere2Config, Gemma2Config, LlavaConfig, Qwen2Config

from llavamod_offline.errors import ConfigError
from llavamod_offline.vllm.heads import check_same_head


def _write(folder: Path, config: LlavaConfig, name: str) -> Path:
    config.architectures = [name]
    config.save_pretrained(folder)
    return folder


def test_a_text_model_with_a_softcap_or_a_scale_in_a_class_that_ignores_it(tmp_path: Path) -> None:
    llava = "LlavaForConditionalGeneration"
    capped = _write(tmp_path / "capped", LlavaConfig(text_config=Gemma2Config(final_logit_softcapping=30.0)), llava)
    with pytest.raises(ConfigError, match=r"softcap \(30\.0\) and scale \(1\), Llava.* none .*set engine\.kind=hf"):
        check_same_head(capped)
    scaled = _write(tmp_path / "scaled", LlavaConfig(text_config=Cohere2Config(logit_scale=0.25)), llava)
    with pytest.raises(ConfigError, match=r"softcap \(none\) and scale \(0\.25\)"):
        check_same_head(scaled)
    for name, text in (("off", Gemma2Config(final_logit_softcapping=None)), ("qwen", Qwen2Config())):
        check_same_head(_write(tmp_path / name, LlavaConfig(text_config=text), llava))


def test_language_models_by_themselves(tmp_path: Path) -> None:
    for kind, name in (("gemma2", "Gemma2ForCausalLM"), ("granite", "GraniteForCausalLM")):
        config = AutoConfig.for_model(kind)
        check_same_head(_write(tmp_path / kind, config, name))
