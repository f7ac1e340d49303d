"""Answering in vLLM: prompts, images and greedy decoding as in `hf`.

Shape suffixes: T tokens of a prompt.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.engines.hf import DTYPES, pick_dtype, settings_of
from eval.engines.prompts import asked_sample, never_answers, prompt_sequence, read_answer
from eval.engines.protocol import Answer
from eval.example import Example
from llavamod_offline.data.images import AUTO_ASPECT
from llavamod_offline.data.sample import Sample
from llavamod_offline.families import open_family
from llavamod_offline.models.device import pick_device
from llavamod_offline.vllm import plugin
from llavamod_offline.vllm.families import check_family
from llavamod_offline.vllm.feeds import feed_of
from llavamod_offline.vllm.inputs import check_prompt
from llavamod_offline.vllm.session import Session, import_vllm
from llavamod_offline.vllm.settings import VllmSettings


class VllmEngine:
    """A checkpoint folder in vLLM.

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
        self.family = open_family(folder, template, image_aspect=image_aspect, max_length=sys.maxsize)
        check_family(self.family, device=where.type)
        self.encoder = self.family.encoder
        self._suppressed = never_answers(self.family)
        self.session = Session(
            folder,
            settings or VllmSettings(),
            prefix=plugin.PREFIX,
            register=plugin.register,
            dtype=self.dtype,
            device=str(where),
            max_length=self.family.context_length,
            runner="generate",
        )
        self._feed = feed_of(self.family, self.session.engine, DTYPES[self.dtype])

    def describe(self) -> dict[str, Any]:
        """The settings that determine the answers; batch size and device do not."""
        engine = {"engine": "vllm", "vllm": self.version}
        aspect = self.family.describe_images().get("aspect", "")
        return settings_of(self.folder, engine, self.encoder.template.name, aspect, self.dtype)

    def answer(self, examples: Sequence[Example[Any]], max_new_tokens: int) -> list[Answer]:
        """Answer a batch of questions. Errors: `EvalError` for a prompt too long to leave space for an answer."""
        samples = [asked_sample(example) for example in examples]
        prompts = [prompt_sequence(self.family, sample, max_new_tokens).input_ids_T for sample in samples]
        answers: dict[int, Answer] = {}
        for number, output in self.session.run(self._requests(samples, prompts, max_new_tokens)):
            check_prompt(output.prompt_token_ids, prompts[number], name=examples[number].id)
            answers[number] = read_answer(self.encoder, output.outputs[0].token_ids)
        return [answers[number] for number in range(len(examples))]

    def _requests(
        self, samples: Sequence[Sample], prompts: Sequence[NDArray[np.int64]], max_new_tokens: int
    ) -> Iterator[tuple[int, Any, Any]]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        self.session.forget()
        for number, (sample, input_ids_T) in enumerate(zip(samples, prompts, strict=True)):
            parameters = SamplingParams(
                temperature=0.0,
                max_tokens=max_new_tokens,
                stop_token_ids=[self.encoder.end_id],
                ignore_eos=True,  # only the template's end token ends an answer
                logit_bias=dict.fromkeys(self._suppressed, float("-inf")) or None,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            prompt = self._feed.prompt(input_ids_T, self._feed.images(sample), name=sample.key, salt=str(number))
            yield number, prompt, parameters
