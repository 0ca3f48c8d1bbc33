"""What the app does, without a page: opening, comparing, marking, fitting, saving."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image

from hf_unlearn import (
    DCGANDiscriminator,
    DCGANGenerator,
    FASTFitter,
    FASTSafetyChecker,
    FilteredPipeline,
    FilterEncoder,
    GANPipeline,
    cli,
)
from hf_unlearn.app import fitting
from hf_unlearn.app.desk import MADE, OPENED, UNLEARNED, Desk
from hf_unlearn.app.marks import PAGE, Marks
from hf_unlearn.app.opened import opened
from hf_unlearn.examples.loopback_hub import LoopbackHub
from hf_unlearn.jobs.filter.source import RUN, SHEET_SAMPLES, Batch, Source
from hf_unlearn.jobs.recipe.app import AppJob
from hf_unlearn.modes import seeded_generator


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch):
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("HF_UNLEARN_DEBUG", raising=False)
    return folder


def tiny_gan(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shape = {"sample_size": 8, "base_channels": 4}
        return GANPipeline(DCGANGenerator(latent_dim=4, **shape), DCGANDiscriminator(**shape))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two GANs, a filter of latents that blocks a first number above 0.5, and the first GAN with it."""
    folder = tmp_path_factory.mktemp("models")
    for name, seed in (("gan", 0), ("other", 1)):
        tiny_gan(seed).save_pretrained(folder / name)
    random = torch.Generator().manual_seed(0)
    latents = torch.randn(4000, 4, generator=random)
    high = latents[:, 0] > 0.5
    fitter = FASTFitter(concepts=["high"]).update(
        undesired=latents[:1000][high[:1000]], clean=latents[:1000][~high[:1000]]
    )
    checker = fitter.update(unmarked=latents[1000:]).fit().checker()
    checker.save_pretrained(folder / "filter")
    FilteredPipeline(tiny_gan(), checker, action="blur").save_pretrained(folder / "filtered")
    return folder


@pytest.fixture
def desk(folders):
    def make(*names, **keys):
        job = AppJob(open=[str(folders / name) for name in names], **keys)
        return Desk(job, opened(job))

    return make


# What is opened


@pytest.mark.parametrize(
    ("names", "choices", "action"),
    [
        (["gan"], [], "blank"),
        (["gan", "filter"], [OPENED], "blank"),
        (["filter", "gan"], [OPENED], "blank"),
        (["filtered"], [OPENED], "blur"),
        (["gan", "other"], [UNLEARNED], "blank"),
    ],
)
def test_opened(names, choices, action, desk, folders):
    found = desk(*names)
    assert [word for _, word in found.choices(None)] == choices
    assert found.found.action == action
    assert not found.found.prompted
    assert found.found.has_latents
    if names[-1] == "other":  # the original stays first
        drawn = [next(p.generator.parameters()) for p in (found.found.pipeline, found.found.unlearned)]
        kept = [next(tiny_gan(seed).generator.parameters()) for seed in (0, 1)]
        assert all(torch.equal(a, b) for a, b in zip(drawn, kept, strict=True))


@pytest.mark.parametrize(
    ("names", "line"),
    [
        (["filtered", "filter"], "do not go together"),
        (["filtered", "gan"], "do not go together"),
        (["filter", "filter2"], "do not go together"),
        (["filter"], "judges a GAN's latents; open it with that GAN"),
        (["gan", "ddpm"], None),
        (["filter", "ddpm"], "judges a GAN's latents"),
        (["nothing"], "there is no such folder; give a folder with a pipeline or a filter, or an id on the Hub"),
        (["empty"], "neither a folder with a pipeline or a filter nor an id on the Hub"),
    ],
)
def test_what_does_not_go_together(names, line, desk, folders, tiny_ddpm):
    if not (folders / "ddpm").exists():
        tiny_ddpm.save_pretrained(folders / "ddpm")
        FASTSafetyChecker.from_pretrained(folders / "filter").save_pretrained(folders / "filter2")
        (folders / "empty").mkdir()
    if line is None:
        assert desk(*names).found.unlearned is not None
    else:
        with pytest.raises(ValueError, match=line):
            desk(*names)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["a", "b", "c"], "open: 3 are named; name one, or two"),
        (["a", "a"], "open: 'a' is named twice"),
        (["a", "--open", "b"], "open: given twice"),
        (["--port", "70000"], "port=70000: must be from 1 to 65535"),
        (["--port", "0"], "port=0: must be ≥ 1"),
        (["--batch_size", "0"], "batch_size=0: must be ≥ 1"),
        (["--prompts", " "], "prompts: has nothing to ask for"),
        (["--sead", "1"], "did you mean 'seed'?"),
    ],
)
def test_a_wrong_command(arguments, line, capsys):
    assert cli.main(["app", *arguments]) == 2
    shown = capsys.readouterr().err
    assert line in shown
    assert shown.count("\n") == 1


def test_help(capsys):
    assert cli.main(["app", "--help"]) == 0
    assert "--output_dir" in capsys.readouterr().out


def test_without_gradio(monkeypatch, capsys, folders):
    from hf_unlearn.app import launch

    monkeypatch.setattr(launch, "version", lambda name: "3.18.0")
    assert cli.main(["app", str(folders / "gan")]) == 1
    assert "app: needs gradio 6 or newer, this is 3.18.0; pip install 'hf_unlearn[app]'" in capsys.readouterr().err


# Before and after


def drawn_alone(pipeline, seed, number):
    latents = pipeline.prepare_latents(1, seeded_generator("cpu", seed, RUN, number))
    return latents, pipeline.draw(latents)[0] / 2 + 0.5


@pytest.mark.parametrize("batch_size", [5, 16])
def test_a_filter_changes_what_it_blocks_and_nothing_else(batch_size, desk, folders):
    it = desk("gan", "filter", batch_size=batch_size)
    comparison = it.compare(it.asked(seed=3), OPENED, None, 24, "blank")
    gan, checker = tiny_gan(), FASTSafetyChecker.from_pretrained(folders / "filter")
    for number in range(24):
        latents, image = drawn_alone(gan, 3, number)
        torch.testing.assert_close(comparison.before[number], image, rtol=0, atol=1e-5)
        flag = bool(checker.judge(latents).flags)
        assert comparison.blocked[number] == flag
        after = torch.zeros_like(image) if flag else image
        torch.testing.assert_close(comparison.after[number], after, rtol=0, atol=1e-5)
    assert 0 < sum(comparison.blocked) < 24
    assert comparison.line.startswith(f"{sum(comparison.blocked)} of 24 samples are blocked")


def test_drawn_again(desk):
    it = desk("filtered")
    comparison = it.compare(it.asked(), OPENED, None, 48, "regenerate")
    blocked = torch.tensor(comparison.blocked)
    assert torch.equal(comparison.before[~blocked], comparison.after[~blocked])
    changed = (comparison.before != comparison.after).flatten(1).any(1)
    assert torch.equal(changed, blocked)
    black = (comparison.after == 0).flatten(1).all(1)
    assert comparison.redrawn == int((blocked & ~black).sum()) > 0


def test_an_unlearned_pipeline_draws_from_the_same_noise(desk):
    it = desk("gan", "other")
    comparison = it.compare(it.asked(), UNLEARNED, None, 7, "blank")
    for number in range(7):
        for pipeline, images in ((tiny_gan(0), comparison.before), (tiny_gan(1), comparison.after)):
            torch.testing.assert_close(images[number], drawn_alone(pipeline, 0, number)[1], rtol=0, atol=1e-5)
    assert comparison.blocked is None
    assert comparison.line == "7 samples, each twice from the same noise; 0 of them look the same after."


def test_prompts_in_turn(tiny_stable_diffusion, tmp_path):
    tiny_stable_diffusion.save_pretrained(tmp_path / "sd")
    job = AppJob(open=[str(tmp_path / "sd")], prompts=["a photo", "a top"], batch_size=2, num_inference_steps=2)
    it = Desk(job, opened(job))
    assert it.found.prompts == ("a photo", "a top")
    asked = it.asked(prompts="a photo\n\n  a hat \n", steps=2)
    assert asked.prompts == ["a photo", "a hat"]
    marks = Marks()
    it.draw_page(asked, marks)
    assert marks.prompts[:3] == ["a photo", "a hat", "a photo"]
    alone = Source(it.found.pipeline, asked).draw(SHEET_SAMPLES, [1]).images[0]
    torch.testing.assert_close(marks.images[1].float(), alone, rtol=0, atol=2e-3)
    with pytest.raises(ValueError, match="prompts: missing"):
        it.asked(prompts=" \n")
    with pytest.raises(ValueError, match="StableDiffusionPipeline has no latents"):
        it.fit(asked, marks, rest_is_clean=True)


@pytest.mark.parametrize(
    ("which", "count", "action", "line"),
    [
        (None, 6, "blank", "nothing to compare with yet"),
        (MADE, 6, "blank", "nothing to compare with yet"),
        (UNLEARNED, 6, "blank", "nothing to compare with yet"),
        (OPENED, 0, "blank", "samples: 0 are asked for"),
        (OPENED, 97, "blank", "samples: 97 are asked for"),
        (OPENED, 6, "raise", "action='raise': must be one of"),
    ],
)
def test_what_cannot_be_compared(which, count, action, line, desk):
    it = desk("gan", "filter")
    with pytest.raises(ValueError, match=line):
        it.compare(it.asked(), which, None, count, action)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"seed": -1}, "seed=-1: must be"),
        ({"seed": 0.5}, "seed=0.5: must be a whole number"),
        ({"steps": 2.5}, "steps=2.5: must be a whole number"),
        ({"rate": 1.5}, "rate=1.5"),
        ({"concept": " "}, "concept: is empty"),
    ],
)
def test_what_is_asked_is_checked(keys, line, desk):
    with pytest.raises(ValueError, match=line):
        desk("gan").asked(**keys)


# Marks


def test_clicks_and_numbers():
    marks = Marks()
    marks.add(Batch(range(60), torch.zeros(60, 1, 8, 8), None))
    assert (len(marks), marks.pages, marks.numbers(1)) == (60, 2, range(PAGE, 60))
    marks.click(3, "undesired")
    marks.click(50, "clean")
    assert (marks.of("undesired"), marks.of("clean")) == ([3], [50])
    marks.click(3, "undesired")  # again: away
    marks.click(50, "undesired")  # the other kind
    assert (marks.of("undesired"), marks.of("clean")) == ([50], [])
    marks.write("undesired", "7, 5;9\n")
    assert marks.of("undesired") == [5, 7, 9]
    assert marks.of("clean", rest_is_clean=True) == [n for n in range(60) if n not in (5, 7, 9)]
    for text in ("60", "-1", "three", "1 2 x"):
        with pytest.raises(ValueError, match="is no sample; there are 0 to 59"):
            marks.write("undesired", text)
    for number, kind in ((60, "clean"), (-1, "clean"), ("3", "clean"), (3, "good")):
        with pytest.raises(ValueError, match="is no sample|is none"):
            marks.click(number, kind)
    with pytest.raises(ValueError, match="another size"):
        marks.add(Batch(range(2), torch.zeros(2, 1, 4, 4), None))
    assert marks.of("undesired") == [5, 7, 9]
    marks.write("undesired", "")
    assert marks.of("undesired") == []


# A filter


@pytest.fixture
def marked(desk):
    """Four pages, of which samples with a first latent above 1 are marked undesired."""
    it, marks = desk("gan"), Marks()
    for _ in range(4):
        it.draw_page(it.asked(), marks)
    for number in (marks.latents[:, 0] > 1).nonzero().flatten().tolist():
        marks.click(number, "undesired")
    return it, marks


def test_a_filter_does_what_the_marks_say_and_keeps_its_promise(marked):
    it, marks = marked
    heard = []
    job = it.asked(concept="high", unmarked=600)
    fitted = it.fit(job, marks, rest_is_clean=True, told=lambda *done: heard.append(done))
    assert heard[-1] == (600, 600)
    fresh = torch.randn(4000, 4, generator=torch.Generator().manual_seed(5))
    flags = fitted.checker.judge(fresh).flags
    assert flags[fresh[:, 0] > 2].float().mean() > 0.9
    assert flags[fresh[:, 0] < 1].float().mean() <= 0.05
    assert fitting.promise(fitted).startswith("At most 5 % of clean samples are blocked.\nWith confidence 95 %")
    assert fitting.leak(fitted).startswith("Of what is released, about ")
    assert [row[0] for row in fitting.rows(fitted)][0] == "undesired blocked (recall)"
    assert len(fitted.blocked) == len(marks)
    hit = sum(fitted.blocked[number] for number in marks.of("undesired"))
    assert f"blocks {hit} of {len(marks.of('undesired'))}" in fitting.on_marks(fitted, marks, rest_is_clean=True)
    assert it.choices(fitted)[0][1] == MADE
    again = it.compare(it.asked(), MADE, fitted, 24, "blank")
    assert again.blocked == it.compare(it.asked(), MADE, fitted, 24, "blur").blocked


def test_it_is_the_filter_of_the_command_line(marked, folders, capsys):
    it, marks = marked
    undesired = list(map(str, marks.of("undesired")))
    words = [
        "--pipeline",
        str(folders / "gan"),
        "--output_dir",
        "out",
        "--looked_at",
        str(len(marks)),
        "--unmarked",
        "600",
    ]
    assert cli.main(["filter", "fit", *words, "--batch_size", "16", "--undesired", *undesired]) == 0
    written = json.loads(Path("out/config.json").read_text())["concepts"][0]
    fitted = it.fit(it.asked(unmarked=600), marks, rest_is_clean=True)
    assert fitted.concept.threshold.value == pytest.approx(written["threshold"]["value"], rel=1e-4)
    assert fitted.concept.threshold.promise == written["threshold"]["promise"]
    assert fitted.concept.figures.recall.value == pytest.approx(written["figures"]["recall"]["value"])


def test_too_few_marks_are_told_before_anything_is_drawn(marked):
    it, marks = marked

    def nothing(done, of):
        raise AssertionError

    with pytest.raises(
        ValueError, match="needs 59 clean samples that are not used in fitting, there are 0; mark more"
    ):
        it.fit(it.asked(), marks, rest_is_clean=False, told=nothing)
    marks.write("undesired", "4")
    with pytest.raises(ValueError, match="undesired: 1 samples are marked"):
        it.fit(it.asked(), marks, rest_is_clean=True, told=nothing)


@pytest.mark.parametrize("whole", [True, False])
def test_saved(whole, marked, work):
    it, marks = marked
    fitted = it.fit(it.asked(concept="high"), marks, rest_is_clean=True)
    folder, code = it.save(fitted, "no-high", whole=whole, action="regenerate")
    assert folder == Path("app/no-high")
    assert sorted(path.name for path in folder.iterdir()) == ["filter", "pipeline"] if whole else ["filter"]
    names = {}
    exec("\n".join(code), names)
    pipe = names["pipe"]
    assert (pipe.action if whole else "regenerate") == "regenerate"
    fresh = torch.randn(50, 4)
    assert torch.equal(pipe.safety_checker.judge(fresh).flags, fitted.checker.judge(fresh).flags)
    assert "high" in (folder / "filter/README.md").read_text()
    assert str(work) not in (folder / "filter/README.md").read_text()
    with pytest.raises(ValueError, match="is there already"):
        it.save(fitted, "no-high", whole=whole, action="blank")
    for name in ("", "..", "../up", "a/b", ".hidden", "/tmp/x"):
        with pytest.raises(ValueError, match="^name="):
            it.save(fitted, name, whole=whole, action="blank")
    assert [path.name for path in Path("app").iterdir()] == ["no-high"]


def test_what_is_not_saved(marked):
    it, _ = marked
    with pytest.raises(ValueError, match="no filter yet"):
        it.save(None, "x", whole=True, action="blank")
    it.job.output_dir = None
    with pytest.raises(ValueError, match="saves nothing"):
        it.save(None, "x", whole=True, action="blank")
    with pytest.raises(ValueError, match="this app loads no other than None"):
        it.fit(it.asked(encoder="me/any"), Marks(), rest_is_clean=True)


@pytest.mark.parametrize("whole", [True, False])
def test_published(whole, marked, folders, tmp_path):
    it, marks = marked
    fitted = it.fit(it.asked(concept="high"), marks, rest_is_clean=True)
    folder, _ = it.save(fitted, "no-high", whole=whole, action="blur")
    with LoopbackHub() as hub, hub.in_this_process(tmp_path / "home"):
        said, code = it.publish(folder, " no-high ")
        assert said.startswith(f"The {'pipeline with its filter' if whole else 'filter'} is published: ")
        assert "in `me/no-high` (private), http" in said
        assert HfApi().model_info("me/no-high").private
        sent = set(hub.files("me/no-high"))
        assert {"README.md", "provenance.json"} <= sent
        assert ("model_index.json" in sent) == whole
        assert '.from_pretrained("me/no-high")' in (card := hub.files("me/no-high")["README.md"].decode())
        assert '"."' not in card  # where it was saved, its code loads the folder that it is in
        assert len(sent) == int(re.search(r"(\d+) files", said)[1])
        names = {}
        exec("\n".join(code), names)
        fresh = torch.randn(50, 4)
        assert torch.equal(names["pipe"].safety_checker.judge(fresh).flags, fitted.checker.judge(fresh).flags)
        assert "(there already: as its owner has set)" in it.publish(folder, "me/no-high", private=False)[0]
        with pytest.raises(ValueError, match="^repo_id='': is no name of a repository"):
            it.publish(folder, "  ")


def test_what_is_not_published(marked, monkeypatch, tmp_path):
    it, marks = marked
    with pytest.raises(ValueError, match="^nothing is saved yet: save a filter first$"):
        it.publish(None, "me/x")
    folder, _ = it.save(it.fit(it.asked(), marks, rest_is_clean=True), "x", whole=False, action="blank")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(OSError, match="^token: there is none; log in"):
        it.publish(folder, "me/x")
    it.job.host = "0.0.0.0"  # before anything of the Hub is asked for
    with pytest.raises(ValueError, match="^host='0.0.0.0': others reach this page"):
        it.publish(folder, "me/x")


# Images from elsewhere


def test_own_images(desk, tmp_path):
    bright = FilterEncoder.own(
        lambda images: torch.stack([images.mean((1, 2, 3)), images.std((1, 2, 3))], 1),
        name="bright",
        channels=1,
        size=(8, 8),
    )
    random = torch.Generator().manual_seed(0)
    images = torch.rand(400, 1, 8, 8, generator=random) * 0.4 - 0.9
    images[::2] += 1
    fitter = FASTFitter(bright, score="mean_difference", concepts=["bright"])
    checker = fitter.update(undesired=images[::2], clean=images[1::2], value_range=(-1, 1)).fit(rate=0.1).checker()
    it = desk("gan")
    it.found = type(it.found)(names=("gan",), pipeline=it.found.pipeline, checker=checker)
    pictures = [Image.new("L", (8, 8), value) for value in (20, 200)]
    pictures.append(Image.new("RGB", (30, 10), (10, 10, 10)))
    picture, lines = it.judge(pictures, None)
    assert [line.split(" ")[1] for line in lines.splitlines()] == ["released", "blocked", "released"]
    assert re.findall(r'class="tile( blocked)?"', picture) == ["", " blocked", ""]
    with pytest.raises(ValueError, match="0 are given"):
        it.judge([], None)
    with pytest.raises(ValueError, match="judges a generator's latents"):
        desk("gan", "filter").judge(pictures, None)
    with pytest.raises(ValueError, match="no filter yet"):
        desk("gan").judge(pictures, None)


def test_a_page_shows_marks_and_what_is_blocked(marked):
    it, marks = marked
    fitted = it.fit(it.asked(unmarked=600), marks, rest_is_clean=True)
    marks.click(marks.of("clean", rest_is_clean=True)[0], "clean")
    html = it.page(marks, 1, fitted)
    found = re.findall(r'<button type="button" class="tile([^"]*)" data-number="(\d+)"', html)
    assert [int(number) for _, number in found] == [*range(PAGE, 2 * PAGE)]
    for words, number in found:
        mark, blocked = marks.kinds.get(int(number)), fitted.blocked[int(number)]
        assert words.split() == [word for word in (mark, "blocked" if blocked else None) if word]
    assert "blocked" not in it.page(marks, 1)
    assert it.page(Marks(), 0) == ""
