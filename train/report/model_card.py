"""The README.md of an exported student: what it is, how it was made, its last metrics, how to load it.

Data is named by digest, never by a folder of the training machine.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

# Log fields about the run, not about the student.
_RUN_METRICS = {"step", "lr", "grad_norm", "positions", "tokens", "tokens_per_s", "seconds", "data_wait_share"}
_PADDED = (
    "In training, images were padded to squares, but this folder's image processor crops them. For tools that only use "
    "the processor, such as lmms-eval, write a copy that pads: `eval-student portable FOLDER -o COPY`."
)
_STAGES = {
    "align": "its projector was aligned with the language model by cross-entropy",
    "mimic_dense": "it was distilled from a larger teacher's cached distributions (mimic, dense to dense)",
    "mimic_sparse": "it was distilled from a larger teacher's cached distributions (mimic, dense to sparse)",
    "preference": "it was tuned on preferences, with a larger teacher's cached log-probs as reference",
    "sft": "it was fine-tuned by cross-entropy, without a teacher",
}


def model_card(
    settings: Mapping[str, Any],
    model: LlavaForConditionalGeneration,
    *,
    sizes: tuple[int, int],
    steps: int,
    samples: int,
    digests: Mapping[str, str | None],
    metrics: Mapping[str, Any],
) -> str:
    """Return the card as Markdown.

    `settings`: those of the run, by dotted key; `sizes`: all parameters, and those active for a token; `metrics`: the
    last log entry.
    """
    text, vision = model.config.text_config, model.config.vision_config
    experts = ""
    if getattr(text, "num_experts", None):
        experts = f", {text.num_experts} experts, {text.num_experts_per_tok} per token"
    rows = [
        ("text model", f"{text.model_type}, {text.num_hidden_layers} layers, hidden size {text.hidden_size}{experts}"),
        ("vision tower", f"{vision.model_type}, {vision.image_size} pixels in patches of {vision.patch_size}"),
        ("parameters", f"{sizes[0]:,}, of which {sizes[1]:,} are active for a token"),
        ("stage", f"{settings['stage']}, {steps:,} steps over {samples:,} samples"),
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
                "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\ntags: [llava, distillation]\n---",
                "# A LLaVA student",
                f"Made with LLaVA-MoD Offline; in its last stage {_STAGES[settings['stage']]}.",
                _table(("", ""), rows),
                "## The last step",
                _table(("", "value"), last),
                "## Use",
                "```python\nfrom transformers import AutoProcessor, LlavaForConditionalGeneration\n\n"
                'model = LlavaForConditionalGeneration.from_pretrained("FOLDER")\n'
                'processor = AutoProcessor.from_pretrained("FOLDER")\n```',
                "`processor.apply_chat_template` formats prompts with the template above.",
                *([_PADDED] if settings["image_aspect"] == "pad" else []),
                "## Settings of the stage",
                f"```json\n{json.dumps(settings, indent=2, ensure_ascii=False)}\n```",
            ]
        )
        + "\n"
    )


def _table(header: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [f"| {header[0]} | {header[1]} |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines)
