"""Our tokens and images as vLLM's processed input, so that it does not tokenize, expand or resize again.

Shape suffixes: T tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from llavamod_offline.errors import ModelError
from llavamod_offline.plural import counted

TOKENS_FIELD = "llavamod_image_tokens"  # accompanies each image into the model, which checks it
_NAMES = {"image_size": "image_sizes"}  # plural, as models expect them
_ON_CPU = frozenset({TOKENS_FIELD, "image_grid_thw", "image_sizes"})  # models read these as numbers


class Pixels(Protocol):
    """One image as model input: its named arrays, and its number of image tokens."""

    @property
    def inputs(self) -> Mapping[str, NDArray[np.generic]]:
        """The arrays that Hugging Face's model takes for this image."""
        ...

    @property
    def tokens(self) -> int:
        """The number of image tokens in a sequence."""
        ...


def engine_input(
    input_ids_T: NDArray[np.int64],
    images: Sequence[Pixels],
    *,
    image_token_id: int | None,
    name: str,
    salt: str,
    dtype: torch.dtype,
) -> Any:
    """A prompt for vLLM's engine. `salt`: prompts share cached prefixes and images only within one salt.

    Errors: `ModelError` naming the prompt if its image tokens do not match its images.
    """
    from vllm.inputs.engine import mm_input, tokens_input
    from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange

    prompt = input_ids_T.tolist()
    if not images:
        return tokens_input(prompt, cache_salt=salt)
    places = placeholders(input_ids_T, [image.tokens for image in images], image_token_id, name=name)
    return mm_input(
        prompt,
        MultiModalKwargsItems({"image": [_item(image, dtype) for image in images]}),
        {"image": [f"{salt}/{number}" for number in range(len(images))]},
        {"image": [PlaceholderRange(offset=offset, length=length) for offset, length in places]},
        cache_salt=salt,
    )


def placeholders(
    input_ids_T: NDArray[np.int64], counts: Sequence[int], image_token_id: int | None, *, name: str
) -> list[tuple[int, int]]:
    """Offset and length of each image's tokens. Errors: `ModelError` unless these are runs of `counts` tokens."""
    found = np.flatnonzero(input_ids_T == (-1 if image_token_id is None else image_token_id))
    starts = np.cumsum([0, *counts])[:-1]
    places = [
        (int(found[start]), int(count)) for start, count in zip(starts, counts, strict=True) if start < len(found)
    ]
    whole = [token for offset, length in places for token in range(offset, offset + length)]
    if len(places) != len(counts) or whole != found.tolist():
        raise ModelError(
            f"sample '{name}': its {len(found)} image tokens do not match its {counted(len(counts), 'image')}, "
            "which need "
            f"{' + '.join(map(str, counts))}: use the engine hf"
        )
    return places


def check_prompt(prompt_token_ids: Sequence[int], input_ids_T: NDArray[np.int64], *, name: str) -> None:
    """Refuse a prompt other than ours. Errors: `ModelError` naming it and the first difference."""
    theirs_T = np.asarray(prompt_token_ids, np.int64)
    if np.array_equal(theirs_T, input_ids_T):
        return
    same = min(len(theirs_T), len(input_ids_T))
    unequal = np.flatnonzero(theirs_T[:same] != input_ids_T[:same])
    where = int(unequal[0]) if len(unequal) else same
    raise ModelError(
        f"sample '{name}': vLLM ran a prompt of {len(theirs_T)} tokens, ours has {len(input_ids_T)}, and they "
        f"first differ at {where}: use the engine hf"
    )


def _item(image: Pixels, dtype: torch.dtype) -> Any:
    """One image's arrays as vLLM keeps them until batching."""
    from vllm.multimodal.inputs import (
        MultiModalBatchedField,
        MultiModalFieldElem,
        MultiModalFlatField,
        MultiModalKwargsItem,
    )

    elements = {}
    arrays: Mapping[str, NDArray[Any]] = {**image.inputs, TOKENS_FIELD: np.array(image.tokens)}
    for own_name, array in arrays.items():
        field = _NAMES.get(own_name, own_name)
        data = torch.from_numpy(np.array(array, order="C"))
        if data.is_floating_point():
            data = data.to(dtype)
        # Patches that a grid describes lie in one long row (Qwen2-VL); anything else is stacked.
        flat = field == "pixel_values" and "image_grid_thw" in arrays
        how = MultiModalFlatField(slices=(), dim=0) if flat else MultiModalBatchedField(keep_on_cpu=field in _ON_CPU)
        elements[field] = MultiModalFieldElem(data=data, field=how)
    return MultiModalKwargsItem(elements)
