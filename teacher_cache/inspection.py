"""`cache-teacher inspect`: what a cache is and how its bytes are spent; for a key, each token with its alternatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llavamod_offline.errors import CacheError
from teacher_cache.manifest import COLUMNS_NAME, MANIFEST_NAME, SHARDS_NAME, read_object
from teacher_cache.reader import TeacherCache

_ALTERNATIVES = 6


def describe_cache(cache: TeacherCache) -> dict[str, Any]:
    """Totals of a cache and bytes per position by part (every file counted once)."""
    parts = bytes_by_part(cache)
    positions = max(cache.positions, 1)
    return {
        "path": str(cache.path),
        "digest": cache.digest,
        "shards": len(cache.shard_names),
        **{name: cache.totals[name] for name in ("sequences", "positions", "heads", "draws", "rejected")},
        "roles": list(cache.roles),
        "bytes": cache.bytes,
        "bytes_per_position": round(cache.bytes_per_position, 3),
        "bytes_per_position_by_part": {name: round(size / positions, 3) for name, size in parts.items()},
        "head_ids_per_position": round(cache.totals["heads"] / positions, 3),
        "draws_per_position": round(cache.totals["draws"] / positions, 3),
        "fingerprint": cache.fingerprint,
    }


def bytes_by_part(cache: TeacherCache) -> dict[str, int]:
    """Bytes of each column, of the sequence tables, and of everything else."""
    parts: dict[str, int] = {}
    for name in cache.shard_names:
        files = read_object(cache.path / SHARDS_NAME / name / MANIFEST_NAME, way_out="run `cache-teacher verify`")[
            "files"
        ]
        for file, entry in files.items():
            path = Path(file)
            data = path.parts[0] == COLUMNS_NAME and len(path.parts) > 3
            part = path.parts[1] if data else "sequences" if path.name == "sequences.arrow" else "metadata"
            parts[part] = parts.get(part, 0) + int(entry["bytes"])
    parts["metadata"] = cache.bytes - sum(size for part, size in parts.items() if part != "metadata")
    return dict(sorted(parts.items(), key=lambda item: -item[1]))


def cache_lines(cache: TeacherCache) -> list[str]:
    """`describe_cache` as text."""
    about = describe_cache(cache)
    capture = cache.fingerprint["capture"]
    lines = [
        f"{about['path']}: teacher cache of format 1",
        f"  digest      {about['digest']}",
        f"  content     {about['positions']:,} positions in {about['sequences']:,} sequences "
        f"({', '.join(about['roles'])}), {about['shards']} shards, {about['rejected']} rejected",
        f"  vocabulary  {capture['vocab_size']:,} ids; head to {capture['head_mass']:g} of the mass or "
        f"{capture['head_max']} ids; at most {capture['draws_max']} draws",
        f"  a position  {about['head_ids_per_position']:.2f} head ids, {about['draws_per_position']:.2f} tail ids, "
        f"{about['bytes_per_position']:.2f} bytes all in:",
    ]
    lines += [f"    {name:<18}{size:>9.3f}" for name, size in about["bytes_per_position_by_part"].items()]
    return lines


def describe_key(cache: TeacherCache, key: str, show: Callable[[int], str]) -> list[dict[str, Any]]:
    """Every role of a key, every supervised token with its most likely alternatives; `show` names an id."""
    roles = [role for role in cache.roles if (key, role) in cache]
    if not roles:
        raise CacheError(f"cache '{cache.path}': no record of sample '{key}': its rejected.jsonl may say why")
    found = []
    for role in roles:
        about = cache.sequence(key, role)
        tokens = []
        for record in cache.records([(key, role)]).split([1] * about.n_positions):
            head = zip(record.head_ids_H.tolist(), record.head_log_probs_H.tolist(), strict=True)
            tokens.append(
                {
                    "id": int(record.target_ids_N[0]),
                    "token": show(int(record.target_ids_N[0])),
                    "log_prob": float(record.target_log_probs_N[0]),
                    "entropy": float(record.entropy_N[0]),
                    "tail_mass": math.exp(float(record.tail_log_mass_N[0])),
                    "head": [{"id": i, "token": show(i), "log_prob": log_prob} for i, log_prob in head],
                }
            )
        found.append({"key": key, "role": role, "sum_log_prob": about.sum_log_prob, "tokens": tokens})
    return found


def key_lines(sequences: list[dict[str, Any]]) -> list[str]:
    """`describe_key` as text, the likeliest alternatives with their probabilities."""
    lines = []
    for sequence in sequences:
        lines.append(f"{sequence['key']} ({sequence['role']}): Σ log p = {sequence['sum_log_prob']:.4f}")
        for token in sequence["tokens"]:
            rest = [
                f"{entry['token']} {math.exp(entry['log_prob']):.3f}"
                for entry in token["head"][:_ALTERNATIVES]
                if entry["id"] != token["id"]
            ]
            lines.append(
                f"  {token['token']:<18} p {math.exp(token['log_prob']):.4f}  entropy {token['entropy']:.3f}  "
                f"tail {token['tail_mass']:.4f}  {'   '.join(rest)}"
            )
    return lines
