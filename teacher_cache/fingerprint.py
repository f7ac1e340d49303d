"""The fingerprint: what a cache was made from and with, and what a student must share to read it.

A nested JSON object. Sections: `tokenizer`, `template`, `sequence`, `images`, `teacher`, `engine`, `capture`, `data`.
A cache of response positions enforces `tokenizer` alone (and each sequence's supervised ids, when it is joined);
everything else informs, and decides whether a run may go on with a cache.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavamod_offline.errors import CacheError, ModelError, TargetError
from teacher_cache.manifest import sha256_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from llavamod_offline.data.template import Template
    from llavamod_offline.data.tokenise import Sequence as TokenSequence
    from teacher_cache.reader import TeacherCache

STUDENT_FIELDS = ("tokenizer.vocabulary", "tokenizer.merges", "tokenizer.added_tokens")
_SHOWN = 16


def describe_tokenizer(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Hash a tokenizer: its vocabulary with ids (added tokens too), its merges in order, its added tokens with ids.

    Errors: `ModelError` if it is no fast tokenizer.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError("the tokenizer has no tokenizer.json: save it as a fast tokenizer")
    content = json.loads(backend.to_str())
    model = content["model"]
    vocabulary = tokenizer.get_vocab()
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or []]
    return {
        "size": len(tokenizer),
        "vocabulary": _hash(sorted([int(number), token] for token, number in vocabulary.items())),
        "merges": _hash(merges),
        "added_tokens": _hash(sorted([int(entry["id"]), entry["content"]] for entry in content["added_tokens"])),
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
    return {
        "config": sha256_file(folder / "config.json"),
        "weights": {file.name: sha256_file(file) for file in files},
    }


def differences(
    left: Mapping[str, Any],
    right: Mapping[str, Any],
    *,
    allow: Sequence[str] = (),
    names: tuple[str, str] = ("there", "now"),
) -> list[str]:
    """List the fields that differ, both values side by side; `allow` names fields, or whole sections, to pass over."""
    flat = [dict(_flatten(side)) for side in (left, right)]
    found = []
    for field in sorted(flat[0].keys() | flat[1].keys()):
        if any(field == allowed or field.startswith(f"{allowed}.") for allowed in allow):
            continue
        values = [side.get(field, "nothing") for side in flat]
        if values[0] != values[1]:
            found.append(f"{field}: {names[0]} {_short(values[0])}, {names[1]} {_short(values[1])}")
    return found


def check_student(
    fingerprint: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast, *, allow: Sequence[str] = ()
) -> None:
    """Refuse a student whose tokenizer is not the one that a cache was made with.

    Errors: `CacheError` with the differing fields side by side; `allow` overrides fields (or `tokenizer`) by name.
    """
    mine = {"tokenizer": describe_tokenizer(tokenizer)}
    theirs = {"tokenizer": fingerprint["tokenizer"]}
    informative = [f"tokenizer.{name}" for name in ("size", "pipeline")]
    found = differences(theirs, mine, allow=[*allow, *informative], names=("cache", "student"))
    if found:
        raise CacheError(
            f"the teacher cache does not fit this student: {'; '.join(found)}: "
            "use a student with the teacher's tokenizer, or allow the field by name if you know it does no harm"
        )


def check_sequence(cache: TeacherCache, sequence: TokenSequence) -> None:
    """Refuse a student's sequence whose supervised ids are not those of the record.

    Errors: `CacheError` if the cache has no such sequence; `TargetError` showing the first difference.
    """
    if cache.sequence(sequence.key, sequence.role).target_hash == sequence.target_hash:
        return
    theirs = cache.target_ids(sequence.key, sequence.role)
    mine = sequence.target_ids_N
    same = min(len(theirs), len(mine))
    unequal = [index for index in range(same) if theirs[index] != mine[index]]
    where = unequal[0] if unequal else same
    shown = [str(int(side[where])) if where < len(side) else "the end" for side in (theirs, mine)]
    raise TargetError(
        f"sample '{sequence.key}' ({sequence.role}): its supervised ids are not the cache's: at position {where} the "
        f"cache has {shown[0]} of {len(theirs)}, the student {shown[1]} of {len(mine)}: "
        "use the teacher's template and tokenizer, or capture the cache again"
    )


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
