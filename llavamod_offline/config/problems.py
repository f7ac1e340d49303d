"""What is wrong with a setting, in one line that says what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from types import NoneType
from typing import Any, get_args, get_origin

from llavamod_offline.config.schema import choices, fields, hint_of, is_optional, plain, section_of, settings
from llavamod_offline.errors import ConfigError

# The last parts of setting names here → names that other projects use for them.
_OTHER_NAMES = {
    "lr": "learning_rate peak_lr max_lr base_lr",
    "global_size": "batch_size bs total_batch_size global_batch_size train_batch_size gradient_accumulation_steps",
    "micro_size": "batch_size bs micro_batch_size per_device_train_batch_size per_device_batch_size",
    "batch_size": "batch bs micro_batch_size per_device_batch_size per_device_eval_batch_size eval_batch_size",
    "epochs": "epoch num_epochs num_train_epochs n_epochs max_epochs",
    "steps": "max_steps num_steps total_steps iterations iters",
    "output": "output_dir output_path output_folder out out_dir o save_dir run_dir",
    "set": "data dataset datasets data_path data_dir train_data data_set",
    "data": "dataset data_path data_dir set data_set",
    "path": "cache_path teacher_cache",
    "checkpoint": "model model_path model_name model_name_or_path pretrained student_path student_model init",
    "teacher": "model model_path model_name model_name_or_path pretrained checkpoint teacher_path teacher_model",
    "model": "model_path model_name model_name_or_path pretrained checkpoint student student_path",
    "language_model": "llm lm text_model base_model",
    "vision_tower": "vision image_tower clip vit vision_model vision_encoder",
    "projector": "pretrain_mm_mlp_adapter policy_pretrain_mm_mlp_adapter mm_projector projector_path adapter",
    "projector_type": "mm_projector_type image_projector_type",
    "projector_lr": "mm_projector_lr",
    "vision_feature_layer": "mm_vision_select_layer vision_select_layer",
    "vision_feature_select_strategy": "mm_vision_select_feature vision_select_feature select_feature",
    "rank": "lora_r lora_rank r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
    "targets": "target_modules lora_target lora_target_modules",
    "group_by_modality": "group_by_modality_length",
    "root": "data data_dir data_root data_path eval_root",
    "warmup_ratio": "warmup warmup_steps",
    "schedule": "scheduler lr_scheduler lr_scheduler_type lr_schedule",
    "grad_clip": "clip max_grad_norm grad_norm gradient_clipping clip_grad clip_grad_norm",
    "weight_decay": "wd",
    "betas": "adam_betas adam_beta1 adam_beta2 beta1 beta2",
    "eps": "epsilon adam_epsilon adam_eps",
    "dtype": "precision bf16 fp16 fp32 torch_dtype half",
    "device": "gpu gpus cuda cpu device_id",
    "max_length": "seq_len seq_length max_seq_len max_seq_length model_max_length context_length max_len",
    "max_new_tokens": "max_tokens new_tokens max_completion_tokens",
    "workers": "num_workers dataloader_num_workers threads num_threads processes num_proc",
    "tracker": "report_to logger log_to wandb tensorboard trackio",
    "log_steps": "logging_steps log_every log_interval",
    "save_steps": "checkpoint_steps save_every save_interval",
    "keep_last": "save_total_limit keep",
    "eval_steps": "eval_every eval_interval evaluation_steps",
    "zero_stage": "zero deepspeed deepspeed_stage",
    "gradient_checkpointing": "activation_checkpointing checkpointing grad_checkpointing",
    "template": "chat_template prompt_template conv_mode version conversation",
    "kind": "loss_type loss_fn backend type name",
    "engine": "backend kind",
    "tasks": "task benchmark benchmarks dataset datasets",
    "attention": "attn attn_implementation attention_implementation flash_attention",
    "tensor_parallel": "tp tensor_parallel_size num_gpus",
    "pipeline_parallel": "pp pipeline_parallel_size",
    "executor": "distributed_executor_backend",
    "trainable": "train_modules trainable_modules tune_modules train_parts freeze unfreeze",
    "image_aspect": "image_aspect_ratio aspect aspect_ratio",
    "limit": "max_samples num_samples n",
    "holdout": "val eval validation val_size validation_split",
    "router_aux_coef": "router_aux_loss_coef aux_loss aux_loss_coef balance_loss",
    "temperature": "temp t",
    "top_k": "topk k",
}


def raise_problems(problems: Iterable[str]) -> None:
    """Raise one `ConfigError` that names all problems, if there are any."""
    found = list(dict.fromkeys(problems))
    if len(found) == 1:
        raise ConfigError(found[0])
    if found:
        listed = " ".join(f"({number}) {problem};" for number, problem in enumerate(found, start=1))
        raise ConfigError(f"{len(found)} settings do not fit: {listed.rstrip(';')}")


def unknown_setting(schema: type[Any], key: str) -> str:
    """Name a key that does not exist, with the settings that may have been meant."""
    near = similar_settings(schema, key)
    if not near:
        return f"unknown setting {key}: --help lists all"
    return f"unknown setting {key}: did you mean {_either(near)}?"


def similar_settings(schema: type[Any], key: str) -> list[str]:
    """Up to three settings that a key may mean: by its last part, by what others call it, or by its spelling."""
    wanted = key.strip().lower().replace("-", "_")
    section, _, name = wanted.rpartition(".")
    keys = [setting.key for setting in settings(schema)]
    inner = section_of(hint_of(schema, section.split("."))) if section else None
    if inner is not None and not any(known.startswith(f"{section}.") for known in keys):  # in a mapping of sections
        keys += [f"{section}.{setting.key}" for setting in settings(inner)]
    same = [known for known in keys if _last(known) == name]
    meant = [known for known in keys if name in _OTHER_NAMES.get(_last(known), "").split()]
    word = [known for known in keys if name in _last(known).split("_")]
    spelt = difflib.get_close_matches(wanted, keys, n=1, cutoff=0.7)
    last = difflib.get_close_matches(name, [_last(known) for known in keys], n=1, cutoff=0.7)
    nearest = spelt or [known for known in keys if last == [_last(known)]]
    for found in (same, meant, word, nearest):
        inside = [known for known in found if section and known.startswith(f"{section}.")]
        if found:
            return (inside or found)[:3]
    return []


def wrong_value(key: str, hint: Any, value: Any) -> str:
    """Say what a setting's value must be instead of the one given."""
    section = section_of(hint)
    if section is not None:
        inner = [setting.key for setting, _ in fields(section)]
        typed = value if isinstance(value, str) else "VALUE"
        return f"{key} is a section of settings: write {key}.{inner[0]}={typed} (it has {', '.join(inner)})"
    if isinstance(value, dict) and get_origin(plain(hint)) is not dict:
        return f"{key} is a single setting, not a section: write {key}={expected(hint)}"
    if get_origin(plain(hint)) is list and isinstance(value, str) and value.startswith("["):
        return f"{key} is not a list: '{value}': quote items that hold brackets or braces: {key}=['a=[b,c]',d]"
    if get_origin(plain(hint)) in (list, tuple) and not isinstance(value, list):
        return f"{key} takes a list: write {key}=[{_shown(value)}]"
    if isinstance(value, dict) and all(item is None and ":" in name for name, item in value.items()):
        name, _, item = next(iter(value)).partition(":")
        return f"{key} has no values: write a space after each colon: {key}={{{name}: {item}}}"
    return f"{key} is {_quoted(value)}: must be {expected(hint)}"


def expected(hint: Any) -> str:
    """What values a type allows, in words."""
    if is_optional(hint) and plain(hint) is not hint:
        return f"{expected(plain(hint))}, or null"
    if hint is NoneType:
        return "null"
    hint = plain(hint)
    if choices(hint):
        return _either([str(choice) for choice in choices(hint)], one_of=True)
    if get_origin(hint) is list:
        (kind,) = get_args(hint)
        return f"a list of {_PLURALS.get(plain(kind), 'values')}, such as [{_EXAMPLES.get(kind, '…')}]"
    if get_origin(hint) is tuple:
        examples = [_EXAMPLES.get(kind, "…") for kind in get_args(hint)]
        plural = _PLURALS.get(get_args(hint)[0], "values")
        return f"a list of {len(examples)} {plural}, such as [{', '.join(examples)}]"
    if get_origin(hint) is dict:
        kind = plain(get_args(hint)[1])
        return "a mapping, such as {name: " + ("text" if kind is str else _EXAMPLES.get(kind, "…")) + "}"
    if hint in _WORDS:
        return _WORDS[hint]
    return " or ".join(expected(kind) for kind in get_args(hint)) or str(hint)


_WORDS: dict[Any, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_PLURALS: dict[Any, str] = {int: "whole numbers", float: "numbers", str: "names"}
_EXAMPLES: dict[Any, str] = {int: "1", float: "0.5", str: "a, b"}


def _last(key: str) -> str:
    return key.rpartition(".")[2]


def _either(names: Sequence[str], *, one_of: bool = False) -> str:
    if len(names) > 2 and one_of:
        return f"one of {', '.join(names)}"
    return " or ".join(([", ".join(names[:-1])] if names[1:] else []) + [names[-1]])


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _quoted(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) else _shown(value)
