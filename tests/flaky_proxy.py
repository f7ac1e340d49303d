"""A proxy on the loopback interface that fails as networks do: it goes away for a while and cuts replies short."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_PIECE = 4096


class FlakyProxy:
    """Forwards connections to a port. `cut`: how many replies were cut short; `outages`: how often it went away."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._lock = threading.Lock()
        self._open: list[socket.socket] = []
        self._to_cut = 0
        self.cut = 0
        self.outages = 0
        self._listener = self._listen(0)
        self.port = int(self._listener.getsockname()[1])

    def cut_replies(self, count: int) -> None:
        """Cut the next `count` connections whose replies are longer than one piece, in the middle of a reply."""
        self._to_cut = count

    def go_away(self, seconds: float | None) -> None:
        """End all connections and accept no more, for a while or (None) for good."""
        self.outages += 1
        # Closing a listener does not end it while a thread is waiting in `accept`.
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for connection in self._open:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            self._open.clear()
        if seconds is not None:
            time.sleep(seconds)
            self._listener = self._listen(self.port)

    def _listen(self, port: int) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", port), reuse_port=False)
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()
        return listener

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                client.close()
                continue
            with self._lock:
                self._open += [client, server]
            for source, sink, is_reply in ((client, server, False), (server, client, True)):
                threading.Thread(target=self._pass_on, args=(source, sink, is_reply), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, is_reply: bool) -> None:
        with suppress(OSError):
            while piece := source.recv(_PIECE):
                if is_reply and len(piece) == _PIECE and self._take_cut():
                    sink.sendall(piece[: _PIECE // 2])
                    break
                sink.sendall(piece)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def _take_cut(self) -> bool:
        with self._lock:
            if not self._to_cut:
                return False
            self._to_cut -= 1
            self.cut += 1
            return True


@contextmanager
def flaky_proxy(target: int) -> Iterator[FlakyProxy]:
    """Run a proxy in front of a port."""
    proxy = FlakyProxy(target)
    try:
        yield proxy
    finally:
        proxy.go_away(None)
