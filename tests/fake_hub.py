"""A hub on this machine: serves directories as repositories the way huggingface_hub asks for them.

`root/org/repo/…` is the repository org/repo. Every request is recorded. With `moving=True` the main
branch moves after each look at it, so that a client which looks twice mixes two commits.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

_INFO = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?")
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")

#: Status and X-Error-Code, as the hub sends them.
_NO_REPOSITORY = (401, "RepoNotFound")
_NO_REVISION = (404, "RevisionNotFound")
_NO_FILE = (404, "EntryNotFound")
_GATED = (403, "GatedRepo")


class FakeHub(ThreadingHTTPServer):
    """The server. `requests` holds method and decoded path of each request, in order."""

    daemon_threads = True

    def __init__(self, root: Path, *, moving: bool = False, gated: frozenset[str] = frozenset()):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.moving = moving
        self.gated = gated
        self.moves = 0
        self.requests: list[tuple[str, str]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def commit(self, repo: str) -> str:
        """What main is now."""
        return hashlib.sha1(f"{repo} {self.moves}".encode()).hexdigest()

    def knows(self, repo: str, revision: str) -> bool:
        commits = (hashlib.sha1(f"{repo} {n}".encode()).hexdigest() for n in range(self.moves + 1))
        return revision in ("main", *commits)

    @property
    def downloaded(self) -> list[str]:
        """Files whose contents were sent, as org/repo/file."""
        found = (_FILE.fullmatch(path) for method, path in self.requests if method == "GET")
        return [f"{place['repo']}/{place['file']}" for place in found if place]

    @property
    def revisions(self) -> set[str]:
        """Revisions that files were asked for, heads included."""
        return {place["revision"] for _, path in self.requests if (place := _FILE.fullmatch(path))}


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        """Nothing: the requests are recorded instead."""

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append((self.command, path))
        if (place := _INFO.fullmatch(path)) is not None:
            self._info(place["repo"], place["revision"] or "main")
        elif (place := _FILE.fullmatch(path)) is not None:
            self._file(place["repo"], place["revision"], place["file"])
        else:
            self._refuse(_NO_REPOSITORY)

    def _info(self, repo: str, revision: str) -> None:
        folder = self.server.root / repo
        if not folder.is_dir():
            return self._refuse(_NO_REPOSITORY)
        if not self.server.knows(repo, revision):
            return self._refuse(_NO_REVISION)
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        siblings = [
            {"rfilename": path.relative_to(folder).as_posix(), "size": path.stat().st_size}
            for path in files
        ]
        commit = self.server.commit(repo) if revision == "main" else revision
        self.server.moves += self.server.moving
        info = {"id": repo, "modelId": repo, "sha": commit, "siblings": siblings}
        self._send(json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _file(self, repo: str, revision: str, file: str) -> None:
        path = self.server.root / repo / file
        if repo in self.server.gated:
            return self._refuse(_GATED)
        if not path.is_file():
            return self._refuse(_NO_FILE)
        content = path.read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        self._send(content, {"X-Repo-Commit": revision, "ETag": f'"{etag}"'})

    def _send(self, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(200)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def _refuse(self, fault: tuple[int, str]) -> None:
        status, code = fault
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


@contextmanager
def serving(
    root: Path, *, moving: bool = False, gated: frozenset[str] = frozenset()
) -> Iterator[FakeHub]:
    """A running hub."""
    hub = FakeHub(root, moving=moving, gated=gated)
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
