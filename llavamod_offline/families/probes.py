"""Compare an opened family with its processor on a few conversations: ids, token types and arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from llavamod_offline.data.encode.tokenize import TokenizedSequence
from llavamod_offline.data.sample import IMAGE_PLACEHOLDER, Sample, Turn
from llavamod_offline.errors import LlavaModError, ModelError, first_line
from llavamod_offline.families import folder as folders
from llavamod_offline.families.protocol import SampleImage
from llavamod_offline.plural import counted

if TYPE_CHECKING:
    from llavamod_offline.families.image_text import ImageTextFamily

_MARK = IMAGE_PLACEHOLDER + "\n"
_QUESTION, _ANSWER = Turn("user", "What is it?"), Turn("assistant", "A red star.")
_PROBES: tuple[tuple[Turn, ...], ...] = (
    (_QUESTION, _ANSWER),
    (Turn("user", f"{_MARK}What is it?"), _ANSWER),
    (Turn("user", f"{_MARK}{_MARK}What differs?"), Turn("assistant", "No 7.")),
    (Turn("user", f"{IMAGE_PLACEHOLDER}{IMAGE_PLACEHOLDER}What differs?"), _ANSWER),
    (Turn("user", f"{_MARK}What is it?"), _ANSWER, Turn("user", f"And here {_MARK}too?"), _ANSWER, _QUESTION, _ANSWER),
)
_TYPES = ("token_type_ids", "mm_token_type_ids")
_SIZES = ((61, 40), (34, 90))


def check_family(family: ImageTextFamily) -> None:
    """Refuse a family whose tokens or arrays differ from its processor's; set the fields that depend on the processor.

    Errors: `ModelError` naming the first difference.
    """
    images = probe_images()
    fields: dict[str, set[bool]] = {}
    for turns in _PROBES:
        shown = images[: sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)]
        where = f"{family.folder}: on a conversation with {counted(len(shown), 'image')} and {len(turns) // 2} answers"
        sample = probe_sample(turns)
        try:
            arrays, written = family.process(shown) if shown else ({}, [])
            if family.sees_prompt_whole and len(turns) > 2:
                continue
            theirs = _processed(family, [turns], [shown])
        except LlavaModError:
            raise
        except Exception as error:
            if not shown:
                family.needs_images = True
                continue
            raise ModelError(f"{where}, its processor fails: {first_line(error)}: {folders.OTHER}") from error
        theirs_T = np.asarray(theirs["input_ids"][0])
        start = family.encoder.start_ids
        if start and tuple(theirs_T[: len(start)]) != start:
            family.encoder.start_ids = ()
        if shown and family.image_token_id not in np.concatenate([image.ids for image in written]):
            raise ModelError(
                f"{family.folder}/config.json: image_token_id is {family.image_token_id}, which its processor does not "
                "write for an image: copy the processor's files that belong to the model"
            )
        sequence = family.encoder.encode(sample, "response", written)
        _check_ids(family, sequence.input_ids_T, theirs_T, where)
        _check_types(family, sequence, theirs, fields, where)
        _check_arrays(arrays, family.arrays(theirs), where)
    family.text_fields = {name: True in possible for name, possible in fields.items()}
    family.batches = _joins(family, images)
    family.process(images[:1])  # all later calls are of this kind, so that threads change no settings


def probe(family: ImageTextFamily) -> tuple[TokenizedSequence, list[SampleImage]]:
    """A conversation with an image, ready for the model."""
    arrays, written = family.process(probe_images()[:1])
    sequence = family.encoder.encode(probe_sample(_PROBES[1]), "response", written)
    return sequence, [SampleImage(arrays, 0)]


def probe_images() -> list[Image.Image]:
    """Two images of different shapes."""
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)) for width, height in _SIZES]


def probe_sample(turns: Sequence[Turn]) -> Sample:
    """A conversation as a sample, without its images' bytes."""
    count = sum(turn.text.count(IMAGE_PLACEHOLDER) for turn in turns)
    return Sample("probe", tuple(turns), (b"",) * count, ("png",) * count)


def text_of(family: ImageTextFamily, turns: Sequence[Turn]) -> str:
    """A conversation as the text that the processor takes."""
    text = "".join(segment.text for segment in family.encoder.template.render(turns))
    return text.replace(IMAGE_PLACEHOLDER, family.written)


def _processed(
    family: ImageTextFamily, conversations: list[tuple[Turn, ...]], images: list[list[Image.Image]]
) -> Mapping[str, Any]:
    texts = [text_of(family, turns) for turns in conversations]
    more: dict[str, Any] = {}
    if family.sees_prompt_whole:  # its processor adds everything but the texts themselves
        texts = [turns[0].text.replace(_MARK, IMAGE_PLACEHOLDER) for turns in conversations]
        more["suffix"] = [turns[1].text for turns in conversations]
    start = family.processor.tokenizer.bos_token
    # As `apply_chat_template` does.
    plain = {"add_special_tokens": False} if start is not None and texts[0].startswith(start) else {}
    shown = [[family.shaped(image) for image in own] for own in images]
    given = {"images": shown if any(shown) else None, "padding": len(texts) > 1, "return_tensors": family.tensors}
    found: Mapping[str, Any] = family.processor(text=texts, **given, **plain, **more)
    return found


def _check_ids(family: ImageTextFamily, ids_T: NDArray[np.int64], theirs_T: NDArray[np.int64], where: str) -> None:
    if np.array_equal(ids_T, theirs_T):
        return
    same = min(len(ids_T), len(theirs_T))
    unequal = np.flatnonzero(ids_T[:same] != theirs_T[:same])
    first = int(unequal[0]) if len(unequal) else same
    tokens = [
        repr(family.encoder.tokenizer.convert_ids_to_tokens(int(one[first]))) if first < len(one) else "the end"
        for one in (theirs_T, ids_T)
    ]
    raise ModelError(
        f"{where}, its processor gives different tokens from the template '{family.encoder.template.name}': token "
        f"{first} is {tokens[0]}, not {tokens[1]}: {folders.OTHER}, or another template"
    )


def _check_types(
    family: ImageTextFamily,
    sequence: TokenizedSequence,
    theirs: Mapping[str, Any],
    fields: dict[str, set[bool]],
    where: str,
) -> None:
    for name in _TYPES:
        if name not in theirs:
            continue
        types_T = np.asarray(theirs[name][0])
        possible = fields.setdefault(name, {True, False})
        possible -= {
            kind for kind in possible if not np.array_equal(family.token_types(sequence, marked=kind), types_T)
        }
        if not possible:
            raise ModelError(f"{where}, its processor's {name} follow no rule known here: {folders.OTHER}")


def _check_arrays(ours: Mapping[str, NDArray[Any]], theirs: Mapping[str, NDArray[Any]], where: str) -> None:
    for name in dict.fromkeys([*theirs, *ours]):
        if name not in ours or name not in theirs or not np.array_equal(ours[name], theirs[name]):
            raise ModelError(f"{where}, its processor's {name} depend on the text: {folders.OTHER}")


def _joins(family: ImageTextFamily, images: list[Image.Image]) -> bool:
    """Whether the arrays of several samples are each sample's, concatenated and padded with zeros."""
    own = [images[:1], images[::-1]]
    try:
        theirs = family.arrays(_processed(family, list(_PROBES[1:3]), own))
        ours = family.joined([family.process(shown)[0] for shown in own])
    except Exception:  # a processor may raise anything
        return False
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
