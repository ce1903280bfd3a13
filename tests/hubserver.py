"""A hub of our own for tests: the requests of the Hugging Face hub that pushing and loading take, over real HTTP."""

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """A hub on a port of its own, which knows one token.

    Attributes:
        url: its address.
        files: by ``models/owner/name`` or ``datasets/owner/name`` the files of each repository.
    """

    daemon_threads = True

    def __init__(self, token):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url, self.token, self.files = f"http://127.0.0.1:{self.server_address[1]}", token, {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, status, content=b"", **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), "X-Repo-Commit": COMMIT, **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_POST(self):
        body, path = self.body(), self.path.split("?")[0].removeprefix("/api/")
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            self.answer(401, {"error": "Invalid username or password."})
        elif path == "repos/create":
            told = json.loads(body)
            place = f"{told.get('type', 'model')}s/{told.get('organization', 'me')}/{told['name']}"
            self.server.files.setdefault(place, {})
            self.answer(200, {"url": f"{self.server.url}/{place.removeprefix('models/')}"})
        elif "/preupload/" in path:
            names = [entry["path"] for entry in json.loads(body)["files"]]
            modes = [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]
            self.answer(200, {"files": modes})
        elif "/commit/" in path:
            place = path.split("/commit/")[0]
            files = self.server.files[place]
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.answer(200, {"commitUrl": f"{self.server.url}/{place.removeprefix('models/')}/commit/{COMMIT}",
                              "commitOid": COMMIT, "success": True})  # fmt: skip
        else:
            self.answer(200, {})

    def do_GET(self):
        path = self.path.split("?")[0].removeprefix("/")
        if path.startswith("api/"):
            path = path.removeprefix("api/")
            place = "/".join(path.split("/")[:3])
            if place not in self.server.files:
                self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
                return
            siblings = [{"rfilename": name} for name in self.server.files[place]]
            self.answer(200, {"id": place.split("/", 1)[1], "sha": COMMIT, "siblings": siblings, "private": False,
                              "tags": [], "downloads": 0, "likes": 0})  # fmt: skip
            return
        repository, _, rest = path.partition("/resolve/")
        place = repository if repository.startswith("datasets/") else f"models/{repository}"
        content = self.server.files.get(place, {}).get(rest.partition("/")[2])
        if content is None:
            self.answer(404, {}, X_Error_Code="EntryNotFound" if place in self.server.files else "RepoNotFound")
        else:
            self.answer(200, content, ETag=f'"{hashlib.sha1(content).hexdigest()}"')

    do_HEAD = do_GET  # noqa: N815 (the name that http.server calls)
