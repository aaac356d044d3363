"""The server: standard library only, this machine only, read only.

Who may ask: the socket is bound to 127.0.0.1; a request must name this very address as its host,
so that a page of another site cannot reach it through a name that it points here (DNS rebinding);
and it must bring the key that stands in the address that was printed, since other users of the
machine reach 127.0.0.1 too. What may be asked for: the list, and what is in it by its hash. No
part of an address is ever used as a path.
"""

import hmac
import json
import secrets
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from suanli.base.errors import BadInputError
from suanli.reports.html.markup import Element
from suanli.reports.html.page import asset, policy
from suanli.reports.ui import views
from suanli.reports.ui.listing import Entry, entries

_ADDRESS = "127.0.0.1"
_EVERY_S = 1.0  # between two looks at the files, at least
_SHARE = 0.04  # of one core that looking may take: a search beside it needs the processor
_ALIVE_S = 15.0  # between two signs of life, by which a closed page is noticed
_MOST_STREAMS = 24
_IDLE_S = 30.0  # a connection that says nothing for so long is closed

Parts = Callable[[], list[Element]]


class Server:
    """Shows a folder to who has its address. Made, it listens; `serve` answers until Ctrl-C.

    Args:
        folder: What is shown.
        port: 0 takes a free one.

    Raises:
        BadInputError: There is no such folder, or the port cannot be had.
    """

    def __init__(self, folder: Path, *, port: int = 0) -> None:
        if not folder.is_dir():
            raise BadInputError(f"there is no folder {folder}")
        if not 0 <= port <= 65535:
            raise BadInputError(f"--port must be from 0 to 65535, not {port}")
        self.folder = folder.resolve()
        self.key = secrets.token_urlsafe(24)
        self.ended = threading.Event()
        self.streams = threading.BoundedSemaphore(_MOST_STREAMS)
        owner = self

        class Handler(_Handler):
            server_of = owner

        try:
            self._http = ThreadingHTTPServer((_ADDRESS, port), Handler)
        except OSError as error:
            raise BadInputError(
                f"cannot listen on port {port}: {error.strerror}", next_step="give another --port"
            ) from None
        self._http.daemon_threads = True
        self.port = int(self._http.server_address[1])

    @property
    def url(self) -> str:
        """The address to open, with its key."""
        return f"http://{_ADDRESS}:{self.port}/?key={self.key}"

    @property
    def hosts(self) -> tuple[str, ...]:
        """What a request may call this server."""
        return (f"{_ADDRESS}:{self.port}", f"localhost:{self.port}")

    @property
    def cookie(self) -> str:
        """Name of the cookie: browsers keep them by machine, not by port."""
        return f"suanli-{self.port}"

    def serve(self) -> None:
        """Answer until Ctrl-C or `close`."""
        try:
            self._http.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            pass
        finally:
            self.ended.set()

    def close(self) -> None:
        """End it; open streams notice within a second."""
        self.ended.set()
        self._http.shutdown()
        self._http.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._http.server_close()

    def entry(self, ident: str) -> Entry | None:
        """What is called so; None where nothing is."""
        return next((one for one in entries(self.folder) if one.ident == ident), None)


class _Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    server_of: Server
    timeout = _IDLE_S
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "suanli", ""

    def do_GET(self) -> None:
        """The only kind of request there is."""
        owner, url = self.server_of, urlsplit(self.path)
        if self.headers.get("Host", "") not in owner.hosts:
            self._refuse(HTTPStatus.FORBIDDEN, "This server has another address.")
        elif given := parse_qs(url.query).get("key"):
            self._enter(given[0])
        elif not self._known():
            words = "Open the address that `suanli ui` printed: it holds the key."
            self._refuse(HTTPStatus.FORBIDDEN, words)
        else:
            try:
                self._answer(url.path)
            except OSError:
                self.close_connection = True  # the page was closed, or a file went meanwhile

    def _answer(self, path: str) -> None:
        owner = self.server_of
        kind, _, ident = path.removeprefix("/").partition("/")
        if path == "/":
            self._page("Results · suanli", lambda: views.list_parts(owner.folder), "/live")
        elif path == "/live":
            self._stream(lambda: views.list_parts(owner.folder))
        elif kind in ("result", "live") and (entry := owner.entry(ident)) is not None:
            if kind == "live":
                self._stream(lambda: views.result_parts(owner.entry(ident) or entry))
            else:
                title = f"{entry.name} · suanli"
                self._page(title, lambda: views.result_parts(entry), f"/live/{ident}")
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "There is nothing of this name.")

    def _enter(self, key: str) -> None:
        """Trade the key in an address for a cookie, so that it stays in no history."""
        if not hmac.compare_digest(key.encode(), self.server_of.key.encode()):
            self._refuse(HTTPStatus.FORBIDDEN, "This is not the key of this server.")
            return
        self.send_response(HTTPStatus.SEE_OTHER)
        cookie = f"{self.server_of.cookie}={self.server_of.key}"
        self.send_header("Set-Cookie", f"{cookie}; HttpOnly; SameSite=Strict; Path=/")
        self.send_header("Location", "/")
        self._end(b"")

    def _known(self) -> bool:
        wanted = f"{self.server_of.cookie}={self.server_of.key}".encode()
        given = self.headers.get("Cookie", "").split(";")
        return any(hmac.compare_digest(one.strip().encode(), wanted) for one in given)

    def _page(self, title: str, parts: Parts, stream: str) -> None:
        content = views.page(title, parts(), stream).encode()
        style = asset("page.css")
        rules = policy(asset("page.js"), views.asset_of_ui(), style=style, live=True)
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Security-Policy", f"{rules}; frame-ancestors 'none'")
        self._end(content)

    def _refuse(self, status: HTTPStatus, words: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self._end(words.encode() + b"\n")

    def _end(self, content: bytes) -> None:
        self._common_headers()
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _common_headers(self) -> None:
        for name, value in (
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Cross-Origin-Opener-Policy", "same-origin"),
        ):
            self.send_header(name, value)

    def _stream(self, parts: Parts) -> None:
        """Send the parts now, and again whenever they have become others."""
        owner = self.server_of
        if not owner.streams.acquire(blocking=False):
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "Too many pages listen already.")
            return
        self.close_connection = True
        try:
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", "text/event-stream")
            self._common_headers()
            self.end_headers()
            last, said = "", time.monotonic()
            while not owner.ended.is_set():
                began = time.thread_time()
                now = json.dumps([str(part) for part in parts()])
                if now != last:
                    self._send(f"event: parts\ndata: {now}\n\n")
                    last, said = now, time.monotonic()
                elif time.monotonic() - said > _ALIVE_S:
                    self._send(": still here\n\n")
                    said = time.monotonic()
                owner.ended.wait(max(_EVERY_S, (time.thread_time() - began) / _SHARE))
            self._send("event: end\ndata: 0\n\n")
        except OSError:
            pass  # the page was closed
        finally:
            owner.streams.release()

    def _send(self, text: str) -> None:
        self.wfile.write(text.encode())
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: standard error is the person's."""
