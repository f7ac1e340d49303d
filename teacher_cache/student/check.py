"""What a student must share with a cache: the tokenizer, the encoding around answers, each sequence's target ids."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llavamod_offline.data.encode.tokenize import hash_ids
from llavamod_offline.errors import CacheError, ConfigError, TargetError
from teacher_cache.fingerprint import (
    INFORMATIVE,
    LONGER,
    added_tokens,
    check_allowed,
    describe_template,
    describe_tokenizer,
    describe_vocabulary,
    differences,
)
from teacher_cache.format.sequences import CachedSequence, short_hash
from teacher_cache.student.end_of_turn import TokenIdSwap, parse_end_of_turn, teacher_vocabularies

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from llavamod_offline.data.encode.tokenize import Ids, SequenceEncoder, TokenizedSequence
    from teacher_cache.read.reader import TeacherCache

_LOG = logging.getLogger(__name__)


def check_student(
    fingerprint: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    *,
    allow: Sequence[str] = (),
    end_of_turn: str | None = None,
) -> TokenIdSwap | None:
    """Refuse a student whose tokenizer is not the one that a cache was made with.

    It may have additional tokens after the teacher's, such as `<image>`. `end_of_turn` declares the one token that may
    differ (see `end_of_turn.py`); returns the resulting swap of ids, None without one. `allow` overrides fields (or
    sections, such as `tokenizer`) by name, and logs them.
    Errors: `CacheError` listing the differing fields; `ConfigError` for an unknown field or token.
    """
    check_allowed(allow, fingerprint)
    theirs = {"tokenizer": fingerprint["tokenizer"]}
    mine = {"tokenizer": describe_tokenizer(tokenizer)}
    swap = None
    if end_of_turn is not None:
        vocabulary, swap = _resolve(theirs, tokenizer, end_of_turn, allow)
        mine["tokenizer"].update(vocabulary)
    elif isinstance(size := theirs["tokenizer"]["size"], int) and len(tokenizer) > size:
        mine["tokenizer"].update(describe_vocabulary(*_known_ids(tokenizer, size)))
    _refuse(
        theirs,
        mine,
        allow,
        "use a student with the teacher's tokenizer, declare its end of turn as cache.end_of_turn if only that "
        "differs, or allow the field by name if you know it is harmless",
    )
    return swap


def check_encoding(
    fingerprint: Mapping[str, Any],
    encoder: SequenceEncoder,
    *,
    allow: Sequence[str] = (),
    end_of_turn: str | None = None,
) -> None:
    """Refuse a student whose tokens around the answers differ from the teacher's, if these have records.

    For a cache of response positions only the declared end of turn is checked. Errors: `CacheError` listing the
    differing fields; `ConfigError` if the student's template ends answers with another token than declared.
    """
    template = encoder.template
    if end_of_turn is not None:
        token, mine = parse_end_of_turn(end_of_turn)
        if template.end != mine:
            raise ConfigError(
                f"cache.end_of_turn: '{end_of_turn}': the student's template '{template.name}' ends answers with "
                f"'{template.end}', not with '{mine}': name the teacher's token first, then the student's"
            )
        template = dataclasses.replace(template, end=token, name=str(fingerprint["template"]["name"]))
    if fingerprint["capture"]["positions"] != "all":
        return
    images = {"tokens": encoder.image_tokens, "token_id": encoder.image_token_id}
    student = {
        "template": describe_template(template),
        "sequence": {"max_length": encoder.max_length, "longer": LONGER},
        "images": images,
    }
    cache = {
        "template": fingerprint["template"],
        "sequence": fingerprint["sequence"],
        "images": {name: fingerprint["images"][name] for name in images},
    }
    _refuse(
        cache,
        student,
        allow,
        "it has records of all positions: use the teacher's template, max_length and image tokens, "
        "capture with capture.positions=response, or allow the field by name if you know it is harmless",
    )


def check_sequence(
    cache: TeacherCache,
    sequence: TokenizedSequence,
    swap: TokenIdSwap | None = None,
    record: CachedSequence | None = None,
) -> None:
    """Refuse a student's sequence whose supervised ids differ from those of `record` (None: look it up).

    Errors: `CacheError` if the cache has no such sequence; `TargetError` showing the first difference.
    """
    record = record or cache.sequence(sequence.key, sequence.role)
    length = len(sequence.input_ids_T)
    if cache.positions_kept == "all" and record.n_tokens != length:
        raise TargetError(
            f"sample '{sequence.key}' ({sequence.role}): {length} tokens, but {record.n_tokens} in the cache: "
            "use the teacher's template and image tokens, or capture with capture.positions=response"
        )
    check_target_ids(cache, sequence.key, sequence.role, sequence.target_ids_N, swap, record)


def check_target_ids(
    cache: TeacherCache,
    key: str,
    role: str,
    target_ids_N: Ids,
    swap: TokenIdSwap | None = None,
    record: CachedSequence | None = None,
) -> None:
    """Refuse supervised ids that differ from those of a sequence's record. Errors: as `check_sequence`."""
    record = record or cache.sequence(key, role)
    teachers_N = target_ids_N if swap is None else swap.ids(target_ids_N)
    if record.target_hash == short_hash(hash_ids(teachers_N)):
        return
    theirs, mine = cache.target_ids(key, role), target_ids_N
    if swap is not None:
        theirs = swap.ids(theirs)
    same = min(len(theirs), len(mine))
    unequal = [index for index in range(same) if theirs[index] != mine[index]]
    where = unequal[0] if unequal else same
    shown = [str(int(side[where])) if where < len(side) else "the end" for side in (theirs, mine)]
    pairs = {(int(theirs[index]), int(mine[index])) for index in unequal}
    one_token = len(pairs) == 1 and len(theirs) == len(mine) and swap is None
    if role == "mismatched" and not one_token:
        raise TargetError(
            f"sample '{key}' (mismatched): its paired response differs from the cache's, since pairs depend on "
            "the whole set: set data.set to the captured set, or capture this one"
        )
    raise TargetError(
        f"sample '{key}' ({role}): its supervised ids differ from the cache's: at position {where} the "
        f"cache has {shown[0]} of {len(theirs)}, the student {shown[1]} of {len(mine)}: use the teacher's template and "
        f"tokenizer, {'declare its end of turn as cache.end_of_turn, ' if one_token else ''}or capture the cache again"
    )


def _resolve(
    theirs: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, end_of_turn: str, allow: Sequence[str]
) -> tuple[dict[str, str], TokenIdSwap]:
    """Find the swap of ids that turns a student's vocabulary into the teacher's; the first one if none does."""
    tokens = parse_end_of_turn(end_of_turn)
    found = []
    size = theirs["tokenizer"]["size"]  # a list in a cache merged with `--allow`
    for limit in (None, size if isinstance(size, int) else None):
        own, special_ids = _known_ids(tokenizer, limit, keep=tokens[1])
        added = set(special_ids)
        if tokens[1] in added and tokens[0] not in own:
            added.add(tokens[0])
        for vocabulary, swap in teacher_vocabularies(own, *tokens):
            special = {token: vocabulary[token] for token in added if token in vocabulary}
            described = describe_vocabulary(vocabulary, special)
            found.append((described, swap))
            fields = {"tokenizer": {name: theirs["tokenizer"][name] for name in described}}
            if not differences(fields, {"tokenizer": described}, allow=allow):
                return found[-1]
    return found[0]


def _known_ids(
    tokenizer: PreTrainedTokenizerFast, limit: int | None, keep: str | None = None
) -> tuple[dict[str, int], dict[str, int]]:
    """A tokenizer's tokens, and its added tokens, with ids below `limit`; `keep` is always included."""
    everything, added = tokenizer.get_vocab(), added_tokens(tokenizer)
    if limit is not None:
        everything = {token: number for token, number in everything.items() if number < limit or token == keep}
        added = {token: number for token, number in added.items() if number < limit or token == keep}
    return everything, added


def _refuse(theirs: Mapping[str, Any], mine: Mapping[str, Any], allow: Sequence[str], way_out: str) -> None:
    names = ("cache", "student")
    found = differences(theirs, mine, allow=[*allow, *INFORMATIVE], names=names)
    if found:
        raise CacheError(f"the teacher cache does not fit this student: {'; '.join(found)}: {way_out}")
    for line in differences(theirs, mine, allow=INFORMATIVE, names=names):
        _LOG.warning("allowed: %s", line)
