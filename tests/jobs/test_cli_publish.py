"""`hf-unlearn publish` and `hf-unlearn verify`, over the loopback Hub."""

import json

import pytest

from hf_unlearn import cli
from hf_unlearn.examples.loopback_hub import Fault, LoopbackHub


@pytest.fixture
def hub(tmp_path):
    with LoopbackHub() as hub, hub.in_this_process(tmp_path / "home"):
        yield hub
        assert hub.unknown == []


def run(capsys, *words):
    """Exit code, and what was printed to either stream."""
    code = cli.main([str(word) for word in words])
    out, err = capsys.readouterr()
    assert err.count("\n") == (code != 0)
    return code, out, err.removeprefix("hf-unlearn: error: ").strip()


def test_publish_and_verify(hub, tiny_vit, tmp_path, capsys):
    folder = tmp_path / "out"
    tiny_vit.save_pretrained(folder)
    (folder / "_private").mkdir()
    (folder / "_private/key").write_bytes(b"secret")
    capsys.readouterr()
    code, out, _ = run(capsys, "publish", folder, "me/digits", "--dry_run")
    assert (code, hub._commits) == (0, {})
    assert "_private/key  left out: private" in out
    assert "nothing was sent" in out
    code, out, _ = run(capsys, "publish", folder, "digits", "--private", "false", "--commit_message", "mine")
    assert code == 0
    assert f"published  {hub.url}/me/digits/commit/" in out
    assert hub._private == set()
    assert set(hub.files("me/digits")) == {"README.md", "config.json", "model.safetensors", "provenance.json"}
    assert b"AutoModelForImageClassification" in hub.files("me/digits")["README.md"]
    code, out, _ = run(capsys, "verify", "me/digits")
    assert code == 0
    assert "all of 3 files are as they were published" in out
    (folder / "config.json").write_text("{}")
    hub.put("me/digits", folder)
    code, out, error = run(capsys, "verify", "me/digits")
    assert (code, error) == (1, "me/digits: is not as it was published; see above")
    assert "differs: config.json" in out


def test_what_is_wrong_is_said_in_a_line(hub, tiny_vit, tmp_path, capsys):
    tiny_vit.save_pretrained(folder := tmp_path / "out")
    (tmp_path / "empty").mkdir()
    (tmp_path / "audit.json").write_text(json.dumps({"format": 1}))
    capsys.readouterr()
    for words, expected, message in (
        (["publish"], 2, "folder: missing; name the folder that a run saved to: hf-unlearn publish FOLDER REPO_ID"),
        (["publish", folder], 2, "repo_id: missing"),
        (["publish", folder, "me/x", "more"], 2, "unexpected argument 'more'"),
        (["publish", tmp_path / "nothing", "me/x"], 2, "is no folder; name the one that a run saved to"),
        (["publish", folder, "me/x", "--audit", "nothing.json"], 2, "audit: 'nothing.json' is no file"),
        (["publish", folder, "me/x", "--privat", "no"], 2, "unknown key 'privat'; did you mean 'private'?"),
        (["publish", folder, "me/x", "--private", "perhaps"], 2, "private: 'perhaps' is not allowed"),
        (["publish", folder, "me/x", "--create_pr", "--revision", "b"], 2, "create_pr: a pull request is made against main"),
        (["publish", folder, "me x"], 1, "repo_id='me x': is no name of a repository"),
        (["publish", folder, "me/x", "--audit", tmp_path / "audit.json"], 1, "is no audit report"),
        (["publish", tmp_path / "empty", "me/x"], 1, "no model.safetensors to publish"),
        (["verify"], 2, "source: missing; name a repository or a folder"),
        (["verify", "me/nothing"], 1, "'me/nothing': no such folder, and no such model or revision on the Hub"),
        (["verify", folder], 1, "has no provenance.json"),
        (["verify", "me/x", "--repo_type", "space"], 2, "repo_type: 'space'"),
    ):  # fmt: skip
        code, _, error = run(capsys, *words)
        assert message in error
        assert code == expected
    hub.faults.append(Fault("POST", "/commit/", status=403))
    assert run(capsys, "publish", folder, "me/x")[2].startswith("me/x: nothing was published (403): the token may not")
