"""HTTP/1.1 with keep-alive on the standard library: reads requests whole, applies the fault rules, sends answers."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from email.message import Message
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, BinaryIO, Protocol, cast
from urllib.parse import parse_qs, urlsplit

from tests.hub_server.answers import Answer, Refusal
from tests.hub_server.faults import Faults, Logged, Origin, damaged

CHUNK = 1 << 20


class Request:
    """One request. `path` is as it came (still quoted), `query` maps names to lists of values."""

    def __init__(self, method: str, target: str, headers: Message, stream: BinaryIO) -> None:
        parts = urlsplit(target)
        self.method, self.target, self.path, self.headers = method, target, parts.path, headers
        self.raw_query = parts.query
        self.query = parse_qs(parts.query, keep_blank_values=True)
        self._stream, self._rest = stream, int(headers.get("Content-Length") or 0)
        self._chunked = headers.get("Transfer-Encoding", "").lower() == "chunked"

    def flag(self, name: str) -> bool:
        """Whether the query says yes to `name` (1 or true in any case)."""
        return self.query.get(name, [""])[-1].lower() in ("1", "true")

    def chunks(self) -> Iterator[bytes]:
        """The body piece by piece; what was read once does not come again. ConnectionError when it ends early."""
        while self._rest or self._chunked:
            if not self._rest:
                self._rest = int(self._stream.readline().split(b";")[0] or b"0", 16)
                if not self._rest:
                    self._chunked = False
                    self._stream.readline()
                    return
            chunk = self._stream.read(min(self._rest, CHUNK))
            if not chunk:
                self._rest, self._chunked = 0, False
                raise ConnectionError("the client went away in the middle of a body")
            self._rest -= len(chunk)
            if self._chunked and not self._rest:
                self._stream.readline()
            yield chunk

    @cached_property
    def body(self) -> bytes:
        """The whole body."""
        return b"".join(self.chunks())

    @property
    def json(self) -> dict[str, Any]:
        """The body as a JSON object; Refusal 400 when it is none."""
        try:
            value = json.loads(self.body or b"{}")
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise Refusal(400, "the body must be a JSON object")
        return value

    @property
    def form(self) -> dict[str, list[str]]:
        """The body as a form (or the same as JSON), names to lists of values."""
        if "json" not in self.headers.get("Content-Type", ""):
            return parse_qs(self.body.decode(), keep_blank_values=True)
        return {
            name: [str(v) for v in (value if isinstance(value, list) else [value])] for name, value in self.json.items()
        }

    def span(self, size: int) -> tuple[int, int] | None:
        """First and last+1 byte of a `Range: bytes=A-[B]` or `bytes=-N` header, None without one; Refusal 416."""
        value = self.headers.get("Range", "")
        if not value.startswith("bytes=") or "," in value:
            return None
        first, _, last = value.removeprefix("bytes=").partition("-")
        start = int(first) if first else max(0, size - int(last))
        stop = min(size, int(last) + 1) if first and last else size
        if start >= stop:
            raise Refusal(416, "Range Not Satisfiable", headers={"Content-Range": f"bytes */{size}"})
        return start, stop


class Owner(Protocol):
    """What a listener needs of the server that it belongs to."""

    faults: Faults
    log: list[Logged]
    errors: list[str]


class Listener:
    """A threaded server on a port of 127.0.0.1 that gives every request to `respond`."""

    def __init__(self, origin: Origin, port: int, respond: Callable[[Request], Answer], owner: Owner) -> None:
        self.origin, self.respond, self.owner = origin, respond, owner
        self.connections: set[socket.socket] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), _Handler, bind_and_activate=False)
        self._server.daemon_threads = True
        self._server.request_queue_size = 64
        self._server.server_bind()
        self._server.server_activate()
        self._server.listener = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Close the port and all connections, kept-alive ones too."""
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self.connections):
            hang_up(connection)


def hang_up(connection: socket.socket) -> None:
    """End a connection, whoever is reading or writing it."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16

    def handle(self) -> None:
        connections = self.server.listener.connections  # type: ignore[attr-defined]
        connections.add(self.connection)
        try:
            super().handle()
        except OSError:
            # A client that went away in the middle of an answer is no event for a server.
            self.close_connection = True
        finally:
            connections.discard(self.connection)

    def finish(self) -> None:
        with contextlib.suppress(OSError):  # what was not flushed to a closed connection
            super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on standard error: the log holds the requests."""

    def _serve(self) -> None:
        listener: Listener = self.server.listener  # type: ignore[attr-defined]
        request = Request(self.command, self.path, self.headers, cast(BinaryIO, self.rfile))
        rules = listener.owner.faults.before_answer(self.command, self.path, listener.origin)
        for rule in rules:
            time.sleep(rule.delay)
            if rule.before is not None:
                rule.before()
        answer = next((rule.answer for rule in rules if rule.answer is not None), None)
        if answer is None:
            answer = self._respond(listener, request)
        for _ in request.chunks():
            pass  # the next request on this connection starts after this one's body
        dropped = any(rule.drop for rule in rules)
        query = request.raw_query.split("X-Signature=")[0].rstrip("&")
        listener.owner.log.append(
            Logged(
                self.command,
                request.path,
                query,
                0 if dropped else answer.status,
                "Authorization" in self.headers,
                listener.origin,
                self.headers.get("Range"),
            )
        )
        if dropped:
            self._hang_up()
        else:
            self._send(listener, answer)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _respond(self, listener: Listener, request: Request) -> Answer:
        try:
            return listener.respond(request)
        except Refusal as refusal:
            return refusal.answer()
        except ConnectionError:
            raise  # the client went away
        except Exception as error:  # noqa: BLE001 -- a mistake in this server must be seen in the test that met it
            listener.owner.errors.append(traceback.format_exc())
            return Refusal(500, f"mistake in the test server: {error!r}").answer()

    def _send(self, listener: Listener, answer: Answer) -> None:
        head = self.command == "HEAD"
        rules = [] if head else listener.owner.faults.on_body(self.command, self.path, listener.origin, answer)
        cut = min((rule.cut_after for rule in rules if rule.cut_after is not None), default=None)
        answer = damaged(answer, rules)
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        if "Content-Length" not in answer.headers:
            self.send_header("Content-Length", str(answer.length))
        self.end_headers()
        if not head:
            self._send_body(answer, answer.length if cut is None else cut)
        self.wfile.flush()
        if cut is not None:
            self._hang_up()

    def _send_body(self, answer: Answer, length: int) -> None:
        if isinstance(answer.body, bytes):
            self.wfile.write(answer.body[answer.start : answer.start + length])
            return
        with answer.body.open("rb") as file:
            file.seek(answer.start)
            while length > 0 and (chunk := file.read(min(length, CHUNK))):
                self.wfile.write(chunk)
                length -= len(chunk)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        hang_up(self.connection)
