"""The fingerprint: what a cache was made from and with, and what a student must share to read it.

A nested JSON object. Sections: `tokenizer`, `template`, `sequence`, `images`, `teacher`, `engine`, `capture`, `data`.
A cache of response positions enforces `tokenizer` alone, so that a student may word the prompt and see the picture in
its own way; a cache of all positions enforces what decides the other tokens too (`ENCODING_FIELDS`). Each sequence's
supervised ids are compared when it is joined. Everything else informs, and decides whether a run may go on with a
cache, or caches be merged.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavamod_offline.errors import CacheError, ConfigError, ModelError, TargetError
from teacher_cache.end_of_turn import Exchange, parse_end_of_turn, teacher_vocabularies
from teacher_cache.manifest import sha256_file
from teacher_cache.sequences import CachedSequence, short_hash

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from llavamod_offline.data.template import Template
    from llavamod_offline.data.tokenise import Sequence as TokenSequence
    from llavamod_offline.data.tokenise import SequenceEncoder
    from teacher_cache.reader import TeacherCache

STUDENT_FIELDS = ("tokenizer.vocabulary", "tokenizer.merges", "tokenizer.added_tokens")
ENCODING_FIELDS = ("template", "sequence", "images.tokens", "images.token_id")
LONGER = "rejected"  # what becomes of a sequence of more than max_length tokens
# Caches of earlier writers say nothing of these; what is not known is no difference.
_LATER = ("engine.head_dtype", "engine.device")
_INFORMATIVE = ("tokenizer.size", "tokenizer.pipeline")
_SHOWN = 16
_HASHED_AT_ONCE = 4
_LOG = logging.getLogger(__name__)


def describe_tokenizer(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Hash a tokenizer: its vocabulary with ids (added tokens too), its merges in order, its added tokens with ids.

    Errors: `ModelError` if it is no fast tokenizer.
    """
    content = _tokenizer_content(tokenizer)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"].get("merges") or []]
    return {
        "size": len(tokenizer),
        "merges": _hash(merges),
        **_describe_vocabulary(tokenizer.get_vocab(), _added_tokens(content)),
        "pipeline": _hash([content.get(part) for part in ("normalizer", "pre_tokenizer", "post_processor")]),
    }


def describe_template(template: Template) -> dict[str, Any]:
    """Name a template and hash all of its text."""
    return {"name": template.name, "sha256": _hash(dataclasses.asdict(template))}


def describe_weights(folder: Path) -> dict[str, Any]:
    """Identify a checkpoint by the SHA-256 of its configuration and of each safetensors file; paths do not enter."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{folder}: no *.safetensors file: save the checkpoint with save_pretrained first")
    with ThreadPoolExecutor(_HASHED_AT_ONCE) as threads:
        digests = list(threads.map(sha256_file, files))
    return {
        "config": sha256_file(folder / "config.json"),
        "weights": {file.name: digest for file, digest in zip(files, digests, strict=True)},
    }


def differences(
    left: Mapping[str, Any],
    right: Mapping[str, Any],
    *,
    allow: Sequence[str] = (),
    names: tuple[str, str] = ("there", "now"),
) -> list[str]:
    """List the fields that differ, both values side by side; `allow` names fields, or whole sections, to pass over.

    A field that one side lacks differs, but for those that caches have not always had.
    """
    flat = [dict(_flatten(side)) for side in (left, right)]
    found = []
    for field in sorted(flat[0].keys() | flat[1].keys()):
        if any(field == allowed or field.startswith(f"{allowed}.") for allowed in allow):
            continue
        if field in _LATER and not all(field in side for side in flat):
            continue
        values = [side.get(field, "nothing") for side in flat]
        if values[0] != values[1]:
            found.append(f"{field}: {names[0]} {_short(values[0])}, {names[1]} {_short(values[1])}")
    return found


def check_student(
    fingerprint: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    *,
    allow: Sequence[str] = (),
    end_of_turn: str | None = None,
) -> Exchange | None:
    """Refuse a student whose tokenizer is not the one that a cache was made with.

    It may have more tokens behind the teacher's, such as `<image>` where the teacher writes pictures in another way.
    `end_of_turn` declares the one token that may differ (see `end_of_turn.py`); the exchange of ids that follows from
    it is returned, None without one. `allow` overrides fields (or sections, such as `tokenizer`) by name; what it
    overrides is logged.
    Errors: `CacheError` with the differing fields side by side; `ConfigError` for a field or a token that is unknown.
    """
    check_allowed(allow, fingerprint)
    theirs = {"tokenizer": fingerprint["tokenizer"]}
    mine = {"tokenizer": describe_tokenizer(tokenizer)}
    exchange = None
    if end_of_turn is not None:
        vocabulary, exchange = _resolve(theirs, tokenizer, end_of_turn, allow)
        mine["tokenizer"].update(vocabulary)
    elif isinstance(size := theirs["tokenizer"]["size"], int) and len(tokenizer) > size:
        mine["tokenizer"].update(_describe_vocabulary(*_known_ids(tokenizer, size)))
    _refuse(
        theirs,
        mine,
        allow,
        "use a student with the teacher's tokenizer, declare its end of turn as cache.end_of_turn if that is all, or "
        "allow the field by name if you know it does no harm",
    )
    return exchange


def check_encoding(
    fingerprint: Mapping[str, Any],
    encoder: SequenceEncoder,
    *,
    allow: Sequence[str] = (),
    end_of_turn: str | None = None,
) -> None:
    """Refuse a student that would put other tokens around the answers than the teacher saw, where these have records.

    For a cache of response positions only the declared end of turn is checked. Errors: `CacheError` with the differing
    fields side by side; `ConfigError` if the student's template ends answers with another token than declared.
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
        "its records are of all positions: give the student the teacher's template, max_length and image tokens, "
        "capture with capture.positions=response, or allow the field by name if you know it does no harm",
    )


def check_allowed(allow: Sequence[str], *fingerprints: Mapping[str, Any]) -> None:
    """Refuse to allow what no fingerprint has. Errors: `ConfigError` with the nearest name."""
    fields = {field for fingerprint in fingerprints for field, _ in _flatten(fingerprint)}
    known = fields | {field[:at] for field in fields for at, sign in enumerate(field) if sign == "."}
    for name in allow:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise ConfigError(f"allow: the fingerprint has no field '{name}': did you mean '{nearest[0]}'?")


def check_sequence(
    cache: TeacherCache,
    sequence: TokenSequence,
    exchange: Exchange | None = None,
    record: CachedSequence | None = None,
) -> None:
    """Refuse a student's sequence whose supervised ids are not those of the record, which is looked up if not given.

    Errors: `CacheError` if the cache has no such sequence; `TargetError` showing the first difference.
    """
    record = record or cache.sequence(sequence.key, sequence.role)
    length = len(sequence.input_ids_T)
    if cache.positions_kept == "all" and record.n_tokens != length:
        raise TargetError(
            f"sample '{sequence.key}' ({sequence.role}): {length} tokens, the cache has records of {record.n_tokens}: "
            "use the teacher's template and image tokens, or capture with capture.positions=response"
        )
    mine = sequence.target_ids_N
    read = sequence  # as the teacher's ids name it
    if exchange is not None:
        read = dataclasses.replace(sequence, input_ids_T=exchange.ids(sequence.input_ids_T))
    if record.target_hash == short_hash(read.target_hash):
        return
    theirs = cache.target_ids(sequence.key, sequence.role)
    if exchange is not None:
        theirs = exchange.ids(theirs)
    same = min(len(theirs), len(mine))
    unequal = [index for index in range(same) if theirs[index] != mine[index]]
    where = unequal[0] if unequal else same
    shown = [str(int(side[where])) if where < len(side) else "the end" for side in (theirs, mine)]
    pairs = {(int(theirs[index]), int(mine[index])) for index in unequal}
    one_token = len(pairs) == 1 and len(theirs) == len(mine) and exchange is None
    if sequence.role == "mismatched" and not one_token:
        raise TargetError(
            f"sample '{sequence.key}' (mismatched): the response it is paired with is not the cache's: pairs are made "
            "over a whole set: set data.set to the very set that was captured, or capture this one"
        )
    raise TargetError(
        f"sample '{sequence.key}' ({sequence.role}): its supervised ids are not the cache's: at position {where} the "
        f"cache has {shown[0]} of {len(theirs)}, the student {shown[1]} of {len(mine)}: use the teacher's template and "
        f"tokenizer, {'declare its end of turn as cache.end_of_turn, ' if one_token else ''}or capture the cache again"
    )


def _resolve(
    theirs: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, end_of_turn: str, allow: Sequence[str]
) -> tuple[dict[str, str], Exchange]:
    """Find the exchange of ids under which a student's vocabulary is the teacher's; the first one if none fits."""
    tokens = parse_end_of_turn(end_of_turn)
    found = []
    size = theirs["tokenizer"]["size"]  # a list of them in a cache merged in spite of it
    for limit in (None, size if isinstance(size, int) else None):
        own, special_ids = _known_ids(tokenizer, limit, keep=tokens[1])
        added = set(special_ids)
        if tokens[1] in added and tokens[0] not in own:
            added.add(tokens[0])
        for vocabulary, exchange in teacher_vocabularies(own, *tokens):
            special = {token: vocabulary[token] for token in added if token in vocabulary}
            described = _describe_vocabulary(vocabulary, special)
            found.append((described, exchange))
            fields = {"tokenizer": {name: theirs["tokenizer"][name] for name in described}}
            if not differences(fields, {"tokenizer": described}, allow=allow):
                return found[-1]
    return found[0]


def _known_ids(
    tokenizer: PreTrainedTokenizerFast, limit: int | None, keep: str | None = None
) -> tuple[dict[str, int], dict[str, int]]:
    """A tokenizer's tokens, and the added ones among them, with ids below `limit`; `keep` whatever its id."""
    everything, added = tokenizer.get_vocab(), _added_tokens(_tokenizer_content(tokenizer))
    if limit is not None:
        everything = {token: number for token, number in everything.items() if number < limit or token == keep}
        added = {token: number for token, number in added.items() if number < limit or token == keep}
    return everything, added


def _refuse(theirs: Mapping[str, Any], mine: Mapping[str, Any], allow: Sequence[str], way_out: str) -> None:
    names = ("cache", "student")
    found = differences(theirs, mine, allow=[*allow, *_INFORMATIVE], names=names)
    if found:
        raise CacheError(f"the teacher cache does not fit this student: {'; '.join(found)}: {way_out}")
    for line in differences(theirs, mine, allow=_INFORMATIVE, names=names):
        _LOG.warning("allowed: %s", line)


def _tokenizer_content(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError("the tokenizer has no tokenizer.json: save it as a fast tokenizer")
    content: dict[str, Any] = json.loads(backend.to_str())
    return content


def _added_tokens(content: Mapping[str, Any]) -> dict[str, int]:
    return {entry["content"]: int(entry["id"]) for entry in content["added_tokens"]}


def _describe_vocabulary(vocabulary: Mapping[str, int], added: Mapping[str, int]) -> dict[str, str]:
    pairs = (sorted([int(number), token] for token, number in tokens.items()) for tokens in (vocabulary, added))
    return dict(zip(("vocabulary", "added_tokens"), map(_hash, pairs), strict=True))


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for name, value in tree.items():
        flat += _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(f"{prefix}{name}", value)]
    return flat


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"{text[:_SHOWN]}…" if len(text) == 64 else text  # a SHA-256


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True).encode()).hexdigest()
