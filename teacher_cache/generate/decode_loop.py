"""A teacher writing answers: left-padded batches of prompts, a key-value cache, one token of each per step.

The model runs as in the Hugging Face engine (same embeddings, positions and float32 LM head), so that a token is chosen
from the distribution that the capture records at its position.

Shape suffixes: B prompts of a batch, T tokens of the longest, D hidden size, V shared vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llavamod_offline.data.encode.tokenize import Ids
from llavamod_offline.errors import ModelError
from llavamod_offline.families.protocol import FeatureFamily, SampleImage
from teacher_cache.engines.batch_limit import BatchLimit
from teacher_cache.engines.hf import HfCaptureEngine
from teacher_cache.engines.tail_samples import sequence_uniforms
from teacher_cache.generate.sampling import choose_tokens


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen, and their largest number; `temperature` 0 is greedy."""

    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int


@dataclass(frozen=True)
class Prompt:
    """One prompt: its tokens, its images, and the name of its random numbers.

    `room`: the most tokens that the answer may have, including the one that ends it.
    """

    key: str
    stream: str
    input_ids_T: Ids
    images: tuple[SampleImage, ...]
    room: int


@dataclass(frozen=True)
class Written:
    """The answer's token ids without the one that ends it, and whether that one was reached.

    `finite`: whether all logits were; the answer stops before any that were not.
    """

    ids: tuple[int, ...]
    ended: bool
    finite: bool = True


def write_answers(engine: HfCaptureEngine, prompts: Sequence[Prompt], decoding: Decoding) -> list[Written]:
    """Answer a batch of prompts, in halves if memory runs out. Errors: `ModelError` naming one that does not fit."""
    limit = BatchLimit(len(prompts), "prompts")
    return list(limit.run(prompts, lambda piece: _write(engine, piece, decoding), _too_large))


def _too_large(prompt: Prompt) -> str:
    return (
        f"sample '{prompt.key}': its {len(prompt.input_ids_T)} tokens and an answer do not fit into the device's "
        "memory even alone: lower generate.max_new_tokens, or use a larger device"
    )


@torch.inference_mode()
def _write(engine: HfCaptureEngine, prompts: Sequence[Prompt], decoding: Decoding) -> list[Written]:
    rooms = [min(prompt.room, decoding.max_new_tokens) for prompt in prompts]
    uniforms = np.stack([sequence_uniforms(decoding.seed, p.key, p.stream, max(rooms)) for p in prompts])
    end = engine.teacher.encoder.end_id
    written: list[list[int]] = [[] for _ in prompts]
    ended, finite = [False] * len(prompts), [True] * len(prompts)
    steps = next_logits(engine, prompts)
    logits_BV = next(steps)
    for step in range(max(rooms)):
        fine_B = (logits_BV.isnan() | logits_BV.isposinf()).any(-1).logical_not()
        logits_BV = torch.where(fine_B[:, None], logits_BV, 0.0)
        uniforms_B = torch.from_numpy(uniforms[:, step])
        ids_B = choose_tokens(logits_BV, uniforms_B, temperature=decoding.temperature, top_p=decoding.top_p)
        for row, (number, fine) in enumerate(zip(ids_B.tolist(), fine_B.tolist(), strict=True)):
            if ended[row] or not finite[row] or len(written[row]) >= rooms[row]:
                continue
            finite[row], ended[row] = fine, fine and number == end
            if fine and not ended[row]:
                written[row].append(number)
        states = zip(written, ended, finite, rooms, strict=True)
        if all(done or not fine or len(ids) >= room for ids, done, fine, room in states):
            break
        logits_BV = steps.send(ids_B)
    return [Written(tuple(ids), *rest) for ids, *rest in zip(written, ended, finite, strict=True)]


def next_logits(engine: HfCaptureEngine, prompts: Sequence[Prompt]) -> Generator[Tensor, Tensor, None]:
    """Yield the logits [B, V] of the next tokens, −inf for the image's id; receives the chosen ids [B]."""
    model, teacher = engine.model, engine.teacher
    if not isinstance(teacher, FeatureFamily):
        raise ModelError(f"{teacher.folder}: it only records given answers: choose another checkpoint")
    embed, decoder = model.get_input_embeddings(), model.get_decoder()
    device = embed.weight.device
    lengths_B = torch.tensor([len(prompt.input_ids_T) for prompt in prompts])
    longest = int(lengths_B.max())
    image = teacher.image_token_id
    ids_BT = torch.full((len(prompts), longest), 0 if image != 0 else 1)
    for row, prompt in enumerate(prompts):
        ids_BT[row, : len(prompt.input_ids_T)] = torch.from_numpy(prompt.input_ids_T)
    mask_BT = (torch.arange(longest) < lengths_B[:, None]).long()
    images = [image for prompt in prompts for image in prompt.images]
    positions_BT = teacher.position_ids(model, ids_BT, mask_BT, images)
    if positions_BT is None:
        positions_BT = torch.arange(longest).expand(ids_BT.shape)
    # Positions of three kinds (time, height, width) continue together from the largest of them.
    reached_BT = torch.where(mask_BT.bool(), positions_BT, -1)
    following_B = reached_BT.amax(-1).reshape(-1, len(prompts)).amax(0) + 1
    moved_BT = (torch.arange(longest) + lengths_B[:, None]) % longest  # from right padding to left padding
    ids_BT, mask_BT = ids_BT.gather(1, moved_BT), mask_BT.gather(1, moved_BT)
    positions_BT = positions_BT.gather(-1, moved_BT.expand(positions_BT.shape))
    ids_BT = ids_BT.to(device)
    inputs = {"input_ids": ids_BT}  # a decoder may do more with ids than look up their embeddings
    if images:
        embedded_BTD = embed(ids_BT)
        features = torch.cat(teacher.image_features(model, images)).to(embedded_BTD)
        inputs = {"inputs_embeds": embedded_BTD.masked_scatter(torch.eq(ids_BT, image or 0)[..., None], features)}
    mask_BT, positions_BT = mask_BT.to(device), positions_BT.to(device)
    following_B = following_B.to(device)
    cache = None
    while True:
        output = decoder(
            **inputs,
            attention_mask=mask_BT,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        logits_BV = engine.lm_head.logits(output.last_hidden_state[:, -1].to(engine.lm_head.device))
        if image is not None and image < logits_BV.shape[1]:
            logits_BV[:, image] = -torch.inf
        chosen_B = (yield logits_BV).to(device)
        inputs = {"input_ids": chosen_B[:, None]}
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(prompts), 1)], 1)
        positions_BT = following_B[:, None].expand(*positions_BT.shape[:-1], 1)
        following_B = following_B + 1
