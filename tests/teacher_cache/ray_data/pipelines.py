"""Ray Data pipelines over sets, in a process of their own: `python -c "…; main()" FOLDER`; prints their results."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ray
import ray.data

from llavamod_offline.config import load_config
from llavamod_offline.errors import LlavaModError
from teacher_cache.config import CacheTeacherConfig
from teacher_cache.ray_data import capture, read_set, write_cache

Row = dict[str, Any]


def stumble(row: Row) -> Row:
    """Pass a row through; fail on one shard."""
    if row["shard"].endswith("000002"):
        raise ValueError("not this one")
    return row


def look_at(row: Row) -> Row:
    """Add columns, as a user's step after the teacher might."""
    return {**row, "surprise": None if row["reason"] else float(-sum(row["log_probs"])), "length": len(row["entropy"])}


def other_words(row: Row) -> Row:
    """Change a sample's text."""
    turns = [{**turn, "text": turn["text"] + " now"} for turn in row["turns"]]
    return {**row, "turns": turns}


def main() -> None:
    """Run the pipelines that the test asks for."""
    folder = Path(sys.argv[1])
    wanted = json.loads((folder / "wanted.json").read_text())
    ray.init(num_cpus=2, num_gpus=0, log_to_driver=False, include_dashboard=False, object_store_memory=2**27)
    ray.data.DataContext.get_current().enable_progress_bars = False
    configs = {
        name: load_config(CacheTeacherConfig, (), [*settings, f"output={folder / name}"])
        for name, settings in wanted.items()
    }

    def rows(name: str) -> Any:
        return read_set(configs[name].data, missing_in=configs[name].output)

    def written(name: str, captured: Any) -> str:
        try:
            return str(write_cache(captured, configs[name]).digest)
        except LlavaModError as error:
            return f"{type(error).__name__}: {error}"
        except Exception as error:
            return type(error).__name__

    def run(name: str, samples: Any) -> Any:
        return capture(samples, configs[name])

    def drops(name: str) -> str:
        return written(name, run(name, rows(name)).filter(lambda row: row["row"] != 4))

    def shuffled(name: str) -> str:
        try:
            return written(name, run(name, rows(name).repartition(2)))
        except LlavaModError as error:
            return f"{type(error).__name__}: {error}"

    found = {
        "whole": written("whole", run("whole", rows("whole")).map(look_at)),
        "pairs": written("pairs", run("pairs", rows("pairs"))),
        "stopped": written("stopped", run("stopped", rows("stopped")).map(stumble)),
        "left": sorted({row["shard"] for row in rows("stopped").select_columns(["shard"]).take_all()}),
        "resumed": written("stopped", run("stopped", rows("stopped"))),
        "filtered": written("filtered", run("filtered", rows("filtered").filter(lambda row: 5 <= row["row"] != 7))),
        "changed": written("refused", run("refused", rows("refused").map(other_words))),
        "dropped": drops("refused"),
        "shuffled": shuffled("refused"),
    }
    print(json.dumps(found))
