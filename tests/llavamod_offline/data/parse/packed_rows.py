"""Images that rows name, and the samples that rows pack to."""

from __future__ import annotations

from pathlib import Path

from llavamod_offline.data.rows import Located
from llavamod_offline.data.sample import Sample
from tests.llavamod_offline.data.sources.source_files import JPG, PNG, WEBP, read_sources

IMAGES = {"a.jpg": JPG, "sub/b.png": PNG, "c.webp": WEBP}


def pack(file: Path, *folders: Path) -> list[Sample | str]:
    found = read_sources([file], images=folders)
    return [row.sample if isinstance(row, Located) else f"{row.kind}: {row.reason}" for row in found]
