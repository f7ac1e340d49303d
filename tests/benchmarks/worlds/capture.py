"""What the capture benchmark runs on: teachers from toy to 7B, with sets to match.

All but the toy teacher have random weights, made where they are used: their folders hold only what preparing a job
needs. The LM head is scaled so that distributions have an entropy of about 2.4 nats: normally distributed logits with
standard deviation σ give an entropy of ln V − σ²/2.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import (
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.toyworld.conversations import captioned, chatted, quizzed
from llavamod_offline.toyworld.draw import encode_scene
from llavamod_offline.toyworld.scene import random_scene
from tests.tiny import tiny_image, tiny_tokenizer, write_image_processor
from tests.tiny_families import TINY_FAMILIES

TOY_TEACHER = Path(__file__).parents[3] / "llavamod_offline/toyworld/checkpoints/teacher"
_ENTROPY = 2.4
_WORDS = ("circle", "square", "triangle", "star", "red", "green", "blue", "yellow", "picture", "left", "right", "There")


@dataclass(frozen=True)
class Size:
    """A teacher and a set: the number of samples, and how many make a shard and a batch.

    `text` is None for the toy teacher, `vision` also for a Qwen3-VL. `rounds`: how often it is measured; short
    measurements vary more.
    """

    name: str
    samples: int
    shard_samples: int
    batch_size: int
    text: dict[str, int] | None = None
    vision: dict[str, int] | None = None
    answer_words: int = 0
    rounds: int = 3


TOY = Size("toy", samples=600, shard_samples=200, batch_size=32, rounds=9)
MIDDLE = Size(
    "middle",
    samples=48,
    shard_samples=16,
    batch_size=8,
    text={"vocab_size": 32_000, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8}
    | {"num_attention_heads": 8, "num_key_value_heads": 4},
    vision={"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
    | {"image_size": 112, "patch_size": 14},
    answer_words=40,
)
GENERIC = Size(
    "generic",
    samples=240,
    shard_samples=40,
    batch_size=8,
    text={"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "head_dim": 64},
    answer_words=40,
    rounds=5,
)
LARGE = Size(
    "7B",
    samples=192,
    shard_samples=64,
    batch_size=16,
    text={"vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28}
    | {"num_attention_heads": 28, "num_key_value_heads": 4},
    vision={"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    | {"image_size": 336, "patch_size": 14},
    answer_words=60,
    rounds=2,
)


def write_world(folder: Path, size: Size) -> tuple[Path, Path]:
    """Write a teacher's folder and a packed set; return both."""
    rng = random.Random(0)
    make = _toy_sample if size.text is None else _long_sample
    write_set(
        (make(number, rng, size) for number in range(size.samples)), folder / "set", shard_samples=size.shard_samples
    )
    if size.text is None:
        return TOY_TEACHER, folder / "set"
    if size.vision is None:
        return _write_qwen3_vl(folder / "teacher", size.text), folder / "set"
    return _write_teacher(folder / "teacher", size.text, size.vision), folder / "set"


def random_loader(folder: Path, device: str) -> Callable[..., Any]:
    """A loader for the teacher of such a folder: its model with random weights, created on the device."""

    def load(dtype: torch.dtype, *, attn_implementation: str = "sdpa", **_: Any) -> Any:
        config = LlavaConfig.from_pretrained(folder)
        with torch.random.fork_rng(devices=[]), torch.device(device):
            torch.manual_seed(0)
            model: Any = LlavaForConditionalGeneration._from_config(
                config, dtype=dtype, attn_implementation=attn_implementation
            )
            text = config.text_config
            spread = math.sqrt(2 * (math.log(text.vocab_size) - _ENTROPY) / text.hidden_size)
            torch.nn.init.normal_(model.lm_head.weight, std=spread)
        return model.eval()

    return load


def _write_teacher(folder: Path, text: dict[str, int], vision: dict[str, int]) -> Path:
    """Write configuration, tokenizer, image processor, and a placeholder for the weights."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    tokenizer = _large_tokenizer(text["vocab_size"])
    tokenizer.save_pretrained(folder)
    LlavaConfig(
        vision_config=CLIPVisionConfig(**vision),
        text_config=Qwen2Config(**text, max_position_embeddings=4096, tie_word_embeddings=False),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(vision["image_size"] // vision["patch_size"]) ** 2,
        tie_word_embeddings=False,
    ).save_pretrained(folder)
    write_image_processor(folder)
    file = folder / "preprocessor_config.json"
    content = json.loads(file.read_text())
    side = vision["image_size"]
    content |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    file.write_text(json.dumps(content))
    save_file({"none": torch.zeros(1)}, folder / "model.safetensors")
    return folder


def _write_qwen3_vl(folder: Path, text: dict[str, int]) -> Path:
    """Write a Qwen3-VL with random weights and a text model of the given size."""
    tiny = TINY_FAMILIES["qwen3_vl"]

    def config(own: dict[str, Any], ids: Mapping[str, int]) -> dict[str, Any]:
        settings = tiny.config({**own, **text}, ids)
        return {**settings, "vision_config": {**settings["vision_config"], "out_hidden_size": text["hidden_size"]}}

    return replace(tiny, config=config).write(folder)


def _large_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """The tests' tokenizer, padded to `vocabulary` tokens with ones that no text contains."""
    tokenizer = tiny_tokenizer()
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    known = len(tokenizer)
    content["model"]["vocab"] |= {f"<unused {number}>": number for number in range(known, vocabulary)}
    made = Tokenizer.from_str(json.dumps(content))
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def _toy_sample(number: int, rng: random.Random, size: Size) -> Sample:
    """Captions, conversations and quizzes in the same proportions as the toy world's general set."""
    scene, share = random_scene(rng), rng.random()
    turns = captioned(scene, rng) if share < 0.4 else chatted(scene, rng, 3) if share < 0.6 else quizzed(scene, rng, 4)
    return Sample(f"toy-{number:06d}", tuple(turns), (encode_scene(scene),), ("png",))


def _long_sample(number: int, rng: random.Random, size: Size) -> Sample:
    """An image the size of a photograph, and two turns with answers of 0.5 to 1.5 times `answer_words` words."""
    turns = []
    for turn in range(2):
        words = rng.randint(size.answer_words // 2, size.answer_words * 3 // 2)
        turns.append(Turn("user", ("<image>\n" if turn == 0 else "") + "What is in the picture?"))
        turns.append(Turn("assistant", " ".join(rng.choices(_WORDS, k=words))))
    return Sample(f"long-{number:06d}", tuple(turns), (tiny_image(number, (640, 480), "JPEG"),), ("jpg",))
