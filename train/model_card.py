"""The README.md of an exported student: what it is, what made it, how it came out, how to load it.

Folders of the machine that trained it do not enter: contents are named by their digests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from train.resume_check import settings_of

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

    from train.config import TrainConfig

_SAID = (
    "loss", "divergence", "kl", "cross_entropy", "top1_agreement", "feature_distance", "visual_kl", "relation_distance",
    "preference", "reward_accuracy", "holdout_loss",
)  # fmt: skip
_PADDED = (
    "In training, pictures were padded to squares; this folder's image processor crops them. What knows nothing else, "
    "such as lmms-eval, should be given the copy that `eval-student portable FOLDER -o COPY` writes, which pads."
)
_STAGES = {
    "align": "its projector was aligned with a language model, by cross-entropy",
    "mimic_dense": "it imitates a larger teacher's cached distributions (mimic distillation, dense to dense)",
    "mimic_sparse": "it imitates a larger teacher's cached distributions (mimic distillation, dense to sparse)",
    "preference": "it was tuned on preferences with a larger teacher's cached log-probs as reference",
    "sft": "it was fine-tuned by cross-entropy, without a teacher",
}


def model_card(
    config: TrainConfig,
    model: LlavaForConditionalGeneration,
    *,
    sizes: tuple[int, int],
    steps: int,
    samples: int,
    digests: Mapping[str, str | None],
    metrics: Mapping[str, Any],
) -> str:
    """Write the card as Markdown. `sizes`: parameters, and those a token passes; `metrics`: the last step's entry."""
    text, vision = model.config.text_config, model.config.vision_config
    experts = ""
    if getattr(text, "num_experts", None):
        experts = f", {text.num_experts} experts of which a token takes {text.num_experts_per_tok}"
    rows = [
        ("text model", f"{text.model_type}, {text.num_hidden_layers} layers, hidden size {text.hidden_size}{experts}"),
        ("vision tower", f"{vision.model_type}, {vision.image_size} pixels in patches of {vision.patch_size}"),
        ("parameters", f"{sizes[0]:,}, of which a token passes {sizes[1]:,}"),
        ("stage", f"{config.stage}, {steps:,} steps over {samples:,} samples"),
        ("conversation template", f"{config.template}; pictures: {config.image_aspect}"),
        *((name, f"`{digest}`") for name, digest in digests.items() if digest),
    ]
    last = [(name, f"{metrics[name]:.5g}") for name in _SAID if isinstance(metrics.get(name), int | float)]
    settings = json.dumps(settings_of(config), indent=2, ensure_ascii=False)
    return (
        "\n\n".join(
            [
                "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\ntags: [llava, distillation]\n---",
                "# A LLaVA student",
                f"Made with LLaVA-MoD Offline; in its last stage {_STAGES[config.stage]}.",
                _table(("", ""), rows),
                "## The last step",
                _table(("", "value"), last),
                "## Use",
                "```python\nfrom transformers import AutoProcessor, LlavaForConditionalGeneration\n\n"
                'model = LlavaForConditionalGeneration.from_pretrained("FOLDER")\n'
                'processor = AutoProcessor.from_pretrained("FOLDER")\n```',
                "Prompts are worded by the template above, which `processor.apply_chat_template` applies.",
                *([_PADDED] if config.image_aspect == "pad" else []),
                "## Settings of the stage",
                f"```json\n{settings}\n```",
            ]
        )
        + "\n"
    )


def _table(header: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    lines = [f"| {header[0]} | {header[1]} |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join(lines)
