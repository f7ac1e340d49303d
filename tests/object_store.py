"""An S3 server on the loopback interface: moto, in a process of its own."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

_PATIENCE_SECONDS = 300.0
_PORTS = 5


@contextmanager
def object_store() -> Iterator[dict[str, str]]:
    """Run the server; yield the environment variables that point every S3 client at it."""
    endpoint, process = _started()
    with process:
        try:
            yield {
                "AWS_ENDPOINT_URL": endpoint,
                "AWS_ACCESS_KEY_ID": "test",
                "AWS_SECRET_ACCESS_KEY": "test",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
                "AWS_MAX_ATTEMPTS": "1",
            }
        finally:
            process.kill()


def _started() -> tuple[str, subprocess.Popen[bytes]]:
    """Start the server at a free port, or at another one if something else takes that first."""
    for _ in range(_PORTS):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        endpoint = f"http://127.0.0.1:{port}"
        if _answers(endpoint, process):
            return endpoint, process
        with process:
            process.kill()
    raise RuntimeError("the object store did not start")


def _answers(endpoint: str, process: subprocess.Popen[bytes]) -> bool:
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(f"{endpoint}/moto-api/data.json", timeout=_PATIENCE_SECONDS):
                return True
        except OSError:
            time.sleep(0.05)
    return False
