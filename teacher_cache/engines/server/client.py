"""Requests to a server from a thread of their own: several at once, retried while the server is unreachable or busy."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import time
from concurrent.futures import Future
from typing import Any

import httpx

from llavamod_offline.errors import ModelError, first_line
from llavamod_offline.plural import counted
from teacher_cache.engines.server.settings import ServerSettings

_LOG = logging.getLogger(__name__)
logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every request
_CONNECT_SECONDS = 10.0
_REPLY_SECONDS = 600.0  # of silence: a host that was switched off never closes its connections
_FIRST_WAIT, _LONGEST_WAIT = 0.25, 15.0
_FAILURES = 6  # internal errors on one request, before the request counts as the cause
_OF_A_PROXY = (502, 503, 504)
_BUSY = (408, 425, 429, *_OF_A_PROXY)  # the sender could not reach the model, or had no capacity
_SHOWN = 300


class ServerRefusedError(ModelError):
    """The server refuses a request; `reason`: in its own words."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class ServerClient:
    """Talks to the server at `url` (with or without `/v1` at its end); a context manager that leaves nothing open.

    After a connection error or busy reply, a request is retried with growing pauses until `patience` seconds after its
    first failure; it fails at its sixth internal error (500). Errors of all requests: `ModelError` that names the
    address and says what to do; at once, as `ServerRefusedError`, for a reply that refuses the request.
    """

    def __init__(self, url: str, settings: ServerSettings, *, patience: float | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1").rstrip("/")
        self._settings = settings
        self._patience = settings.patience_seconds if patience is None else patience
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="server", daemon=True)
        self._away = False  # whether the server has failed to answer, and has not answered since
        self._gone = False  # the same, if another server may answer next
        self.outages = 0  # connections lost so far

    def __enter__(self) -> ServerClient:
        variable, most = self._settings.key_variable, self._settings.concurrency
        self._http = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {os.environ[variable]}"} if variable else {},
            timeout=httpx.Timeout(_REPLY_SECONDS, connect=_CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=most, max_keepalive_connections=most),
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._leave(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _leave(self) -> None:
        """Cancel what is in flight."""
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._http.aclose()

    def post(self, path: str, body: dict[str, Any], about: str) -> Future[bytes]:
        """Send a request; gives the reply's content. `about`: what the request is for, in errors."""
        content = json.dumps(body).encode()
        return asyncio.run_coroutine_threadsafe(self._send("POST", path, content, about), self._loop)

    def get(self, path: str, about: str) -> bytes:
        """Request something small, and wait for it."""
        return asyncio.run_coroutine_threadsafe(self._send("GET", path, None, about), self._loop).result()

    async def _send(self, method: str, path: str, content: bytes | None, about: str) -> bytes:
        failing_since: float | None = None
        failures, pause = 0, _FIRST_WAIT
        headers = {"Content-Type": "application/json"} if content else {}
        while True:
            asked = 0.0
            try:
                response = await self._http.request(method, f"{self.url}{path}", content=content, headers=headers)
            except httpx.RequestError as error:
                problem = f"no answer ({_reason(error)})"
                self._lost()
            else:
                if response.status_code == httpx.codes.OK:
                    self._answered()
                    return response.content
                problem = f"{response.status_code}: {_message(response)}"
                if response.status_code in _OF_A_PROXY:  # behind which another server may answer next
                    self._lost()
                failures += response.status_code >= 500 and response.status_code not in _BUSY
                if response.status_code < 500 and response.status_code not in _BUSY:
                    raise ServerRefusedError(f"{self.url}: {about} was refused: {problem}", _message(response))
                if failures >= _FAILURES:
                    raise ModelError(f"{self.url}: {about} failed {failures} times: {problem}: read the server's log")
                asked = _seconds(response.headers.get("Retry-After"))
            now = time.monotonic()
            failing_since = now if failing_since is None else failing_since
            left = failing_since + self._patience - now
            if left <= 0:
                raise ModelError(
                    f"{self.url}: {about}: {problem}, for {counted(round(self._patience), 'second')}: start the "
                    "server, or correct engine.url, and run the command again"
                )
            self._failed(problem)
            await asyncio.sleep(min(max(pause, asked), left))
            pause = min(2 * pause, _LONGEST_WAIT)

    def _lost(self) -> None:
        """Count one outage until the server answers again."""
        self.outages += not self._gone
        self._gone = True

    def _failed(self, problem: str) -> None:
        if not self._away:
            self._away = True
            _LOG.warning("%s: %s: trying again for up to %.0f s", self.url, problem, self._patience)

    def _answered(self) -> None:
        self._gone = False
        if self._away:
            self._away = False
            _LOG.warning("%s answers again", self.url)


def _reason(error: httpx.RequestError) -> str:
    """What went wrong with a connection; httpx gives some errors no text."""
    return first_line(error)[:_SHOWN]


def _message(response: httpx.Response) -> str:
    """The server's own words in an error reply, on one line."""
    try:
        body = response.json()
        error = body.get("error", body)
        text = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        text = response.text
    return " ".join(str(text).split())[:_SHOWN] or response.reason_phrase


def _seconds(value: str | None) -> float:
    """How long a busy server asks to wait; 0 if it does not say so in seconds."""
    try:
        return min(max(float(value or 0), 0.0), 60.0)
    except ValueError:
        return 0.0
