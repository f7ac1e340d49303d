"""Text-only language models as teachers, and folders that are no teacher at all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from llavamod_offline.config import load_config
from llavamod_offline.data.encode.template import get_template
from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.errors import ModelError
from llavamod_offline.families import open_family
from llavamod_offline.families.causal_lm import CausalLmFamily
from teacher_cache.capture.run import run_capture
from teacher_cache.config import CacheTeacherConfig
from teacher_cache.read.reader import open_cache
from tests.tiny import tiny_samples
from tests.tiny_teachers import write_tiny_causal_lm, write_tiny_qwen_vl


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
@pytest.mark.parametrize("preference", [False, True])
def test_text_is_captured_and_pictures_are_rejected(tmp_path: Path, kind: str, preference: bool) -> None:
    folder = write_tiny_causal_lm(tmp_path / "teacher", kind)
    samples = tiny_samples(24, preference=preference)
    write_set(samples, tmp_path / "set")
    settings = [f"data={tmp_path / 'set'}", f"teacher={folder}", f"output={tmp_path / 'cache'}", "batch_size=4"]
    summary = run_capture(load_config(CacheTeacherConfig, (), [*settings, "template=chatml"]))
    texts = [sample for sample in samples if not sample.images]
    roles = 2 if preference else 1
    assert (summary.sequences, summary.rejected) == (len(texts) * roles, (24 - len(texts)) * roles)
    lines = [json.loads(line) for line in (tmp_path / "cache" / "rejected.jsonl").read_text().splitlines()]
    assert "it has 1 image, and the teacher is a language model without images" in lines[0]["reason"]
    cache = open_cache(tmp_path / "cache")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    teacher = open_family(folder, get_template("chatml"), image_aspect="auto", max_length=2048)
    assert isinstance(teacher, CausalLmFamily)
    assert cache.fingerprint["images"] == {"tokens": 0, "token_id": None}
    for sample in texts:
        for role in sample.roles:
            sequence = teacher.encode(sample, role)
            with torch.inference_mode():
                logits_TV = model(torch.from_numpy(sequence.input_ids_T)[None]).logits[0, :, :399]
            live_N = logits_TV.log_softmax(-1)[sequence.prediction_rows_N, sequence.target_ids_N].numpy()
            assert np.isclose(cache.sequence(sample.key, role).sum_log_prob, live_N.sum(), atol=1e-2)


def test_a_model_of_no_known_family_is_one_clear_error(tmp_path: Path) -> None:
    folder = write_tiny_qwen_vl(tmp_path / "teacher")
    config = json.loads((folder / "config.json").read_text())
    for model_type in ("vit", "clip", "molmo", None):
        (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
        with pytest.raises(ModelError, match=f"model_type is '{model_type}', for which transformers has neither"):
            open_family(folder, get_template("chatml"), image_aspect="auto", max_length=64)


def test_beyond_longropes_first_length_a_record_does_not_depend_on_its_batch(tmp_path: Path) -> None:
    """Phi-3.5's rotary embeddings depend on the longest sequence of a batch."""
    factors = {"short_factor": [1.0] * 16, "long_factor": [4.0] * 16, "original_max_position_embeddings": 64}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
    settings: dict[str, Any] = {
        "rope_parameters": rope,
        "original_max_position_embeddings": 64,
        "max_position_embeddings": 256,
    }
    folder = write_tiny_causal_lm(tmp_path / "phi", "phi3", pad_token_id=0, bos_token_id=0, eos_token_id=0, **settings)
    texts = [Sample(f"t{n}", (Turn("user", "What?"), Turn("assistant", "a " * n)), (), ()) for n in (3, 90)]
    write_set(texts, tmp_path / "set")
    write_set(texts[:1], tmp_path / "short")
    given = [f"teacher={folder}", "template=chatml", "capture.preset=exhaustive", "capture.precision=exact"]
    found = []
    for name, limit in (("set", 250), ("short", 250), ("short", 60)):
        output = tmp_path / f"{name}-{limit}"
        places = [f"data={tmp_path / name}", f"output={output}", f"max_length={limit}", "batch_size=2"]
        run_capture(load_config(CacheTeacherConfig, (), [*given, *places]))
        found.append(open_cache(output).sequence("t3", "response").sum_log_prob)
    assert found[0] == found[1] == found[2]


def test_code_in_the_folder_is_never_run_nor_asked_about(tmp_path: Path) -> None:
    folder = write_tiny_causal_lm(tmp_path / "teacher", "llama")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass OwnTokenizer: pass\n")
    code = (
        "from pathlib import Path\nfrom llavamod_offline.families import open_family\n"
        f"open_family(Path({str(folder)!r}), 'qwen', image_aspect='auto', max_length=99)"
    )
    done = subprocess.run([sys.executable, "-c", code], input="y\n", capture_output=True, text=True, check=False)
    assert "made by code in the folder, which is never run" in done.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "phi4_multimodal"}, "which none of transformers' image-text classes covers"),
        ({"model_type": "llava", "vision_config": "clip"}, "invalid LLaVA configuration"),
        ({"model_type": ["llava"]}, "for which transformers has neither"),
    ],
)
def test_odd_configurations_are_one_line(tmp_path: Path, config: dict[str, object], reason: str) -> None:
    write_tiny_causal_lm(tmp_path / "teacher", "qwen2")
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=reason) as caught:
        open_family(tmp_path / "teacher", "qwen", image_aspect="auto", max_length=99)
    assert "\n" not in str(caught.value)
