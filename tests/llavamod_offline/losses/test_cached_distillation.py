"""Distillation as a module: equal to its parts, safe against wrong records, and the same whatever the sharding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llavamod_offline.errors import ModelError, TargetError
from llavamod_offline.examples.batches import Batches
from llavamod_offline.families.llava.checkpoint import load_llava
from llavamod_offline.losses import CachedDistillation, distillation_from_hidden
from llavamod_offline.losses.cached_distillation import prior_of
from teacher_cache import TeacherCache, check_labels, open_cache
from teacher_cache.student.end_of_turn import TokenIdSwap
from tests.llavamod_offline.losses import sharded_driver
from tests.processes import in_two_processes
from tests.tiny import write_tiny_llava, write_tiny_set
from tests.train.conftest import write_cache

Folders = dict[str, Path]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("distillation")
    teacher = write_tiny_llava(root / "teacher", hidden=48, layers=3, seed=7, tied=False)
    data = write_tiny_set(root / "set", 24)
    small = ("capture.preset=compact", "capture.top_k=4", "capture.temperatures=[2]")
    return {
        "student": write_tiny_llava(root / "student"),
        "data": data,
        "cache": write_cache(root / "cache", data, teacher, *small),
        "all": write_cache(root / "all", data, teacher, *small, "capture.positions=all"),
    }


def _batch(folders: Folders, cache: TeacherCache, keys: list[str]) -> dict[str, Any]:
    inputs = Batches(folders["student"], folders["data"]).make(keys, ["response"], cache)
    return {**inputs, "targets": cache.targets([(key, "response") for key in keys])}


def _keys(cache: TeacherCache, count: int = 6) -> list[str]:
    return [key for key, _ in cache.items(range(count))]


@pytest.mark.parametrize(
    ("settings", "tail"),
    [
        ({}, "samples"),
        ({"divergence": "reverse_kl"}, "bucket"),
        ({"tail": "bucket", "temperature": 2.0, "lm_weight": 0.5}, "bucket"),
    ],
)
@pytest.mark.parametrize("which", ["cache", "all"])
def test_it_equals_the_fused_loss_over_the_recorded_positions(
    folders: Folders, settings: dict[str, Any], tail: Any, which: str
) -> None:
    """Here positions are found one by one; the gradients of LM head and hidden states are compared too."""
    cache, model = open_cache(folders[which]), load_llava(folders["student"])
    batch = _batch(folders, cache, _keys(cache))
    targets, labels = batch.pop("targets"), batch.pop("labels")
    hidden = model.base_model(**batch).last_hidden_state.detach().requires_grad_()
    output = CachedDistillation(cache, **settings)(
        hidden, model.lm_head.weight, labels, targets, attention_mask_BT=batch["attention_mask"]
    )
    output.loss.backward()
    found = hidden.grad, model.lm_head.weight.grad
    rows, answers = [], 0
    for b, row in enumerate(labels.tolist()):
        for t in range(len(row)):
            supervised = t + 1 < len(row) and row[t + 1] != -100
            answers += supervised
            if supervised or (which == "all" and batch["attention_mask"][b, t]):
                rows.append((b, t))
    other, weight = hidden.detach().requires_grad_(), model.lm_head.weight.detach().requires_grad_()
    settings = {**settings, "lm_weight": settings.get("lm_weight", 0.0) * len(rows) / answers, "tail": tail}
    places = torch.tensor(rows)
    terms = distillation_from_hidden(other[places[:, 0], places[:, 1]], weight, targets, **settings)
    (terms.loss_sum / len(rows)).backward()
    assert output.positions == len(rows) == len(targets)
    torch.testing.assert_close(output.loss.detach(), terms.loss_sum.detach() / len(rows))
    for ours, theirs in zip(found, (other.grad, weight.grad), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_micro_batches_add_up_to_the_whole(folders: Folders) -> None:
    cache, model = open_cache(folders["cache"]), load_llava(folders["student"])
    distillation = CachedDistillation(cache)
    distillation.attach(model)
    keys = _keys(cache)
    whole = model(**_batch(folders, cache, keys)).loss
    items = sum(cache.sequence(key, "response").n_positions for key in keys)
    parts = [model(**_batch(folders, cache, part), num_items_in_batch=items).loss for part in (keys[:2], keys[2:])]
    assert float(sum(parts).detach()) == pytest.approx(float(whole.detach()), rel=1e-6)


def test_labels_of_other_micro_batches_do_not_count_all_positions(folders: Folders) -> None:
    """A step of one micro-batch is the whole; more are refused, whose share would be wrong."""
    cache, model = open_cache(folders["all"]), load_llava(folders["student"])
    CachedDistillation(cache).attach(model)
    batch = _batch(folders, cache, _keys(cache))
    answers = int((batch["labels"] != -100).sum())
    whole = model(**batch).loss
    torch.testing.assert_close(model(**batch, num_items_in_batch=answers).loss, whole)
    with pytest.raises(TargetError, match=r"teaches all positions, .*: use one micro-batch per step, or a cache"):
        model(**batch, num_items_in_batch=answers + 1)


def test_records_of_other_samples_are_refused(folders: Folders) -> None:
    """Whether or not their numbers of positions differ."""
    cache, model = open_cache(folders["cache"]), load_llava(folders["student"])
    CachedDistillation(cache).attach(model)
    keys = _keys(cache)
    batch = _batch(folders, cache, keys)
    swapped = [keys[1], keys[0], *keys[2:]]
    with pytest.raises(TargetError, match=r"its label is token \d+, its record was made for token \d+"):
        model(**{**batch, "targets": cache.targets([(key, "response") for key in swapped])})
    with pytest.raises(TargetError, match="the labels supervise"):
        model(**{**batch, "targets": cache.targets([(key, "response") for key in keys[1:]])})
    place = (2, int(batch["labels"][2].ne(-100).nonzero()[0]))
    for name in ("labels", "input_ids"):
        batch[name][place] += 1
    with pytest.raises(TargetError, match="pass the records of the same sequences"):
        model(**batch)


def test_labels_are_checked_against_the_cache_by_sample(folders: Folders) -> None:
    cache = open_cache(folders["cache"])
    keys = _keys(cache)
    labels, items = _batch(folders, cache, keys)["labels"], [(key, "response") for key in keys]
    check_labels(labels, items, cache)
    swapped = labels[[1, 0, 2, 3, 4, 5]]
    with pytest.raises(TargetError, match=rf"sample '{keys[0]}' \(response\): its supervised ids"):
        check_labels(swapped, items, cache)
    with pytest.raises(TargetError, match="labels of 6 sequences for 5 items"):
        check_labels(labels, items[1:], cache)


def test_shifted_labels_are_refused(folders: Folders) -> None:
    """Their tokens match the records but stand one position too early."""
    cache, model = open_cache(folders["cache"]), load_llava(folders["student"])
    CachedDistillation(cache).attach(model)
    batch = _batch(folders, cache, _keys(cache))
    batch["labels"] = torch.cat([batch["labels"][:, 1:], torch.full_like(batch["labels"][:, :1], -100)], 1)
    with pytest.raises(TargetError, match="do not shift them"):
        model(**batch)


def test_the_first_token_cannot_be_supervised(folders: Folders) -> None:
    cache = open_cache(folders["cache"])
    batch = _batch(folders, cache, _keys(cache))
    batch["labels"][0, 0] = 1
    hidden = torch.zeros(*batch["labels"].shape, 8)
    with pytest.raises(TargetError, match="the first token of a sequence is supervised"):
        CachedDistillation(cache)(hidden, torch.zeros(400, 8), batch["labels"], batch["targets"])


def test_a_sharded_head_is_named_with_the_way_out(folders: Folders) -> None:
    cache = open_cache(folders["cache"])
    batch = _batch(folders, cache, _keys(cache))
    hidden = torch.zeros(*batch["labels"].shape, 8)
    with pytest.raises(ModelError, match=r"has shape \[0\].*attach\(student\)"):
        CachedDistillation(cache)(hidden, torch.zeros(0), batch["labels"], batch["targets"])


def test_a_head_with_a_bias_is_applied_whole(folders: Folders) -> None:
    """The loss is computed on logits with the bias, and the bias gets its gradient."""
    cache, model = open_cache(folders["cache"]), load_llava(folders["student"])
    bias_V = torch.randn(model.lm_head.weight.shape[0], generator=torch.Generator().manual_seed(0))
    model.lm_head.bias = torch.nn.Parameter(3 * bias_V)
    batch = _batch(folders, cache, _keys(cache))
    distillation = CachedDistillation(cache, kd_weight=0.0, lm_weight=1.0)
    distillation.attach(model)
    model(**batch).loss.backward()
    found = model.lm_head.bias.grad.clone()
    model.zero_grad()
    targets, labels = batch.pop("targets"), batch.pop("labels")
    logits_BTV = model(**batch).logits[..., : targets.vocab_size]
    plain = torch.nn.functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    plain.backward()
    torch.testing.assert_close(found, model.lm_head.bias.grad, rtol=1e-4, atol=1e-7)


def test_a_head_that_is_not_known_is_refused(folders: Folders) -> None:
    cache, model = open_cache(folders["cache"]), load_llava(folders["student"])
    model.lm_head.register_forward_hook(lambda module, inputs, logits: 30 * torch.tanh(logits / 30))
    with pytest.raises(ModelError, match="are not those of its LM head"):
        CachedDistillation(cache).attach(model)


def test_a_student_with_swapped_ids_and_one_with_fewer_rows(folders: Folders) -> None:
    """Records are translated to the student's ids; an id that the student lacks is named."""
    cache, model = open_cache(folders["cache"]), load_llava(folders["student"])
    batch = _batch(folders, cache, _keys(cache))
    targets, labels = batch.pop("targets"), batch.pop("labels")
    hidden = model.base_model(**batch).last_hidden_state.detach()
    weight = model.lm_head.weight.detach()
    swap = TokenIdSwap(3, 11)
    rows = torch.arange(len(weight))
    rows[[3, 11]] = rows[[11, 3]]
    swapped = torch.where(labels == 3, 11, torch.where(labels == 11, 3, labels))
    for epochs in (1.0, 1000.0):  # without and with a prior
        plain, other = (CachedDistillation(cache, swap=one, epochs=epochs) for one in (None, swap))
        assert (plain.prior is None) == (epochs == 1)
        loss = plain(hidden, weight, labels, targets).loss
        torch.testing.assert_close(other(hidden, weight[rows], swapped, targets).loss, loss)
    smaller = CachedDistillation(cache, student_rows=300, epochs=1000.0)
    assert smaller.prior is not None
    assert len(smaller.prior.profile_V) == 300
    with pytest.raises(TargetError, match="300"):  # records name ids that such a student lacks
        smaller(hidden, weight[:300], labels, targets)


def test_the_mean_tail_is_not_read_where_it_has_no_share(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading it means opening every shard of a cache."""
    cache = open_cache(folders["cache"])

    def unread(self: TeacherCache) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(TeacherCache, "tail_profile", property(unread))
    assert prior_of(cache, epochs=1.01, swap=None, vocab_size=None) is None
    with pytest.raises(AssertionError, match="read"):
        prior_of(cache, epochs=1000.0, swap=None, vocab_size=None)


def test_without_targets_an_attached_student_answers_as_before(folders: Folders) -> None:
    cache, model = open_cache(folders["cache"]), load_llava(folders["student"])
    ids = torch.tensor([[5, 6, 7]])
    before = model(input_ids=ids).logits
    CachedDistillation(cache).attach(model)
    torch.testing.assert_close(model(input_ids=ids).logits, before)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrapper", "tail", "head"),
    [
        ("ddp", "bucket", "biased"),
        ("fsdp", "bucket", "plain"),
        ("fsdp", "bucket", "biased"),
        ("zero3", "bucket", "plain"),
        ("zero3", "samples", "biased"),
    ],
)
def test_two_processes_learn_as_one(folders: Folders, tmp_path: Path, wrapper: str, tail: Any, head: str) -> None:
    """The LM head is gathered inside the student's forward pass; losses and updates equal those of one process."""
    places = (folders["student"], folders["data"], folders["cache"])
    in_two_processes(sharded_driver.__file__, wrapper, tail, head, *places, tmp_path / "found")
    first, second = (json.loads((tmp_path / f"found.{rank}").read_text()) for rank in (0, 1))
    alone = sharded_driver.train(*places, sharded_driver.plain, tail, head)
    assert len(set(alone["losses"])) == sharded_driver.STEPS
    assert first == second
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-5)
