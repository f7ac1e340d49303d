"""A teacher writing answers in vLLM: with its own scheduler and sampling; prompts about the same images share prefixes.

Greedy answers equal those of the Hugging Face writer, except where rounding decides. Sampled ones depend on the seed,
the sample's key, the turn and the copy, but differ from that writer's, and batches may change them by rounding.

Shape suffixes: T tokens of a prompt.
"""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llavamod_offline.families import Family
from llavamod_offline.vllm import plugin
from llavamod_offline.vllm.feeds import Feed, feed_of
from llavamod_offline.vllm.inputs import check_prompt
from llavamod_offline.vllm.session import Session
from teacher_cache.engines.vllm.engine import open_session
from teacher_cache.format.manifest import sha256_bytes
from teacher_cache.generate.decode_loop import Decoding, Prompt, Written, first_stop
from teacher_cache.images.pool import ImagePool

if TYPE_CHECKING:
    from teacher_cache.capture_setup import CaptureSetup

_BATCHES = 4  # vLLM's own batches per call


@dataclass(frozen=True)
class VllmWriter:
    """vLLM on a checkpoint, for text; `batch_size` prompts are submitted at once."""

    session: Session
    feed: Feed
    teacher: Family
    vocab_size: int
    batch_size: int
    image_pool: ImagePool

    def write(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[Written]:
        """Answer prompts, in order. Errors: `ModelError` with vLLM's reason, or naming a prompt that it changed."""
        found: dict[int, Written] = {}
        for number, output in self.session.run(self._requests(prompts, decoding)):
            prompt = prompts[number]
            check_prompt(output.prompt_token_ids, prompt.input_ids_T, name=prompt.key)
            found[number] = self._written(output.outputs[0], decoding)
        return [found[number] for number in range(len(prompts))]

    def _requests(self, prompts: Sequence[Prompt], decoding: Decoding) -> Iterator[tuple[int, Any, Any]]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        for number, prompt in enumerate(prompts):
            parameters = SamplingParams(
                temperature=decoding.temperature,
                top_p=decoding.top_p,
                seed=request_seed(decoding.seed, prompt.key, prompt.stream) if decoding.temperature else None,
                max_tokens=min(prompt.room, decoding.max_new_tokens),
                stop_token_ids=[self.teacher.encoder.end_id],
                ignore_eos=True,  # only the template's end token ends an answer
                logit_bias=dict.fromkeys(self._never(), -math.inf) or None,
                logprobs=0,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            salt = images_hash(prompt.encoded_images)
            inputs = self.feed.prompt(prompt.input_ids_T, prompt.images, name=prompt.key, salt=salt)
            yield number, inputs, parameters

    def _never(self) -> list[int]:
        """Ids that no answer may hold: the image token, and rows of the LM head beyond the vocabulary."""
        image = [] if self.teacher.image_token_id is None else [self.teacher.image_token_id]
        return [*image, *range(self.vocab_size, self.teacher.head_rows)]

    def _written(self, output: Any, decoding: Decoding) -> Written:
        ids = [int(number) for number in output.token_ids]
        log_probs = tuple(float(own[number].logprob) for number, own in zip(ids, output.logprobs, strict=True))
        ended = bool(ids) and ids[-1] == self.teacher.encoder.end_id
        ids = ids[:-1] if ended else ids
        tokenizer = self.teacher.encoder.tokenizer
        if first_stop(tokenizer, ids, decoding.stop) is None:
            return Written(tuple(ids), ended, all(map(math.isfinite, log_probs)), log_probs, None)
        # vLLM continued: what follows the token that completes such a text is not part of the answer.
        length = bisect_left(
            range(len(ids)), True, key=lambda n: first_stop(tokenizer, ids[:n], decoding.stop) is not None
        )
        stopped = first_stop(tokenizer, ids[:length], decoding.stop)
        kept = log_probs[:length]
        return Written(tuple(ids[:length]), True, all(map(math.isfinite, kept)), kept, stopped)

    def close(self) -> None:
        """Release the memory, for instance for a capture that follows."""
        self.session.close()


def request_seed(seed: int, key: str, stream: str) -> int:
    """The seed of one answer's random numbers, below 2⁶³."""
    digest = hashlib.blake2b(f"{seed}\0{key}\0{stream}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def images_hash(images: Sequence[bytes]) -> str:
    """What identifies encoded images to the prefix cache."""
    return sha256_bytes("".join(map(sha256_bytes, images)).encode())


def start_writer(setup: CaptureSetup) -> VllmWriter:
    """Start vLLM on the model. Errors: as `engine.start_vllm`."""
    session = open_session(
        setup,
        plugin,
        runner="generate",
        logprobs_mode="processed_logprobs",  # after temperature and top_p
    )
    feed = feed_of(setup.teacher, session.engine, setup.dtype)
    return VllmWriter(
        session,
        feed,
        setup.teacher,
        vocab_size=setup.codec.vocab_size,
        batch_size=_BATCHES * setup.vllm.max_num_seqs,
        image_pool=setup.image_pool(feed.own_images),
    )
