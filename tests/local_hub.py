"""A small Hub on this machine: a server that a handler answers for, and the surroundings of a process that asks it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TypeVar

Hub = TypeVar("Hub")


class Answers(BaseHTTPRequestHandler):
    """Answers silently; what it knows of the Hub is `self.server.hub`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Keep silent."""

    def send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, text in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def serving(handler: type[Answers], make: Callable[[str], Hub]) -> Iterator[Hub]:
    """Serve on 127.0.0.1 what is made for the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    found = make(f"http://127.0.0.1:{server.server_address[1]}")
    server.hub = found  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


def surroundings(endpoint: str, home: Path) -> dict[str, str]:
    """Give the environment of a process that knows this Hub and no other, with a cache of its own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    settings = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }
    return {**kept, **settings}
