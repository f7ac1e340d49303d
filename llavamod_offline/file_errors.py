"""Describe errors of files that cannot be written, read or found as one line that names the setting to change."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

# The system's errors, never this program's, whatever the file.
_OF_THE_SYSTEM = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ETXTBSY, errno.ESTALE, errno.ENXIO),
}
# The user's errors if an argument names the file.
_OF_ARGUMENTS = {errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_OUTPUTS = ("output", "output_set", "--output", "-o", "--file", "--judge-record")
# How safetensors and tokenizers (Rust) and Arrow word a system error without setting its number.
_NUMBER = re.compile(r"\(os error (\d+)\)|\[errno (\d+)\]", re.IGNORECASE)


def describe_file_error(error: BaseException, arguments: Sequence[str]) -> str | None:
    """One line for a file's error: the file, the reason, the argument that named it. None for any other error."""
    number = _number(error)
    named = getattr(error, "filename2", None) or getattr(error, "filename", None)
    file = os.fsdecode(named) if isinstance(named, str | bytes | os.PathLike) else ""
    setting = _setting(file, arguments)
    if number not in _OF_THE_SYSTEM and not (number in _OF_ARGUMENTS and setting):
        return None
    where = f"{file}: " if file else ""
    if number in _FULL:
        written = setting or ", ".join(text for name, _, text in _given(arguments) if name in _OUTPUTS)
        below = f" (given by {written})" if written else ""
        return f"error: {where}cannot be written{below}: {os.strerror(number)}: free space, then run the command again"
    change = f"change {setting}" if setting else "choose another file or folder, or correct its permissions"
    return f"error: {where}{os.strerror(number)}: {change}"


def _number(error: BaseException) -> int:
    """The system's error number, 0 if there is none."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = _NUMBER.search(str(error))
    return int(found[1] or found[2]) if found else 0


def _setting(file: str, arguments: Sequence[str]) -> str:
    """The argument that names the file, a folder above it or a file below it, as typed: the longest of several."""
    if not file:
        return ""
    path = Path(os.path.abspath(file))
    best = (0, "")
    for _, value, text in _given(arguments):
        given = Path(os.path.abspath(os.path.expanduser(value)))
        if path == given or given in path.parents or path in given.parents:
            best = max(best, (len(given.parts), text))
    return best[1]


def _given(arguments: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Names, values and the texts that gave them: `key=value`, `--option value`, `--option=value`, or a bare value.

    For a YAML file also its own keys.
    """
    option = ""
    for text in arguments:
        name, equals, value = text.partition("=")
        if text.startswith("-") and not equals:
            option = text
            continue
        if Path(text).suffix in (".yaml", ".yml") and Path(text).is_file():
            yield from ((key, value, f"{key}: {value} in {text}") for key, value in _texts(_read(Path(text)), ""))
        if equals:
            yield name, value, text
        if not equals or not text.startswith("-"):
            yield option, text, f"{option} {text}".strip()
        option = ""


def _read(file: Path) -> object:
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None


def _texts(value: object, key: str) -> Iterator[tuple[str, str]]:
    """The texts in a YAML file with their dotted keys."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, str) and value:
        yield key, value
