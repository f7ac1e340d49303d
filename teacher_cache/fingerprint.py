"""The fingerprint: what a cache was made from and with, and what a student must share to read it.

A nested JSON object. Sections: `tokenizer`, `template`, `sequence`, `images`, `teacher`, `engine`, `capture`, `data`.
A cache of response positions enforces `tokenizer` alone, so a student's prompt wording and image processing may differ;
a cache of all positions also enforces what determines the other tokens. Each sequence's supervised ids are compared
when it is joined. All other fields only decide whether a run may resume a cache and whether caches may be merged.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavamod_offline.data.encode.template import ROLES
from llavamod_offline.errors import ConfigError, ModelError
from llavamod_offline.models.hub import weight_files
from llavamod_offline.models.loading.adapter import adapter_files, describe_adapter
from teacher_cache.format.manifest import canonical, sha256_bytes, sha256_file, sha256_files
from teacher_cache.format.record import STORED_SETTINGS
from teacher_cache.student.token_list import Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from llavamod_offline.data.encode.template import Template
    from llavamod_offline.data.encode.tokenize import SequenceEncoder
    from llavamod_offline.data.sets.sample_set import SampleSet

_LONGER = "rejected"  # what happens to a sequence of more than max_length tokens
# Caches of earlier versions lack these; a missing value counts as equal.
_LATER = ("engine.head_dtype", "engine.device", "template.system_turn", "data.writer", "data.round", "data.shards")
_TODAY = {f"capture.{name}": f"capture.{own}" for name, own in STORED_SETTINGS.items()}
_SHOWN = 16
# These decide how records are read and what an id means, so they must be equal across a cache.
_HOW_TO_READ = (
    "capture.vocab_size",
    "capture.temperature",
    "capture.temperatures",
    "capture.precision",
    "capture.positions",
    "capture.hidden",
    "capture.without_image",
    "capture.top_k",
    "capture.tail_samples_max",
    "capture.forced_ids",
    "tokenizer.vocabulary",
    "tokenizer.merges",
    "tokenizer.added_tokens",
)


def describe_tokenizer(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Hash a tokenizer: its vocabulary with ids (added tokens too), its merges in order, its added tokens with ids.

    `tokens` holds all of them, so that differing ones can be named.

    Errors: `ModelError` if it is not a fast tokenizer.
    """
    content = _tokenizer_content(tokenizer)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"].get("merges") or []]
    return {
        "size": len(tokenizer),
        "merges": _hash(merges),
        **describe_vocabulary(tokenizer.get_vocab(), added_tokens(tokenizer)),
        "tokens": Tokens.of(tokenizer.get_vocab(), added_tokens(tokenizer)).pack(),
        "pipeline": _hash([content.get(part) for part in ("normalizer", "pre_tokenizer", "post_processor")]),
    }


def describe_template(template: Template) -> dict[str, Any]:
    """Name a template and hash all of its text."""
    content = dataclasses.asdict(dataclasses.replace(template, tool_wording=None))
    del content["tool_wording"]  # it follows from the checkpoint
    system_turn = content.pop("system_turn")
    if set(template.strips) == set(ROLES):
        content["strips"] = True  # as older caches store it
    for name in ("image_prefix", "strips"):  # which older caches lack
        if not content[name]:
            del content[name]
    described = {"name": template.name, "sha256": _hash(content)}
    return described if system_turn is None else {**described, "system_turn": _hash(system_turn)}


def is_template(template: Template, described: Mapping[str, Any]) -> bool:
    """Whether a fingerprint's `template` section describes this one; older caches do not record the system turn."""
    own = describe_template(template)
    return all(described.get(name, own.get(name)) == own.get(name) for name in own.keys() | described.keys())


def describe_sequence(encoder: SequenceEncoder) -> dict[str, Any]:
    """The maximum length of a sequence, and the ids that the tokenizer puts before it, if any (Llama's `<s>`)."""
    start = {"start_ids": list(encoder.start_ids)} if encoder.start_ids else {}
    return {"max_length": encoder.max_length, "longer": _LONGER, **start}


def describe_weights(folder: Path, *, needed: bool = True) -> dict[str, Any]:
    """Identify a checkpoint by the SHA-256 of its configuration and of each safetensors file, not by paths.

    For an adapter on a base, both count. Unless weights are `needed`, they are included only if they exist.
    """
    there = needed or any(folder.glob("*.safetensors"))
    files = [*(weight_files(folder) if there else ()), *adapter_files(folder)[1:]]
    digests = sha256_files(files)
    adapter = describe_adapter(folder)
    return {
        "config": sha256_file(folder / "config.json"),
        "weights": {file.name: digest for file, digest in zip(files, digests, strict=True)},
        **({} if adapter is None else {"adapter": sha256_bytes(canonical(adapter))}),
    }


def describe_data(samples: SampleSet) -> dict[str, Any]:
    """Identify a set, and how it is cut into shards, since a cache is written shard by shard.

    If a model wrote its answers, also that writer and, if it has one, the round.
    """
    shards = [[name, len(rows)] for name, rows in samples.shard_rows.items()]
    described: dict[str, Any] = {"digest": samples.digest, "samples": len(samples), "shards": _hash(shards)}
    about = samples.manifest.get("generated")
    if about is not None:
        described["writer"] = writer_id(about["teacher"])
        if about["generate"].get("round") is not None:
            described["round"] = about["generate"]["round"]
    return described


def writer_id(described: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of what `describe_weights` returns for a checkpoint."""
    return sha256_bytes(canonical(described))


def differences(
    left: Mapping[str, Any],
    right: Mapping[str, Any],
    *,
    allow: Sequence[str] = (),
    names: tuple[str, str] = ("was", "now"),
) -> list[str]:
    """List the fields that differ, both values side by side; `allow` names fields, or whole sections, to ignore.

    A field that one side lacks counts as differing, unless older caches lack it.
    """
    flat = [dict(flatten(side)) for side in (left, right)]
    found = []
    for field in sorted(flat[0].keys() | flat[1].keys()):
        if any(field == allowed or field.startswith(f"{allowed}.") for allowed in allow):
            continue
        if field in _LATER and not all(field in side for side in flat):
            continue
        values = [side.get(field, "unset") for side in flat]
        if values[0] != values[1]:
            found.append(f"{field}: {names[0]} {_short(values[0])}, {names[1]} {_short(values[1])}")
    return found


def check_read_alike(left: Mapping[str, Any], right: Mapping[str, Any]) -> None:
    """Refuse fingerprints whose records cannot be in one cache, whatever is allowed. Errors: `ConfigError`."""
    sides = [dict(flatten(side)) for side in (left, right)]
    for field in _HOW_TO_READ:
        if sides[0].get(field) != sides[1].get(field):
            raise ConfigError(f"allow: {field} decides how records are read: it cannot differ within one cache")


def may_allow(found: Sequence[str]) -> bool:
    """Whether all of these `differences` may be harmless, in fields that do not decide what a cache's records are."""
    fields = [line.partition(":")[0] for line in found]
    return not any(field in _HOW_TO_READ or field.startswith(("data.", "shards")) for field in fields)


def check_allowed(allow: Sequence[str], *fingerprints: Mapping[str, Any]) -> None:
    """Refuse `allow` names that no fingerprint has. Errors: `ConfigError` with the nearest name."""
    fields = {field for fingerprint in fingerprints for field, _ in flatten(fingerprint)}
    known = fields | {field[:at] for field in fields for at, sign in enumerate(field) if sign == "."}
    for name in allow:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise ConfigError(f"allow: the fingerprint has no field '{name}': did you mean '{nearest[0]}'?")


def _tokenizer_content(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError("the tokenizer has no tokenizer.json: save a fast one there with save_pretrained")
    content: dict[str, Any] = json.loads(backend.to_str())
    return content


def added_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """A tokenizer's added tokens with their ids."""
    return {entry["content"]: int(entry["id"]) for entry in _tokenizer_content(tokenizer)["added_tokens"]}


def describe_vocabulary(vocabulary: Mapping[str, int], added: Mapping[str, int]) -> dict[str, str]:
    """Hash a vocabulary and its added tokens, both with ids."""
    pairs = (sorted([int(number), token] for token, number in tokens.items()) for tokens in (vocabulary, added))
    return dict(zip(("vocabulary", "added_tokens"), map(_hash, pairs), strict=True))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """List all fields by their dotted names; settings stored under older names appear under today's.

    The list of tokens is left out: it is long, and `tokenizer.vocabulary` hashes its content.
    """
    flat: list[tuple[str, Any]] = []
    for name, value in without_tokens(tree).items():
        field = _TODAY.get(f"{prefix}{name}", f"{prefix}{name}")
        flat += flatten(value, f"{field}.") if isinstance(value, Mapping) else [(field, value)]
    return flat


def without_tokens(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A fingerprint, or a section of it, without the list of the tokenizer's tokens."""
    kept = {name: value for name, value in tree.items() if name != "tokens" or "merges" not in tree}
    return {name: without_tokens(value) if name == "tokenizer" else value for name, value in kept.items()}


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"{text[:_SHOWN]}…" if len(text) == 64 else text  # a SHA-256


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False, sort_keys=True).encode()).hexdigest()
