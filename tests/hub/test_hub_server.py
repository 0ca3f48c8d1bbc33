"""The loopback Hub of the other tests: what huggingface_hub, transformers and diffusers send to it and get from it."""

import json
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from hub_server import LoopbackHub
from safetensors.torch import load_file


LARGE = bytes(range(256)) * 40
FILES = {
    "README.md": b"---\nlicense: mit\n---\n# A model\n",
    "config.json": b"{}",
    "empty.txt": b"",
    "model.safetensors": LARGE,
    "unet/config.json": b'{"a": 1}',
    "unet/deep/er/weights and more.bin": LARGE[::-1],
}
# Each download has a cache of its own: otherwise the client would take a file that it knows by its ETag from there.
CLIENT = """
import json, sys
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers

from hf_unlearn.hub.publish import publish_folder

folder, api, got = Path(sys.argv[1]), HfApi(), {}


def error(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        return [kind.__name__ for kind in type(error).__mro__] + [getattr(error.response, "status_code", None)]


def download(name, revision=None):
    return snapshot_download("me/model", revision=revision, cache_dir=folder / name)


got["new"] = api.create_repo("model").repo_id
got["again"] = api.create_repo("me/model", exist_ok=True).repo_id
got["conflict"] = error(api.create_repo, "me/model")
got["first"] = api.upload_folder(repo_id="me/model", folder_path=folder / "model").oid
got["unchanged"] = api.upload_folder(repo_id="me/model", folder_path=folder / "model").oid
got["whole"] = download("whole")
got["info"] = [sibling.rfilename for sibling in api.model_info("me/model").siblings]
got["files"] = api.list_repo_files("me/model")
got["tree"] = sorted(entry.path for entry in api.list_repo_tree("me/model"))
got["subtree"] = sorted(entry.path for entry in api.list_repo_tree("me/model", "unet", recursive=True))
got["lfs"] = sorted(e.path for e in api.list_repo_tree("me/model", recursive=True) if getattr(e, "lfs", None))

got["second"] = api.upload_file(repo_id="me/model", path_in_repo="config.json", path_or_fileobj=b"[2]").oid
got["changed"] = Path(hf_hub_download("me/model", "config.json", cache_dir=folder / "whole")).read_text()
got["third"] = api.delete_file("unet/config.json", repo_id="me/model").oid
got["newest"] = download("newest")
got["oldest"] = download("oldest", got["first"])

got["no file"] = error(hf_hub_download, "me/model", "nothing.bin")
got["gone"] = error(hf_hub_download, "me/model", "unet/config.json")
got["not gone"] = Path(hf_hub_download("me/model", "unet/config.json", revision=got["first"])).read_text()
got["delete nothing"] = error(api.delete_file, "nothing.bin", repo_id="me/model")
got["no folder"] = error(lambda: list(api.list_repo_tree("me/model", "nothing")))
got["no repository"] = error(snapshot_download, "me/nothing")
got["push to none"] = error(api.upload_file, repo_id="me/nothing", path_in_repo="a", path_or_fileobj=b"a")
got["no revision"] = error(snapshot_download, "me/model", revision="nothing")
got["no sha"] = error(hf_hub_download, "me/model", "config.json", revision="0" * 40)
got["push to a commit"] = error(
    api.upload_file, repo_id="me/model", path_in_repo="a", path_or_fileobj=b"a", revision=got["first"]
)

got["published"] = publish_folder(folder / "model", "published", revision="v/1").oid
got["branch"] = publish_folder(folder / "model", "published", revision="v/1").oid
got["of a branch"] = snapshot_download("me/published", revision="v/1", cache_dir=folder / "branch")

with open(folder / "resumed", "wb") as file:
    file.write(b"0123")
    url = f"{api.endpoint}/me/model/resolve/main/model.safetensors"
    http_get(url, file, resume_size=4, headers=build_hf_headers(), expected_size=10240)
print(json.dumps(got))
"""
PUSH = """
import sys
from pathlib import Path

from diffusers import DDPMPipeline
from transformers import AutoTokenizer, ViTForImageClassification

folder = Path(sys.argv[1])
ViTForImageClassification.from_pretrained(folder / "vit").push_to_hub("me/vit")
AutoTokenizer.from_pretrained(folder / "tokenizer").push_to_hub("me/vit")
DDPMPipeline.from_pretrained(folder / "ddpm").push_to_hub("ddpm")
"""
LOAD = """
import sys
from pathlib import Path

from diffusers import DiffusionPipeline
from transformers import AutoModelForImageClassification, AutoTokenizer

folder = Path(sys.argv[1])
AutoModelForImageClassification.from_pretrained("me/vit").save_pretrained(folder / "vit")
AutoTokenizer.from_pretrained("me/vit").save_pretrained(folder / "tokenizer")
DiffusionPipeline.from_pretrained("me/ddpm").save_pretrained(folder / "ddpm")
"""


def run(hub, script, folder, home):
    command = [sys.executable, "-c", script, str(folder)]
    environment = hub.environment(home) | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert hub.unknown == []
    return done.stdout


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
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def stocked(hub, tmp_path):
    hub.put("me/model", write(tmp_path / "model", FILES))
    return hub


@pytest.fixture(scope="module", params=[None, 1000], ids=["regular", "lfs"])
def client(request, tmp_path_factory):
    """What one client process saw, and the hub that it talked to, with small and large files."""
    folder = tmp_path_factory.mktemp("client")
    write(folder / "model", FILES)
    with LoopbackHub(lfs_threshold=request.param) as hub:
        yield hub, json.loads(run(hub, CLIENT, folder, folder / "home")), folder


class TestClient:
    def test_creates_once(self, client):
        _, got, _ = client
        assert got["new"] == got["again"] == "me/model"
        assert got["conflict"][-1] == 409

    def test_a_folder_comes_back(self, client):
        hub, got, _ = client
        assert read(got["whole"]) == FILES
        assert hub.files("me/model", got["first"]) == FILES

    def test_lists(self, client):
        _, got, _ = client
        assert sorted(got["info"]) == sorted(got["files"]) == sorted(FILES)
        assert got["tree"] == ["README.md", "config.json", "empty.txt", "model.safetensors", "unet"]
        inside = ["config.json", "deep", "deep/er", "deep/er/weights and more.bin"]
        assert got["subtree"] == [f"unet/{name}" for name in inside]

    def test_large_files_over_lfs(self, client):
        hub, got, _ = client
        large = ["model.safetensors", "unet/deep/er/weights and more.bin"]
        uploads = [path for method, path in hub.requests if method == "PUT"]
        if hub.lfs_threshold is None:
            assert got["lfs"] == uploads == []
        else:
            assert got["lfs"] == large
            assert len(uploads) == len(set(uploads)) == 2  # what is known is not sent again

    def test_every_change_is_a_commit(self, client):
        hub, got, _ = client
        assert got["unchanged"] == got["first"]
        _, *commits = hub.commits("me/model")
        assert commits == [got[name] for name in ("first", "second", "third")]
        assert len({*hub.commits("me/model")}) == 4
        assert all(len(sha) == 40 for sha in commits)
        assert Path(got["newest"]).name == got["third"]  # the snapshot's folder: the client asked where main is

    def test_changes_one_file_and_deletes_another(self, client):
        hub, got, _ = client
        left = FILES | {"config.json": b"[2]"}
        assert got["changed"] == "[2]"
        assert hub.files("me/model", got["second"]) == left
        del left["unet/config.json"]
        assert read(got["newest"]) == hub.files("me/model") == left

    def test_old_revisions_stay(self, client):
        _, got, _ = client
        assert read(got["oldest"]) == FILES
        assert got["not gone"] == '{"a": 1}'

    @pytest.mark.parametrize(
        ("case", "error"),
        [
            ("no file", "EntryNotFoundError"),
            ("gone", "EntryNotFoundError"),
            ("delete nothing", "EntryNotFoundError"),
            ("no folder", "EntryNotFoundError"),
            ("no repository", "RepositoryNotFoundError"),
            ("push to none", "RepositoryNotFoundError"),
            ("no revision", "RevisionNotFoundError"),
            ("no sha", "RevisionNotFoundError"),
            ("push to a commit", "RevisionNotFoundError"),
        ],
    )
    def test_what_is_not_there(self, client, case, error):
        _, got, _ = client
        assert error in got[case]
        assert got[case][-1] == 404

    def test_publishes_on_a_branch(self, client):
        hub, got, _ = client
        published = {name: FILES[name] for name in ("README.md", "config.json", "model.safetensors")}
        assert got["published"] == got["branch"]
        assert read(got["of a branch"]) == hub.files("me/published", "v/1") == published
        assert hub.files("me/published") == {}

    def test_goes_on_with_half_a_file(self, client):
        _, _, folder = client
        assert (folder / "resumed").read_bytes() == b"0123" + LARGE[4:]


def test_a_model_a_tokenizer_and_a_pipeline(hub, tiny_vit, tokenizer, tiny_ddpm, tmp_path):
    saved, loaded = tmp_path / "saved", tmp_path / "loaded"
    for name, what in (("vit", tiny_vit), ("tokenizer", tokenizer), ("ddpm", tiny_ddpm)):
        what.save_pretrained(saved / name)
    run(hub, PUSH, saved, tmp_path / "one home")
    assert hub.files("me/vit")["model.safetensors"] == (saved / "vit/model.safetensors").read_bytes()
    sent = len(hub.requests)
    run(hub, LOAD, loaded, tmp_path / "another home")
    assert {method for method, _ in hub.requests[sent:]} == {"GET", "HEAD"}
    assert ("GET", "/api/models/me/vit/tree/main/additional_chat_templates") in hub.requests
    assert (loaded / "tokenizer/tokenizer.json").read_bytes() == (saved / "tokenizer/tokenizer.json").read_bytes()
    for name in ("vit/model.safetensors", "ddpm/unet/diffusion_pytorch_model.safetensors"):
        before, after = load_file(saved / name), load_file(loaded / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


class TestFromTheTest:
    """What the test does itself, with no client."""

    def test_puts_a_folder(self, stocked, tmp_path):
        assert stocked.files("me/model") == FILES
        sha = stocked.put("me/model", write(tmp_path / "more", {"config.json": b"[]", "a/b": b"c"}))
        assert stocked.files("me/model", sha) == FILES | {"config.json": b"[]", "a/b": b"c"}
        assert stocked.commits("me/model")[-1] == sha

    def test_replaces_and_deletes(self, stocked):
        before = stocked.commits("me/model")[-1]
        replaced = stocked.replace("me/model", "model.safetensors", LARGE[::-1])
        deleted = stocked.replace("me/model", "model.safetensors", None)
        assert stocked.commits("me/model")[-3:] == [before, replaced, deleted]
        file = f"{stocked.url}/me/model/resolve/%s/model.safetensors"
        (_, old, content), (_, new, other) = ask(file % before), ask(file % replaced)
        assert (content, other) == (LARGE, LARGE[::-1])
        assert old["ETag"] != new["ETag"]
        status, headers, _ = ask(file % "main")
        assert (status, headers["X-Error-Code"], headers["X-Repo-Commit"]) == (404, "EntryNotFound", deleted)

    def test_back_to_what_was(self, stocked):
        there = stocked.commits("me/model")[-1]
        stocked.replace("me/model", "config.json", b"[]")
        back = stocked.replace("me/model", "config.json", FILES["config.json"])
        assert len(set(stocked.commits("me/model"))) == 4
        assert stocked.files("me/model", back) == stocked.files("me/model", there)

    def test_nothing_is_shared_with_the_hub(self, stocked):
        stocked.files("me/model").clear()
        assert stocked.files("me/model") == FILES

    def test_head_is_get_without_the_content(self, stocked):
        url = f"{stocked.url}/me/model/resolve/main/unet/deep/er/weights%20and%20more.bin"
        (status, head, nothing), (_, get, content) = ask(url, "HEAD"), ask(url)
        assert (status, nothing, content) == (200, b"", LARGE[::-1])
        for name in ("ETag", "X-Repo-Commit", "Content-Length"):
            assert head[name] == get[name] is not None
        with socket.create_connection(stocked.url.removeprefix("http://").split(":")) as connection:
            connection.sendall(b"HEAD /me/model/resolve/main/model.safetensors HTTP/1.0\r\n\r\n")
            assert connection.makefile("rb").read().endswith(b"\r\n\r\n")

    def test_remembers_the_requests(self, stocked):
        ask(f"{stocked.url}/me/model/resolve/main/unet/deep/er/weights%20and%20more.bin", "HEAD")
        ask(f"{stocked.url}/api/models/me/model/tree/main?recursive=true")
        paths = ["/me/model/resolve/main/unet/deep/er/weights%20and%20more.bin", "/api/models/me/model/tree/main"]
        assert stocked.requests == list(zip(["HEAD", "GET"], paths, strict=True))

    @pytest.mark.parametrize(("asked", "first", "last"), [("10-19", 10, 19), ("10000-", 10000, 10239)])
    def test_parts_of_a_file(self, stocked, asked, first, last):
        url = f"{stocked.url}/me/model/resolve/main/model.safetensors"
        status, headers, content = ask(url, Range=f"bytes={asked}")
        assert (status, content) == (206, LARGE[first : last + 1])
        assert headers["Content-Range"] == f"bytes {first}-{last}/{len(LARGE)}"

    def test_wrong_content_over_lfs(self, hub):
        assert ask(f"{hub.url}/lfs/{'0' * 64}", "PUT", b"something")[0] == 400

    @pytest.mark.parametrize(
        ("method", "target", "body"),
        [
            ("GET", "/api/datasets/me/data", None),
            ("GET", "/api/models/me/model?blobs=true", None),
            ("DELETE", "/api/models/me/model", None),
            ("POST", "/api/repos/create", b"no json"),
            ("POST", "/api/repos/create", b'{"type": "dataset", "name": "data", "organization": null}'),
            ("POST", "/api/models/me/model/commit/main?create_pr=1", b""),
            ("POST", "/api/models/me/model/commit/main", b'{"key": "header", "value": {"parentCommit": "0"}}'),
            (
                "POST",
                "/api/models/me/model/commit/main",
                b'{"key": "header", "value": {}}\n{"key": "deletedFolder", "value": {"path": "unet/"}}',
            ),
        ],
    )
    def test_what_it_does_not_know(self, stocked, method, target, body):
        status, _, content = ask(stocked.url + target, method, body)
        assert status == 501
        assert b"\n" not in content
        assert target.encode() in content
        assert stocked.unknown == [(method, target)]
        assert len(stocked.commits("me/model")) == 2

    def test_two_hubs_share_nothing(self, stocked):
        with LoopbackHub() as other:
            url = "/me/model/resolve/main/config.json"
            assert ask(other.url + url)[1]["X-Error-Code"] == "RepoNotFound"
            assert ask(stocked.url + url)[0] == 200
            assert len(other.requests) == 1

    def test_environment(self, hub, tmp_path, monkeypatch):
        foreign = ("HTTPS_PROXY", "all_proxy", "HF_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN", "TRANSFORMERS_OFFLINE")
        for name in foreign:
            monkeypatch.setenv(name, "http://127.0.0.1:9")
        environment = hub.environment(tmp_path)
        assert not {name.upper() for name in foreign} & {name.upper() for name in environment}
        assert (environment["HF_ENDPOINT"], environment["HF_HUB_OFFLINE"]) == (hub.url, "0")
        assert "PATH" in environment
