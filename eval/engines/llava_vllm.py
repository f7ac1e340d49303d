"""Answering with a LLaVA checkpoint in vLLM: prompts, images and greedy decoding as in `llava_hf`.

Shape suffixes: T tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.engines.llava_hf import DTYPES, pick_dtype, settings_of
from eval.engines.prompts import prompt_ids, read_answer
from eval.engines.protocol import Answer
from eval.example import Example
from llavamod_offline.data.encode.chat_template import choose_template
from llavamod_offline.data.images import AUTO_ASPECT, ImagePreprocessor
from llavamod_offline.models.checkpoint import load_config, load_tokenizer, sequence_encoder
from llavamod_offline.models.device import pick_device
from llavamod_offline.models.export import never_answers
from llavamod_offline.vllm import plugin
from llavamod_offline.vllm.inputs import check_prompt, engine_input
from llavamod_offline.vllm.session import Session, import_vllm
from llavamod_offline.vllm.settings import VllmSettings


@dataclass(frozen=True)
class _ExampleImage:
    """See `llavamod_offline.vllm.inputs.Pixels`."""

    inputs: Mapping[str, NDArray[np.generic]]
    tokens: int


class LlavaVllmEngine:
    """A LLaVA folder in vLLM, with this project's tokenization and image handling.

    Errors: `ModelError` for the folder, `ConfigError` for the settings or if vLLM is not installed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        template: str = "auto",
        image_aspect: str = AUTO_ASPECT,
        dtype: str = "auto",
        device: str = "auto",
        settings: VllmSettings | None = None,
    ) -> None:
        self.version = str(import_vllm().__version__)
        where = pick_device(device)
        self.dtype = pick_dtype(dtype, where)
        self.folder = folder
        config = load_config(folder)
        limit = int(config.text_config.max_position_embeddings)
        tokenizer = load_tokenizer(folder)
        self.encoder = sequence_encoder(config, tokenizer, choose_template(template, lambda: tokenizer), limit)
        self.images = ImagePreprocessor.from_checkpoint(folder, image_aspect)
        self._suppressed = never_answers(config, tokenizer)
        self.session = Session(
            folder,
            settings or VllmSettings(),
            prefix=plugin.PREFIX,
            register=plugin.register,
            dtype=self.dtype,
            device=where.type,
            max_length=limit,
            runner="generate",
        )

    def describe(self) -> dict[str, Any]:
        """The settings that determine the answers; batch size and device do not."""
        engine = {"engine": "vllm", "vllm": self.version}
        return settings_of(self.folder, engine, self.encoder.template.name, self.images.aspect, self.dtype)

    def answer(self, examples: Sequence[Example[Any]], max_new_tokens: int) -> list[Answer]:
        """Answer a batch of questions. Errors: `EvalError` for a prompt too long to leave space for an answer."""
        prompts = [np.asarray(prompt_ids(self.encoder, example, max_new_tokens), np.int64) for example in examples]
        answers: dict[int, Answer] = {}
        for number, output in self.session.run(self._requests(examples, prompts, max_new_tokens)):
            check_prompt(output.prompt_token_ids, prompts[number], name=examples[number].id)
            answers[number] = read_answer(self.encoder, output.outputs[0].token_ids)
        return [answers[number] for number in range(len(examples))]

    def _requests(
        self, examples: Sequence[Example[Any]], prompts: Sequence[NDArray[np.int64]], max_new_tokens: int
    ) -> Iterator[tuple[int, Any, Any]]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.session.forget()
        for number, (example, input_ids_T) in enumerate(zip(examples, prompts, strict=True)):
            parameters = SamplingParams(
                temperature=0.0,
                max_tokens=max_new_tokens,
                stop_token_ids=[self.encoder.end_id],
                ignore_eos=True,  # only the template's end token ends an answer
                logit_bias=dict.fromkeys(self._suppressed, float("-inf")) or None,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            prompt = engine_input(
                input_ids_T,
                self._images(example),
                image_token_id=self.encoder.image_token_id,
                name=example.id,
                salt=str(number),
                dtype=DTYPES[self.dtype],
            )
            yield number, prompt, parameters

    def _images(self, example: Example[Any]) -> list[_ExampleImage]:
        if example.source is None:
            return []
        pixels_3HW = self.images.pixels(example.source.read(), name=example.source.name)
        return [_ExampleImage({"pixel_values": pixels_3HW}, self.encoder.image_tokens)]
