"""A hub on this machine: what huggingface_hub asks of one, for tests, with faults on request.

It has repositories of models, each a list of commits, the newest of them ``main``. Weights are
stored as the hub stores them: behind a redirect, under their sha256.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

LARGE = (".safetensors", ".bin", ".gguf")
ERRORS = {"GatedRepo": 403, "RepoNotFound": 404, "RevisionNotFound": 404, "EntryNotFound": 404}
"""Status of the codes that the hub has for what it refuses."""


@dataclass
class Hub:
    """What the server has, was asked and is to do wrong."""

    url: str = ""
    commits: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    """Files by repository and commit; the last commit is ``main``."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of each, in order."""
    ranges: list[str] = field(default_factory=list)
    """Parts of files that were asked for."""
    breaks: dict[str, list[int]] = field(default_factory=dict)
    """By file name: after how many bytes the connection is closed, answer by answer."""
    refusals: dict[str, str | int] = field(default_factory=dict)
    """By a part of the path: an error code of the hub, or a status."""
    created: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What repositories were created with."""
    cdn: str = ""
    """Address that weights are redirected to; empty is the hub's own."""
    xet: bool = False
    """Weights are said to be in Xet storage too."""
    tokens: dict[str, str | None] = field(default_factory=dict)
    """What was sent as Authorization, by path."""
    uploaded: dict[str, bytes] = field(default_factory=dict)
    """Large files by sha256."""
    messages: list[str] = field(default_factory=list)
    """Of the commits that were pushed."""

    def add(self, repo: str, files: Path | dict[str, bytes]) -> str:
        """Commit a folder's files; returns the commit."""
        if isinstance(files, Path):
            found = [file for file in files.rglob("*") if file.is_file()]
            files = {file.relative_to(files).as_posix(): file.read_bytes() for file in found}
        earlier = self.commits.setdefault(repo, {})
        told = f"{repo} {len(earlier)}".encode()
        commit = hashlib.sha1(told, usedforsecurity=False).hexdigest()
        earlier[commit] = files
        return commit

    def fetched(self) -> set[str]:
        """Names of the files whose content was asked for."""
        return {
            path.split("/resolve/")[1].partition("/")[2]
            for method, path in self.requests
            if method == "GET" and "/resolve/" in path
        } | {path.rpartition("/")[2] for method, path in self.requests if "/cdn/" in path}


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@contextmanager
def hub_server() -> Iterator[Hub]:
    """A running hub; ended with the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str, cache: Path, *, offline: bool) -> None:
    """Make huggingface_hub of this process speak to ``url`` and keep files in ``cache``."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    close_session()


class Handler(BaseHTTPRequestHandler):
    """One request; ``hub`` is set by a subclass."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def do_PUT(self) -> None:
        self.answer()

    def answer(self) -> None:
        """Route the request."""
        split = urlsplit(self.path)
        self.content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path, self.query = unquote(split.path), parse_qs(split.query)
        self.hub.requests.append((self.command, path))
        self.hub.tokens[path] = self.headers.get("Authorization")
        refusal = next((code for part, code in self.hub.refusals.items() if part in path), None)
        if refusal is not None:
            self.refuse(refusal)
        elif path.startswith("/api/"):
            self.api(path.removeprefix("/api/"))
        elif path.startswith("/cdn/"):
            _, _, repo, name, commit, file = path.split("/", 5)
            self.send_file(f"{repo}/{name}", commit, file)
        elif "/resolve/" in path:
            self.resolve(*path[1:].split("/resolve/"))
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.lfs_batch()
        elif path.startswith("/lfs/"):
            self.hub.uploaded[path.removeprefix("/lfs/")] = self.content
            self.send_json({})
        else:
            self.refuse(404)

    def refuse(self, code: str | int) -> None:
        status = code if isinstance(code, int) else ERRORS[code]
        headers = {} if isinstance(code, int) else {"X-Error-Code": code}
        self.send_bytes(b"{}", status=status, **headers)

    def send_json(self, value: Any) -> None:
        self.send_bytes(json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def send_bytes(
        self, content: bytes, *, status: int = 200, limit: int | None = None, **headers: str
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:limit])
        if limit is not None:
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)

    def found(self, repo: str, revision: str) -> str | None:
        """The commit of a revision; None, and answered, where there is none."""
        commits = self.hub.commits.get(repo)
        if commits is None:
            self.refuse("RepoNotFound")
            return None
        commit = list(commits)[-1] if revision == "main" else revision
        if commit in commits:
            return commit
        self.refuse("RevisionNotFound")
        return None

    def api(self, path: str) -> None:
        if path == "repos/create":
            asked = json.loads(self.content)
            repo = f"{asked['organization']}/{asked['name']}"
            status = 409 if repo in self.hub.created else 200
            self.hub.created.setdefault(repo, asked)
            self.hub.commits.setdefault(repo, {"0" * 40: {}})
            told = {"url": f"{self.hub.url}/{repo}", "id": repo}
            self.send_bytes(json.dumps(told).encode(), status=status)
            return
        if path == "validate-yaml":
            self.send_json({"errors": [], "warnings": []})
            return
        kind, org, name, *rest = path.split("/")
        assert kind == "models"
        repo, what = f"{org}/{name}", rest[0] if rest else "revision"
        commit = self.found(repo, "/".join(rest[1:]) or "main")
        if commit is None:
            return
        files = self.hub.commits[repo][commit]
        if what == "revision":
            siblings = [{"rfilename": name, "size": len(files[name])} for name in files]
            private = self.hub.created.get(repo, {}).get("visibility") == "private"
            told = {"id": repo, "sha": commit, "siblings": siblings, "tags": []}
            self.send_json({**told, "private": private})
        elif what == "tree":
            told = [(name, len(content), digest(content)[:40]) for name, content in files.items()]
            keys = ("path", "size", "oid")
            self.send_json([{"type": "file", **dict(zip(keys, f, strict=True))} for f in told])
        elif what == "preupload":
            asked = json.loads(self.content)["files"]
            self.send_json({"files": [self.mode(file) for file in asked]})
        elif what == "commit":
            self.commit(repo, files)
        else:
            self.refuse(404)

    def mode(self, file: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if file["path"].endswith(LARGE) else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def lfs_batch(self) -> None:
        self.send_json(
            {
                "transfer": "basic",
                "objects": [
                    {
                        **asked,
                        "actions": {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}},
                    }
                    for asked in json.loads(self.content)["objects"]
                ],
            }
        )

    def commit(self, repo: str, files: dict[str, bytes]) -> None:
        made = dict(files)
        for line in self.content.splitlines():
            told = json.loads(line)
            value = told["value"]
            if told["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif told["key"] == "file":
                made[value["path"]] = base64.b64decode(value["content"])
            elif told["key"] == "deletedFile":
                del made[value["path"]]
            elif told["key"] == "lfsFile":
                made[value["path"]] = self.hub.uploaded[value["oid"]]
        commit = self.hub.add(repo, made)
        self.send_json({"commitUrl": f"{self.hub.url}/{repo}/commit/{commit}", "commitOid": commit})

    def resolve(self, repo: str, rest: str) -> None:
        revision, _, file = rest.partition("/")
        commit = self.found(repo, revision)
        if commit is None:
            return
        content = self.hub.commits[repo][commit].get(file)
        if content is None:
            self.refuse("EntryNotFound")
            return
        if not file.endswith(LARGE):
            self.send_file(repo, commit, file)
            return
        in_xet = {
            "X-Xet-Hash": digest(content),
            "X-Xet-Refresh-Route": f"{self.hub.url}/api/models/{repo}/xet-read-token/{commit}",
        }
        self.send_bytes(
            b"",
            status=302,
            **{
                **(in_xet if self.hub.xet else {}),
                "Location": f"{self.hub.cdn or self.hub.url}/cdn/{repo}/{commit}/{file}",
                "X-Repo-Commit": commit,
                "X-Linked-Etag": f'"{digest(content)}"',
                "X-Linked-Size": str(len(content)),
            },
        )

    def send_file(self, repo: str, commit: str, file: str) -> None:
        content, status = self.hub.commits[repo][commit][file], 200
        headers = {"ETag": f'"{digest(content)}"', "X-Repo-Commit": commit}
        asked = self.headers.get("Range")
        if asked is not None and self.command == "GET":
            self.hub.ranges.append(f"{file} {asked}")
            first, _, last = asked.removeprefix("bytes=").partition("-")
            end = min(int(last) + 1 if last else len(content), len(content))
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(content)}"
            content, status = content[int(first) : end], 206
        limits = self.hub.breaks.get(file) if self.command == "GET" else None
        limit = limits.pop(0) if limits else None
        self.send_bytes(content, status=status, limit=limit, **headers)
