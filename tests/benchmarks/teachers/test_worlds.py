"""Real language models as teachers and students of the codec benchmark, and results measured in parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.benchmarks.codec import with_others
from tests.benchmarks.teachers.worlds import PROJECTED, causal_world
from tests.tiny import write_tiny_language_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_language_model(tmp_path_factory.mktemp("models") / "tiny", layers=3)


def test_an_early_exit_is_the_model_cut_off_after_a_layer(folder: Path) -> None:
    world = causal_world(str(folder), 2, "early-exit:2")
    rows = world.rows(1)
    assert (world.name, rows.log_probs_NV.shape[1]) == ("tiny", world.vocab_size)
    assert rows.hidden_ND is not None
    assert rows.student_hidden_ND is not None
    assert rows.hidden_ND.shape == rows.student_hidden_ND.shape == (len(rows.target_ids_N), PROJECTED)
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = world.rows(0)  # the last target of a sequence is the first token of the next
    ids_1T = torch.cat([before.target_ids_N[-1:], rows.target_ids_N])[None, :-1]
    with torch.no_grad():
        outputs = model(ids_1T, output_hidden_states=True)
        left_ND = model.model.norm(outputs.hidden_states[2][0])
    dense_NV = outputs.logits[0, :, : world.vocab_size].log_softmax(-1)
    torch.testing.assert_close(rows.log_probs_NV, dense_NV, rtol=1e-4, atol=1e-5)
    student_NV = (left_ND @ model.lm_head.weight[: world.vocab_size].T).log_softmax(-1)
    torch.testing.assert_close(rows.student_log_probs_NV, student_NV, rtol=1e-4, atol=1e-5)


def test_another_folder_is_a_student_if_it_shares_the_tokenizer(folder: Path, tmp_path: Path) -> None:
    other = write_tiny_language_model(tmp_path / "other", hidden=32, seed=1, extra_rows=5)
    rows = causal_world(str(folder), 1, str(other)).rows(0)
    assert rows.student_log_probs_NV is not None
    assert rows.student_log_probs_NV.shape == rows.log_probs_NV.shape
    assert not torch.allclose(rows.student_log_probs_NV, rows.log_probs_NV)
    assert causal_world(str(folder), 1).rows(0).student_log_probs_NV is None
    with pytest.raises(SystemExit, match=r"--student: .*nowhere is no folder"):
        causal_world(str(folder), 1, str(tmp_path / "nowhere"))


def test_a_part_of_the_teachers_can_be_measured_again() -> None:
    before = {
        "rows": [{"teacher": "ngram", "kl": 1.0}, {"teacher": "toy", "kl": 2.0}, {"teacher": "gemma", "kl": 3.0}],
        "ratios": {"compact_bytes": 30.0, "compact_bytes_toy": 8.0, "compact_bytes_gemma": 40.0},
        "settings": {"positions": {"ngram": 4100, "toy": 4100, "gemma": 1000}},
    }
    rows, ratios, positions = with_others(
        before, [{"teacher": "gemma", "kl": 0.5}], {"compact_bytes_gemma": 36.0}, {"gemma": 500}
    )
    assert [(row["teacher"], row["kl"]) for row in rows] == [("ngram", 1.0), ("toy", 2.0), ("gemma", 0.5)]
    assert ratios == {"compact_bytes": 30.0, "compact_bytes_toy": 8.0, "compact_bytes_gemma": 36.0}
    assert positions == {"ngram": 4100, "toy": 4100, "gemma": 500}
    rows, ratios, _ = with_others(before, [{"teacher": "ngram", "kl": 0.5}], {"compact_bytes": 31.0}, {"ngram": 10})
    assert [row["teacher"] for row in rows] == ["toy", "gemma", "ngram"]
    assert ratios == {"compact_bytes": 31.0, "compact_bytes_toy": 8.0, "compact_bytes_gemma": 40.0}
