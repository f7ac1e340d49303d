"""Prepare the alignment terms of mimic distillation: check the cache, make the projection, read the teacher's LM head.

Shape suffixes: D and T the hidden sizes of student and teacher, V rows of the teacher's LM head.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llavamod_offline.errors import ConfigError
from llavamod_offline.families.folder import read_config
from llavamod_offline.losses.alignment import HiddenProjection
from llavamod_offline.models.checkpoint import open_tensors, read_json
from llavamod_offline.models.hub import checkpoint_folder
from llavamod_offline.models.lm_head import LmHead, head_settings
from train.config import AlignConfig
from train.data.teacher_states import WantedStates
from train.stages.alignment import Alignment

if TYPE_CHECKING:
    from llavamod_offline.data.encode.tokenize import SequenceEncoder
    from teacher_cache.read.reader import TeacherCache

_LM_HEAD_NAMES = ("lm_head.weight", "embed_tokens.weight")  # tied embeddings are stored under the second name
_ROWS_AT_ONCE = 8_192
_NOT_LINEAR = (
    "has a bias or a softcap, so that relations of logits do not follow from hidden states and its weight: set it to "
    "hidden"
)


def prepare_alignment(
    align: AlignConfig,
    cache: TeacherCache | None,
    *,
    student_head: LmHead,
    vocab_size: int | None,
    encoder: SequenceEncoder,
    seed: int,
    device: torch.device,
) -> Alignment | None:
    """Make the alignment of a run; None if no term has a weight. The cache must have passed `check_cache`.

    `vocab_size`: the number of ids whose logits are compared.
    Errors: `ConfigError` if `teacher_lm_head` belongs to another teacher, or if the logits to compare are not a linear
    map; `ModelError` if it is damaged.
    """
    if cache is None or not align.is_on:
        return None
    states = None
    if align.wants_states:
        image_token_id = encoder.image_token_id if align.relation_weight else None
        states = WantedStates(hidden_size(cache), answers=align.feature_weight > 0, image_token_id=image_token_id)
    projection = None
    if align.feature_weight:
        assert states is not None
        projection = make_projection(student_head.weight_VD.shape[1], states.size, seed=seed)
    metric_TT = None
    if align.relation_of == "logits":
        assert align.teacher_lm_head is not None
        assert states is not None
        if not student_head.is_linear:
            raise ConfigError(f"loss.align.relation_of: the student's LM head {_NOT_LINEAR}")
        metric_TT = teacher_metric(checkpoint_folder(align.teacher_lm_head), cache, states.size).to(device)
    return Alignment(
        align,
        image_token_id=encoder.image_token_id,
        image_tokens=encoder.image_tokens,
        states=states,
        vocab_size=vocab_size,
        projection=projection,
        teacher_metric_TT=metric_TT,
    )


def check_cache(align: AlignConfig, cache: TeacherCache) -> None:
    """Check that a cache records what the terms compare. Errors: `ConfigError` naming the key and the remedy."""
    capture = cache.fingerprint["capture"]
    named = f"cache '{cache.path}'"
    for key in ("visual_kl_weight", "relation_weight"):
        if getattr(align, key) and cache.positions_kept != "all":
            raise ConfigError(
                f"loss.align.{key}: {named} records positions of answers, not of image tokens: capture with "
                "capture.positions=all, or set it to 0"
            )
    for key in ("feature_weight", "relation_weight"):
        if getattr(align, key) and capture.get("hidden") is None:
            raise ConfigError(
                f"loss.align.{key}: {named} has no hidden states: capture with capture.hidden=float16, or set it to 0"
            )
    if align.feature_weight and capture.get("hidden_positions") == "image":
        raise ConfigError(
            f"loss.align.feature_weight: {named} has hidden states of image tokens, not of answers: capture "
            "with capture.hidden_positions=recorded, or set it to 0"
        )


def hidden_size(cache: TeacherCache) -> int:
    """Read T from the cache's first sequence."""
    return int(cache.hidden_states(cache.items([0])).states_MD.shape[1])


def make_projection(student_size: int, teacher_size: int, *, seed: int) -> HiddenProjection:
    """Make a projection whose initial weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return HiddenProjection(student_size, teacher_size)


def teacher_metric(folder: Path, cache: TeacherCache, size: int) -> Tensor:
    """Compute WᵀW [T, T], float32, of the teacher's LM head over the cache's ids, reading no other weights.

    Errors: `ConfigError` if the checkpoint is not the one captured, or its logits are not a linear map of hidden
    states; `ModelError` if it is damaged.
    """
    from teacher_cache.format.manifest import sha256_file

    file, name = _find_lm_head(folder)
    known = cache.fingerprint["teacher"]["weights"]
    if not isinstance(known, dict) or known.get(file.name) != sha256_file(file):
        raise ConfigError(
            f"loss.align.teacher_lm_head: {file} differs from that of the teacher of cache '{cache.path}': set it to "
            "that teacher's folder"
        )
    _check_linear(folder)
    metric_TT = torch.zeros(size, size, dtype=torch.float64)
    for rows_RT in _rows(file, name, cache.vocab_size):
        if rows_RT.shape[1] != size:
            raise ConfigError(
                f"loss.align.teacher_lm_head: {file}: '{name}' is {rows_RT.shape[1]} wide, the cache's hidden states "
                f"are {size}: set it to the folder of the cache's teacher"
            )
        metric_TT += (rows_RT.T @ rows_RT).double()
    return metric_TT.float()


def _check_linear(folder: Path) -> None:
    """Refuse a checkpoint whose LM head has a softcap or a bias. Errors: `ConfigError`."""
    from transformers import AutoConfig

    softcap, _ = head_settings(
        read_json(folder, "config.json").get("architectures") or [], read_config(AutoConfig, folder)
    )
    biased = False
    for file in folder.glob("*.safetensors"):
        with open_tensors(file) as tensors:
            biased = biased or any(f".{name}".endswith(".lm_head.bias") for name in tensors.keys())  # noqa: SIM118
    if softcap is not None or biased:
        raise ConfigError(f"loss.align.relation_of: the LM head of {folder} {_NOT_LINEAR}")


def _find_lm_head(folder: Path) -> tuple[Path, str]:
    """Find the file and the name of a checkpoint's LM head, or of its embeddings if they are tied."""
    named: dict[str, tuple[Path, str]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with open_tensors(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118
                for ending in _LM_HEAD_NAMES:
                    if f".{name}".endswith(f".{ending}"):
                        named[ending] = (file, name)
    for ending in _LM_HEAD_NAMES:
        if ending in named:
            return named[ending]
    raise ConfigError(
        f"loss.align.teacher_lm_head: {folder} holds no {' or '.join(_LM_HEAD_NAMES)} in safetensors: set it to the "
        "folder of the cache's teacher"
    )


def _rows(file: Path, name: str, count: int) -> Iterator[Tensor]:
    """Yield the first `count` rows of a matrix in a file, a chunk at a time, in float32."""
    with open_tensors(file) as tensors:
        whole = tensors.get_slice(name)
        count = min(count, whole.get_shape()[0])
        for start in range(0, count, _ROWS_AT_ONCE):
            yield whole[start : min(start + _ROWS_AT_ONCE, count)].float()
