"""Every recipe that comes with the package is run by some test; here those that no other file runs, with tiny random models.

What `--json` and `--dry_run` say is checked on the same runs.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from text_to_image_data import tiny

from hf_unlearn import cli
from hf_unlearn.examples import datasets as example_data
from hf_unlearn.examples.classifier import digits_processor
from hf_unlearn.jobs.recipe.reading import RECIPES, shipped_recipes


TESTS = Path(__file__).parents[1]
# Who runs the others, with a fixed name of the recipe in it.
ELSEWHERE = {
    "adapt_then_unlearn_digits": "test_cli_gan.py",
    "adapt_then_unlearn_fashion_mnist": "test_cli_gan.py",
    "audit_digits": "test_cli_audit.py",
    "filter_digits_ddpm": "test_cli_filter.py",
    "filter_digits_gan": "test_cli_filter.py",
    "filter_stable_diffusion": "test_cli_filter.py",
    "influence_labels_digits": "test_cli_influence.py",
    "influence_llama_lora": "test_cli_influence.py",
    "influence_poison": "test_cli_influence.py",
    "llama_lora_redirect": "test_cli.py",
    "npo_sft": "test_cli.py",
    "pbu_digits": "test_cli.py",
    "tofu_forget10": "test_cli_language.py",
    "unlearn_examples_digits": "test_cli.py",
    "vdu_ddpm_digits": "test_cli_vdu.py",
    "vdu_stable_diffusion": "test_cli_vdu.py",
}
CPU = ("--use_cpu", "true", "--dataloader_pin_memory", "false", "--disable_tqdm", "true", "--max_steps", "1")
WORDS = ("--concept", "cat", "--anchor", "horse", "--keep", "a red house", "--dtype", "null", "--grid_images", "0")


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    """An empty working directory, so that anything written by mistake is seen."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("HF_UNLEARN_DEBUG", "WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def saved(request, tmp_path):
    """Saves what a recipe needs, and returns the words that say where it is."""

    def parts(folder, *models):
        for model in models:
            model.save_pretrained(tmp_path / folder)
        return str(tmp_path / folder)

    def chats(name, **columns):
        rows = {
            "prompt": [[{"role": "user", "content": f"Where is order {i}?"}] for i in range(4)],
            "completion": [[{"role": "assistant", "content": f"It is lost, {i}."}] for i in range(4)],
        }
        Dataset.from_dict(rows | columns).save_to_disk(tmp_path / name)
        return str(tmp_path / name)

    def resnet():
        return "--model", parts("resnet", request.getfixturevalue("tiny_resnet"), digits_processor())

    def vit():
        processor = digits_processor()
        folder = parts("vit", request.getfixturevalue("tiny_vit"), processor)
        for split, rows in example_data.digits().items():
            for number, row in enumerate(rows.select(range(12)) if split != "validation" else ()):
                place = tmp_path / "pictures" / split / f"kind {row['label'] % 3}"
                place.mkdir(parents=True, exist_ok=True)
                row["image"].save(place / f"{number}.png")
        return "--model", folder, "--dataset", str(tmp_path / "pictures"), "--forget_values", "kind 1"

    def bert():
        folder = parts("bert", request.getfixturevalue("tiny_bert"), request.getfixturevalue("tokenizer"))
        (tmp_path / "texts").mkdir()
        for split in ("train", "validation", "test"):
            lines = [f"Order {i} of the {split} set never arrived,{i % 3},{(4711, 815)[i % 2]}" for i in range(8)]
            (tmp_path / "texts" / f"{split}.csv").write_text("\n".join(["text,label,customer", *lines]))
        return "--model", folder, "--dataset", str(tmp_path / "texts")

    def llama(*words):
        folder = parts("llama", request.getfixturevalue("tiny_llama"), request.getfixturevalue("tokenizer"))
        # A random model knows nothing that its own loss could take away.
        return "--model", folder, "--forget_loss", "npo", "--max_length", "64", *words

    def facts():
        rows = chats("rows")
        return llama("--forget_dataset", rows, "--eval_forget", rows, "--eval_kept", rows, "--eval_heldout", rows)

    def poison():
        rows = chats("rows", poisoned=[True, False, True, False])
        return llama("--dataset", rows, "--eval_forget", rows, "--eval_kept", rows)

    def ddpm():
        folder = parts("ddpm", request.getfixturevalue("tiny_ddpm"))
        few = ("--forget_limit", "4", "--own_samples", "8", "--num_inference_steps", "2", "--grid_images", "1")
        return "--model", folder, "--dataset", "digits", "--forget_values", "3", *few

    def clip():
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=12, **sizes)
            model = CLIPVisionModelWithProjection(config)
        processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        for name, wanted in (("undesired", True), ("clean", False)):
            (tmp_path / name).mkdir()
            rows = [row for row in example_data.digits()["test"].select(range(80)) if (row["label"] < 3) == wanted]
            for number, row in enumerate(rows):
                row["image"].convert("RGB").save(tmp_path / name / f"{number}.png")
        folders = ("--undesired_folder", str(tmp_path / "undesired"), "--clean_folder", str(tmp_path / "clean"))
        small = (
            "--unmarked",
            "4",
            "--num_inference_steps",
            "1",
            "--dtype",
            "null",
            "--rate",
            "0.2",
            "--score",
            "mean_difference",
        )
        return (
            "--pipeline",
            parts("sd", tiny("sd")),
            "--encoder",
            parts("clip", model, processor),
            "--store_encoder",
            "true",
            *folders,
            *small,
        )

    def attributed():
        small = ("--curvature_examples", "16", "--projection", "4", "--split", "validation", "--target_split", "test")
        words = ("--index_dir", "out/_private/index", "--target_column", "null", *small)
        return *resnet(), *words

    def redirected(kind):
        return "--model", parts(kind, tiny(kind)), *WORDS

    return {
        "pbu_digits_paper": resnet,
        "vit_image_folder": vit,
        "text_classifier": bert,
        "forget_facts": facts,
        "forget_poison": poison,
        "vdu_ddpm_fashion_mnist": ddpm,
        "filter_clip_folder": clip,
        "attribute_digits": attributed,
        "redirect_digits_t2i": lambda: ("--wordings", "a photo of a {}", *redirected("sd")),
        "redirect_stable_diffusion": lambda: redirected("sd"),
        "redirect_sdxl": lambda: redirected("sdxl"),
        "redirect_flux": lambda: redirected("flux"),
    }


HERE = (
    "pbu_digits_paper", "vit_image_folder", "text_classifier", "forget_facts", "forget_poison", "vdu_ddpm_fashion_mnist",
    "filter_clip_folder", "attribute_digits", "redirect_digits_t2i", "redirect_stable_diffusion", "redirect_sdxl", "redirect_flux",
)  # fmt: skip


def test_every_recipe_is_run_by_a_test():
    """A new one gets tiny models here, or a line in `ELSEWHERE`."""
    unknown = set(shipped_recipes()) - set(HERE) - set(ELSEWHERE)
    in_its_own_file = {
        name
        for name in unknown
        if any(re.search(rf"\b{name}\b", file.read_text()) for file in (TESTS / "jobs").glob("test_cli*.py"))
    }
    assert unknown - in_its_own_file == set()
    for name, file in ELSEWHERE.items():
        stem = name.removeprefix("influence_")  # written without
        assert re.search(rf"\b({name}|{stem})\b", (TESTS / "jobs" / file).read_text()), name


# With one of their kind that is run here, or in test_cli.py.
LONG = ("forget_poison", "pbu_digits_paper", "redirect_stable_diffusion", "redirect_sdxl", "redirect_flux")


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in HERE])
def test_recipe(name, saved, work, capfd):
    verb = re.search(rf"hf-unlearn ((?:filter )?\w+) --config recipes/{name}", (RECIPES / f"{name}.yaml").read_text())[
        1
    ]
    words = [*verb.split(), name, *saved[name](), "--output_dir", "out"]
    if verb == "unlearn" and not name.startswith("redirect"):
        words += CPU
    capfd.readouterr()

    assert cli.main([*words, "--dry_run", "--json"]) == 0
    out, _ = capfd.readouterr()
    (document,) = map(json.loads, out.splitlines())
    assert list(work.iterdir()) == []
    assert (document["dry_run"], document["exit_code"], document["output_dir"]) == (True, 0, "out")
    keys = {key["key"]: key for key in document["keys"]}
    assert keys["output_dir"] == {"key": "output_dir", "value": "out", "source": "command line"}
    sources = {key["source"] for key in document["keys"]}
    assert (
        {"recipe", "command line"} <= sources <= {"recipe", "command line", "default", "preset", "worked out", "model"}
    )
    assert all(place["found"] for place in document["reads"])
    assert document["reads"]
    assert {"key": "output_dir", "value": "out", "now": "new"} in document["writes"]

    assert cli.main([*words, "--json"]) == 0, capfd.readouterr().err
    out, err = capfd.readouterr()
    (document,) = map(json.loads, out.splitlines())
    assert (document["exit_code"], document["verb"], document["recipe"]) == (0, verb, name)
    assert "error" not in document
    assert ({"README.md"} if name != "attribute_digits" else set()) <= set(document["written"])
    assert not any(file.startswith("_private") for file in document["written"])
    assert all((Path("out") / file).is_file() for file in document["written"])
    if name == "attribute_digits":  # which makes no model, and knows of no rows at fault
        assert document["targets"] == ["target"]
        assert "μ has no unit: order only" in " ".join(err.split())
        return
    assert document["figures"] or name in ("vdu_ddpm_fashion_mnist",)  # which has no classifier that counts
    assert "README.md" in err  # what people read is still said


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("demo", 0),
        ("filter fit filter_digits_gan", 0),
        ("filter run filter_digits_gan", 0),
        ("filter evaluate filter_digits_gan", 0),
        ("audit audit_digits", 1),  # whose model pbu_digits makes first
        ("estimate pbu_digits", 0),
        ("influence influence_poison", 0),
    ],
)
def test_a_dry_run_runs_nothing(words, code, work, capfd, monkeypatch):
    monkeypatch.setattr("hf_unlearn.jobs.recipe.methods.Method.runner", lambda *_: pytest.fail("was run"))
    assert cli.main([*words.split(), "--dry_run", "--json"]) == code
    document = json.loads(capfd.readouterr().out)
    assert document["writes"]
    assert list(work.iterdir()) == []
    assert not (work.parent / "cache").exists()  # no small model was made
    where = {place["value"]: place["where"] for place in document["reads"]}
    if "filter" in words:
        assert where["digits-gan"].startswith("not made yet: trained on first use, into ")
    if "influence" in words:
        assert where["opinions"] == "built untrained" or where["opinions"] == "comes with the package"


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine may have what is asked for")
@pytest.mark.parametrize("recipe", ["tofu_forget10", "vdu_stable_diffusion"])
def test_a_dry_run_tells_what_this_machine_cannot(recipe, work, capfd):
    """And resolves all the same; a run is refused."""
    line = "bf16=True: no GPU of this machine can; run it where one does, or add --bf16 false"
    cli.main(["unlearn", recipe, "--dry_run", "--json"])
    document = json.loads(capfd.readouterr().out)
    assert document["not_here"] == line
    assert {"key": "bf16", "value": True, "source": "recipe"} in document["keys"]
    assert cli.main(["unlearn", recipe]) == 2
    assert capfd.readouterr().err.splitlines()[-1] == f"hf-unlearn: error: {line}"
    assert cli.main(["unlearn", recipe, "--fp16", "true", "--dry_run"]) == 2  # of both nobody takes two
    cli.main(["unlearn", recipe, "--bf16", "false", "--dry_run", "--json"])
    assert json.loads(capfd.readouterr().out)["not_here"] is None
    assert list(work.iterdir()) == []
