"""Captures inside a Ray Data pipeline: a set's samples, the teacher, and the cache, with a user's own steps between.

    rows = read_set("sets/general").filter(lambda row: row["source"] != "ocr")
    write_cache(capture(rows, config).map(look_at), config)

A data shard travels in one block of rows, from which its cache shard is committed: filters before and maps after the
teacher keep it together; steps that would regroup rows are refused.
"""

from __future__ import annotations

from llavamod_offline.errors import ConfigError

try:
    from teacher_cache.ray_data.sink import write_cache
    from teacher_cache.ray_data.source import read_set
    from teacher_cache.ray_data.teacher import capture
except ModuleNotFoundError as error:
    if error.name is None or error.name.partition(".")[0] not in ("ray", "pandas"):
        raise
    raise ConfigError("teacher_cache.ray_data needs Ray Data: pip install 'llavamod-offline[ray]'") from error

__all__ = ["capture", "read_set", "write_cache"]
