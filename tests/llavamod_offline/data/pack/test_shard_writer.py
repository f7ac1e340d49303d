"""Shards: where each member's bytes lie, and what is imported before writing one."""

from __future__ import annotations

import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

from llavamod_offline.data.pack.prepare import sample_members
from llavamod_offline.data.pack.shard_writer import ShardWriter
from tests.tiny import tiny_samples


def test_every_member_lies_where_the_writer_says(tmp_path: Path) -> None:
    shard = ShardWriter(tmp_path, "s")
    expected: dict[str, bytes] = {}
    places: dict[str, dict[str, Any]] = {}
    for number, sample in enumerate([*tiny_samples(9), *tiny_samples(4, preference=True)]):
        key = sample.key if number % 3 else "k" * 190 + str(number)
        members = sample_members(sample)
        expected |= {f"{key}.{name}": content for name, content in members}
        places |= {f"{key}.{entry['name']}": entry for entry in shard.add(key, members)}
    told = shard.close()
    content = (tmp_path / "s.tar").read_bytes()
    assert (told.samples, told.size) == (13, len(content))
    with tarfile.open(tmp_path / "s.tar") as tar:
        assert tar.getnames() == list(expected)
    for name, member in expected.items():
        entry = places[name]
        assert content[entry["offset"] : entry["offset"] + entry["size"]] == member


def test_nothing_heavy_is_loaded_before_a_shard_is_written() -> None:
    """Not torch, which importing webdataset brings in."""
    program = (
        "import sys\nfrom llavamod_offline.data.pack import pack\n"
        "from llavamod_offline.data.sources import read\nfrom llavamod_offline.data.tars import tar_index\n"
        "print(sorted({'torch', 'transformers', 'webdataset'} & set(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert loaded.stdout == "[]\n"
