"""Tiny checkpoints of the image-text families that use their own processors: random weights in real folders.

Each family has its processor's settings, the special tokens that it needs, and a chat template with the released one's
wording. Text models have two layers; images are cut into patches of a few pixels.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, PreTrainedTokenizerFast

from tests.tiny_teachers import random_model, tokenizer_with

Settings = dict[str, Any]

HALVES = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
PIXELS = {"do_convert_rgb": True, "do_resize": True, "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255}
PREPARED = {**PIXELS, "do_normalize": True, **HALVES}
QWEN = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
ROW_TAGS = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))


def parts(image: str, trim: str = "") -> str:
    """The Jinja for a message's content, given as text or as parts."""
    return (
        f"{{%- if message.content is string -%}}{{{{ message.content{trim} }}}}{{%- else -%}}"
        "{%- for part in message.content -%}{%- if part.type == 'image' -%}"
        f"{{{{ '{image}' }}}}{{%- else -%}}{{{{ part.text{trim} }}}}{{%- endif -%}}{{%- endfor -%}}{{%- endif -%}}"
    )


def chatml(image: str) -> str:
    """Turns in Qwen's wording (ChatML), without a default system turn."""
    return (
        "{%- for message in messages -%}{{ '<|im_start|>' + message.role + '\n' }}"
        + parts(image)
        + "{{ '<|im_end|>\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
    )


GEMMA = (
    "{{ bos_token }}{%- for message in messages -%}"
    "{{ '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' }}"
    + parts("<start_of_image>", " | trim")
    + "{{ '<end_of_turn>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)
SMOL = (
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
    "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{%- for message in messages -%}{%- if message.role == 'user' -%}{{ '[INST]' }}"
    + parts("[IMG]")
    + "{{ '[/INST]' }}{%- else -%}"
    + parts("[IMG]")
    + "{{ eos_token }}{%- endif -%}{%- endfor -%}"
)
COHERE = (
    "{{ bos_token }}{%- for message in messages -%}{{ '<|START_OF_TURN_TOKEN|>' + ("
    "'<|CHATBOT_TOKEN|>' if message.role == 'assistant' else '<|USER_TOKEN|>') }}"
    + parts("<image>")
    + "{{ '<|END_OF_TURN_TOKEN|>' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{%- endif -%}"
)
VICUNA = (
    "{%- for message in messages -%}{%- if message.role == 'user' -%}{{ 'USER: ' }}"
    + parts("<image>\n")
    + "{{ ' ASSISTANT:' }}{%- else -%}{{ ' ' }}"
    + parts("<image>\n")
    + "{{ eos_token }}{%- endif -%}{%- endfor -%}"
)


@dataclass(frozen=True)
class TinyFamily:
    """How a family's folder is made. `config` gets the text model's settings and the tokens' ids.

    `named`: tokens that the tokenizer has as attributes, such as `boi_token`. `images`: the image processor's settings.
    """

    model: str
    config: Callable[[Settings, Mapping[str, int]], Settings]
    processor: str
    images: Settings
    chat_template: str
    tokens: tuple[str, ...]
    named: Mapping[str, str] = field(default_factory=dict)
    more: Settings = field(default_factory=dict)

    def write(self, folder: Path, *, seed: int = 0, spare_rows: int = 12, tokenizer: Any = None) -> Path:
        """Write a checkpoint with random weights; another `tokenizer` gets the special tokens too."""
        special = tuple(dict.fromkeys((*self.tokens, *self.named.values())))
        if tokenizer is not None:
            tokenizer.add_special_tokens({"extra_special_tokens": list(special)})
            return self._write(folder, tokenizer, seed, spare_rows)
        plain = tokenizer_with(*(token for token in special if token not in ("<|endoftext|>", "<|im_end|>")))
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=plain.backend_tokenizer,
            **{"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", **self.named},
            clean_up_tokenization_spaces=False,
        )
        return self._write(folder, tokenizer, seed, spare_rows)

    def _write(self, folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int, spare_rows: int) -> Path:
        ids = tokenizer.get_vocab()
        settings = self.config(text(len(tokenizer) + spare_rows), ids)
        config = AutoConfig.for_model(**settings)
        random_model(getattr(transformers, self.model), config, seed).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        write_json(folder / "preprocessor_config.json", {"processor_class": self.processor, **self.images})
        write_json(folder / "processor_config.json", {"processor_class": self.processor, **self.more})
        (folder / "chat_template.jinja").write_text(self.chat_template)
        return folder


def text(rows: int) -> Settings:
    return {
        "vocab_size": rows,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 2048,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "tie_word_embeddings": False,
    }


def siglip(size: int, patch: int, **more: Any) -> Settings:
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": size,
        "patch_size": patch,
        "vision_use_head": False,
        **more,
    }


def pixtral_tower() -> Settings:
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return {"model_type": "pixtral", **shape, "image_size": 48, "patch_size": 4}


MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6]}
GRID = [[16 * rows, 16 * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
