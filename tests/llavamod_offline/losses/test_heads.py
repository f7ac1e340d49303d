"""An attached student whose LM head is more than a weight: loss and gradients are those of its own logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from llavamod_offline.data.encode.template import get_template
from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.families import open_family
from llavamod_offline.losses import CachedDistillation
from teacher_cache import TeacherCache, open_cache
from tests.tiny_teachers import write_tiny_causal_lm
from tests.train.conftest import EXHAUSTIVE, write_cache

KINDS: dict[str, dict[str, Any]] = {
    "gemma2": {"final_logit_softcapping": 3.0, "head_dim": 32},
    "cohere2": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0, "embedding_multiplier": 6.0},
    "phi": {"num_key_value_heads": 2},
}
SAMPLES = [
    Sample("a", (Turn("user", "How many stars?"), Turn("assistant", "Two.")), (), ()),
    Sample("b", (Turn("user", "Which colour?"), Turn("assistant", "The square is red.")), (), ()),
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    """A cache with all log-probs of a teacher that has a softcap."""
    root = tmp_path_factory.mktemp("heads")
    write_set(SAMPLES, root / "set")
    teacher = write_tiny_causal_lm(root / "teacher", "gemma2", seed=1, final_logit_softcapping=5.0)
    return open_cache(write_cache(root / "cache", root / "set", teacher, *EXHAUSTIVE, "template=chatml"))


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_its_own_logits(kind: str, cache: TeacherCache, tmp_path: Path) -> None:
    folder = write_tiny_causal_lm(tmp_path / kind, kind, **KINDS[kind])
    family = open_family(folder, get_template("chatml"), image_aspect="auto", max_length=512)
    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    CachedDistillation(cache, lm_weight=0.5, tail="bucket").attach(student)
    for sample in SAMPLES:
        sequence = family.encode(sample, "response")
        ids_BT = torch.from_numpy(sequence.input_ids_T)[None]
        labels_BT = torch.full_like(ids_BT, -100)
        labels_BT[0, sequence.supervised_N] = ids_BT[0, sequence.supervised_N]
        targets = cache.targets([(sample.key, "response")])
        student.zero_grad()
        output = student(input_ids=ids_BT, labels=labels_BT, targets=targets)
        output.loss.backward()
        found = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
        student.zero_grad()
        logits_NV = student(input_ids=ids_BT).logits[0, sequence.prediction_rows_N, : cache.vocab_size]
        log_q_NV = logits_NV.log_softmax(-1)
        log_p_NV = torch.full_like(log_q_NV, -torch.inf).scatter(
            1, targets.topk_ids_NK.long(), targets.topk_log_probs_NK
        )
        divergence = (log_p_NV.exp() * (log_p_NV - log_q_NV)).nansum(-1).mean()
        own_N = torch.from_numpy(sequence.input_ids_T[sequence.supervised_N])
        loss = divergence + 0.5 * torch.nn.functional.nll_loss(log_q_NV, own_N)
        loss.backward()
        assert float(output.loss.detach()) == pytest.approx(float(loss.detach()), rel=1e-3)
        for name, parameter in student.named_parameters():
            bound = 2e-3 * float(parameter.grad.abs().max()) + 1e-7
            torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=bound, msg=name)
