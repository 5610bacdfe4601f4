"""The rating page served to one person's browser: on loopback only, every request with the token of its address."""

from __future__ import annotations

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
MAX_BYTES = 64 * 1024  # of a request: an answer with a long note is a tenth of it
FILES = {  # all that there is: no path of a request ever reaches the file system
    "": ("served.html", "text/html"),
    "served.js": ("served.js", "text/javascript"),
    "page.js": ("page.js", "text/javascript"),
    "page.css": ("page.css", "text/css"),
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
    """The page of a session at `address`; port 0 takes a free one. FeedbackError if the port cannot be had."""

    daemon_threads = True

    def __init__(self, session: Session, port: int = 0) -> None:
        self.session = session
        self.token = secrets.token_urlsafe(24)
        try:
            super().__init__(("127.0.0.1", port), _Request)
        except (OSError, OverflowError) as error:
            raise FeedbackError(f"port {port} cannot be used ({error}); name another with --port") from None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/{self.token}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that leaves in the middle is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Refused(Exception):
    """A request that gets this status and sentence, and nothing else."""


class _Request(BaseHTTPRequestHandler):
    server: Page
    server_version, sys_version = "rlhf-kit", ""
    timeout = 30  # seconds that a connection may say nothing

    def do_GET(self) -> None:
        try:
            status, (kind, body) = HTTPStatus.OK, self._answer()
        except _Refused as refused:
            status, why = refused.args
            kind, body = "text/plain", f"{why}\n".encode()
        self.send_response(status)
        own = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body))}
        for name, value in {**HEADERS, **own}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def _answer(self) -> tuple[str, bytes]:
        """Content type and body of what is asked for."""
        asked = (self.command, self._name())
        if asked == ("POST", "act"):
            return "application/json", json.dumps(self.server.session.act(self._message())).encode()
        if asked == ("GET", "state"):
            return "application/json", json.dumps(self.server.session.state()).encode()
        if asked[0] == "GET" and asked[1] in FILES:
            file, kind = FILES[asked[1]]
            return kind, (STATIC / file).read_bytes()
        raise _Refused(HTTPStatus.NOT_FOUND, "there is no such page")

    def _name(self) -> str:
        """What is asked for, behind the token; refuses whoever may not ask."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        _, token, *rest = [*self.path.split("?")[0].split("/", 2), ""]
        if host not in (f"{name}:{self.server.server_port}" for name in ("127.0.0.1", "localhost")):
            # A name elsewhere can be made to point at this machine.
            raise _Refused(HTTPStatus.FORBIDDEN, "this page is for this machine only")
        if origin not in (None, f"http://{host}"):
            raise _Refused(HTTPStatus.FORBIDDEN, "another page asked")
        if not secrets.compare_digest(token.encode(), self.server.token.encode()):
            raise _Refused(HTTPStatus.FORBIDDEN, "wrong token: open the address that rlhf-kit rate printed")
        return rest[0] if len(rest) > 1 else "/"  # without its slash the address names no folder

    def _message(self) -> dict[str, Any]:
        """The JSON object of an action."""
        length = self.headers.get("Content-Length", "")
        if self.headers.get_content_type() != "application/json":
            raise _Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "an action is sent as application/json")
        if not (length.isascii() and length.isdigit()):
            raise _Refused(HTTPStatus.LENGTH_REQUIRED, "an action says its length")
        if len(length) > 9 or int(length) > MAX_BYTES:
            raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"an action has at most {MAX_BYTES} bytes")
        try:
            message = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise _Refused(HTTPStatus.BAD_REQUEST, "an action is a JSON object")
        return message

    def log_message(self, format: str, *values: Any) -> None:
        """Nothing: the address holds the token."""
