"""The README.md of an exported student: what it is, how it was made, its last metrics, how to load it.

Data is named by digest, never by a folder of the training machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llavamod_offline.plural import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Log fields about the run, not about the student.
_RUN_METRICS = {"step", "lr", "grad_norm", "positions", "tokens", "tokens_per_s", "seconds", "data_wait_share"}
_USE = """```python
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
processor = AutoProcessor.from_pretrained("FOLDER", backend="pil")  # as in training; torchvision rounds differently
model = AutoModelForImageTextToText.from_pretrained("FOLDER", dtype=dtype).to(device)

question = [{"type": "image", "path": "IMAGE"}, {"type": "text", "text": "QUESTION"}]
conversations = [[{"role": "user", "content": question}]]  # one or several, with any number of images
inputs = processor.apply_chat_template(
    conversations, tokenize=True, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
)
output = model.generate(**inputs.to(device, dtype), max_new_tokens=128)
answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
print("\\n".join(answer.strip() for answer in answers))
```"""
_TOOLS = (
    "transformers 4.56 and later, 5 included, prompt the student as in training: the processor words and pads prompts, "
    "{images}, and generation is greedy and stops at the template's end token. In training, transparent images were "
    "put on white; transformers drops their transparency."
)
_IMAGES = {
    "pad": "pads images to squares",
    "square": "leaves images as they are before it resizes and crops them",
    "auto": "prepares images as it did for the checkpoint that training began with",
}
_STAGES = {
    "align": "its projector was aligned with the language model by cross-entropy",
    "mimic_dense": "it was distilled from a larger teacher's cached distributions (mimic, dense to dense)",
    "mimic_sparse": "it was distilled from a larger teacher's cached distributions (mimic, dense to sparse)",
    "preference": "it was tuned on preferences, with a larger teacher's cached log-probs as reference",
    "sft": "it was fine-tuned by cross-entropy, without a teacher",
}


def model_card(
    settings: Mapping[str, Any],
    model: PreTrainedModel,
    *,
    sizes: tuple[int, int],
    steps: int,
    samples: int,
    digests: Mapping[str, str | None],
    metrics: Mapping[str, Any],
    changes: Sequence[str] = (),
) -> str:
    """Return the card as Markdown.

    `settings`: those of the run, by dotted key; `sizes`: all parameters, and those active per token; `metrics`: the
    last log entry; `changes`: what changed when the run was resumed.
    """
    text, vision = model.config.get_text_config(), getattr(model.config, "vision_config", None)
    kind, experts = model.config.model_type, ""
    if getattr(text, "num_experts", None):
        experts = f", {text.num_experts} experts, {text.num_experts_per_tok} per token"
    rows = [
        ("text model", f"{text.model_type}, {text.num_hidden_layers} layers, hidden size {text.hidden_size}{experts}"),
        ("vision tower", _tower(vision)),
        ("parameters", f"{sizes[0]:,}, of which {sizes[1]:,} are active for a token"),
        ("stage", f"{settings['stage']}, {counted(steps, 'step')} over {counted(samples, 'sample')}"),
        ("conversation template", f"{settings['template']}; images: {settings['image_aspect']}"),
        *((name, f"`{digest}`") for name, digest in digests.items() if digest),
    ]
    last = [
        (name, f"{value:.5g}")
        for name, value in metrics.items()
        if isinstance(value, int | float) and name not in _RUN_METRICS
    ]
    return (
        "\n\n".join(
            [
                f"---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\ntags: [{kind}, distillation]\n---",
                f"# {'A LLaVA' if kind == 'llava' else kind} student",
                f"Made with LLaVA-MoD Offline; in its last stage {_STAGES[settings['stage']]}.",
                _table(("", ""), rows),
                "## The last step",
                _table(("", "value"), last),
                "## Use",
                _USE,
                _TOOLS.format(images=_IMAGES[settings["image_aspect"]]),
                "## Settings of the stage",
                f"```json\n{json.dumps(settings, indent=2, ensure_ascii=False)}\n```",
                *(["Changed when the run was resumed:", "\n".join(f"- {one}" for one in changes)] if changes else []),
            ]
        )
        + "\n"
    )


def _tower(vision: Any) -> str:
    size, patch = (getattr(vision, name, None) for name in ("image_size", "patch_size"))
    pixels = f", {size} pixels in patches of {patch}" if size and patch else f", patches of {patch}" if patch else ""
    return f"{getattr(vision, 'model_type', 'none')}{pixels}"


def _table(header: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [f"| {header[0]} | {header[1]} |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines)
