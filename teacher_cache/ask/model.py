"""One question to one checkpoint, student or teacher: prompt, images and greedy decoding as in `eval-student`.

Shape suffixes: T tokens of the prompt, V ids of the vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llavamod_offline.data.encode.tokenize import Ids, TokenizedSequence
from llavamod_offline.data.images import decode_image, image_extension
from llavamod_offline.data.sample import IMAGE_PLACEHOLDER, Sample, Turn
from llavamod_offline.errors import ConfigError, DataError, ModelError
from llavamod_offline.families import open_family
from llavamod_offline.families.run import check_model
from llavamod_offline.models.checkpoint import vocabulary_size
from llavamod_offline.models.device import pick_device
from llavamod_offline.models.hub import checkpoint_folder
from teacher_cache.engines.hf import HfCaptureEngine
from teacher_cache.format.record import RecordSettings
from teacher_cache.generate.decode_loop import Prompt, decode

_PART = "\ufffd"  # what an incomplete character decodes to
_ANSWER = "-"  # placeholder for the answer while the prompt is tokenized
_NOTHING = RecordSettings(1.0, 1, 0, 1.0, ())


@dataclass(frozen=True)
class AskedQuestion:
    """A question about images, in the order of `files`."""

    text: str
    files: tuple[Path, ...]
    images: tuple[bytes, ...]

    @classmethod
    def read(cls, text: str, files: Sequence[Path]) -> AskedQuestion:
        """Read the images and check that they decode. Errors: `DataError` naming the file or the text."""
        if not text.strip():
            raise DataError("the question is empty: write it as the last argument")
        if IMAGE_PLACEHOLDER in text:
            raise DataError(f"remove '{IMAGE_PLACEHOLDER}' from the question: the images come before it")
        images = []
        for file in files:
            try:
                images.append(file.read_bytes())
            except OSError as error:
                raise DataError(
                    f"image '{file}': cannot be read: {error.strerror or error}: correct its path"
                ) from error
            decode_image(images[-1], name=str(file))
        return cls(text, tuple(files), tuple(images))

    def sample(self, answer: str) -> Sample:
        """The question with an answer, as a sample."""
        extensions = tuple(
            image_extension(image, name=str(file)) for image, file in zip(self.images, self.files, strict=True)
        )
        turns = (Turn("user", f"{IMAGE_PLACEHOLDER}\n" * len(self.images) + self.text), Turn("assistant", answer))
        return Sample("question", turns, self.images, extensions)


@dataclass(frozen=True)
class AskedAnswer:
    """An answer's text, its length in tokens without the end, and why it ended: "stop", or "length" at the limit."""

    text: str
    n_tokens: int
    finish: str


class AskedModel:
    """A checkpoint by path or Hub id, ready to answer: LLaVA, dense or sparse, or any other that can be a teacher.

    Errors: `ModelError` for the checkpoint, `ConfigError` for device, dtype or template.
    """

    def __init__(self, name: str, *, template: str = "auto", device: str = "auto", dtype: str = "auto") -> None:
        where = pick_device(device)
        self.dtype = ("float32" if where.type == "cpu" else "bfloat16") if dtype == "auto" else dtype
        folder = checkpoint_folder(name)
        self.teacher = open_family(folder, template, image_aspect="auto", max_length=sys.maxsize)
        self.name, self.encoder = name, self.teacher.encoder
        self.vocab_size = vocabulary_size(self.encoder.tokenizer, self.teacher.head_rows)
        model = self.teacher.load(getattr(torch, self.dtype)).to(where)
        check_model(self.teacher, model)
        self._engine = HfCaptureEngine(model, self.teacher, _NOTHING, vocab_size=self.vocab_size, seed=0, batch_size=1)

    def prompt_ids(self, question: AskedQuestion) -> Ids:
        """Tokenize a question up to where the answer begins. Errors: `ModelError` for images if it takes none."""
        if question.images and self.teacher.image_token_id is None:
            raise ModelError(f"{self.name}: a language model without images: ask it without any")
        sequence = self.teacher.encode(question.sample(_ANSWER), "response")
        return sequence.input_ids_T[: sequence.supervised_N[0]]

    def answer(self, question: AskedQuestion, max_new_tokens: int, show: Callable[[str], None]) -> AskedAnswer:
        """Answer greedily; `show` gets the text piece by piece, as soon as its characters are complete.

        Errors: `ConfigError` if prompt and answer do not fit the model; `ModelError` for NaN logits.
        """
        input_ids_T = self.prompt_ids(question)
        limit = self.teacher.context_length
        if len(input_ids_T) + max_new_tokens > limit:
            raise ConfigError(
                f"the question's {len(input_ids_T)} tokens and an answer of up to {max_new_tokens} do not fit the "
                f"model's {limit} positions: lower --max-new-tokens"
            )
        ids: list[int] = []
        shown, finish = "", "length"

        def choose(logits_BV: Tensor, step: int) -> Tensor | None:
            nonlocal shown, finish
            if bool(logits_BV.isnan().any()):
                raise ModelError(f"{self.name}: its logits are not numbers (NaN): try --dtype float32")
            number = int(logits_BV[0].argmax())
            if number == self.encoder.end_id:
                finish = "stop"
                return None
            ids.append(number)
            text = self.text(ids)
            if not text.endswith(_PART) and text.startswith(shown):
                show(text[len(shown) :])
                shown = text
            return torch.tensor([number])

        images = tuple(self.teacher.images(question.sample(_ANSWER)))
        decode(self._engine, [Prompt("question", "", input_ids_T, images, 0)], choose, most=max_new_tokens)
        text = self.text(ids)
        show(text[len(shown) :])
        return AskedAnswer(text, len(ids), finish)

    @torch.inference_mode()
    def log_probs(self, question: AskedQuestion, ids: Sequence[int]) -> Iterator[Tensor]:
        """Yield the log-probs [V] of each token of a given answer, on the CPU, in float32."""
        prompt_T = self.prompt_ids(question)
        rows_N = np.arange(len(prompt_T) - 1, len(prompt_T) + len(ids) - 1)
        whole = TokenizedSequence("question", "", np.concatenate([prompt_T, np.array(ids, np.int64)]), rows_N + 1)
        for row_D in self._engine.hidden_rows([whole], [rows_N], [self.teacher.images(question.sample(_ANSWER))]):
            yield self._engine.lm_head.logits(row_D[None])[0].float().log_softmax(-1).cpu()

    def text(self, ids: Sequence[int]) -> str:
        """Decode an answer's tokens, without special tokens or surrounding white space."""
        return str(self.encoder.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def describe(self) -> dict[str, Any]:
        """What determines the answer."""
        return {"model": self.name, "template": self.encoder.template.name, "dtype": self.dtype, "decoding": "greedy"}
