"""The rating page served to one person's browser: on loopback only, every request with the token of its address."""

from __future__ import annotations

import errno
import json
import secrets
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from rlhf_kit.feedback import FeedbackError

from .session import Session

STATIC = Path(__file__).parent / "static"
LOOPBACK = ("127.0.0.1", "localhost")
MOST_BYTES = 64 * 1024  # of a request: an answer with a long note is a tenth of it
FILES = {  # all that there is: no path of a request ever reaches the file system
    "": ("served.html", "text/html; charset=utf-8"),
    "served.js": ("served.js", "text/javascript; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
    "page.css": ("page.css", "text/css; charset=utf-8"),
}
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Page(ThreadingHTTPServer):
    """The page of a session at `address`; port 0 takes a free one. FeedbackError if the port is taken."""

    daemon_threads = True

    def __init__(self, session: Session, port: int = 0) -> None:
        self.session = session
        self.token = secrets.token_urlsafe(24)
        try:
            super().__init__(("127.0.0.1", port), _Request)
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            why = "is taken" if error.errno == errno.EADDRINUSE else "may not be used"
            raise FeedbackError(f"port {port} {why}; name another with --port, or leave it out") from None
        except OverflowError:
            raise FeedbackError(f"port {port}: ports go from 0 to 65535") from None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that leaves in the middle is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Request(BaseHTTPRequestHandler):
    server: Page
    server_version, sys_version = "rlhf-kit", ""
    timeout = 30  # seconds that a connection may say nothing

    def do_GET(self) -> None:
        name = self._allowed()
        if name is None:
            return
        if name == "state":
            self._json(self.server.session.state())
        elif name in FILES:
            file, kind = FILES[name]
            self._send(HTTPStatus.OK, kind, (STATIC / file).read_bytes())
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such page")

    def do_POST(self) -> None:
        name = self._allowed()
        if name is None:
            return
        length = self.headers.get("Content-Length", "")
        if name != "act":
            self._refuse(HTTPStatus.NOT_FOUND, "there is no such page")
        elif self.headers.get_content_type() != "application/json":
            self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "an action is sent as application/json")
        elif not (length.isascii() and length.isdigit()):
            self._refuse(HTTPStatus.LENGTH_REQUIRED, "an action says its length")
        elif len(length) > 9 or int(length) > MOST_BYTES:
            self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"an action has at most {MOST_BYTES} bytes")
        else:
            self._act(self.rfile.read(int(length)))

    def _act(self, body: bytes) -> None:
        try:
            message = json.loads(body)
        except (ValueError, RecursionError):
            message = None
        if isinstance(message, dict):
            self._json(self.server.session.act(message))
        else:
            self._refuse(HTTPStatus.BAD_REQUEST, "an action is a JSON object")

    def _allowed(self) -> str | None:
        """What is asked for, behind the token; None, with the refusal sent, for whoever may not ask."""
        names = {f"{name}:{self.server.server_port}" for name in LOOPBACK}
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        _, token, *rest = [*self.path.split("?")[0].split("/", 2), ""]
        if host not in names:  # a name elsewhere that was made to point at this machine
            self._refuse(HTTPStatus.FORBIDDEN, "this page is for this machine only")
        elif origin is not None and origin != f"http://{host}":
            self._refuse(HTTPStatus.FORBIDDEN, "another page asked")
        elif not secrets.compare_digest(token.encode(), self.server.token.encode()):
            self._refuse(HTTPStatus.FORBIDDEN, "wrong token: open the address that rlhf-kit rate printed")
        else:
            return rest[0] if len(rest) > 1 else "/"  # without its slash the address names no folder
        return None

    def _json(self, value: Any) -> None:
        self._send(HTTPStatus.OK, "application/json", json.dumps(value).encode())

    def _refuse(self, status: HTTPStatus, why: str) -> None:
        self._send(status, "text/plain; charset=utf-8", f"{why}\n".encode())

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *values: Any) -> None:
        """Nothing: the address holds the token."""
