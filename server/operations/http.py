"""A small HTTP/1.1 server: GET and HEAD of a few paths.

It has a thread and an event loop of its own, so that no scrape stands in the loop that answers RPCs, and a probe is
answered while that one is busy. Connections are kept open, since a router asks twenty times a second, and bounded in
number, in the size of a request and in time.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import threading
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import TypeAlias

PLAIN = "text/plain; charset=utf-8"
_MAX_HEAD_BYTES = 16 << 10
_MAX_CONNECTIONS = 64
_IDLE_S = 60.0  # that a connection may stay open between two requests, and a request's head may take
_WRITE_S = 10.0  # that a client may take to read an answer
_METHODS = ("GET", "HEAD")

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Request:
    """A GET or HEAD; names of headers are in lower case."""

    path: str  # without its query
    headers: tuple[tuple[str, str], ...]
    peer: str  # the address that it comes from

    def header(self, name: str) -> str:
        """The first of that name, or nothing."""
        return next((value for key, value in self.headers if key == name), "")


@dataclass(frozen=True, slots=True)
class Response:
    body: bytes
    status: HTTPStatus = HTTPStatus.OK
    content_type: str = PLAIN
    headers: tuple[tuple[str, str], ...] = ()


Handler: TypeAlias = Callable[[Request], Awaitable[Response]]


def text(status: HTTPStatus, message: str, *headers: tuple[str, str]) -> Response:
    return Response(f"{message}\n".encode(), status, headers=headers)


class HttpServer:
    """Listens at once: raises OSError when the address cannot be had. `close` ends the thread."""

    def __init__(self, host: str, port: int, routes: Mapping[str, Handler]) -> None:
        self._routes = routes
        self._socket = _listening(host, port)
        self.port: int = self._socket.getsockname()[1]
        self._num_open = 0
        self._stop = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Blocks until the thread has ended, which takes no longer than the answer that is being made."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._connected, sock=self._socket, limit=_MAX_HEAD_BYTES)
        try:
            await self._stop.wait()
        finally:
            server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._num_open += 1
        try:
            if self._num_open <= _MAX_CONNECTIONS:
                while await self._exchange(reader, writer):
                    pass
        except (OSError, EOFError, TimeoutError):
            pass  # it went away, or is too slow
        finally:
            self._num_open -= 1
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer; whether another may follow on the connection."""
        try:
            async with asyncio.timeout(_IDLE_S):
                head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            await _send(writer, text(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "the headers are too long"), "GET")
            return False
        method, request = _parsed(head, writer)
        if request is None:
            await _send(writer, text(HTTPStatus.BAD_REQUEST, "this is no request that is understood here"), "GET")
            return False
        await _send(writer, await self._answer(method, request), method)
        return request.header("connection").lower() != "close"

    async def _answer(self, method: str, request: Request) -> Response:
        if method not in _METHODS:
            return text(HTTPStatus.METHOD_NOT_ALLOWED, "only GET is understood", ("Allow", ", ".join(_METHODS)))
        handler = self._routes.get(request.path)
        if handler is None:
            return text(HTTPStatus.NOT_FOUND, f"there is {', '.join(self._routes)}")
        try:
            return await handler(request)
        except Exception:  # noqa: BLE001 - a scrape that fails must not end the connection of others
            _log.exception("GET %s failed", request.path)
            return text(HTTPStatus.INTERNAL_SERVER_ERROR, "failed; the server's log has the cause")


def _listening(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listening = socket.socket(family, kind, protocol)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what waits in TIME_WAIT does not listen
        listening.bind(address)
        listening.listen()
    except OSError:
        listening.close()
        raise
    return listening


def _parsed(head: bytes, writer: asyncio.StreamWriter) -> tuple[str, Request | None]:
    """Method and request; None for what is no HTTP/1.1 request without a body."""
    first, *lines = head.decode("latin-1").split("\r\n")[:-2]
    parts = first.split(" ")
    if len(parts) != 3 or not parts[1].startswith("/") or parts[2] not in ("HTTP/1.1", "HTTP/1.0"):
        return "", None
    pairs = [line.partition(":") for line in lines]
    if any(not mark or not name or name != name.strip() for name, mark, _ in pairs):
        return "", None
    headers = tuple((name.lower(), value.strip()) for name, _, value in pairs)
    if parts[2] == "HTTP/1.0":
        headers = (("connection", "close"), *headers)
    has_body = any(
        name == "transfer-encoding" or (name == "content-length" and value != "0") for name, value in headers
    )
    peer = writer.get_extra_info("peername")
    return parts[0], None if has_body else Request(parts[1].partition("?")[0], headers, str(peer[0]) if peer else "")


async def _send(writer: asyncio.StreamWriter, response: Response, method: str) -> None:
    status = response.status
    fields = (
        ("Content-Type", response.content_type),
        ("Content-Length", str(len(response.body))),
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
        *response.headers,
    )
    head = "".join(f"{name}: {value}\r\n" for name, value in fields)
    writer.write(f"HTTP/1.1 {status.value} {status.phrase}\r\n{head}\r\n".encode("latin-1"))
    if method != "HEAD":
        writer.write(response.body)
    async with asyncio.timeout(_WRITE_S):
        await writer.drain()
