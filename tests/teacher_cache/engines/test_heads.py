"""Captured and generated distributions of language models whose LM head is more than a weight, against plain use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from llavamod_offline.config import load_config
from llavamod_offline.data.encode.template import get_template
from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.families import open_family
from teacher_cache.capture.run import run_capture
from teacher_cache.capture_setup import prepare_capture
from teacher_cache.config import CacheTeacherConfig
from teacher_cache.engines.hf_load import load_engine
from teacher_cache.generate.decode_loop import Decoding, Prompt, decode, write_answers
from teacher_cache.read.reader import open_cache
from tests.tiny_teachers import write_tiny_causal_lm

KINDS: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 3.0, "head_dim": 32},
    "gemma3_text": {"final_logit_softcapping": 3.0, "head_dim": 32},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 6.0},
    "phi": {"num_key_value_heads": 2},
    "falcon_h1": {
        "lm_head_multiplier": 0.25,
        "embedding_multiplier": 5.0,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 2,
        "mamba_d_head": 32,
        "mamba_n_groups": 1,
        "mamba_d_state": 8,
        "mamba_chunk_size": 8,
    },
    "minicpm3": {
        "dim_model_base": 16,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "num_key_value_heads": 2,
    },
    "qwen2": {},
}
_TURNS = (("How many stars?", "Two."), ("Which colour has the large square on the left?", "The square is red."))


@pytest.fixture(scope="module", params=KINDS)
def teacher(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param) / "teacher"
    return write_tiny_causal_lm(folder, request.param, **KINDS[request.param])


def _samples() -> list[Sample]:
    return [Sample(f"s-{n}", (Turn("user", a), Turn("assistant", b)), (), ()) for n, (a, b) in enumerate(_TURNS)]


def _config(folder: Path, teacher: Path, *given: str) -> CacheTeacherConfig:
    if not (folder / "set").exists():
        write_set(_samples(), folder / "set")
    chosen = [f"data={folder / 'set'}", f"teacher={teacher}", f"output={folder / 'cache'}", "template=chatml"]
    return load_config(CacheTeacherConfig, (), [*chosen, "capture.preset=exhaustive", *given])


@torch.no_grad()
def test_a_cache_holds_the_log_probs_of_the_models_own_logits(teacher: Path, tmp_path: Path) -> None:
    run_capture(_config(tmp_path, teacher, "batch_size=1"))  # falcon_h1's state-space layers are affected by padding
    cache = open_cache(tmp_path / "cache")
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    family = open_family(teacher, get_template("chatml"), image_aspect="auto", max_length=512)
    samples = SampleSet.open(tmp_path / "set")
    for key, role in cache.items():
        sequence = family.encode(samples.read(samples.row_of(key)), role)
        logits_TV = model(input_ids=torch.from_numpy(sequence.input_ids_T)[None]).logits[0, :, : cache.vocab_size]
        log_probs_NV = logits_TV.log_softmax(-1)[sequence.prediction_rows_N]
        targets = cache.targets([(key, role)])
        ids_N = targets.target_ids_N.long()
        expected_N = log_probs_NV.gather(1, ids_N[:, None])[:, 0].numpy()
        assert cache.sequence(key, role).sum_log_prob == pytest.approx(float(expected_N.sum()), abs=1e-4 * len(ids_N))
        found_NK = targets.topk_log_probs_NK
        expected_NK = log_probs_NV.gather(1, targets.topk_ids_NK.clamp(min=0).long())
        valid_NK = targets.topk_ids_NK >= 0
        assert valid_NK.any(1).all()
        assert np.allclose(found_NK[valid_NK], expected_NK[valid_NK], atol=2e-3), key  # within the cache's rounding


def test_tokens_are_chosen_from_the_models_own_logits(teacher: Path, tmp_path: Path) -> None:
    """Logits with merely the same order would not do: sampling depends on their scale."""
    engine = load_engine(prepare_capture(**_config(tmp_path, teacher).setup_values))
    plain = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    sequence = engine.teacher.encode(_samples()[1], "response")
    ids_T = sequence.input_ids_T[: sequence.supervised_N[0]]
    steps: list[torch.Tensor] = []

    def choose(logits_BV: torch.Tensor, step: int) -> torch.Tensor:
        steps.append(logits_BV[0].clone())
        return logits_BV.argmax(-1)

    decode(engine, [Prompt("s", "answer", ids_T, (), 99)], choose, most=3)
    ids = ids_T.tolist()
    for logits_V in steps:
        with torch.no_grad():
            expected_V = plain(input_ids=torch.tensor([ids])).logits[0, -1, : engine.vocab_size]
        torch.testing.assert_close(logits_V, expected_V, rtol=0, atol=1e-4 * float(expected_V.abs().max()))
        ids.append(int(logits_V.argmax()))


def test_answers_are_those_of_plain_generation(teacher: Path, tmp_path: Path) -> None:
    """One prompt at a time; embeddings that the decoder scales are scaled exactly once in each step."""
    engine = load_engine(prepare_capture(**_config(tmp_path, teacher).setup_values))
    plain = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    end, rows = engine.teacher.encoder.end_id, plain.get_output_embeddings().weight.shape[0]
    suppressed = list(range(engine.vocab_size, rows))
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=8, eos_token_id=end, pad_token_id=end, suppress_tokens=suppressed
    )
    for sample in _samples():
        sequence = engine.teacher.encode(sample, "response")
        ids_T = sequence.input_ids_T[: sequence.supervised_N[0]]
        answer = write_answers(engine, [Prompt(sample.key, "answer", ids_T, (), 99)], Decoding(0.0, 1.0, 8, 0))[0]
        output = plain.generate(torch.from_numpy(ids_T)[None], generation_config=greedy)[0, len(ids_T) :].tolist()
        assert list(answer.ids) == [number for number in output if number != end]
