"""A plain web server on the loopback interface that records its requests."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class WebServer:
    """Serves a folder's files: no directory listings, with or without range requests; `sent`: bytes sent per file."""

    folder: Path
    ranges: bool = True
    url: str = ""
    gets: Counter[str] = field(default_factory=Counter)
    sent: Counter[str] = field(default_factory=Counter)


@contextmanager
def web_server(folder: Path, *, ranges: bool = True) -> Iterator[WebServer]:
    """Serve a folder."""
    about = WebServer(folder, ranges)

    def handler(*arguments: object) -> _Handler:
        return _Handler(about, *arguments)

    with serving(handler) as about.url:
        yield about


@contextmanager
def serving(handler: Callable[..., BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve requests on loopback in a thread; yield the address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class _Handler(SimpleHTTPRequestHandler):
    def __init__(self, about: WebServer, *arguments: object) -> None:
        self._about = about
        super().__init__(*arguments, directory=str(about.folder))  # type: ignore[arg-type]

    def do_GET(self) -> None:
        name = self.path.lstrip("/").partition("?")[0]
        file = self._about.folder / name
        if not file.is_file():
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        content, wanted = file.read_bytes(), self.headers.get("Range")
        self._about.gets[name] += 1
        if wanted and self._about.ranges:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            stop = int(last) + 1 if last else len(content)
            self.send_response(HTTPStatus.PARTIAL_CONTENT)
            self.send_header("Content-Range", f"bytes {first}-{stop - 1}/{len(content)}")
            content = content[int(first) : stop]
        else:
            self.send_response(HTTPStatus.OK)
        self._about.sent[name] += len(content)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def list_directory(self, path: object) -> None:
        self.send_error(HTTPStatus.NOT_FOUND)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass
