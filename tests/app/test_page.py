"""The page in a browser, as its user sees it; and the template of a Space."""

import re
import runpy
import signal
import socket
import subprocess
import sys
import time
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from packaging.requirements import Requirement
from PIL import Image

from hf_unlearn import DCGANDiscriminator, DCGANGenerator, FilteredPipeline, GANPipeline
from hf_unlearn.app.desk import Desk
from hf_unlearn.app.launch import OLDEST
from hf_unlearn.app.opened import opened
from hf_unlearn.examples.loopback_hub import LoopbackHub
from hf_unlearn.jobs.recipe.app import AppJob


ROOT = Path(__file__).parents[2]
CHROMIUM = "/usr/bin/chromium"
QUIET = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PATIENCE = 600_000  # ms, on a busy machine


def has_gradio():
    try:
        return int(version("gradio").split(".")[0]) >= OLDEST
    except PackageNotFoundError:
        return False


needs_gradio = pytest.mark.skipif(
    not has_gradio(), reason=f"needs gradio {OLDEST} or newer: pip install 'hf_unlearn[app]'"
)


@pytest.fixture
def gan(tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = {"sample_size": 8, "base_channels": 4}
        GANPipeline(DCGANGenerator(latent_dim=4, **shape), DCGANDiscriminator(**shape)).save_pretrained(
            tmp_path / "gan"
        )
    return tmp_path / "gan"


def test_the_space_is_complete():
    folder = ROOT / "spaces/filter"
    job = runpy.run_path(str(folder / "app.py"), run_name="space")["JOB"]
    assert job.output_dir is None
    metadata = yaml.safe_load((folder / "README.md").read_text().split("---")[1])
    assert (metadata["sdk"], metadata["app_file"]) == ("gradio", "app.py")
    assert int(metadata["sdk_version"].split(".")[0]) >= OLDEST
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (needed,) = project["optional-dependencies"]["app"]
    assert [int(n) for n in metadata["sdk_version"].split(".")] >= [
        int(n) for n in needed.partition(">=")[2].split(".")
    ]
    comment, *lines = (folder / "requirements.txt").read_text().splitlines()
    assert lines == [f"{project['name']}[app]"]
    instead = Requirement(comment.partition(": ")[2])
    assert (instead.name, instead.extras, instead.url[:12]) == (project["name"], {"app"}, "git+https://")
    assert len(metadata["short_description"]) <= 60


@pytest.mark.slow
@needs_gradio
@pytest.mark.parametrize(("output_dir", "host"), [("app", None), ("app", "0.0.0.0"), (None, None)])
def test_the_page_is_built(output_dir, host, gan):
    from hf_unlearn.app.page import page

    job = AppJob(open=[str(gan)], output_dir=output_dir, host=host)
    demo = page(Desk(job, opened(job)))
    buttons = [block.value for block in demo.blocks.values() if type(block).__name__ == "Button"]
    assert {"Draw", "Draw samples", "Fit the filter", "Judge"} <= set(buttons)
    assert ("Save" in buttons) == (output_dir is not None)
    assert ("Publish" in buttons) == (output_dir is not None and host is None)  # it would be with the owner's token


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        yield hub


@pytest.fixture
def address(gan, hub, tmp_path):
    """Of the command, running."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "hf_unlearn.cli", "app", str(gan), "--port", str(port), "--output_dir", "saved"]
    log = tmp_path / "log"
    with open(log, "w") as out:
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            stdout=out,
            stderr=out,
            env=hub.environment(tmp_path / "home") | {"PYTHONPATH": str(ROOT)},
        )
    try:
        end = time.monotonic() + PATIENCE / 1000
        while not (found := re.search(r"the app is at (\S+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.2)
        yield found[1]
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


@pytest.fixture
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if not Path(CHROMIUM).exists():
        pytest.skip(f"needs {CHROMIUM}")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.mark.slow
@needs_gradio
def test_marks_by_click_become_a_filter(address, browser, hub, tmp_path):
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(PATIENCE)
    outside = []
    page.on("request", lambda request: outside.append(request.url) if not _is_here(request.url) else None)
    page.goto(address)
    numbers = page.locator("#undesired textarea, #undesired input").first

    page.click("#fit")  # before there is anything
    page.get_by_text("undesired: 0 samples are marked").first.wait_for()

    for total in (48, 96):
        page.click("#more")
        page.get_by_text(f"0 undesired and {total} clean of {total} samples").wait_for()
    page.click("#back")
    page.get_by_text("Page 1 of 2").wait_for()

    def click(number):
        page.locator(f'button.tile[data-number="{number}"]').click()

    marks = [0, 1, 2, 3, 7, 11, 16, 21]
    for number in [*marks, 4]:  # faster than the page can follow: none is lost
        click(number)
    page.get_by_text(f"{len(marks) + 1} undesired and {96 - len(marks) - 1} clean").wait_for()
    click(4)  # again: away
    page.get_by_text(f"{len(marks)} undesired and {96 - len(marks)} clean").wait_for()
    assert numbers.input_value() == " ".join(map(str, marks))
    numbers.fill("96")
    numbers.press("Enter")
    page.get_by_text("'96' is no sample; there are 0 to 95").first.wait_for()
    numbers.fill("0 1 2 3 7 11 16 21 50")
    numbers.press("Enter")
    page.get_by_text("9 undesired and 87 clean").wait_for()

    page.click("#fit")
    page.locator(".promise").wait_for()
    assert page.locator("#samples .tile.undesired").count() == 8
    promised = page.locator("#promised").inner_text()
    assert "At most 5 % of clean samples are blocked." in promised
    assert "over the draw of 87 clean samples that were not used in fitting" in promised

    page.click("#save")
    page.locator("#saved code").first.wait_for()
    pipe = FilteredPipeline.from_pretrained(tmp_path / "saved/my-filter/pipeline")
    assert "over the draw of 87 clean samples" in pipe.safety_checker.config.concepts[0]["threshold"]["promise"]
    page.click("#save")
    page.get_by_text("is there already").first.wait_for()

    page.click("#publish")
    page.get_by_text("repo_id='': is no name of a repository").first.wait_for()
    page.fill("#repo-id input, #repo-id textarea", "no-high")
    page.click("#publish")
    page.locator("#published code").first.wait_for()
    assert "in me/no-high (private)" in page.locator("#published").inner_text()
    assert "pipeline/model_index.json" in hub.files("me/no-high")

    page.get_by_role("tab", name="Before and after").click()
    page.click("#draw")
    page.locator("#after .tile").first.wait_for()
    page.get_by_text(re.compile(r"\d+ of 24 samples are blocked")).wait_for()
    assert outside == []
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.mark.slow
@needs_gradio
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(scheme, address, browser, tmp_path):
    page = browser.new_context(viewport={"width": 390, "height": 844}, color_scheme=scheme).new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    page.click("#more")
    page.locator("#samples .tile").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.screenshot(path=tmp_path / "phone.png")
    bright = np.asarray(Image.open(tmp_path / "phone.png").convert("L")).mean()
    assert (bright > 128) == (scheme == "light")


def _is_here(url):
    return re.match(r"(http|ws)://(127\.0\.0\.1|localhost)[:/]|data:|blob:", url) is not None
