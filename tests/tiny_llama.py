"""Tiny Llama-like tokenizers, made on the spot: `<s>` before every text, words that begin with a space marker (▁)."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

# What puts the space marker before the first word: the normalizer, in every section (Llama 2, Vicuna), or the
# pre-tokenizer, before the first section only (`legacy=False`) or before each.
KINDS = ("prepend", "first", "always")
_TEXTS = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. USER: ASSISTANT:",
    "What is in the picture? A dog. Yes. No. Sure? There is a red star. The turn of it.",
)


def llama_tokenizer(kind: str = "prepend") -> PreTrainedTokenizerFast:
    """A byte-fallback BPE tokenizer of one of `KINDS`, with `<s>`, `</s>` and `<image>`."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if kind == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=kind, split=False)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{number:02X}>" for number in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=450, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([word for text in _TEXTS for word in text.split(" ")], trainer)
    space = decoders.Replace("▁", " ")
    tokenizer.decoder = decoders.Sequence([space, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
