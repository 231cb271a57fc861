"""Servers on loopback that answer as Google's storage and the Hugging Face hub do, of what reading files needs."""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


class Stub(BaseHTTPRequestHandler):
    """``server.files``: names and bytes; ``server.cut``: answers that are still to be cut off in the middle."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.reply(*self.found())

    do_HEAD = do_GET

    def do_POST(self):
        self.reply(*self.found())

    def found(self):
        address = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        asked = {key: values for key, values in parse_qs(address.query + "&" + body).items()}
        answer = self.answer(unquote(address.path), asked)
        return (404, {"error": {"code": 404, "message": "not found"}}) if answer is None else (200, answer)

    def reply(self, status, answer):
        data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        headers = [("Content-Type", "application/octet-stream" if isinstance(answer, bytes) else "application/json")]
        wanted = self.headers.get("Range")
        if isinstance(answer, bytes) and wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            first, last, whole = int(first), int(last or len(data) - 1), len(data)
            status, data = 206, data[first : last + 1]
            headers.append(("Content-Range", f"bytes {first}-{first + len(data) - 1}/{whole}"))
        with self.server.lock:
            cut = isinstance(answer, bytes) and self.command == "GET" and self.server.cut > 0
            self.server.cut -= cut
        self.send_response_only(status)
        for key, value in [*headers, ("Content-Length", str(len(data)))]:
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = cut

    def log_message(self, *_):
        pass


class Google(Stub):
    """The JSON API of Google Cloud Storage (cloud.google.com/storage/docs/json_api)."""

    def answer(self, path, asked):
        files, (_, _, rest) = self.server.files, path.partition("/storage/v1/b/")
        bucket, _, rest = rest.partition("/")
        if rest == "":
            return {"kind": "storage#bucket", "name": bucket}
        if rest == "o":
            prefix, apart = asked.get("prefix", [""])[0], asked.get("delimiter", [""])[0]
            names = [name for name in files if name.startswith(prefix)]
            below = {n for n in names if apart and apart in n[len(prefix) :]}
            folders = sorted({prefix + n[len(prefix) :].partition(apart)[0] + apart for n in below})
            items = [self.about(bucket, name) for name in sorted({*names} - below)]
            return {"kind": "storage#objects", "prefixes": folders, "items": items}
        name = rest.removeprefix("o/")
        if name not in files:
            return None
        return files[name] if asked.get("alt") == ["media"] else self.about(bucket, name)

    def about(self, bucket, name):
        data = self.server.files[name]
        mark = base64.b64encode(hashlib.md5(data).digest()).decode()
        when = "2026-01-01T00:00:00.000Z"
        return {
            "kind": "storage#object", "id": f"{bucket}/{name}/1", "name": name, "bucket": bucket, "generation": "1",
            "size": str(len(data)), "md5Hash": mark, "etag": mark, "timeCreated": when, "updated": when,
            "contentType": "application/octet-stream",
        }  # fmt: skip


class Hub(Stub):
    """The hub's API and its files (huggingface.co/docs/hub/api), of one data set, owner/name."""

    def answer(self, path, asked):
        files, home = self.server.files, "/datasets/owner/name"
        if path.startswith(f"{home}/resolve/main/"):
            return files.get(path.removeprefix(f"{home}/resolve/main/"))
        if path in (f"/api{home}", f"/api{home}/revision/main"):
            return {"id": "owner/name", "_id": "1", "sha": "0" * 40, "private": False, "tags": [], "siblings": []}
        if path == f"/api{home}/paths-info/main":
            return [self.about(name) for name in asked.get("paths", []) if name in files]
        if path.startswith(f"/api{home}/tree/main"):
            return [self.about(name) for name in sorted(files)]
        return None

    def about(self, name):
        data = self.server.files[name]
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


@contextmanager
def served(handler):
    """A server of that kind without any files."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.files, server.cut, server.lock, server.daemon_threads = {}, 0, threading.Lock(), True
    server.address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()
