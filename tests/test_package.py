"""The package as others get it: light to import, complete in a wheel, true to its own documentation."""

import ast
import importlib
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

import hf_unlearn


ROOT = Path(__file__).parents[1]


def run(*command, **kwargs):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True, **kwargs).stdout


class TestImport:
    def test_is_light(self):
        heavy = ("torch", "transformers", "numpy", "diffusers", "datasets", "matplotlib")
        code = f"import sys, hf_unlearn, hf_unlearn.cli; print([name for name in {heavy!r} if name in sys.modules])"
        assert run(sys.executable, "-c", code).strip() == "[]"

    def test_every_public_name_is_there(self):
        for name in hf_unlearn.__all__:
            assert getattr(hf_unlearn, name) is not None
            assert name in dir(hf_unlearn)

    def test_an_unknown_name_is_an_attribute_error(self):
        with pytest.raises(AttributeError, match="no attribute 'Unlearner'"):
            hf_unlearn.Unlearner  # noqa: B018


class TestWheel:
    @pytest.fixture(scope="class")
    def python(self, tmp_path_factory):
        """Python of a fresh environment with the built wheel; its dependencies are those of this environment."""
        folder = tmp_path_factory.mktemp("wheel")
        source = folder / "source"
        shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "demo", "outputs", "build", "*.egg-info"))
        build = ("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, source)
        run(sys.executable, "-m", "pip", *build)
        venv.create(folder / "venv", with_pip=True)
        python = folder / "venv" / "bin" / "python"
        (wheel,) = folder.glob("*.whl")
        run(python, "-m", "pip", "install", "--no-deps", "--no-index", wheel)
        site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        Path(site, "zz_dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        return python

    def test_works_away_from_the_checkout(self, python, tmp_path):
        code = (
            "import hf_unlearn, importlib.resources as r;"
            "from hf_unlearn import PBUConfig, PBUTrainer;"
            "from hf_unlearn.hub.card import TEMPLATE;"
            "print(hf_unlearn.__file__); print(TEMPLATE.exists(), (r.files('hf_unlearn') / 'py.typed').is_file());"
            "print(PBUConfig('out').learning_rate)"
        )
        file, shipped, _ = run(python, "-c", code, cwd=tmp_path).splitlines()[-3:]
        assert Path(file).is_relative_to(Path(python).parents[1])
        assert shipped == "True True"

    def test_has_the_command(self, python, tmp_path):
        command = Path(python).with_name("hf-unlearn")
        assert run(command, "--version", cwd=tmp_path).strip() == f"hf-unlearn {hf_unlearn.__version__}"
        listing = run(command, "--help", cwd=tmp_path)
        assert "unlearn" in listing
        assert "demo" in listing

    def test_leaves_tests_and_benchmarks_at_home(self, python, tmp_path):
        code = "import hf_unlearn, pathlib; print(sorted(p.name for p in pathlib.Path(hf_unlearn.__file__).parents[1].iterdir()))"
        names = run(python, "-c", code, cwd=tmp_path)
        assert "'tests'" not in names
        assert "'benchmarks'" not in names


class TestDocuments:
    def test_the_readme_examples_compile_and_name_what_exists(self):
        examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
        imports = [node for text in examples for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
        ours = [
            (node.module, name.name) for node in imports for name in node.names if node.module.startswith("hf_unlearn")
        ]
        assert len(examples) == (ROOT / "README.md").read_text().count("```python")
        assert ours
        assert [(module, name) for module, name in ours if not hasattr(importlib.import_module(module), name)] == []

    @pytest.mark.parametrize("document", ["README.md", *(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))])
    def test_links_lead_somewhere(self, document):
        text = (ROOT / document).read_text()
        targets = [t for t in re.findall(r"\]\(<?([^)>#]+)", text) if not t.startswith(("http://", "https://"))]
        missing = [target for target in targets if not (ROOT / document).parent.joinpath(target).exists()]
        assert missing == []

    def test_the_benchmark_page_is_what_the_results_say(self, monkeypatch):
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        import report

        assert (ROOT / "docs" / "benchmarks.md").read_text() == report.render(), "run python benchmarks/report.py"

    def test_every_requirement_is_pinned(self):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        pins = set(re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
        pins = {name.lower().replace("_", "-") for name in pins}
        wanted = project["dependencies"] + sum(project["optional-dependencies"].values(), [])
        names = {re.match(r"[\w-]+", requirement).group().lower().replace("_", "-") for requirement in wanted}
        assert names <= pins
