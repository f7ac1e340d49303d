"""A student with another tokenizer learning from a teacher's cache, against supervised fine-tuning, in the toy world.

    python -m tests.benchmarks.other_tokenizer [--quick] [--folder DIR] --json FILE

The student's language model is the toy world's, given a byte-level BPE of a different size: each new token's embedding
is the mean over the old tokens that spell the same text. With the teacher's tower and a new projector, it takes the
same number of steps over the same batches in each arm, once per seed:

- `sft`: cross-entropy on the set's answers, of which every tenth is wrong, as in the demo;
- `aligned`: mimic distillation from the teacher's cache with cache.other_tokenizer=align;
- `both`: the same with cross-entropy beside it (loss.kind=kd_lm).

`cross_entropy` (nats a token) and `accuracy` (of single tokens) are those of `train-student measure` on the answers of
held-out samples, all of them right. Ratios: `ARM_cross_entropy_vs_sft`, `ARM_accuracy_vs_sft`: the mean over seeds,
divided by that of `sft`; `spans_per_token`: how many spans the student's tokens form. The commands run in this process,
otherwise as a user types them; with `--folder` they resume what an earlier call left there.
"""

from __future__ import annotations

import itertools
import json
import logging
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM

from llavamod_offline.config import load_config
from llavamod_offline.demo.plan import LANGUAGE_MODEL, TEACHER
from llavamod_offline.models.checkpoint import load_tokenizer
from llavamod_offline.toyworld.datasets import write_datasets
from tests.benchmarks.form import Row, finish, parse_arguments, write
from tests.benchmarks.rounds import run
from tests.toy_teacher.tokenizer import train_tokenizer
from train.config import MeasureConfig
from train.measure import measure
from train.metrics import METRICS_NAME

NAME = "other_tokenizer"
ALIGNED = ("cache.other_tokenizer=align",)
ARMS: dict[str, tuple[str, ...]] = {"sft": (), "aligned": ALIGNED, "both": (*ALIGNED, "loss.kind=kd_lm")}
ERROR_SHARE = 0.1


def main() -> None:
    """Measure and report."""
    options = {"seeds": 3, "steps": 300, "samples": 1200, "rate": 1e-3, "vocabulary": 500, "folder": ""}
    arguments = parse_arguments(NAME, __doc__ or "", options)
    given = dict(arguments.options)
    if arguments.quick:
        given |= {"seeds": 1, "steps": 3, "samples": 60}
    unseen = 20 if arguments.quick else 200
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    rows: list[Row] = []
    settings: dict[str, Any] = {name: value for name, value in given.items() if name != "folder"} | {"unseen": unseen}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(given["folder"] or temporary)
        write_start(folder, samples=given["samples"], unseen=unseen, vocabulary=given["vocabulary"])
        for seed, arm in itertools.product(range(given["seeds"]), ARMS):
            rows.append(run_arm(folder, arm, seed=seed, steps=given["steps"], rate=given["rate"]))
            print(rows[-1], flush=True)
            write(NAME, arguments, settings=settings, rows=rows, ratios=ratios_of(rows))
    finish(NAME, arguments, settings=settings, rows=rows, ratios=ratios_of(rows))


def ratios_of(rows: Sequence[Row]) -> dict[str, float]:
    """Each arm's means divided by those of supervised fine-tuning, and the number of spans per token."""
    found = {}
    for name in ("cross_entropy", "accuracy"):
        means = {arm: [float(row[name]) for row in rows if row["arm"] == arm] for arm in ARMS}
        for arm, own in means.items():
            if arm != "sft" and own:
                found[f"{arm}_{name}_vs_sft"] = statistics.mean(own) / statistics.mean(means["sft"])
    spans = [float(row["spans"]) for row in rows if row["spans"]]
    return found | ({"spans_per_token": statistics.mean(spans)} if spans else {})


def write_start(folder: Path, *, samples: int, unseen: int, vocabulary: int) -> None:
    """Write a set with the teacher's cache, a held-out one, and the language model with another tokenizer."""
    for name, size, seed in (("set", samples, 1), ("unseen", unseen, 2)):
        world = folder / f"{name}-world"
        if (folder / name).exists():
            continue
        share = ERROR_SHARE if name == "set" else 0.0
        write_datasets(world, align=0, general=size, multitask=0, preference=0, error_share=share, seed=seed)
        run(
            *("llavamod-offline", "pack", f"{world}/general.json", "--images", f"{world}/images"),
            *("--output", f"{folder}/{name}", "--workers", "1"),
        )
    places = (f"data={folder}/set", f"teacher={TEACHER}", f"output={folder}/cache")
    run("cache-teacher", "run", *places, "batch_size=32")
    if not (folder / "language_model").exists():
        write_retokenised(folder / "language_model", vocabulary)


def write_retokenised(folder: Path, vocabulary: int) -> None:
    """Write the toy world's language model with another tokenizer, of `vocabulary` tokens."""
    old, new = load_tokenizer(LANGUAGE_MODEL), train_tokenizer(vocabulary, seed=1)
    model = Qwen2ForCausalLM.from_pretrained(LANGUAGE_MODEL, dtype=torch.float32)
    before_VD = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(len(new))
    embeddings_VD = torch.stack([before_VD[_same(old, new, number)].mean(0) for number in range(len(new))])
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(embeddings_VD)
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = new.eos_token_id
    model.save_pretrained(folder)
    new.save_pretrained(folder)


def _same(old: PreTrainedTokenizerFast, new: PreTrainedTokenizerFast, number: int) -> list[int]:
    """The old tokens that spell the same text as a new one; all of them if it is part of a character."""
    token = new.convert_ids_to_tokens(number)
    if token in new.all_special_tokens:
        return [old.convert_tokens_to_ids(token)]
    text = new.decode([number])
    found: list[int] = [] if "\ufffd" in text else old(text, add_special_tokens=False)["input_ids"]
    return found or list(range(len(old)))


def run_arm(folder: Path, arm: str, *, seed: int, steps: int, rate: float) -> Row:
    """Train one arm with one seed and measure its student."""
    output = folder / f"{arm}-{seed}"
    stage = ("sft",) if arm == "sft" else ("mimic_dense", f"cache.path={folder}/cache")
    parts = (f"student.vision_tower={TEACHER}", f"student.language_model={folder}/language_model")
    sizes = ("batch.global_size=32", "batch.micro_size=32", "workers=0", "save_steps=0", "log_steps=10")
    learning = (f"steps={steps}", f"optim.lr={rate}", f"seed={seed}")
    run(
        *("train-student", *stage, f"data.set={folder}/set", f"output={output}"),
        *(*parts, *sizes, *learning, *ARMS[arm]),
    )
    given = [f"student.checkpoint={output}/student", f"data.set={folder}/unseen", "workers=0"]
    found = measure(load_config(MeasureConfig, (), given))
    lines = [json.loads(line) for line in (output / METRICS_NAME).read_text().splitlines()]
    last = next(line for line in reversed(lines) if "loss" in line)
    return {
        "arm": arm,
        "seed": seed,
        "cross_entropy": found.cross_entropy,
        "accuracy": found.accuracy,
        "calibration_error": found.calibration_error,
        "spans": float(last.get("spans", 0.0)),
    }


if __name__ == "__main__":
    main()
