"""A vLLM server on the loopback interface that can be killed and restarted at the same address."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from llavamod_offline.vllm.overrides import config_overrides
from llavamod_offline.vllm.plugin import PREFIX

_ROOT = Path(__file__).parents[2]
_ENVIRONMENT = {
    "PYTHONPATH": str(_ROOT),
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
}


class VllmServer:
    """Serves a folder with the variant of its architecture that loads transformers 5 checkpoints; `log`: its output."""

    def __init__(self, folder: Path, log: Path, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.port}"
        (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
        named_so = {"architectures": [f"{PREFIX}{architecture}"], "head_dtype": "float32"}
        changed = named_so | config_overrides(folder)
        named = ["--model", str(folder), "--served-model-name", "teacher", "--host", "127.0.0.1"]
        sized = ["--port", str(self.port), "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8"]
        more = ["--enforce-eager", "--enable-scale-out", "--max-logprobs", "-1", "--hf-overrides", json.dumps(changed)]
        module = "vllm.entrypoints.openai.api_server"
        self._command = [sys.executable, "-m", module, *named, *sized, *more, *options]
        self._log = log
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server; it answers once `wait` has returned."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command, env=os.environ | _ENVIRONMENT, stdout=log, stderr=log, start_new_session=True
            )

    def wait(self) -> None:
        """Wait until the server answers."""
        assert self._process is not None
        while True:
            assert self._process.poll() is None, self._log.read_text()[-3000:]
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)

    def kill(self) -> None:
        """Kill the server at once, with the processes that it has started."""
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
