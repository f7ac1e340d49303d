"""The Hugging Face engine: a checkpoint in this process, run over length-bucketed batches.

Shape suffixes: S sequences of a batch in B rows, U tokens of the longest sequence, T of the longest row, N recorded
positions of the batch, D hidden size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llavamod_offline.data.encode.tokenize import Ids, Positions, TokenizedSequence
from llavamod_offline.errors import DataError
from llavamod_offline.families.batch import image_mismatch
from llavamod_offline.families.folder import joins
from llavamod_offline.families.protocol import Family, FeatureFamily, SampleImage
from llavamod_offline.families.run import whole_hidden_states
from llavamod_offline.models.lm_head import lm_head_of
from teacher_cache.engines.batch_limit import BatchLimit
from teacher_cache.engines.lm_head import Float32Head
from teacher_cache.engines.make_records import begin_sequence_records
from teacher_cache.engines.packing import Layout, lay_out
from teacher_cache.engines.protocol import (
    Outcome,
    Request,
    beyond_vocabulary,
    longest_first,
    recorded,
    rows_with_states,
)
from teacher_cache.engines.tail_samples import sequence_uniforms
from teacher_cache.engines.transfer import HostCopy, to_device
from teacher_cache.format.hidden_states import HiddenStates
from teacher_cache.format.record import RecordSettings
from teacher_cache.format.rejection import Rejection
from teacher_cache.format.schema import HiddenPositions
from teacher_cache.images.pool import ImagePool, PreparedImages

_BATCHES_AHEAD = 3

# Work queued on the device; calling it waits for the results.
Begun = Callable[[], list[Outcome]]


@dataclass(frozen=True)
class _BatchItem:
    """One sequence of a batch, and its images, which may still be in preparation."""

    request: Request
    sequence: TokenizedSequence
    images: PreparedImages


@dataclass(eq=False)
class HfCaptureEngine:
    """Runs `model` (in evaluation mode, on its device and in its dtype) and makes records of its positions.

    `positions`: those that predict supervised tokens, or all. `hidden_positions`: which of them also give the last
    hidden state. The LM head runs in float32 on the recorded rows only. Errors of `capture`: `ModelError` if a single
    sequence does not fit into memory.
    """

    model: Any
    teacher: Family
    settings: RecordSettings
    _: KW_ONLY
    vocab_size: int
    seed: int
    batch_size: int
    images: ImagePool | None = None
    positions: Positions = "response"
    hidden_positions: HiddenPositions | None = None
    shared_prompts: bool = False

    def __post_init__(self) -> None:
        self.lm_head = Float32Head(lm_head_of(self.model), self.vocab_size)
        if not joins(self.teacher):
            self.batch_size = 1
        self.image_pool = self.images or ImagePool(self.teacher.images)
        self._limit = BatchLimit(self.batch_size, "sequences")

    def capture(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        """Capture one data shard; see `protocol.CaptureEngine`. Images are prepared a few batches ahead."""
        ahead: deque[list[_BatchItem]] = deque()
        with self.image_pool.ahead() as prepare:
            row, images = -1, None
            begun: list[Begun] = []
            for batch in length_batches(requests, self.batch_size):
                items = []
                for request, sequence in batch:
                    if images is None or request.row != row:  # a sample's roles are neighbours and share its images
                        row, images = request.row, prepare(request.sample)
                    items.append(_BatchItem(request, sequence, images))
                ahead.append(items)
                if len(ahead) > _BATCHES_AHEAD:
                    # Give the device this batch before waiting for the last one's records.
                    begun, waiting = list(self._begin_batch(ahead.popleft())), begun
                    yield from _finished(waiting)
            while ahead:
                begun, waiting = list(self._begin_batch(ahead.popleft())), begun
                yield from _finished(waiting)
            yield from _finished(begun)

    def _begin_batch(self, items: list[_BatchItem]) -> Iterator[Begun]:
        ready: list[tuple[_BatchItem, list[SampleImage]]] = []
        for item in items:
            problem = self._problem(item)
            if problem:
                rejection = Rejection(item.sequence.key, item.sequence.role, problem)
                yield partial(list[Outcome], [rejection])
            else:
                ready.append((item, item.images.result()))
        yield from self._limit.run(ready, self._run, _too_large)

    def _problem(self, item: _BatchItem) -> str | None:
        try:
            images = item.images.result()
        except DataError as error:
            return str(error)
        mismatch = image_mismatch(item.sequence.input_ids_T, images, self.teacher.image_token_id)
        return mismatch or beyond_vocabulary(item.sequence, self.vocab_size)

    @torch.inference_mode()
    def _run(self, batch: Sequence[tuple[_BatchItem, list[SampleImage]]]) -> list[Begun]:
        sequences = [item.sequence for item, _ in batch]
        rows, targets = zip(*(sequence.rows_and_targets(self.positions) for sequence in sequences), strict=True)
        rows_ND = self.hidden_rows(sequences, rows, [images for _, images in batch])
        finish = begin_sequence_records(
            rows_ND,
            targets,
            [
                sequence_uniforms(self.seed, s.key, s.role, len(rows_N))
                for s, rows_N in zip(sequences, rows, strict=True)
            ],
            self.settings,
            logits_of=self.lm_head.logits,
            vocab_size=self.vocab_size,
        )
        hidden = None if self.hidden_positions is None else HostCopy(rows_ND.float())

        def outcomes() -> list[Outcome]:
            states = self._hidden_states(sequences, rows, hidden)
            return [
                recorded(item.request, item.sequence, *piece, own)
                for (item, _), piece, own in zip(batch, finish(), states, strict=True)
            ]

        return [outcomes]

    def _hidden_states(
        self, sequences: list[TokenizedSequence], rows: Sequence[Ids], hidden: HostCopy | None
    ) -> list[HiddenStates | None]:
        """The states of each sequence at the chosen rows; None if none are wanted."""
        if hidden is None or self.hidden_positions is None:
            return [None for _ in sequences]
        states = np.split(hidden.result().numpy(), np.cumsum([len(rows_N) for rows_N in rows])[:-1])
        found: list[HiddenStates | None] = []
        for sequence, rows_N, states_ND in zip(sequences, rows, states, strict=True):
            chosen_M = rows_with_states(sequence, rows_N, self.hidden_positions, self.teacher.image_token_id)
            found.append(None if chosen_M is None else HiddenStates(chosen_M, states_ND[chosen_M]))
        return found

    def hidden_rows(
        self, sequences: list[TokenizedSequence], rows: Sequence[Ids], images: list[list[SampleImage]]
    ) -> Tensor:
        """Run the model without its LM head: the last hidden states of each sequence's rows, [N, D]."""
        if not isinstance(self.teacher, FeatureFamily):
            hidden_BTD = whole_hidden_states(self.model, self.teacher.model_inputs(sequences, images))
            return self._picked(hidden_BTD, np.arange(len(rows)), rows)
        keys = [s.key if self.shared_prompts else number for number, s in enumerate(sequences)]
        image = self.teacher.image_token_id
        ids = [sequence.input_ids_T for sequence in sequences]
        layout = lay_out(ids, keys, pad=0 if image != 0 else 1, image_token_id=image)
        positions = self._positions(ids, layout, images)
        mine = [image for own, first in zip(images, layout.first_S, strict=True) if first for image in own]
        device = self.model.get_input_embeddings().weight.device
        inputs: dict[str, Any] = {"input_ids": to_device(layout.input_ids_BT, device)}
        if mine:
            ids_BT = inputs.pop("input_ids")
            embedded_BTD = self.model.get_input_embeddings()(ids_BT)
            features = torch.cat(self._features(mine)).to(embedded_BTD)
            inputs["inputs_embeds"] = embedded_BTD.masked_scatter((ids_BT == image)[..., None], features)
        hidden_BTD = self.model.get_decoder()(
            **inputs,
            attention_mask=to_device(layout.mask, device),
            position_ids=None if positions is None else to_device(positions, device),
            use_cache=False,
        ).last_hidden_state
        return self._picked(
            hidden_BTD,
            layout.rows_S,
            [columns[rows_N] for columns, rows_N in zip(layout.columns, rows, strict=True)],
        )

    def _picked(self, hidden_BTD: Tensor, rows_S: NDArray[np.int64], columns: Sequence[Ids]) -> Tensor:
        """The states at the columns of each sequence in its row, [N, D]."""
        which_N = torch.from_numpy(np.repeat(rows_S, [len(one) for one in columns]))
        where_N = torch.from_numpy(np.concatenate(columns))
        device = hidden_BTD.device
        return hidden_BTD[to_device(which_N, device), to_device(where_N, device)].to(self.lm_head.device)

    def _positions(self, ids: list[Ids], layout: Layout, images: list[list[SampleImage]]) -> Tensor | None:
        """The rows' position ids; None to let the decoder count them itself."""
        longest = max(map(len, ids))
        ids_SU = torch.from_numpy(np.stack([np.pad(one, (0, longest - len(one))) for one in ids]))
        mask_SU = (torch.arange(longest) < torch.tensor([len(one) for one in ids])[:, None]).long()
        assert isinstance(self.teacher, FeatureFamily)
        found = self.teacher.position_ids(self.model, ids_SU, mask_SU, [p for own in images for p in own])
        if found is None and layout.shared:
            found = torch.arange(longest).expand(ids_SU.shape)
        return None if found is None else layout.positions(found)

    def _features(self, images: list[SampleImage]) -> list[Tensor]:
        """The features of each image; an image that several roles share runs only once."""
        assert isinstance(self.teacher, FeatureFamily)
        distinct = {id(image): image for image in images}
        features = self.teacher.image_features(self.model, list(distinct.values()))
        found = dict(zip(distinct, features, strict=True))
        return [found[id(image)] for image in images]


def _finished(begun: list[Begun]) -> Iterator[Outcome]:
    for finish in begun:
        yield from finish()


def _too_large(ready: tuple[_BatchItem, list[SampleImage]]) -> str:
    sequence = ready[0].sequence
    return (
        f"sample '{sequence.key}' ({sequence.role}): its {len(sequence.input_ids_T)} tokens do not fit into the "
        "device's memory even alone: lower max_length, or use a larger device"
    )


def length_batches(requests: Sequence[Request], size: int) -> Iterator[list[tuple[Request, TokenizedSequence]]]:
    """Group sequences of similar length, longest first, `size` at a time; the roles of a sample stay neighbours."""
    pairs = [(request, sequence) for request in longest_first(requests) for sequence in request.sequences]
    for start in range(0, len(pairs), size):
        yield pairs[start : start + size]
