"""A server for the page of a collection, on this machine alone, at a secret address."""

from __future__ import annotations

import errno
import json
import re
import secrets
from functools import lru_cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import unquote, urlsplit

from crosslevel.data.bad_files import escaped
from crosslevel.exploration.collection import Collection
from crosslevel.utils.errors import UserError
from crosslevel.utils.files import write

HOST, PICTURE = "127.0.0.1", 256  # pixels of a picture at most
POLICY = "default-src 'self'; img-src 'self' data:"
PAGE = Path(__file__).with_name("explore.html")
PARTS = {
    "explore.css": "text/css; charset=utf-8",
    "explore.js": "text/javascript; charset=utf-8",
}
"""The page's style and script."""
MOST = 64 * 2**20  # bytes that a page may send
_NAME = re.compile(r"[\w][\w. -]{0,99}")


class Server(ThreadingHTTPServer):
    """Serves a collection's page at an address with a token; requests without it are refused.

    Args:
        collection: the points to show.
        lists: the folder for saved lists.
        port: of the address; 0 takes any free port.

    Raises:
        UserError: the port is in use, or not allowed.

    """

    daemon_threads = True

    def __init__(self, collection: Collection, lists: Path, port: int = 0) -> None:
        self.collection, self.lists, self.token = collection, lists, secrets.token_urlsafe(18)
        self.data = f"const DATA = {collection.data(served=True)};\n".encode()
        self._reading = Lock()
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            number = error.errno if isinstance(error, OSError) else None
            reason = "is in use" if number == errno.EADDRINUSE else f"cannot be had ({error})"
            raise UserError(f"--port {port} {reason}: give another, or leave it out for any that is free") from error

    @property
    def address(self) -> str:
        """The page's address."""
        return f"http://{HOST}:{self.server_address[1]}/{self.token}/"

    @lru_cache(maxsize=4096)  # noqa: B019 - as long as the server
    def picture(self, point: int) -> bytes | None:
        """A point's picture as JPEG."""
        with self._reading:
            return self.collection.pictures.jpeg(int(self.collection.rows[point]), PICTURE)

    def save(self, name: str, points: list[int]) -> dict[str, str]:
        """Write a list for ``@list=`` and return its path.

        Raises:
            UserError: the name is invalid, the list exists already, or it would be empty.

        """
        stem = name.removesuffix(".txt").strip()
        if not _NAME.fullmatch(stem):
            raise UserError("the name of a list has letters, digits, spaces, points, - and _")
        paths = self.collection.paths
        selected = sorted({point for point in points if 0 <= point < len(paths)})
        if len(selected) < 2:
            raise UserError("a list needs two images at least")
        file = self.lists / f"{stem}.txt"
        if file.exists():
            raise UserError(f"{file} is there already: give another name")
        self.lists.mkdir(parents=True, exist_ok=True)
        write(file, "".join(f"{escaped(paths[point])}\t-1\n" for point in selected))
        source = self.collection.table.metadata.get("images") or "IMAGES"
        return {"file": str(file), "use": f"{source}@list={file}", "count": f"{len(selected):,}"}


class _Handler(BaseHTTPRequestHandler):
    """Answers for one request."""

    server: Server
    server_version, sys_version, protocol_version = "crosslevel", "", "HTTP/1.1"

    def do_GET(self) -> None:
        """The page, its data, a picture."""
        path = self._requested_path()
        if path is None:
            self._refuse()
        elif path == "":
            self._answer(PAGE.read_bytes(), "text/html; charset=utf-8")
        elif path in PARTS:
            self._answer(PAGE.with_name(path).read_bytes(), PARTS[path])
        elif path == "data.js":
            self._answer(self.server.data, "text/javascript; charset=utf-8")
        elif (match := re.fullmatch(r"images/\d+/(\d{1,12})\.jpg", path, re.ASCII)) is not None:
            point = int(match[1])
            picture = self.server.picture(point) if point < len(self.server.collection.rows) else None
            if picture is None:
                self._refuse()
            else:
                self._answer(picture, "image/jpeg", keep=True)
        else:
            self._refuse()

    def do_POST(self) -> None:
        """Save a list."""
        stated = self.headers.get("Content-Length") or ""
        length = int(stated) if re.fullmatch(r"\d{1,12}", stated, re.ASCII) else 0
        if self._requested_path() != "list" or not 0 < length <= MOST:
            self.close_connection = True
            self._refuse()
            return
        try:
            request = json.loads(self.rfile.read(length))
            answer: dict[str, Any] = self.server.save(str(request["name"]), [int(point) for point in request["points"]])
        except (UserError, OSError) as error:
            answer = {"error": str(error)}
        except (ValueError, KeyError, TypeError):
            answer = {"error": "that is no list"}
        self._answer(json.dumps(answer).encode(), "application/json")

    def _requested_path(self) -> str | None:
        """The path after the token; None if the token is wrong, or the Host header names another machine."""
        host = (self.headers.get("Host") or "").partition(":")[0]
        token, _, path = unquote(urlsplit(self.path).path).removeprefix("/").partition("/")
        authorized = secrets.compare_digest(token.encode(), self.server.token.encode())
        return path if authorized and host in (HOST, "localhost") else None

    def _refuse(self) -> None:
        self._answer(b"", "text/plain", HTTPStatus.NOT_FOUND)

    def _answer(self, body: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK, keep: bool = False) -> None:
        self.send_response(status)
        headers = {
            "Content-Type": kind, "Content-Length": str(len(body)), "Content-Security-Policy": POLICY,
            "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer",
            "Cache-Control": "private, max-age=3600" if keep else "no-store",
        }  # fmt: skip
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: addresses hold the token."""
