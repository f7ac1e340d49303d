"""Hidden states: written and read back within their error bound, at the chosen positions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from llavamod_offline.data.encode.collate import collate
from llavamod_offline.data.encode.template import get_template
from llavamod_offline.data.images import ImagePreprocessor
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import CacheError, ConfigError
from llavamod_offline.families.llava.checkpoint import load_llava, sequence_encoder
from llavamod_offline.families.llava.forward import student_hidden_states
from llavamod_offline.models.checkpoint import load_tokenizer
from teacher_cache.read.reader import open_cache
from teacher_cache.verify.cache import verify_cache
from tests.teacher_cache.conftest import World


@pytest.mark.parametrize("kind", ["float16", "int8"])
@pytest.mark.parametrize(("positions", "hidden_positions"), [("response", "recorded"), ("all", "image")])
def test_states_are_the_models_own(
    world: World, tmp_path: Path, kind: str, positions: str, hidden_positions: str
) -> None:
    world.run(
        tmp_path / "c",
        f"capture.hidden={kind}",
        f"capture.positions={positions}",
        f"capture.hidden_positions={hidden_positions}",
    )
    assert verify_cache(tmp_path / "c").ok
    cache, packed, model = open_cache(tmp_path / "c"), SampleSet.open(world.samples), load_llava(world.teacher).eval()
    encoder = sequence_encoder(world.teacher, load_tokenizer(world.teacher), get_template("qwen"), 2048)
    images = ImagePreprocessor.from_checkpoint(world.teacher)
    items, wanted, before = [], [], 0
    for row in (0, 3, 6, 20):
        sample = packed.read(row)
        sequence = encoder.encode(sample, "response")
        pixels = [images.pixels(image, name=sample.key) for image in sample.images]
        batch = collate([sequence], [pixels], pad_id=0)
        with torch.inference_mode():
            hidden_BTD = student_hidden_states(
                model, batch.input_ids_BT, batch.attention_mask_BT, batch.pixel_values_ICHW
            )
        rows_N, _ = sequence.rows_and_targets("all" if positions == "all" else "response")
        chosen = np.arange(len(rows_N))
        if hidden_positions == "image":
            chosen = np.flatnonzero(sequence.input_ids_T[rows_N] == encoder.image_token_id)
        items.append((sample.key, "response"))
        wanted.append((before + chosen, hidden_BTD[0].numpy()[rows_N[chosen]]))
        before += len(rows_N)
    states = cache.hidden_states(items)
    assert np.array_equal(states.rows_M, np.concatenate([rows for rows, _ in wanted]))
    truth_MD = np.concatenate([values for _, values in wanted])
    largest_M1 = np.abs(truth_MD).max(1, keepdims=True)
    bound = 2.0**-11 * np.abs(truth_MD) if kind == "float16" else largest_M1 / 127 / 2
    assert np.all(np.abs(states.states_MD - truth_MD) <= bound * 1.01 + 2e-5)
    assert len(cache.targets(items)) == before


def test_without_hidden_states_one_line_says_how_to_get_them(world: World, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"has no hidden states: capture with capture.hidden=float16"):
        open_cache(finished).hidden_states([("tiny-0000", "response")])
    with pytest.raises(ConfigError, match=r"capture.hidden_positions: .*set capture.positions to all"):
        world.run(tmp_path / "c", "capture.hidden=int8", "capture.hidden_positions=image")
