"""A small Hugging Face hub on 127.0.0.1: what huggingface_hub asks of one to read and write a repository of models."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml


@dataclass
class Repository:
    """A folder, served. ``token``: who may see it.

    ``ranges``: how Range is answered: well, ignored, moved, short, or elsewhere (by another server).
    """

    folder: Path
    private: bool = False
    token: str | None = None
    gated: bool = False
    ranges: str = "well"
    commits: list[str] = field(default_factory=lambda: ["c" * 40])
    names: list[str] | None = None  # what it says it holds, if not what it does

    @property
    def sha(self) -> str:
        return self.commits[-1]

    def files(self) -> list[str]:
        return self.names or sorted(
            p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file()
        )


class Hub:
    """The server. ``sent`` counts the bytes of bodies, ``requests`` keeps what was asked, as ``GET /path``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder  # where new repositories go
        self.repositories: dict[str, Repository] = {}
        self.sent, self.down = 0, False
        self.writers: str | None = None  # the token that may write, if not anybody may
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def add(self, name: str, folder: Path, **options: Any) -> Repository:
        self.repositories[name] = Repository(folder, **options)
        return self.repositories[name]

    def forget(self) -> None:
        """Begin counting anew."""
        self.sent, self.requests = 0, []

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            pass

        def answer(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                hub.sent += len(body)
                self.wfile.write(body)

        def say(self, value: Any, status: int = 200) -> None:
            self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

        def refuse(self, status: int, code: str) -> None:
            self.answer(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

        def allowed(self, repository: Repository | None) -> bool:
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if repository is None or (repository.token is not None and token != repository.token):
                self.refuse(401, "RepoNotFound")  # as the hub does, for what is not there and what is not shown
                return False
            return True

        def handle_one(self) -> None:
            path = unquote(urlsplit(self.path).path)
            token = " with a token" if self.headers.get("Authorization") else ""
            hub.requests.append(f"{self.command} {path}{token}")
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if hub.down:
                return self.refuse(503, "Down")
            for pattern, method in ROUTES.items():
                if match := re.fullmatch(pattern, path):
                    return method(self, body, *match.groups())
            return self.refuse(404, "EntryNotFound")

        do_GET = do_POST = do_HEAD = handle_one

        def info(self, body: bytes, name: str, revision: str | None) -> None:
            repository = hub.repositories.get(name)
            if not self.allowed(repository):
                return
            assert repository is not None
            if revision not in (None, "main", *repository.commits):
                return self.refuse(404, "RevisionNotFound")
            card, readme = {}, repository.folder / "README.md"
            if readme.is_file() and (text := readme.read_text()).startswith("---\n"):
                card = yaml.safe_load(text.split("---\n")[1])
            siblings = [{"rfilename": file} for file in repository.files()]
            facts = {"id": name, "modelId": name, "sha": repository.sha, "private": repository.private, "tags": []}
            self.say({**facts, "siblings": siblings, "cardData": card})

        def resolve(self, body: bytes, name: str, revision: str, file: str) -> None:
            repository = hub.repositories.get(name)
            if not self.allowed(repository):
                return
            assert repository is not None
            if repository.gated:
                return self.refuse(403, "GatedRepo")
            if repository.ranges == "elsewhere":
                other = hub.url.replace("127.0.0.1", "localhost")
                return self.answer(302, headers={"Location": f"{other}/elsewhere/{name}/{file}"})
            return self.give(repository, file)

        def elsewhere(self, body: bytes, name: str, file: str) -> None:
            self.give(hub.repositories[name], file)

        def give(self, repository: Repository, file: str) -> None:
            path = repository.folder / file
            if not path.is_file():
                return self.refuse(404, "EntryNotFound")
            size, asked = path.stat().st_size, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
            known = {"ETag": f'"{hashlib.sha256(file.encode()).hexdigest()}"', "X-Repo-Commit": repository.sha}
            if self.command == "HEAD":
                return self.answer(200, headers={**known, "Content-Length": str(size)})
            if asked is None or repository.ranges == "ignored":
                self.send_response(200)
                for key, value in {**known, "Content-Length": str(size)}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.close_connection = True
                return self.pour(path)
            start, stop = int(asked[1]), min(int(asked[2]) + 1, size)
            if start >= size:
                return self.answer(416, headers={"Content-Range": f"bytes */{size}"})
            with open(path, "rb") as source:
                source.seek(start)
                data = source.read(stop - start)
            moved = 1 if repository.ranges == "moved" else 0
            said = {**known, "Content-Range": f"bytes {start + moved}-{stop - 1 + moved}/{size}"}
            return self.answer(206, data[: len(data) // 2] if repository.ranges == "short" else data, said)

        def pour(self, path: Path) -> None:
            try:
                with open(path, "rb") as source:
                    while piece := source.read(1 << 16):
                        self.wfile.write(piece)
                        hub.sent += len(piece)
            except OSError:  # nobody reads on
                pass

        def create(self, body: bytes) -> None:
            if hub.writers is not None and self.headers.get("Authorization") != f"Bearer {hub.writers}":
                return self.say({"error": "Invalid username or password."}, 401)
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if name in hub.repositories:
                return self.say({"error": "You already created this model repo", "url": f"{hub.url}/{name}"}, 409)
            folder = hub.folder / name
            folder.mkdir(parents=True)
            (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
            hub.add(name, folder, private=bool(asked.get("private") or asked.get("visibility") == "private"))
            return self.say({"url": f"{hub.url}/{name}", "name": name, "id": name})

        def check_yaml(self, body: bytes) -> None:
            self.say({"errors": [], "warnings": []})

        def preupload(self, body: bytes, name: str) -> None:
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None} for f in files]
            self.say({"files": modes})

        def commit(self, body: bytes, name: str) -> None:
            repository, lines = hub.repositories[name], [json.loads(line) for line in body.splitlines()]
            parent = lines[0]["value"].get("parentCommit")
            if parent not in (None, repository.sha):
                return self.say({"error": "A commit has happened since. Please refresh and try again."}, 412)
            for line in lines[1:]:
                assert line["key"] == "file", line["key"]
                path = repository.folder / line["value"]["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(line["value"]["content"]))
            repository.commits.append(hashlib.sha1(body).hexdigest())
            url = f"{hub.url}/{name}/commit/{repository.sha}"
            return self.say({"success": True, "commitUrl": url, "commitOid": repository.sha})

    ROUTES = {
        r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?": Handler.info,
        r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)": Handler.resolve,
        r"/elsewhere/([^/]+/[^/]+)/(.+)": Handler.elsewhere,
        r"/api/repos/create": Handler.create,
        r"/api/validate-yaml": Handler.check_yaml,
        r"/api/models/([^/]+/[^/]+)/preupload/main": Handler.preupload,
        r"/api/models/([^/]+/[^/]+)/commit/main": Handler.commit,
    }
    return Handler
