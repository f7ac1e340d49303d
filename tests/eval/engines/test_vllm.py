"""Students in vLLM, on a CPU: the same answers as transformers, from the folder that training exports."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen3Config

from eval.engines.hf import HfEngine
from eval.engines.vllm import VllmEngine
from eval.example import Example
from eval.files import FileImage
from eval.generate import EvalGenerateConfig, generate
from eval.predictions import read_predictions
from llavamod_offline.errors import ConfigError, EvalError
from llavamod_offline.families.llava.checkpoint import load_llava
from llavamod_offline.families.llava.export import save_llava
from llavamod_offline.models.checkpoint import load_tokenizer
from llavamod_offline.models.upcycle import upcycle
from tests.eval.fixtures import pope_root, write_image
from tests.tiny import write_tiny_llava
from tests.tiny_families import TINY_FAMILIES
from tests.vllm_cpu import NEEDS_VLLM, SETTINGS

pytestmark = NEEDS_VLLM

HEAD_OF_32 = 128  # hidden size of a tiny LLaVA with attention heads of dimension 32, which vLLM needs on a CPU


def _student(folder: Path, kind: str) -> Path:
    if kind in TINY_FAMILIES:
        return TINY_FAMILIES[kind].write(folder / kind)
    text_config = Qwen3Config if kind.startswith("qwen3") else Qwen2Config
    dense = write_tiny_llava(folder / "dense", hidden=HEAD_OF_32, head_rows=448, text_config=text_config)
    if kind in ("dense", "qwen3"):
        return dense
    model = upcycle(load_llava(dense), layers="sparse", num_experts=4, top_k=2, seed=0, residual=kind == "residual")
    with torch.no_grad():  # make experts differ, as if trained
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.mul_(1 + 0.3 * torch.randn_like(parameter))
    save_llava(model, folder / kind, tokenizer=load_tokenizer(dense), processor_source=dense)
    return folder / kind


def _examples(folder: Path) -> list[Example[None]]:
    """Prompts of very different lengths, some of them without an image."""
    prompts = [
        "Is there a dog?",
        "What colour has the large square on the left of the star?" * 3,
        "Why",
        "How many?",
    ] * 3
    made = []
    for number, prompt in enumerate(prompts):
        write_image(folder / f"{number}.png", number)
        source = None if number % 4 == 2 else FileImage(folder, (f"{number}.png",))
        made.append(Example(str(number), f"{prompt} {number}", None, f"{number}.png", source))
    return made


@pytest.mark.parametrize("kind", ["dense", "sparse", "residual", "qwen3", "qwen3-sparse", "smolvlm", "qwen3_vl"])
def test_an_exported_student_says_the_same_tokens(tmp_path: Path, kind: str) -> None:
    student = _student(tmp_path, kind)
    examples = _examples(tmp_path)
    theirs = VllmEngine(student, settings=SETTINGS)
    try:
        found = theirs.answer(examples, 24)
        longest = theirs.family.context_length
        with pytest.raises(EvalError, match=rf"question '0': .* do not fit the model's {longest} positions"):
            theirs.answer(examples, longest - 4)
    finally:
        theirs.session.close()
    mine = HfEngine(student)
    expected = mine.answer(examples, 24)
    assert found == expected
    assert sum(answer.n_tokens for answer in expected) > 100
    assert len({answer.text for answer in expected}) > 6
    assert theirs.describe().items() >= {"engine": "vllm", "dtype": "float32", "decoding": "greedy"}.items()


def test_generate_answers_a_benchmark_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    student, root = _student(tmp_path, "sparse"), pope_root(tmp_path / "eval")
    answers = {}
    for engine in ("vllm", "hf"):
        output = tmp_path / engine
        config = EvalGenerateConfig(
            model=str(student),
            root=str(root),
            output=str(output),
            tasks=["pope"],
            batch_size=5,
            max_new_tokens=6,
            engine=engine,
            device="cpu",
        )
        path = generate(config)["pope"]
        lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(lines[: len(lines) // 2]))
        assert generate(config)["pope"].read_bytes() == b"".join(lines)
        answers[engine] = [(p.id, p.text, p.n_tokens, p.finish) for p in read_predictions(path, "pope")]
    assert answers["vllm"] == answers["hf"]
    with pytest.raises(EvalError, match="was generated with engine"):
        generate(
            EvalGenerateConfig(
                model=str(student),
                root=str(root),
                output=str(tmp_path / "vllm"),
                tasks=["pope"],
                max_new_tokens=6,
                engine="hf",
            )
        )


def test_a_device_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="torch finds no such device on this machine"):
        VllmEngine(_student(tmp_path, "dense"), device="cuda")
