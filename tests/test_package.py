"""The package as others get it: light to import, complete in a wheel, true to its own documentation."""

import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from transformers import Trainer

import hf_unlearn
from hf_unlearn.cli import ESTIMATED, VERBS, _named
from hf_unlearn.jobs.recipe.methods import (
    APP,
    AUDIT,
    DEMO,
    FILTER,
    INFLUENCE,
    PUBLISH,
    UNLEARN,
    VERIFY,
    chosen,
    of_any_verb,
    read,
)
from hf_unlearn.jobs.recipe.reading import options


ROOT = Path(__file__).parents[1]


def run(*command, **kwargs):
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True, **kwargs).stdout


class TestImport:
    def test_is_light_and_so_is_the_list_of_verbs(self):
        heavy = ("torch", "transformers", "numpy", "diffusers", "datasets", "matplotlib")
        code = (
            "import sys, hf_unlearn; from hf_unlearn.cli import main; code = main(['--help']);"
            f"print([name for name in {heavy!r} if name in sys.modules]); sys.exit(code)"
        )
        *listing, loaded = run(sys.executable, "-c", code).splitlines()
        assert loaded == "[]"
        assert all(any(line.startswith(f"  {verb} ") for line in listing) for verb in VERBS)

    def test_every_public_name_is_there_and_no_other(self):
        for name in hf_unlearn.__all__:
            assert getattr(hf_unlearn, name) is not None
            assert name in dir(hf_unlearn)
        with pytest.raises(AttributeError, match="no attribute 'Unlearner'"):
            hf_unlearn.Unlearner  # noqa: B018


class TestWheel:
    @pytest.fixture(scope="class")
    def wheel(self, tmp_path_factory):
        """`(wheel, folder that it is installed to)`; its dependencies are those of this environment."""
        folder = tmp_path_factory.mktemp("wheel")
        source = folder / "source"
        made = {"demo", "outputs", "build", "dist", "site"}

        def ignored(folder, names):
            return [name for name in names if name.endswith(".egg-info") or name.startswith(".")] + [
                name for name in names if Path(folder) == ROOT and name in made
            ]

        shutil.copytree(ROOT, source, ignore=ignored)
        run(sys.executable, ROOT / ".ci" / "addresses.py", "https://example.org/me/hf_unlearn/", source)
        build = ("wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, source)
        run(sys.executable, "-m", "pip", *build)
        (wheel,) = folder.glob("*.whl")
        install = ("install", "--no-deps", "--no-index", "--target", folder / "site", wheel)
        run(sys.executable, "-m", "pip", *install)
        return wheel, folder / "site"

    def test_holds_the_package_and_nothing_else(self, wheel):
        names = {name for name in zipfile.ZipFile(wheel[0]).namelist() if ".dist-info/" not in name}
        here = (path for path in (ROOT / "hf_unlearn").rglob("*") if path.is_file() and path.suffix != ".pyc")
        assert names == {path.relative_to(ROOT).as_posix() for path in here}
        assert {"hf_unlearn/py.typed", "hf_unlearn/examples/opinions.json"} <= names
        assert any(name.endswith(".md.jinja") for name in names)

    def test_pypi_shows_pictures_and_addresses(self, wheel):
        with zipfile.ZipFile(wheel[0]) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
            text = archive.read(name).decode()
        here = "https://example.org/me/hf_unlearn"
        assert {line for line in text.splitlines() if line.startswith("Project-URL:")} == {
            f"Project-URL: Repository, {here}",
            f"Project-URL: Issues, {here}/issues",
            f"Project-URL: Changelog, {here}/blob/main/CHANGELOG.md",
            f"Project-URL: Benchmarks, {here}/blob/main/docs/benchmarks.md",
        }
        links = re.findall(r"\]\(([^)]+)\)", text)
        assert links
        assert [link for link in links if not link.startswith(("https://", "#"))] == []
        kinds = {"blob": 0, "raw": 0}
        for kind, file in (link.removeprefix(f"{here}/").split("/main/") for link in links if link.startswith(here)):
            assert (ROOT / file.partition("#")[0]).exists()
            assert (kind == "raw") == file.endswith(".png")
            kinds[kind] += 1
        assert all(kinds.values())

    def test_works_away_from_the_checkout_and_has_the_command(self, wheel, tmp_path):
        site = wheel[1]
        away = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(site)}}
        file = run(sys.executable, "-c", "import hf_unlearn.cli; print(hf_unlearn.__file__)", **away).strip()
        assert Path(file).is_relative_to(site)
        version = run(sys.executable, site / "bin" / "hf-unlearn", "--version", **away)
        assert version.strip() == f"hf-unlearn {hf_unlearn.__version__}"
        assert "pbu_digits (unlearn)" in run(sys.executable, site / "bin" / "hf-unlearn", "list", **away)


class TestExtension:
    """`hf unlearn`: installed from a repository called hf-unlearn, whose files are those of the checkout, without a network."""

    CODE = """
import sys
from pathlib import Path
import httpx2
import huggingface_hub

root = Path(sys.argv.pop(1))

def answer(request):
    path = root / request.url.path.removeprefix("/me/hf-unlearn").removeprefix("/HEAD").lstrip("/")
    if request.url.path == "/me/hf-unlearn":
        return httpx2.Response(200, text="", request=request)
    if request.url.host != "raw.githubusercontent.com" or not path.is_file():
        return httpx2.Response(404, request=request)
    return httpx2.Response(200, content=path.read_bytes(), request=request)

huggingface_hub.set_client_factory(lambda: httpx2.Client(transport=httpx2.MockTransport(answer)))
from huggingface_hub.cli.hf import main
main()
"""

    def test_runs_the_package_that_is_there(self, tmp_path):
        environment = os.environ | {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
        environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "0"}
        away = {"cwd": tmp_path, "env": environment}
        run(sys.executable, "-c", self.CODE, ROOT, "extensions", "install", "me/hf-unlearn", **away)
        assert (tmp_path / ".local/share/hf/extensions/hf-unlearn/hf-unlearn").is_file()
        done = run(sys.executable, "-c", self.CODE, ROOT, "unlearn", "--version", **away)
        assert done.strip().startswith("hf-unlearn ")


class TestDocuments:
    def test_every_command_can_be_read(self):
        """In the README, the pages and the heads of the recipes; without running them."""
        files = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *(ROOT / "hf_unlearn" / "recipes").rglob("*.yaml")]
        begins = r"^(?:# +|    )?(?:hf-unlearn|accelerate launch .* -m hf_unlearn\.cli) +([^|`\n]*)$"
        texts = {file: re.sub(r" \\\n#? +", " ", file.read_text()) for file in files}
        found = [line for text in texts.values() for line in re.findall(begins, text, flags=re.MULTILINE)]
        assert len(found) > 25
        for file in (ROOT / "hf_unlearn" / "recipes" / "accelerate").iterdir():  # each is started by its own
            assert re.search(
                rf"(?m)^# +accelerate launch --config_file recipes/accelerate/{file.name} .*-m hf_unlearn\.cli ",
                texts[file],
            )
        for line in found:
            verb, *words = shlex.split(line.replace(" …", ""), comments=True)
            if verb in ("list", "estimate") and not words:
                continue
            if verb == "app":
                APP.job_of(read(APP, options(words, named="open"), help=""))
                continue
            if verb == "estimate":
                verb, _, methods = of_any_verb(options(words), ESTIMATED)
                words = ["fit", *words] if verb == "filter fit" else words
                verb = verb.removesuffix(" fit")
            methods = {
                "unlearn": UNLEARN,
                "influence": INFLUENCE,
                "filter": FILTER,
                "demo": {"demo": DEMO},
                "audit": {"audit": AUDIT},
                "publish": {"publish": PUBLISH},
                "verify": {"verify": VERIFY},
            }[verb]
            name = words.pop(0) if verb == "filter" else None
            if verb in ("publish", "verify"):
                words = _named(words, *{"publish": ("folder", "repo_id"), "verify": ("source",)}[verb])
            words = [word for word in words if word not in ("--json", "--dry_run")]
            given = options(words)
            name = verb if verb in ("demo", "audit", "publish", "verify") else name or chosen(given, methods)
            others = list(methods.values()) if verb == "filter" else []
            values = read(methods[name], given, others, help="")
            if verb != "publish":  # which looks for the folder
                methods[name].job_of(values)

    def test_equations_are_where_the_pages_of_the_methods_say(self):
        wrong = []
        for page in [*(ROOT / "docs" / "methods").glob("*.md"), ROOT / "docs" / "papers.md"]:
            for file, name in re.findall(r"`([a-z_/]+\.py)(?:: ?(\w+))?[\w.]*`", page.read_text()):
                path = ROOT / "hf_unlearn" / file
                if not path.is_file() or (name and not re.search(rf"(def|class) {name}\b", path.read_text())):
                    wrong.append(f"{page.name}: {file} {name}")
        assert wrong == []

    @pytest.mark.parametrize("name", sorted(set(hf_unlearn.__all__) - {"__version__"}))
    def test_public_names_say_what_they_take(self, name):
        public = getattr(hf_unlearn, name)
        is_function = inspect.isfunction(public)
        assert public.__doc__ if is_function else vars(public).get("__doc__"), name
        for member, found in ({name: public} if is_function else vars(public)).items():
            function = getattr(found, "__func__", getattr(found, "fget", found))
            bases = () if is_function else public.__mro__[1:]
            inherited = hasattr(Trainer, member) or any(member in vars(base) for base in bases)
            if member.startswith("_") or not inspect.isfunction(function) or inherited:
                continue
            given = set(inspect.signature(function).parameters) - {
                "self",
                "cls",
                "args",
                "kwargs",
                "output_dir",
                "overrides",
            }
            missing = {argument for argument in given if not re.search(rf"\b{argument}\b", function.__doc__ or "")}
            assert function.__doc__, f"{name}.{member}"
            assert missing == set(), f"{name}.{member}"

    def test_every_paper_is_named_in_the_index(self):
        index = (ROOT / "docs" / "papers.md").read_text()
        files = [*ROOT.glob("hf_unlearn/**/*.py"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.py")]
        written = r"(?:arXiv[: ]\s*|arxiv\.org/abs/)(\d{4}\.\d{4,5})"
        cited = {paper for file in files for paper in re.findall(written, file.read_text())}
        assert len(cited) > 30
        assert cited - set(re.findall(written, index)) == set()

    def test_pages_are_what_the_results_say(self, monkeypatch):
        monkeypatch.syspath_prepend(ROOT / "benchmarks")
        import report

        assert {page: page.read_text() for page in report.pages()} == report.pages(), "run python benchmarks/report.py"

    def test_one_version_everywhere(self):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), flags=re.MULTILINE)[1]
        cited = re.search(r"^version: (\S+)", (ROOT / "CITATION.cff").read_text(), flags=re.MULTILINE)[1]
        assert {project["version"], newest, cited} == {hf_unlearn.__version__}

    def test_every_dependency_earns_its_place(self):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        wanted = {re.match(r"[\w-]+", requirement).group() for requirement in project["dependencies"]}
        rows = re.findall(r"^\| (`.*?) \| \S.*\|$", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)
        assert {name for row in rows for name in re.findall(r"`([\w-]+)`", row)} >= wanted

    def test_the_lowest_versions_that_are_tested_are_those_that_are_promised(self):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        floors = dict(re.match(r"([\w-]+)>=(\S+)", requirement).groups() for requirement in project["dependencies"])
        lowest = dict(
            re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints-lowest.txt").read_text(), flags=re.MULTILINE)
        )
        eight = {"transformers", "diffusers", "trl", "peft", "accelerate", "datasets", "evaluate", "huggingface_hub"}
        assert set(lowest) - eight <= {"fsspec"}  # what those ask of others
        whole = {name: ".".join((floors[name].split(".") + ["0", "0"])[:3]) for name in eight}
        assert {
            name: ".".join((version.split(".") + ["0", "0"])[:3]) for name, version in lowest.items() if name in eight
        } == whole

    def test_every_requirement_is_pinned(self):
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        pins = set(re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
        pins = {name.lower().replace("_", "-") for name in pins}
        wanted = project["dependencies"] + sum(project["optional-dependencies"].values(), [])
        names = {re.match(r"[\w-]+", requirement).group().lower().replace("_", "-") for requirement in wanted}
        assert names <= pins
