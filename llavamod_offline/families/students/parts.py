"""The parts of a model: which parameters are its vision tower, projector, language model, and the latter's parts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Parts = Mapping[str, re.Pattern[str]]

_MLP = r"\.(mlp|feed_forward|ffn|block_sparse_moe)\."
# Matched after the language model's name, under any name that transformers' language models give a part.
_TEXT_PARTS = {
    "embeddings": r"\.(.*\.)?(embed_\w+|word_embeddings|w[tp]e)\.",
    "attention": r"\..*\.(self_attn|linear_attn|self_attention|attention|attn|conv)\.",
    "mlp": rf"\..*({_MLP}(?!gate\.|router\.|shared_expert_gate\.)|\.fc[12]\.)",
    "experts": rf"\..*{_MLP}(experts|shared_expert)\.",
    "router": rf"\..*{_MLP}(gate|router|shared_expert_gate)\.",
    "norms": r"\..*(norm|norm_[f\d]|ln_[f\d])\.",
}
# Modules of a vision tower that project its features, as in Qwen-VL and GLM-V.
_MERGERS = r"(merger|deepstack_merger_list)\."
# Parts of models that also take audio or generate images; answers about images do not need them.
_UNUSED = re.compile(r"audio|speech|generation|vqmodel")


def model_parts(model: Any) -> Parts:
    """Match the names of a model's modules and parameters, by part; a part comes before those inside it.

    `text` is the whole language model with embeddings and LM head; `projector` is everything between the tower and
    `text`. The names may begin with that of a module around the model. A part that the model lacks matches nothing.
    """
    names = {id(module): name for name, module in model.named_modules()}
    text, head = re.escape(names[id(model.get_decoder())]), re.escape(names[id(model.get_output_embeddings())])
    tower = names.get(id(model.get_encoder(modality="image")), "")
    tower = "" if tower in ("", model.base_model_prefix) else re.escape(tower)
    known = re.compile("|".join(rf"{part}(\.|$)" for part in (text, head, tower) if part))
    others = sorted(
        {
            ".".join(name.split(".")[:2])
            for name, _ in model.named_parameters()
            if not known.match(name) and not _UNUSED.search(name)
        }
    )
    between = [rf"{re.escape(name)}(\.|$)" for name in others]
    if tower:
        between.append(rf"{tower}\.(.*\.)?{_MERGERS}")
    found = {
        "vision": rf"{tower}\.(?!(.*\.)?{_MERGERS})" if tower else "(?!)",
        "projector": "|".join(between) or "(?!)",
        "text": rf"{text}\.|{head}\.",
        **{part: text + pattern for part, pattern in _TEXT_PARTS.items()},
        "lm_head": rf"{head}\.",
    }
    return {part: re.compile(rf"(^|\.)({pattern})") for part, pattern in found.items()}
