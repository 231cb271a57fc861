"""An S3 server on loopback, and a proxy before it that now and then answers as a busy store or a bad line does."""

import http.client
import re
import threading
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BUSY = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>SlowDown</Code>'
    b"<Message>Please reduce your request rate.</Message></Error>"
)
FAULTS = ("busy", "cut", "short", "reset")


class Proxy(ThreadingHTTPServer):
    """Hands requests on to ``port``. Each that reads is spoilt twice before it is answered, ``wanted`` in all.

    - busy: 503 SlowDown; the only one of a HEAD or a list;
    - cut: half of the answer, then the line breaks;
    - short: half of the answer, as if it were all;
    - reset: no answer.
    """

    daemon_threads = True

    def __init__(self, port):
        super().__init__(("127.0.0.1", 0), Handler)
        self.port, self.wanted, self.injected, self.kinds, self.spoilt = port, 0, 0, Counter(), Counter()
        self.seen, self.lock, self.keys = Counter(), threading.Lock(), set()
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def fault(self, handler):
        """How to spoil this request, if at all."""
        asked = (handler.command, handler.path, handler.headers.get("Range"))
        verb = "LIST" if "list-type" in handler.path else handler.command
        with self.lock:
            self.keys |= set(re.findall(r"Credential=([^/]+)", handler.headers.get("Authorization", "")))
            if verb not in ("GET", "HEAD", "LIST") or self.injected >= self.wanted:
                return None
            self.seen[asked] += 1
            if self.seen[asked] % 3 == 0:
                return None
            kind = FAULTS[self.injected % len(FAULTS)] if verb == "GET" else "busy"
            self.injected += 1
            self.kinds[kind] += 1
            self.spoilt[verb] += 1
            return kind


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def serve(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.fault(self)
        if fault == "busy":
            self.answer(503, [("Content-Type", "application/xml")], BUSY)
            return
        if fault == "reset":
            self.close_connection = True
            return
        behind = http.client.HTTPConnection("127.0.0.1", self.server.port)
        headers = {key: value for key, value in self.headers.items() if key.lower() != "connection"}
        behind.request(self.command, self.path, body=body, headers=headers)
        answer = behind.getresponse()
        data = answer.read()
        kept = [
            (k, v)
            for k, v in answer.getheaders()
            if k.lower() not in ("content-length", "connection", "transfer-encoding")
        ]
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        behind.close()
        if fault == "short":
            data = data[: len(data) // 2]
        self.answer(answer.status, kept, data, cut=fault == "cut", length=length)

    def answer(self, status, headers, data, cut=False, length=None):
        self.send_response_only(status)
        for key, value in headers:
            self.send_header(key, value)
        self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if cut else data)
        self.close_connection = self.close_connection or cut

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = serve

    def log_message(self, *_):
        pass


@contextmanager
def proxied(port):
    """A proxy that is answering."""
    proxy = Proxy(port)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    yield proxy
    proxy.shutdown()
    proxy.server_close()
    thread.join()
