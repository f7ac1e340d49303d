"""Alignment losses beside the divergence equal those of a slow trainer that runs teacher and student itself.

Shape suffixes: T tokens of a sequence, P tokens of an image, N positions that predict answers, D and E hidden sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llavamod_offline.families.llava.checkpoint import load_llava
from llavamod_offline.losses.alignment import HiddenProjection
from tests.tiny import IMAGE_TOKENS, write_tiny_llava
from tests.train.conftest import EXHAUSTIVE, World, write_cache
from tests.train.reference import Answer, Reader, read_metrics, train_plainly
from tests.train.test_checkpoint import assert_same_run, train_until_sigterm
from tests.train.test_processes import assert_equal_runs, run_two
from train.checkpoint import latest_checkpoint
from train.report.page import write_report
from train.run import train
from train.stages.alignment_setup import make_projection

IMAGE_ID = 399
EVERYTHING = (
    "loss.kind=kd_lm",
    "loss.lm_weight=0.5",
    "loss.positions=response",
    "loss.align.feature_weight=0.7",
    "loss.align.visual_kl_weight=0.3",
    "loss.align.relation_weight=2.0",
)
PARTS = {"feature_distance": 0.7, "visual_kl": 0.3, "relation_distance": 2.0}


@pytest.fixture(scope="module")
def cache(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of every id at all positions, with the teacher's hidden states."""
    folder = tmp_path_factory.mktemp("aligned") / "cache"
    settings = (*EXHAUSTIVE, "capture.positions=all", "capture.hidden=float16")
    return write_cache(folder, world.chats, world.teacher, *settings)


def _kl(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    kl_N: Tensor = (p_NV.exp() * (p_NV - q_NV)).sum(-1)
    return kl_N


def _distance(kind: str, ours_NE: Tensor, theirs_NE: Tensor) -> Tensor:
    if kind == "mse":
        return (ours_NE - theirs_NE).square().mean(-1)
    cosine_N: Tensor = (ours_NE * theirs_NE).sum(-1) / (ours_NE.norm(dim=-1) * theirs_NE.norm(dim=-1))
    return 1 - cosine_N


def _relations(ours_TD: Tensor, theirs_TE: Tensor, ids_T: Tensor) -> list[Tensor]:
    """1 − cosine between the Gram matrices of each image."""
    losses = []
    for rows_P in (ids_T == IMAGE_ID).nonzero()[:, 0].view(-1, IMAGE_TOKENS):
        a, b = ((x[rows_P] @ x[rows_P].T).flatten() for x in (ours_TD, theirs_TE))
        losses.append(1 - a @ b / (a.norm() * b.norm()))
    return losses


def _train_live(
    world: World,
    loss: Callable[[list[tuple[Answer, Answer]], HiddenProjection], Tensor],
    steps: int,
    checkpoint: Path | None = None,
) -> tuple[list[float], list[float]]:
    """Train in a loop that runs the teacher itself, with its hidden states rounded as in the cache."""
    student, teacher = Reader(checkpoint or world.student, world.chats), Reader(world.teacher, world.chats)
    projection = make_projection(64, 48, seed=0)

    def loss_of_step(step: int) -> Tensor:
        pairs = []
        for sample in student.step_samples(step, 8):
            with torch.no_grad():
                said = teacher.answer(sample)
            pairs.append((student.answer(sample), said))
        return loss(pairs, projection)

    trained = student.freeze_all_but("language_model", "multi_modal_projector", "lm_head")
    return train_plainly([*trained, *projection.parameters()], loss_of_step, steps=steps, rate=1e-3)


def _features(pairs: list[tuple[Answer, Answer]], projection: HiddenProjection, kind: str = "mse") -> Tensor:
    distances = [
        _distance(kind, projection(ours.hidden_TD[ours.rows_N]), said.hidden_TD[said.rows_N].half().float())
        for ours, said in pairs
    ]
    return torch.cat(distances).mean()


def _divergence(pairs: list[tuple[Answer, Answer]]) -> Tensor:
    return torch.cat([_kl(said.log_probs_NV, ours.log_probs_NV) for ours, said in pairs]).mean()


def _related(pairs: list[tuple[Answer, Answer]], of: str) -> Tensor:
    found = []
    for ours, said in pairs:
        states = (ours.hidden_TD, said.hidden_TD.half().float())
        found += _relations(*(states if of == "hidden" else (ours.logits_TV, said.logits_TV)), ours.ids_T)
    return torch.stack(found).mean()


def _visual(pairs: list[tuple[Answer, Answer]]) -> Tensor:
    return torch.cat(
        [_kl(said.all_log_probs_TV, ours.all_log_probs_TV)[ours.ids_T == IMAGE_ID] for ours, said in pairs]
    ).mean()


@pytest.mark.parametrize("micro_size", [2, 8])
def test_all_parts_together_equal_the_live_teachers(world: World, cache: Path, tmp_path: Path, micro_size: int) -> None:
    """Each part is a mean over its own positions or images of the whole step, whatever the micro-batches."""

    def loss(pairs: list[tuple[Answer, Answer]], projection: HiddenProjection) -> Tensor:
        cross_entropy = -torch.cat([ours.target_log_probs_N for ours, _ in pairs]).mean()
        aligned = 0.7 * _features(pairs, projection) + 0.3 * _visual(pairs) + 2.0 * _related(pairs, "hidden")
        return _divergence(pairs) + 0.5 * cross_entropy + aligned

    losses, norms = _train_live(world, loss, steps=3)
    settings = (*EVERYTHING, f"cache.path={cache}", f"batch.micro_size={micro_size}", "steps=3")
    train(world.config("mimic_dense", tmp_path / "run", *settings))
    log = read_metrics(tmp_path / "run")
    assert [entry["loss"] for entry in log] == pytest.approx(losses, rel=1e-5)
    assert [entry["grad_norm"] for entry in log] == pytest.approx(norms, rel=1e-4)
    for entry in log:
        parts = entry["divergence"] + 0.5 * entry["cross_entropy"] + sum(w * entry[part] for part, w in PARTS.items())
        assert parts == pytest.approx(entry["loss"], rel=1e-5)
        assert all(entry[part] > 1e-3 for part in PARTS)
    page = write_report([tmp_path / "run"], tmp_path / "run.html").read_text()
    for title in ("features", "image tokens", "Relations"):
        assert title in page


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        (("feature_weight=1.5", "feature_distance=cosine"), lambda pairs, p: 1.5 * _features(pairs, p, "cosine")),
        (("relation_weight=3.0",), lambda pairs, p: 3.0 * _related(pairs, "hidden")),
        (("relation_weight=3.0", "relation_of=logits"), lambda pairs, p: 3.0 * _related(pairs, "logits")),
    ],
)
def test_each_part_stands_beside_the_divergence_of_all_positions(
    world: World,
    cache: Path,
    tmp_path: Path,
    settings: tuple[str, ...],
    part: Callable[[list[tuple[Answer, Answer]], HiddenProjection], Tensor],
) -> None:
    def loss(pairs: list[tuple[Answer, Answer]], projection: HiddenProjection) -> Tensor:
        everywhere = torch.cat([_kl(said.all_log_probs_TV, ours.all_log_probs_TV) for ours, said in pairs]).mean()
        unused = sum(parameter.sum() for parameter in projection.parameters()) * 0.0
        return everywhere + part(pairs, projection) + unused

    given, checkpoint = [f"loss.align.{setting}" for setting in settings], None
    if "relation_of=logits" in settings:
        checkpoint = write_tiny_llava(tmp_path / "wide", head_rows=416)  # the spare rows have no logits to relate
        given += [f"loss.align.teacher_lm_head={world.teacher}", f"student.checkpoint={checkpoint}"]
    losses, norms = _train_live(world, loss, 2, checkpoint)
    train(world.config("mimic_dense", tmp_path / "run", *given, f"cache.path={cache}", "steps=2"))
    log = read_metrics(tmp_path / "run")
    assert [entry["loss"] for entry in log] == pytest.approx(losses, rel=1e-5)
    assert [entry["grad_norm"] for entry in log] == pytest.approx(norms, rel=1e-4)


def test_features_need_no_more_than_the_positions_of_answers(world: World, cache: Path, tmp_path: Path) -> None:
    """The loss is the same from a cache of response positions and from one of all positions."""
    small = write_cache(tmp_path / "cache", world.chats, world.teacher, *EXHAUSTIVE, "capture.hidden=float16")
    logs = []
    for name, where in (("small", small), ("large", cache)):
        settings = ("loss.align.feature_weight=1", "loss.positions=response", f"cache.path={where}", "steps=2")
        train(world.config("mimic_dense", tmp_path / name, *settings))
        logs.append([entry[part] for entry in read_metrics(tmp_path / name) for part in ("loss", "feature_distance")])
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)


def test_a_step_without_images_has_nothing_to_relate(world: World, cache: Path, tmp_path: Path) -> None:
    """Every fourth sample has none: with micro-batches of one sample, and steps of one."""
    settings = (*EVERYTHING, f"cache.path={cache}", "batch.global_size=1", "batch.micro_size=1", "steps=12")
    train(world.config("mimic_dense", tmp_path / "run", *settings))
    log = read_metrics(tmp_path / "run")
    without = [entry for entry in log if entry["visual_kl"] == 0]
    assert 0 < len(without) < len(log)
    assert all(entry["relation_distance"] == 0 and entry["feature_distance"] > 0 for entry in without)


def test_the_projection_is_kept_in_checkpoints_and_left_behind_by_the_export(
    world: World, cache: Path, tmp_path: Path
) -> None:
    settings = (*EVERYTHING, f"cache.path={cache}", "steps=6", "data.holdout=4", "eval_steps=3")
    train(world.config("mimic_dense", tmp_path / "whole", *settings))
    config = world.config("mimic_dense", tmp_path / "run", *settings)
    assert train_until_sigterm(config, lines=2) == 2
    checkpoint = latest_checkpoint(tmp_path / "run")
    assert checkpoint is not None
    kept = load_file(checkpoint / "weights.safetensors")
    assert "model.multi_modal_projector.linear_1.weight" in kept  # the student's own names, as without a projection
    first = make_projection(64, 48, seed=0).state_dict()
    for name, tensor in first.items():
        assert kept[f"projection.{name}"].shape == tensor.shape
        assert not torch.equal(kept[f"projection.{name}"], tensor)
    train(config)
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    exported = load_file(tmp_path / "run" / "student" / "model.safetensors")
    assert exported.keys() == load_file(world.student / "model.safetensors").keys()
    assert "holdout_feature_distance" in read_metrics(tmp_path / "run")[-1]


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_under_zero_it_is_the_same(world: World, cache: Path, tmp_path: Path, zero_stage: int) -> None:
    """The run is stopped under ZeRO and resumed without it."""
    settings = (*EVERYTHING, f"cache.path={cache}", "steps=4", "batch.micro_size=2")
    train(world.config("mimic_dense", tmp_path / "plain", *settings, "engine.zero_stage=0"))
    first = world.config("mimic_dense", tmp_path / "run", *settings, f"engine.zero_stage={zero_stage}")
    train_until_sigterm(first, lines=2)
    train(world.config("mimic_dense", tmp_path / "run", *settings, "engine.zero_stage=0"))
    train(world.config("mimic_dense", tmp_path / "sharded", *settings, f"engine.zero_stage={zero_stage}"))
    plain = [entry["loss"] for entry in read_metrics(tmp_path / "plain")]
    for other in ("run", "sharded"):
        assert [entry["loss"] for entry in read_metrics(tmp_path / other)] == pytest.approx(plain, rel=1e-5)
        exported = load_llava(tmp_path / other / "student").state_dict()
        for name, tensor in load_llava(tmp_path / "plain" / "student").state_dict().items():
            torch.testing.assert_close(exported[name], tensor, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "zero_stage"), [("mimic_dense", 2), ("mimic_sparse", 3)])
def test_two_processes_equal_one(world: World, cache: Path, tmp_path: Path, stage: str, zero_stage: int) -> None:
    """With micro-batches of one sample, so that one process has an image where the other has none."""
    settings = (*EVERYTHING, f"cache.path={cache}", "steps=10", "batch.micro_size=1")
    config = world.config(stage, tmp_path / "two", *settings)
    done = run_two(config, tmp_path, f"engine.zero_stage={zero_stage}")
    assert done.returncode == 0, done.stderr
    train(world.config(stage, tmp_path / "one", *settings))
    assert_equal_runs(tmp_path / "two", tmp_path / "one")
    for name in PARTS:
        one, two = ([entry[name] for entry in read_metrics(tmp_path / run)] for run in ("one", "two"))
        assert two == pytest.approx(one, rel=1e-4, abs=1e-7)


def test_bfloat16_trains_it_too(world: World, cache: Path, tmp_path: Path) -> None:
    train(world.config("mimic_dense", tmp_path / "run", *EVERYTHING, f"cache.path={cache}", "engine.dtype=bfloat16"))
    log = read_metrics(tmp_path / "run")
    assert log[-1]["loss"] < log[0]["loss"]
