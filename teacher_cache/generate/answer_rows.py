"""Answering some rows of a set: samples → prompts → the teacher's tokens → texts, or reasons for rejection.

The prompt of each assistant turn to write is the conversation before it, with the new answers. Answers depend on the
sample, the settings and the weights: random numbers depend on (seed, key, turn, position in the answer), batches on the
rows alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from llavamod_offline.data.encode.tokenize import Ids
from llavamod_offline.data.rows import RowError
from llavamod_offline.data.sample import IMAGE_PLACEHOLDER, Sample
from llavamod_offline.errors import DataError
from llavamod_offline.families.batch import image_mismatch
from teacher_cache.capture.shard import Progress
from teacher_cache.capture_setup import CaptureSetup
from teacher_cache.config import GenerateConfig
from teacher_cache.engines.hf import HfCaptureEngine
from teacher_cache.generate import decode_loop
from teacher_cache.generate.decode_loop import Decoding, Prompt, Written
from teacher_cache.generate.generated_set import AnsweredSample, with_system, with_texts, written_turns
from teacher_cache.images.pool import PreparedImages, begun_ahead

if TYPE_CHECKING:
    from teacher_cache.generate.vllm_writer import VllmWriter

LOG_PROB_DIGITS = 4  # kept of the writer's log-probs, which vary between batches by rounding
_BATCHES_AHEAD = 2


@dataclass
class _Open:
    """An unfinished sample: the indices of the turns to write, the texts so far, or why it is rejected.

    `copy`: which of several answers to the sample's prompt this is.
    """

    sample: Sample
    copy: int
    places: list[int]
    texts: list[str]
    log_probs: list[tuple[float, ...] | None] = field(default_factory=list)
    tokens: int = 0
    problem: RowError | None = None

    @property
    def done(self) -> bool:
        """Whether nothing is left to write."""
        return self.problem is not None or len(self.texts) == len(self.places)

    def result(self) -> AnsweredSample:
        """The outcome of a finished sample."""
        kind, reason = (None, "") if self.problem is None else (self.problem.kind, str(self.problem))
        texts = () if self.problem else tuple(self.texts)
        log_probs = () if self.problem else tuple(self.log_probs)
        return AnsweredSample(self.sample.key, texts, log_probs, self.tokens, kind, reason, self.copy)


class Answerer:
    """Answers rows of a set with an engine's model; reports finished samples and written tokens to `progress`.

    `given`: how answers are written.
    """

    def __init__(
        self,
        setup: CaptureSetup,
        engine: HfCaptureEngine | VllmWriter,
        given: GenerateConfig,
        progress: Progress,
    ) -> None:
        self._setup, self._engine, self._given, self._progress = setup, engine, given, progress
        most = max(given.max_new_tokens, *given.max_new_tokens_by_source.values(), 0)
        self._decoding = Decoding(given.temperature, given.top_p, most, given.seed, tuple(given.stop))
        self._encoder = setup.teacher.encoder
        self._limit = min(self._encoder.max_length, setup.teacher.context_length)
        added = self._encoder.tokenizer.added_tokens_decoder
        self._special = {number: str(token) for number, token in added.items() if token.special}

    def answer(self, rows: Sequence[int]) -> list[AnsweredSample]:
        """Answer some rows, in order, each with as many answers as configured.

        Errors: `DataError` if a sample differs from what was packed.
        """
        samples = []
        for row in rows:
            sample = with_system(self._setup.samples.read(row, verify=True), self._given.system)
            places = written_turns(sample, self._given.turns)
            samples += [_Open(sample, copy, places, []) for copy in range(self._given.answers)]
        while unfinished := [item for item in samples if not item.done]:
            self._write_turn(unfinished)
        return [item.result() for item in samples]

    def _write_turn(self, samples: Sequence[_Open]) -> None:
        """Write the next turn of each sample, in batches of prompts of similar length."""
        prompts: list[tuple[_Open, Ids]] = []
        for item in samples:
            try:
                prompts.append((item, self._prompt_ids(item)))
            except DataError as error:
                self._refuse(item, RowError("unanswerable prompt", str(error)))
        prompts.sort(key=lambda pair: -len(pair[1]))
        size = self._engine.batch_size
        batches = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        for batch, images in self._with_images(batches):
            self._write_batch(batch, images)

    def _write_batch(self, batch: list[tuple[_Open, Ids]], images: list[PreparedImages]) -> None:
        ready: list[tuple[_Open, Prompt]] = []
        for (item, ids_T), coming in zip(batch, images, strict=True):
            try:
                own, problem = coming.result(), None
                if isinstance(self._engine, HfCaptureEngine) or self._engine.feed.own_images is None:
                    problem = image_mismatch(ids_T, own, self._setup.teacher.image_token_id)
            except DataError as error:
                problem = str(error)
            if problem:
                self._refuse(item, RowError("unanswerable prompt", problem))
                continue
            stream = f"answer {item.places[len(item.texts)]}" + (f" copy {item.copy}" if item.copy else "")
            room = min(self._limit - len(ids_T), self._given.limit(item.sample.source)[0])
            ready.append((item, Prompt(item.sample.key, stream, ids_T, own, room, coming.sample.images)))
        if not ready:
            return
        written = self._write([prompt for _, prompt in ready])
        for (item, prompt), answer in zip(ready, written, strict=True):
            item.tokens += len(answer.ids)
            self._progress(0, len(answer.ids))
            try:
                self._take(item, prompt, answer)
            except RowError as problem:
                self._refuse(item, problem)
            else:
                self._progress(int(item.done), 0)

    def _write(self, prompts: Sequence[Prompt]) -> list[Written]:
        if isinstance(self._engine, HfCaptureEngine):
            return decode_loop.write_answers(self._engine, prompts, self._decoding)
        return self._engine.write(prompts, self._decoding)

    def _refuse(self, item: _Open, problem: RowError) -> None:
        item.problem = problem
        self._progress(1, 0)

    def _with_images(
        self, batches: Sequence[list[tuple[_Open, Ids]]]
    ) -> Iterator[tuple[list[tuple[_Open, Ids]], list[PreparedImages]]]:
        """Yield each batch with its images, which are prepared a few batches ahead."""
        with self._engine.image_pool.ahead() as prepare:

            def begin(batch: list[tuple[_Open, Ids]]) -> list[PreparedImages]:
                return [prepare(self._cut(item, "-")) for item, _ in batch]

            yield from begun_ahead(batches, begin, ahead=_BATCHES_AHEAD)

    def _prompt_ids(self, item: _Open) -> Ids:
        """The tokens before the next answer. Errors: `DataError` if they leave no room for one."""
        sequence = self._setup.encode(self._cut(item, "-"), "response")
        return sequence.input_ids_T[: _last_answer(sequence.supervised_N)[0]]

    def _cut(self, item: _Open, answer: str) -> Sample:
        """The sample up to the turn that is written next, with `answer` there, and the images so far."""
        sample, place = item.sample, item.places[len(item.texts)]
        turns = with_texts(sample.turns, item.places, [*item.texts, answer])[: place + 1]
        images = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns if turn.role == "user")
        extensions = sample.image_extensions[:images]
        return replace(sample, turns=turns, images=sample.images[:images], image_extensions=extensions)

    def _take(self, item: _Open, prompt: Prompt, answer: Written) -> None:
        """Add an answer to its sample. Errors: `RowError` if a sample cannot hold it."""
        if not answer.finite:
            raise RowError("unusable answer", "the teacher's logits are not finite (NaN or inf)")
        if not answer.ended:
            most, setting = self._given.limit(item.sample.source)
            limits = f"{setting}={most}"
            if prompt.room < most:
                limits = f"the {prompt.room} tokens that max_length and the teacher leave for it"
            raise RowError("unfinished answer", f"the answer did not end within {limits}")
        template, tokenizer = self._encoder.template, self._encoder.tokenizer
        odd = [self._special[number] for number in answer.ids if number in self._special]
        if odd:
            raise RowError(
                "unusable answer",
                f"the answer holds the special token '{odd[0]}'; template '{template.name}' ends with '{template.end}'",
            )
        text = decode_loop.answer_text(tokenizer, answer.ids)
        if answer.stopped is not None:
            text = text[: text.index(answer.stopped)]
        text = text.removeprefix(template.answer_prefix)
        if not text.strip():
            raise RowError("unusable answer", "the answer is empty")
        try:
            read_back = self._read_back(item, text)
        except DataError as error:
            raise RowError("unusable answer", str(error)) from error
        same = answer.stopped is None and read_back == [*answer.ids, self._encoder.end_id]
        if not same and "\ufffd" in text:
            raise RowError(
                "unusable answer", "the answer's tokens do not decode to text: they hold only part of a character"
            )
        item.texts.append(text)
        item.log_probs.append(tuple(round(value, LOG_PROB_DIGITS) for value in answer.log_probs) if same else None)

    def _read_back(self, item: _Open, text: str) -> list[int]:
        """The tokens of an answer in its conversation. Errors: `DataError` if that is too long or invalid."""
        cut = replace(self._cut(item, text), key=f"{item.sample.key}{self._given.suffix(item.copy)}")
        sequence = self._setup.encode(cut, "response")
        ids: list[int] = sequence.input_ids_T[_last_answer(sequence.supervised_N)].tolist()
        return ids


def _last_answer(supervised_N: Ids) -> Ids:
    """The positions of the last turn's supervised tokens: the last run without a gap."""
    gaps = np.flatnonzero(np.diff(supervised_N) > 1)
    return supervised_N[gaps[-1] + 1 :] if len(gaps) else supervised_N
