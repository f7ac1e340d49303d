"""A byte-level BPE tokenizer trained on the toy world's own texts, with Qwen2's special tokens and `<image>`."""

from __future__ import annotations

import random
from collections.abc import Iterator

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import Qwen2TokenizerFast

from llavamod_offline.data.encode.template import TEMPLATES
from llavamod_offline.data.sample import IMAGE_PLACEHOLDER
from llavamod_offline.toyworld.scene import random_scene
from tests.toy_teacher.mixtures import mixed

END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>", IMAGE_PLACEHOLDER)

# Qwen2's pre-tokenization pattern (from its published tokenizer.json).
_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(vocabulary_size: int, *, scenes: int = 2000, seed: int = 0) -> Qwen2TokenizerFast:
    """Train the tokenizer; special tokens follow the learned vocabulary, as in Qwen2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(scenes, seed), trainer)
    return Qwen2TokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=None,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        padding_side="right",
    )


def _texts(scenes: int, seed: int) -> Iterator[str]:
    rng = random.Random(seed)
    for segment in (segment for template in TEMPLATES.values() for segment in template.render(())):
        if not segment.special:
            yield from [segment.text] * scenes
    for _ in range(scenes):
        for turn in mixed(random_scene(rng), rng):
            yield f"USER: {turn.text} ASSISTANT:" if turn.role == "user" else f" {turn.text}"
