"""What a name means, and that nothing is pushed onto the original however it is named."""

import pytest
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from filter_data import fitted_filter
from huggingface_hub import snapshot_download

from hf_unlearn import FilteredPipeline
from hf_unlearn.examples.loopback_hub import LoopbackHub
from hf_unlearn.hub.origin import check_is_not_original_repository, hub_id, inherited, origin, revision_of, said_of
from hf_unlearn.hub.publish import publish_folder


CACHED = "/elsewhere/hub/models--me--a-b/snapshots/0123abc"
NAMES = {
    "me/a-b": "me/a-b",
    "gpt2": "gpt2",
    "me/a-b/": "me/a-b",
    "https://huggingface.co/me/a-b": "me/a-b",
    "https://huggingface.co/me/a-b/tree/main/unet": "me/a-b",
    "https://me:secret@hf.co/me/a-b.git": "me/a-b",
    "git@hf.co:me/a-b": "me/a-b",
    "hf://me/a-b@v1": "me/a-b",
    "hf://models/me/a-b": "me/a-b",
    CACHED: "me/a-b",
    f"{CACHED}/unet": "me/a-b",
    "/elsewhere/hub/models--gpt2/snapshots/0123abc": "gpt2",
    "https://github.com/me/a-b": None,
    "/somewhere/else": None,
    "../a": None,
    "a/b/c": None,
}


@pytest.mark.parametrize(("name", "expected"), NAMES.items())
def test_what_a_name_means(name, expected):
    assert hub_id(name) == hub_id(origin(name)) == expected
    assert revision_of(name) == ("0123abc" if "snapshots" in name else None)


def test_a_model_that_was_not_loaded_comes_from_nowhere():
    assert origin("") is origin(None) is None  # and not from the working directory, which is a folder too


def test_a_clone_and_a_folder(tmp_path, monkeypatch):
    (tmp_path / "clone/.git").mkdir(parents=True)
    (tmp_path / "clone/unet").mkdir()
    (tmp_path / "clone/.git/config").write_text('[remote "origin"]\n\turl = https://huggingface.co/me/base\n')
    (tmp_path / "me/base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id("clone") == hub_id("clone/unet") == "me/base"
    assert hub_id("me/base") is hub_id(origin("me/base")) is None
    assert origin("me/base") == str(tmp_path / "me/base")


def test_a_pipeline_of_a_relative_path_stays_of_that_folder(tiny_ddpm, tmp_path, monkeypatch):
    """Not of the stranger who has that name on the Hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    tiny_ddpm.save_pretrained(tmp_path / "clients/acme")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    pipe = FilteredPipeline(DDPMPipeline.from_pretrained("clients/acme"), fitted_filter(channels=1))
    pipe.register_modules(scheduler=DDPMScheduler(num_train_timesteps=7))  # reaches the pipeline inside
    assert pipe.pipeline.scheduler.config.num_train_timesteps == 7
    assert set(pipe.components) == {"pipeline", "safety_checker"}
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "acme" not in pipe._card("me/filtered")
    pipe.save_pretrained("saved")
    assert not [file for file in (tmp_path / "elsewhere").rglob("*.json") if "acme" in file.read_text()]


def test_refuses_by_any_name():
    for original in (name for name, meant in NAMES.items() if meant == "me/a-b"):
        for target in ("me/a-b", "ME/A-b", "https://huggingface.co/me/a-b", "me/a-b/"):
            with pytest.raises(ValueError, match="is the original's repository"):
                check_is_not_original_repository(target, ["me/other", None, original])
    check_is_not_original_repository("me/c", [*NAMES, None])


@pytest.fixture
def hub(tmp_path):
    with LoopbackHub() as hub, hub.in_this_process(tmp_path / "home"):
        yield hub


def test_filters_and_pipelines_are_not_pushed_onto_what_they_were_made_from(hub, tiny_ddpm, tmp_path):
    tiny_ddpm.save_pretrained(tmp_path / "plain")
    (tmp_path / "plain/README.md").write_text("---\nlicense: openrail\nlanguage: en\n---\n")
    hub.put("me/plain", tmp_path / "plain")
    before = hub.files("me/plain")
    checker = fitted_filter(channels=1)
    whole = FilteredPipeline.from_pretrained("me/plain", filter=checker)
    snapshot = snapshot_download("me/plain")
    parts = DDPMPipeline(UNet2DModel.from_pretrained("me/plain", subfolder="unet"), DDPMScheduler())
    for pipe in (
        whole,
        FilteredPipeline(DDPMPipeline.from_pretrained(snapshot), checker),
        FilteredPipeline(parts, checker),
    ):
        for name in ("me/plain", "plain", "Me/Plain"):
            with pytest.raises(ValueError, match="is the original's repository"):
                pipe.push_to_hub(name, create_pr=name == "plain")
    assert hub.files("me/plain") == before
    whole.push_to_hub("filtered", tags=["mine"], datasets=["me/data"])
    card = hub.files("me/filtered")["README.md"].decode().split("---")[1]
    for line in ("base_model: me/plain", "license: openrail", "- mine", "- me/data", "- fast"):
        assert line in card
    with pytest.raises(ValueError, match="^license: given beside card"):
        whole.push_to_hub("filtered", card="# mine", license="mit")
    # What is filtered already is no original: its settings may be changed.
    again = FilteredPipeline.from_pretrained("me/filtered", action="blur")
    again.push_to_hub("me/filtered", license="mit")
    assert b'"blur"' in hub.files("me/filtered")["model_index.json"]
    assert b"license: mit" in hub.files("me/filtered")["README.md"]
    checker.push_to_hub("filter", create_pr=True, license="mit")
    assert b"license: mit" in hub.files("me/filter", "refs/pr/1")["README.md"]
    assert hub.files("me/filter") == {}
    checker.config.encoder_spec["name"] = "me/encoder"
    hub.put("me/encoder", tmp_path / "plain")
    with pytest.raises(ValueError, match="'me/encoder' is the original's repository"):
        checker.push_to_hub("encoder")
    assert hub.unknown == []


def test_what_a_card_says_of_the_base_is_kept_in_mind(hub, tiny_vit, tmp_path):
    tiny_vit.save_pretrained(tmp_path / "base")
    card = "---\nlicense: other\nlicense_name: mine\ndatasets:\n- me/data\nbase_model: google/vit\n---\n"
    (tmp_path / "base/README.md").write_text(card)
    hub.put("me/base", tmp_path / "base")
    said = {"license": "other", "license_name": "mine", "datasets": ["me/data"]}
    assert said_of(origin("me/base")) == said_of("me/base") == said
    assert said_of(str(tmp_path / "base")) == said | {"base_model": "google/vit"}
    assert said_of("me/nothing") == said_of(None) == {}
    assert inherited(said, {"license": "mit"}) == {"license": "mit", "datasets": ["me/data"]}
    # A folder whose card names the repository it came from is not published onto it.
    (tmp_path / "base/README.md").write_text("---\nbase_model: me/base\n---\n")
    with pytest.raises(ValueError, match="is the original's repository"):
        publish_folder(tmp_path / "base", "base")
    assert "/commit/" not in "".join(path for _, path in hub.requests)
