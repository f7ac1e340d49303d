"""Runs code that starts a Ray cluster in a process of its own; nothing of the cluster may stay behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).parents[2]
_PATIENT = {  # on a busy machine
    "RAY_agent_register_timeout_ms": "600000",
    "RAY_raylet_start_wait_time_s": "600",
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_worker_niceness": "0",  # Ray's default of 15 would starve its workers beside other tests
}


def in_a_process(code: str, *arguments: str, address: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run the code to its end, and check that no process of its cluster stays behind."""
    mark = uuid.uuid4().hex
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | _PATIENT
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MARK": mark}
    environment |= {"RAY_ADDRESS": address} if address else {}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    deadline = time.monotonic() + 300
    while (left := _marked(mark)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    return done


def _marked(mark: str) -> list[str]:
    """The processes whose environment contains `mark`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:  # not ours, or gone
            continue
    return found
