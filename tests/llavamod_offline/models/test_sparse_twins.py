"""Every text model with a sparse twin: the same function at step 0, saved, and read by plain transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlavaConfig,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llavamod_offline.errors import ModelError
from llavamod_offline.families.llava.checkpoint import load_llava
from llavamod_offline.families.llava.export import save_llava
from llavamod_offline.models.capacity import limit_capacity
from llavamod_offline.models.checkpoint import load_tokenizer
from llavamod_offline.models.routing import RouterWatch, is_sparse, random_routing
from llavamod_offline.models.single_choice import compare_single_choices
from llavamod_offline.models.sparse_twins import TWINS, is_router, sparse_twin
from llavamod_offline.models.upcycle import activated_parameters, experts_per_layer, total_parameters, upcycle
from tests.tiny import write_tiny_llava

# A tiny text model.
TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# Settings that a checkpoint may have and its twin must not lose.
TEXTS: dict[str, dict[str, Any]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mistral": {"sliding_window": 8, "head_dim": 16},
    "llama": {"rope_parameters": _LLAMA3, "head_dim": 16},
    "olmo2": {"rms_norm_eps": 1e-3},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
        "logits_scaling": 4.0,
    },
}
_SOME = {"qwen2", "qwen3", "qwen3_vl"}  # those whose twins may have dense layers
_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
}
EXACT = 2e-5  # Qwen3.5's linear attention amplifies float32 rounding
_WHOLE: dict[str, Any] = {"image_token_id": 60, "video_token_id": 61, "vision_start_token_id": 62}


def random_model(model_class: Any, config: Any) -> Any:
    """A model with random weights that preserve the scale of activations."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = model_class(config).eval()
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=1 / parameter[0].numel() ** 0.5)
    return model


def dense(kind: str, **settings: Any) -> Any:
    """A random dense model: a language model, a LLaVA around one (`llava_KIND`), or a model of its own class."""
    if kind == "qwen3_vl":
        text = {**TEXT, "head_dim": 16, "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2]}}
        vision = {**_VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
        return random_model(
            Qwen3VLForConditionalGeneration, Qwen3VLConfig(text_config=text, vision_config=vision, **_WHOLE)
        )
    if kind == "qwen3_5":
        linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8}
        text = {**TEXT, **linear, "linear_value_head_dim": 8, "head_dim": 16}
        vision = {**_VISION, "num_position_embeddings": 16}
        return random_model(
            Qwen3_5ForConditionalGeneration, Qwen3_5Config(text_config=text, vision_config=vision, **_WHOLE)
        )
    name = kind.removeprefix("llava_")
    config = AutoConfig.for_model(name, **{**TEXT, **TEXTS[name], **settings})
    if name == kind:
        return random_model(AutoModelForCausalLM.from_config, config)
    vision_config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    tied = bool(config.tie_word_embeddings)
    whole = LlavaConfig(vision_config=vision_config, text_config=config, image_token_index=60, tie_word_embeddings=tied)
    return random_model(AutoModelForImageTextToText.from_config, whole)


def inputs_of(model: Any) -> dict[str, torch.Tensor]:
    """Two sequences, the first with an image if the model takes any."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(3, 59, (2, 20), generator=generator)
    made = {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}
    if model.config.model_type == "llava":
        ids_BT[0, 3:7] = 60
        made["pixel_values"] = torch.randn(1, 3, 16, 16, generator=generator)
    elif hasattr(model.config, "vision_config"):
        ids_BT[0, 2], ids_BT[0, 3:7] = 62, 60
        made["mm_token_type_ids"] = (ids_BT == 60).int()
        made["pixel_values"] = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)
        made["image_grid_thw"] = torch.tensor([[1, 4, 4]])
    return made


@torch.no_grad()
def _logits(model: Any) -> torch.Tensor:
    logits_BTV: torch.Tensor = model(**inputs_of(model)).logits
    return logits_BTV


def sparse_of(model: Any, kind: str, **settings: Any) -> Any:
    """Its sparse twin, sparse in every second layer where the twin allows dense layers."""
    layers: Any = [1, 3] if kind.removeprefix("llava_") in _SOME else "dense"
    return upcycle(model, **{"layers": layers, "num_experts": 4, "top_k": 2, "seed": 0, **settings})


KINDS = [*TEXTS, *(f"llava_{name}" for name in TEXTS), "qwen3_vl", "qwen3_5"]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("kind", KINDS)
def test_the_sparse_twin_computes_the_same_also_after_save_and_reload(kind: str, tmp_path: Path) -> None:
    model = dense(kind)
    expected = _logits(model)
    sparse = sparse_of(model, kind)
    assert is_sparse(sparse)
    assert not is_sparse(model)
    torch.testing.assert_close(_logits(sparse), expected, rtol=0, atol=EXACT * float(expected.abs().max()))
    sparse.save_pretrained(tmp_path)
    auto = AutoModelForCausalLM if kind in TEXTS else AutoModelForImageTextToText
    plain, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert type(plain) is type(sparse)
    assert not any(info.values()), info
    assert torch.equal(_logits(plain.eval()), _logits(sparse))
    dense_layers = {1, 3} if kind.removeprefix("llava_") in _SOME else {0, 1, 2, 3}
    layers = plain.get_decoder().layers
    assert {n for n, layer in enumerate(layers) if any(map(is_router, layer.modules()))} == dense_layers


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("kind", ["llava_qwen2", "qwen3_5"])
def test_a_dense_mlp_may_stay_as_a_shared_expert(kind: str, tmp_path: Path) -> None:
    model = dense(kind)
    sparse = sparse_of(model, kind, residual=True)
    expected = _logits(model)
    torch.testing.assert_close(_logits(sparse), expected, rtol=0, atol=EXACT * float(expected.abs().max()))


_PUBLISHED = {
    "llama": ("block_sparse_moe.experts.1.w1.weight", "block_sparse_moe.gate.weight"),
    "olmo2": ("mlp.experts.1.gate_proj.weight", "mlp.gate.weight"),
    "granite": ("block_sparse_moe.input_linear.weight", "block_sparse_moe.router.layer.weight"),
}


@pytest.mark.parametrize("kind", _PUBLISHED)
def test_exports_have_the_names_of_published_checkpoints(kind: str, tmp_path: Path) -> None:
    """vLLM and earlier releases of transformers expect these names."""
    folder = write_tiny_llava(tmp_path / "dense", text_config=CONFIG_MAPPING[kind])
    model = sparse_of(load_llava(folder), kind)
    save_llava(model, tmp_path / "sparse", tokenizer=load_tokenizer(folder), processor_source=folder)
    with safe_open(tmp_path / "sparse" / "model.safetensors", "pt") as tensors:
        names = set(tensors.keys())
    assert {f"language_model.model.layers.1.{name}" for name in _PUBLISHED[kind]} <= names
    ids_BT = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        reloaded, own = load_llava(tmp_path / "sparse")(input_ids=ids_BT).logits, model(input_ids=ids_BT).logits
    torch.testing.assert_close(reloaded, own, rtol=0, atol=EXACT * float(own.abs().max()))


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    for kind in ("llama", "llava_llama"):
        sparse = sparse_of(dense(kind, tie_word_embeddings=True), kind)
        assert sparse.get_output_embeddings().weight is sparse.get_input_embeddings().weight


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("kind", ["llava_mistral", "llava_olmo2", "llava_granite", "qwen3_vl", "qwen3_5"])
def test_routers_are_watched_limited_and_taught(kind: str, top_k: int) -> None:
    """Balance loss and load, capacity, and the gradient of top-1 routers, whatever a router returns."""
    sparse = sparse_of(dense(kind), kind, top_k=top_k).train()
    expected = _logits(sparse.eval())
    limit_capacity(sparse, 100.0)
    compare_single_choices(sparse.train())
    inputs = inputs_of(sparse)
    with RouterWatch(sparse) as watch:
        logits_BTV = sparse(**inputs).logits
    torch.testing.assert_close(logits_BTV.detach(), expected, rtol=0, atol=EXACT * float(expected.abs().max()))
    routing = watch.routing(inputs["attention_mask"])
    routers = [module for module in sparse.modules() if is_router(module)]
    assert routing.loads_LE.shape == (len(routers), 4)
    torch.testing.assert_close(routing.loads_LE.sum(1), torch.ones(len(routers)))
    assert not routing.drop_rates_L.any()
    assert float(routing.balance_loss.detach()) > 0
    # With experts that differ and a loss, each router gets a gradient.
    with torch.no_grad():
        for name, parameter in sparse.named_parameters():
            if ".experts.down_proj" in name:
                parameter.mul_(torch.linspace(0.5, 2.0, 4)[:, None, None])
    loss = sparse(**inputs).logits.log_softmax(-1)[..., 5].mean()
    loss.backward()
    assert all(float(router.weight.grad.abs().max()) > 1e-6 for router in routers)
    with random_routing(sparse.eval(), seed=0):
        assert not torch.equal(_logits(sparse), expected)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("kind", ["llava_qwen2", "llava_granite", "qwen3_vl"])
def test_parameters_are_counted(kind: str) -> None:
    sparse = sparse_of(dense(kind), kind)
    layers = sum(map(is_router, sparse.modules()))
    assert total_parameters(sparse) - activated_parameters(sparse) == layers * 2 * 3 * 32 * 48


@pytest.mark.parametrize("kind", ["llava_qwen3", "llava_mistral", "qwen3_vl"])
def test_noise_makes_the_copies_differ_by_so_much(kind: str) -> None:
    model = dense(kind)
    sparse, again = (sparse_of(model, kind, expert_noise=0.02) for _ in range(2))
    plain = sparse_of(model, kind)
    for name, ours in sparse.state_dict().items():
        same, copied = again.state_dict()[name], plain.state_dict()[name]
        assert torch.equal(ours, same)
        if ".experts." not in name:
            assert torch.equal(ours, copied)
            continue
        for one, other in zip(ours, copied, strict=True):
            assert float((one - other).std() / other.std()) == pytest.approx(0.02, rel=0.1)
        assert not torch.equal(ours[0] - copied[0], ours[1] - copied[1])
    expected = _logits(model)
    gap = float((_logits(sparse) - expected).abs().max() / expected.abs().max())
    assert 1e-5 < gap < 0.3


class TestErrors:
    def test_text_models_without_a_twin(self) -> None:
        for name in ("gemma2", "olmo", "phi", "phi3", "smollm3"):
            with pytest.raises(ModelError, match=rf"a '{name}' text model cannot be made sparse: .*use one of qwen2"):
                sparse_twin(AutoConfig.for_model(name))

    def test_what_a_twin_does_not_have(self) -> None:
        for name, setting in (
            *(("llama", "mlp_bias"), ("llama", "attention_bias"), ("granite", "mlp_bias")),
            ("qwen3", "use_sliding_window"),  # shows only beyond the window
        ):
            config = AutoConfig.for_model(name, **{setting: True})
            with pytest.raises(ModelError, match=rf"with {setting}=True cannot be made sparse: its sparse form"):
                sparse_twin(config)

    def test_a_twin_that_computes_something_else(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As if an entry of the table had overlooked a setting."""
        model = dense("llava_mistral")
        twin = TWINS["mistral"]
        monkeypatch.setitem(TWINS, "mistral", type(twin)(**{**vars(twin), "sets": {"sliding_window": None}}))
        with pytest.raises(ModelError, match="mixtral computes something else"):
            sparse_of(model, "llava_mistral")

    def test_twins_with_experts_in_every_layer(self) -> None:
        with pytest.raises(ModelError, match=r"has experts in every layer: set student\.upcycle\.layers to dense"):
            upcycle(dense("llava_llama"), layers="sparse", num_experts=4, top_k=2, seed=0)

    def test_residual_without_a_shared_expert(self) -> None:
        with pytest.raises(ModelError, match="the sparse form of 'mistral' has no shared expert"):
            sparse_of(dense("llava_mistral"), "llava_mistral", residual=True)

    def test_experts_of_each_layer(self) -> None:
        assert experts_per_layer(4, 3) == experts_per_layer([4], 3) == experts_per_layer([4, 4, 4], 3) == 4
        with pytest.raises(ModelError, match="lists 2 numbers for 3 sparse layers"):
            experts_per_layer([4, 4], 3)
        with pytest.raises(ModelError, match="have the same number of experts"):
            experts_per_layer([4, 8, 4], 3)
