"""One worker of a generation on Ray: a model in its own process that answers whole shards."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

from llavamod_offline.errors import LlavaModError
from teacher_cache.capture.pipeline import ShardCounts
from teacher_cache.capture.ray_worker import REPORT_SECONDS, WorkerReport, log_into
from teacher_cache.capture_setup import SetupValues, prepare_capture
from teacher_cache.config import GenerateConfig
from teacher_cache.generate.answer_rows import Answerer
from teacher_cache.generate.generated_set import WrittenSet, made_from
from teacher_cache.generate.writers import load_writer


class AnswerWorker:
    """Answers shards of the set that `values` name and keeps the answers for the set `output` itself.

    Has the interface that `RayPool` expects of a worker, like `CaptureWorker`; positions are written tokens.
    """

    def __init__(self, values: SetupValues, output: str, allow: Sequence[str], given: GenerateConfig) -> None:
        self._values, self._output, self._allow, self._given = values, output, allow, given
        self._working = threading.Lock()
        self._samples: dict[str, int] = {}
        self._tokens: dict[str, int] = {}
        self._lines: list[str] = []

    def open(self) -> LlavaModError | None:
        """Load the model, and check that set and settings match the driver's."""
        if hasattr(self, "_engine"):  # only the connection to this worker was lost
            return None
        log_into(self._lines)
        try:
            self._setup = prepare_capture(**self._values)
            about = made_from(self._setup.fingerprint, self._given)
            self._target = WrittenSet(Path(self._output), about, allow=self._allow)
            self._engine = load_writer(self._setup)
        except LlavaModError as error:
            return error
        return None

    def capture(self, name: str) -> ShardCounts | LlavaModError:
        """Answer one shard and keep the answers."""

        def count(samples: int, tokens: int) -> None:
            self._samples[name] += samples
            self._tokens[name] += tokens

        self._samples[name] = self._tokens[name] = 0
        try:
            with self._working:
                answerer = Answerer(self._setup, self._engine, self._given, count)
                answers = answerer.answer(self._setup.samples.rows_of(name))
            self._target.commit(name, answers)
        except LlavaModError as error:
            return error
        finally:
            del self._samples[name], self._tokens[name]
        return ShardCounts(name, len(answers), len(answers), sum(answer.tokens for answer in answers), ())

    def report(self) -> WorkerReport:
        """Wait briefly, then report progress and log lines."""
        time.sleep(REPORT_SECONDS)
        lines, self._lines[:] = self._lines[:], []
        return WorkerReport(dict(self._samples), dict(self._tokens), lines)
