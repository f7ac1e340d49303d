"""The settings of a served teacher."""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class ServerSettings:
    """A vLLM server that runs the teacher, for engine.kind=server."""

    model: str | None = None
    """Name under which the server serves the teacher; null: the only model that it serves."""
    key_variable: str | None = None
    """Environment variable that holds the server's API key; null: no key."""
    concurrency: int = 32
    """Maximum number of requests in flight; the server batches them."""
    patience_seconds: float = 600.0
    """How long to keep retrying when the server stops answering, for example while it is restarted."""

    def problems(self, section: str, url: str | None) -> Iterator[str]:
        """Yield one line for each problem, naming the key below `section`; `url`: the server's address."""
        if self.concurrency < 1:
            yield f"{section}.concurrency is {self.concurrency}: must be at least 1"
        if not 0.0 <= self.patience_seconds < float("inf"):
            yield f"{section}.patience_seconds is {self.patience_seconds:g}: must be 0 or more"
        if url is not None and not _is_address(url):
            yield f"engine.url is '{url}': expected an address such as http://gpu-host:8000"
        if self.key_variable is not None and not os.environ.get(self.key_variable):
            yield f"{section}.key_variable: the environment variable {self.key_variable} is not set"


def _is_address(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        plain = not (parts.query or parts.fragment) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and plain
