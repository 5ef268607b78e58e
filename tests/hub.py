"""A model hub on loopback, and a hub's cache made by hand: what huggingface_hub asks of both."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def etag_of(path: Path) -> str:
    """As the hub's of large files: SHA-256 of the content; names the cache's blob."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def make_hub_cache(cache: Path, repository: str, model: Path) -> Path:
    """The snapshot of ``model`` in a hub's cache: links to blobs, as a download leaves it.

    Args:
        cache: ``HF_HUB_CACHE``.
        repository: ``org/name``.
        model: directory of its files.
    """
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / COMMIT
    for directory in (folder / "refs", folder / "blobs", snapshot):
        directory.mkdir(parents=True)
    (folder / "refs" / "main").write_text(COMMIT)
    for path in model.iterdir():
        blob = folder / "blobs" / etag_of(path)
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    return snapshot


class Hub:
    """What :func:`serve_hub` serves.

    Attributes:
        url: for ``HF_ENDPOINT``.
        requests: ``METHOD path`` of all that was asked so far.
    """

    def __init__(self, repositories: Sequence[str], model: Path) -> None:
        self.url = ""
        self.requests: list[str] = []
        self._repositories = repositories
        self._model = model

    def answer(self, path: str) -> tuple[dict[str, Any] | list[Any] | Path, bool]:
        """JSON, or a file to send; and whether it exists."""
        for repository in self._repositories:
            found = self._answer(repository, path)
            if found is not None:
                return found, True
        return {"error": "not found"}, False

    def _answer(self, repository: str, path: str) -> dict[str, Any] | list[Any] | Path | None:
        api = f"/api/models/{repository}"
        if path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            siblings = [{"rfilename": name} for name in self._names()]
            information = {"id": repository, "modelId": repository, "sha": COMMIT}
            return information | {"private": False, "tags": [], "siblings": siblings}
        if path.startswith(f"{api}/tree/"):
            return [self._entry(name) for name in self._names()]
        for revision in ("main", COMMIT):
            prefix = f"/{repository}/resolve/{revision}/"
            if path.startswith(prefix) and path.removeprefix(prefix) in self._names():
                return self._model / path.removeprefix(prefix)
        return None

    def _names(self) -> list[str]:
        return sorted(path.name for path in self._model.iterdir())

    def _entry(self, name: str) -> dict[str, Any]:
        path = self._model / name
        return {
            "type": "file",
            "path": name,
            "size": path.stat().st_size,
            "oid": etag_of(path)[:40],
        }


@contextlib.contextmanager
def serve_hub(repositories: Sequence[str], model: Path) -> Iterator[Hub]:
    """A hub on loopback that has one model, under several names (``org/name``)."""
    hub = Hub(repositories, model)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def log_message(self, *_: Any) -> None:
            pass

        def _answer(self, *, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            content, exists = hub.answer(path)
            if isinstance(content, Path):
                body, etag = content.read_bytes(), etag_of(content)
            else:
                body, etag = json.dumps(content).encode(), ""
            self.send_response(200 if exists else 404)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", COMMIT)
            if etag:
                self.send_header("ETag", f'"{etag}"')
            if not exists:
                is_file = "/resolve/" in path
                self.send_header("X-Error-Code", "EntryNotFound" if is_file else "RepoNotFound")
            self.end_headers()
            if with_body:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
