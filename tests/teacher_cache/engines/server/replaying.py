"""A server on the loopback interface that answers as a vLLM server did, and fails on demand.

`recorded.json` holds the replies of vLLM 0.32, serving `WRITTEN` (a tiny LLaVA), to the requests for `SAMPLES`, with
the two most likely ids of each token, and to some requests that it refused.
"""

from __future__ import annotations

import copy
import json
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from llavamod_offline.data.sample import Sample
from tests.tiny import tiny_samples, write_tiny_llava
from tests.web_server import serving

LISTED = 2
# vLLM 0.32's reply when it refuses.
DISABLED = (403, "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them.")
TOO_MANY_LISTED = (
    400,
    "Requested prompt logprobs of 64, which is greater than max allowed: 20 (parameter=prompt_logprobs, value=64)",
)
NOT_FINITE = (400, "Out of range float values are not JSON compliant")
RECORDED = Path(__file__).with_name("recorded.json")
SAMPLES = [tiny_samples(8, seed=3)[row] for row in (3, 4, 5, 7)]  # two without an image, one with one, one with two


def write_recorded_llava(folder: Path) -> Path:
    """The checkpoint that was served."""
    return write_tiny_llava(folder, hidden=128)


def samples() -> list[Sample]:
    """The samples that were scored."""
    return list(SAMPLES)


# What happens to a request for log-probs instead of the normal reply; True if it was answered.
Fault = Callable[[BaseHTTPRequestHandler], bool]


@dataclass
class ReplayServer:
    """The server's address, the requests it has received, and what goes wrong next."""

    url: str = ""
    faults: deque[Fault] = field(default_factory=deque)
    probe_faults: deque[Fault] = field(default_factory=deque)
    asked: Counter[str] = field(default_factory=Counter)
    keys: set[str | None] = field(default_factory=set)
    change: Callable[[dict[str, Any]], None] = lambda reply: None
    seconds: float = 0.0  # how long an answer takes
    most_at_once: int = 0
    now: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def status(number: int, body: Any = None, **headers: str) -> Fault:
    """Reply with a status."""

    def answer(handler: BaseHTTPRequestHandler) -> bool:
        _send(handler, number, body if body is not None else {"error": {"message": "went wrong"}}, headers)
        return True

    return answer


def refusal(number: int, message: str) -> Fault:
    """Refuse as vLLM does."""
    return status(number, {"error": {"message": message, "type": "BadRequestError", "param": None, "code": number}})


def hang_up(handler: BaseHTTPRequestHandler) -> bool:
    """Close the connection without a reply, as when the process is killed."""
    handler.close_connection = True
    return True


def cut_short(handler: BaseHTTPRequestHandler) -> bool:
    """Close the connection in the middle of a reply."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True
    return True


@contextmanager
def replaying() -> Iterator[ReplayServer]:
    """Serve the recorded replies."""
    recorded = json.loads(RECORDED.read_text())
    about = ReplayServer()

    replies = {_key(entry["path"], entry): entry for entry in recorded["replies"]}
    plain = {"/version": recorded["version"], "/v1/models": recorded["models"]}
    parts = {"server_state": about, "replies": replies, "plain": plain}
    with serving(type("Handler", (_Handler,), parts)) as about.url:
        yield about


def request_key(path: str, body: dict[str, Any]) -> str:
    """A request's key: its tokens, its number of images and how many ids it asks for."""
    prompt = body.get("prompt", body.get("token_ids"))
    listed = body.get("sampling_params", body)["prompt_logprobs"]
    return _key(path, {"prompt": prompt, "images": len(body.get("content_parts", [])), "listed": listed})


def _key(path: str, entry: dict[str, Any]) -> str:
    return json.dumps([path, entry["prompt"], entry["images"], entry["listed"]])


def _send(handler: BaseHTTPRequestHandler, number: int, body: Any, headers: dict[str, str] | None = None) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(number)
    for name, value in (headers or {}).items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # keeps connections open, like vLLM
    server_state: ReplayServer
    replies: dict[str, dict[str, Any]]
    plain: dict[str, Any]

    def do_GET(self) -> None:
        about = self.server_state
        about.keys.add(self.headers.get("Authorization"))
        found = self.plain.get(self.path)
        _send(self, 200 if found else 404, found or {"detail": "Not Found"})

    def do_POST(self) -> None:
        about = self.server_state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        about.keys.add(self.headers.get("Authorization"))
        probe = isinstance(body.get("prompt"), str)
        with about.lock:
            about.asked["probe" if probe else self.path] += 1
            faults = about.probe_faults if probe else about.faults
            fault = faults.popleft() if faults else None
            about.now += not probe
            about.most_at_once = max(about.most_at_once, about.now)
        try:
            time.sleep(0 if probe else about.seconds)
            if fault is None or not fault(self):
                self._answer(body)
        finally:
            with about.lock:
                about.now -= not probe

    def _answer(self, body: dict[str, Any]) -> None:
        entry = self.replies.get(request_key(self.path, body)) or self._of_fewer_ids(body)
        if entry is None:
            _send(self, 400, {"error": {"message": f"not recorded: {json.dumps(body)[:300]}"}})
            return
        reply = copy.deepcopy(entry["body"])
        if entry["status"] == 200:
            self.server_state.change(reply)
        _send(self, entry["status"], reply)

    def _of_fewer_ids(self, body: dict[str, Any]) -> dict[str, Any] | None:
        """The reply to a request for one id, derived from that for two."""
        wanted = {**body.get("sampling_params", body), "prompt_logprobs": LISTED}
        key = request_key(self.path, {**body, "sampling_params": wanted} if "sampling_params" in body else wanted)
        if key not in self.replies or body.get("sampling_params", body)["prompt_logprobs"] != 1:
            return None
        entry = copy.deepcopy(self.replies[key])
        reply = entry["body"]
        ids = reply.get("prompt_token_ids") or reply["choices"][0]["prompt_token_ids"]
        for token, row in zip(ids, reply.get("prompt_logprobs") or reply["choices"][0]["prompt_logprobs"], strict=True):
            for other in [name for name, value in (row or {}).items() if value["rank"] > 1 and name != str(token)]:
                del row[other]
        return entry

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass
