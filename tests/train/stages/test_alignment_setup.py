"""Caches that lack what is to be aligned are refused by one line before the first step; the teacher's LM head."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llavamod_offline.data.encode.template import get_template
from llavamod_offline.data.pack.pack import write_set
from llavamod_offline.data.sample import Sample, Turn
from llavamod_offline.errors import CacheError, ConfigError, LlavaModError, ModelError
from llavamod_offline.families.llava.checkpoint import load_llava, sequence_encoder
from llavamod_offline.models.checkpoint import load_tokenizer
from llavamod_offline.models.lm_head import LmHead, lm_head_of
from teacher_cache.read.reader import TeacherCache, open_cache
from tests.tiny import write_tiny_llava
from tests.tiny_teachers import write_tiny_causal_lm
from tests.train.conftest import World, write_cache
from train.data import teacher_states
from train.data.teacher_states import WantedStates
from train.run import train
from train.stages import alignment_setup as alignment
from train.stages.alignment_setup import make_projection, prepare_alignment, teacher_metric

REFERENCE = ("capture.preset=reference", "capture.positions=all", "capture.hidden=int8")


@pytest.fixture(scope="module")
def of_images(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of all positions, with hidden states only at image tokens."""
    settings = ("capture.positions=all", "capture.hidden=int8", "capture.hidden_positions=image")
    return write_cache(tmp_path_factory.mktemp("images") / "cache", world.chats, world.teacher, *settings)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (
            ("feature_weight=1",),
            r"loss\.align\.feature_weight: cache .* has no hidden states: capture with capture\.hidden=float16, or set",
        ),
        (
            ("visual_kl_weight=1",),
            r"loss\.align\.visual_kl_weight: cache .* records positions of answers, .* capture\.positions=all",
        ),
        (("relation_weight=1",), r"loss\.align\.relation_weight: cache .* not of image tokens"),
    ],
)
def test_a_cache_without_it_is_refused(world: World, tmp_path: Path, settings: tuple[str, ...], problem: str) -> None:
    given = [f"loss.align.{setting}" for setting in settings]
    with pytest.raises(ConfigError, match=problem) as caught:
        train(world.config("mimic_dense", tmp_path / "run", *given, "loss.positions=response"))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_other_caches_that_do_not_do(world: World, of_images: Path, tmp_path: Path) -> None:
    def refused(cache: Path, *settings: str) -> str:
        with pytest.raises(LlavaModError) as caught:
            train(world.config("mimic_dense", tmp_path / "run", f"cache.path={cache}", *settings))
        assert not (tmp_path / "run").exists()
        return str(caught.value)

    said = refused(of_images, "loss.align.feature_weight=1")
    assert said.startswith("loss.align.feature_weight: cache ")
    assert "capture with capture.hidden_positions=recorded" in said
    everything = write_cache(tmp_path / "all", world.chats, world.teacher, "capture.positions=all")
    assert "loss.align.relation_weight: " in refused(everything, "loss.align.relation_weight=1")
    logits = ("loss.align.relation_weight=1", "loss.align.relation_of=logits")
    said = refused(of_images, *logits, f"loss.align.teacher_lm_head={world.student}")
    assert said.startswith("loss.align.teacher_lm_head: ")
    assert "differs from that of the teacher of cache" in said
    assert "holds no lm_head.weight" in refused(of_images, *logits, f"loss.align.teacher_lm_head={tmp_path}")
    reference = write_cache(tmp_path / "reference", world.chats, world.teacher, *REFERENCE)
    said = refused(reference, "loss.align.visual_kl_weight=1", "loss.positions=response")
    assert "no distributions: capture with a capture.preset other than reference" in said


def test_a_cache_of_image_states_is_enough_for_relations(world: World, of_images: Path, tmp_path: Path) -> None:
    settings = ("loss.align.relation_weight=1", "loss.align.visual_kl_weight=1", "loss.positions=response")
    assert train(world.config("mimic_dense", tmp_path / "run", *settings, f"cache.path={of_images}")).finished


def test_states_that_do_not_fit_the_batch_are_named(
    world: World, of_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As merging caches might leave them: some of another size, or missing at some positions."""
    config = world.config("mimic_dense", tmp_path / "run", "loss.align.relation_weight=1", f"cache.path={of_images}")
    monkeypatch.setattr(alignment, "hidden_size", lambda cache: 47)
    with pytest.raises(CacheError, match=r"samples tiny-\d+.*: \d+ hidden states of size 48, expected \d+ of size 47"):
        train(config)
    monkeypatch.setattr(alignment, "hidden_size", lambda cache: 48)
    wanted = WantedStates(48, answers=True, image_token_id=399)
    monkeypatch.setattr(alignment, "WantedStates", lambda *_, **__: wanted)
    with pytest.raises(CacheError, match=r": (\d+) hidden states of size 48, expected (?!\1 )\d+ of size 48: capture"):
        train(config)


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_is_read_by_itself(world: World, tmp_path: Path, tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tied or not, from any number of files, in pieces; rows beyond the cache's ids are left out."""
    teacher = write_tiny_llava(tmp_path / "teacher", hidden=48, seed=3, head_rows=416, tied=tied)
    settings = ("capture.hidden=int8", "capture.preset=compact")
    cache = open_cache(write_cache(tmp_path / "cache", world.chats, teacher, *settings))
    monkeypatch.setattr(alignment, "_ROWS_AT_ONCE", 150)
    lm_head_VD = lm_head_of(load_llava(teacher)).weight_VD[:400].detach()
    torch.testing.assert_close(teacher_metric(teacher, cache, 48), lm_head_VD.T @ lm_head_VD, rtol=1e-5, atol=1e-2)
    with pytest.raises(ConfigError, match="is 48 wide, the cache's hidden states are 40"):
        teacher_metric(teacher, cache, 40)


def test_a_head_that_cannot_be_read_is_named(of_images: Path, world: World, tmp_path: Path) -> None:
    cache: TeacherCache = open_cache(of_images)
    folder = tmp_path / "teacher"
    shutil.copytree(world.teacher, folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"cannot be read: .*: copy it again"):
        teacher_metric(folder, cache, 48)
    save_file({"lm_head.weight": torch.zeros(400, 48)}, folder / "model.safetensors")
    with pytest.raises(ConfigError, match="differs from that of the teacher of cache"):
        teacher_metric(folder, cache, 48)


def test_relations_of_logits_that_are_no_linear_map_are_refused(world: World, of_images: Path, tmp_path: Path) -> None:
    """A softcap or a bias of the teacher's LM head, or of the student's."""
    settings = ("capture.hidden=int8", "capture.preset=compact", "template=chatml")
    for name, kind in (("capped", "gemma2"), ("biased", "phi")):
        teacher = write_tiny_causal_lm(tmp_path / name, kind)
        write_set([Sample("a", (Turn("user", "b"), Turn("assistant", "c")), (), ())], tmp_path / f"{name}-set")
        cache = open_cache(write_cache(tmp_path / f"{name}-cache", tmp_path / f"{name}-set", teacher, *settings))
        with pytest.raises(ConfigError, match=rf"loss.align.relation_of: the LM head of {teacher} has a bias or a"):
            teacher_metric(teacher, cache, 64)
    logits = ("loss.align.relation_weight=1", "loss.align.relation_of=logits")
    config = world.config("mimic_dense", tmp_path / "run", *logits, f"loss.align.teacher_lm_head={world.teacher}")
    encoder = sequence_encoder(world.student, load_tokenizer(world.student), get_template("qwen"), 512)
    for head in (LmHead(torch.zeros(400, 8), torch.zeros(400)), LmHead(torch.zeros(400, 8), softcap=5.0)):
        with pytest.raises(ConfigError, match=r"relation_of: the student's LM head has a bias or a softcap"):
            prepare_alignment(
                config.loss.align,
                open_cache(of_images),
                student_head=head,
                vocab_size=400,
                encoder=encoder,
                seed=0,
                device=torch.device("cpu"),
            )


def test_a_projection_follows_from_the_seed() -> None:
    before = torch.get_rng_state()
    one, same, other = (make_projection(8, 6, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.inner.weight, same.inner.weight)
    assert not torch.equal(one.inner.weight, other.inner.weight)
    assert teacher_states.TeacherStates(torch.arange(2), torch.zeros(2, 3)).to("cpu").states_MT.shape == (2, 3)
