"""PEFT adapters on a base checkpoint, in the commands that open checkpoints."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub import constants
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from eval.engines.hf import checkpoint_digest
from llavamod_offline.config import load_config
from llavamod_offline.errors import ConfigError, ModelError
from llavamod_offline.families import open_family
from llavamod_offline.families.llava.export import save_llava
from llavamod_offline.models.checkpoint import load_tokenizer
from llavamod_offline.models.hub import checkpoint_folder, checkpoint_name
from teacher_cache.ask.model import AskedModel, AskedQuestion
from teacher_cache.capture.run import run_capture
from teacher_cache.config import CacheTeacherConfig
from teacher_cache.fingerprint import describe_weights
from teacher_cache.plan.estimate import make_plan
from teacher_cache.read.reader import open_cache
from tests.hub import write_snapshot
from tests.tiny import write_tiny_llava, write_tiny_set
from tests.tiny_families import TINY_FAMILIES
from tests.tiny_teachers import write_tiny_causal_lm
from train.config import StudentConfig
from train.student.source import start_digest

WRITERS: dict[str, Callable[..., Path]] = {
    "llava": partial(write_tiny_llava, tied=False),
    "qwen3_vl": TINY_FAMILIES["qwen3_vl"].write,
}


def write_adapter(folder: Path, base: Path, *, named: str | None = None, seed: int = 0, **settings: Any) -> Tensor:
    """Write an adapter with random weights; return the merged model's logits, computed by plain peft."""
    model = AutoModelForImageTextToText.from_pretrained(base)
    torch.manual_seed(seed)
    targets = r".*language_model.*(q_proj|down_proj)"
    given = {"r": 4, "lora_alpha": 8, "target_modules": targets, "init_lora_weights": False, **settings}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**given))
    adapted.save_pretrained(folder)
    edit(folder / "adapter_config.json", base_model_name_or_path=str(base) if named is None else named)
    return logits(adapted.merge_and_unload())


def logits(model: Any) -> Tensor:
    ids_1T = torch.arange(5, 25)[None]
    with torch.inference_mode():
        found: Tensor = model.eval()(input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T)).logits
    return found


def opened(name: str | Path) -> Any:
    return open_family(checkpoint_folder(name), "chatml", image_aspect="auto", max_length=64)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}])
def test_a_base_with_an_adapter_is_the_merged_model(tmp_path: Path, name: str, settings: dict[str, Any]) -> None:
    base = WRITERS[name](tmp_path / "base")
    expected = write_adapter(tmp_path / "adapter", base, **settings)
    model = opened(tmp_path / "adapter").load(torch.float32)
    assert not [key for key in model.state_dict() if "lora" in key or "base_layer" in key or "modules_to_save" in key]
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert not torch.allclose(logits(opened(base).load(torch.float32)), expected, atol=1e-2)
    assert checkpoint_name(checkpoint_folder(tmp_path / "adapter")) == "adapter"


def test_the_base_is_found_by_hub_id_and_beside_the_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    base = write_tiny_llava(tmp_path / "somewhere" / "base")
    for number, named in enumerate(("org/base", "base")):
        adapter = tmp_path / "somewhere" / f"adapter-{number}"
        expected = write_adapter(adapter, base, named=named)
        if named == "org/base":
            with pytest.raises(ModelError, match=r"adapter_config\.json: base_model_name_or_path: org/base: .*hf d"):
                checkpoint_folder(adapter)
            write_snapshot(tmp_path / "hub", "org/base", base)
        assert torch.allclose(logits(opened(adapter).load(torch.float32)), expected, atol=1e-5)
    write_snapshot(tmp_path / "hub", "org/adapter", tmp_path / "somewhere" / "adapter-0")
    assert checkpoint_name(checkpoint_folder("org/adapter"))
    opened("org/adapter").load(torch.float32)


def test_the_fingerprint_covers_both_wherever_they_lie(tmp_path: Path) -> None:
    base = write_tiny_llava(tmp_path / "base")
    write_adapter(tmp_path / "one", base)
    write_adapter(tmp_path / "two", base, seed=1)
    write_adapter(tmp_path / "three", base, lora_alpha=16)
    shutil.copytree(base, tmp_path / "copy")
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    edit(tmp_path / "moved" / "adapter_config.json", base_model_name_or_path=str(tmp_path / "copy"))
    found = [describe_weights(checkpoint_folder(tmp_path / name)) for name in ("base", "one", "two", "three", "moved")]
    assert found[1] == found[4]
    assert len({json.dumps(one) for one in found}) == 4


@pytest.fixture
def language_model(tmp_path: Path) -> Path:
    return write_tiny_causal_lm(tmp_path / "base", "qwen2")


def test_an_adapters_own_chat_template_is_used(language_model: Path, tmp_path: Path) -> None:
    """Even if it is in a different file from the base's, which transformers would prefer."""
    base, adapter = language_model, tmp_path / "adapter"
    adapter.mkdir()
    peft.LoraConfig(base_model_name_or_path=str(base)).save_pretrained(adapter)
    (adapter / "adapter_model.safetensors").write_bytes(b"")  # not read here
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = "the base's"
    tokenizer.save_pretrained(base)
    assert (base / "chat_template.jinja").is_file()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, adapter)
    assert load_tokenizer(checkpoint_folder(adapter)).chat_template == "the base's"
    again = shutil.copytree(adapter, tmp_path / "again")
    edit(again / "tokenizer_config.json", chat_template="its own")
    assert load_tokenizer(checkpoint_folder(again)).chat_template == "its own"


def test_an_adapter_with_more_tokens_than_its_base_says_so(language_model: Path, tmp_path: Path) -> None:
    base = language_model
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(model.config.vocab_size + 3)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    peft.get_peft_model(model, settings).save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(base))
    with pytest.raises(ModelError, match=r"has the shape \(\[\d+, \d+\]\), expected .*were added to that, merge"):
        opened(tmp_path / "adapter").load(torch.float32)


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_what_cannot_be_opened_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = write_tiny_llava(tmp_path / "base"), tmp_path / "adapter"
    write_adapter(adapter, base)

    def refused(name: str, match: str, **changes: object) -> Path:
        folder = shutil.copytree(adapter, tmp_path / name)
        edit(folder / "adapter_config.json", **changes)
        with pytest.raises((ModelError, ConfigError), match=match) as caught:
            opened(folder).load(torch.float32)
        assert "\n" not in str(caught.value)
        return folder

    refused(
        "gone",
        r"gone/adapter_config.json: base_model_name_or_path is .*nowhere.*: no such checkpoint folder",
        base_model_name_or_path=str(tmp_path / "nowhere"),
    )
    refused("null", "base_model_name_or_path is None: set it", base_model_name_or_path=None)
    refused("rank", r"rank/adapter_config.json: the adapter cannot be merged into its base", r=8)
    refused(
        "fewer", r"fewer/adapter_model.safetensors: 4 unexpected tensors, first '.*q_proj", target_modules=["down_proj"]
    )
    refused(
        "more",
        r"more/adapter_model.safetensors: 4 missing tensors, first '.*k_proj",
        target_modules=r".*language_model.*(q_proj|k_proj|down_proj)",
    )
    refused(
        "prompt",
        "prompt/adapter_config.json: an adapter of kind PROMPT_TUNING has no weights to merge",
        peft_type="PROMPT_TUNING",
        num_virtual_tokens=4,
        task_type="CAUSAL_LM",
    )
    refused("nested", "its base '.*adapter' is an adapter too", base_model_name_or_path=str(adapter))
    both = shutil.copytree(adapter, tmp_path / "both")
    shutil.copy(base / "model.safetensors", both)
    with pytest.raises(ModelError, match="both: it holds a model and an adapter"):
        checkpoint_folder(both)
    llava = shutil.copytree(adapter, tmp_path / "llava")
    (llava / "non_lora_trainables.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"non_lora_trainables\.bin, which is never unpickled"):
        checkpoint_folder(llava)
    pickled = shutil.copytree(adapter, tmp_path / "pickled")
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    with pytest.raises(ModelError, match=r"no adapter_model\.safetensors \(others are never unpickled\)"):
        checkpoint_folder(pickled)
    family = opened(adapter)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match=r"adapters need peft: pip install 'llavamod-offline\[lora\]'"):
        family.load(torch.float32)


def test_the_commands_take_adapters(tmp_path: Path) -> None:
    """A capture with an adapter on a base has the merged checkpoint's records; answers and scores are equal too."""
    base, adapter, whole = write_tiny_llava(tmp_path / "base"), tmp_path / "adapter", tmp_path / "whole"
    write_adapter(adapter, base)
    family = opened(adapter)
    save_llava(
        family.load(torch.float32), whole, tokenizer=family.encoder.tokenizer, processor_source=base, image_aspect="pad"
    )
    write_tiny_set(tmp_path / "set", 6)
    found = {}
    for teacher in (adapter, whole):
        given = [f"data={tmp_path}/set", f"teacher={teacher}", f"output={tmp_path}/cache-{teacher.name}", "device=cpu"]
        config = load_config(CacheTeacherConfig, (), [*given, "workers=1", "template=qwen", "image_aspect=pad"])
        assert make_plan(config, samples=2, seconds=60).positions
        run_capture(config)
        cache = open_cache(config.output)
        log_probs = [cache.sequence(key, "response").sum_log_prob for key in sorted(cache.keys("response"))]
        question = AskedQuestion("What?", (), ())
        answer = AskedModel(str(teacher), template="qwen", device="cpu").answer(question, 4, lambda _: None)
        found[teacher.name] = (log_probs, answer.text, cache.fingerprint["teacher"])
    assert found["adapter"][0] == pytest.approx(found["whole"][0], abs=1e-4)
    assert found["adapter"][1] == found["whole"][1]
    assert found["adapter"][2]["weights"].keys() == {"model.safetensors", "adapter_model.safetensors"}
    assert len({checkpoint_digest(checkpoint_folder(folder)) for folder in (base, adapter, whole)}) == 3
    digests = {start_digest(StudentConfig(checkpoint=str(folder))) for folder in (base, adapter, whole)}
    assert len(digests) == 3
