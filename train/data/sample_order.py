"""The order of a run's samples: resolves shuffling windows, source weights and grouping by length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from llavamod_offline.data.order.copies import Weights
from llavamod_offline.data.order.stream import Order
from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import ConfigError

if TYPE_CHECKING:
    from teacher_cache.read.several import Teachers

DEFAULT_WINDOW = 16  # shards shuffled together where the data is remote or too large for memory
_CHARACTERS_PER_TOKEN = 4  # in English text; good enough to compare lengths


@dataclass(frozen=True)
class OrderSettings:
    """What determines the order besides seed, batch size and rows; `weights` by source, 1 for those not named.

    `by_modality`: a batch holds either samples with images or samples without. Samples are grouped by length if
    `image_length` (characters that an image counts as) is set or, by their measured lengths, if `by_tokens` is.
    """

    window: int
    weights: dict[str, float]
    image_length: int | None
    by_modality: bool = False
    by_tokens: bool = False

    def describe(self) -> dict[str, Any]:
        """Return the settings as JSON values, to compare when a run is resumed."""
        described = {"window": self.window, "weights": self.weights, "image_length": self.image_length}
        chosen = {"by_modality": self.by_modality, "by_tokens": self.by_tokens}
        return described | {name: True for name in chosen if chosen[name]}  # as earlier versions describe it


def order_settings(
    samples: SampleSet,
    cache: Teachers | None,
    *,
    window: int | None,
    weights: dict[str, float] | None,
    image_tokens: int | None,
    by_modality: bool = False,
    by_tokens: bool = False,
) -> OrderSettings:
    """Choose `window` and `weights` where they are None; group by length if `image_tokens` (per image) is set, or
    `by_tokens`.

    Errors: `ConfigError` naming a source that the set does not have.
    """
    if window is None:
        local = not samples.is_remote and (cache is None or (cache.fits_in_memory and not cache.is_remote))
        window = 0 if local else DEFAULT_WINDOW
    if weights is None:
        weights = dict(samples.manifest.get("weights") or {})
    sources = samples.manifest["sources"]
    unknown = sorted(weights.keys() - sources.keys())
    if unknown:
        known = ", ".join(f"'{source}'" for source in list(sources)[:8])
        raise ConfigError(f"data.weights: set '{samples.path}' has no source '{unknown[0]}': choose from {known}")
    return OrderSettings(
        window=0 if window >= len(samples.shards) else window,
        weights={source: float(weight) for source, weight in sorted(weights.items()) if weight != 1},
        image_length=None if image_tokens is None else _CHARACTERS_PER_TOKEN * image_tokens,
        by_modality=by_modality,
        by_tokens=by_tokens,
    )


def make_order(
    settings: OrderSettings,
    samples: SampleSet,
    rows: NDArray[np.int64],
    *,
    seed: int,
    size: int,
    measured_N: NDArray[np.int64] | None = None,
) -> Order:
    """Make the order of some rows of a set, in batches of `size`; `measured_N`: the tokens of all its samples.

    Errors: `ConfigError` if all rows have weight 0.
    """
    lengths_N = measured_N[rows] if settings.by_tokens and measured_N is not None else None
    if settings.image_length is not None:
        lengths_N = _numbers(samples, "text_length", rows) + settings.image_length * _numbers(samples, "n_images", rows)
    return Order(
        len(rows),
        seed=seed,
        batch_size=size,
        shards_N=samples.shard_numbers(rows) if settings.window else None,
        window=settings.window,
        weights=_weights(settings.weights, samples, rows),
        lengths_N=lengths_N,
        kinds_N=_numbers(samples, "n_images", rows) > 0 if settings.by_modality else None,
    )


def _weights(weights: dict[str, float], samples: SampleSet, rows: NDArray[np.int64]) -> Weights | None:
    if not weights:
        return None
    sources = samples.index.column("source").dictionary_encode().unify_dictionaries()
    names = sources.chunk(0).dictionary.to_pylist()
    codes = np.concatenate([chunk.indices.to_numpy() for chunk in sources.chunks])
    return Weights(codes[rows], [weights.get(name, 1.0) for name in names])


def _numbers(samples: SampleSet, column: str, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    numbers: NDArray[np.int64] = samples.index.column(column).cast(pa.int64()).to_numpy()[rows]
    return numbers
