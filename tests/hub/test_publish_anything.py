"""`publish`: every kind of thing, over the loopback Hub; what is written down of it; and what goes wrong on the way."""

import contextlib
import io
import json
import threading
from pathlib import Path

import numpy as np
import pytest
import yaml
from datasets import Dataset
from diffusers import DDPMPipeline
from filter_data import fitted_filter
from huggingface_hub import ModelCard, hf_hub_download
from made_up import record as made_up
from peft import LoraConfig, get_peft_model
from transformers import ViTForImageClassification

import hf_unlearn
from hf_unlearn import FilteredPipeline, in_forget_set, publish, verify_provenance
from hf_unlearn.data import example_digest, example_digests
from hf_unlearn.examples.loopback_hub import Fault, LoopbackHub
from hf_unlearn.hub.allowed import RECORD
from hf_unlearn.hub.card import Figure, unlearning_card
from hf_unlearn.hub.provenance import Provenance
from hf_unlearn.hub.record import earlier_of, record_of, write_record
from hf_unlearn.hub.verify import KEY_CHECK
from hf_unlearn.influence.report.report import InfluenceReport


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with LoopbackHub() as hub, hub.in_this_process(tmp_path_factory.mktemp("home")):
        yield hub
        assert hub.unknown == []


def quietly(*arguments, **options):
    return publish(*arguments, show=lambda text: None, **options)


def report():
    random = np.random.default_rng(0)
    batches = [(step, np.arange(8), np.ones(8), random.normal(size=(8, 1))) for step in range(6)]
    observations = made_up(batches, examples=8, targets=("a | b",), ids=None)
    return InfluenceReport.from_observations(
        observations, {"run_id": "7", "targets": ["a | b"], "observation": "in_run"}
    )


def adapted(vit):
    return get_peft_model(vit, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))


THINGS = {
    "model": lambda vit, ddpm: vit,
    "adapter": lambda vit, ddpm: adapted(vit),
    "pipeline": lambda vit, ddpm: ddpm,
    "filter": lambda vit, ddpm: fitted_filter(channels=1),
    "filtered pipeline": lambda vit, ddpm: FilteredPipeline(ddpm, fitted_filter(channels=1)),
    "influence report": lambda vit, ddpm: report(),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", THINGS)
def test_anything_is_published_with_a_card_whose_code_runs(hub, tiny_vit, tiny_ddpm, kind):
    name = f"me/{kind.replace(' ', '-')}"
    shown = []
    publication = publish(THINGS[kind](tiny_vit, tiny_ddpm), name, license="mit", show=shown.append)
    kept = f"datasets/{name}" if kind == "influence report" else name
    files = hub.files(kept)
    assert set(files) == set(publication.files)
    assert kept in hub._private
    assert all(file in shown[0] for file in files)
    seen = verify_provenance(name, repo_type=publication.repo_type)
    assert seen.ok, seen
    assert set(seen.record["files"]) == set(files) - {RECORD}
    assert seen.record["kind"] == ("model" if kind in ("adapter", "pipeline") else kind)
    card = ModelCard(files["README.md"].decode())
    assert card.data.license == "mit"
    code = card.text.split("```python\n")[1].split("```")[0]
    with contextlib.redirect_stdout(io.StringIO()):
        if kind == "influence report":  # load_dataset asks the Hub for what the loopback one has not
            code = code.replace(f'load_dataset("{name}", split="train")', "Dataset.from_parquet(path)")
            path = hf_hub_download(name, "data/train-00000-of-00001.parquet", repo_type="dataset")
            exec(code, {"Dataset": Dataset, "path": path})
        else:
            exec(code, {})


def test_a_report_keeps_the_training_data(hub, tmp_path):
    data = Dataset.from_dict(
        {"key": list(range(100, 108)), "text": [f"secret {n}" for n in range(8)], "topic": ["x"] * 8}
    )
    joined = report().join(data, "key", ["text", "topic"])
    publication = quietly(joined, "me/joined", columns=["topic"])
    assert list(publication.left_out) == ["column text"]
    content = hub.files("datasets/me/joined")["data/train-00000-of-00001.parquet"]
    (tmp_path / "a.parquet").write_bytes(content)
    found = Dataset.from_parquet(str(tmp_path / "a.parquet"))
    assert "topic" in found.column_names
    assert "text" not in found.column_names
    assert found["mu"][:] == joined.dataset["mu"][:]
    with pytest.raises(ValueError, match="^columns: 'nothing' is not joined"):
        quietly(joined, "me/joined", columns="nothing")


PROVENANCE = Provenance(
    method="pbu", method_title="A method", forgotten="class 3", forget_examples=4, seed=1, steps=2, base_model="me/base"
)  # fmt: skip


def unlearned(folder, model, *, base="me/base", rows=None, key=b"k" * 32, salt=b"s" * 16, earlier=(), results=()):
    """A folder as a trainer leaves it."""
    model.save_pretrained(folder)
    provenance = Provenance(**vars(PROVENANCE) | {"base_model": base})
    unlearning_card(provenance, model_name="m", results=results, dataset_type="me/data").save(folder / "README.md")
    rows = [{"text": f"row {n}", "id": n} for n in range(4)] if rows is None else rows
    digests = example_digests(rows, key, salt)
    own = {"salt": salt.hex(), "digests": digests, "key_check": example_digest(KEY_CHECK, key, salt)}
    names = ["README.md", "config.json", "model.safetensors"]
    write_record(record_of(provenance, earlier, own), folder, names)
    return folder


@pytest.mark.parametrize("name", ["out", "m", "renamed"])
def test_the_code_on_a_folder_s_card_loads_the_repository(hub, tiny_vit, tmp_path, name):
    """A run writes a card whose code loads the folder; `m` is its title."""
    loads = 'from_pretrained("{}")  # text that says from_pretrained("{}")'
    folder = unlearned(tmp_path / name, tiny_vit)
    card = (folder / "README.md").read_text() + "\nx = `" + loads.format("out", "m") + "`\n"
    snippet = f'model = X.from_pretrained("m", dtype=1)\nother = Y.from_pretrained("me/base")\npipe(filter="{name}")'
    (folder / "README.md").write_text(f"{card}\n```python\n{snippet}\n```\n")
    quietly(folder, "code")
    sent = hub.files("me/code")["README.md"].decode()
    wanted = 'model = X.from_pretrained("{0}", dtype=1)\nother = Y.from_pretrained("me/base")\npipe(filter="{0}")'
    assert f"```python\n{wanted.format('me/code')}\n```" in sent
    assert loads.format("out", "m") in sent  # no code


def test_a_folder_keeps_what_is_known_of_it(hub, tiny_vit, tmp_path):
    results = [Figure(metric="accuracy", name="Accuracy", after=1.5, before=98.0)]
    folder = unlearned(tmp_path / "out", tiny_vit, results=results)
    (folder / "_private").mkdir()
    (folder / "_private/fingerprint.key").write_bytes(b"k" * 32)
    (folder / "optimizer.pt").write_bytes(b"x")
    publication = quietly(folder, "kept")
    assert publication.left_out.keys() == {"_private/fingerprint.key", "optimizer.pt"}
    files = hub.files("me/kept")
    entries = yaml.safe_load(files[".eval_results/hf_unlearn.yaml"])
    assert entries == [{"dataset": {"id": "me/data", "task_id": "test.accuracy"}, "value": 1.5, "notes": "Accuracy"}]
    seen = verify_provenance("me/kept")
    assert seen.ok
    assert verify_provenance(folder).ok
    assert seen.record["parent"] == {"repository": "me/base", "revision": None, "provenance_sha256": None}
    assert in_forget_set(seen, folder, {"text": "row 2"})
    assert not in_forget_set(seen, folder, {"text": "row 9"})
    assert in_forget_set(folder, folder / "_private/fingerprint.key", "row 3")
    with pytest.raises(ValueError, match="^key: is of another run"):
        in_forget_set(seen, b"j" * 32, "row 3")
    # Other weights under the old story.
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b" ")
    assert verify_provenance(folder).differs == ("model.safetensors",)
    with pytest.raises(ValueError, match=r"^provenance.json: is of other weights \(model.safetensors"):
        quietly(folder, "kept")


@pytest.mark.filterwarnings("ignore")
def test_a_folder_without_a_card_gets_one(hub, tiny_vit, tmp_path):
    """Also where no class here loads it: the repository's earlier card is of other weights."""
    folder = unlearned(tmp_path / "out", tiny_vit)
    for kind, library in (("adapter", "peft"), ("unknown class", "transformers"), ("model", "transformers")):
        quietly(folder, "me/cards")
        assert "was asked to forget **class 3**" in hub.files("me/cards")["README.md"].decode()
        bare = tmp_path / kind
        (adapted(tiny_vit) if kind == "adapter" else tiny_vit).save_pretrained(bare)
        (bare / "README.md").unlink(missing_ok=True)  # of PEFT
        if kind == "unknown class":
            config = json.loads((bare / "config.json").read_text()) | {"architectures": ["Homemade"]}
            (bare / "config.json").write_text(json.dumps(config))
        if kind == "adapter":
            config = json.loads((bare / "adapter_config.json").read_text())
            (bare / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "me/base"}))
        publication = quietly(bare, "me/cards", allow_adapter=kind == "adapter")
        assert "README.md" in publication.files
        card = ModelCard(hub.files("me/cards")["README.md"].decode())
        assert "class 3" not in card.content
        assert "is not known here" in card.text
        assert (card.data.library_name, card.data.model_name) == (library, "cards")
        assert card.data.base_model == ("me/base" if kind == "adapter" else None)
        assert ("```python" in card.text) == (kind == "model")
        assert verify_provenance("me/cards").ok


def test_a_model_that_is_loaded_again_keeps_its_card(hub, tiny_vit, tmp_path):
    """As long as its weights are those that the card is of."""
    folder = unlearned(tmp_path / "out", tiny_vit)
    model = ViTForImageClassification.from_pretrained(folder)
    quietly(model, "me/again", license="mit")
    card = ModelCard(hub.files("me/again")["README.md"].decode())
    assert "was asked to forget **class 3**" in card.text
    assert card.data.license == "mit"
    assert verify_provenance("me/again").record["kind"] == "unlearned model"
    model.classifier.bias.data[0] = 7
    quietly(model, "me/again")
    assert "is not known here" in hub.files("me/again")["README.md"].decode()
    seen = verify_provenance("me/again")
    assert [one["kind"] for one in seen.record["earlier"]] == ["unlearned model"]
    assert seen.ok


def test_digests_show_the_number_and_nothing_else():
    rows = [{"text": text, "id": n} for n, text in enumerate(["a", "b", "a", "c", "a"])]
    one, again = (example_digests(rows, b"key", b"salt") for _ in range(2))
    assert len(set(one)) == 5  # that "a" is there three times is not seen
    assert one == sorted(one)
    assert len(set(one) & set(again)) == 3
    assert not set(one) & set(example_digests(rows, b"key", b"other"))
    assert not set(one) & set(example_digests(rows, b"other", b"salt"))
    turned = example_digests(rows[::-1], b"key", b"salt")
    assert len(set(one) & set(turned)) == 3


def test_what_was_changed_is_seen(hub, tiny_vit, tmp_path):
    quietly(unlearned(tmp_path / "out", tiny_vit), "me/changed")
    start = hub.files("me/changed")
    (tmp_path / "more/_").mkdir(parents=True)
    (tmp_path / "more/pytorch_model.bin").write_bytes(b"other")
    (tmp_path / "more/notes.txt").write_bytes(b"a note")
    (tmp_path / "more/config.json").write_bytes(start["config.json"] + b" ")
    hub.put("me/changed", tmp_path / "more")
    seen = verify_provenance("me/changed")
    assert (seen.differs, seen.missing) == (("config.json",), ())
    assert (seen.extra, seen.loadable) == (("notes.txt", "pytorch_model.bin"), ("pytorch_model.bin",))
    assert not seen.ok
    assert "NOT all" in str(seen)
    (tmp_path / "out/config.json").unlink()
    assert verify_provenance(tmp_path / "out").missing == ("config.json",)
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    hostile = tmp_path / "hostile"
    hostile.mkdir()
    for change in (
        {"format": 9}, {"earlier": 3}, {"earlier": [1]}, {"parent": None}, {"files": []}, {"kind": 1}, {"audit": "x"},
        {"forget_set": {"digests": ["a"], "salt": "xyz", "key_check": "a"}}, {"method": "x"},
    ):  # fmt: skip
        (hostile / RECORD).write_text(json.dumps(record | change))
        with pytest.raises(ValueError, match="is no provenance that this version reads"):
            verify_provenance(hostile)
    (hostile / RECORD).write_text(json.dumps(record | {"forgotten": "\x1b[2Jx", "files": {"../out/README.md": {}}}))
    seen = verify_provenance(hostile)
    assert seen.missing == ("../out/README.md",)
    assert "\x1b" not in str(seen)
    for wrong in ("me/nothing", tmp_path / "more"):
        with pytest.raises((OSError, ValueError), match="no such|has no provenance.json") as error:
            verify_provenance(wrong)
        assert "\n" not in str(error.value)


def test_a_chain_of_unlearnings(hub, tiny_vit, tmp_path):
    """Each is made from the one before; what the first forgot can still be shown, and no link can be exchanged."""
    for number in range(3):
        earlier = earlier_of(f"me/chain{number - 1}") if number else ()
        rows = [{"text": f"{number} {n}"} for n in range(4)]
        base = f"me/chain{number - 1}" if number else "me/base"
        folder = unlearned(
            tmp_path / str(number), tiny_vit, base=base, rows=rows, earlier=earlier, salt=bytes([number] * 16)
        )
        quietly(folder, f"me/chain{number}")
    seen = verify_provenance("me/chain2")
    assert seen.ok
    assert [one["parent"]["repository"] for one in seen.record["earlier"]] == ["me/base", "me/chain0"]
    assert "  3. " in str(seen)
    assert all(in_forget_set(seen, b"k" * 32, f"{number} 1") for number in range(3))
    record = json.loads((tmp_path / "2" / RECORD).read_text())
    record["earlier"][0]["forgotten"] = "something else"
    (tmp_path / "2" / RECORD).write_text(json.dumps(record))
    seen = verify_provenance(tmp_path / "2")
    assert seen.broken == ("1. is not what 2. was made from", "2. is not what 3. was made from")
    assert not seen.ok
    (tmp_path / "2" / RECORD).write_text(json.dumps(record | {"earlier": []}))
    assert verify_provenance(tmp_path / "2").broken == ("records before 1. are missing",)


def test_nothing_goes_onto_a_repository_that_its_record_or_its_configs_name(
    hub, tiny_vit, tiny_ddpm, tmp_path, monkeypatch
):
    """Of a grandparent, whatever the card says; of a card's id beside a folder of that name; of a stock pipeline."""
    first = unlearned(tmp_path / "first", tiny_vit, base="me/oldest")
    quietly(first, "me/first")
    second = unlearned(tmp_path / "second", tiny_vit, base="me/first", earlier=earlier_of("me/first"))
    (second / "README.md").unlink()
    tiny_ddpm.register_to_config(_name_or_path="me/stock")
    tiny_ddpm.save_pretrained(tmp_path / "pipeline")
    monkeypatch.chdir(tmp_path)
    Path("me/oldest").mkdir(parents=True)
    for folder, repo_id in (
        (second, "me/oldest"),
        (second, "me/first"),
        (first, "me/oldest"),
        ("pipeline", "me/stock"),
    ):
        with pytest.raises(ValueError, match=f"'{repo_id}' is the original's repository"):
            quietly(folder, repo_id, dry_run=True)


def test_no_local_path_is_sent(hub, tiny_ddpm, tmp_path):
    tiny_ddpm.save_pretrained(tmp_path / "secret")
    DDPMPipeline.from_pretrained(tmp_path / "secret").save_pretrained(tmp_path / "again")  # which writes it down
    written = [file for file in (tmp_path / "again").rglob("*.json") if "secret" in file.read_text()]
    assert written
    quietly(tmp_path / "again", "me/again")
    assert not [name for name, content in hub.files("me/again").items() if b"secret" in content]
    assert verify_provenance("me/again").ok
    assert all("secret" in file.read_text() for file in written)  # the user's own stay as they are


def test_what_is_read_beside_is_loadable_too(hub, tiny_vit, tmp_path):
    folder = unlearned(tmp_path / "out", tiny_vit)
    quietly(folder, "me/beside")
    for name in ("pytorch_model.bin", "optimizer.pt"):
        (folder / name).write_bytes(b"other")
    assert verify_provenance(folder).loadable == ("pytorch_model.bin",)
    (tmp_path / "more").mkdir()
    (tmp_path / "more/chat_template.jinja").write_text("x")
    hub.put("me/beside", tmp_path / "more")
    assert verify_provenance("me/beside").loadable == ("chat_template.jinja",)


def test_an_adapter_that_a_model_holds_is_named(tiny_vit):
    model = tiny_vit
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"^what: holds an adapter that add_adapter put in; load it as a PeftModel"):
        quietly(model, "me/new", dry_run=True)


# What goes wrong


def commits(hub):
    return sum("/commit/" in path for _, path in hub.requests)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"status": 500}, "(500): the Hub has trouble; publish again later"),
        ({"status": 401}, "(401): the Hub does not know the token"),
        ({"status": 403}, "(403): the token may not write there"),
        ({"status": 409}, "(409): somebody else changed the repository"),
        ({"status": 412}, "(412): somebody else changed the repository"),
        ({"status": 413}, "(413): the Hub takes no files of this size"),
        ({"status": 418}, "(418): it says"),
        ({"cut": "before"}, "the connection to the Hub broke"),
    ],
)  # fmt: skip
def test_nothing_is_half_published(hub, tiny_vit, fault, message):
    repo = f"me/fault-{fault.get('status', 'cut')}"
    quietly(tiny_vit, repo)
    before, tiny_vit.classifier.bias.data[0] = hub.files(repo), 7
    hub.faults.append(Fault("POST", "/commit/", **fault))
    with pytest.raises(OSError) as error:
        quietly(tiny_vit, repo)
    assert str(error.value).startswith(f"{repo}: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert (hub.files(repo), hub.faults) == (before, [])
    quietly(tiny_vit, repo)  # the same again
    assert hub.files(repo)["model.safetensors"] != before["model.safetensors"]


def test_an_answer_that_is_lost(hub, tiny_vit):
    """The commit is there; the same again changes nothing."""
    hub.faults.append(Fault("POST", "/commit/", cut="after"))
    with pytest.raises(OSError, match="whole or not at all: publish again, which changes nothing if it is there"):
        quietly(tiny_vit, "me/lost")
    files = hub.files("me/lost")
    again = quietly(tiny_vit, "me/lost")
    assert hub.files("me/lost") == files
    assert again.url is not None


def test_somebody_else_pushes_meanwhile(hub, tiny_vit, tmp_path):
    """Between the look at what is there and the commit, whose deletions would be of another state."""
    (tmp_path / "new").mkdir()
    (tmp_path / "new/pytorch_model.bin").write_bytes(b"another's")
    quietly(tiny_vit, "me/race")
    tiny_vit.classifier.bias.data[0] = 7
    hub.faults.append(Fault("POST", "/preupload/", then=lambda: hub.put("me/race", tmp_path / "new")))
    with pytest.raises(
        OSError, match=r"\(412\): somebody else changed the repository at the same time; publish again"
    ):
        quietly(tiny_vit, "me/race")
    assert quietly(tiny_vit, "me/race").deleted == ("pytorch_model.bin",)


def test_a_gitignore_would_drop_the_weights(hub, tiny_vit, tmp_path):
    (tmp_path / ".gitignore").write_text("*.safetensors\n")
    hub.put("me/ignoring", tmp_path)
    with pytest.raises(OSError, match=r"\.gitignore leaves out model.safetensors; delete that line"):
        quietly(tiny_vit, "me/ignoring")
    assert set(hub.files("me/ignoring")) == {".gitignore"}


def test_a_slow_answer_is_awaited(hub, tiny_vit, tmp_path):
    tiny_vit.save_pretrained(tmp_path)
    go = threading.Event()
    hub.faults.append(Fault("POST", "/commit/", wait=go))
    publication = quietly(tmp_path, "me/slow", run_as_future=True)
    assert publication.url is None
    assert "config.json" not in hub.files("me/slow")
    go.set()
    publication.commit.result(60)
    assert "config.json" in hub.files("me/slow")


def test_refusals(hub, tiny_vit, tiny_ddpm, tmp_path):
    quietly(report(), "me/taken")
    quietly(tiny_vit, "me/other")
    tiny_vit.save_pretrained(tmp_path / "base")
    hub.put("me/base", tmp_path / "base")
    original = ViTForImageClassification.from_pretrained("me/base")
    done = commits(hub)
    for what, name, options, message in (
        (tiny_vit, "me/taken", {}, "repo_id='me/taken': is a dataset's repository"),
        (report(), "me/other", {}, "repo_id='me/other': is a model's repository"),
        (tiny_vit, "me/two words", {}, "repo_id='me/two words': is no name of a repository"),
        (tiny_vit, "a/b/c", {}, "repo_id='a/b/c': is no name"),
        (tiny_vit, "", {}, "repo_id='': is no name"),
        (tiny_vit, None, {}, "repo_id='None': is no name"),
        (original, "base", {}, "repo_id: 'me/base' is the original's repository"),
        (original, "ME/Base", {"create_pr": True}, "repo_id: 'ME/Base' is the original's repository"),
        (tiny_ddpm.unet, "x", {}, "what: UNet2DModel is part of a pipeline"),
        ([1], "x", {}, "what: list cannot be published"),
        (None, "x", {"token": False}, "what: NoneType cannot be published"),
        (str(tmp_path / "nothing"), "x", {}, "no such folder"),
        (tiny_vit, "x", {"audit": "audit.json"}, "audit: is a str; pass an AuditReport"),
        (report(), "x", {"audit": Audit()}, "audit: is of an unlearned model"),
        (tiny_vit, "x", {"audit": Audit()}, "audit: is of another model"),
        (tmp_path / "base", "x", {"audit": Audit()}, "audit: is of another model"),
        (tiny_vit, "x", {"token": False}, "token: there is none; log in (hf auth login)"),
        (tiny_vit, "x", {"colour": "red"}, "colour: no option where a ViTForImageClassification is published"),
        (tmp_path / "base", "x", {"license": "mit"}, "license: no option"),
        (tiny_vit, "x", {"run_as_future": True}, "run_as_future=True: is for folders"),
    ):  # fmt: skip
        with pytest.raises((ValueError, OSError, TypeError)) as error:
            quietly(what, name, **options)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    assert commits(hub) == done


class Audit:
    """Of another model."""

    def check_is_of(self, model):
        raise ValueError("audit: is of another model than this one")


def test_a_dry_run_sends_nothing(hub, tiny_vit, capsys):
    quietly(tiny_vit, "me/dry")
    before, asked = hub.files("me/dry"), len(hub.requests)
    publication = publish(report(), "me/dry2", dry_run=True)
    assert (publication.is_new, publication.commit, publication.url) == (True, None, None)
    publication = publish(tiny_vit, "dry", max_shard_size="10KB", dry_run=True)
    assert publication.deleted == ("model.safetensors",)
    assert publication.repo_id == "me/dry"
    assert {method for method, _ in hub.requests[asked:]} <= {"GET", "HEAD"}
    assert hub.files("me/dry") == before
    printed = capsys.readouterr().out
    assert "dataset me/dry2 (new, private)" in printed
    assert "- model.safetensors  deleted, of an earlier model" in printed


def test_loads_with_stock_classes(hub, tiny_ddpm):
    quietly(tiny_ddpm, "me/plain", revision="draft")
    found = DDPMPipeline.from_pretrained("me/plain", revision="draft").unet.state_dict()
    assert all((found[name] == value).all() for name, value in tiny_ddpm.unet.state_dict().items())
    assert hub.files("me/plain") == {}
    assert hf_unlearn.publish is publish


@pytest.mark.filterwarnings("ignore")
def test_the_page_on_publishing_runs(hub, tiny_vit, tmp_path, monkeypatch, capsys):
    page = (Path(__file__).parents[2] / "docs" / "publishing.md").read_text()
    monkeypatch.chdir(tmp_path)
    folder = unlearned(Path("digits-without-3"), tiny_vit)
    (folder / "_private").mkdir()
    (folder / "_private/fingerprint.key").write_bytes(b"k" * 32)
    values = {"threes": [{"text": "row 1", "id": 1}]}
    for block in page.split("```python\n")[1:]:
        exec(block.split("```")[0], values)
    assert values["report"].ok
    assert "all of 3 files are as they were published" in capsys.readouterr().out
