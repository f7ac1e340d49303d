"""Teachers to measure caches on: full distributions at many positions, with a student's hidden states where available.

Shape suffixes: T tokens and N positions of a sequence, V ids, D hidden size, J numbers that hidden states are projected
to.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tests.benchmarks.teachers.ngram import NGram, library_texts, tokenise, train_tokenizer

if TYPE_CHECKING:
    from llavamod_offline.data.encode.collate import Batch

SEQUENCE = 100
PROJECTED = 16


@dataclass(frozen=True)
class Rows:
    """A sequence as the teacher sees it: `log_probs_NV` of the next token, the actual next tokens, and hidden states.

    `hidden_ND` are the teacher's, None if it has none. `student_log_probs_NV` and `student_hidden_ND` are those of a
    real student at its start, None if there is none.
    """

    log_probs_NV: Tensor
    target_ids_N: Tensor
    hidden_ND: Tensor | None = None
    student_log_probs_NV: Tensor | None = None
    student_hidden_ND: Tensor | None = None


@dataclass(frozen=True)
class World:
    """A teacher: `rows(i)` gives sequence i of `sequences`."""

    name: str
    vocab_size: int
    sequences: int
    unigram_log_probs_V: Tensor
    rows: Callable[[int], Rows]


def ngram_world(sequences: int, vocab_size: int = 110_000, files: int | None = None) -> World:
    """The 4-gram model of Python's standard library (of its first `files`), evaluated on runs of held-out text."""
    texts = library_texts()[:files]
    tokenizer = train_tokenizer(texts, vocab_size)
    learned, held = tokenise(tokenizer, texts)
    model = NGram(learned, tokenizer.get_vocab_size())
    starts = np.random.default_rng(0).integers(3, len(held) - SEQUENCE, sequences)

    def rows(number: int) -> Rows:
        places = starts[number] + np.arange(SEQUENCE)
        contexts = np.stack([held[places - 3], held[places - 2], held[places - 1]], 1)
        return Rows(torch.from_numpy(np.log(model.probs(contexts))).float(), torch.from_numpy(held[places]))

    unigram_V = torch.from_numpy(np.log(model.unigram_V)).float()
    return World("ngram", tokenizer.get_vocab_size(), sequences, unigram_V, rows)


def causal_world(path: str, sequences: int, student: str = "") -> World:
    """Any causal language model that transformers loads from a local folder, on the standard library's sources.

    `student`: the folder of a model with the same tokenizer, or `early-exit:N`, the teacher itself exiting after layer
    N through its final norm and LM head. The world is named after the folder. Hidden states are projected to 16 random
    numbers, so that the sums of weight gradients stay small at any vocabulary.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, start = _load_causal(path).to(device), _load_student(path, student)
    text = "\n".join(library_texts()[: sequences // 4 + 8])
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
    models = [model] if start is None else [model, start.to(device)]
    vocab_size = min(len(tokenizer), *(each.get_output_embeddings().weight.shape[0] for each in models))

    def rows(number: int) -> Rows:
        piece = ids[number * SEQUENCE : (number + 1) * SEQUENCE + 1]
        (log_probs_NV, hidden_NJ), *other = [_run_causal(each, piece, vocab_size) for each in models]
        return Rows(log_probs_NV, piece[1:], hidden_NJ, *(other[0] if other else (None, None)))

    return World(Path(path).name, vocab_size, sequences, _mean_log_probs(rows, min(sequences, 20)), rows)


def _load_causal(path: str, layers: int | None = None) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path, local_files_only=True)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    model = AutoModelForCausalLM.from_pretrained(path, config=config, local_files_only=True, dtype=torch.float32)
    return model.eval()


def _load_student(path: str, student: str) -> Any | None:
    if not student:
        return None
    kind, _, layers = student.partition(":")
    if kind == "early-exit":
        return _load_causal(path, int(layers))
    if not Path(student).is_dir():
        raise SystemExit(f"--student: {student} is no folder: pass one, or early-exit:N")
    from transformers import AutoTokenizer

    theirs, ours = (AutoTokenizer.from_pretrained(each, local_files_only=True) for each in (path, student))
    if theirs.get_vocab() != ours.get_vocab():
        raise SystemExit(f"--student: {student} has another tokenizer than {path}: pass a model that shares it")
    return _load_causal(student)


@torch.inference_mode()
def _run_causal(model: Any, ids_T: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Log-probs [N, V] of the next token at each position, and the last hidden states projected to [N, 16]."""
    outputs = model(ids_T[None, :-1].to(model.device), output_hidden_states=True, use_cache=False)
    log_probs_NV = outputs.logits[0, :, :vocab_size].float().log_softmax(-1).cpu()
    hidden_ND = outputs.hidden_states[-1][0].float().cpu()
    projection_DJ = torch.randn(hidden_ND.shape[1], PROJECTED, generator=torch.Generator().manual_seed(0))
    return log_probs_NV, hidden_ND @ projection_DJ / PROJECTED**0.5


def toy_world(sequences: int) -> World:
    """The toy teacher that ships with the package, with the toy student at the beginning of its training.

    A sequence is all answers to eight images.
    """
    from llavamod_offline.demo.plan import LANGUAGE_MODEL, TEACHER
    from llavamod_offline.families.llava.building import build_llava
    from llavamod_offline.families.llava.checkpoint import load_llava
    from llavamod_offline.models.checkpoint import load_tokenizer

    teacher, student = load_llava(TEACHER).eval(), build_llava(TEACHER, LANGUAGE_MODEL, seed=0).eval()
    vocab_size = len(load_tokenizer(TEACHER))
    made = []
    for batch in _toy_batches(TEACHER, 8 * sequences, 8):
        teacher_hidden_ND, log_probs_NV = _predict(teacher, batch, vocab_size)
        student_hidden_ND, student_log_probs_NV = _predict(student, batch, vocab_size)
        made.append(Rows(log_probs_NV, batch.target_ids_N, teacher_hidden_ND, student_log_probs_NV, student_hidden_ND))
    rows = made.__getitem__
    return World("toy", vocab_size, len(made), _mean_log_probs(rows, len(made)), rows)


def _toy_batches(checkpoint: Path, samples: int, size: int) -> Iterator[Batch]:
    from llavamod_offline.data.encode.collate import collate
    from llavamod_offline.data.encode.template import get_template
    from llavamod_offline.data.images import ImagePreprocessor
    from llavamod_offline.data.pack.pack import write_set
    from llavamod_offline.data.sets.sample_set import SampleSet
    from llavamod_offline.data.sources.read import prepare_sources
    from llavamod_offline.families.llava.checkpoint import load_config, sequence_encoder
    from llavamod_offline.models.checkpoint import load_tokenizer
    from llavamod_offline.toyworld.datasets import write_datasets

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        files = write_datasets(root, align=0, general=samples, multitask=0, preference=1, error_share=0.1, seed=9)
        write_set(prepare_sources([files["general"]], images=[root / "images"], keys="id"), root / "set")
        packed = SampleSet.open(root / "set")
        encoder = sequence_encoder(load_config(checkpoint), load_tokenizer(checkpoint), get_template("qwen"), 2048)
        images = ImagePreprocessor.from_checkpoint(checkpoint)
        for start in range(0, samples - size + 1, size):
            read = [packed.read(row) for row in range(start, start + size)]
            pixels = [[images.pixels(image, name=sample.key) for image in sample.images] for sample in read]
            yield collate([encoder.encode(sample, "response") for sample in read], pixels, pad_id=0)


@torch.inference_mode()
def _predict(model: Any, batch: Batch, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Hidden states that predict the supervised tokens, and the log-probs that the LM head computes from them."""
    from llavamod_offline.families.llava.forward import student_hidden_states
    from llavamod_offline.models.lm_head import lm_head_of

    hidden_BTD = student_hidden_states(model, batch.input_ids_BT, batch.attention_mask_BT, batch.pixel_values_ICHW)
    hidden_ND = hidden_BTD.flatten(0, 1)[batch.prediction_rows_N]
    return hidden_ND, (hidden_ND @ lm_head_of(model).weight_VD[:vocab_size].T).log_softmax(-1)


def _mean_log_probs(rows: Callable[[int], Rows], sequences: int) -> Tensor:
    """The teacher's own unigram: the mean of its distributions, slightly smoothed."""
    means = torch.stack([rows(number).log_probs_NV.double().exp().mean(0) for number in range(sequences)])
    mean_V = means.mean(0) + 1e-9
    return (mean_V / mean_V.sum()).log().float()
