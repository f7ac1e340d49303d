"""Where images are in a prompt, and prompts that are not ours; all of it without vLLM."""

from __future__ import annotations

import numpy as np
import pytest

from llavamod_offline.errors import ModelError
from llavamod_offline.vllm.inputs import check_prompt, placeholders

IMAGE = 9


@pytest.mark.parametrize(
    ("ids", "counts", "expected"),
    [
        ([1, 9, 9, 9, 2], [3], [(1, 3)]),
        ([9, 9, 1, 9, 2], [2, 1], [(0, 2), (3, 1)]),
        ([9, 9, 9, 1], [1, 2], [(0, 1), (1, 2)]),  # adjacent images without a token between them
        ([1, 2], [], []),
    ],
)
def test_pictures_stand_at_their_tokens(ids: list[int], counts: list[int], expected: list[tuple[int, int]]) -> None:
    assert placeholders(np.array(ids), counts, IMAGE, name="k") == expected


@pytest.mark.parametrize(
    ("ids", "counts"),
    [
        ([1, 9, 9, 2], [3]),  # too few
        ([1, 9, 9, 9, 9, 2], [3]),  # too many
        ([9, 1, 9, 9], [2, 1]),  # an image's tokens are not contiguous
        ([1, 2], [2]),
        ([1, 9, 2], [1, 1]),
        ([1, 9, 2], []),
    ],
)
def test_other_tokens_than_the_pictures_take_are_refused(ids: list[int], counts: list[int]) -> None:
    with pytest.raises(ModelError, match=r"sample 'k': its \d image tokens do not match"):
        placeholders(np.array(ids), counts, IMAGE, name="k")


def test_a_model_without_image_tokens_takes_no_pictures() -> None:
    assert placeholders(np.array([1, 2]), [], None, name="k") == []
    with pytest.raises(ModelError, match="image tokens do not match"):
        placeholders(np.array([1, 2]), [1], None, name="k")


def test_a_prompt_that_is_not_ours_is_refused_with_the_first_difference() -> None:
    check_prompt([1, 9, 9, 2], np.array([1, 9, 9, 2]), name="k")
    with pytest.raises(ModelError, match="ran a prompt of 3 tokens, ours has 4, and they first differ at 2"):
        check_prompt([1, 9, 2], np.array([1, 9, 9, 2]), name="k")
    with pytest.raises(ModelError, match="of 5 tokens, ours has 4, and they first differ at 4"):
        check_prompt([1, 9, 9, 2, 3], np.array([1, 9, 9, 2]), name="k")
