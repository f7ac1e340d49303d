"""The wording of a judge's question."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llavamod_offline.errors import ConfigError


@dataclass(frozen=True)
class JudgeTemplate:
    """Text with a placeholder for each of `slots`: all as `{name}`, or all as `{}` in their order."""

    name: str
    text: str
    slots: tuple[str, ...]

    @classmethod
    def read(cls, path: Path, slots: Sequence[str]) -> JudgeTemplate:
        """Read a template file. Errors: `ConfigError` if it is missing or its placeholders do not match `slots`."""
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: the judge's template cannot be read: {error}") from error
        template = cls(path.name, text, tuple(slots))
        template.pieces()
        return template

    @property
    def sha256(self) -> str:
        """SHA-256 (hex) of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def pieces(self) -> list[str]:
        """The text split at its placeholders: plain, name, plain, name, … Errors: `ConfigError`, see `read`."""
        named = re.split("{(" + "|".join(self.slots) + ")}", self.text)
        if set(named[1::2]) == set(self.slots):
            return named
        plain = self.text.split("{}")
        if len(plain) != len(self.slots) + 1 or len(named) > 1:
            wanted = ", ".join(f"{{{name}}}" for name in self.slots)
            raise ConfigError(
                f"{self.name}: a template needs the placeholders {wanted}, or {{}} {len(self.slots)} times"
            )
        pieces = [plain[0]]
        for name, text in zip(self.slots, plain[1:], strict=True):
            pieces += [name, text]
        return pieces

    def fill(self, values: Mapping[str, str]) -> str:
        """Insert `values`; braces in them stay as they are."""
        return "".join(values[piece] if index % 2 else piece for index, piece in enumerate(self.pieces()))
