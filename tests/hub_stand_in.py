"""A stand-in for the Hub on this machine, spoken to by the real client over HTTP.

Importing it starts the server and points huggingface_hub at it, because that library reads its environment when it is
imported: conftest imports it before anything else, so that no test can reach the real Hub. It speaks what the client
asks for in pushes and downloads, keeps repositories as git does (commits of paths to content, refs), and answers 400 to
whatever it does not expect.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKEN, USER = "hf_of_the_stand_in", "someone"
_LARGE = (".safetensors", ".bin", ".model")


@dataclass
class Repository:
    """Commits by hash, each a map from paths to content; and what the refs point to."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], ref: str) -> str:
        lines = [ref, str(len(self.commits)), *(f"{name} {sha256(files[name])}" for name in sorted(files))]
        oid = hashlib.sha1("\n".join(lines).encode()).hexdigest()
        self.commits[oid], self.refs[ref] = files, oid
        return oid

    def at(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.refs[revision]]


@dataclass
class Hub:
    """What the server knows, and what it was sent.

    Attributes:
        repositories: By type and name, as ``"models/someone/corrector"``.
        stored: Large files by their sha256, named by a commit or not.
        received: Bytes of every large file that was sent, in order, by sha256.
        messages: First line of every commit.
        uploads_left: How many large files are taken before the server refuses more; None for no limit.
    """

    repositories: dict[str, Repository] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    received: list[str] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    uploads_left: int | None = None

    def model(self, name: str) -> Repository:
        return self.repositories[f"models/{name}"]

    def dataset(self, name: str) -> Repository:
        return self.repositories[f"datasets/{name}"]


class Refused(Exception):
    """An answer that is no success: status, text, the Hub's error code, and what else is in the body."""

    def __init__(self, status: int, text: str, code: str = "", **more: str) -> None:
        super().__init__(text)
        self.status, self.code, self.body = status, code, {"error": text, **more}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_large(path: str) -> bool:
    return path.endswith(_LARGE)


class Handler(BaseHTTPRequestHandler):
    """One request; the table of routes is at the end."""

    hub: ClassVar[Hub] = Hub()
    lock: ClassVar[threading.Lock] = threading.Lock()
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._route()

    do_HEAD = do_POST = do_PUT = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the terminal quiet."""

    def _route(self) -> None:
        parts = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        with self.lock:
            self.hub.asked.append(f"{self.command} {parts.path}")
            try:
                for method, pattern, answer in ROUTES:
                    match = re.fullmatch(pattern, parts.path)
                    if match and self.command in method.split():
                        answer(self, **{name: unquote(value) for name, value in match.groupdict("").items()})
                        return
                raise Refused(400, f"the stand-in does not know {self.command} {self.path}")
            except Refused as error:
                self._send(error.status, error.body, {"X-Error-Code": error.code} if error.code else {})

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # ------------------------------------------------------------------ who may do what

    @property
    def is_owner(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _owner_only(self) -> None:
        if not self.is_owner:
            raise Refused(401, "Invalid username or password.")

    def _repository(self, kind: str, name: str) -> Repository:
        found = self.hub.repositories.get(f"{kind or 'models'}/{name}")
        if found is None or (found.private and not self.is_owner):
            raise Refused(404, "Repository not found", "RepoNotFound")
        return found

    def _commit_of(self, repository: Repository, revision: str) -> str:
        oid = repository.at(revision)
        if oid is None:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    # ------------------------------------------------------------------ repositories

    def create(self) -> None:
        self._owner_only()
        asked = json.loads(self.body)
        name = f"{asked.get('organization') or USER}/{asked['name']}"
        key = f"{asked.get('type', 'model')}s/{name}"
        url = f"{ENDPOINT}/{key.removeprefix('models/')}"
        if key in self.hub.repositories:
            raise Refused(409, "You already created this repo", url=url)
        repository = self.hub.repositories[key] = Repository(private=asked.get("visibility") == "private")
        repository.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "main")
        self._send(200, {"url": url, "name": name})

    def branch(self, kind: str, name: str, branch: str) -> None:
        self._owner_only()
        repository = self._repository(kind, name)
        if branch in repository.refs:
            raise Refused(409, "Reference already exists")
        repository.refs[branch] = repository.refs["main"]
        self._send(200, {})

    def info(self, kind: str, name: str, revision: str = "main") -> None:
        repository = self._repository(kind, name)
        oid = self._commit_of(repository, revision)
        siblings = [{"rfilename": path} for path in sorted(repository.commits[oid])]
        self._send(200, {"id": name, "sha": oid, "private": repository.private, "siblings": siblings, "tags": []})

    def tree(self, kind: str, name: str, revision: str) -> None:
        repository = self._repository(kind, name)
        files = repository.commits[self._commit_of(repository, revision)]
        if self.query.get("recursive", "").lower() != "true":
            raise Refused(400, "the stand-in lists whole trees alone")
        entries = []
        for path, data in sorted(files.items()):
            entry: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
            if is_large(path):
                entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 134}
            entries.append(entry)
        self._send(200, entries)

    def resolve(self, name: str, revision: str, path: str, kind: str = "") -> None:
        repository = self._repository(kind, name)
        oid = self._commit_of(repository, revision)
        data = repository.commits[oid].get(path)
        if data is None:
            self._send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid})
            return
        etag = sha256(data) if is_large(path) else git_oid(data)
        self._send(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": oid})

    # ------------------------------------------------------------------ pushes

    def validate(self) -> None:
        asked = json.loads(self.body)
        front = re.match(r"---\n(.*?)\n---\n", asked["content"], flags=re.DOTALL)
        metadata = yaml.safe_load(front.group(1)) if front else None
        if not isinstance(metadata, dict):
            self._send(400, {"errors": [{"message": "no metadata"}]})
            return
        index = metadata.get("model-index", [])
        whole = all(one["name"] and one["results"] for one in index)
        self._send(200 if whole else 400, {"errors": [] if whole else [{"message": "model-index"}], "warnings": []})

    def preupload(self, kind: str, name: str, revision: str) -> None:
        self._owner_only()
        repository = self._repository(kind, name)
        there = repository.commits[self._commit_of(repository, revision)]
        answers = []
        for one in json.loads(self.body)["files"]:
            path, data = one["path"], there.get(one["path"])
            large = is_large(path)
            answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if data is not None:
                answer["oid"] = sha256(data) if large else git_oid(data)
            answers.append(answer)
        self._send(200, {"files": answers})

    def batch(self, name: str, kind: str = "") -> None:
        self._owner_only()
        self._repository(kind, name)
        asked = json.loads(self.body)
        if asked["operation"] != "upload" or asked["hash_algo"] != "sha256":
            raise Refused(400, f"{asked['operation']} by {asked['hash_algo']}")
        objects = []
        for one in asked["objects"]:
            answer = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.hub.stored:
                answer["actions"] = {"upload": {"href": f"{ENDPOINT}/storage/{one['oid']}/{one['size']}"}}
            objects.append(answer)
        self._send(200, {"objects": objects, "transfer": "basic"})

    def store(self, oid: str, size: str) -> None:
        if self.hub.uploads_left is not None:
            if self.hub.uploads_left == 0:
                raise Refused(403, "the connection is gone")
            self.hub.uploads_left -= 1
        if sha256(self.body) != oid or len(self.body) != int(size):
            raise Refused(400, "another content than was announced")
        self.hub.stored[oid] = self.body
        self.hub.received.append(oid)
        self._send(200, {})

    def commit(self, kind: str, name: str, revision: str) -> None:
        self._owner_only()
        repository = self._repository(kind, name)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header, files = lines[0], dict(repository.commits[self._commit_of(repository, revision)])
        if header["key"] != "header" or not header["value"]["summary"]:
            raise Refused(400, "a commit without a message")
        for line in lines[1:]:
            self._apply(files, line["key"], line["value"])
        ref = revision
        if self.query.get("create_pr"):
            ref = f"refs/pr/{1 + sum(one.startswith('refs/pr/') for one in repository.refs)}"
        oid = repository.commit(files, ref)
        self.hub.messages.append(header["value"]["summary"])
        url = f"{ENDPOINT}/{'' if kind == 'models' else kind + '/'}{name}"
        request = f"{url}/discussions/{ref.rsplit('/', 1)[-1]}" if ref.startswith("refs/pr/") else None
        self._send(200, {"commitUrl": f"{url}/commit/{oid}", "commitOid": oid, "pullRequestUrl": request})

    def _apply(self, files: dict[str, bytes], key: str, value: dict[str, Any]) -> None:
        path = value["path"]
        if path.startswith("/") or ".." in path.split("/"):
            raise Refused(400, f"the path {path}")
        if key == "file" and not is_large(path):
            files[path] = base64.b64decode(value["content"])
        elif key == "lfsFile" and value["oid"] in self.hub.stored:
            files[path] = self.hub.stored[value["oid"]]
        elif key == "deletedFile" and path in files:
            del files[path]
        else:
            raise Refused(400, f"{key} of {path}")


_NAME, _KIND = r"(?P<name>[\w.-]+/[\w.-]+)", r"(?P<kind>models|datasets)"
_OF_DATASETS = r"(?:(?P<kind>datasets)/)?"
ROUTES: list[tuple[str, str, Any]] = [
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", f"/api/{_KIND}/{_NAME}/branch/(?P<branch>[^/]+)", Handler.branch),
    ("POST", f"/api/{_KIND}/{_NAME}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    ("POST", f"/api/{_KIND}/{_NAME}/commit/(?P<revision>[^/]+)", Handler.commit),
    ("GET", f"/api/{_KIND}/{_NAME}/tree/(?P<revision>[^/]+)", Handler.tree),
    ("GET", f"/api/{_KIND}/{_NAME}/revision/(?P<revision>[^/]+)", Handler.info),
    ("GET", f"/api/{_KIND}/{_NAME}", Handler.info),
    ("POST", rf"/{_OF_DATASETS}{_NAME}\.git/info/lfs/objects/batch", Handler.batch),
    ("PUT", "/storage/(?P<oid>[0-9a-f]{64})/(?P<size>[0-9]+)", Handler.store),
    ("GET HEAD", f"/{_OF_DATASETS}{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]

_SERVER = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
ENDPOINT = f"http://127.0.0.1:{_SERVER.server_address[1]}"
_CACHE = tempfile.TemporaryDirectory(prefix="hub-cache-")
os.environ.update({
    "HF_ENDPOINT": ENDPOINT, "HF_HUB_CACHE": _CACHE.name, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
})  # fmt: skip
threading.Thread(target=_SERVER.serve_forever, daemon=True).start()


def in_a_fresh_process(code: str, folder: Path) -> str:
    """Run code in a process with an empty local cache of the Hub; returns what it prints."""
    environment = {**os.environ, "HF_HUB_CACHE": str(folder / "fresh-cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
