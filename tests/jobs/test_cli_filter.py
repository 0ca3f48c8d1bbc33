"""`hf-unlearn filter fit | run | evaluate`: tiny twins of the recipes, run for real, and what may be wrong in one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from fresh import run_python
from PIL import Image
from rich.table import Table
from test_cli_gan import frequent, loaded, models, save_classifier, tiny_gan  # noqa: F401

from hf_unlearn import FASTFitter, FASTSafetyChecker, FilteredPipeline, FilterEncoder, cli
from hf_unlearn.examples import gan as small_gan
from hf_unlearn.filtering.fitting.rates import Rate
from hf_unlearn.jobs.keys import console
from hf_unlearn.jobs.recipe.methods import FILTER, read
from hf_unlearn.jobs.recipe.reading import options
from hf_unlearn.modes import seeded_generator


RECIPES = Path(__file__).parents[2] / "recipes"
NAMES = ("filter_digits_gan", "filter_digits_ddpm", "filter_stable_diffusion")
SHEET, UNMARKED, EVALUATION, RUN = range(4)  # purposes of samples
LOOSE = {"threshold": "pooled_mean", "score": "mean_difference", "unmarked": 40}
MARKED = {"undesired": [1, 2, 5], "looked_at": 20}


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    """An empty working directory, so that anything written by mistake is seen."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("HF_UNLEARN_DEBUG", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture(autouse=True)
def pictures(request, monkeypatch):
    """What is drawn into which file, `(images, captions)`; written as they are for `real_pictures` only: that takes a second."""
    from hf_unlearn.jobs import marking
    from hf_unlearn.jobs.filter import report as filter_report
    from hf_unlearn.jobs.filter import run as filter_run

    drawn = {}

    def draw(images, captions, file, **_):
        drawn[Path(file).stem] = (images, captions)
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Path(file).touch()

    if "real_pictures" not in request.fixturenames:
        for module in (filter_report, filter_run, marking):
            monkeypatch.setattr(module, "image_grid", draw)
    return drawn


@pytest.fixture
def real_pictures():
    pass


@pytest.fixture
def gan(tmp_path):
    tiny_gan().save_pretrained(tmp_path / "gan")
    return str(tmp_path / "gan")


@pytest.fixture
def ddpm(tiny_ddpm, tmp_path):
    tiny_ddpm.save_pretrained(tmp_path / "ddpm")
    return str(tmp_path / "ddpm")


@pytest.fixture
def encoder(save_classifier):  # noqa: F811
    """Another head than the judge's, but the same features: without training, two would see nothing in common."""
    return save_classifier("encoder", 2)


@pytest.fixture
def judge(save_classifier):  # noqa: F811
    return save_classifier("judge", 1)


@pytest.fixture
def recipe(tmp_path, gan):
    """Writes a recipe: keys that replace those of a complete one without marks (None leaves one out)."""

    def write(**keys):
        complete = {"pipeline": gan, "output_dir": "out"} | LOOSE
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in (complete | keys).items() if value is not None}))
        return str(path)

    return write


@pytest.fixture
def done(capsys):
    """Runs a command that must succeed, and returns what it prints."""

    def run(*arguments):
        capsys.readouterr()
        assert cli.main(["filter", *map(str, arguments)]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    return run


@pytest.fixture
def fails(capsys, work):
    """Runs a command that must fail in one line without a file, and returns that line."""

    def run(*arguments, code=2, left=()):
        capsys.readouterr()
        assert cli.main(["filter", *map(str, arguments)]) == code
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if line.startswith("hf-unlearn: error: ")]
        assert err.splitlines()[-1:] == lines, err
        assert out == ""
        if code == 2:
            assert err.count("\n") == 1
        assert sorted(path.name for path in work.iterdir()) == sorted(left)
        return lines[0].removeprefix("hf-unlearn: error: ")

    return run


def latents(purpose, count, seed=0):
    rows = [torch.randn(4, generator=seeded_generator("cpu", seed, purpose, number)) for number in range(count)]
    return torch.stack(rows)


def samples(purpose, count, seed=0):
    return tiny_gan().draw(latents(purpose, count, seed))


def undesired_kind(folder, count=200):
    """A class that the classifier in a folder sees in some samples on the sheet."""
    return frequent(loaded(folder).classify(samples(SHEET, count)))


def table(shown, title):
    """Cells of the row of a table whose first cell begins like this."""
    rows = [[cell.strip() for cell in line.strip("│ ").split("│")] for line in shown.splitlines() if "│" in line]
    found = [row for row in rows if row[0].startswith(title)]
    assert len(found) == 1, rows
    return found[0][1:]


def counted(cells):
    """Count and total of a row."""
    count, total = cells[2].replace(",", "").split(" of ")
    return int(count), int(total)


class TestFit:
    def test_digits_recipe(self, gan, encoder, judge, work, tmp_path, done):
        """Fitted to what it says, nothing else, and measured as it says."""
        kind = undesired_kind(judge)
        arguments = (
            "--config", RECIPES / "filter_digits_gan.yaml", "--pipeline", gan, "--encoder", encoder, "--marker", judge,
            "--classes", kind, "--looked_at", 200, "--unmarked", 400, "--output_dir", "out",
        )  # fmt: skip
        shown = done("fit", *arguments)

        looked_at = samples(SHEET, 200)
        shows = loaded(judge).classify(looked_at) == kind
        fitter = FASTFitter(encoder, concepts={"three": "the handwritten digit 3"})
        fitter.update(undesired=looked_at[shows], clean=looked_at[~shows])
        for part in samples(UNMARKED, 400).split(250):
            fitter.update(unmarked=part)
        expected = fitter.fit(rate=0.05)["three"]
        checker = FASTSafetyChecker.from_pretrained("out")
        assert checker.thresholds == pytest.approx({"three": expected.threshold.value}, rel=1e-4)

        marks = int(shows.sum())
        assert f"three: {marks} undesired and {200 - marks} clean marks, 400 unmarked samples" in shown
        assert counted(table(shown, "undesired blocked"))[1] == marks
        assert counted(table(shown, "clean blocked"))[1] == 200 - marks
        rate = expected.figures.blocked
        assert table(shown, "blocked of all")[0] == f"{100 * rate.value:.1f} %"
        assert table(shown, "blocked of all")[1] == f"{100 * rate.low:.1f} to {100 * rate.high:.1f}"
        assert table(shown, "area under")[0] == f"{expected.figures.auc:.3f}"
        assert f"promise  {expected.threshold.promise}\n" in shown
        assert "never publish it" in shown

        names = sorted(path.name for path in (work / "out").iterdir())
        assert names == ["README.md", "_private", "config.json", "model.safetensors", "provenance.json"]
        assert str(tmp_path) not in (work / "out/README.md").read_text()
        assert str(tmp_path) not in (work / "out/config.json").read_text()

    def test_nothing_undesired_is_published(self, recipe, encoder, done, real_pictures):
        """The pictures are where a push leaves them behind. And a second fit takes the place of the first."""
        from hf_unlearn.hub.publish import publishable_files

        done("fit", "--config", recipe(encoder=encoder, looked_at=10))
        assert Image.open("out/_private/samples_to_mark.png").width > 1000
        thresholds = []
        for undesired in ([3, 4], MARKED["undesired"]):
            done("fit", "--config", recipe(encoder=encoder, **MARKED | {"undesired": undesired}))
            thresholds.append(FASTSafetyChecker.from_pretrained("out").thresholds)
        assert thresholds[0] != thresholds[1]
        pictures = sorted(path.name for path in Path("out/_private").glob("b*"))
        assert pictures == ["blocked.png", "border.png"]
        assert all(Image.open(f"out/_private/{name}").width > 500 for name in pictures)
        assert publishable_files("out") == ["README.md", "config.json", "model.safetensors", "provenance.json"]

    def test_pictures_of_the_border(self, recipe, encoder, done, pictures):
        done("fit", "--config", recipe(encoder=encoder, unmarked=60, **MARKED))
        pool = samples(UNMARKED, 60)
        as_bytes = ((pool + 1) * 127.5).round()
        checker = FASTSafetyChecker.from_pretrained("out")
        scores, threshold = checker.judge(as_bytes / 127.5 - 1).scores[:, 0], checker.thresholds["undesired"]
        released = sorted((s for s in scores.tolist() if s <= threshold), reverse=True)[:12]
        blocked = sorted(s for s in scores.tolist() if s > threshold)[:12]
        images, captions = pictures["border"]
        assert captions == [f"released\n{s:#.3g}" for s in released] + [f"blocked\n{s:#.3g}" for s in blocked]
        assert len(blocked) == len(released) == 12
        first = int((scores == released[0]).nonzero()[0])
        assert np.abs(images[0][..., 0].astype(float) - as_bytes[first, 0].numpy()).max() <= 1  # drawn again
        shown = pictures["blocked"][1]
        assert 12 <= len(shown) <= 24
        assert all(caption.startswith("blocked\n") for caption in shown)

    def test_loads_in_a_new_process(self, recipe, encoder, work, done):
        """By the code that the run prints."""
        code = done("fit", "--config", recipe(encoder=encoder, **MARKED)).split("Use it:\n")[1]
        code = "\n".join(line.removeprefix("    ") for line in code.splitlines())
        code += "\nprint(len(output.images), output.images[0].size, len(output.filtered), list(output.filter_scores.shape))"
        assert run_python(code, cwd=work).stdout.splitlines()[-1:] == ["8 (8, 8) 8 [8, 1]"]

    def test_a_sheet_and_then_its_numbers(self, recipe, encoder, work, done, pictures):
        path = recipe(encoder=encoder, looked_at=230, seed=4)
        shown = done("fit", "--config", path)
        assert shown.startswith("230 samples are in out/_private/samples_to_mark.png to samples_to_mark_2.png: ")
        written = sorted(str(file.relative_to(work)) for file in work.rglob("*") if file.is_file())
        assert written == ["out/_private/samples_to_mark.png", "out/_private/samples_to_mark_2.png"]
        command = shown.splitlines()[-1].split()
        assert command == ["hf-unlearn", "filter", "fit", "--config", path, "--undesired", "3", "17", "42"]

        pages = [pictures["samples_to_mark"], pictures["samples_to_mark_2"]]
        assert [len(page[1]) for page in pages] == [200, 30]
        assert [word for page in pages for word in page[1]] == [str(number) for number in range(230)]
        on_sheet = torch.from_numpy(np.concatenate([page[0] for page in pages])).permute(0, 3, 1, 2)
        looked_at, numbers = samples(SHEET, 230, seed=4), [3, 17, 42]
        assert (on_sheet.float() - (looked_at + 1) * 127.5).abs().max() < 0.51  # rounded

        assert "undesired: 3 undesired and 227 clean marks" in done(*command[2:])
        clean = [number for number in range(230) if number not in numbers]
        fitter = FASTFitter(encoder, score="mean_difference")
        fitter.update(undesired=looked_at[numbers], clean=looked_at[clean])
        expected = fitter.fit(threshold="pooled_mean")["undesired"].threshold.value
        assert FASTSafetyChecker.from_pretrained("out").thresholds["undesired"] == pytest.approx(expected, rel=1e-4)

        done("fit", "--config", recipe(encoder=encoder, looked_at=10))
        assert not Path("out/_private/samples_to_mark_2.png").exists()

    def test_marks_of_a_marker_are_bounded(self, recipe, encoder, judge, done):
        kind = undesired_kind(judge, 100)
        total = int((loaded(judge).classify(samples(SHEET, 100)) == kind).sum())
        assert total > 3
        keys = {"marker": judge, "classes": [f"LABEL_{kind}"], "looked_at": 100, "marks": 3}
        shown = done("fit", "--config", recipe(encoder=encoder, batch_size=7, **keys))
        assert f"undesired: 3 undesired and {100 - total} clean marks" in shown

    def test_folders_of_image_files(self, recipe, encoder, tmp_path, done):
        random = np.random.default_rng(0)
        kinds = [("L", "png"), ("RGB", "JPG"), ("RGBA", "png"), ("P", "png"), ("I;16", "png"), ("RGB", "webp")]
        for name, level in (("bright", 200), ("dark", 20)):
            folder = tmp_path / name
            folder.mkdir()
            for number, (mode, suffix) in enumerate(kinds):
                size = (1, 1) if mode == "L" else (9, 13 + number)
                pixels = np.clip(level + random.normal(0, 15, size), 0, 255).astype(np.uint8)
                wide = Image.fromarray(pixels.astype(np.uint16) * 257)
                (wide if mode == "I;16" else Image.fromarray(pixels).convert(mode)).save(folder / f"{number}.{suffix}")
            (folder / "notes.txt").write_text("no image")
        keys = {"undesired_folder": str(tmp_path / "bright"), "clean_folder": str(tmp_path / "dark")}
        assert "undesired: 6 undesired and 6 clean marks" in done("fit", "--config", recipe(encoder=encoder, **keys))
        grey = [Image.new("L", (8, 8), level) for level in (210, 15)]
        assert FASTSafetyChecker.from_pretrained("out")(grey).flags == [True, False]

    def test_folders_of_saved_datasets(self, recipe, encoder, digits, tmp_path, done):
        from hf_unlearn.data import split_by_values

        for name, part in zip(("three", "others"), split_by_values(digits["test"], "label", [3]), strict=True):
            part.select(range(20)).save_to_disk(tmp_path / name)
        keys = {"undesired_folder": str(tmp_path / "three"), "clean_folder": str(tmp_path / "others")}
        assert "undesired: 20 undesired and 20 clean marks" in done("fit", "--config", recipe(encoder=encoder, **keys))
        # Without clean marks: against unmarked samples.
        keys = {"undesired_folder": str(tmp_path / "three"), "max_prevalence": 0.1, "rate": 0.1, "unmarked": 300}
        keys |= {"threshold": "max_false_alarm", "score": "quadratic"}
        shown = done("fit", "--config", recipe(encoder=encoder, **keys))
        assert "20 undesired and 0 clean marks, 300 unmarked samples" in shown
        assert "if at most 10 % of what is drawn is undesired" in shown
        assert "note     max_prevalence: at most 9 % of all samples are blocked" in shown
        assert table(shown, "clean blocked")[0] == "not known"

    def test_latents(self, recipe, done, work):
        """Without an encoder the filter sees z, and draws anew before there is an image."""
        shown = done("fit", "--config", recipe(**MARKED))
        z = latents(SHEET, 20)
        clean = [number for number in range(20) if number not in MARKED["undesired"]]
        fitter = FASTFitter(score="mean_difference").update(undesired=z[MARKED["undesired"]], clean=z[clean])
        fitter.update(unmarked=latents(UNMARKED, 40))
        expected = fitter.fit(threshold="pooled_mean")["undesired"]
        checker = FASTSafetyChecker.from_pretrained("out")
        assert checker.encoder is None
        assert checker.thresholds["undesired"] == pytest.approx(expected.threshold.value, rel=1e-4)
        assert table(shown, "blocked of all")[0] == f"{100 * expected.figures.blocked.value:.1f} %"
        assert "latents" in Path("out/README.md").read_text()
        done("run", "--config", recipe(), "--num_images", 20, "--action", "regenerate")
        verdicts = json.loads(Path("out/images/verdicts.json").read_text())["images"]
        assert any(verdict["tries"] > 1 for verdict in verdicts)
        first = checker.judge(latents(RUN, 20))
        assert [verdict["tries"] > 1 for verdict in verdicts] == first.flags.tolist()

    def test_a_pipeline_of_ours_is_trained_on_first_use(self, recipe, tmp_path, done, monkeypatch):
        tiny = small_gan.Recipe("digits", size=8, base_channels=4, steps=2, latent_dim=4)
        monkeypatch.setitem(small_gan.NAMES, "digits-gan", tiny)
        done("fit", "--config", recipe(pipeline="digits-gan", **MARKED))
        assert (tmp_path / "cache/hf_unlearn/digits-gan-0/model_index.json").is_file()
        assert "digits-gan" not in Path("out/README.md").read_text()

    def test_every_setting_counts(self, recipe, encoder, done):
        keys = {"threshold": "max_false_alarm", "rate": 0.2, "confidence": 0.8, "prevalence": 0.3}
        keys |= {"augment": 50, "score": "linear_svc", "seed": 3, "encoder_layer": 1, "encoder_pooling": "mean"}
        undesired = [*range(6)]
        done("fit", "--config", recipe(encoder=encoder, undesired=undesired, looked_at=60, **keys))
        embedding = FilterEncoder.from_pretrained(encoder, layer=1, pooling="mean")
        fitter, looked_at = FASTFitter(embedding, score="linear_svc", seed=3), samples(SHEET, 60, seed=3)
        fitter.update(undesired=looked_at[:6], clean=looked_at[6:], unmarked=samples(UNMARKED, 40, seed=3))
        expected = fitter.fit(threshold="max_false_alarm", rate=0.2, confidence=0.8, prevalence=0.3, augment=50)
        found, expected = FASTSafetyChecker.from_pretrained("out").config.concepts[0], expected["undesired"]
        assert found["threshold"]["value"] == pytest.approx(expected.threshold.value, rel=1e-4)
        assert found["threshold"]["promise"] == expected.threshold.promise
        assert found["figures"]["prevalence"]["value"] == 0.3
        assert found["figures"]["residual"]["value"] == pytest.approx(expected.figures.residual.value)

    def test_min_recall(self, recipe, encoder, done):
        keys = {"threshold": "min_recall", "rate": 0.5, "undesired": [*range(12)], "looked_at": 60, "score": "lda"}
        shown = done("fit", "--config", recipe(encoder=encoder, **keys))
        assert "promise  at least 50 % of undesired samples are blocked" in shown


class TestStableDiffusion:
    @pytest.fixture
    def twin(self, tiny_stable_diffusion, tmp_path):
        """The recipe, of a tiny pipeline with a tiny CLIP."""
        from transformers import CLIPConfig, CLIPModel
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        tiny_stable_diffusion.save_pretrained(tmp_path / "sd")
        part = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        text = {
            "vocab_size": 10,
            "max_position_embeddings": 8,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": 1,
        }
        vision = {"image_size": 16, "patch_size": 8}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            clip = CLIPModel(CLIPConfig(text_config=part | text, vision_config=part | vision, projection_dim=12))
        processor = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
        for one in (clip, processor):
            one.save_pretrained(tmp_path / "clip")
        keys = yaml.safe_load((RECIPES / "filter_stable_diffusion.yaml").read_text())
        assert not keys["store_encoder"]
        keys |= {"pipeline": str(tmp_path / "sd"), "encoder": str(tmp_path / "clip"), "store_encoder": True}
        keys |= {"num_inference_steps": 2, "looked_at": 40, "unmarked": 30, "num_images": 7} | LOOSE
        keys |= {"rate": None, "dtype": None}
        path = tmp_path / "twin.yaml"
        path.write_text(yaml.safe_dump(keys))
        return str(path), keys

    def test_recipe(self, twin, done, tmp_path):
        path, keys = twin
        out = Path(keys["output_dir"])
        assert done("fit", "--config", path).startswith(f"40 samples are in {out}/_private/samples_to_mark.png: ")
        shown = done("fit", "--config", path, "--undesired", 3, 9, 17, 21)
        assert "weapons: 4 undesired and 36 clean marks, 40 unmarked samples" in shown
        assert f'output = pipe(num_inference_steps=2, prompt="{keys["prompts"][0]}")' in shown
        assert "guns and other weapons" in (out / "README.md").read_text()
        assert str(tmp_path) not in (out / "README.md").read_text()

        done("run", "--config", path, "--action", "flag", "--batch_size", 3)
        content = json.loads((out / "images/verdicts.json").read_text())
        assert [entry["prompt"] for entry in content["images"]] == [*keys["prompts"], keys["prompts"][0]]
        # Each image again, alone.
        from diffusers import StableDiffusionPipeline

        pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "sd")
        checker = FASTSafetyChecker.from_pretrained(out)
        for number in (0, 6):
            generator = seeded_generator("cpu", 0, RUN, number)
            prompt = keys["prompts"][number % 6]
            image = pipeline(prompt, num_inference_steps=2, generator=generator, output_type="pt").images
            score = checker.judge(image * 2 - 1).scores.item()
            assert content["images"][number]["scores"]["weapons"] == pytest.approx(score, abs=1e-3)
            written = np.asarray(Image.open(out / f"images/{number:05}.png"), np.float32)
            assert np.abs(written - (image[0] * 255).round().permute(1, 2, 0).numpy()).max() <= 1

    def test_prompts_are_needed(self, twin, fails):
        path, keys = twin
        Path(path).write_text(yaml.safe_dump(keys | {"prompts": None}))
        line = fails("fit", "--config", path, code=1)
        assert line.startswith("prompts: missing; StableDiffusionPipeline needs some, as in [")


FITTED = []


@pytest.fixture
def fitted(recipe, encoder, done, tmp_path_factory):
    """A filter in `out` that blocks some of what is drawn, fitted once, and the recipe."""
    path = recipe(encoder=encoder, **MARKED)
    if not FITTED:
        done("fit", "--config", path)
        FITTED.append(shutil.copytree("out", tmp_path_factory.mktemp("fitted") / "out"))
    else:
        shutil.copytree(FITTED[0], "out")
    return path


def verdicts():
    return json.loads(Path("out/images/verdicts.json").read_text())["images"]


def written(number):
    return np.asarray(Image.open(f"out/images/{number:05}.png"))


class TestRun:
    @pytest.mark.parametrize("action", ["blank", "blur", "flag", "regenerate"])
    def test_actions(self, fitted, done, action, caplog, pictures):
        shown = done("run", "--config", fitted, "--num_images", 12, "--action", action, "--batch_size", 5)
        drawn = samples(RUN, 12)
        flags = FASTSafetyChecker.from_pretrained("out").judge(drawn).flags.tolist()
        assert 0 < sum(flags) < 12
        found, plain = verdicts(), ((drawn[:, 0] + 1) * 127.5).round().numpy()
        assert [entry["file"] for entry in found] == [f"{number:05}.png" for number in range(12)]
        for number, entry in enumerate(found):
            near = np.abs(written(number).astype(float) - plain[number]).max() <= 1
            if action == "regenerate":
                assert (entry["tries"] > 1) == flags[number]
            else:
                assert (entry["filtered"], entry["tries"]) == (flags[number], 1)
            assert near == (action == "flag" or not flags[number])
            if action == "blank" and flags[number]:
                assert not written(number).any()
        blocked = sum(entry["filtered"] for entry in found)
        assert table(shown, "flagged, and" if action == "flag" else "not released") == [str(blocked)]
        words = {"flag": "flagged"}.get(action, "blocked")
        for number, (caption, entry) in enumerate(zip(pictures["grid"][1], found, strict=True)):
            again = f" (try {entry['tries']})" if entry["tries"] > 1 else ""
            assert caption == (f"{number} {words}" if entry["filtered"] else f"{number}{again}")
        assert ("whatever the filter says" in caplog.text) == (action == "flag")

    def test_raise(self, fitted, fails):
        line = fails("run", "--config", fitted, "--num_images", 12, "--action", "raise", code=1, left=["out"])
        flags = FASTSafetyChecker.from_pretrained("out").judge(samples(RUN, 12)).flags
        which = ", ".join(map(str, flags.nonzero().flatten().tolist()))
        assert line == f"action: raise, and images are not released: {which}; nothing was written"
        assert not Path("out/images").exists()

    def test_fewer_images_leave_none_of_the_earlier_run(self, fitted, done, real_pictures):
        for count in (8, 3):
            done("run", "--config", fitted, "--num_images", count)
        names = sorted(path.name for path in Path("out/images").glob("0*.png"))
        assert names == ["00000.png", "00001.png", "00002.png"]

    def test_a_filter_of_another_folder(self, fitted, recipe, done):
        done("run", "--config", recipe(output_dir="elsewhere", filter="out", num_images=2))
        assert Path("elsewhere/images/verdicts.json").is_file()
        assert not Path("out/images").exists()

    def test_a_pipeline_that_was_saved_with_its_filter(self, recipe, encoder, done, fails):
        path = recipe(encoder=encoder, pipeline_dir="whole", action="blur", **MARKED)
        shown = done("fit", "--config", path)
        assert 'FilteredPipeline.from_pretrained("whole")' in shown
        assert FilteredPipeline.from_pretrained("whole").action == "blur"
        arguments = ("run", "--pipeline", "whole", "--output_dir", "drawn", "--num_images", 4)
        assert "4 images, action blur" in done(*arguments)
        line = fails(*arguments, "--filter", "out", code=1, left=["drawn", "out", "whole"])
        assert line == "filter: pipeline='whole' has its own filter; leave it out"
        line = fails("fit", "--pipeline", "whole", "--output_dir", "new", code=1, left=["drawn", "out", "whole"])
        assert line.startswith("pipeline='whole': has a filter already; give the pipeline in its folder pipeline/")

    def test_diffusion(self, recipe, ddpm, encoder, done):
        path = recipe(pipeline=ddpm, encoder=encoder, batch_size=20, unmarked=6, **MARKED | {"looked_at": 6})
        assert "output = pipe(num_inference_steps=20, batch_size=8)" in done("fit", "--config", path)
        done("run", "--config", path, "--num_images", 3, "--num_inference_steps", 2, "--action", "regenerate")
        assert len(verdicts()) == 3

    def test_what_is_not_finite_is_null(self, fitted, done, monkeypatch):
        from hf_unlearn import GANPipeline

        draw = GANPipeline.draw
        monkeypatch.setattr(GANPipeline, "draw", lambda *args, **kwargs: draw(*args, **kwargs) * float("nan"))
        done("run", "--config", fitted, "--num_images", 2)
        assert [(entry["filtered"], entry["scores"]["undesired"]) for entry in verdicts()] == [(True, None)] * 2
        assert not written(0).any()


class TestEvaluate:
    def test_figures(self, fitted, judge, recipe, encoder, done):
        kind = undesired_kind(judge)
        keys = {"classifier": judge, "classes": [kind], "samples": 150}
        keys |= {"dataset": "digits", "eval_split": "test"}
        shown = done("evaluate", "--config", recipe(**keys, batch_size=40))
        drawn = samples(EVALUATION, 150)
        shows = loaded(judge).classify(drawn) == kind
        blocked = FASTSafetyChecker.from_pretrained("out").judge(drawn).flags
        assert (shows & ~blocked).any()
        expected = {
            "undesired blocked": (int((blocked & shows).sum()), int(shows.sum())),
            "clean blocked": (int((blocked & ~shows).sum()), int((~shows).sum())),
            "released of all": (int((~blocked).sum()), 150),
            "undesired before": (int(shows.sum()), 150),
            "undesired after": (int((shows & ~blocked).sum()), int((~blocked).sum())),
        }
        for title, (count, total) in expected.items():
            cells, rate = table(shown, title), Rate.counted(count, total)
            assert counted(cells) == (count, total)
            assert cells[:2] == [f"{100 * rate.value:.1f} %", f"{100 * rate.low:.1f} to {100 * rate.high:.1f}"]
        assert "promise  none" in shown

        content = json.loads(Path("out/evaluation.json").read_text())
        assert (content["recall"]["count"], content["recall"]["total"]) == expected["undesired blocked"]
        assert content["promise"] is None
        assert "curve    out/tradeoff.png" in shown
        assert min(Image.open("out/tradeoff.png").size) > 300
        assert content["filter"] == FASTSafetyChecker.from_pretrained("out").config.fingerprint
        self.check_images(content["images"], drawn, ~blocked, loaded(judge), kind)

    def check_images(self, found, drawn, released, judge, kind):
        from hf_unlearn.examples.datasets import digits
        from hf_unlearn.images import grey_images
        from hf_unlearn.metrics.features import features_of
        from hf_unlearn.metrics.generation import density_coverage, frechet_distance

        rows = digits()["test"].filter(lambda row: row["label"] != kind)
        real = features_of(grey_images(rows, 8), judge, name="judge")
        count = int(released.sum())
        assert (found["samples"], found["real_images"], found["features"]) == (count, len(rows), "judge")
        for side, images in (("before", drawn[:count]), ("after", drawn[released])):
            features = features_of(images, judge, name="judge")
            near = density_coverage(real, features)
            assert found[side]["fid"] == pytest.approx(frechet_distance(real, features).distance, rel=1e-3)
            assert (found[side]["density"], found[side]["coverage"]) == pytest.approx((near.density, near.coverage))

    def test_other_samples_than_those_of_the_fit(self):
        """Of one seed: or the figures would flatter."""
        rows = torch.cat([latents(purpose, 50) for purpose in (SHEET, UNMARKED, EVALUATION, RUN)])
        assert len(rows.unique(dim=0)) == 200

    def test_the_promise(self, recipe, encoder, judge, done):
        kind = undesired_kind(judge)
        keys = {"encoder": encoder, "marker": judge, "classes": [kind], "looked_at": 200, "unmarked": 300}
        keys |= {"threshold": "max_false_alarm", "score": "quadratic", "classifier": judge, "samples": 300}
        shown = done("fit", "--config", recipe(**keys))
        promise = shown.split("promise  ")[1].splitlines()[0]
        assert promise.startswith("at most 5 % of clean samples are blocked, with confidence 95 % over the draw of ")
        shown = done("evaluate", "--config", recipe(**keys))
        assert f"promise  {promise}\n         " in shown
        found = json.loads(Path("out/evaluation.json").read_text())
        assert found["promise"] == {"promise": promise, "verdict": "held"}
        assert found["false_alarm"]["value"] <= 0.05

    def test_several_concepts(self, recipe, judge, encoder, done, fails):
        fitter = FASTFitter(encoder, score="mean_difference", concepts=["one", "two"])
        images = samples(SHEET, 40)
        fitter.update(undesired=images[:5], concept="one").update(undesired=images[5:10], concept="two")
        fitter.update(clean=images[10:])
        fitter.fit(threshold="pooled_mean").checker().save_pretrained("out")
        keys = {"classifier": judge, "classes": [3], "samples": 20}
        line = fails("evaluate", "--config", recipe(**keys), code=1, left=["out"])
        assert line == "concept: missing; the filter has one, two"
        line = fails("evaluate", "--config", recipe(**keys, concept="three"), code=1, left=["out"])
        assert line == "concept='three': is not of the filter, which has one, two"
        checker = FASTSafetyChecker.from_pretrained("out")
        verdict = checker.judge(samples(EVALUATION, 20))
        own = int((verdict.scores[:, 1] <= checker.thresholds["two"]).sum())
        assert own != int((~verdict.flags).sum())
        shown = done("evaluate", "--config", recipe(**keys, concept="two"))
        assert counted(table(shown, "released of all")) == (own, 20)
        assert table(done("run", "--config", recipe(num_images=9)), "above the threshold of two")

    def test_warns_where_the_encoder_judges(self, fitted, recipe, encoder, done, caplog):
        done("evaluate", "--config", recipe(classifier=encoder, classes=[1], samples=10))
        assert "classifier: is the filter's encoder too" in caplog.text

    def test_intervals_of_the_area(self):
        from hf_unlearn.jobs.filter.evaluate import auc_interval

        low, high = auc_interval(0.8, 50, 50)
        # Hanley and McNeil's standard error at 0.8 is 0.0446.
        assert (low, high) == pytest.approx((0.8 - 2 * 0.0446, 0.8 + 2 * 0.0446), abs=0.03)
        assert low < 0.8 - 1.5 * 0.0446 < 0.8 + 1.5 * 0.0446 < high
        assert auc_interval(1.0, 30, 30)[1] == 1.0
        assert 0.8 < auc_interval(1.0, 30, 30)[0] < 1.0
        assert auc_interval(0.0, 30, 30) == pytest.approx((0.0, 1 - auc_interval(1.0, 30, 30)[0]), abs=1e-6)
        widths = [np.diff(auc_interval(0.8, n, n)).item() for n in (10, 100, 1000)]
        assert widths == sorted(widths, reverse=True)

    def test_verdicts(self):
        from hf_unlearn.jobs.filter.evaluate import promise_kept

        words = ("held", "in doubt", "not held", "not known")
        for rule, figure, rate, counts in (
            ("max_false_alarm", "false_alarm", 0.05, (50, 55, 90, None)),
            ("min_recall", "recall", 0.9, (900, 895, 850, None)),
        ):
            for count, verdict in zip(counts, words, strict=True):
                figures = {"recall": None, "false_alarm": None}
                figures[figure] = None if count is None else Rate.counted(count, 1000)
                found = promise_kept({"rule": rule, "rate": rate, "promise": "so much"}, figures)
                assert found["verdict"].split(":")[0] == verdict
                assert promise_kept({"rule": "pooled_mean", "promise": None}, figures) is None

    def test_scores_that_are_not_finite_are_blocked(self):
        from hf_unlearn.jobs.filter.evaluate import figures_of

        undesired = torch.tensor([True, True, False, False])
        scores = torch.tensor([float("nan"), 2.0, 1.0, 0.0])
        figures = figures_of(undesired, scores, torch.tensor([False, False, True, True]))
        assert (figures["auc"].value, figures["recall"].value, figures["residual"].value) == (1.0, 1.0, 0.0)
        assert figures_of(undesired, scores, torch.zeros(4, dtype=torch.bool))["residual"] is None
        assert figures_of(torch.zeros(4, dtype=torch.bool), scores, undesired)["auc"] is None


class TestVerbs:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((), "filter: say what to do: fit, run, evaluate; as in hf-unlearn filter fit --config recipe.yaml"),
            (("fitt",), "unknown verb 'filter fitt'; did you mean 'fit'?"),
            (("--config", "x"), "unknown verb 'filter --config'; hf-unlearn filter --help lists them"),
            (("fit", "--marker_", "digits"), "unknown key 'marker_'; did you mean 'marker'?"),
            (("run", "--marker", "digits"), "unknown key 'marker'; hf-unlearn filter run --help lists the keys"),  # of another verb
            (("fit", "--config", "none.yaml"), "config: cannot read 'none.yaml'"),
            (("fit",), "pipeline: missing; set it to 'digits-gan', 'fashion-mnist-gan', 'digits-ddpm', 'fashion-mnist-ddpm', a folder, or an id on the Hub"),
        ],
    )  # fmt: skip
    def test_wrong_ones(self, fails, arguments, message):
        assert fails(*arguments).startswith(message)

    @pytest.mark.parametrize("name", NAMES)
    def test_every_recipe_serves_its_verbs(self, name):
        path = RECIPES / f"{name}.yaml"
        keys = yaml.safe_load(path.read_text())
        verbs = FILTER if "classifier" in keys else ("fit", "run")
        given = {verb: read(FILTER[verb], options([str(path)]), list(FILTER.values()), help="") for verb in verbs}
        taken = {verb: FILTER[verb].job_of(given[verb]) for verb in verbs}
        for verb, job in taken.items():
            assert f"hf-unlearn filter {verb} --config recipes/{path.name}" in path.read_text()
            assert job.output_dir == f"outputs/{name}"
        assert all(any(hasattr(job, key) for job in taken.values()) for key in keys)


class TestBadRecipes:
    """Exit code 2, one line, nothing written."""

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"markr": "digits"}, "{path}: unknown key 'markr'; did you mean 'marker'?"),
            ({"num_image": 3}, "{path}: unknown key 'num_image'; did you mean 'num_images'?"),
            ({"score": "cosine"}, "{path}: score='cosine': must be one of "),
            ({"threshold": "fixed"}, "{path}: threshold='fixed': must be one of "),
            ({"undesired": ["a"]}, "{path}: undesired: 'a' is not allowed; expected int"),
            ({"output_dir": None}, "output_dir: missing; set it to the folder of the filter"),
            ({"prompts": [" "]}, "prompts: has nothing to ask for; list some, or leave it out"),
            ({"batch_size": 0}, "batch_size=0: must be ≥ 1"),
            ({"num_inference_steps": 0}, "num_inference_steps=0: must be ≥ 1"),
            ({"device": "gpu"}, "device='gpu': is none; set it to cpu or cuda"),
            ({"pipeline": "digits-gan", "prompts": ["a"]}, "prompts: 'digits-gan' has none; leave it out"),
            ({"concept": " "}, "concept: is empty; name what is filtered"),
            ({"encoder_layer": 1}, "encoder: missing, which encoder_layer needs"),
            ({"store_encoder": False}, "store_encoder=False: only an encoder on the Hub can be referred to"),
            ({"store_encoder": False, "encoder": "digits"}, "store_encoder=False: only an encoder on the Hub"),
            ({"marker": "digits"}, "classes: missing, which marker needs; set it to the classes"),
            ({"marker": "digits", "classes": [3], "undesired": [1]}, "undesired: given beside marker; keep one of them"),
            ({"undesired": [1], "undesired_folder": "x"}, "undesired_folder: given beside undesired; keep one of them"),
            ({"undesired_folder": "x"}, "encoder: missing, which undesired_folder needs"),
            ({"clean_folder": "x"}, "undesired_folder: missing, which clean_folder needs"),
            ({"marks": 3}, "marker: missing, which marks needs"),
            ({"marker": "digits", "classes": [3], "marks": 1}, "marks=1: must be ≥ 2"),
            ({"unmarked": -1}, "unmarked=-1: must be ≥ 0"),
            ({"looked_at": 1}, "looked_at=1: must be ≥ 2"),
            ({"undesired": [200]}, "undesired: 200 is not on the sheet, whose samples are 0 to 199; correct it"),
            ({"undesired": [0, 1], "looked_at": 2}, "undesired: names all 2 samples, none is left as clean; raise looked_at"),
            ({"rate": 0.1}, "rate: given beside threshold: pooled_mean"),
            ({"threshold": "min_recall", "rate": 1.0}, "rate=1.0: must be in (0, 1)"),
            ({"confidence": 95}, "confidence=95.0: must be in (0, 1)"),
            ({"max_prevalence": 0.1}, "max_prevalence: is for threshold: max_false_alarm only"),
            ({"augment": 5000, "score": "quadratic"}, "augment: is for linear scores"),
            ({"undesired_folder": "x", "encoder": "digits", "threshold": "max_false_alarm"},
             "clean_folder: missing, which threshold: max_false_alarm is calibrated on; set it, or max_prevalence"),
            ({"pipeline_dir": "out"}, "pipeline_dir: is output_dir too; choose another folder"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
    )  # fmt: skip
    def test_fit(self, recipe, fails, keys, message):
        path = recipe(**keys)
        assert fails("fit", "--config", path).startswith(message.format(path=path))

    @pytest.mark.parametrize(
        ("verb", "keys", "message"),
        [
            ("run", {"num_images": 0}, "num_images=0: must be ≥ 1"),
            ("run", {"max_tries": 0}, "max_tries=0: must be ≥ 1"),
            ("run", {"action": "blurr"}, "{path}: action='blurr': must be one of "),
            ("evaluate", {}, "classifier: missing; set it to 'digits'"),
            ("evaluate", {"classifier": "digits"}, "classes: missing; list the classes"),
            ("evaluate", {"classifier": "digits", "classes": [3], "samples": 1}, "samples=1: must be ≥ 2"),
            ("evaluate", {"classifier": "digits", "classes": [3], "dataset": "digits"}, "eval_split: missing, which dataset needs"),
            ("evaluate", {"classifier": "digits", "classes": [3], "eval_split": "test"}, "dataset: missing, which eval_split needs"),
        ],
    )  # fmt: skip
    def test_run_and_evaluate(self, recipe, fails, verb, keys, message):
        path = recipe(**keys)
        assert fails(verb, "--config", path).startswith(message.format(path=path))

    def test_nothing_else_is_overwritten(self, recipe, fails, work, gan):
        (work / "out").mkdir()
        for file in ("config.json", "model_index.json", "README.md", "model.safetensors"):
            (work / "out" / file).write_text("{}")
            line = fails("fit", "--config", recipe(**MARKED), left=["out"])
            assert line == f"output_dir: 'out' holds {file}, which is of no filter; choose another folder"
            assert (work / "out" / file).read_text() == "{}"
            (work / "out" / file).unlink()
        (work / "out").rmdir()
        line = fails("fit", "--config", recipe(pipeline_dir=gan, **MARKED))
        assert line == f"pipeline_dir: {gan!r} holds something else; choose another folder"
        (work / "images").mkdir()
        (work / "images/00001.png").write_text("mine")
        line = fails("run", "--config", recipe(images_dir="images"), left=["images"])
        assert line == "images_dir: 'images' holds something else; choose another folder"


class TestBadData:
    """Exit code 1: what only the pipeline, the marks or the files can tell; one line, nothing written."""

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            (MARKED | {"pipeline": "nobody/nothing"}, "pipeline='nobody/nothing': neither a folder with a pipeline nor an id"),
            (MARKED | {"encoder": "nobody/nothing"}, "encoder='nobody/nothing': cannot be had ("),
            ({"marker": "nobody/nothing", "classes": [3]}, "marker='nobody/nothing': neither a folder with a classifier"),
            (MARKED | {"prompts": ["a dog"]}, "prompts: GANPipeline takes none; leave it out"),
            (MARKED | {"num_inference_steps": 3}, "num_inference_steps: GANPipeline takes none; leave it out"),
            (MARKED | {"guidance_scale": 3.0}, "guidance_scale: GANPipeline takes none; leave it out"),
            ({"undesired": [1], "looked_at": 20}, "undesired: has 1 undesired marks; mark at least 2, better 20"),
            (MARKED | {"threshold": "max_false_alarm", "unmarked": 10**9},
             "rate: max_false_alarm 0.05 with confidence 0.95 needs 59 clean samples that are not used in fitting, there are 8; "),
            (MARKED | {"threshold": "min_recall", "unmarked": 10**9},
             "rate: min_recall 0.9 with confidence 0.95 needs 29 undesired samples that are not used in fitting, there are 2; "),
            (MARKED | {"threshold": "max_false_alarm", "max_prevalence": 0.1},
             "rate: max_false_alarm 0.05 with confidence 0.95 needs 66 unmarked samples that are not used in fitting, there are 20; "),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
    )  # fmt: skip
    def test_fit(self, recipe, fails, keys, message):
        """The last ones before a billion samples are drawn."""
        assert fails("fit", "--config", recipe(**keys), code=1).startswith(message)

    def test_what_does_not_fit_together(self, recipe, fails, judge, encoder, ddpm, tiny_bert, tokenizer, tmp_path):
        seen = loaded(judge).classify(samples(SHEET, 4)).tolist()
        other = next(kind for kind in range(10) if kind not in seen)
        for part in (tiny_bert, tokenizer):
            part.save_pretrained(tmp_path / "bert")
        texts = str(tmp_path / "bert")
        for keys, words in (
            ({"marker": judge, "classes": ["three"]},
             f"classes: 'three' is no class of marker={judge!r}; choose among 0: LABEL_0, 1: "),
            ({"marker": judge, "classes": [other], "looked_at": 4},
             f"classes: marker={judge!r} sees them in 0 of 4 samples; raise looked_at"),
            (MARKED | {"pipeline": ddpm},
             "encoder: missing; DDPMPipeline has no latents to filter by; set it to 'digits'"),
            (MARKED | {"encoder": encoder, "encoder_pooling": "first"},
             f"encoder={encoder!r}: cannot be had (pooling: ResNetModel has no tokens"),
            (MARKED | {"encoder": texts}, f"encoder={texts!r}: takes texts; set it to an image model"),
        ):  # fmt: skip
            assert fails("fit", "--config", recipe(**keys), code=1).startswith(words)

    def test_folders(self, recipe, fails, encoder, tmp_path):
        for name in ("empty", "broken"):
            (tmp_path / name).mkdir()
        (tmp_path / "broken/1.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
        for name, found, message in (
            ("none", "none", "is no folder; give one with image files, or written by save_to_disk"),
            ("empty", "empty", "holds no images (.png, .jpg, .jpeg, .webp) and no dataset"),
            ("broken", "broken/1.png", "cannot be read as an image; remove it"),
        ):
            keys = {"encoder": encoder, "undesired_folder": str(tmp_path / name)}
            line = fails("fit", "--config", recipe(**keys), code=1)
            assert line == f"undesired_folder: {str(tmp_path / found)!r} {message}"

    def test_several_processes(self, recipe, fails, monkeypatch):
        monkeypatch.setenv("WORLD_SIZE", "2")
        line = fails("fit", "--config", recipe(**MARKED), code=1)
        assert line == "filter: runs in one process; start it without accelerate launch"
        monkeypatch.delenv("WORLD_SIZE")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        line = fails("fit", "--config", recipe(**MARKED, device="cuda"), code=1)
        assert line == "device='cuda': there is no such GPU; leave it out"

    def test_no_filter(self, recipe, fails, encoder):
        line = fails("run", "--config", recipe(), code=1)
        assert line.startswith("filter: missing, and output_dir='out' holds none; run hf-unlearn filter fit first")
        line = fails("run", "--config", recipe(filter=encoder), code=1)  # a model, but no filter
        assert line.startswith(f"filter={encoder!r}: neither a folder with a filter nor an id on the Hub (")
        line = fails("run", "--config", recipe(filter="nobody/nothing"), code=1)
        assert line.startswith("filter='nobody/nothing': neither a folder with a filter nor an id on the Hub (")

    def test_no_generator_is_trained_where_no_filter_is(self, recipe, fails, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        line = fails("run", "--config", recipe(pipeline="digits-gan"), code=1)
        assert line.startswith("filter: missing, and output_dir='out' holds none; ")
        assert not (tmp_path / "cache").exists()

    def test_a_broken_filter_draws_nothing(self, fitted, fails):
        path = Path("out/model.safetensors")
        content = bytearray(path.read_bytes())
        content[-8:] = b"\xff" * 8
        path.write_bytes(content)
        line = fails("run", "--config", fitted, code=1, left=["out"])
        assert line.startswith("filter='out': neither a folder with a filter nor an id on the Hub (out: ")
        assert not Path("out/images").exists()

    def test_a_filter_of_latents_on_diffusion(self, recipe, ddpm, done, fails):
        done("fit", "--config", recipe(**MARKED))
        line = fails("run", "--config", recipe(pipeline=ddpm), "--num_inference_steps", 2, code=1, left=["out"])
        assert line.startswith("safety_checker: judges latents")


def test_own_encoders_cannot_be_named(recipe, fails):
    """A recipe has no function to give."""
    encoder = FilterEncoder.own(lambda images: images.flatten(1), name="pixels")
    images = samples(SHEET, 20)
    fitter = FASTFitter(encoder, score="mean_difference").update(undesired=images[:3], clean=images[3:])
    fitter.fit(threshold="pooled_mean").checker().save_pretrained("out")
    line = fails("run", "--config", recipe(), code=1, left=["out"])
    assert "was fitted with the user's own, 'pixels'" in line


def test_names_are_not_read_as_markup(capsys):
    """Of concepts, classes and folders: what is printed is what they are called."""
    table = Table(title="a [/b] c: 3 samples")
    table.add_column("[red]")
    table.add_row("[/]")
    console().print(table)
    console().print("above the threshold of a [/b] c")
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("a [/b] c: 3 samples", "[red]", "[/]", "threshold of a [/b] c"))
