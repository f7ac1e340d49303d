"""What `cache-teacher inspect` shows, as plain objects: content and size of a cache, the teacher's confidence, tokens.

Shape suffixes: N positions of the sampled sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llavamod_offline.data.keys import stored_key
from llavamod_offline.errors import CacheError
from llavamod_offline.losses.targets import EMPTY_ID, SparseTargets
from teacher_cache.fingerprint import without_tokens
from teacher_cache.format.manifest import COLUMNS_NAME, FORMAT_VERSION, SEQUENCES_NAME, canonical
from teacher_cache.read.reader import TeacherCache

TOPK_MASS_EDGES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.999, 1.0)
ENTROPY_EDGES = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 2.0, 3.0, 5.0, math.inf)
_SAMPLE_POSITIONS = 50_000
_BATCH_SEQUENCES = 64


def describe_cache(cache: TeacherCache, sample_positions: int = _SAMPLE_POSITIONS) -> dict[str, Any]:
    """Describe a cache: totals, bytes per position by part (each file counted once), histograms, the fingerprint.

    The histograms cover all positions, or evenly spaced sequences with about `sample_positions` positions.
    """
    parts = bytes_by_part(cache)
    positions = max(cache.positions, 1)
    return {
        "path": str(cache.path),
        "format_version": FORMAT_VERSION,
        "digest": cache.digest,
        "shards": len(cache.shard_names),
        **{name: cache.totals[name] for name in ("sequences", "positions", "rejected")},
        "topk_ids": cache.totals["heads"],
        "tail_samples": cache.totals["draws"],
        "roles": list(cache.roles),
        "bytes": cache.bytes,
        "bytes_per_position": round(cache.bytes_per_position, 3),
        "bytes_per_position_by_part": {name: round(size / positions, 3) for name, size in parts.items()},
        "topk_ids_per_position": round(cache.totals["heads"] / positions, 3),
        "tail_samples_per_position": round(cache.totals["draws"] / positions, 3),
        "histograms": _histograms(cache, sample_positions),
        "fingerprint": without_tokens(cache.fingerprint),
    }


def bytes_by_part(cache: TeacherCache) -> dict[str, int]:
    """Bytes of each column, of the sequence tables, and of everything else; largest first."""
    parts: dict[str, int] = {}
    for manifest in cache.manifests():
        for part, size in shard_parts(manifest).items():
            parts[part] = parts.get(part, 0) + size
    parts["metadata"] = cache.bytes - sum(size for part, size in parts.items() if part != "metadata")
    return dict(sorted(parts.items(), key=lambda item: -item[1]))


def shard_parts(manifest: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of each column of a shard, of its sequence table, and of all its small files (`metadata`)."""
    parts: dict[str, int] = {"metadata": len(canonical(manifest))}
    for file, entry in manifest["files"].items():
        path = Path(file)
        data = path.parts[0] == COLUMNS_NAME and len(path.parts) > 3
        part = path.parts[1] if data else "sequences" if path.name == SEQUENCES_NAME else "metadata"
        parts[part] = parts.get(part, 0) + int(entry["bytes"])
    return parts


def describe_key(cache: TeacherCache, key: str, show: Callable[[int], str]) -> list[dict[str, Any]]:
    """Describe every supervised token of a key, in every role: its top-k ids and tail samples; `show` labels an id.

    `key` may also be the data set's id that it was made from. Errors: `CacheError` if it has no record.
    """
    key = stored_key(key, lambda one: any((one, role) in cache for role in cache.roles))
    roles = [role for role in cache.roles if (key, role) in cache]
    if not roles:
        raise CacheError(f"cache '{cache.path}': no record of sample '{key}': look for it in rejected.jsonl")
    found = []
    for role in roles:
        about = cache.sequence(key, role)
        targets = cache.targets([(key, role)])
        found.append(
            {
                "key": key,
                "role": role,
                "n_tokens": about.n_tokens,
                "sum_log_prob": about.sum_log_prob,
                "mean_entropy": about.mean_entropy,
                "tokens": [_describe_position(targets[row : row + 1], show) for row in range(len(targets))],
            }
        )
    return found


def _describe_position(target: SparseTargets, show: Callable[[int], str]) -> dict[str, Any]:
    number = int(target.target_ids_N[0])
    tail = math.exp(float(target.tail_log_mass_N[0]))
    topk = zip(target.topk_ids_NK[0].tolist(), target.topk_log_probs_NK[0].tolist(), strict=True)
    samples: dict[int, float] = {}
    for drawn, share in zip(target.tail_ids_NM[0].tolist(), target.tail_weights_NM[0].tolist(), strict=True):
        if drawn != EMPTY_ID:
            samples[drawn] = samples.get(drawn, 0.0) + tail * share
    return {
        "id": number,
        "token": show(number),
        "log_prob": float(target.target_log_probs_N[0]),
        "entropy": float(target.entropy_N[0]),
        "tail_mass": tail,
        "topk": [{"id": i, "token": show(i), "log_prob": log_prob} for i, log_prob in topk if i != EMPTY_ID],
        "tail_samples": [{"id": i, "token": show(i), "mass": mass} for i, mass in sorted(samples.items())],
    }


def _histograms(cache: TeacherCache, sample_positions: int) -> dict[str, Any]:
    sequences = len(cache)
    wanted = math.ceil(sequences * sample_positions / max(cache.positions, sample_positions))
    step = max(1, sequences // max(wanted, 1))
    items = cache.items(range(0, sequences, step))
    tails, entropies = [], []
    for start in range(0, len(items), _BATCH_SEQUENCES):
        records = cache.records(items[start : start + _BATCH_SEQUENCES])
        tails.append(records.tail_log_mass_N)
        entropies.append(records.entropy_N)
    topk_mass_N = -np.expm1(np.concatenate([np.zeros(0), *tails]).astype(np.float64))
    entropy_N = np.concatenate([np.zeros(0), *entropies]).astype(np.float64)
    return {
        "sequences": len(items),
        "of_sequences": sequences,
        "positions": len(entropy_N),
        "topk_mass": _histogram(topk_mass_N, TOPK_MASS_EDGES),
        "entropy": _histogram(entropy_N, ENTROPY_EDGES),
    }


def _histogram(values_N: NDArray[np.float64], edges: Sequence[float]) -> dict[str, Any]:
    """Counts per bin, lower edges included, in the last bin both; an infinite edge is null, as JSON has no infinity."""
    inside_N = np.clip(values_N, edges[0], edges[-1])  # rounding may exceed the edges slightly
    counts = np.histogram(inside_N, [*edges[:-1], np.finfo(np.float64).max if edges[-1] == math.inf else edges[-1]])[0]
    return {
        "edges": [None if edge == math.inf else edge for edge in edges],
        "counts": counts.tolist(),
        "mean": float(values_N.mean()) if len(values_N) else 0.0,
    }
