"""LM heads against the models' own logits: every class of transformers that does more than multiply by a weight."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from llavamod_offline.errors import ModelError
from llavamod_offline.models import lm_head as heads
from llavamod_offline.models.lm_head import LmHead, check_lm_head, float32_products, lm_head_of

_TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_CAPPED: dict[str, Any] = {"final_logit_softcapping": 5.0}
_EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
_MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8}
# Classes whose logits are not just hidden · weightᵀ, with the settings of a tiny one.
CLASSES: dict[str, dict[str, Any]] = {
    "Gemma2ForCausalLM": _CAPPED,
    "Gemma3ForCausalLM": _CAPPED,
    "Gemma3nForCausalLM": {
        **_CAPPED,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 64,
        "altup_num_inputs": 2,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0, 0.0],
        "layer_types": ["full_attention"] * 2,
    },
    "Gemma4ForCausalLM": {
        **_CAPPED,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 64,
        "num_kv_shared_layers": 0,
    },
    "Gemma4UnifiedForCausalLM": {**_CAPPED, "num_kv_shared_layers": 0},
    "VaultGemmaForCausalLM": _CAPPED,
    "NanoChatForCausalLM": _CAPPED,
    "RecurrentGemmaForCausalLM": {"logits_soft_cap": 5.0, "lru_width": 32, "num_hidden_layers": 3},
    "CohereForCausalLM": {"logit_scale": 0.0625},
    "Cohere2ForCausalLM": {"logit_scale": 0.25},
    "Cohere2MoeForCausalLM": {"logit_scale": 0.25, "num_experts": 4, "num_experts_per_tok": 2},
    "GraniteForCausalLM": {"logits_scaling": 8.0, "embedding_multiplier": 12.0},
    "GraniteSWAForCausalLM": {"logits_scaling": 3.0},
    "GraniteMoeForCausalLM": {"logits_scaling": 8.0, **_EXPERTS},
    "GraniteMoeSWAForCausalLM": {"logits_scaling": 8.0, **_EXPERTS},
    "GraniteMoeSharedForCausalLM": {"logits_scaling": 8.0, "shared_intermediate_size": 16, **_EXPERTS},
    "GraniteMoeHybridForCausalLM": {
        "logits_scaling": 8.0,
        "shared_intermediate_size": 16,
        "layer_types": ["attention"] * 2,
        **_EXPERTS,
        **_MAMBA,
    },
    "MiniCPM3ForCausalLM": {
        "dim_model_base": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "HyperCLOVAXForCausalLM": {"logits_scaling": 0.125},
    "FalconH1ForCausalLM": {"lm_head_multiplier": 0.125, "mamba_d_ssm": 64, "mamba_chunk_size": 8, **_MAMBA},
    "InklingForCausalLM": {"unpadded_vocab_size": 60},
    "PhiForCausalLM": {},
    "GPTJForCausalLM": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "LlamaForCausalLM": {},
    "OPTForCausalLM": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}


def tiny(name: str, **settings: Any) -> Any:
    """A random model of a class of transformers, with logits beyond its softcap."""
    model_class = getattr(transformers, name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(model_class.config_class(**{**_TEXT, **CLASSES[name], **settings})).eval()
        for parameter in model.get_output_embeddings().parameters():
            torch.nn.init.normal_(parameter)
    return model


def _logits(head: LmHead, hidden_RD: Tensor) -> Tensor:
    """The logits, computed slowly, as the module's docstring defines them."""
    logits_RV = hidden_RD.double() @ head.weight_VD.double().T
    if head.bias_V is not None:
        logits_RV = logits_RV + head.bias_V.double()
    logits_RV = logits_RV * head.scale
    return logits_RV if head.softcap is None else head.softcap * torch.tanh(logits_RV / head.softcap)


@torch.no_grad()
@pytest.mark.parametrize("name", CLASSES)
def test_the_head_gives_the_logits_of_the_models_own_forward(name: str) -> None:
    model = tiny(name)
    check_lm_head(model, model.base_model, name=name)
    ids = torch.tensor([[3, 17, 40, 5]])
    theirs_TV = model(input_ids=ids, use_cache=False).logits[0]
    hidden_TD = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    head = lm_head_of(model)
    ours_TV = head.finish_(float32_products(hidden_TD, head.weight_VD))
    bound = 1e-5 * float(theirs_TV.abs().max())
    torch.testing.assert_close(ours_TV, theirs_TV, rtol=0, atol=bound)
    torch.testing.assert_close(_logits(head, hidden_TD).float(), theirs_TV, rtol=0, atol=bound)


@pytest.mark.parametrize("name", CLASSES)
def test_a_model_in_half_precision_passes_too(name: str) -> None:
    model = tiny(name).to(torch.bfloat16)
    check_lm_head(model, model.base_model, name=name)


@pytest.mark.parametrize("name", [name for name in CLASSES if name in heads.RULES])
def test_a_head_that_is_not_known_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as that of a class added by a later transformers release."""
    model = tiny(name)
    monkeypatch.delitem(heads.RULES, name)
    with pytest.raises(ModelError, match=f"some/folder: the logits of {name} are not those of its LM head"):
        check_lm_head(model, model.base_model, name="some/folder")


@pytest.mark.parametrize("cap", [15.0, 30.0, 50.0])
def test_a_softcap_far_above_the_logits_is_noticed(cap: float) -> None:
    """Such a cap changes small logits by less than rounding error, but large ones a lot."""
    model = tiny("LlamaForCausalLM")
    torch.nn.init.normal_(model.lm_head.weight, std=1e-4)
    check_lm_head(model, model.model, name="plain")
    model.lm_head.register_forward_hook(lambda _, inputs, logits: cap * torch.tanh(logits / cap))
    with pytest.raises(ModelError, match="are not those of its LM head"):
        check_lm_head(model, model.model, name="capped")


class _OwnModel(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """A class that no table lists."""


def test_without_weights_a_class_is_known_by_its_name_or_refused() -> None:
    with torch.device("meta"):
        for known in (transformers.LlamaForCausalLM, transformers.Gemma2ForCausalLM):
            model: Any = known(known.config_class(**_TEXT))
            check_lm_head(model, model.model, name="known")
        own = _OwnModel(transformers.LlamaConfig(**_TEXT))
    with pytest.raises(ModelError, match="own: the weights of its LM head are sharded or not loaded"):
        check_lm_head(own, own.model, name="own")


def test_modes_weights_and_hooks_are_left_as_they_were() -> None:
    model = tiny("Gemma2ForCausalLM").train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    check_lm_head(model, model.model, name="gemma")
    assert {name: module.training for name, module in model.named_modules()} == before
    assert not model.lm_head._forward_pre_hooks


def test_a_tied_or_quantised_head_or_none() -> None:
    tied = tiny("Gemma2ForCausalLM", tie_word_embeddings=True)
    check_lm_head(tied, tied.model, name="tied")
    assert lm_head_of(tied).weight_VD is tied.get_input_embeddings().weight
    packed = tiny("LlamaForCausalLM")
    packed.lm_head.weight = torch.nn.Parameter(torch.zeros(64, 16, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ModelError, match="not a linear layer with weights in floating point"):
        lm_head_of(packed)
    packed.lm_head = torch.nn.Sequential(torch.nn.Linear(32, 64))
    with pytest.raises(ModelError, match="a Sequential as its LM head"):
        lm_head_of(packed)


def test_a_llava_does_not_apply_the_softcap_of_its_text_model() -> None:
    """Logits are what the model's own class computes, whatever its text model's configuration says."""
    text = transformers.Gemma2Config(**_TEXT, **_CAPPED)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=3, tie_word_embeddings=False
    )
    model = transformers.LlavaForConditionalGeneration(config)
    assert lm_head_of(model).softcap is None
    check_lm_head(model, model.base_model, name="llava")


def test_ids_that_a_model_never_predicts_are_never_predicted() -> None:
    """Chameleon masks image tokens in its logits."""
    names = {"<image>": 3, "IMGIMGA": 4, "IMGIMGB": 5, "word": 6}
    config = transformers.ChameleonConfig(
        **_TEXT,
        vocabulary_map=names,
        vq_config={"embed_dim": 8, "num_embeddings": 2, "base_channels": 32, "resolution": 32, "latent_channels": 8},
    )
    model = transformers.ChameleonForConditionalGeneration(config).eval()
    barred = model.model.vocabulary_mapping.image_tokens
    assert barred
    check_lm_head(model, model.model, name="chameleon")
    head = lm_head_of(model)
    logits_RV = head.finish_(torch.randn(3, 64)).softmax(-1)
    assert not logits_RV[:, barred].any()


# Encoder-decoders, which no command takes, and a diffusion model.
_OTHERS = ("T5Gemma", "DiffusionGemma", "Clvp", "Musicgen", "Moshi", "ProphetNet", "Dia", "Csm", "PI0")


def _arithmetic(function: ast.FunctionDef) -> Iterator[str]:
    """The statements of a forward pass that do arithmetic on logits, or on hidden states before the LM head."""
    for node in ast.walk(function):
        if not isinstance(node, ast.Assign | ast.AugAssign):
            continue
        target = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
        value = ast.unparse(node.value)
        if target in ("logits", "hidden_states") and any(
            sign in value for sign in (" * ", " / ", "tanh(", "soft_cap(")
        ):
            yield value


def test_no_class_of_transformers_that_scales_or_caps_logits_is_missing() -> None:
    """Read from the classes' source; classes in the rules must use the fields that the rules name."""
    found: dict[str, str] = {}
    for file in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith(("ForCausalLM", "ForConditionalGeneration")):
                for item in node.body:
                    if isinstance(item, ast.FunctionDef) and item.name == "forward" and [*_arithmetic(item)]:
                        found[node.name] = ast.unparse(node)
    found = {name: source for name, source in found.items() if not name.startswith(_OTHERS)}
    assert found.keys() == heads.RULES.keys()
    for name, rule in heads.RULES.items():
        assert all(field in found[name] for field in rule.values()), name
