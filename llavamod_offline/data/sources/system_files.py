"""Files and folders that operating systems and tools add to folders and archives; they are never data."""

from __future__ import annotations

_PREFIXES = ("._", ".nfs", ".fuse_hidden", ".trash")
_NAMES = {
    # macOS
    ".ds_store", ".localized", ".apdisk", "__macosx", ".appledouble", ".spotlight-v100", ".fseventsd",
    ".temporaryitems", ".documentrevisions-v100", ".volumeicon.icns", "icon\r",
    # Windows
    "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information",
    # Linux and network storage
    ".directory", "lost+found", "@eadir", "#recycle",
    # Git, Jupyter, the Hugging Face hub
    ".git", ".gitattributes", ".gitignore", ".gitkeep", ".ipynb_checkpoints", ".cache",
}  # fmt: skip


def is_system_name(name: str) -> bool:
    """Whether a file's or folder's own name is one of these."""
    return (name.startswith(".") and name.lower().startswith(_PREFIXES)) or name.lower() in _NAMES


def is_system_path(path: str) -> bool:
    """Whether any part of a relative path with `/` is one of these."""
    return any(is_system_name(part) for part in path.split("/"))
