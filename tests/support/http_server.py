"""An HTTP server in this process, which answers as a test says and keeps what it was asked."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Request:
    """What the server was asked."""

    path: str
    body: bytes
    content_type: str | None


@dataclass
class HttpServer:
    """A running server, by its address."""

    uri: str
    requests: list[Request] = field(default_factory=list)


@contextlib.contextmanager
def http_server(status: Callable[[str], int]) -> Iterator[HttpServer]:
    """A server whose answer to a path has the status that `status` returns; a redirection is to /elsewhere."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            running.requests.append(Request(self.path, body, self.headers.get("Content-Type")))
            self.send_response(status(self.path))
            self.send_header("Location", "/elsewhere")
            self.end_headers()
            self.wfile.write(b"no")

        do_GET = do_POST = answer

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing on the terminal."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        running = HttpServer(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield running
        finally:
            server.shutdown()
            thread.join()
