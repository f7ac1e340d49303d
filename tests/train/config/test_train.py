"""Recipes resolve to the original scripts' values, and invalid settings give one line that names the key."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest

from llavamod_offline.config import dump_config, load_config
from llavamod_offline.errors import ConfigError, LlavaModError
from llavamod_offline.losses.kinds import PREFERENCE_KINDS
from train.config import CACHED_STAGES, Stage, TrainConfig
from train.config.loss import LOSSES_OF_STAGE, LossKind
from train.config.recipes import RECIPES, resolve_config

PARTS = ("student.vision_tower=v", "student.language_model=l")
NEEDED = ("data.set=sets/x", "output=runs/x", "student.checkpoint=models/x")


def arguments(stage: str) -> list[str]:
    """The minimum that a recipe must be given."""
    return [stage, *NEEDED, *(["cache.path=caches/x"] if stage in CACHED_STAGES else [])]


@pytest.mark.parametrize("stage", get_args(Stage))
def test_every_recipe_names_its_stage_and_survives_a_dump(stage: str, tmp_path: Path) -> None:
    config = resolve_config(arguments(stage))
    assert config.stage == stage
    (tmp_path / "resolved.yaml").write_text(dump_config(config))
    assert load_config(TrainConfig, [tmp_path / "resolved.yaml"]) == config


def test_recipes_hold_the_scripts_values() -> None:
    """LLaVA-MoD's shells/train/qwen/*.sh on 16 devices: learning rate, batch, loss, what is trained, balance loss."""
    rows = {
        stage: (config.optim.lr, config.batch.global_size, config.loss.kind, config.trainable, config.llava_aspect)
        for stage in get_args(Stage)
        for config in [resolve_config(arguments(stage))]
    }
    assert rows == {
        "align": (1e-3, 256, "cross_entropy", ["projector"], "square"),
        "mimic_dense": (2e-5, 128, "only_kd", ["projector", "text"], "pad"),
        "mimic_sparse": (2e-5, 128, "kd_lm", ["projector", "mlp", "router"], "pad"),
        "preference": (2e-6, 128, "kto_pair", ["projector", "mlp", "router"], "pad"),
        "sft": (2e-5, 128, "cross_entropy", ["projector", "text"], "pad"),
    }
    for stage in get_args(Stage):
        config = resolve_config(arguments(stage))
        assert (config.optim.warmup_ratio, config.optim.weight_decay, config.max_length) == (0.03, 0.0, 2048)
        assert config.template == "auto"  # qwen in a new student
        assert config.loss.router_aux_coef == (0.01 if config.student.kind == "sparse" else 0.0)
        assert config.student.capacity_factor == (1.5 if config.student.kind == "sparse" else None)
    upcycle = resolve_config(arguments("mimic_sparse")).student.upcycle
    assert upcycle is not None
    assert (upcycle.layers, upcycle.num_experts, upcycle.top_k, upcycle.residual) == ("sparse", 4, 2, False)
    assert resolve_config(arguments("preference")).loss.beta == 0.1


def test_the_aligned_recipe_is_mimic_dense_with_llava_kds_loss() -> None:
    plain = resolve_config(arguments("mimic_dense"))
    aligned = resolve_config(["mimic_dense_aligned", *arguments("mimic_dense")[1:]])
    assert replace(aligned, loss=plain.loss) == plain
    loss = aligned.loss
    assert (loss.kind, loss.positions, loss.lm_weight, loss.kd_weight) == ("kd_lm", "response", 1.0, 1.0)
    assert (loss.align.visual_kl_weight, loss.align.relation_weight, loss.align.feature_weight) == (1.0, 0.5, 0.0)


def test_the_choices_are_those_of_the_losses() -> None:
    assert set(LOSSES_OF_STAGE["preference"]) == {*PREFERENCE_KINDS, "kto"}
    assert set(get_args(LossKind)) == {kind for kinds in LOSSES_OF_STAGE.values() for kind in kinds}


@pytest.mark.parametrize(
    ("stage", "settings", "problem"),
    [
        ("mimic_dense", ["cache.path=null"], "cache.path: stage mimic_dense learns from a teacher's cache"),
        ("sft", ["cache.path=c"], "cache.path: stage sft uses no teacher"),
        ("mimic_dense", ["loss.kind=sigmoid"], "loss.kind: 'sigmoid' does not belong to stage mimic_dense"),
        ("preference", ["loss.kind=only_kd"], "loss.kind: 'only_kd' does not belong to stage preference"),
        ("mimic_dense", ["student.kind=sparse"], "student.kind: stage mimic_dense trains a dense student"),
        ("mimic_sparse", ["student.kind=dense"], "student.kind: stage mimic_sparse trains a sparse student"),
        ("sft", ["loss.router_aux_coef=0.1"], "loss.router_aux_coef: a dense student has no router"),
        ("sft", ["trainable=[router]"], "trainable: a dense student has no router"),
        ("sft", ["student.capacity_factor=1"], "student.capacity_factor: a dense student has no experts"),
        ("mimic_sparse", ["student.capacity_factor=0"], "student.capacity_factor is 0: must be above 0"),
        ("sft", ["trainable=[projektor]"], "trainable: 'projektor' is unknown: choose from vision, projector"),
        ("sft", ["trainable=[]"], "trainable: is empty"),
        ("sft", ["student.checkpoint=null"], "student: set student.checkpoint, or both"),
        ("sft", ["student.vision_tower=v"], "student.vision_tower: a student starts from student.checkpoint or"),
        ("sft", ["student.upcycle.top_k=2"], "student.upcycle: upcycling makes a sparse student"),
        ("mimic_sparse", ["student.upcycle.top_k=5"], "student.upcycle.top_k is 5: must be from 1 to"),
        ("mimic_sparse", ["student.upcycle.num_experts=1"], "student.upcycle.num_experts: 1 is too few"),
        ("mimic_sparse", ["student.upcycle.num_experts=[4,1]"], "student.upcycle.num_experts: 1 is too few"),
        ("mimic_sparse", ["student.upcycle.num_experts=[]"], "student.upcycle.num_experts: 0 is too few"),
        ("mimic_sparse", ["student.upcycle.expert_noise=-1"], "student.upcycle.expert_noise is -1: must be 0 or more"),
        ("mimic_sparse", ["student.upcycle.router_noise=nan"], "student.upcycle.router_noise is nan: must be 0 or"),
        ("preference", ["loss.label_smoothing=0.1"], "loss.label_smoothing: not used with kto_pair"),
        ("mimic_dense", ["loss.kd_weight=0"], "loss.kd_weight: 0 turns distillation off"),
        ("mimic_dense", ["loss.divergence=kl"], "loss.divergence"),
        (
            "mimic_dense",
            ["loss.divergence=js", "loss.tail=samples"],
            "loss.tail: js is defined on top-k and bucket: set it",
        ),
        (
            "mimic_dense",
            ["loss.divergence=js", "loss.js_weight=1"],
            "loss.js_weight is 1: must be above 0 and below 1",
        ),
        ("mimic_dense", ["loss.skew=0"], "loss.skew is 0: must be above 0 and below 1"),
        (
            "mimic_dense",
            ["loss.skew=0.2"],
            "loss.skew: not used with forward_kl: remove it, or set loss.divergence to sk",
        ),
        ("mimic_dense", ["loss.js_weight=0.2"], "loss.js_weight: not used with forward_kl: remove it, or set"),
        ("mimic_dense", ["loss.sft_weight=1"], "loss.sft_weight: belongs to stage preference, not to mimic_dense"),
        ("mimic_dense", ["loss.temperature=0"], "loss.temperature is 0: must be above 0"),
        ("mimic_dense", ["loss.temperature=.inf"], "loss.temperature is inf: must be above 0 and finite"),
        ("mimic_dense", ["loss.visual_weight=.inf"], "loss.visual_weight is inf: must not be negative or infinite"),
        ("mimic_dense", ["optim.lr=.inf"], "optim.lr is inf: must be above 0 and finite"),
        ("mimic_dense", ["loss.lm_weight=0.5"], "loss.lm_weight: not used with only_kd: remove it, or set loss.kind"),
        ("sft", ["loss.lm_weight=0.5"], "loss.lm_weight: not used with cross_entropy: remove it"),
        ("sft", ["loss.beta=0.5"], "loss.beta: belongs to stage preference, not to sft: remove it"),
        ("sft", ["loss.kd_weight=2"], "loss.kd_weight: belongs to the mimic stages, not to sft: remove it"),
        ("align", ["loss.tail=bucket"], "loss.tail: nothing is distilled in stage align: remove it"),
        ("preference", ["loss.temperature=2"], "loss.temperature: nothing is distilled in stage preference: remove it"),
        ("sft", ["loss.distill_weight=1"], "loss.distill_weight: belongs to stage preference, not to sft"),
        (
            "sft",
            ["loss.divergence=reverse_kl"],
            "loss.divergence: nothing is distilled in stage sft: set it to forward_kl",
        ),
        (
            "preference",
            ["loss.divergence=js"],
            "loss.divergence: nothing is distilled in stage preference: set it to for",
        ),
        ("preference", ["loss.sft_weight=-1"], "loss.sft_weight is -1: must not be negative"),
        ("preference", ["loss.kind=dpo"], "loss.kind is 'dpo': must be one of cross_entropy, only_kd, kd_lm, policy_"),
        ("sft", ["loss.align.feature_weight=1"], "loss.align.feature_weight: belongs to the mimic stages, not to sft"),
        ("mimic_dense", ["loss.align.relation_weight=-1"], "loss.align.relation_weight is -1: must not be negative"),
        ("preference", ["loss.positions=response"], "loss.positions: belongs to the mimic stages, not to preference"),
        (
            "mimic_dense",
            ["loss.align.feature_distance=cosine"],
            "loss.align.feature_distance: no features are compared",
        ),
        ("mimic_dense", ["loss.align.visual_kl_weight=1"], "loss.align.visual_kl_weight: positions=auto already"),
        ("mimic_dense", ["loss.align.relation_of=logits"], "loss.align.relation_of: no relations are compared"),
        (
            "mimic_dense",
            ["loss.align.relation_weight=1", "loss.align.relation_of=logits"],
            "loss.align.teacher_lm_head: relations of logits need the teacher's LM head, which caches lack: set it",
        ),
        (
            "mimic_dense",
            ["loss.align.teacher_lm_head=t"],
            "loss.align.teacher_lm_head: no logits are compared: remove it",
        ),
        ("sft", ["student.lora.rank=0", "trainable=[]"], "student.lora.rank is 0: must be at least 1"),
        ("sft", ["student.lora.alpha=0", "trainable=[]"], "student.lora.alpha is 0: must be above 0"),
        ("sft", ["student.lora.dropout=1", "trainable=[]"], "student.lora.dropout is 1: must be at least 0 and below"),
        ("sft", ["student.lora.targets=[]", "trainable=[]"], "student.lora.targets: is empty: choose from vision"),
        ("sft", ["student.lora.targets=[lm_head]", "trainable=[]"], "student.lora.targets: 'lm_head' is unknown: ch"),
        ("sft", ["student.lora.rank=8"], "trainable: 'text' is trained in full, which leaves nothing to the adapters"),
        (
            "sft",
            ["student.lora.targets=[mlp.up_proj]", "trainable=[experts]"],
            "trainable: 'experts' is trained in full, which leaves nothing to the adapters of 'mlp.up_proj': name the",
        ),
        (
            "sft",
            ["student.lora.keep_adapters=true", "trainable=[projector,norms]"],
            "student.lora.keep_adapters: 'norms' is trained in full, and is not written with adapters: set it to false",
        ),
        (
            "align",
            ["student.lora.keep_adapters=true", "student.checkpoint=null", *PARTS],
            "student.lora.keep_adapters: adapters need the checkpoint they are for, and this student is made anew",
        ),
        ("sft", ["batch.micro_size=3"], "batch.micro_size: 3 does not divide batch.global_size 128"),
        ("sft", ["batch.global_size=0"], "batch.global_size is 0: must be above 0"),
        ("sft", ["optim.lr=0"], "optim.lr is 0: must be above 0"),
        ("sft", ["optim.projector_lr=0"], "optim.projector_lr is 0: must be above 0"),
        ("sft", ["optim.part_lr={vision: 0}"], "optim.part_lr.vision is 0: must be above 0"),
        ("sft", ["optim.part_lr={projektor: 1e-5}"], "optim.part_lr: 'projektor' is unknown: choose from vision, pro"),
        (
            "sft",
            ["optim.part_lr={projector: 1e-5}", "optim.projector_lr=1e-5"],
            "optim.projector_lr: optim.part_lr has a rate of the projector as well: remove one of them",
        ),
        ("sft", ["optim.lr=nan"], "optim.lr is nan: must be above 0"),
        ("sft", ["optim.warmup_ratio=2"], "optim.warmup_ratio is 2: must be from 0 to 1"),
        ("sft", ["optim.betas=[0.9,1.0]"], "optim.betas is [0.9, 1.0]: both must be at least 0"),
        ("sft", ["steps=0"], "steps is 0: must be above 0"),
        ("sft", ["save_steps=-1"], "save_steps is -1: must not be negative"),
        ("sft", ["eval_steps=5"], "eval_steps: needs held-out samples"),
        ("sft", ["engine.zero_stage=4"], "engine.zero_stage is 4: must be 0, 1, 2 or 3"),
        ("sft", ["engine.offload=true", "engine.zero_stage=0"], "engine.offload: offloading needs ZeRO"),
        ("sft", ["optim.learning_rate=1"], "unknown setting optim.learning_rate: did you mean optim.lr?"),
        ("sft", ["optim.lr=fast"], "optim.lr is 'fast': must be a number"),
        ("sft", ["stage=align"], "recipe sft names stage sft, but 'stage=align' names align: choose one of them"),
        ("sft", ["recipe.yaml"], "no such config file: recipe.yaml"),
        ("sft", ["mimic_dence"], "no such recipe or config file: mimic_dence; did you mean mimic_dense?"),
        ("sft", ["kto"], "no such recipe or config file: kto; the recipes are align, mimic_dense"),
    ],
)
def test_settings_that_do_not_fit_are_one_line(stage: str, settings: list[str], problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_config([*arguments(stage), *settings])
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_nothing_but_a_recipe_is_missing_its_keys() -> None:
    with pytest.raises(LlavaModError, match=r"no value for 'data.set'"):
        resolve_config(["sft", *NEEDED[1:]])


def test_a_file_here_wins_over_a_packaged_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_config(arguments("sft")).optim.lr == 2e-5
    (tmp_path / "sft").write_text((RECIPES / "sft.yaml").read_text().replace("2.0e-5", "5.0e-5"))
    assert resolve_config(arguments("sft")).optim.lr == 5e-5
