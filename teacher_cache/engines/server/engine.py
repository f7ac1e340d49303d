"""The engine of a served teacher: requests → a vLLM server → records of the ids that it lists.

Shape suffixes: T tokens of a sequence, N its recorded positions.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import KW_ONLY, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from llavamod_offline.data.encode.tokenize import NO_TARGET, Ids, Positions, TokenizedSequence
from llavamod_offline.data.sample import Sample
from llavamod_offline.errors import DataError, ModelError
from llavamod_offline.families import Family
from llavamod_offline.vllm.families import check_family
from llavamod_offline.vllm.heads import check_same_head
from llavamod_offline.vllm.inputs import check_prompt
from teacher_cache.engines.listed import describe_limits, listed_ids, listed_records
from teacher_cache.engines.protocol import NOT_FINITE, Outcome, Request, beyond_vocabulary, longest_first, recorded
from teacher_cache.engines.server.client import ServerClient, ServerRefusedError
from teacher_cache.engines.server.replies import check_log_probs, listed_rows, prompt_token_ids, read_object
from teacher_cache.engines.server.requests import check_served, image_uris, prompt_with_images, scoring_request
from teacher_cache.engines.server.served import PROBE, ServedModel, ask_served
from teacher_cache.engines.server.settings import ServerSettings
from teacher_cache.format.record import RecordSettings
from teacher_cache.format.rejection import Rejection
from teacher_cache.images.pool import ImagePool, PreparedImages, begun_ahead

if TYPE_CHECKING:
    from teacher_cache.capture_setup import CaptureSetup, SetupValues

_FIRST_PATIENCE = 3.0  # seconds for a server that has not answered yet: its address may be wrong
_SERVED = "as served"
_NOT_FINITE = "Out of range float values"  # vLLM's message for a NaN log-prob, which JSON lacks
_LIMITS = (
    "data types, attention and parallelism are the server's own",
    "only the tokens show that the server has the teacher's weights",
)


@dataclass(frozen=True)
class _ServedItem:
    """One sequence, and its images as data URIs, which may still be in preparation."""

    request: Request
    sequence: TokenizedSequence
    uris: PreparedImages

    @property
    def about(self) -> str:
        return f"sample '{self.sequence.key}' ({self.sequence.role})"


@dataclass(eq=False)
class ServerCaptureEngine:
    """Scores sequences on a server, `server.concurrency` at once; see `hf.HfCaptureEngine` for the other fields.

    Errors of `capture`: `ModelError` if the server stays unreachable, refuses a sequence, runs a prompt other than
    ours, or comes back with another model.
    """

    url: str
    server: ServerSettings
    served: ServedModel
    teacher: Family
    settings: RecordSettings
    _: KW_ONLY
    vocab_size: int
    images: ImagePool | None = None
    positions: Positions = "response"

    def __post_init__(self) -> None:
        self._images = self.images or ImagePool(partial(image_uris, self.teacher))

    def capture(self, requests: Sequence[Request]) -> Iterator[Outcome]:
        """Capture one data shard; see `protocol.CaptureEngine`. Requests are retried until answered."""
        with ServerClient(self.url, self.server) as client, self._images.ahead() as prepare:
            self._check_same(client)
            outages = client.outages
            flying: dict[Future[bytes], _ServedItem] = {}
            for item in self._items(requests, prepare):
                problem = self._problem(item)
                if problem:
                    yield Rejection(item.sequence.key, item.sequence.role, problem)
                    continue
                flying[self._send(client, item)] = item
                while len(flying) >= self.server.concurrency:
                    outages = yield from self._landed(client, flying, outages)
            while flying:
                outages = yield from self._landed(client, flying, outages)

    def _landed(
        self, client: ServerClient, flying: dict[Future[bytes], _ServedItem], outages: int
    ) -> Generator[Outcome, None, int]:
        """Yield the outcomes of the next replies; return the number of outages checked so far."""
        done, _ = wait(flying, return_when=FIRST_COMPLETED)
        items = [flying.pop(reply) for reply in done]
        seen = client.outages
        if seen != outages:  # the server may have been restarted
            self._check_same(client)
        for item, reply in zip(items, done, strict=True):
            try:
                content = reply.result()
            except ServerRefusedError as refusal:
                if _NOT_FINITE not in refusal.reason:
                    raise
                yield Rejection(item.sequence.key, item.sequence.role, NOT_FINITE)
            else:
                yield self._outcome(item, content)
        return seen

    def _check_same(self, client: ServerClient) -> None:
        now = ask_served(client, model=self.served.name, listed=self._listed)
        self.served.check_same(now, url=client.url)

    @property
    def _listed(self) -> int:
        return listed_ids(self.settings.top_k, self.vocab_size)

    def _items(self, requests: Sequence[Request], prepare: Callable[[Sample], PreparedImages]) -> Iterator[_ServedItem]:
        order, window = longest_first(requests), self.server.concurrency
        for request, uris in begun_ahead(order, lambda later: prepare(later.sample), ahead=window):
            for sequence in request.sequences:
                yield _ServedItem(request, sequence, uris)

    def _problem(self, item: _ServedItem) -> str | None:
        try:
            item.uris.result()
        except DataError as error:
            return str(error)
        length = len(self._scored(item.sequence))
        if length >= self.served.longest:  # one more is generated
            return f"{length} tokens, the server takes {self.served.longest - 1}"
        return beyond_vocabulary(item.sequence, self.vocab_size)

    def _scored(self, sequence: TokenizedSequence) -> Ids:
        """The tokens to score: those of the sequence, with one more if the row of its last token is wanted."""
        ids_T = sequence.input_ids_T
        rows_N, _ = sequence.rows_and_targets(self.positions)
        return np.append(ids_T, self._further) if len(rows_N) and rows_N[-1] == len(ids_T) - 1 else ids_T

    @property
    def _further(self) -> int:
        return 0 if self.teacher.image_token_id != 0 else 1

    def _send(self, client: ServerClient, item: _ServedItem) -> Future[bytes]:
        uris, sequence = item.uris.result(), item.sequence
        ids_T = self._scored(sequence)
        if uris:
            short_T = prompt_with_images(self.teacher, item.request, sequence.role)
            ids_T = np.append(short_T, ids_T[len(sequence.input_ids_T) :])
        path, body = scoring_request(ids_T, uris, model=self.served.name, listed=self._listed)
        return client.post(path, body, item.about)

    def _outcome(self, item: _ServedItem, content: bytes) -> Outcome:
        sequence, about = item.sequence, item.about
        ids_T, (rows_N, targets_N) = self._scored(sequence), sequence.rows_and_targets(self.positions)
        reply = read_object(content, about)
        check_prompt(prompt_token_ids(reply, about), ids_T, name=sequence.key)
        rows = listed_rows(reply, ids_T, rows_N, self._listed, about)
        check_log_probs(rows, self.teacher.head_rows, about=about)
        target_log_probs_N = np.where(targets_N == NO_TARGET, 0.0, rows.target_log_probs_N)
        records, finite_N = listed_records(
            rows.ids_NK, rows.log_probs_NK, targets_N, target_log_probs_N, self.settings, vocab_size=self.vocab_size
        )
        return recorded(item.request, sequence, records, finite_N, None)


def load_engine(setup: CaptureSetup) -> ServerCaptureEngine:
    """Connect to the server. Errors: `ModelError` or `ConfigError` if it does not serve this teacher."""
    assert setup.url is not None
    check_served(setup.teacher)
    check_family(setup.teacher, device=_SERVED)
    check_same_head(setup.teacher.folder)
    listed = listed_ids(setup.settings.top_k, setup.codec.vocab_size)
    served = _first_answer(setup.url, setup.server, listed)
    own_T = np.asarray(setup.teacher.encoder.tokenizer(PROBE, add_special_tokens=False)["input_ids"], np.int64)
    if not np.array_equal(own_T, served.probe_ids_T):
        raise ModelError(
            f"{setup.url}: its tokenizer gives other tokens for a text than {setup.teacher.folder}: serve that "
            "checkpoint, or set teacher to the one that is served"
        )
    return ServerCaptureEngine(
        setup.url,
        setup.server,
        served,
        setup.teacher,
        setup.settings,
        vocab_size=setup.codec.vocab_size,
        images=setup.image_pool(partial(image_uris, setup.teacher)),
        positions=setup.positions,
    )


def describe(given: SetupValues) -> dict[str, Any]:
    """The server's version and configuration, and what its records lack; see `registry.describe_engine`."""
    limits = describe_limits(given)
    assert given["url"] is not None
    served = _first_answer(given["url"], given["server"], 1)
    return {
        **dict.fromkeys(("dtype", "head_dtype", "device", "torch"), _SERVED),
        "vllm": served.version,
        "model": served.name,
        "system_fingerprint": served.system_fingerprint,
        "limits": [*limits, *_LIMITS],
    }


def _first_answer(url: str, settings: ServerSettings, listed: int) -> ServedModel:
    patience = min(_FIRST_PATIENCE, settings.patience_seconds)
    with ServerClient(url, settings, patience=patience) as client:
        return ask_served(client, model=settings.model, listed=listed)
