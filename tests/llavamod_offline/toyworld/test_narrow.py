"""The narrowed language model is an ordinary folder, and the weights it keeps are where they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen2ForCausalLM

from llavamod_offline.demo.plan import TEACHER
from llavamod_offline.families.llava.building import build_llava, build_tokenizer
from llavamod_offline.families.llava.checkpoint import load_llava
from llavamod_offline.toyworld.narrow import narrowed, write_small_language_model


def test_it_is_a_students_beginning_of_another_shape(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = write_small_language_model(TEACHER, tmp_path / "small")
    assert capfd.readouterr() == ("", "")
    assert Qwen2ForCausalLM.from_pretrained(folder, local_files_only=True).config.architectures == ["Qwen2ForCausalLM"]
    student = build_llava(TEACHER, folder, seed=0)
    teacher = load_llava(TEACHER)
    ours, theirs = student.config.text_config, teacher.config.text_config
    for name in ("num_hidden_layers", "hidden_size", "vocab_size"):
        assert getattr(ours, name) < getattr(theirs, name), name
    assert ours.vocab_size >= len(build_tokenizer(folder))
    assert len(build_tokenizer(folder)) == len(build_tokenizer(TEACHER))


def test_cut_to_nothing_less_it_is_the_teacher(tmp_path: Path) -> None:
    teacher = load_llava(TEACHER)
    text = teacher.config.text_config
    sizes = {"hidden": text.hidden_size, "heads": text.num_attention_heads, "intermediate": text.intermediate_size}
    model = narrowed(teacher, range(text.num_hidden_layers), **sizes, rows=text.vocab_size).eval()
    assert isinstance(model, Qwen2ForCausalLM)
    ids_BT = torch.arange(24).view(2, 12)
    with torch.inference_mode():
        theirs_BTV = teacher.lm_head(teacher.model.language_model(input_ids=ids_BT).last_hidden_state)
        torch.testing.assert_close(model(input_ids=ids_BT).logits, theirs_BTV)


def test_the_strongest_neurons_heads_and_dimensions_stay_in_their_order() -> None:
    teacher = load_llava(TEACHER)
    whole = teacher.model.language_model
    with torch.no_grad():
        whole.embed_tokens.weight[:, [7, 90]] = 100.0
        whole.layers[3].mlp.up_proj.weight[[5, 300]] = 100.0
        whole.layers[3].self_attn.o_proj.weight[:, 64:96] = 100.0  # the third head
    model = narrowed(teacher, [3], hidden=2, heads=1, intermediate=2, rows=601)
    layer, old = model.model.layers[0], whole.layers[3]
    torch.testing.assert_close(layer.mlp.down_proj.weight, old.mlp.down_proj.weight[[7, 90]][:, [5, 300]])
    torch.testing.assert_close(layer.self_attn.k_proj.weight, old.self_attn.k_proj.weight[64:96][:, [7, 90]])
    torch.testing.assert_close(layer.self_attn.v_proj.bias, old.self_attn.v_proj.bias[64:96])
    torch.testing.assert_close(model.model.embed_tokens.weight, whole.embed_tokens.weight[:601, [7, 90]])
