"""A teacher writing answers: left-padded batches of prompts through transformers' `generate`.

Each token is chosen from the logits of the float32 LM head, as in the Hugging Face engine: from the distribution that
the capture records at its position.

Shape suffixes: B prompts of a batch, T tokens so far, V shared vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList, StoppingCriteriaList

from llavamod_offline.data.encode.tokenize import Ids, TokenizedSequence
from llavamod_offline.families.run import on_model
from teacher_cache.engines.batch_limit import BatchLimit
from teacher_cache.engines.hf import HfCaptureEngine
from teacher_cache.engines.tail_samples import sequence_uniforms
from teacher_cache.generate.sampling import choose_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_NO_IDS: Ids = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen, and at most how many; `temperature` 0 is greedy. `stop`: texts that end an answer."""

    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """One prompt: its tokens, its images, and the name of its random stream.

    `images`: in the form that the writer takes; for `write_answers`, a `SampleImage` each. `room`: the most tokens that
    the answer may have, including the one that ends it. `encoded_images` identify them where prefixes are shared.
    """

    key: str
    stream: str
    input_ids_T: Ids
    images: Any
    room: int
    encoded_images: tuple[bytes, ...] = ()


@dataclass(frozen=True)
class Written:
    """The answer's token ids without the one that ends it, and whether the end was reached.

    `finite`: whether all logits were; the answer stops before any that were not. `log_probs`: of each token, ending
    with the one that ends the answer, as `choose_tokens` gives them; they differ between batches by rounding.
    `stopped`: the text of `Decoding.stop` that ended the answer; `ids` end with the token that completed it.
    """

    ids: tuple[int, ...]
    ended: bool
    finite: bool = True
    log_probs: tuple[float, ...] = field(default=(), compare=False)
    stopped: str | None = None


def write_answers(engine: HfCaptureEngine, prompts: Sequence[Prompt], decoding: Decoding) -> list[Written]:
    """Answer a batch of prompts, in halves if memory runs out. Errors: `ModelError` naming one that does not fit."""
    limit = BatchLimit(len(prompts), "prompts")
    return list(limit.run(prompts, lambda piece: _write(engine, piece, decoding), _too_large))


def _too_large(prompt: Prompt) -> str:
    return (
        f"sample '{prompt.key}': its {len(prompt.input_ids_T)} tokens and an answer do not fit into the device's "
        "memory even alone: lower generate.max_new_tokens, or use a larger device"
    )


def _write(engine: HfCaptureEngine, prompts: Sequence[Prompt], decoding: Decoding) -> list[Written]:
    rooms = [min(prompt.room, decoding.max_new_tokens) for prompt in prompts]
    uniforms = np.stack([sequence_uniforms(decoding.seed, p.key, p.stream, max(rooms)) for p in prompts])
    end = engine.teacher.encoder.end_id
    written: list[list[int]] = [[] for _ in prompts]
    log_probs: list[list[float]] = [[] for _ in prompts]
    ended, finite = [False] * len(prompts), [True] * len(prompts)
    stopped: list[str | None] = [None] * len(prompts)
    tokenizer = engine.teacher.encoder.tokenizer

    def choose(logits_BV: Tensor, step: int) -> Tensor | None:
        fine_B = (logits_BV.isnan() | logits_BV.isposinf()).any(-1).logical_not()
        logits_BV = torch.where(fine_B[:, None], logits_BV, 0.0)
        uniforms_B = torch.from_numpy(uniforms[:, step])
        ids_B, chosen_B = choose_tokens(logits_BV, uniforms_B, temperature=decoding.temperature, top_p=decoding.top_p)
        found = zip(ids_B.tolist(), chosen_B.tolist(), fine_B.tolist(), strict=True)
        for row, (number, log_prob, fine) in enumerate(found):
            if ended[row] or not finite[row] or len(written[row]) >= rooms[row]:
                continue
            finite[row], ended[row] = fine, fine and number == end
            if fine:
                log_probs[row].append(log_prob)
            if fine and not ended[row]:
                written[row].append(number)
                stopped[row] = first_stop(tokenizer, written[row], decoding.stop)
                ended[row] = stopped[row] is not None
        states = zip(written, ended, finite, rooms, strict=True)
        finished = all(done or not fine or len(ids) >= room for ids, done, fine, room in states)
        return None if finished else ids_B

    decode(engine, prompts, choose, most=max(rooms))
    rows = zip(written, ended, finite, log_probs, stopped, strict=True)
    return [Written(tuple(ids), done, fine, tuple(own), stop) for ids, done, fine, own, stop in rows]


def first_stop(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], stop: Sequence[str]) -> str | None:
    """The text of `stop` that begins first in the decoded tokens, if any."""
    if not stop:
        return None
    text = answer_text(tokenizer, ids)
    found = [(text.index(each), each) for each in stop if each in text]
    return min(found)[1] if found else None


def answer_text(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    """Decode the tokens of an answer."""
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


@torch.inference_mode()
def decode(
    engine: HfCaptureEngine, prompts: Sequence[Prompt], choose: Callable[[Tensor, int], Tensor | None], *, most: int
) -> None:
    """Continue prompts with the ids [B] that `choose` takes from the logits [B, V] of a step, until it gives None.

    An image's id has a logit of −inf. At most `most` steps are taken.
    """
    model, teacher = engine.model, engine.teacher
    sequences = [TokenizedSequence(prompt.key, "", prompt.input_ids_T, _NO_IDS) for prompt in prompts]
    inputs = on_model(model, teacher.model_inputs(sequences, [prompt.images for prompt in prompts], left=True))
    seen: list[Tensor] = []  # the LM head's input in this step
    step, stopped = 0, False

    def decide(input_ids_BT: Tensor, scores_BV: Tensor) -> Tensor:
        nonlocal step, stopped
        logits_BV = engine.lm_head.logits_of_layer_inputs(seen.pop().to(engine.lm_head.device))
        if teacher.image_token_id is not None and teacher.image_token_id < logits_BV.shape[1]:
            logits_BV[:, teacher.image_token_id] = -torch.inf
        chosen_B = choose(logits_BV, step)
        step, stopped = step + 1, chosen_B is None
        certain_BV = torch.full_like(scores_BV, -torch.inf)
        taken_B = input_ids_BT[:, -1] if chosen_B is None else chosen_B.to(scores_BV.device)
        return certain_BV.scatter(1, taken_B[:, None], 0.0)

    def stop(input_ids_BT: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(input_ids_BT),), stopped, device=input_ids_BT.device)

    model.generation_config = GenerationConfig()  # otherwise the folder's decides what this one leaves open
    handle = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0][:, -1]))
    try:
        GenerationMixin.generate(  # not the class's own: some ignore `logits_processor` (Janus)
            model,
            **inputs,
            generation_config=GenerationConfig(max_new_tokens=most, do_sample=False, pad_token_id=0),
            logits_processor=LogitsProcessorList([decide]),
            stopping_criteria=StoppingCriteriaList([stop]),
        )
    finally:
        handle.remove()
