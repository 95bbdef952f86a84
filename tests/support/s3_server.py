"""An S3 server in this process, which counts its requests and can be made to fail as real stores do."""

import itertools
import logging
import socket
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, unquote

from moto.moto_server.threaded_moto_server import MotoRequestHandler
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server


@dataclass(frozen=True)
class Refusal:
    """What is answered for all of a bucket, or for what would change it."""

    status: str
    code: str
    message: str
    writes_only: bool = False

    @property
    def body(self) -> bytes:
        return f"<?xml version='1.0'?><Error><Code>{self.code}</Code><Message>{self.message}</Message></Error>".encode()


REFUSED = {
    "ddpm-forbidden": Refusal("403 Forbidden", "AccessDenied", "Access Denied"),
    "ddpm-read-only": Refusal("403 Forbidden", "AccessDenied", "Access Denied", writes_only=True),
    "ddpm-elsewhere": Refusal(
        "400 Bad Request",
        "AuthorizationHeaderMalformed",
        "The authorization header is malformed; the region 'us-east-1' is wrong; expecting 'eu-west-1'",
    ),
}
SLOW_DOWN = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Reduce your request rate.</Message></Error>"


class S3Server:
    """moto's application behind faults. every: one in so many requests meets one, 0 for none. requests: counted by what they
    are; faults: by what was done to them. written: hook, called with the key of each object that was put."""

    def __init__(self, port: int) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.every = 0
        self.requests, self.faults = Counter[str](), Counter[str]()
        self.seconds = 0.0  # in which any request was answered
        self.written: Callable[[str], None] = lambda key: None
        self._numbers = itertools.count(1)
        self._listings: dict[str, list[bytes]] = {}
        self._application = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", port, self, threaded=True, request_handler=MotoRequestHandler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        kind = kind_of(environ)
        self.requests[kind] += 1
        begun = time.monotonic()
        try:
            return self._answer(kind, environ, start_response)
        finally:
            self.seconds += time.monotonic() - begun

    def _answer(self, kind: str, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        refusal = REFUSED.get(environ["PATH_INFO"].split("/")[1])
        if refusal is not None and not (refusal.writes_only and kind in ("GET", "HEAD", "LIST")):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(refusal.status, [("Content-Type", "application/xml")])
            return [] if kind == "HEAD" else [refusal.body]
        number = next(self._numbers)
        if not self.every or number % self.every:
            return self._serve(kind, environ, start_response)
        faults = {"GET": ["refuse", "wait", "cut within"], "LIST": ["refuse", "wait", "stale"]}.get(
            kind, ["refuse", "wait", "cut before", "cut after"]
        )
        fault = faults[zlib.crc32(f"{number}".encode()) % len(faults)]
        self.faults[fault] += 1
        if fault in ("refuse", "cut before"):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        if fault == "refuse":
            start_response("503 Slow Down", [("Content-Type", "application/xml")])
            return [] if kind == "HEAD" else [SLOW_DOWN]
        if fault == "wait":
            time.sleep(0.2)
            return self._serve(kind, environ, start_response)
        if fault == "stale":  # what the same question was answered before
            start_response("200 OK", [("Content-Type", "application/xml")])
            return self._listings.get(environ["RAW_URI"]) or self._serve(kind, environ, lambda *_: None)
        answer: list[bytes] = []
        if fault == "cut within":  # the header has promised the whole
            answer = self._serve(kind, environ, start_response)
        else:
            if fault == "cut after":  # it is done, and the client does not hear of it
                self._serve(kind, environ, lambda *_: None)
            start_response("200 OK", [])
        return cut_off(b"".join(answer), environ["werkzeug.socket"])

    def _serve(self, kind: str, environ: dict[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        answer = list(self._application(environ, start_response))
        if kind == "LIST":
            self._listings[environ["RAW_URI"]] = answer
        if kind == "PUT":
            self.written(unquote(environ["PATH_INFO"]))
        return answer


def cut_off(answer: bytes, connection: socket.socket) -> Iterable[bytes]:
    """Half of an answer."""
    if answer:
        yield answer[: len(answer) // 2]
    connection.shutdown(socket.SHUT_RDWR)
    raise ConnectionResetError


def kind_of(environ: dict[str, Any]) -> str:
    """GET, PUT, .. for objects, LIST, and the parts of an upload as PUT."""
    method, query = environ["REQUEST_METHOD"], parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True)
    return "LIST" if method == "GET" and "list-type" in query else str(method)
