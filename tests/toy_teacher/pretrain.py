"""Make the checkpoints shipped with the toy world: its vision tower, its teacher, and a small language model.

    python -m tests.toy_teacher.pretrain --output DIR

The tower learns from ground truth what each patch shows and is then frozen, like CLIP in LLaVA; the teacher's projector
and language model then learn conversations about images, in four rounds. The small language model, from which a
student starts, has every second layer of the teacher's, as after depth pruning: it must be aligned with a tower and
retrained.

Shape suffixes: B images or conversations, C channels, H and W pixels, T tokens, D hidden size, V ids, P patches,
A attributes, N supervised tokens, X classes of all attributes.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2TokenizerFast,
)

from llavamod_offline.data.encode.chat_template import CHAT_TEMPLATE_NAME, to_jinja
from llavamod_offline.data.encode.collate import collate
from llavamod_offline.data.encode.template import get_template
from llavamod_offline.data.encode.tokenize import SequenceEncoder, TokenizedSequence
from llavamod_offline.data.sample import IMAGE_PLACEHOLDER, Sample, Turn
from llavamod_offline.toyworld.draw import draw_scene
from llavamod_offline.toyworld.scene import Scene, random_scene
from tests.toy_teacher.mixtures import checked, described, mixed, questioned
from tests.toy_teacher.supervision import ATTRIBUTES, PRESENCE_CLASSES, patch_labels, presence_labels
from tests.toy_teacher.tokenizer import train_tokenizer

Speaker = Callable[[Scene, random.Random], list[Turn]]

logger = logging.getLogger(__name__)

PIXELS = 48
PATCH = 8
IMAGE_TOKENS = (PIXELS // PATCH) ** 2
TEACHER_ROWS = 640  # rows of the teacher's LM head: more than the tokenizer's ids, as in Qwen2-7B (152,064)
VOCABULARY = 600
BATCH = 32
SAVE_STEPS = 500
TOWER_LAYER = -2


def image_processor() -> CLIPImageProcessorPil:
    """CLIP's own preprocessing at the toy tower's size."""
    return CLIPImageProcessorPil(
        size={"shortest_edge": PIXELS}, crop_size={"height": PIXELS, "width": PIXELS}, do_convert_rgb=True
    )


def new_tower(seed: int) -> CLIPVisionModel:
    """A small CLIP vision tower with random weights."""
    torch.manual_seed(seed)
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=96,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=3,
            image_size=PIXELS,
            patch_size=PATCH,
        )
    )


def pixels(scenes: list[Scene]) -> Tensor:
    """Draw and preprocess scenes: [B, C, H, W] float32."""
    images = [draw_scene(scene) for scene in scenes]
    return torch.from_numpy(np.stack(image_processor()(images, return_tensors="np")["pixel_values"]))


def train_tower(steps: int, seed: int) -> CLIPVisionModel:
    """Train the tower: probes on its second-to-last layer name each patch's contents, its class token the image's."""
    tower = new_tower(seed)
    width = tower.config.hidden_size
    probe = nn.Linear(width, sum(ATTRIBUTES.values()))
    presence = nn.Linear(width, PRESENCE_CLASSES)
    rng = random.Random(seed)
    trained = nn.ModuleList([tower, probe, presence])
    for step, optimizer in _steps(trained, steps, learning_rate=1.5e-3, name="tower"):
        scenes = [random_scene(rng) for _ in range(4 * BATCH)]
        labels_BAP = torch.from_numpy(np.stack([patch_labels(scene) for scene in scenes]))
        with _half_precision():
            output = tower(pixels(scenes), output_hidden_states=True)
        logits_BPX = probe(output.hidden_states[TOWER_LAYER][:, 1:].float())
        parts = logits_BPX.split(list(ATTRIBUTES.values()), dim=-1)
        losses = [cross_entropy(part.flatten(0, 1), labels_BAP[:, a].flatten()) for a, part in enumerate(parts)]
        present = torch.from_numpy(np.stack([presence_labels(scene) for scene in scenes]))
        presence_loss = binary_cross_entropy_with_logits(presence(output.pooler_output.float()), present)
        _update(torch.stack(losses).sum() + 3 * presence_loss, trained, optimizer)
        if step % 100 == 0 or step == steps - 1:
            detail = {name: round(loss.item(), 4) for name, loss in zip(ATTRIBUTES, losses, strict=True)}
            logger.info("tower %d/%d %s presence %.4f", step, steps, detail, presence_loss.item())
    return tower.eval()


def conversations(
    rng: random.Random, encoder: SequenceEncoder, speak: Speaker
) -> Iterator[tuple[list[Scene], list[TokenizedSequence]]]:
    """Endless batches of conversations, sorted by length four batches at a time to reduce padding."""
    while True:
        drawn = []
        for index in range(4 * BATCH):
            scene = random_scene(rng)
            turns = speak(scene, rng)
            sample = Sample(f"toy-{index}", tuple(turns), (b"-",), ("png",))
            drawn.append((scene, encoder.encode(sample, "response")))
        drawn.sort(key=lambda pair: len(pair[1].input_ids_T))
        batches = [drawn[start : start + BATCH] for start in range(0, len(drawn), BATCH)]
        rng.shuffle(batches)
        for batch in batches:
            yield [scene for scene, _ in batch], [sequence for _, sequence in batch]


def new_teacher(tower: CLIPVisionModel, tokenizer: Qwen2TokenizerFast, seed: int) -> LlavaForConditionalGeneration:
    """The untrained teacher: the given tower, frozen, with a random projector and Qwen2 text model."""
    torch.manual_seed(seed)
    tower.config.name_or_path = ""  # else the path that it was read from
    text = Qwen2Config(
        vocab_size=TEACHER_ROWS,
        hidden_size=160,
        intermediate_size=432,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER),
        image_seq_length=IMAGE_TOKENS,
        vision_feature_layer=TOWER_LAYER,
        tie_word_embeddings=True,
    )
    config.vision_config.name_or_path = ""  # else the tower's folder on this machine
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.vision_tower.requires_grad_(False)
    return model


def train_teacher(
    model: LlavaForConditionalGeneration,
    encoder: SequenceEncoder,
    speak: Speaker,
    *,
    steps: int,
    learning_rate: float,
    seed: int,
    folder: Path,
) -> None:
    """Train projector and language model on images, the tower frozen; save to `folder` as it goes."""
    batches = conversations(random.Random(seed), encoder, speak)
    for step, optimizer in _steps(model, steps, learning_rate=learning_rate, name="teacher"):
        scenes, sequences = next(batches)
        batch = collate(sequences, [()] * len(sequences), pad_id=0)
        with _half_precision():
            hidden_BTD = model.model(
                input_ids=batch.input_ids_BT,
                attention_mask=batch.attention_mask_BT,
                pixel_values=pixels(scenes),
                use_cache=False,
            ).last_hidden_state.float()
        logits_NV = model.lm_head(hidden_BTD.flatten(0, 1)[batch.prediction_rows_N])
        loss = cross_entropy(logits_NV, batch.target_ids_N)
        _update(loss, model, optimizer)
        if step % 50 == 0 or step == steps - 1:
            logger.info("teacher %d/%d loss %.4f", step, steps, loss.item())
        if (step + 1) % SAVE_STEPS == 0 or step == steps - 1:
            save(copy.deepcopy(model), encoder.tokenizer, folder)


def every_second_layer(teacher: LlavaForConditionalGeneration) -> Qwen2ForCausalLM:
    """The teacher's language model with every second of its layers, as in DistilBERT (arXiv 1910.01108).

    Which layers decides how fast students learn what images show: with seed 1 of the ladder, after aligning and 120
    steps of distillation, a student of layers 0 and 2 answered 61 % of the questions and named absent objects in 12 %
    of its descriptions, one of layers 0 and 3 54 % and 57 %.
    """
    text = teacher.config.text_config
    kept = range(0, text.num_hidden_layers, 2)
    settings = {**text.to_dict(), "num_hidden_layers": len(kept), "layer_types": None}
    model = Qwen2ForCausalLM(Qwen2Config(**settings))
    tensors = {}
    for name, tensor in teacher.model.language_model.state_dict().items():
        layer = name.split(".")[1] if name.startswith("layers.") else None
        if layer is None:
            tensors[name] = tensor
        elif int(layer) in kept:
            tensors[name.replace(f"layers.{layer}.", f"layers.{kept.index(int(layer))}.", 1)] = tensor
    model.model.load_state_dict(tensors)
    model.tie_weights()
    return model


def save(model: PreTrainedModel, tokenizer: Qwen2TokenizerFast, folder: Path) -> None:
    """Write an ordinary Hugging Face folder in bf16, with the tokenizer and, for a LLaVA model, its processor."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if isinstance(model, LlavaForConditionalGeneration):
        (folder / CHAT_TEMPLATE_NAME).write_text(to_jinja(get_template("qwen")), encoding="utf-8")
        image_processor().save_pretrained(folder)
        LlavaProcessor(
            image_processor=image_processor(),
            tokenizer=copy.deepcopy(tokenizer),  # the processor writes its name into it
            patch_size=PATCH,
            vision_feature_select_strategy="default",
            image_token=IMAGE_PLACEHOLDER,
            num_additional_image_tokens=1,
        ).save_pretrained(folder)


def _steps(model: nn.Module, steps: int, *, learning_rate: float, name: str) -> Iterator[tuple[int, torch.optim.AdamW]]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.05)
    warmup = min(100, max(1, steps // 10))
    started = time.monotonic()
    for step in range(steps):
        progress = max(0.0, (step - warmup) / max(1, steps - warmup))
        scale = min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * scale
        yield step, optimizer
        if step % 100 == 99:
            logger.info("%s: %.2f s a step", name, (time.monotonic() - started) / (step + 1))


def _half_precision() -> torch.autocast:
    """bf16 matrix products over fp32 weights: about twice as fast on CPUs that support them, and no worse here."""
    return torch.autocast("cpu", dtype=torch.bfloat16)


def _update(loss: Tensor, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def main() -> None:
    """Train the requested parts and write them below the output folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for tower/, teacher/ and language_model/")
    parser.add_argument("--tower-steps", type=int, default=1200)
    parser.add_argument("--teacher-steps", type=int, default=3600)
    parser.add_argument("--question-steps", type=int, default=2200, help="the teacher's second round, mostly quizzes")
    parser.add_argument("--caption-steps", type=int, default=1000, help="the teacher's third round, mostly captions")
    parser.add_argument(
        "--presence-steps", type=int, default=1500, help="the teacher's last round, many questions about presence"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only",
        choices=("tower", "teacher", "questions", "captions", "presence", "language_model"),
        help="only this part, with the others from the output folder",
    )
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    arguments.output.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(VOCABULARY)
    encoder = SequenceEncoder(
        tokenizer,
        get_template("qwen"),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER),
        image_tokens=IMAGE_TOKENS,
        max_length=2048,
    )
    output, seed, wanted = arguments.output, arguments.seed, arguments.only
    if wanted in (None, "tower"):
        train_tower(arguments.tower_steps, seed).save_pretrained(output / "tower")
    if wanted in (None, "teacher"):
        tower = CLIPVisionModel.from_pretrained(output / "tower", dtype=torch.float32)
        teacher = new_teacher(tower, tokenizer, seed)
        first = {"steps": arguments.teacher_steps, "learning_rate": 2e-3, "seed": seed + 1}
        train_teacher(teacher, encoder, mixed, **first, folder=output / "teacher")
    rounds = {
        "questions": (questioned, arguments.question_steps, 1.5e-3, seed + 3),
        "captions": (described, arguments.caption_steps, 1e-3, seed + 4),
        "presence": (checked, arguments.presence_steps, 1.5e-3, seed + 6),
    }
    for name, (speak, steps, rate, own_seed) in rounds.items():
        if wanted in (None, name):
            teacher = LlavaForConditionalGeneration.from_pretrained(output / "teacher", dtype=torch.float32)
            teacher.model.vision_tower.requires_grad_(False)
            settings = {"steps": steps, "learning_rate": rate, "seed": own_seed}
            train_teacher(teacher, encoder, speak, **settings, folder=output / "teacher")
    if wanted in (None, "language_model"):
        teacher = LlavaForConditionalGeneration.from_pretrained(output / "teacher", dtype=torch.float32)
        save(every_second_layer(teacher), tokenizer, output / "language_model")


if __name__ == "__main__":
    main()
