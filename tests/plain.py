"""Ask a checkpoint questions as a user of plain transformers does, with nothing but the files of its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from eval.engines.hf import HfEngine
from eval.engines.prompts import prompt_sequence, read_answer
from llavamod_offline.data.sample import Sample, Turn
from tests.tiny import tiny_image

Question = tuple[str, Sequence[Path]]  # a text, and the images before it


def questions(folder: Path) -> list[Question]:
    """Questions of different lengths, about wide, tall and square images, about none, and about two."""
    sizes = {"wide.png": (60, 20), "tall.png": (17, 51), "square.png": (24, 24), "large.png": (300, 200)}
    for number, (name, size) in enumerate(sizes.items()):
        (folder / name).write_bytes(tiny_image(number, size))
    wide, tall, square, large = (folder / name for name in sizes)
    return [
        ("What is it?", [wide]),
        ("Which colour has the large square on the left of the star?\nAnswer in a word.", [tall]),
        ("How many?", []),
        (" Is there\na red circle in both of them? ", [square, tall]),
        ("Why", [large]),
    ]


def plain_answers(
    folder: Path, asked: Sequence[Question], tokens: int, *, processor: Any = None, batch: bool = True
) -> list[list[int]]:
    """The ids that plain transformers generates for all questions, in one batch or one by one, up to the end token.

    `processor`: the folder's, for when its video part needs a package that is not installed.
    """
    processor = processor or AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    conversations = []
    for text, images in asked:
        parts = [*({"type": "image", "path": str(path)} for path in images), {"type": "text", "text": text}]
        conversations.append([{"role": "user", "content": parts}])
    answers = []
    end = model.generation_config.eos_token_id
    for these in [conversations] if batch else [[one] for one in conversations]:
        inputs = processor.apply_chat_template(
            these, tokenize=True, add_generation_prompt=True, padding=batch, return_dict=True, return_tensors="pt"
        )
        answers += model.generate(**inputs, max_new_tokens=tokens)[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(end)] if end in row else row for row in answers]


def engine_answers(folder: Path, asked: Sequence[Question], tokens: int, *, template: str = "qwen") -> list[list[int]]:
    """The ids that `eval-student generate` generates for each question alone; there one image, here any number."""
    engine = HfEngine(folder, template=template)
    answers = []
    for text, images in asked:
        turns = (Turn("user", "<image>\n" * len(images) + text), Turn("assistant", "-"))
        sample = Sample("asked", turns, tuple(path.read_bytes() for path in images), ("png",) * len(images))
        prompt = prompt_sequence(engine.family, sample, tokens)
        ids = engine.generate([prompt], [engine.family.images(sample)], tokens)[0]
        answers.append(ids[: read_answer(engine.encoder, ids).n_tokens])
    return answers
