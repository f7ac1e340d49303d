"""`positions: all`: every token that is not padding has a record, image tokens included."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from llavamod_offline.data.encode.collate import collate
from llavamod_offline.data.encode.template import get_template
from llavamod_offline.data.encode.tokenize import NO_TARGET
from llavamod_offline.data.images import ImagePreprocessor
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.families.llava.checkpoint import load_llava, sequence_encoder
from llavamod_offline.families.llava.forward import student_hidden_states
from llavamod_offline.models.checkpoint import load_tokenizer
from llavamod_offline.models.lm_head import lm_head_of
from teacher_cache.read.reader import open_cache
from teacher_cache.verify.cache import verify_cache
from tests.teacher_cache.conftest import World


def test_every_position_is_the_models_own_distribution(world: World, tmp_path: Path) -> None:
    """Against a plain forward pass over all tokens; supervised tokens are the only targets."""
    world.run(tmp_path / "c", "capture.preset=exhaustive", "capture.positions=all")
    assert verify_cache(tmp_path / "c").ok
    cache, packed, model = open_cache(tmp_path / "c"), SampleSet.open(world.samples), load_llava(world.teacher).eval()
    encoder = sequence_encoder(world.teacher, load_tokenizer(world.teacher), get_template("qwen"), 2048)
    images = ImagePreprocessor.from_checkpoint(world.teacher)
    assert cache.positions_kept == "all"
    for row in (0, 4, 6):
        sample = packed.read(row)
        sequence = encoder.encode(sample, "response")
        pixels = [images.pixels(image, name=sample.key) for image in sample.images]
        batch = collate([sequence], [pixels], pad_id=0, positions="all")
        with torch.inference_mode():
            hidden_BTD = student_hidden_states(
                model, batch.input_ids_BT, batch.attention_mask_BT, batch.pixel_values_ICHW
            )
            dense_TV = (hidden_BTD[0] @ lm_head_of(model).weight_VD.T)[:, : cache.vocab_size].log_softmax(-1)
        targets = cache.targets([(sample.key, "response")])
        assert len(targets) == len(sequence.input_ids_T) == cache.sequence(sample.key, "response").n_tokens
        found_TV = torch.empty_like(dense_TV).scatter_(1, targets.topk_ids_NK, targets.topk_log_probs_NK)
        assert torch.allclose(found_TV, dense_TV, atol=2e-4)
        assert torch.equal(targets.target_ids_N, batch.target_ids_N)
        assert int((targets.target_ids_N != NO_TARGET).sum()) == len(sequence.supervised_N)
        assert np.array_equal(cache.target_ids(sample.key, "response"), sequence.target_ids_N)
        supervised = targets.target_ids_N != NO_TARGET
        about = cache.sequence(sample.key, "response")
        assert abs(float(targets.target_log_probs_N[supervised].double().sum()) - about.sum_log_prob) < 1e-4


def test_the_answers_records_are_those_of_response_positions(world: World, tmp_path: Path) -> None:
    """If both kinds of cache have a position, its distribution is the same."""
    for positions in ("all", "response"):
        world.run(tmp_path / positions, "capture.preset=exhaustive", f"capture.positions={positions}")
    whole, part = (open_cache(tmp_path / positions) for positions in ("all", "response"))
    for key in sorted(part.keys("response"))[:6]:
        all_records, records = (cache.records([(key, "response")]) for cache in (whole, part))
        supervised = all_records.target_ids_N != NO_TARGET
        assert np.array_equal(all_records.target_ids_N[supervised], records.target_ids_N)
        assert np.allclose(all_records.target_log_probs_N[supervised], records.target_log_probs_N, atol=1e-5)
        assert np.allclose(all_records.entropy_N[supervised], records.entropy_N, atol=1e-4)
