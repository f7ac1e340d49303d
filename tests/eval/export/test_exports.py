"""Every form of export, run in batches in plain transformers, gives the answers of `eval-student generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from eval.export.portable import write_portable
from llavamod_offline.data.encode.template import get_template
from llavamod_offline.families.llava.checkpoint import load_llava
from llavamod_offline.families.llava.export import save_llava
from llavamod_offline.models.checkpoint import load_tokenizer
from llavamod_offline.models.upcycle import upcycle
from tests.plain import engine_answers, plain_answers, questions
from tests.tiny import write_tiny_llava

KINDS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "qwen2": ({}, None),
    "untied, spare rows": ({"tied": False, "head_rows": 448}, None),
    "qwen3": ({"text_config": Qwen3Config}, None),
    "llama": ({"text_config": LlamaConfig}, None),
    "qwen2 moe": ({"text_config": Qwen2Config}, {"residual": False}),
    "qwen2 moe, residual": ({"text_config": Qwen2Config}, {"residual": True}),
    "qwen3 moe": ({"text_config": Qwen3Config}, {"residual": False}),
}


def make(folder: Path, kind: str) -> tuple[Path, Any]:
    """A student's starting folder, and the trained student."""
    form, sparse = KINDS[kind]
    source = write_tiny_llava(folder, **form)
    model = load_llava(source)
    if sparse is not None:
        model = upcycle(model, layers="sparse", num_experts=4, top_k=2, seed=0, **sparse)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".experts." in name:  # make the experts differ, as training does
                    parameter.add_(torch.randn_like(parameter), alpha=float(parameter.std()))
    # Settings that a base model may bring along; an export answers greedily all the same.
    model.generation_config.update(do_sample=True, temperature=0.7, repetition_penalty=1.5)
    return source, model


def export(form: str, folder: Path, source: Path, model: Any, template: str, aspect: str) -> None:
    """Write the student as a training run does, or make a portable copy of it as a folder from elsewhere."""
    tokenizer = load_tokenizer(source)
    tokenizer.padding_side = "right"
    if form == "student":
        wording = get_template(template)
        save_llava(model, folder, tokenizer=tokenizer, processor_source=source, template=wording, image_aspect=aspect)
        return
    elsewhere = folder.with_name("elsewhere")
    save_llava(model, elsewhere, tokenizer=tokenizer, processor_source=source)
    write_portable(elsewhere, folder, template=template, image_aspect=aspect)


pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # a shared expert of size 0


@pytest.mark.parametrize(
    ("form", "template", "aspect"),
    [("student", "qwen", "pad"), ("student", "chatml", "square"), ("portable", "chatml", "pad")],
)
@pytest.mark.parametrize("kind", KINDS)
def test_plain_transformers_gives_the_answers_of_generate(
    tmp_path: Path, kind: str, form: str, template: str, aspect: str
) -> None:
    torch.manual_seed(0)
    source, model = make(tmp_path / "source", kind)
    export(form, tmp_path / "export", source, model, template, aspect)
    asked = questions(tmp_path)
    answers = engine_answers(tmp_path / "export", asked, 12, template=template)
    assert plain_answers(tmp_path / "export", asked, 12) == answers
    assert len({tuple(answer) for answer in answers}) == len(asked)


@pytest.mark.parametrize("kind", KINDS)
def test_an_export_is_laid_out_as_transformers_4_reads_it(tmp_path: Path, kind: str) -> None:
    """The loader of version 4 only warns about tensors that it does not know, and leaves random ones in their place."""
    source, model = make(tmp_path / "source", kind)
    export("student", tmp_path / "export", source, model, "qwen", "pad")
    again = tmp_path / "again"  # an export of what was loaded from an export
    save_llava(
        load_llava(tmp_path / "export"), again, tokenizer=load_tokenizer(source), processor_source=tmp_path / "export"
    )
    for folder in (tmp_path / "export", again):
        with safe_open(folder / "model.safetensors", "pt") as tensors:
            names = set(tensors.keys())
        assert "language_model.model.embed_tokens.weight" in names
        assert "multi_modal_projector.linear_1.weight" in names
        assert "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight" in names
        assert ("language_model.lm_head.weight" in names) == (kind == "untied, spare rows")
        assert ("language_model.model.layers.0.mlp.experts.3.gate_proj.weight" in names) == ("moe" in kind)
        assert not any(name.startswith(("model.", "lm_head")) or "gate_up_proj" in name for name in names)
        text = json.loads((folder / "config.json").read_text())["text_config"]
        assert text["rope_theta"] == text["rope_parameters"]["rope_theta"]
        tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
        assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
        assert "extra_special_tokens" not in tokenizer  # a list under this name is an error there
        assert tokenizer["model_input_names"] == ["input_ids", "attention_mask"]
    plain = load_llava(tmp_path / "export").state_dict()
    assert all(torch.equal(plain[name], tensor) for name, tensor in model.state_dict().items())
