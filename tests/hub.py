"""A Hugging Face cache folder with huggingface_hub's layout: refs, snapshots made of links, blobs."""

from __future__ import annotations

import hashlib
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def write_snapshot(cache: Path, repository: str, folder: Path, *, revision: str = "main", commit: str = COMMIT) -> Path:
    """Add a checkpoint folder's files to a cache folder as a downloaded revision of a Hub model."""
    root = cache / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    for part in (root / "blobs", root / "refs", snapshot):
        part.mkdir(parents=True, exist_ok=True)
    for file in folder.iterdir():
        content = file.read_bytes()
        blob = root / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    (root / "refs" / revision).write_text(commit)
    return snapshot
