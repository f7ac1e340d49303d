"""Students of a real language model, trained on text, from its live logits and from caches of them.

    python -m tests.benchmarks.language_model --model FOLDER --json FILE [--seeds 3] [--steps 200]

The teacher is any causal language model that transformers loads from a local folder; the student keeps every second
layer of the teacher, and all its weights are trained except the embeddings and the LM head. Both read sources of
Python's standard library. Each seed samples its own texts; all of its students start alike and see the same texts in
the same order. `excess_TARGET`: held-out KL(teacher ‖ student) at the end minus that of a student of the live teacher,
in nats, the mean over seeds; `error_TARGET`: its standard error.

The result is written after every student; rerunning the same command resumes. Without --model, a tiny random one serves
to try this file.

Shape suffixes: T tokens and N positions of a text, V ids, D hidden size.
"""

from __future__ import annotations

import copy
import json
import math
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llavamod_offline.losses.cached_distillation import prior_of
from llavamod_offline.losses.fused import distillation_from_hidden
from llavamod_offline.losses.tail_estimators import choose_tail
from llavamod_offline.models.lm_head import lm_head_of
from teacher_cache.config import PRESETS
from teacher_cache.read.reader import TeacherCache
from tests.benchmarks.form import Row, finish, parse_arguments, write
from tests.benchmarks.teachers import rivals
from tests.benchmarks.teachers.capture import capture
from tests.benchmarks.teachers.ngram import library_texts
from tests.benchmarks.teachers.worlds import Rows, World

NAME = "language_model"
CACHED = ("standard", "compact", "small")
RIVALS = ("rskd50", "topk50", "labels")
TOKENS, TEXTS_A_STEP, RATE, HELD_OUT, LOOKS = 64, 1, 2e-4, 24, 4
_FILES = 300

# (student, hidden states that predict the texts, numbers of these texts) → a step's loss, to backpropagate.
Loss = Callable[[Any, Tensor, list[int]], Tensor]
# Held-out texts, each with the teacher's `log_probs_NV`.
HeldOut = list[tuple[Tensor, Tensor]]


def main() -> None:
    """Measure and report."""
    arguments = parse_arguments(NAME, __doc__ or "", {"model": "", "seeds": 3, "steps": 200})
    options, quick = arguments.options, arguments.quick
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options["model"] or _tiny_model(Path(temporary)))
        steps, seeds = (4, 2) if quick else (options["steps"], options["seeds"])
        settings = {"model": folder.name if options["model"] else "tiny", "steps": steps, "seeds": seeds}
        settings |= {"tokens": TOKENS, "texts_a_step": TEXTS_A_STEP, "rate": RATE, "held_out_texts": HELD_OUT}
        file = arguments.json_file
        before = json.loads(file.read_text()) if file and file.exists() else {"settings": {}, "rows": []}
        kept = {name: value for name, value in before["settings"].items() if name not in ("quick", "seeds")}
        rows: list[Row] = before["rows"] if kept == {k: v for k, v in settings.items() if k != "seeds"} else []
        teacher, held, learned = _load(folder)
        for seed in range(seeds):
            for name, size, found in _students(teacher, held, learned, seed, steps, rows):
                about: Row = {"target": name, "seed": seed, "bytes": size}
                rows = [*rows, *({**about, "step": step, "kl": kl} for step, kl in found)]
                write(NAME, arguments, settings=settings, rows=rows, ratios=ratios_of(rows, steps))
                print(f"seed {seed}, {name}: {found[-1][1]:.4f}", flush=True)
    finish(NAME, arguments, settings=settings, rows=rows, ratios=ratios_of(rows, steps))


def ratios_of(rows: list[Row], steps: int) -> dict[str, float]:
    """Each target's final excess over the live teacher, and its standard error over seeds."""
    ends = {(row["target"], row["seed"]): float(row["kl"]) for row in rows if row["step"] == steps}
    ratios: dict[str, float] = {}
    for name in dict.fromkeys(str(target) for target, _ in ends if target != "live"):
        pairs = [(kl, ends["live", seed]) for (target, seed), kl in ends.items() if target == name]
        excess = [mine - live for mine, live in pairs]
        ratios[f"excess_{name}"] = mean(excess)
        if len(excess) > 1:
            ratios[f"error_{name}"] = stdev(excess) / math.sqrt(len(excess))
    return ratios


def _students(
    teacher: Any, held: HeldOut, learned: Tensor, seed: int, steps: int, done: list[Row]
) -> Iterator[tuple[str, float, list[tuple[int, float]]]]:
    """Each target not in `done`, with its bytes per position and (step, held-out KL) pairs."""
    generator = torch.Generator().manual_seed(seed)
    texts_PT = learned[torch.randperm(len(learned), generator=generator)[: steps * TEXTS_A_STEP]]
    begun = {row["target"] for row in done if row["seed"] == seed}
    if begun >= {"live", *CACHED, *RIVALS}:
        return
    if "live" not in begun:
        yield "live", 0.0, _train(teacher, held, texts_PT, steps, _live(teacher, texts_PT))
    vocab_size = _vocab_size(teacher)

    def rows(number: int) -> Rows:
        return Rows(_log_probs(teacher, texts_PT[number]), texts_PT[number][1:])

    world = World("text", vocab_size, len(texts_PT), torch.zeros(0), rows)
    with tempfile.TemporaryDirectory() as folder:
        presets = {name: replace(PRESETS[name], temperatures=()) for name in CACHED if name not in begun}
        for name, cache in capture(world, presets, Path(folder)).items():
            yield name, cache.bytes_per_position, _train(teacher, held, texts_PT, steps, _cached(cache))
    every = {"labels": rivals.labels, **rivals.RIVALS}
    for name in (name for name in RIVALS if name not in begun):
        kept = [every[name](rows(number).log_probs_NV, 1.0) for number in range(len(texts_PT))]
        size = mean(each.bytes_per_position for each in kept)
        yield name, size, _train(teacher, held, texts_PT, steps, _of_rival(kept, vocab_size))


def _train(teacher: Any, held: HeldOut, texts_PT: Tensor, steps: int, loss: Loss) -> list[tuple[int, float]]:
    """Train a student; return (step, held-out KL) at even intervals, the last at the end."""
    student = _every_second_layer(teacher)
    trained = [weight for weight in student.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0)
    looks = {round(steps * (look + 1) / LOOKS) for look in range(LOOKS)} - {0}
    found = [(0, _held_out_kl(student, held))]
    for step in range(steps):
        numbers = list(range(step * TEXTS_A_STEP, (step + 1) * TEXTS_A_STEP))
        ids_BT = texts_PT[numbers][:, :-1].to(student.device)
        hidden_BTD = student.model(input_ids=ids_BT, use_cache=False).last_hidden_state
        (loss(student, hidden_BTD.flatten(0, 1), numbers) / hidden_BTD[..., 0].numel()).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step + 1 in looks:
            found.append((step + 1, _held_out_kl(student, held)))
    return found


def _live(teacher: Any, texts_PT: Tensor) -> Loss:
    """KL(teacher ‖ student) with the teacher in memory."""

    def loss(student: Any, hidden_ND: Tensor, numbers: list[int]) -> Tensor:
        log_q_NV = _logits(student, hidden_ND, _vocab_size(teacher)).log_softmax(-1)
        log_p_NV = torch.cat([_log_probs(teacher, texts_PT[number]) for number in numbers]).to(log_q_NV)
        return -(log_p_NV.exp() * log_q_NV).sum()

    return loss


def _cached(cache: TeacherCache) -> Loss:
    """The product's loss on a cache's records, with its default reading of the tail."""
    tail = choose_tail("forward_kl", 1.0, sampled_at=1.0, has_samples=cache.has_tail_samples)
    prior = prior_of(cache, epochs=1, swap=None, vocab_size=None) if tail == "samples" else None

    def loss(student: Any, hidden_ND: Tensor, numbers: list[int]) -> Tensor:
        targets = cache.targets([(f"run-{number:09d}", "response") for number in numbers]).to(hidden_ND.device)
        return distillation_from_hidden(hidden_ND, lm_head_of(student), targets, tail=tail, prior=prior).loss_sum

    return loss


def _of_rival(kept: list[rivals.Kept], vocab_size: int) -> Loss:
    """A loss whose gradient with respect to the logits is q − p̂."""

    def loss(student: Any, hidden_ND: Tensor, numbers: list[int]) -> Tensor:
        logits_NV = _logits(student, hidden_ND, vocab_size)
        rows = logits_NV.detach().split(TOKENS)
        with torch.no_grad():
            pieces = [
                rivals.target_gradient(_moved(kept[number], row.device), row.softmax(-1))
                for number, row in zip(numbers, rows, strict=True)
            ]
        return (logits_NV * torch.cat(pieces)).sum()

    return loss


def _moved(kept: rivals.Kept, device: torch.device) -> rivals.Kept:
    tail_N = None if kept.tail_N is None else kept.tail_N.to(device)
    return replace(kept, ids_NK=kept.ids_NK.to(device), probs_NK=kept.probs_NK.to(device), tail_N=tail_N)


def _logits(model: Any, hidden_ND: Tensor, vocab_size: int) -> Tensor:
    """Plain logits, for losses other than the product's own."""
    head = lm_head_of(model)
    assert head.is_linear
    return (hidden_ND @ head.weight_VD[:vocab_size].T).float() * head.scale


@torch.inference_mode()
def _log_probs(model: Any, ids_T: Tensor) -> Tensor:
    """A model's log-probs after each token of a text but the last, [N, V], on the CPU."""
    hidden_ND = model.model(input_ids=ids_T[None, :-1].to(model.device), use_cache=False).last_hidden_state[0]
    return _logits(model, hidden_ND, _vocab_size(model)).log_softmax(-1).cpu()


def _held_out_kl(student: Any, held: HeldOut) -> float:
    total = 0.0
    for ids_T, log_p_NV in held:
        log_q_NV = _log_probs(student, ids_T)
        total += float((log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1).mean())
    return total / len(held)


def _vocab_size(model: Any) -> int:
    return lm_head_of(model).rows


def _every_second_layer(teacher: Any) -> Any:
    """A copy of the teacher with only its first, third, … layers; embeddings and LM head are frozen."""
    student = copy.deepcopy(teacher)
    for part in (student.get_input_embeddings(), student.get_output_embeddings()):
        part.requires_grad_(False)
    kept = list(range(0, len(student.model.layers), 2))
    student.model.layers = torch.nn.ModuleList([student.model.layers[place] for place in kept])
    student.config.num_hidden_layers = len(kept)
    if getattr(student.config, "layer_types", None):
        student.config.layer_types = [student.config.layer_types[place] for place in kept]
    for place, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = place
    return student.train()


def _load(folder: Path) -> tuple[Any, HeldOut, Tensor]:
    """The teacher, the held-out texts and the training texts, each of `TOKENS` + 1 ids."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    teacher = teacher.to(device).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = library_texts()
    order = np.random.default_rng(0).permutation(len(texts))[:_FILES]
    parts: dict[bool, list[Tensor]] = {True: [], False: []}
    for place, number in enumerate(order):
        ids = tokenizer(texts[number], add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        whole = len(ids) // (TOKENS + 1) * (TOKENS + 1)
        parts[place % 10 == 0].append(ids[:whole].view(-1, TOKENS + 1))
    held, learned = torch.cat(parts[True]), torch.cat(parts[False])
    chosen = torch.randperm(len(held), generator=torch.Generator().manual_seed(0))[:HELD_OUT]
    return teacher, [(ids_T, _log_probs(teacher, ids_T)) for ids_T in held[chosen]], learned


def _tiny_model(folder: Path) -> Path:
    """A random language model with a byte-level tokenizer, made on the spot."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedTokenizerFast

    from tests.benchmarks.teachers.ngram import train_tokenizer

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(library_texts()[:5], 400))
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        layer_types=["full_attention"] * 4,
    )
    Gemma3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
