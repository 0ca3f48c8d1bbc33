"""A Hugging Face Hub on loopback, over real HTTP and in memory, for a demo and for tests that push a model and load it again.

It has repositories of models and datasets (`datasets/me/name`), no LFS, and no rights: every token reads and writes everything. A new repository is empty,
where the real Hub puts a .gitattributes. What goes wrong on the way can be asked for: see [`Fault`]. Whatever it does not understand it answers with 501, which huggingface_hub 2.4
does not try again, and keeps in `LoopbackHub.unknown`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch
from urllib.parse import parse_qsl, unquote, urlsplit


USER = "me"  # who owns a repository that is created without an owner
FOREIGN_SETTINGS = re.compile(r"(HF|HUGGING_?FACE|TRANSFORMERS)_.*|.*_PROXY", re.IGNORECASE)
PARTS = {"type": "(models|datasets|spaces)", "repo": "([^/]+/[^/]+)", "revision": "([^/]+)", "path": "(.+)"}
ROUTES = []


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request: the next one that it fits. Put it into `LoopbackHub.faults`.

    Args:
        method (`str`), path (`str`): of the request; a part of the path.
        status (`int`, *optional*): it is answered with this error, and nothing is done.
        cut (`"before"` or `"after"`, *optional*): the connection is closed without an answer, before or after what was asked for is done.
        wait (`threading.Event`, *optional*): it is answered once this is set.
        then (callable, *optional*): is called before it is answered.
    """

    method: str
    path: str
    status: int | None = None
    cut: str | None = None
    wait: threading.Event | None = None
    then: Callable[[], Any] | None = None


class LoopbackHub:
    """Use as `with LoopbackHub() as hub:`; read and written by a client in a process of its own, and by the test here.

    Attributes:
        url (`str`): the endpoint.
        requests (`list[tuple[str, str]]`): method and path, as sent but without the query, of every request so far.
        tokens (`set[str]`): all that came with them.
        faults (`list[Fault]`): what is to go wrong; each once, and then it is taken out.
        unknown (`list[tuple[str, str]]`): method and target, with the query, of those answered with 501. A test that
            does not expect any asserts that it is empty: many callers go on after an error of the server.
    """

    def __init__(self):
        self.requests: list[tuple[str, str]] = []
        self.tokens: set[str] = set()
        self.unknown: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self._lock = threading.RLock()
        self._commits: dict[str, dict[str, dict[str, bytes]]] = {}  # repository, sha, path: content
        self._branches: dict[str, dict[str, str]] = {}  # repository, branch: sha
        self._private: set[str] = set()

    def __enter__(self):
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def environment(self, home: str | Path) -> dict[str, str]:
        """The whole environment for a client, with its cache in `home`: huggingface_hub reads it when it is imported."""
        kept = {name: value for name, value in os.environ.items() if not FOREIGN_SETTINGS.fullmatch(name)}
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_TOKEN": "hf_loopback",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }

    @contextmanager
    def in_this_process(self, home: str | Path):
        """Makes this process the client in a `with` block, which is faster than one of its own: what the libraries have read
        of the environment when they were imported is exchanged.
        """
        from huggingface_hub import close_session, constants, hf_api

        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, self.url)
        cache = str(Path(home, "hub"))
        exchanged = {
            "ENDPOINT": self.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": cache,
            "HF_HUB_DISABLE_XET": True, "HF_HUB_DISABLE_TELEMETRY": True, "HF_HUB_DISABLE_PROGRESS_BARS": True,
        }  # fmt: skip
        with ExitStack() as stack:
            stack.enter_context(patch.multiple(constants, **exchanged))
            stack.enter_context(patch.object(hf_api.api, "endpoint", self.url))
            stack.enter_context(patch("transformers.utils.hub._hf_api", None))  # made at the first call
            stack.enter_context(patch.dict(os.environ, {"HF_TOKEN": "hf_loopback", "NO_PROXY": "127.0.0.1"}))
            close_session()
            yield self
        close_session()

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        with self._lock:
            return dict(self._at(repo_id, revision)[1])

    def put(self, repo_id: str, folder: str | Path) -> str:
        """Commits a folder as `upload_folder` does, but not over HTTP; makes the repository if need be; returns the sha."""
        files = (path for path in Path(folder).rglob("*") if path.is_file())
        added = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
        with self._lock:
            if repo_id not in self._commits:
                self._start(repo_id)
            return self._commit(repo_id, "main", self.files(repo_id) | added)

    def answer(self, method: str, target: str, headers, body: bytes) -> tuple[int, dict[str, str], bytes] | None:
        """Status, headers and content; None where the connection is cut."""
        url = urlsplit(target)
        fault = next((one for one in self.faults if one.method == method and one.path in url.path), None)
        if fault is None:
            return self._answer(method, target, url, headers, body)
        self.faults.remove(fault)
        if fault.then is not None:
            fault.then()
        if fault.wait is not None:
            fault.wait.wait(60)
        if fault.status is not None:
            self.requests.append((method, url.path))
            return _json({"error": "on purpose"}, fault.status)
        if fault.cut == "before":
            return None
        answer = self._answer(method, target, url, headers, body)
        return None if fault.cut == "after" else answer

    def _answer(self, method, target, url, headers, body):
        request = SimpleNamespace(headers=headers, query=dict(parse_qsl(url.query)), body=body)
        with self._lock:
            self.requests.append((method, url.path))
            self.tokens.add(headers.get("Authorization", "").removeprefix("Bearer "))
            try:
                endpoint, parts = _find(method, url.path, request.query)
                return endpoint(self, request, *parts)
            except HubError as error:
                return _json({"error": str(error)}, error.status, error.headers)
            except Exception as error:
                self.unknown.append((method, target))
                return _json({"error": f"{method} {target}: {error!r}"}, 501)

    def _start(self, repo_id):
        self._commits[repo_id], self._branches[repo_id] = {}, {}
        self._commit(repo_id, "main", {})

    def _commit(self, repo_id, branch, files):
        parent = self._branches[repo_id].get(branch)
        tree = sorted((path, _git_oid(content)) for path, content in files.items())
        sha = hashlib.sha1(json.dumps([repo_id, parent, tree]).encode()).hexdigest()
        self._commits[repo_id][sha] = files
        self._branches[repo_id][branch] = sha
        return sha

    def _at(self, repo_id, revision):
        """Sha and files of a branch or a commit."""
        if repo_id not in self._commits:
            raise HubError(404, "RepoNotFound", f"no repository {repo_id}")
        sha = self._branches[repo_id].get(revision, revision)
        if sha not in self._commits[repo_id]:
            raise HubError(404, "RevisionNotFound", f"no revision {revision} of {repo_id}")
        return sha, self._commits[repo_id][sha]


class HubError(Exception):
    """What the Hub answers on purpose; huggingface_hub tells the exceptions that it raises apart by the code."""

    def __init__(self, status, code, message, headers=()):
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Code": code} | dict(headers)


class _Server(ThreadingHTTPServer):
    request_queue_size = 64  # 5 otherwise: of eight downloads at once some would wait a second to connect again


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = self.server.hub.answer(self.command, self.path, self.headers, body)
        if answer is None:
            self.close_connection = True
            return
        status, headers, content = answer
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_GET

    def log_message(self, *args):
        pass


def _route(methods, template, query=()):
    """Registers what answers these paths, if the query has no other parameters than these."""

    def register(endpoint):
        ROUTES.append((methods.split(), re.compile(template.format(**PARTS)), set(query), endpoint))
        return endpoint

    return register


def _find(method, path, query):
    for methods, pattern, parameters, endpoint in ROUTES:
        if method in methods and parameters.issuperset(query) and (found := pattern.fullmatch(path)):
            return endpoint, [unquote(part) for part in found.groups()]
    raise NotImplementedError("no such endpoint")


def _json(data, status=200, headers=()):
    return status, {"Content-Type": "application/json"} | dict(headers), json.dumps(data).encode()


def _key(kind, repo_id):
    """How the hub here calls a repository: by its address."""
    return repo_id if kind == "models" else f"{kind}/{repo_id}"


def _git_oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@_route("POST", "/api/repos/create")
def _create(hub, request):
    asked = json.loads(request.body)
    if asked.get("type", "model") not in ("model", "dataset"):
        raise NotImplementedError("models and datasets only")
    repo_id = _key(f"{asked.get('type', 'model')}s", f"{asked['organization'] or USER}/{asked['name']}")
    url = {"url": f"{hub.url}/{repo_id}"}
    if repo_id in hub._commits:
        return _json(url | {"error": "You already created this model repo"}, 409)  # exist_ok=True reads the url
    hub._start(repo_id)
    if asked.get("private") or asked.get("visibility") == "private":
        hub._private.add(repo_id)
    return _json(url)


@_route("GET", "/api/whoami-v2")
def _whoami(hub, request):
    return _json({"type": "user", "id": USER, "name": USER, "fullname": USER, "orgs": [], "auth": {}})


@_route("POST", "/api/validate-yaml")  # of a card
def _validate(hub, request):
    return _json({"errors": [], "warnings": []})


@_route("POST", "/api/{type}/{repo}/branch/{revision}")
def _branch(hub, request, kind, repo_id, branch):
    repo_id = _key(kind, repo_id)
    sha, _ = hub._at(repo_id, json.loads(request.body).get("startingPoint", "main"))
    if branch in hub._branches[repo_id]:
        raise HubError(409, "", f"{branch} exists already")
    hub._branches[repo_id][branch] = sha
    return _json({})


@_route("POST", "/api/{type}/{repo}/preupload/{revision}", query=["create_pr"])
def _preupload(hub, request, kind, repo_id, revision):
    _, files = hub._at(_key(kind, repo_id), revision)
    rules = files.get(".gitignore", b"").decode().split()
    answers = []
    for asked in json.loads(request.body)["files"]:
        ignored = any(fnmatchcase(PurePosixPath(asked["path"]).name, rule) for rule in rules)
        known = {"oid": _git_oid(files[asked["path"]])} if asked["path"] in files else {}
        answers.append({"path": asked["path"], "uploadMode": "regular", "shouldIgnore": ignored} | known)
    return _json({"files": answers})


@_route("POST", "/api/{type}/{repo}/commit/{revision}", query=["create_pr"])
def _commit(hub, request, kind, repo_id, branch):
    repo_id = _key(kind, repo_id)
    files = hub.files(repo_id, branch)
    if branch not in hub._branches[repo_id]:
        raise HubError(404, "RevisionNotFound", f"no branch {branch} of {repo_id}")
    pull_request, base = {}, branch
    if request.query.get("create_pr") == "1":
        number = 1 + sum(name.startswith("refs/pr/") for name in hub._branches[repo_id])
        branch = f"refs/pr/{number}"
        pull_request = {"pullRequestUrl": f"{hub.url}/{repo_id}/discussions/{number}"}
    header, *operations = map(json.loads, request.body.splitlines())
    if header["value"].keys() - {"summary", "description", "parentCommit"}:
        raise NotImplementedError(f"{header}")
    if header["value"].get("parentCommit", hub._at(repo_id, base)[0]) != hub._at(repo_id, base)[0]:
        raise HubError(412, "", f"{base} has moved on since")
    for operation in operations:
        path = operation["value"]["path"]
        if operation["key"] == "deletedFile":
            if files.pop(path, None) is None:
                raise HubError(404, "EntryNotFound", f"no {path} to delete")
        elif operation["key"] == "file":
            files[path] = base64.b64decode(operation["value"]["content"])
        else:
            raise NotImplementedError(operation["key"])
    sha = hub._commit(repo_id, branch, files)
    return _json({"commitOid": sha, "commitUrl": f"{hub.url}/{repo_id}/commit/{sha}"} | pull_request)


@_route("GET", "/api/{type}/{repo}")
@_route("GET", "/api/{type}/{repo}/revision/{revision}")
def _info(hub, request, kind, repo_id, revision="main"):
    key = _key(kind, repo_id)
    sha, files = hub._at(key, revision)
    siblings = [{"rfilename": path} for path in sorted(files)]
    return _json({"id": repo_id, "sha": sha, "private": key in hub._private, "tags": [], "siblings": siblings})


@_route("GET", "/api/{type}/{repo}/tree/{revision}", query=["recursive", "expand"])
@_route("GET", "/api/{type}/{repo}/tree/{revision}/{path}", query=["recursive", "expand"])
def _tree(hub, request, kind, repo_id, revision, folder=""):
    sha, files = hub._at(_key(kind, repo_id), revision)
    inside = f"{folder}/" if folder else ""
    entries = {}
    for path, content in sorted(files.items()):
        if not path.startswith(inside):
            continue
        for parent in map(str, PurePosixPath(path.removeprefix(inside)).parents):
            if parent != ".":
                entries[inside + parent] = {"type": "directory", "oid": _git_oid(parent.encode())}
        entries[path] = {"type": "file", "oid": _git_oid(content), "size": len(content)}
    if folder and not entries:
        raise HubError(404, "EntryNotFound", f"no folder {folder}", {"X-Repo-Commit": sha})
    deep = request.query.get("recursive") == "true"
    return _json([{"path": path} | entries[path] for path in entries if deep or "/" not in path.removeprefix(inside)])


@_route("GET HEAD", "/datasets/{repo}/resolve/{revision}/{path}")
def _file_of_dataset(hub, request, repo_id, revision, path):
    return _file(hub, request, _key("datasets", repo_id), revision, path)


@_route("GET HEAD", "/{repo}/resolve/{revision}/{path}")
def _file(hub, request, repo_id, revision, path):
    sha, files = hub._at(repo_id, revision)
    headers = {"X-Repo-Commit": sha}
    if path not in files:
        raise HubError(404, "EntryNotFound", f"no {path} in {repo_id} at {revision}", headers)
    return 200, headers | {"ETag": f'"{_git_oid(files[path])}"'}, files[path]
