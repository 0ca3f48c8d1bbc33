"""A Hugging Face Hub on loopback, over real HTTP and in memory, for tests that push a model and load it again.

It has model repositories only, and no rights: every token reads and writes everything. A new repository is empty, where
the real Hub puts a .gitattributes. Whatever it does not understand it answers with 501, which huggingface_hub 2.4 does
not try again, and keeps in `LoopbackHub.unknown`.
"""

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from urllib.parse import parse_qsl, unquote, urlsplit


USER = "me"  # who owns a repository that is created without an owner
FOREIGN_SETTINGS = re.compile(r"(HF|HUGGING_?FACE|TRANSFORMERS)_.*|.*_PROXY", re.IGNORECASE)
PARTS = {"repo": "([^/]+/[^/]+)", "revision": "([^/]+)", "path": "(.+)", "oid": "([0-9a-f]{64})"}
ROUTES = []


class LoopbackHub:
    """Use as `with LoopbackHub() as hub:`; read and written by a client in a process of its own, and by the test here.

    Args:
        lfs_threshold (`int`, *optional*): files with more bytes are uploaded over LFS. Default: none is.

    Attributes:
        url (`str`): the endpoint.
        requests (`list[tuple[str, str]]`): method and path, as sent but without the query, of every request so far.
        unknown (`list[tuple[str, str]]`): method and target, with the query, of those answered with 501. A test that
            does not expect any asserts that it is empty: many callers go on after an error of the server.
    """

    def __init__(self, lfs_threshold: int | None = None):
        self.lfs_threshold = lfs_threshold
        self.requests: list[tuple[str, str]] = []
        self.unknown: list[tuple[str, str]] = []
        self._lock = threading.RLock()
        self._commits: dict[str, dict[str, dict[str, bytes]]] = {}  # repository, sha, path: content
        self._branches: dict[str, dict[str, str]] = {}  # repository, branch: sha
        self._objects: dict[str, bytes] = {}  # what came over LFS, by its sha256

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
            "HF_HUB_DISABLE_XET": "1",  # else what is answered with "lfs" goes to xet, which is another protocol
            "NO_PROXY": "127.0.0.1",
        }

    def commits(self, repo_id: str) -> list[str]:
        """Shas of all branches, the oldest first; the first of all is the empty commit of a new repository."""
        return list(self._commits[repo_id])

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

    def replace(self, repo_id: str, path: str, content: bytes | None) -> str:
        """Commits another content of one file, or its deletion (`None`); returns the sha."""
        with self._lock:
            files = self.files(repo_id)
            del files[path]
            return self._commit(repo_id, "main", files if content is None else files | {path: content})

    def answer(self, method: str, target: str, headers, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content."""
        url = urlsplit(target)
        request = SimpleNamespace(headers=headers, query=dict(parse_qsl(url.query)), body=body)
        with self._lock:
            self.requests.append((method, url.path))
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

    def _over_lfs(self, size):
        return self.lfs_threshold is not None and size > self.lfs_threshold

    def _oid(self, content):
        """What the Hub calls a file's content: in its ETag, and to tell a client what need not be uploaded again."""
        return hashlib.sha256(content).hexdigest() if self._over_lfs(len(content)) else _git_oid(content)


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
        status, headers, content = self.server.hub.answer(self.command, self.path, self.headers, body)
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


def _git_oid(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@_route("POST", "/api/repos/create")
def _create(hub, request):
    asked = json.loads(request.body)
    if asked.get("type", "model") != "model":
        raise NotImplementedError("models only")
    repo_id = f"{asked['organization'] or USER}/{asked['name']}"
    url = {"url": f"{hub.url}/{repo_id}"}
    if repo_id in hub._commits:
        return _json(url | {"error": "You already created this model repo"}, 409)  # exist_ok=True reads the url
    hub._start(repo_id)
    return _json(url)


@_route("POST", "/api/validate-yaml")
def _validate_card(hub, request):
    return _json({"errors": [], "warnings": []})


@_route("POST", "/api/models/{repo}/branch/{revision}")
def _branch(hub, request, repo_id, branch):
    sha, _ = hub._at(repo_id, json.loads(request.body).get("startingPoint", "main"))
    if branch in hub._branches[repo_id]:
        raise HubError(409, "", f"{branch} exists already")
    hub._branches[repo_id][branch] = sha
    return _json({})


@_route("POST", "/api/models/{repo}/preupload/{revision}")
def _preupload(hub, request, repo_id, revision):
    _, files = hub._at(repo_id, revision)
    answers = []
    for asked in json.loads(request.body)["files"]:
        path, mode = asked["path"], "lfs" if hub._over_lfs(asked["size"]) else "regular"
        known = {"oid": hub._oid(files[path])} if path in files else {}
        answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False} | known)
    return _json({"files": answers})


@_route("POST", r"/{repo}\.git/info/lfs/objects/batch")
def _lfs_batch(hub, request, repo_id):
    hub._at(repo_id, "main")
    objects = [{"oid": asked["oid"], "size": asked["size"]} for asked in json.loads(request.body)["objects"]]
    for wanted in objects:
        if wanted["oid"] not in hub._objects:
            wanted["actions"] = {"upload": {"href": f"{hub.url}/lfs/{wanted['oid']}"}}
    return _json({"transfer": "basic", "objects": objects})


@_route("PUT", "/lfs/{oid}")
def _lfs_upload(hub, request, oid):
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise HubError(400, "", f"this is not the content of {oid}")
    hub._objects[oid] = request.body
    return _json({})


@_route("POST", "/api/models/{repo}/commit/{revision}")
def _commit(hub, request, repo_id, branch):
    files = hub.files(repo_id, branch)
    if branch not in hub._branches[repo_id]:
        raise HubError(404, "RevisionNotFound", f"no branch {branch} of {repo_id}")
    header, *operations = map(json.loads, request.body.splitlines())
    if header["value"].keys() - {"summary", "description"}:
        raise NotImplementedError(f"{header}")  # a parent commit, above all
    for operation in operations:
        value, path = operation["value"], operation["value"]["path"]
        match operation["key"]:
            case "file":
                files[path] = base64.b64decode(value["content"])
            case "lfsFile":
                files[path] = hub._objects[value["oid"]]
            case "deletedFile" if path in files:
                del files[path]
            case "deletedFile":
                raise HubError(404, "EntryNotFound", f"A file with this name doesn't exist: {path}")
            case key:
                raise NotImplementedError(key)
    sha = hub._commit(repo_id, branch, files)
    return _json({"commitOid": sha, "commitUrl": f"{hub.url}/{repo_id}/commit/{sha}"})


@_route("GET", "/api/models/{repo}")
@_route("GET", "/api/models/{repo}/revision/{revision}")
def _model_info(hub, request, repo_id, revision="main"):
    sha, files = hub._at(repo_id, revision)
    siblings = [{"rfilename": path} for path in sorted(files)]
    return _json({"id": repo_id, "sha": sha, "private": False, "tags": [], "siblings": siblings})


@_route("GET", "/api/models/{repo}/tree/{revision}", query=["recursive", "expand"])
@_route("GET", "/api/models/{repo}/tree/{revision}/{path}", query=["recursive", "expand"])
def _tree(hub, request, repo_id, revision, folder=""):
    sha, files = hub._at(repo_id, revision)
    inside = f"{folder}/" if folder else ""
    entries = {}
    for path, content in sorted(files.items()):
        if not path.startswith(inside):
            continue
        for parent in map(str, PurePosixPath(path.removeprefix(inside)).parents):
            if parent != ".":
                entries[inside + parent] = {"type": "directory", "oid": _git_oid(parent.encode())}
        entries[path] = {"type": "file", "oid": _git_oid(content), "size": len(content)}
        if hub._over_lfs(len(content)):
            entries[path]["lfs"] = {"oid": hub._oid(content), "size": len(content), "pointerSize": 130}
    if folder and not entries:
        raise HubError(404, "EntryNotFound", f"no folder {folder}", {"X-Repo-Commit": sha})
    deep = request.query.get("recursive") == "true"
    return _json([{"path": path} | entries[path] for path in entries if deep or "/" not in path.removeprefix(inside)])


@_route("GET HEAD", "/{repo}/resolve/{revision}/{path}")
def _file(hub, request, repo_id, revision, path):
    sha, files = hub._at(repo_id, revision)
    headers = {"X-Repo-Commit": sha}
    if path not in files:
        raise HubError(404, "EntryNotFound", f"no {path} in {repo_id} at {revision}", headers)
    content = files[path]
    headers |= {"ETag": f'"{hub._oid(content)}"', "Accept-Ranges": "bytes"}
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
    if asked is None:
        return 200, headers, content
    part = content[int(asked[1]) : int(asked[2] or len(content)) + 1]
    last = int(asked[1]) + len(part) - 1
    return 206, headers | {"Content-Range": f"bytes {asked[1]}-{last}/{len(content)}"}, part
