"""A second run of the teacher over the same answers without what their images show, for visual advantages."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from llavamod_offline.data.encode.tokenize import NO_TARGET, TokenizedSequence
from llavamod_offline.data.images import decode_image
from llavamod_offline.data.sample import IMAGE_PLACEHOLDER, Sample
from llavamod_offline.errors import DataError
from teacher_cache.engines.protocol import CaptureEngine, Outcome, Request
from teacher_cache.format.record import Records, RecordSettings
from teacher_cache.format.rejection import Rejection
from teacher_cache.format.sequences import SequenceRecord
from teacher_cache.visual.advantages import NOT_MEASURED, encode_advantages

_TARGETS_ALONE = RecordSettings(1.0, 1, 0, 1.0, ())


def blank_requests(requests: Sequence[Request], workers: int) -> list[Request]:
    """The requests with images, each image replaced by one of its mean colour and size; the tokens stay.

    Samples whose images cannot be decoded are left out: the first run rejects them.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="blank") as pool:
        blanks = pool.map(_blank, [request.sample for request in requests if request.sample.images])
        shown = [request for request in requests if request.sample.images]
        return [replace(own, sample=blank) for own, blank in zip(shown, blanks, strict=True) if blank is not None]


def drop_images(
    request: Request, encode: Callable[[Sample, str], TokenizedSequence]
) -> tuple[Request, list[Rejection]]:
    """The request without images and their placeholders, and why some of its roles cannot be run that way."""
    turns = tuple(replace(turn, text=_without_places(turn.text)) for turn in request.sample.turns)
    sample = replace(request.sample, turns=turns, images=(), image_extensions=())
    kept, rejected = [], []
    for sequence in request.sequences:
        try:
            bare = encode(sample, sequence.role)
        except DataError as error:
            rejected.append(Rejection(sequence.key, sequence.role, f"without its images: {error}"))
            continue
        if bare.target_hash == sequence.target_hash:
            kept.append(bare)
        else:
            reason = "its answer is tokenized differently without its images: set capture.without_image=blank"
            rejected.append(Rejection(sequence.key, sequence.role, reason))
    return Request(request.row, sample, tuple(kept)), rejected


def targets_alone(engine: CaptureEngine) -> CaptureEngine:
    """The same engine, with records of little more than the log-probs of the actual tokens."""
    other = copy.copy(engine)
    other.settings = _TARGETS_ALONE
    return other


def with_advantages(
    captured: Iterable[SequenceRecord], bare: Iterable[Outcome], with_images: set[str]
) -> tuple[list[SequenceRecord], list[Rejection]]:
    """Give each record the advantages of its tokens over the `bare` run; `with_images`: keys of samples with images.

    What the bare run rejects is rejected.
    """
    outcomes = {(outcome.key, outcome.role): outcome for outcome in bare}
    kept, rejected = [], []
    for record in captured:
        codes_N = np.full(len(record.records), NOT_MEASURED, np.uint8)
        if record.key in with_images:
            other = outcomes.get((record.key, record.role))
            if not isinstance(other, SequenceRecord):
                reason = "not run" if other is None else other.reason
                rejected.append(Rejection(record.key, record.role, f"without its images: {reason}"))
                continue
            gained = _target_log_probs(record.records) - _target_log_probs(other.records)
            codes_N[record.records.target_ids_N != NO_TARGET] = encode_advantages(gained)
        kept.append(replace(record, advantages_N=codes_N))
    return kept, rejected


def _target_log_probs(records: Records) -> NDArray[np.float32]:
    log_probs_M: NDArray[np.float32] = records.target_log_probs_N[records.target_ids_N != NO_TARGET]
    return log_probs_M


def _blank(sample: Sample) -> Sample | None:
    try:
        images = tuple(_mean_colour(image, sample.key) for image in sample.images)
    except DataError:
        return None
    return replace(sample, images=images, image_extensions=("png",) * len(images))


def _mean_colour(encoded: bytes, name: str) -> bytes:
    image = decode_image(encoded, name=name)
    mean = np.rint(np.asarray(image).mean((0, 1), dtype=np.float64)).astype(int)
    buffer = io.BytesIO()
    Image.new("RGB", image.size, tuple(mean.tolist())).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _without_places(text: str) -> str:
    """A turn's text without image placeholders and the line breaks beside them."""
    for place in (f"{IMAGE_PLACEHOLDER}\n", f"\n{IMAGE_PLACEHOLDER}", IMAGE_PLACEHOLDER):
        text = text.replace(place, "")
    return text
