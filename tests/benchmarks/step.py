"""A training step with a cached teacher, against one without a teacher and one with the teacher in memory.

    python -m tests.benchmarks.step [--quick] --json FILE

A step is forward, backward and AdamW on one micro-batch for a LLaVA student, tower frozen, with the stages' own losses:
`sft` (cross-entropy), `offline` (forward KL from records, tail by its samples), `online` (as LLaVA-MoD does it: the
teacher runs on the batch, and the loss takes float32 logits of both models at every position), `online_lean` (the
teacher runs, but only supervised rows get logits), `sparse` (the student upcycled in every layer to 4 experts with 2
active per token, `offline`'s loss) and `wide` (a dense student whose feed-forward layers are twice as wide: as many
parameters as `sparse` activates per token, `offline`'s loss).

Teacher : student is near 7B : 1.5B; on a GPU these sizes, with random weights, on a CPU sizes about 150 times smaller.
Time: the fastest of rounds taken in turn in one process, on a GPU in seconds, on a CPU in processor seconds of all
threads. Memory: the peak of a few steps, models and optimiser included: on a CPU the resident memory of a process of
its own beyond its imports, on a GPU what torch has allocated. Turning records into tensors is the loader's work and not
part of the step.

What bounds `offline_vs_sft`: both losses compute the same three matrix products, make the same passes over logits, and
have the same large tensors. The divergence adds about 900 small operations on [N, K], 4 % to 10 % of the
cross-entropy's processor seconds (eight rounds in turn in one process, at the CPU's size); the loss is a sixth of the
step or less, so 1 % to 2 % of the step. Anything a ratio shows beyond that is noise: the resident memory of two runs
was 402 and 430 MiB without records, 425 and 409 MiB with them.

Shape suffixes: B sequences, T tokens, N supervised positions, V ids, D hidden size.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Qwen2Config

from llavamod_offline.data.encode.collate import Batch
from llavamod_offline.families.llava.forward import LlavaForward
from llavamod_offline.losses.fused import distillation_from_hidden
from llavamod_offline.models.upcycle import activated_parameters, total_parameters, upcycle
from tests.benchmarks.form import Row, finish, least_seconds, parse_arguments, reset_peak, resident_bytes, write
from tests.benchmarks.worlds.targets import random_targets
from train.data.batches import TrainBatch
from train.stages import mimic, sft
from train.stages.student_pass import StudentPass

NAME = "step"
CASES = ("sft", "offline", "online", "online_lean", "sparse", "wide")
HEAD, DRAWS = 24, 4


@dataclass(frozen=True)
class Shape:
    """A language model's size."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int


@dataclass(frozen=True)
class Size:
    """The sizes of a measurement; `tower` is (hidden size, layers, heads, image side and patch side in pixels)."""

    student: Shape
    teacher: Shape
    tower: tuple[int, int, int, int, int]
    vocab: int
    batch: int
    tokens: int
    supervised: int

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def image_tokens(self) -> int:
        return (self.tower[3] // self.tower[4]) ** 2


CPU = Size(Shape(256, 6, 4, 2, 1024), Shape(512, 9, 8, 4, 2048), (128, 4, 4, 64, 8), 16_384, 4, 320, 96)
QUICK = Size(Shape(64, 2, 4, 2, 128), Shape(128, 3, 4, 2, 256), (32, 2, 2, 32, 8), 1_024, 2, 64, 16)
GPU = Size(Shape(1536, 28, 12, 2, 8960), Shape(3584, 28, 28, 4, 18944), (1024, 24, 16, 336, 14), 151_646, 2, 1024, 256)


def make_model(size: Size, shape: Shape, image_token_id: int | None = None) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights on the device; by default the last id is the image token's."""
    hidden, layers, heads, pixels, patch = size.tower
    text = Qwen2Config(
        vocab_size=size.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    tower = CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=pixels,
        patch_size=patch,
    )
    config = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=size.vocab - 1 if image_token_id is None else image_token_id,
        image_seq_length=size.image_tokens,
        vision_feature_layer=-2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    with torch.device(size.device):
        model = LlavaForConditionalGeneration(config).to(size.dtype).train()
    model.model.vision_tower.requires_grad_(False)
    return model


def make_batch(size: Size) -> TrainBatch:
    """Random tokens, an image in each sequence, and records of a few ids for the supervised tokens, which come last."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(0, size.vocab - 1, (size.batch, size.tokens), generator=generator)
    ids_BT[:, 4 : 4 + size.image_tokens] = size.vocab - 1
    columns = torch.arange(size.tokens - size.supervised, size.tokens)
    rows_N = (torch.arange(size.batch)[:, None] * size.tokens + columns - 1).flatten()
    targets_N = ids_BT[:, columns].flatten()
    pixels = size.tower[3]
    batch = Batch(
        input_ids_BT=ids_BT,
        attention_mask_BT=torch.ones_like(ids_BT),
        images=torch.randn(size.batch, 3, pixels, pixels, generator=generator),
        prediction_rows_N=rows_N,
        target_ids_N=targets_N,
        sequence_of_N=torch.arange(size.batch).repeat_interleave(size.supervised),
        keys=tuple(str(number) for number in range(size.batch)),
        roles=("response",) * size.batch,
    )
    records = random_targets(generator, n=len(targets_N), vocab_size=size.vocab, head=HEAD, draws=DRAWS)
    return TrainBatch(batch, size.batch, replace(records, target_ids_N=targets_N)).to(size.device)


def make_case(name: str, size: Size) -> tuple[Callable[[], None], dict[str, int]]:
    """A step of a case, and its parameter counts: the student's in total and activated per token, and the teacher's."""
    shape = size.student
    student = make_model(size, replace(shape, intermediate=2 * shape.intermediate) if name == "wide" else shape)
    if name == "sparse":
        # On the CPU: for a moment there are two copies of the student.
        student = upcycle(student.cpu(), layers="dense", num_experts=4, top_k=2, seed=0).to(size.device).train()
        student.model.vision_tower.requires_grad_(False)
    teacher = make_model(size, size.teacher).eval().requires_grad_(False) if name.startswith("online") else None
    batch = make_batch(size)
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad and p.numel()], lr=1e-6)
    loss = _loss(name, size, student, teacher)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss(batch).backward()
        optimizer.step()
        if size.device.type == "cuda":
            torch.cuda.synchronize()

    sizes = {"parameters": total_parameters(student), "activated": activated_parameters(student)}
    return step, sizes | {"teacher": total_parameters(teacher) if teacher is not None else 0}


def _loss(name: str, size: Size, student: Any, teacher: Any) -> Callable[[TrainBatch], Tensor]:
    forward = StudentPass(LlavaForward())
    common: dict[str, Any] = {"router_aux_coef": 0.01 if name == "sparse" else 0.0, "forward": forward}
    if name == "sft":
        supervised = sft.make_loss(vocab_size=size.vocab, **common)
        return lambda batch: supervised(student, batch).loss / batch.positions
    if teacher is not None:
        return partial(_online, student, teacher, supervised_rows=name == "online_lean")
    distillation = partial(distillation_from_hidden, tail="samples", kd_weight=1.0)
    imitation = mimic.make_loss(distillation=distillation, lm_weight=0.0, **common)

    return lambda batch: imitation(student, batch, None).loss / batch.positions


def _online(student: Any, teacher: Any, batch: TrainBatch, *, supervised_rows: bool) -> Tensor:
    """Forward KL from live logits; without `supervised_rows`, at all positions and then masked, as in the original.

    The original's mask is off by one position; ours is not, at the same cost.
    """
    data = batch.batch
    inputs = {
        "input_ids": data.input_ids_BT,
        "attention_mask": data.attention_mask_BT,
        "pixel_values": None if data.pixel_values_ICHW is None else data.pixel_values_ICHW.to(student.dtype),
    }
    rows_N = data.prediction_rows_N
    if supervised_rows:
        with torch.no_grad():
            probs_NV = _logits(teacher, inputs, rows_N).softmax(-1, dtype=torch.float32)
        log_probs_NV = _logits(student, inputs, rows_N).log_softmax(-1, dtype=torch.float32)
        return -(probs_NV * log_probs_NV).sum() / len(rows_N)
    with torch.no_grad():
        probs_BTV = teacher(**inputs, use_cache=False).logits.softmax(-1, dtype=torch.float32)
    log_probs_BTV = student(**inputs, use_cache=False).logits.log_softmax(-1, dtype=torch.float32)
    infinite_BTV = torch.isinf(log_probs_BTV)
    products_BTV = torch.masked_fill(probs_BTV * log_probs_BTV, infinite_BTV, 0)
    mask_X = torch.zeros(products_BTV.shape[:2].numel(), device=rows_N.device)
    mask_X[rows_N] = 1.0
    return -(products_BTV.sum(-1).flatten() * mask_X).sum() / mask_X.sum()


def _logits(model: Any, inputs: dict[str, Any], rows_N: Tensor) -> Tensor:
    hidden_BTD: Tensor = model.model(**inputs, use_cache=False).last_hidden_state
    logits_NV: Tensor = model.get_output_embeddings()(hidden_BTD.flatten(0, 1)[rows_N])
    return logits_NV


def measure_cases(
    size: Size, *, repeats: int, apart: bool
) -> Iterator[tuple[str, float, float, float, dict[str, int]]]:
    """Each case's name, minimum seconds and processor seconds, peak memory in MiB, and its parameter counts.

    The peak is that of a few steps, models and optimiser included; on a CPU each case runs in a process of its own if
    `apart`, else all share one. On a GPU the cases run one after another, so that each fits into memory.
    """
    if size.device.type == "cuda":
        for name in CASES:
            _free()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step, sizes = make_case(name, size)
            least = least_seconds({name: step}, repeats=repeats, warmup=2)[name]
            yield name, *least, (torch.cuda.max_memory_allocated() - before) / 2**20, sizes
            del step
        return
    cases = {name: make_case(name, size)[0] for name in CASES}
    seconds = least_seconds(cases, repeats=repeats, warmup=2)
    del cases
    _free()
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1 if apart else None) as pool:
        for name in CASES:
            yield name, *seconds[name], *pool.apply(_peak_here, (name, size))


def _peak_here(name: str, size: Size) -> tuple[float, dict[str, int]]:
    make_case("sft", QUICK)[0]()  # imports and starts what a first step needs
    _free()
    before = resident_bytes()
    step, sizes = make_case(name, size)
    _free()
    reset_peak()
    for _ in range(3):
        step()
    return (resident_bytes(peak=True) - before) / 2**20, sizes


def _free() -> None:
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # else a case may fit into what the one before it has left resident
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    """Measure and report."""
    arguments = parse_arguments(NAME, __doc__ or "")
    size = QUICK if arguments.quick else GPU if torch.cuda.is_available() else CPU
    settings = {
        "student": repr(size.student),
        "teacher": repr(size.teacher),
        "tower": repr(size.tower),
        "V": size.vocab,
        "sequences": size.batch,
        "tokens": size.tokens,
        "supervised": size.supervised,
        "dtype": str(size.dtype),
    }
    seconds: dict[str, float] = {}
    memory: dict[str, float] = {}
    rows: list[Row] = []
    cases = measure_cases(size, repeats=2 if arguments.quick else 8, apart=not arguments.quick)
    for name, wall, worked, mib, sizes in cases:
        seconds[name], memory[name] = wall if size.device.type == "cuda" else worked, mib
        rows.append({"case": name, "seconds": wall, "cpu_seconds": worked, "MiB": mib, **sizes})
        write(NAME, arguments, settings=settings, rows=rows, ratios=_ratios(seconds, memory))
    finish(NAME, arguments, settings=settings, rows=rows, ratios=_ratios(seconds, memory))


def _ratios(seconds: dict[str, float], memory: dict[str, float]) -> dict[str, float]:
    """The ratios whose cases have been measured so far."""
    pairs = {
        "offline_vs_sft": ("offline", "sft"),
        "online_vs_offline": ("online", "offline"),
        "online_lean_vs_offline": ("online_lean", "offline"),
        "sparse_vs_dense": ("sparse", "wide"),
    }
    kinds = {"time": seconds, "memory": memory}
    return {
        f"{name}_{kind}": of[case] / of[rival]
        for name, (case, rival) in pairs.items()
        for kind, of in kinds.items()
        if case in of and rival in of
    }


if __name__ == "__main__":
    main()
