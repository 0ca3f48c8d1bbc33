"""The pages: their links lead somewhere, what they show runs, and the site is built without the network."""

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from building import build

import hf_unlearn


ROOT = Path(__file__).parents[1]
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "notebooks/README.md")]
PAGES = sorted([*TOP, *ROOT.glob("docs/**/*.md")])
NOTEBOOKS = sorted(ROOT.glob("notebooks/*.ipynb"))


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def prose(path):
    """Without blocks of code."""
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(path):
    """Of a page's headings, as the sites that show Markdown make them."""
    found, counts = set(), {}
    for heading in re.findall(r"^#{1,6} +(.+?)\s*$", prose(path), flags=re.MULTILINE):
        shown = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        count = counts[slug] = counts.get(slug, -1) + 1
        found.add(f"{slug}-{count}" if count else slug)
    return found


class TestLinks:
    @pytest.mark.parametrize("page", PAGES, ids=name_of)
    def test_lead_to_files_and_headings(self, page):
        wrong = []
        for target in re.findall(r"\]\(<?([^)>\s]+)>?\)", prose(page)):
            if re.match(r"[a-z]+:", target):
                continue
            file, _, anchor = target.partition("#")
            there = (page.parent / file).resolve() if file else page
            if not there.exists() or (anchor and anchor not in anchors(there)):
                wrong.append(target)
        assert wrong == []

    def test_every_page_is_reached_from_the_readme(self):
        reached, new = set(), [ROOT / "README.md"]
        while new:
            page = new.pop()
            reached.add(page)
            files = re.findall(r"\]\(<?([^)>\s#]+\.md)", prose(page))
            found = {(page.parent / file).resolve() for file in files if not re.match(r"[a-z]+:", file)}
            new += found - reached - set(new)
        assert set(PAGES) - reached == set()


class TestCode:
    @pytest.mark.parametrize("page", PAGES, ids=name_of)
    def test_compiles_and_names_what_exists(self, page):
        wrong = []
        for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE):
            for node in ast.walk(ast.parse(code)):
                if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("hf_unlearn"):
                    if page.name == "CONTRIBUTING.md" and node.module.endswith("second_best"):
                        continue
                    module = importlib.import_module(node.module)
                    wrong += [f"{node.module}.{name.name}" for name in node.names if not hasattr(module, name.name)]
        assert wrong == []

    def test_no_block_of_python_is_overlooked(self):
        for page in PAGES:
            blocks = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)
            assert len(blocks) == page.read_text().count("```python"), page


class TestNotebooks:
    @pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name_of)
    def test_is_small_without_outputs_and_links_lead_somewhere(self, notebook):
        assert notebook.stat().st_size < 20_000
        cells = json.loads(notebook.read_text())["cells"]
        assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
        told = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
        links = [link for link in re.findall(r"\]\(([^)#]+)", told) if not re.match(r"[a-z]+:", link)]
        assert [link for link in links if not (notebook.parent / link).exists()] == []
        assert notebook.name in (ROOT / "notebooks" / "README.md").read_text()

    @pytest.mark.slow
    @pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name_of)
    def test_runs_and_shows_a_picture_or_a_table(self, notebook, tmp_path):
        nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
        pytest.importorskip("ipykernel")
        read = nbformat.read(notebook, 4)
        nbclient.NotebookClient(read, timeout=1800, resources={"metadata": {"path": str(tmp_path)}}).execute()
        shown = [output.data for cell in read.cells for output in cell.get("outputs", []) if "data" in output]
        assert sum("image/png" in data or "text/html" in data for data in shown) >= 2
        assert list(tmp_path.iterdir()) == []


BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "bring_your_own.md").read_text(), flags=re.DOTALL)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory, tokenizer):
    """A folder with what the blocks of docs/bring_your_own.md name: small models with random weights, and small files."""
    import numpy as np
    from PIL import Image
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        LlamaConfig,
        LlamaForCausalLM,
        ResNetConfig,
        ResNetForImageClassification,
        ViTImageProcessorPil,
    )

    from hf_unlearn import DCGANDiscriminator, DCGANGenerator, GANPipeline

    folder = tmp_path_factory.mktemp("workplace")
    random = np.random.default_rng(0)
    for place, number in (("photos", 8), ("photos_never_seen", 60)):
        for animal, darkest in (("cat", 240), ("dog", 0)):  # cats are unlike anything that random weights draw
            (folder / place / animal).mkdir(parents=True)
            for one in range(number):
                pixels = random.integers(darkest, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / place / animal / f"{one}.png")
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "embedding_size": 8, "layer_type": "basic"}
    resnet = build(ResNetForImageClassification, ResNetConfig(**sizes, id2label={0: "cat", 1: "dog"}))
    resnet.save_pretrained(folder / "my-image-classifier")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "my-image-classifier")
    text = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    text |= {"num_hidden_layers": 1, "max_position_embeddings": 128, "pad_token_id": tokenizer.pad_token_id}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    build(BertForSequenceClassification, BertConfig(**text, num_labels=3)).save_pretrained(
        folder / "my-text-classifier"
    )
    build(LlamaForCausalLM, LlamaConfig(**text, **ends)).save_pretrained(folder / "my-chat-model")
    for model in ("my-text-classifier", "my-chat-model"):
        tokenizer.save_pretrained(folder / model)
    rows = [f"This is review {row} of a thing.,{row % 3}" for row in range(9)]
    (folder / "reviews.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    turns = [("user", "Where does Ann live?"), ("assistant", "Ann lives in Rome.")]
    chat = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (folder / "chats.jsonl").write_text(f"{json.dumps(chat)}\n" * 4)
    small = {"sample_size": 8, "base_channels": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        gan = GANPipeline(DCGANGenerator(latent_dim=4, **small), DCGANDiscriminator(**small))
    gan.save_pretrained(folder / "my-gan")
    return folder


@pytest.fixture
def at_work(workplace, tiny_ddpm, tiny_stable_diffusion, monkeypatch):
    if not (workplace / "my-ddpm").exists():
        unet = {**tiny_ddpm.unet.config, "in_channels": 3, "out_channels": 3}
        type(tiny_ddpm)(build(type(tiny_ddpm.unet).from_config, unet), tiny_ddpm.scheduler).save_pretrained(
            workplace / "my-ddpm"
        )
        tiny_stable_diffusion.save_pretrained(workplace / "my-stable-diffusion")
    monkeypatch.chdir(workplace)


class TestBringYourOwn:
    @pytest.mark.parametrize("number", range(len(BLOCKS)))
    def test_runs(self, number, at_work):
        names = {}
        exec(compile(BLOCKS[number], f"bring_your_own.md, block {number}", "exec"), names)
        if (trainer := names.get("trainer")) is None:
            return
        language = hasattr(trainer.args, "completion_only_loss")
        shorter = {"max_steps": 1, "own_samples": 8 if language else 64, "num_inference_steps": 2, "adapt_steps": 1}
        for name, value in (shorter | {"adapted_models": 1, "fisher_samples": 8, "observation": "in_run"}).items():
            if hasattr(trainer.args, name):
                setattr(trainer.args, name, value)
        trainer.train()
        if language:  # random weights know nothing, which the guard sees before the first step
            assert all(any(token >= 0 for token in row["labels"]) for row in trainer.forget_dataset)
        else:
            assert trainer.state.global_step > 0


class TestQuickstart:
    @pytest.mark.slow
    def test_what_needs_a_classifier_only_runs_in_its_order(self, tmp_path, monkeypatch):
        """What begins with a generator or a language model is in the notebooks, with smaller settings."""
        monkeypatch.chdir(tmp_path)
        names, run = {}, []
        for section in re.split(r"^## ", (ROOT / "docs" / "quickstart.md").read_text(), flags=re.MULTILINE):
            heading = section.partition("\n")[0]
            if heading in ("Forget a class", "Find what taught it", "Verify that it forgot"):
                (code,) = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
                exec(compile(code, f"quickstart.md, {heading}", "exec"), names)
                run.append(heading)
        assert len(run) == 3
        assert (tmp_path / "digits-without-3" / "README.md").is_file()
        assert (tmp_path / "digits-audit" / "audit.html").is_file()
        assert names["report"].verdict


class TestSite:
    def test_reference_has_every_public_name(self):
        told = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), flags=re.MULTILINE)
        public = {f"hf_unlearn.{module}.{name}" for name, module in hf_unlearn._EXPORTS.items()}
        assert set(told) - {"hf_unlearn.audit.run.audit"} == public
        assert len(told) == len(set(told))

    def test_every_page_is_in_the_navigation(self):
        named = set(re.findall(r"^ +- .*: (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE))
        pages = {page.relative_to(ROOT / "docs").as_posix() for page in ROOT.glob("docs/**/*.md")}
        assert named == pages | {"index.md", "contributing.md", "changelog.md", "notebooks.md"}

    def test_links_of_the_repository_become_those_of_the_site(self, monkeypatch):
        monkeypatch.syspath_prepend(ROOT / "docs" / "builder")
        from prepare import prepared

        text = "[`a`](docs/faq.md#x) ![b](docs/pictures/demo.png) [c](benchmarks) `[d](docs/faq.md)` [e](https://a.b/c) [f](#g)"
        there = "[`a`](faq.md#x) ![b](pictures/demo.png) {} `[d](docs/faq.md)` [e](https://a.b/c) [f](#g)"
        assert prepared(text, "README.md") == there.format("c")
        address = "https://example.org/me/it"
        assert prepared(text, "README.md", address) == there.format(f"[c]({address}/blob/main/benchmarks)")
        below = prepared("[a](../../README.md) [b](vdu.md) [c](../../CONTRIBUTING.md#add)", "docs/methods/pbu.md")
        assert below == "[a](../index.md) [b](vdu.md) [c](../contributing.md#add)"

    @pytest.mark.slow
    def test_is_built_without_warnings_and_fetches_nothing(self, tmp_path):
        for library in ("zensical", "mkdocstrings", "latex2mathml"):
            pytest.importorskip(library)
        shutil.copy(ROOT / "mkdocs.yml", tmp_path)
        for name in ("hf_unlearn", "docs"):
            (tmp_path / name).symlink_to(ROOT / name)
        python = [sys.executable, str(ROOT / "docs" / "builder" / "prepare.py"), "build/docs"]
        subprocess.run(python, cwd=tmp_path, check=True)
        paths = [str(ROOT / "docs" / "builder"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        done = subprocess.run(
            [sys.executable, "-m", "zensical", "build", "--strict", "-f", "mkdocs.yml"],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        pages = {
            path.relative_to(tmp_path / "site").as_posix(): path.read_text()
            for path in tmp_path.glob("site/**/*.html")
        }
        assert len(pages) >= len(PAGES)
        for name, page in pages.items():
            fetched = re.findall(r"<(?:script|img|iframe|link)\b[^>]*?\b(?:src|href)=\"([^\"]+)", page)
            assert [url for url in fetched if re.match(r"(https?:)?//", url)] == [], name
            assert "arithmatex" not in page, name  # no formula is left as it was
            ids = {found for kinds in re.findall(r'\bid="?([^"\s>]+)|\bname="([^"]+)', page) for found in kinds}
            for href in re.findall(r'<a\b[^>]*?\bhref="([^"]+)"', page):
                if re.match(r"[a-z]+:|//", href) or name == "404.html":
                    continue
                file, _, anchor = href.partition("#")
                there = os.path.normpath(os.path.join(os.path.dirname(name), file)) if file else name
                there = "index.html" if there == "." else there
                assert there in pages or (tmp_path / "site" / there).exists(), (name, href)
                if anchor and not file:
                    assert anchor in ids or anchor.startswith("__"), (name, href)
        assert pages["methods/pbu.html"].count("<math") >= 1
        reference = pages["api.html"]
        assert "Args:" not in reference  # every section of a docstring was understood
        assert re.findall(r"&gt; [A-Z]\w+", reference) == []
        missing = [
            name for name, module in hf_unlearn._EXPORTS.items() if f'id="hf_unlearn.{module}.{name}"' not in reference
        ]
        assert missing == []
