"""A hub on 127.0.0.1: the part of the Hugging Face hub's protocol that fetching a model needs."""

from __future__ import annotations

import hashlib
import json
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_a_token_of_the_tests"


@dataclass
class Repository:
    """access: open; private (unknown without TOKEN); gated (listed, its files not without TOKEN); forbidden."""

    access: str = "open"
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], *revisions: str) -> str:
        """Add a commit that these revisions lead to; returns its hash."""
        text = "".join(f"{name} {_sha256(content)}" for name, content in sorted(files.items()))
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[commit] = files
        self.revisions |= dict.fromkeys(revisions, commit)
        return commit

    def find(self, revision: str) -> str | None:
        """The hash a branch, a tag, a commit or the beginning of one leads to."""
        beginnings = (commit for commit in self.commits if len(revision) >= 7 and commit.startswith(revision))
        return self.revisions.get(revision) or next(beginnings, None)


class Hub:
    """.repositories by name; .requests: (method, path, Range) of all that was asked, in order.

    Large files are redirected, as the hub does, to storage on another host (localhost), which must not see the token.
    """

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.status: int | None = None  # answered to everything, if given
        self.breaks_at: int | None = None  # storage sends so many bytes of a file; from then on status is 503
        self.is_stalling = False  # what it does then: leave the connection open instead of closing it
        self.swaps: dict[bytes, bytes] = {}  # contents that storage gives instead of others
        self.stalled = threading.Event()
        self.ended = threading.Event()

    def fetched(self) -> list[str]:
        """Names of the files whose contents were asked for."""
        return [path.rpartition("/")[2] for method, path, _ in self.requests if method == "GET" and "/api/" not in path]

    @contextmanager
    def running(self):
        """Serves while the block runs; yields the address."""
        handler = type("Handler", (_Handler,), {"hub": self})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            self.ended.set()
            server.shutdown()
            server.server_close()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        parts = path.strip("/").split("/")
        if self.hub.status is not None:
            self.answer(self.hub.status)
        elif parts[0] == "storage":
            self.storage(parts)
        elif parts[:2] == ["api", "models"]:
            self.info("/".join(parts[2:4]), "/".join(parts[5:]) or "main")
        elif len(parts) > 4 and parts[2] == "resolve":
            self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self.answer(404)

    def answer(self, status: int, body: bytes = b"", **headers: object) -> None:
        self.send_response(status)
        for name, value in ({"Content_Length": len(body)} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.answer(status, X_Error_Code=code, X_Error_Message=code)

    def repository(self, name: str, *, files: bool) -> Repository | None:
        """The repository, or None when the answer has been given: it is unknown, or not to be seen."""
        found = self.hub.repositories.get(name)
        token = self.headers.get("Authorization")
        if token not in (None, f"Bearer {TOKEN}"):
            self.answer(401, X_Error_Message="Invalid credentials in Authorization header")
        elif found is None or (found.access == "private" and token is None):
            self.refuse(404 if token else 401, "RepoNotFound")
        elif found.access == "forbidden":
            self.answer(403, X_Error_Message="Forbidden")
        elif found.access == "gated" and files and token is None:
            self.refuse(401, "GatedRepo")
        else:
            return found
        return None

    def info(self, name: str, revision: str) -> None:
        found = self.repository(name, files=False)
        if found is None:
            return
        commit = found.find(revision)
        if commit is None:
            self.refuse(404, "RevisionNotFound")
            return
        siblings = [{"rfilename": file} for file in sorted(found.commits[commit])]
        text = json.dumps({"id": name, "modelId": name, "sha": commit, "private": False, "siblings": siblings})
        self.answer(200, text.encode(), Content_Type="application/json")

    def resolve(self, name: str, revision: str, file: str) -> None:
        found = self.repository(name, files=True)
        if found is None:
            return
        commit = found.find(revision)
        content = found.commits[commit].get(file) if commit else None
        if content is None:
            self.refuse(404, "EntryNotFound" if commit else "RevisionNotFound")
        elif file.endswith((".safetensors", ".bin")):
            digest = _sha256(content)
            where = f"http://localhost:{self.server.server_port}/storage/{name}/{commit}/{digest}/{file}"
            linked = {"X_Linked_Etag": f'"{digest}"', "X_Linked_Size": len(content)}
            self.answer(302, Location=where, X_Repo_Commit=commit, **linked)
        else:
            etag = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            self.answer(200, content, ETag=f'"{etag}"', X_Repo_Commit=commit)

    def storage(self, parts: list[str]) -> None:
        if "Authorization" in self.headers:
            self.answer(400)
            return
        content = self.hub.repositories["/".join(parts[1:3])].commits[parts[3]]["/".join(parts[5:])]
        content = self.hub.swaps.get(content, content)
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        headers = {"ETag": f'"{parts[4]}"', "Accept_Ranges": "bytes"}
        if start:
            headers["Content_Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        stop, self.hub.breaks_at = self.hub.breaks_at, None
        if stop is None:
            self.answer(206 if start else 200, content[start:], **headers)
            return
        self.answer(206 if start else 200, b"", **headers | {"Content_Length": len(content) - start})
        self.hub.status = 503
        self.close_connection = True
        self.wfile.write(content[start:stop])
        if self.hub.is_stalling:
            self.hub.stalled.set()
            self.hub.ended.wait(60)
