"""The rating page served to one person's browser: on loopback only, every request with the token of its address."""

import json
import secrets
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from rlhf_kit.feedback import FeedbackError

from .session import Session

STATIC = Path(__file__).parent / "static"
FILES = {"page.html": "text/html", "page.js": "text/javascript", "page.css": "text/css"}
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'self'; img-src data:; base-uri 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class Page(ThreadingHTTPServer):
    """The page of a session at `address`; port 0 takes a free one. FeedbackError if the port cannot be had."""

    def __init__(self, session: Session, port: int = 0) -> None:
        self.session = session
        self.token = secrets.token_urlsafe(24)
        try:
            super().__init__(("127.0.0.1", port), _Request)
        except (OSError, OverflowError) as error:
            raise FeedbackError(f"port {port} cannot be used ({error}); name another with --port") from None
        self.hosts = [f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")]
        self.address = f"http://{self.hosts[0]}/{self.token}/page.html"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a browser that leaves in the middle of a request."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Request(BaseHTTPRequestHandler):
    server: Page
    error_message_format, error_content_type = "%(message)s\n", "text/plain"

    def do_GET(self) -> None:
        host, origin = self.headers.get("Host"), self.headers.get("Origin")
        token, _, name = self.path[1:].partition("/")
        if host not in self.server.hosts or origin not in (None, f"http://{host}"):
            # A name elsewhere can be made to point at this machine.
            self.send_error(403, "this page is for this machine only")
        elif not secrets.compare_digest(token.encode(), self.server.token.encode()):
            self.send_error(403, "wrong token: open the address that rlhf-kit rate printed")
        elif self.command == "POST":
            message = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send("application/json", json.dumps(self.server.session.act(message)).encode())
        elif name == "state":
            self._send("application/json", json.dumps(self.server.session.state()).encode())
        elif name in FILES:  # no other path reaches the file system
            self._send(FILES[name], (STATIC / name).read_bytes())
        else:
            self.send_error(404, "there is no such page")

    do_POST = do_GET

    def _send(self, kind: str, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *values: Any) -> None:
        """Log nothing: the address holds the token."""
