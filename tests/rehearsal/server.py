"""An HTTP server for one repository, which misbehaves on order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Answer = Callable[[str], int | None]
"""Path of a request → the status to refuse it with, or None to serve it."""


class RepositoryServer:
    """Serves a folder at 127.0.0.1, on a port of its own that stays the same over `stop` and `start`.

    folder    what is served; may be replaced at any time.
    answer    asked before each request.
    requests  paths of all requests, in order, with the status of the answer.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.folder = folder
        self.answer: Answer = lambda _: None
        self.requests: list[tuple[str, int]] = []
        self._port = 0
        self._server: ThreadingHTTPServer | None = None
        self.start()

    @property
    def uri(self) -> str:
        """Where the repository is."""
        return f"http://127.0.0.1:{self._port}/{self.name}"

    def start(self) -> None:
        """Begin to listen."""
        repository = self

        class Handler(SimpleHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def send_head(self) -> Any:
                # Somebody who kept a connection open over `stop` finds it closed.
                if repository._server is not self.server:
                    self.close_connection = True
                    return None
                status = repository.answer(self.path)
                if status is None:
                    return super().send_head()
                self.send_error(status)
                return None

            def translate_path(self, path: str) -> str:
                # super() makes it one below the folder, whatever dots are in it.
                self.directory = str(repository.folder)
                return super().translate_path(path.removeprefix(f"/{repository.name}"))

            def log_request(self, code: Any = "-", size: Any = "-") -> None:
                repository.requests.append((self.path, int(code)))

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that goes away in the middle of a file is no error of the server."""

        self._server = Server(("127.0.0.1", self._port), Handler)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Listen no more: connections are refused."""
        if self._server is not None:
            server, self._server = self._server, None
            server.shutdown()
            server.server_close()
