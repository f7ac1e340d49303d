"""What a student must share with a cache: the tokenizer, the encoding around answers, each sequence's target ids."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llavamod_offline.data.encode.template import TEMPLATES, Template
from llavamod_offline.data.encode.tokenize import hash_ids
from llavamod_offline.errors import CacheError, ConfigError, TargetError
from teacher_cache.fingerprint import (
    added_tokens,
    check_allowed,
    describe_sequence,
    describe_template,
    describe_tokenizer,
    describe_vocabulary,
    differences,
    is_template,
)
from teacher_cache.format.sequences import CachedSequence, short_hash
from teacher_cache.student.end_of_turn import TokenIdSwap, parse_end_of_turn, teacher_vocabularies
from teacher_cache.student.token_list import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from llavamod_offline.data.encode.tokenize import Ids, SequenceEncoder, TokenizedSequence
    from teacher_cache.read.reader import TeacherCache

_LOG = logging.getLogger(__name__)

_SIDES = ("cache", "student")
_NAMED = 3  # differing tokens that a message names


def check_student(
    fingerprint: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    *,
    allow: Sequence[str] = (),
    end_of_turn: str | None = None,
) -> TokenIdSwap | None:
    """Refuse a student whose tokenizer is not the one that a cache was made with.

    Either may have additional tokens after the other's, such as `<image>`. `end_of_turn` declares the one token that
    may differ (see `end_of_turn.py`); returns the resulting swap of ids, None without one. `allow` overrides fields (or
    sections, such as `tokenizer`) by name, and logs them.
    Errors: `CacheError` listing the differing fields; `ConfigError` for an unknown field or token.
    """
    check_allowed(allow, fingerprint)
    theirs, mine = fingerprint["tokenizer"], describe_tokenizer(tokenizer)
    vocabulary, added, swap = tokenizer.get_vocab(), added_tokens(tokenizer), None
    if end_of_turn is not None:
        vocabulary, added, swap = _resolve(theirs, tokenizer, end_of_turn, allow)
    lines = _vocabulary_differences(theirs, vocabulary, added)
    lines += differences(
        {"tokenizer": {"merges": theirs["merges"]}}, {"tokenizer": {"merges": mine["merges"]}}, names=_SIDES
    )
    _refuse(
        lines,
        allow,
        "use a student with the teacher's tokenizer, declare its end of turn as cache.end_of_turn if only that "
        "differs, align another one in the mimic stages by cache.other_tokenizer=align, or allow the field by name if "
        "you know it is harmless",
    )
    return swap


def check_encoding(
    fingerprint: Mapping[str, Any],
    encoder: SequenceEncoder,
    images: Mapping[str, Any] | None = None,
    *,
    allow: Sequence[str] = (),
    end_of_turn: str | None = None,
) -> None:
    """Refuse a student whose tokens around the answers differ from the teacher's, if those tokens have records.

    `images`: how they become tokens (see `StudentFamily.describe_images`); None: each takes the encoder's image tokens.
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
    images = images or {"tokens": encoder.image_tokens, "token_id": encoder.image_token_id}
    cached = fingerprint["images"]
    tokens = {name: images[name] for name in ("tokens", "token_id")}
    images = images if all(cached[name] == tokens[name] for name in tokens) else tokens  # the rest would follow
    student = {
        "template": describe_template(template),
        "sequence": describe_sequence(encoder),
        "images": images,
    }
    cache = {
        "template": fingerprint["template"],
        "sequence": fingerprint["sequence"],
        "images": {name: cached.get(name) for name in images},
    }
    _refuse(
        differences(cache, student, names=_SIDES),
        allow,
        "it has records of all positions: use the teacher's template, max_length and image tokens, "
        "capture with capture.positions=response, or allow the field by name if you know it is harmless",
    )


def check_answers(
    fingerprint: Mapping[str, Any],
    template: Template,
    *,
    allow: Sequence[str] = (),
    end_of_turn: str | None = None,
) -> None:
    """Refuse a student whose template words answers differently from a cache's, if the latter is known by name.

    With any other, each sequence's ids are compared. Errors: `CacheError` naming both templates.
    """
    cached = fingerprint["template"]
    name = cached["name"]
    theirs = TEMPLATES.get(name) if isinstance(name, str) else None
    if "template" in allow or theirs is None or not is_template(theirs, cached):
        return
    end = template.end if end_of_turn is None else parse_end_of_turn(end_of_turn)[0]
    sides = ((theirs.answer_prefix, theirs.end), (template.answer_prefix, end))
    wordings = [f"'{prefix}ANSWER{last}'" for prefix, last in sides]
    if wordings[0] != wordings[1]:
        ends = f"'{theirs.end}={template.end}'"
        alone = theirs.answer_prefix == template.answer_prefix
        raise CacheError(
            f"the teacher cache does not fit this student: its template '{name}' words answers as {wordings[0]}, the "
            f"student's '{template.name}' as {wordings[1]}: set template={name} to train the student with the "
            f"teacher's, {f'declare its end of turn as cache.end_of_turn={ends}, ' if alone else ''}or capture again "
            f"with template={template.name}"
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
        f"cache has {shown[0]} of {len(theirs)}, the student {shown[1]} of {len(mine)}: use the teacher's template "
        f"({cache.fingerprint['template']['name']}) and "
        f"tokenizer, {'declare its end of turn as cache.end_of_turn, ' if one_token else ''}or capture the cache again"
    )


def _resolve(
    theirs: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, end_of_turn: str, allow: Sequence[str]
) -> tuple[dict[str, int], dict[str, int], TokenIdSwap]:
    """Find the swap of ids that turns a student's vocabulary into the teacher's, or else the best one known."""
    tokens = parse_end_of_turn(end_of_turn)
    size, known = theirs["size"], _listed(theirs)  # a size may be a list in a cache merged with `--allow`
    found = []
    for limit in (None, size) if known is None and isinstance(size, int) else (None,):
        own, special_ids = _known_ids(tokenizer, limit, keep=tokens[1])
        added = set(special_ids)
        if tokens[1] in added and tokens[0] not in own:
            added.add(tokens[0])
        for vocabulary, swap in teacher_vocabularies(own, *tokens):
            special = {token: vocabulary[token] for token in added if token in vocabulary}
            found.append((vocabulary, special, swap))
            missing = known is not None and known.texts[swap.teacher_id : swap.teacher_id + 1] != (tokens[0],)
            if not missing and not _unallowed(_vocabulary_differences(theirs, vocabulary, special), allow):
                return found[-1]
    if known is None:
        return found[0]
    return min(found, key=lambda each: len(known.differing(Tokens.of(*each[:2]))[0]))


def _listed(theirs: Mapping[str, Any]) -> Tokens | None:
    """The teacher's tokens; None in caches of earlier versions, and where merged caches differ in them."""
    packed = theirs.get("tokens")
    return Tokens.unpack(packed) if isinstance(packed, str) else None


def _vocabulary_differences(
    theirs: Mapping[str, Any], vocabulary: Mapping[str, int], added: Mapping[str, int]
) -> list[str]:
    """The differences between a teacher's and a student's tokens; tokens beyond the other's end do not count."""
    known = _listed(theirs)
    if known is None:
        size = theirs["size"]
        if isinstance(size, int):
            vocabulary, added = ({t: n for t, n in side.items() if n < size} for side in (vocabulary, added))
        mine = describe_vocabulary(vocabulary, added)
        return differences({"tokenizer": {name: theirs[name] for name in mine}}, {"tokenizer": mine}, names=_SIDES)
    own = Tokens.of(vocabulary, added)
    tokens, kinds = known.differing(own)
    lines = []
    if kinds:
        shown = [f"id {n} {known.texts[n]!r} (in the {_SIDES[n not in known.added]})" for n in kinds[:_NAMED]]
        lines.append(f"tokenizer.added_tokens: {len(kinds):,} added on one side only: {_first(shown, kinds)}")
    if tokens:
        shown = [f"id {n} is {known.texts[n]!r} in the cache, {own.texts[n]!r} in the student" for n in tokens[:_NAMED]]
        lines.append(f"tokenizer.vocabulary: {len(tokens):,} differing: {_first(shown, tokens)}")
    return lines


def _first(shown: Sequence[str], ids: Sequence[int]) -> str:
    return "; ".join(shown) + ("; …" if len(ids) > len(shown) else "")


def _known_ids(
    tokenizer: PreTrainedTokenizerFast, limit: int | None, keep: str | None = None
) -> tuple[dict[str, int], dict[str, int]]:
    """A tokenizer's tokens, and its added tokens, with ids below `limit`; `keep` is always included."""
    everything, added = tokenizer.get_vocab(), added_tokens(tokenizer)
    if limit is not None:
        everything = {token: number for token, number in everything.items() if number < limit or token == keep}
        added = {token: number for token, number in added.items() if number < limit or token == keep}
    return everything, added


def _unallowed(lines: Sequence[str], allow: Sequence[str]) -> list[str]:
    """The differences whose field, or its section, is not allowed."""
    fields = [line.partition(":")[0] for line in lines]
    return [
        line
        for line, field in zip(lines, fields, strict=True)
        if not any(field == name or field.startswith(f"{name}.") for name in allow)
    ]


def _refuse(lines: Sequence[str], allow: Sequence[str], way_out: str) -> None:
    found = _unallowed(lines, allow)
    if found:
        raise CacheError(f"the teacher cache does not fit this student: {'; '.join(sorted(found))}: {way_out}")
    for line in lines:
        _LOG.warning("allowed: %s", line)
