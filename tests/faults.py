"""An HTTP proxy in front of a real server, with the faults that networks and stores have, or with a lock."""

import http.client
import re
import threading
import time
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BUSY = b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
SKEWED = b"<?xml version='1.0'?><Error><Code>RequestTimeTooSkewed</Code><Message>Skewed.</Message></Error>"
UNSUPPORTED = b"<Error><Code>InvalidArgument</Code><Message>Unsupported header '%s' received.</Message></Error>"
CHECKSUM = re.compile("x-amz-(checksum-(?!mode)|sdk-checksum-algorithm|trailer)", re.IGNORECASE)
HOPS = {"transfer-encoding", "expect", "connection", "content-length"}


class Faulty(ThreadingHTTPServer):
    """A proxy on a port of its own.

    Args:
        target: port of the real server.

    Attributes:
        url: its address.
        every: each request of that number fails with 503; 0 lets all through.
        delay: seconds that each request waits.
        after: bytes of uploads after which the connection is cut, and every one thereafter; None never.
        flip: whether what is read comes with a wrong first byte.
        punctual: whether requests are refused whose date is a quarter of an hour from the store's, as stores do.
        authorization: the header without which each request is refused with 401; None lets all through.
        refused: how many were.
        count, uploaded, downloaded: requests, and bytes of them and of their answers.
        strict: whether requests are refused that have a checksum header of 2022, as some stores do.
        unconditional: the error with which uploads are refused that have a condition; None lets them through.
        absent: whether the answer is an empty 404, as of an ingress whose server is not ready.
    """

    daemon_threads = True

    def __init__(self, target):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url, self.target = f"http://127.0.0.1:{self.server_address[1]}", target
        self.every, self.delay, self.after, self.flip = 0, 0.0, None, False
        self.authorization, self.punctual, self.absent = None, False, False
        self.strict, self.unconditional = False, None
        self.count = self.uploaded = self.downloaded = self.refused = 0
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_request(self):
        body, proxy = self._body(), self.server
        proxy.count += 1
        proxy.uploaded += len(body)
        time.sleep(proxy.delay)
        if proxy.after is not None and proxy.uploaded > proxy.after:
            self.close_connection = True
            self.connection.close()
        elif proxy.absent:
            self._answer(404, [], b"")
        elif proxy.authorization not in (None, self.headers.get("Authorization")):
            proxy.refused += 1
            self._answer(401, [("Content-Type", "text/html"), ("WWW-Authenticate", "Bearer")], b"<html>\nNo.\n</html>")
        elif proxy.punctual and self._is_skewed():
            self._answer(403, [("Content-Type", "application/xml")], SKEWED)
        elif proxy.strict and (name := next(filter(CHECKSUM.match, self.headers), None)):
            self._answer(400, [("Content-Type", "application/xml")], UNSUPPORTED % name.encode())
        elif proxy.unconditional and "If-None-Match" in self.headers:
            status, code = proxy.unconditional
            self._answer(status, [("Content-Type", "application/xml")], f"<Error><Code>{code}</Code></Error>".encode())
        elif proxy.every and proxy.count % proxy.every == 0:
            self._answer(503, [("Content-Type", "application/xml")], BUSY)
        else:
            self._forward(body)

    do_GET = do_PUT = do_POST = do_PATCH = do_HEAD = do_DELETE = handle_request  # noqa: N815 (names of http.server)

    def _is_skewed(self):
        date = datetime.strptime(self.headers["X-Amz-Date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        return abs(datetime.now(UTC) - date).total_seconds() > 900

    def _forward(self, body):
        upstream = http.client.HTTPConnection("127.0.0.1", self.server.target, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in HOPS}
        upstream.request(self.command, self.path, body or None, headers)
        answer = upstream.getresponse()
        read = answer.read()
        self.server.downloaded += len(read)
        if self.server.flip and self.command == "GET":
            read = bytes([read[0] ^ 1]) + read[1:]
        self._answer(answer.status, answer.getheaders(), read)

    def _body(self):
        if "100-continue" in self.headers.get("Expect", ""):
            self.send_response_only(100)
            self.end_headers()
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status, headers, body):
        self.send_response_only(status)
        for name, value in [pair for pair in headers if pair[0].lower() not in HOPS]:
            self.send_header(name, value)
        length = dict(headers).get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
