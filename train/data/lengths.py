"""The lengths of a set's sequences in tokens, measured before the first step and kept for the next run.

They depend on the set, roles, tokenizer, template and how images become tokens; a hash of these names the file that
keeps the lengths, in the disk cache's folder (see `disk_cache.py`): int32 [N], 0 where a sample was not measured.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from llavamod_offline.data.sets.sample_set import SampleSet
from llavamod_offline.errors import LlavaModError
from llavamod_offline.families.students.protocol import StudentFamily
from llavamod_offline.progress import ProgressBar
from llavamod_offline.storage import atomic
from llavamod_offline.storage.disk_cache import staging_folder
from train.data.batches import as_it_is, begin_worker
from train.data.join import MISMATCHED
from train.engine.deepspeed_engine import World

logger = logging.getLogger(__name__)

_AT_ONCE = 64
_FEW = 64 * _AT_ONCE  # not worth starting workers


def sequence_lengths(
    samples: SampleSet,
    kept: NDArray[np.bool_],
    roles: Sequence[str],
    family: StudentFamily,
    *,
    limit: int,
    workers: int,
    world: World,
) -> NDArray[np.int64]:
    """Return the token count of each sample's longest role, [N]; 0 where it cannot exceed the `limit`.

    A text has at most one token per byte, so few samples need tokenizing; all do if the tokens of an image depend on
    its size, which also finds the images that the family cannot take. Processes share the work; all must call this.
    Errors: those of reading and encoding a sample.
    """
    file = staging_folder() / f"lengths-{_identity(samples, roles, family)}.npy"
    known_N = _read(file, len(samples))
    wanted = np.flatnonzero(kept & (_most_tokens(samples, roles, family) > limit))
    mine = wanted[world.rank :: world.size]
    lengths_N = np.zeros(len(samples), np.int64)
    lengths_N[mine] = known_N[mine]
    unknown = mine[known_N[mine] == 0]
    if len(unknown):
        logger.info("measuring the lengths of %d of %d samples", len(unknown), len(samples))
        lengths_N[unknown] = _measure(samples, unknown.tolist(), roles, family, workers)
    if world.size > 1:
        lengths_N = world.sum(torch.from_numpy(lengths_N).to(world.device)).cpu().numpy()
    if world.is_main and (lengths_N[wanted] != known_N[wanted]).any():
        _write(file, np.maximum(known_N, lengths_N))
    return lengths_N


def _most_tokens(samples: SampleSet, roles: Sequence[str], family: StudentFamily) -> NDArray[np.int64]:
    """Bound each sample's token count from the index alone."""
    if family.image_tokens is None:
        return np.full(len(samples), np.iinfo(np.int64).max)
    template = family.encoder.template
    around = (*template.system, *template.user_prefix, *template.assistant_prefix)
    around += tuple(segment for part in template.system_turn or () for segment in part)
    wording = sum(len(segment.text.encode()) for segment in around)
    wording += sum(len(text.encode()) for text in (template.answer_prefix, template.end, template.separator))
    once, around_turn = (0, 0) if template.tool_wording is None else template.tool_wording.bytes_around(template)
    texts = pc.struct_field(pc.list_element(samples.index.column("members"), 0), "size").to_numpy()
    turns = samples.index.column("n_turns").to_numpy() + 1
    images = samples.index.column("n_images").to_numpy()
    bounds: NDArray[np.int64] = texts + once + turns * (wording + around_turn) + images * family.image_tokens
    if MISMATCHED in roles:  # its response comes from another sample
        bounds = bounds + texts.max()
    return bounds


def _measure(
    samples: SampleSet, rows: list[int], roles: Sequence[str], family: StudentFamily, workers: int
) -> list[int]:
    settings: dict[str, Any] = {}
    if workers and len(rows) > _FEW:
        settings = {"num_workers": workers, "multiprocessing_context": "fork", "worker_init_fn": begin_worker}
    parts = [rows[start : start + _AT_ONCE] for start in range(0, len(rows), _AT_ONCE)]
    loader: Iterable[list[int] | LlavaModError] = DataLoader(
        _Lengths(samples, tuple(roles), family), batch_sampler=parts, collate_fn=as_it_is, **settings
    )
    found: list[int] = []
    with ProgressBar("lengths", len(rows), "sample") as bar:
        for part in loader:
            if isinstance(part, LlavaModError):
                raise part
            found += part
            bar.advance(len(part))
    return found


@dataclass(frozen=True, eq=False)
class _Lengths(Dataset[Any]):
    """The lengths of several rows. Errors are returned as values: a worker would add its traceback."""

    samples: SampleSet
    roles: tuple[str, ...]
    family: StudentFamily

    def __getitem__(self, row: int) -> int:
        fixed = self.family.image_tokens is not None
        sample = self.samples.read_text(row) if fixed else self.samples.read(row)
        return max(self.family.length(sample, role) for role in self.roles if role in sample.roles)

    def __getitems__(self, rows: list[int]) -> list[int] | LlavaModError:
        try:
            return [self[row] for row in rows]
        except LlavaModError as error:
            return error


def _identity(samples: SampleSet, roles: Sequence[str], family: StudentFamily) -> str:
    from teacher_cache.fingerprint import describe_template, describe_tokenizer
    from teacher_cache.format.manifest import canonical

    encoder = family.encoder
    about: list[Any] = [
        samples.digest,
        list(roles),
        describe_tokenizer(encoder.tokenizer),
        describe_template(encoder.template),
        [encoder.image_token_id, encoder.image_tokens, [list(ids) for ids in encoder.image_frame]],
    ]
    if family.image_tokens is None:
        about.append(family.describe_images())
    return hashlib.sha256(canonical(about)).hexdigest()[:32]


def _read(file: Path, count: int) -> NDArray[np.int64]:
    with suppress(OSError, ValueError, EOFError):
        known_N = np.load(file, allow_pickle=False)
        if known_N.shape == (count,) and known_N.dtype == np.int32:
            return np.asarray(known_N, np.int64)
    return np.zeros(count, np.int64)


def _write(file: Path, lengths_N: NDArray[np.int64]) -> None:
    """Store the lengths for the next run, if the folder can be written."""
    content = io.BytesIO()
    np.save(content, lengths_N.astype(np.int32))
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_file(file, content.getvalue())
