"""A small Hub on 127.0.0.1, for the client of huggingface_hub as it is: real requests, everything in memory.

Two origins, as with the Hub itself: the hub, which knows users and repositories, and the storage, which hands out and
takes large files at signed addresses and has to see no token. Every request is logged, and tests make any of them
fail.
"""

import base64
import contextlib
import fnmatch
import hashlib
import hmac
import json
import os
import re
import secrets
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit


KINDS = {"models": "model", "datasets": "dataset", "spaces": "space"}

# What the first commit of a repository holds.
GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"

ACTIONS = ("drop", "reset", "lose", "truncate", "corrupt", "delay")


class RefusedError(Exception):
    """An answer that is an error. `code` is what the client tells errors of one status apart by."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status = status
        self.headers = {**({"X-Error-Code": code} if code else {}), "X-Error-Message": message, **(headers or {})}


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def as_json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})


@dataclass(frozen=True)
class Blob:
    """A file. Large ones are in git as a pointer, which is what their `oid` is of."""

    data: bytes
    large: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        return f"version lfs\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @property
    def oid(self) -> str:
        return _git_sha("blob", self.pointer if self.large else self.data)

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.oid


@dataclass(frozen=True)
class Commit:
    sha: str
    parent: str | None
    title: str
    description: str
    author: str
    date: str
    files: Mapping[str, Blob]


@dataclass
class Pull:
    number: int
    title: str
    description: str
    author: str
    date: str
    base: str
    status: str = "open"
    merge: str | None = None


@dataclass
class Repo:
    """Commits by their hash, which never change, and the names that point at them."""

    kind: str
    id: str
    private: bool
    date: str
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    pulls: dict[int, Pull] = field(default_factory=dict)
    # Large files that arrived, whether or not a commit names them.
    large: dict[str, bytes] = field(default_factory=dict)

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    @property
    def key(self) -> str:
        return self.id if self.kind == "models" else f"{self.kind}/{self.id}"

    def commit(self, revision: str) -> Commit:
        """By branch, tag, `refs/pr/1`, or hash, of which seven digits are enough."""
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        if re.fullmatch("[0-9a-f]{7,40}", revision):
            found = [commit for sha, commit in self.commits.items() if sha.startswith(revision)]
            if len(found) == 1:
                return found[0]
        raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def history(self, revision: str) -> list[Commit]:
        """The newest first."""
        commits = [self.commit(revision)]
        while commits[-1].parent is not None:
            commits.append(self.commits[commits[-1].parent])
        return commits

    def writable_ref(self, revision: str) -> str:
        for ref in (f"refs/heads/{revision}", revision):
            if ref in self.refs and not ref.startswith("refs/tags/"):
                return ref
        self.commit(revision)
        raise RefusedError(400, f"Can only commit to a branch or a pull request, not to {revision}")

    def add_commit(
        self,
        ref: str,
        files: Mapping[str, Blob],
        title: str,
        author: str,
        description: str = "",
        *,
        root: bool = False,
    ) -> Commit:
        parent = None if root else self.refs[ref]
        date = _now()
        content = json.dumps(
            [self.key, parent, title, description, author, date, sorted((path, b.oid) for path, b in files.items())]
        )
        commit = Commit(_git_sha("commit", content.encode()), parent, title, description, author, date, dict(files))
        self.commits[commit.sha] = commit
        self.refs[ref] = commit.sha
        return commit

    def open_pull(self, title: str, description: str, author: str) -> Pull:
        base = self.refs["refs/heads/main"]
        pull = Pull(len(self.pulls) + 1, title, description, author, _now(), base)
        self.pulls[pull.number] = pull
        self.refs[f"refs/pr/{pull.number}"] = base
        return pull

    def merge_pull(self, number: int, user: str) -> None:
        pull = self.pulls[number]
        if pull.status != "open":
            raise RefusedError(400, f"Pull request {number} is {pull.status}")
        theirs, base = self.commit(f"refs/pr/{number}").files, self.commits[pull.base].files
        files = dict(self.commit("main").files)
        for path in base.keys() | theirs.keys():
            if base.get(path) == theirs.get(path):
                continue
            if path in theirs:
                files[path] = theirs[path]
            else:
                files.pop(path, None)
        pull.merge = self.add_commit("refs/heads/main", files, f"{pull.title} (#{number})", user).sha
        pull.status = "merged"


@dataclass
class Request:
    """A line of the log. `status` is None where no answer was sent, or only a part of one."""

    method: str
    path: str
    query: dict[str, list[str]]
    server: str
    authorized: bool
    headers: Message
    segments: list[str]
    status: int | None = None
    action: str | None = None
    user: str | None = None

    def __str__(self) -> str:
        action = f" ({self.action})" if self.action else ""
        return f"{self.server} {self.method} {self.path} {self.status}{action}"


@dataclass
class Rule:
    """Misbehaviour that a test asked for. `hits` counts how often it was shown."""

    method: str | None
    path: str
    times: int | None
    skip: int
    status: int | None
    headers: Mapping[str, str]
    body: bytes
    action: str | None
    seconds: float
    hits: int = 0

    def matches(self, request: Request) -> bool:
        return self.method in (None, request.method) and re.search(self.path, request.path) is not None


class HubServer:
    """The Hub.

    Users and their tokens are in `tokens`: alice and bob may write to what is theirs, and `reader` is a token of alice
    that may only read. Repositories are named as in addresses: `alice/net`, `datasets/alice/pictures`.
    """

    def __init__(self) -> None:
        self.tokens = {name: f"hf_{name}_{secrets.token_hex(8)}" for name in ("alice", "bob", "reader")}
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.rules: list[Rule] = []
        # Tracebacks of the server itself: none is expected.
        self.errors: list[str] = []
        # Which files the client shall upload to the storage; None for none of them.
        self.large: str | None = r"\.(safetensors|bin|pt|pth|onnx)$"
        self._secret = secrets.token_bytes(16)
        self._lock = threading.RLock()
        self._listeners = [_Listener(self, "hub"), _Listener(self, "storage")]
        self.url, self.storage_url = (f"http://127.0.0.1:{listener.server_port}" for listener in self._listeners)

    def start(self) -> None:
        for listener in self._listeners:
            threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        for listener in self._listeners:
            listener.shutdown()
            listener.server_close()

    # What tests ask for and do behind the client's back.

    def push(
        self,
        repo: str,
        files: Mapping[str, bytes] | None = None,
        *,
        private: bool = False,
        revision: str = "main",
        message: str = "Files",
    ) -> str:
        """Makes the repository where there is none, commits the files, and returns the hash of the commit."""
        with self._lock:
            if repo not in self.repos:
                self._create(repo, private)
            found = self.repos[repo]
            if f"refs/heads/{revision}" not in found.refs and not revision.startswith("refs/"):
                found.refs[f"refs/heads/{revision}"] = found.refs["refs/heads/main"]
            if files is None:
                return found.commit(revision).sha
            blobs = {path: Blob(data, self._is_large(path, len(data))) for path, data in files.items()}
            found.large.update({blob.sha256: blob.data for blob in blobs.values() if blob.large})
            ref = found.writable_ref(revision)
            tree = {**found.commit(revision).files, **blobs}
            return found.add_commit(ref, tree, message, found.owner).sha

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        with self._lock:
            return {path: blob.data for path, blob in self.repos[repo].commit(revision).files.items()}

    def commits(self, repo: str, revision: str = "main") -> list[Commit]:
        """The newest first. The last is the one that every repository is made with."""
        with self._lock:
            return self.repos[repo].history(revision)

    def misbehave(
        self,
        method: str | None = None,
        path: str = "",
        *,
        times: int | None = 1,
        skip: int = 0,
        status: int | None = None,
        headers: Mapping[str, str] | None = None,
        body: bytes | str | None = None,
        action: str | None = None,
        seconds: float = 0.5,
    ) -> Rule:
        """Makes the requests that match fail, after `skip` of them and `times` times (None: always).

        Of several that match a request, the first that is not used up is shown, and the others do not count it.
        `path` is searched for in the decoded path. With `status`, that is the answer and nothing is done. Or `action`:

        - `drop`: the connection closes in the middle: of an upload, which is then not done, or of the answer;
        - `reset`: the same, as an error of the connection rather than its end;
        - `lose`: the request is carried out, and the connection closes before the answer;
        - `truncate`: half of the bytes, correctly framed; of what arrived if something did, else of the answer;
        - `corrupt`: the right number of bytes, one of them wrong;
        - `delay`: everything as it should be, `seconds` later.
        """
        if (status is None) == (action is None):
            raise ValueError("Give either `status` or `action`.")
        if action not in (None, *ACTIONS):
            raise ValueError(f"`action` is one of {', '.join(ACTIONS)}, not {action!r}.")
        if body is None:
            body = json.dumps({"error": f"Made to fail with {status}"})
        content = body.encode() if isinstance(body, str) else body
        rule = Rule(method, path, times, skip, status, headers or {}, content, action, seconds)
        with self._lock:
            self.rules.append(rule)
        return rule

    def behave(self) -> None:
        """Ends all misbehaviour."""
        with self._lock:
            self.rules.clear()

    def seen(self, method: str | None = None, path: str = "", server: str | None = None) -> list[Request]:
        """The requests of the log that match."""
        with self._lock:
            return [
                request
                for request in self.requests
                if method in (None, request.method)
                and server in (None, request.server)
                and re.search(path, request.path)
            ]

    # From here on: what the client asks for.

    def log(self, request: Request) -> Rule | None:
        """Notes a request, and what is to go wrong with it."""
        with self._lock:
            self.requests.append(request)
            for rule in self.rules:
                if rule.matches(request):
                    if rule.skip:
                        rule.skip -= 1
                    elif rule.times is None or rule.hits < rule.times:
                        rule.hits += 1
                        request.action = rule.action or "status"
                        return rule
        return None

    def answer(self, request: Request, body: bytes) -> Answer:
        try:
            # One at a time, so that a commit is made as a whole or not at all.
            with self._lock:
                return self._storage(request, body) if request.server == "storage" else self._hub(request, body)
        except RefusedError as error:
            return as_json({"error": str(error)}, error.status, error.headers)
        except Exception:
            self.errors.append(f"{request}\n{traceback.format_exc()}")
            return as_json({"error": "The server of the tests failed"}, 500)

    def _storage(self, request: Request, body: bytes) -> Answer:
        verb = "PUT" if request.method == "PUT" else "GET"
        signature = request.query.get("signature", [""])[0]
        if not hmac.compare_digest(signature, self._signature(verb, request.path)):
            raise RefusedError(403, "The address is not signed")
        kind, owner, name, sha256 = request.segments[:4]
        repo = self.repos[_key(kind, owner, name)]
        if verb == "PUT":
            if hashlib.sha256(body).hexdigest() != sha256:
                raise RefusedError(400, "The SHA-256 of what arrived is another than was announced")
            repo.large[sha256] = body
            return Answer()
        if sha256 not in repo.large:
            raise RefusedError(404, "There is no such file")
        return _content(request, repo.large[sha256], {"ETag": f'"{sha256}"'})

    def _hub(self, request: Request, body: bytes) -> Answer:
        request.user, role = self._authenticate(request)
        match request.method, request.segments:
            case "GET", ["api", "whoami-v2"]:
                if request.user is None:
                    raise RefusedError(401, "Invalid username or password.")
                token = {"displayName": "tests", "role": role}
                auth = {"type": "access_token", "accessToken": token}
                return as_json({"type": "user", "name": request.user, "orgs": [], "auth": auth})
            case "POST", ["api", "validate-yaml"]:
                return as_json({"errors": [], "warnings": []})
            case "POST", ["api", "repos", "create"]:
                return self._create_repo(request, role, _parsed(body))
            case "DELETE", ["api", "repos", "delete"]:
                data = _parsed(body)
                kind = f"{data.get('type') or 'model'}s"
                repo = self._owned(
                    request, _key(kind, data.get("organization") or request.user or "", data["name"]), role
                )
                del self.repos[repo.key]
                return as_json({})
            case method, ["api", kind, owner, name, *rest] if kind in KINDS:
                return self._api(method, request, role, _key(kind, owner, name), rest, body)
            case "POST", [*kind, owner, name, "info", "lfs", "objects", "batch"] if name.endswith(".git"):
                key = _key(kind[0] if kind else "models", owner, name.removesuffix(".git"))
                return self._batch(self._known(request, key, role), _parsed(body))
            case "POST", [*kind, owner, name, "info", "lfs", "verify"] if name.endswith(".git"):
                repo = self._known(
                    request, _key(kind[0] if kind else "models", owner, name.removesuffix(".git")), role
                )
                data = _parsed(body)
                if len(repo.large.get(data["oid"], b"")) != data["size"]:
                    raise RefusedError(422, "The file did not arrive")
                return as_json({})
            case "GET" | "HEAD", [("datasets" | "spaces") as kind, owner, name, "resolve", revision, *path]:
                return self._resolve(request, self._repo(request, _key(kind, owner, name)), revision, "/".join(path))
            case "GET" | "HEAD", [owner, name, "resolve", revision, *path]:
                return self._resolve(request, self._repo(request, f"{owner}/{name}"), revision, "/".join(path))
        raise RefusedError(404, "There is nothing at this address")

    def _api(self, method: str, request: Request, role: str | None, key: str, rest: list[str], body: bytes) -> Answer:
        match method, rest:
            case "GET", [] | ["revision", _]:
                repo = self._repo(request, key)
                return as_json(_info(repo, repo.commit(rest[1] if rest else "main"), "blobs" in request.query))
            case "GET", ["tree", revision, *path]:
                repo = self._repo(request, key)
                recursive = request.query.get("recursive", ["false"])[0].lower() == "true"
                return as_json(_tree(repo.commit(revision), "/".join(path), recursive))
            case "POST", ["paths-info", revision]:
                paths = parse_qs(body.decode()).get("paths", [])
                entries = {e["path"]: e for e in _tree(self._repo(request, key).commit(revision), "", True)}
                return as_json([entries[path.strip("/")] for path in paths if path.strip("/") in entries])
            case "GET", ["commits", revision]:
                return as_json([_commit_info(commit) for commit in self._repo(request, key).history(revision)])
            case "GET", ["refs"]:
                return as_json(_refs(self._repo(request, key), "include_prs" in request.query))
            case "POST", ["preupload", revision]:
                repo = self._may_commit(request, key, role)
                files = repo.commit(revision).files
                asked = _parsed(body)
                ignored = asked.get("gitIgnore") or (
                    files[".gitignore"].data.decode() if ".gitignore" in files else ""
                )
                return as_json({"files": [self._upload_mode(f, files, ignored.split()) for f in asked["files"]]})
            case "POST", ["commit", revision]:
                return self._commit(request, self._may_commit(request, key, role), revision, body)
            case "PUT", ["settings"]:
                repo, data = self._owned(request, key, role), _parsed(body)
                repo.private = data.get("visibility", "private" if repo.private else "public") == "private"
                return as_json({"private": repo.private})
            case "POST" | "DELETE", [("branch" | "tag") as what, name]:
                return self._change_ref(method, self._owned(request, key, role), what, name, _parsed(body or b"{}"))
            case "POST", ["discussions"]:
                repo, data = self._known(request, key, role), _parsed(body)
                if not data.get("pullRequest"):
                    raise RefusedError(400, "Only pull requests can be opened here")
                pull = repo.open_pull(data["title"], data.get("description", ""), request.user or "")
                return as_json(self._pull_info(repo, pull))
            case "GET", ["discussions"]:
                repo = self._repo(request, key)
                pulls = [self._pull_info(repo, pull) for pull in repo.pulls.values()]
                return as_json({"count": len(pulls), "start": 0, "discussions": pulls})
            case ("GET", ["discussions", number]) | ("POST", ["discussions", number, "merge"]):
                repo = self._owned(request, key, role) if method == "POST" else self._repo(request, key)
                if not number.isdigit() or int(number) not in repo.pulls:
                    raise RefusedError(404, f"There is no discussion {number}")
                if method == "POST":
                    repo.merge_pull(int(number), request.user or "")
                return as_json(self._pull_info(repo, repo.pulls[int(number)]))
        raise RefusedError(404, "There is nothing at this address")

    def _authenticate(self, request: Request) -> tuple[str | None, str | None]:
        token = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token:
            return None, None
        for name, known in self.tokens.items():
            if secrets.compare_digest(token, known):
                return ("alice", "read") if name == "reader" else (name, "write")
        raise RefusedError(401, "Invalid credentials in Authorization header")

    def _repo(self, request: Request, key: str) -> Repo:
        """The repository, if the user may see it."""
        repo = self.repos.get(key)
        if repo is None or (repo.private and request.user != repo.owner):
            # A stranger cannot tell a private repository from one that is not there.
            if request.user is None:
                raise RefusedError(401, "Invalid username or password.", "RepoNotFound")
            raise RefusedError(404, "Repository not found", "RepoNotFound")
        return repo

    def _owned(self, request: Request, key: str, role: str | None) -> Repo:
        """The repository, if the user may write to it."""
        repo = self._repo(request, key)
        if request.user is None:
            raise RefusedError(401, "Invalid username or password.")
        if request.user != repo.owner:
            raise RefusedError(403, f"{request.user} may not write to {key}")
        return self._known(request, key, role)

    def _known(self, request: Request, key: str, role: str | None) -> Repo:
        """The repository, for somebody known who may see it: enough to upload for a pull request and to open one."""
        repo = self._repo(request, key)
        if request.user is None:
            raise RefusedError(401, "Invalid username or password.")
        if role != "write":
            raise RefusedError(403, "Forbidden: you must use a write token to upload to a repository.")
        return repo

    def _may_commit(self, request: Request, key: str, role: str | None) -> Repo:
        if "create_pr" in request.query:
            return self._known(request, key, role)
        revision = request.segments[-1]
        repo = self._repo(request, key)
        pull = re.fullmatch(r"refs/pr/(\d+)", revision)
        if pull and int(pull[1]) in repo.pulls and repo.pulls[int(pull[1])].author == request.user:
            return self._known(request, key, role)
        return self._owned(request, key, role)

    def _create(self, key: str, private: bool) -> Repo:
        kind, *name = key.split("/") if key.split("/")[0] in KINDS else ["models", *key.split("/")]
        repo = Repo(kind, "/".join(name), private, _now())
        files = {".gitattributes": Blob(GITATTRIBUTES)}
        repo.add_commit("refs/heads/main", files, "initial commit", repo.owner, root=True)
        self.repos[key] = repo
        return repo

    def _create_repo(self, request: Request, role: str | None, data: dict[str, Any]) -> Answer:
        if request.user is None:
            raise RefusedError(401, "Invalid username or password.")
        owner = data.get("organization") or request.user
        if owner != request.user or role != "write":
            raise RefusedError(
                403, f'You don\'t have the rights to create a {data.get("type") or "model"} under "{owner}"'
            )
        key = _key(f"{data.get('type') or 'model'}s", owner, data["name"])
        address = {"url": f"{self.url}/{key}", "name": f"{owner}/{data['name']}"}
        if key in self.repos:
            return as_json({**address, "error": "You already created this repository"}, 409)
        self._create(key, data.get("visibility") == "private" or bool(data.get("private")))
        return as_json(address)

    def _is_large(self, path: str, size: int) -> bool:
        return size > 0 and self.large is not None and re.search(self.large, path) is not None

    def _upload_mode(self, file: dict[str, Any], files: Mapping[str, Blob], ignored: list[str]) -> dict[str, Any]:
        known = files.get(file["path"])
        mode = "lfs" if self._is_large(file["path"], file["size"]) else "regular"
        return {
            "path": file["path"],
            "uploadMode": mode,
            "shouldIgnore": any(fnmatch.fnmatch(file["path"].rpartition("/")[2], pattern) for pattern in ignored),
            "oid": known.etag if known else None,
        }

    def _signature(self, verb: str, path: str) -> str:
        return hmac.digest(self._secret, f"{verb} {path}".encode(), "sha256").hex()

    def _storage_address(self, verb: str, repo: Repo, sha256: str, *path: str) -> str:
        whole = "/".join(["", repo.kind, repo.id, sha256, *path])
        return f"{self.storage_url}{quote(whole)}?signature={self._signature(verb, whole)}"

    def _batch(self, repo: Repo, data: dict[str, Any]) -> Answer:
        objects = []
        for item in data["objects"]:
            entry: dict[str, Any] = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in repo.large:
                verify = {"href": f"{self.url}/{repo.key}.git/info/lfs/verify", "header": {}}
                upload = {"href": self._storage_address("PUT", repo, item["oid"]), "header": {}}
                entry["actions"] = {"upload": upload, "verify": verify}
            objects.append(entry)
        return as_json({"transfer": "basic", "objects": objects})

    def _commit(self, request: Request, repo: Repo, revision: str, body: bytes) -> Answer:
        lines = [_parsed(line) for line in body.split(b"\n") if line.strip()]
        if not lines or lines[0].get("key") != "header":
            raise RefusedError(400, "A commit begins with its header")
        header = lines[0]["value"]
        base = repo.commit(revision)
        if header.get("parentCommit") not in (None, base.sha):
            raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
        files = dict(base.files)
        for line in lines[1:]:
            path = line["value"]["path"].strip("/")
            match line["key"]:
                case "file":
                    files[path] = Blob(base64.b64decode(line["value"]["content"]))
                case "lfsFile":
                    if line["value"]["oid"] not in repo.large:
                        raise RefusedError(400, f"{path} points to a large file that was not uploaded")
                    files[path] = Blob(repo.large[line["value"]["oid"]], large=True)
                case "deletedFile":
                    if path not in files:
                        raise RefusedError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
                    del files[path]
                case "deletedFolder":
                    files = {name: blob for name, blob in files.items() if not name.startswith(f"{path}/")}
                case key:
                    raise RefusedError(400, f"Unknown operation {key}")
        answer: dict[str, Any] = {"success": True}
        title, description, author = header["summary"], header.get("description", ""), request.user or ""
        if "create_pr" in request.query:
            pull = repo.open_pull(title, description, author)
            ref = f"refs/pr/{pull.number}"
            answer["pullRequestUrl"] = f"{self.url}/{repo.key}/discussions/{pull.number}"
        else:
            ref = repo.writable_ref(revision)
        commit = repo.add_commit(ref, files, title, author, description)
        return as_json({**answer, "commitOid": commit.sha, "commitUrl": f"{self.url}/{repo.key}/commit/{commit.sha}"})

    def _resolve(self, request: Request, repo: Repo, revision: str, path: str) -> Answer:
        commit = repo.commit(revision)
        headers = {"X-Repo-Commit": commit.sha}
        blob = commit.files.get(path)
        if blob is None:
            raise RefusedError(404, "Entry not found", "EntryNotFound", headers)
        if not blob.large:
            return _content(request, blob.data, {**headers, "ETag": f'"{blob.etag}"'})
        address = self._storage_address("GET", repo, blob.sha256, *path.split("/"))
        headers |= {"X-Linked-Etag": f'"{blob.etag}"', "X-Linked-Size": str(len(blob.data)), "Location": address}
        return Answer(302, f"Found. Redirecting to {address}".encode(), headers)

    def _change_ref(self, method: str, repo: Repo, what: str, name: str, data: dict[str, Any]) -> Answer:
        # A branch is named in the address; so is the tag that goes, but for a new one that is what it is put on.
        new = data["tag"] if what == "tag" and method == "POST" else name
        ref = f"refs/{'heads' if what == 'branch' else 'tags'}/{new}"
        if method == "DELETE":
            if repo.refs.pop(ref, None) is None:
                raise RefusedError(404, f"Invalid rev id: {new}", "RevisionNotFound")
            return as_json({})
        start = data.get("startingPoint", "main") if what == "branch" else name
        sha = repo.commit(start).sha
        if ref in repo.refs:
            raise RefusedError(409, f"Reference already exists: {new}")
        repo.refs[ref] = sha
        return as_json({})

    def _pull_info(self, repo: Repo, pull: Pull) -> dict[str, Any]:
        return {
            "num": pull.number,
            "title": pull.title,
            "author": {"name": pull.author},
            "createdAt": pull.date,
            "status": pull.status,
            "repo": {"name": repo.id, "type": KINDS[repo.kind]},
            "isPullRequest": True,
            "events": [],
            "filesWithConflicts": [],
            "changes": {"base": "refs/heads/main", "mergeCommitId": pull.merge},
        }


def _git_sha(kind: str, content: bytes) -> str:
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _key(kind: str, owner: str, name: str) -> str:
    return f"{owner}/{name}" if kind == "models" else f"{kind}/{owner}/{name}"


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        raise RefusedError(400, "This is not JSON") from None


def _content(request: Request, data: bytes, headers: dict[str, str]) -> Answer:
    """A file, or the part of it that was asked for."""
    headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
    wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
    if wanted is None or wanted[0] == "bytes=-":
        return Answer(200, data, headers)
    first, last = wanted[1], wanted[2]
    start = int(first) if first else max(len(data) - int(last), 0)
    end = min(int(last), len(data) - 1) if first and last else len(data) - 1
    if start > end:
        raise RefusedError(416, "There are no such bytes", headers={"Content-Range": f"bytes */{len(data)}"})
    return Answer(206, data[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(data)}"})


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "oid": blob.oid, "size": len(blob.data)}
    if blob.large:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
    return entry


def _tree(commit: Commit, folder: str, recursive: bool) -> list[dict[str, Any]]:
    prefix = f"{folder.strip('/')}/" if folder.strip("/") else ""
    inside = {path: blob for path, blob in commit.files.items() if path.startswith(prefix)}
    if prefix and not inside:
        raise RefusedError(404, f"{folder} does not exist", "EntryNotFound", {"X-Repo-Commit": commit.sha})
    folders: dict[str, list[str]] = {}
    for path, blob in inside.items():
        parts = path.split("/")
        for depth in range(prefix.count("/") + 1, len(parts)):
            folders.setdefault("/".join(parts[:depth]), []).append(f"{path} {blob.oid}")
    entries = [_entry(path, blob) for path, blob in inside.items()]
    for path, content in folders.items():
        oid = _git_sha("tree", "\n".join(sorted(content)).encode())
        entries.append({"type": "directory", "path": path, "oid": oid, "size": 0})
    entries.sort(key=lambda entry: entry["path"])
    return [entry for entry in entries if recursive or "/" not in entry["path"][len(prefix) :]]


def _info(repo: Repo, commit: Commit, blobs: bool) -> dict[str, Any]:
    siblings = []
    for path, blob in sorted(commit.files.items()):
        sibling: dict[str, Any] = {"rfilename": path}
        if blobs:
            sibling |= {"size": len(blob.data), "blobId": blob.oid}
            if blob.large:
                sibling["lfs"] = {"sha256": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
        siblings.append(sibling)
    info: dict[str, Any] = {
        "id": repo.id,
        "author": repo.owner,
        "sha": commit.sha,
        "private": repo.private,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "createdAt": repo.date,
        "lastModified": commit.date,
        "siblings": siblings,
        "tags": [],
    }
    if repo.kind == "models":
        info["modelId"] = repo.id
    # The head of the card, in the plain form that cards of this project have; the standard library reads no YAML.
    card = commit.files["README.md"].data.decode() if "README.md" in commit.files else ""
    head = re.match(r"---\r?\n(.*?)\r?\n---", card, re.DOTALL)
    if head:
        for name in ("pipeline_tag", "library_name"):
            value = re.search(rf"^{name}: *([\w./-]+)", head[1], re.MULTILINE)
            if value:
                info[name] = value[1]
        tags = re.search(r"^tags:\n((?: *- .*\n?)+)", head[1], re.MULTILINE)
        info["tags"] = [tag.strip(" -'\"") for tag in tags[1].splitlines()] if tags else []
    return info


def _commit_info(commit: Commit) -> dict[str, Any]:
    return {
        "id": commit.sha,
        "title": commit.title,
        "message": commit.description,
        "authors": [{"user": commit.author}],
        "date": commit.date,
    }


def _refs(repo: Repo, pulls: bool) -> dict[str, Any]:
    def named(prefix: str) -> list[dict[str, str]]:
        return [
            {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha}
            for ref, sha in repo.refs.items()
            if ref.startswith(prefix)
        ]

    refs: dict[str, Any] = {"branches": named("refs/heads/"), "tags": named("refs/tags/"), "converts": []}
    if pulls:
        refs["pullRequests"] = named("refs/pr/")
    return refs


class _Listener(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: HubServer, name: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub
        self.name = name

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that went away is no error of the server.
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            self.hub.errors.append(traceback.format_exc())


class _CutError(Exception):
    """The connection is to end here."""

    def __init__(self, reset: bool = False) -> None:
        super().__init__()
        self.reset = reset


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body are written one after the other, and would wait for each other.
    disable_nagle_algorithm = True
    timeout = 60
    server: _Listener

    def _serve(self) -> None:
        url = urlsplit(self.path)
        request = Request(
            method=self.command,
            path=unquote(url.path),
            query=parse_qs(url.query, keep_blank_values=True),
            server=self.server.name,
            authorized="Authorization" in self.headers,
            headers=self.headers,
            # Before decoding: a revision may have slashes in its name.
            segments=[unquote(segment) for segment in url.path.split("/") if segment],
        )
        try:
            self._answer(request, self.server.hub.log(request))
        except _CutError as cut:
            self._hang_up(cut.reset)
        except (ConnectionError, TimeoutError):
            # The client went away.
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

    def _answer(self, request: Request, rule: Rule | None) -> None:
        hub, action = self.server.hub, rule.action if rule else None
        body = self._body(cut=action if action in ("drop", "reset") else None)
        if rule and action == "delay":
            time.sleep(rule.seconds)
        damaged = action in ("truncate", "corrupt")
        if body and damaged:
            body = _damage(body, action == "truncate")
        if rule and rule.status is not None:
            answer = Answer(rule.status, rule.body, {"Content-Type": "application/json", **rule.headers})
        else:
            answer = hub.answer(request, body)
        if not body and damaged:
            answer.body = _damage(answer.body, action == "truncate")
        if action == "lose":
            raise _CutError
        if action not in ("drop", "reset"):
            # Before it is sent: the client may end, and the test look, as soon as it is.
            request.status = answer.status
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        if action in ("drop", "reset") and self.command == "HEAD":
            raise _CutError(action == "reset")
        self.end_headers()
        if action in ("drop", "reset"):
            self.wfile.write(answer.body[: len(answer.body) // 2])
            raise _CutError(action == "reset")
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    def _body(self, cut: str | None) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            parts = []
            while size := int(self.rfile.readline().split(b";")[0], 16):
                parts.append(self._read(size))
                self.rfile.readline()
                if cut:
                    raise _CutError(cut == "reset")
            self.rfile.readline()
            return b"".join(parts)
        size = int(self.headers.get("Content-Length") or 0)
        if size and cut:
            self._read(size // 2)
            raise _CutError(cut == "reset")
        return self._read(size)

    def _read(self, size: int) -> bytes:
        data = self.rfile.read(size)
        if len(data) < size:
            raise ConnectionError("The client stopped in the middle of its request.")
        return data

    def _hang_up(self, reset: bool) -> None:
        self.close_connection = True
        if reset:
            # Closed at once and with nothing lingering, the connection is reset; its socket object would first end it
            # in good order.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())
        else:
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: Any) -> None:
        """The log of the hub is enough."""


def _damage(data: bytes, truncate: bool) -> bytes:
    half = len(data) // 2
    if truncate or not data:
        return data[:half]
    return data[:half] + bytes([data[half] ^ 0xFF]) + data[half + 1 :]


def report(requests: Iterable[Request]) -> str:
    """The log for people, below a test that failed."""
    return "\n".join(str(request) for request in requests)
