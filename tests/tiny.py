"""Tiny models, images, samples and sets, made on the spot, for every test that needs one."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
)

from llavamod_offline.data.encode.template import get_template
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.families.llava.export import save_llava

IMAGE_SIZE = 24
PATCH_SIZE = 8
IMAGE_TOKENS = 9
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")

# Qwen2's pre-tokenisation pattern.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEXTS = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: ASSISTANT:",
    "What is in the picture? How many objects are there? Which colour has the large square on the left?",
    "There is a red circle above a small blue triangle. A green star stands to the right of two yellow squares.",
    "Is there a purple circle in the image? Yes. No. The number written in the middle is 7.",
    "system\nYou are a helpful assistant. user\n assistant\n",
)
_SHAPES = ("circle", "square", "triangle", "star")
_COLOURS = ("red", "green", "blue", "yellow", "purple")


def tiny_tokenizer(vocabulary: int | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of at most `vocabulary` tokens (default 400); the special tokens come last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=(vocabulary or 400) - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


def write_tiny_llava(
    folder: Path,
    *,
    hidden: int = 64,
    layers: int = 2,
    head_rows: int | None = None,
    seed: int = 0,
    vocabulary: int | None = None,
    tied: bool = True,
    text_config: type[LlamaConfig] | type[Qwen2Config] | type[Qwen3Config] = Qwen2Config,
    template: str | None = "qwen",
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Path:
    """Write a random LLaVA folder (24×24 pixels, 9 image tokens); `head_rows` defaults to the tokenizer's length.

    Its chat template words conversations as `template` does; None: no chat template.
    """
    tokenizer = tokenizer or tiny_tokenizer(vocabulary)
    rows = head_rows or len(tokenizer)
    config = LlavaConfig(
        vision_config=tiny_vision_config(),
        text_config=tiny_text_config(rows, hidden=hidden, layers=layers, tied=tied, kind=text_config),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=-2,
        tie_word_embeddings=tied,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        _sharpen(model)
    processor = folder.parent / f".{folder.name}.processor"
    processor.mkdir(parents=True)
    write_image_processor(processor)
    wording = None if template is None else get_template(template)
    save_llava(model, folder, tokenizer=tokenizer, processor_source=processor, template=wording)
    (processor / "preprocessor_config.json").unlink()
    processor.rmdir()
    return folder


def write_tiny_tower(folder: Path, *, seed: int = 0) -> Path:
    """Write a random CLIP vision tower's folder."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        CLIPVisionModel(tiny_vision_config()).save_pretrained(folder)
    write_image_processor(folder)
    return folder


def write_tiny_language_model(
    folder: Path, *, hidden: int = 64, layers: int = 2, extra_rows: int = 0, seed: int = 0, tied: bool = True
) -> Path:
    """Write a random Qwen2 folder whose tokenizer has no `<image>` token and whose head has `extra_rows` spare rows."""
    with_image = tiny_tokenizer()
    content = json.loads(with_image.backend_tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<image>"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    config = tiny_text_config(len(tokenizer) + extra_rows, hidden=hidden, layers=layers, tied=tied)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_vision_config() -> CLIPVisionConfig:
    """The configuration of a tower for 24×24 pixels in patches of 8."""
    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=32,
    )


def tiny_text_config(
    rows: int,
    *,
    hidden: int = 64,
    layers: int = 2,
    tied: bool = True,
    kind: type[LlamaConfig] | type[Qwen2Config] | type[Qwen3Config] = Qwen2Config,
) -> LlamaConfig | Qwen2Config | Qwen3Config:
    """The configuration of a small Qwen2 (or Llama, or Qwen3 with wide heads) with grouped-query attention."""
    return kind(
        vocab_size=rows,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=None,
        **({"head_dim": hidden // 2} if kind is Qwen3Config else {}),
    )


def write_image_processor(folder: Path) -> None:
    """Write a CLIPImageProcessor's `preprocessor_config.json` for the tiny tower."""
    content = {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": IMAGE_SIZE},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(content, indent=2) + "\n")


def tiny_image(seed: int, size: tuple[int, int] = (32, 24), format: str = "PNG") -> bytes:  # noqa: A002
    """An encoded image (width, height) of random blocks of colour."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, size=(4, 4, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks).resize(size, Image.Resampling.NEAREST).save(buffer, format=format)
    return buffer.getvalue()


def tiny_samples(n: int, seed: int = 0, preference: bool = False) -> list[Sample]:
    """`n` samples: every fourth has no image, every third has two turns, every seventh has two images."""
    rng = np.random.default_rng(seed)
    return [_tiny_sample(index, rng, preference) for index in range(n)]


def write_tiny_set(folder: Path, n: int, *, seed: int = 0, preference: bool = False, **settings: Any) -> Path:
    """Pack `n` tiny samples into a set folder; `settings` go to `write_set`."""
    from llavamod_offline.data.pack.pack import write_set

    write_set(tiny_samples(n, seed, preference), folder, **settings)
    return folder


def break_image(folder: Path, row: int) -> None:
    """Damage the first image of a row in a packed set, as a failing disk would."""
    samples = SampleSet.open(folder)
    shard = int(samples.shard_numbers(np.array([row]))[0])
    member = samples.index.column("members")[row].as_py()[1]
    with (folder / f"{samples.shard_names[shard]}.tar").open("r+b") as tar:
        tar.seek(member["offset"] + member["size"] // 2)
        tar.write(bytes(member["size"] - member["size"] // 2))


def _tiny_sample(index: int, rng: np.random.Generator, preference: bool) -> Sample:
    colour, other = rng.choice(_COLOURS, size=2, replace=False)
    shape = rng.choice(_SHAPES)
    number = int(rng.integers(1, 10))
    images = 0 if index % 4 == 3 else 2 if index % 7 == 5 else 1
    turns = [Turn("user", "<image>\n" * images + f"Which colour has the {shape}?")]
    if not preference:
        turns.append(Turn("assistant", f"The {shape} is {colour}."))
    if index % 3 == 2:
        if preference:
            turns.append(Turn("assistant", f"The {shape} is {colour}."))
        turns.append(Turn("user", "How many objects are there?"))
        if not preference:
            turns.append(Turn("assistant", str(number)))
    chosen = f"There is a {colour} {shape}." if preference else None
    rejected = f"There is a {other} {shape} and a number {number}." if preference else None
    encoded = tuple(tiny_image(int(rng.integers(2**31))) for _ in range(images))
    key = f"{'pair' if preference else 'tiny'}-{index:04d}"
    return Sample(key, tuple(turns), encoded, ("png",) * images, chosen, rejected, "tiny")


def _sharpen(model: LlavaForConditionalGeneration) -> None:
    """Scale the random weights up, so that predictions differ visibly between tokens and images."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "vision_tower" not in name:
                parameter.mul_(20.0 if "embed_tokens" in name or "lm_head" in name else 8.0)
