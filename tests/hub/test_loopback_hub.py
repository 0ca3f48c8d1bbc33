"""The loopback Hub of the other tests: what huggingface_hub and `publish_folder` send to it and get from it."""

import json
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from hf_unlearn.examples.loopback_hub import LoopbackHub
from hf_unlearn.hub.allowed import RECORD


LARGE = bytes(range(256)) * 40
FILES = {
    "README.md": b"---\nlicense: mit\n---\n# A model\n",
    "config.json": b"{}",
    "empty.txt": b"",
    "model.safetensors": LARGE,
    "unet/config.json": b'{"a": 1}',
    "unet/deep/er/weights and more.bin": LARGE[::-1],
}
PUBLISHABLE = {name: FILES[name] for name in ("README.md", "config.json", "model.safetensors")}
# Each download has a cache of its own: otherwise the client would take a file that it knows by its ETag from there.
CLIENT = """
import json, sys
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download

from hf_unlearn.hub.publish import publish_folder

folder, api, got = Path(sys.argv[1]), HfApi(), {}


def error(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        return [kind.__name__ for kind in type(error).__mro__] + [getattr(error.response, "status_code", None)]


def download(name, repo_id="me/model", revision=None):
    return snapshot_download(repo_id, revision=revision, cache_dir=folder / name)


got["new"] = api.create_repo("model").repo_id
got["again"] = api.create_repo("me/model", exist_ok=True).repo_id
got["first"] = api.upload_folder(repo_id="me/model", folder_path=folder / "model").oid
got["unchanged"] = api.upload_folder(repo_id="me/model", folder_path=folder / "model").oid
got["whole"] = download("whole")
got["listed"] = [api.list_repo_files("me/model"), [s.rfilename for s in api.model_info("me/model").siblings]]
got["subtree"] = sorted(entry.path for entry in api.list_repo_tree("me/model", "unet", recursive=True))
got["second"] = api.upload_file(repo_id="me/model", path_in_repo="config.json", path_or_fileobj=b"[2]").oid
got["changed"] = Path(hf_hub_download("me/model", "config.json", cache_dir=folder / "whole")).read_text()
got["newest"] = download("newest")
got["oldest"] = download("oldest", revision=got["first"])

got["no file"] = error(hf_hub_download, "me/model", "nothing.bin")
got["no folder"] = error(lambda: list(api.list_repo_tree("me/model", "nothing")))
got["no repository"] = error(snapshot_download, "me/nothing")
got["push to none"] = error(api.upload_file, repo_id="me/nothing", path_in_repo="a", path_or_fileobj=b"a")
got["no revision"] = error(snapshot_download, "me/model", revision="nothing")
got["push to a commit"] = error(
    api.upload_file, repo_id="me/model", path_in_repo="a", path_or_fileobj=b"a", revision=got["first"]
)

got["published"] = publish_folder(folder / "model", "published", revision="v/1", token="hf_mine", private=False).commit.oid
got["republished"] = publish_folder(folder / "model", "published", revision="v/1").commit.oid
got["of a branch"] = download("branch", "me/published", "v/1")
secret = publish_folder(folder / "model", "me/secret", commit_message="Once", run_as_future=True).commit.result()
got["secret"] = [secret.oid, secret.commit_message, api.model_info("me/secret").private]
got["open"] = api.model_info("me/published").private
print(json.dumps(got))
"""


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def read(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def ask(url, method="GET", body=None, **headers):
    """Status, headers and content; not by way of a proxy, whatever the environment says."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        answer = opener.open(urllib.request.Request(url, body, headers, method=method))
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        return answer.status, answer.headers, answer.read()


@pytest.fixture
def stocked(tmp_path):
    with LoopbackHub() as hub:
        hub.put("me/model", write(tmp_path / "model", FILES))
        yield hub


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    """The hub that one client process talked to, and what that saw."""
    folder = tmp_path_factory.mktemp("client")
    write(folder / "model", FILES)
    with LoopbackHub() as hub:
        command = [sys.executable, "-c", CLIENT, str(folder)]
        done = subprocess.run(
            command, env=hub.environment(folder / "home"), capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert hub.unknown == []
        yield hub, json.loads(done.stdout)


class TestClient:
    def test_a_folder_comes_back_and_is_listed(self, client):
        hub, got = client
        assert got["new"] == got["again"] == "me/model"
        assert read(got["whole"]) == hub.files("me/model", got["first"]) == FILES
        assert [sorted(names) for names in got["listed"]] == [sorted(FILES)] * 2
        assert got["subtree"] == [
            f"unet/{name}" for name in ("config.json", "deep", "deep/er", "deep/er/weights and more.bin")
        ]

    def test_every_change_is_a_commit_and_old_ones_stay(self, client):
        hub, got = client
        assert got["unchanged"] == got["first"] != got["second"]
        assert got["changed"] == "[2]"
        assert read(got["newest"]) == hub.files("me/model", got["second"]) == FILES | {"config.json": b"[2]"}
        assert read(got["oldest"]) == FILES

    @pytest.mark.parametrize(
        ("cases", "error"),
        [
            (("no file", "no folder"), "EntryNotFoundError"),
            (("no repository", "push to none"), "RepositoryNotFoundError"),
            (("no revision", "push to a commit"), "RevisionNotFoundError"),
        ],
    )
    def test_what_is_not_there(self, client, cases, error):
        _, got = client
        for case in cases:
            assert error in got[case]
            assert got[case][-1] == 404

    def test_publishes_what_may_be_seen_as_it_was_told(self, client):
        hub, got = client
        assert got["published"] == got["republished"]
        published = hub.files("me/published", "v/1")
        assert read(got["of a branch"]) == published
        assert {name: content for name, content in published.items() if name != RECORD} == PUBLISHABLE
        assert hub.files("me/published") == {}
        oid, message, private = got["secret"]
        assert hub.files("me/secret") == hub.files("me/secret", oid) == published
        assert (message, private, got["open"]) == ("Once", True, False)
        assert hub.tokens == {"hf_loopback", "hf_mine"}


class TestFromTheTest:
    """What the test does itself, with no client."""

    def test_puts_a_folder(self, stocked, tmp_path):
        sha = stocked.put("me/model", write(tmp_path / "more", {"config.json": b"[]", "a/b": b"c"}))
        assert stocked.files("me/model", sha) == FILES | {"config.json": b"[]", "a/b": b"c"}

    def test_head_is_get_without_the_content(self, stocked):
        path = "/me/model/resolve/main/unet/deep/er/weights%20and%20more.bin"
        (status, head, nothing), (_, get, content) = ask(stocked.url + path, "HEAD"), ask(stocked.url + path)
        assert (status, nothing, content) == (200, b"", LARGE[::-1])
        assert all(head[name] == get[name] is not None for name in ("ETag", "X-Repo-Commit", "Content-Length"))
        assert stocked.requests == [("HEAD", path), ("GET", path)]

    @pytest.mark.parametrize(
        ("method", "target", "body"),
        [
            ("GET", "/api/models/me/model?blobs=true", None),
            ("DELETE", "/api/models/me/model", None),
            ("POST", "/api/repos/create", b"no json"),
            ("POST", "/api/models/me/model/commit/main", b'{"key": "header", "value": {"hot": "0"}}'),
        ],
    )
    def test_what_it_does_not_know(self, stocked, method, target, body):
        status, _, content = ask(stocked.url + target, method, body)
        assert status == 501
        assert target.encode() in content
        assert stocked.unknown == [(method, target)]
        assert stocked.files("me/model") == FILES

    def test_environment_and_two_hubs_share_nothing(self, stocked, tmp_path, monkeypatch):
        foreign = ("HTTPS_PROXY", "all_proxy", "HF_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN", "TRANSFORMERS_OFFLINE")
        for name in foreign:
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        environment = stocked.environment(tmp_path)
        assert not {name.upper() for name in foreign} & {name.upper() for name in environment}
        assert (environment["HF_ENDPOINT"], environment["HF_HUB_OFFLINE"]) == (stocked.url, "0")
        assert "PATH" in environment
        with LoopbackHub() as other:
            answer = ask(other.url + "/me/model/resolve/main/config.json")
            assert answer[1]["X-Error-Code"] == "RepoNotFound"
        assert stocked.requests == []
