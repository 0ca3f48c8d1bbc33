"""`python docs/builder/prepare.py FOLDER [REPOSITORY]`: the pages as the site has them.

In the repository pages lie at its top and in docs/, and their links lead to files. Here all lie in one folder, and a link to what is no page (sources,
recipes, notebooks) leads to the repository's address, or is plain text where there is none.
"""

import posixpath
import re
import shutil
import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]
TOP = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "notebooks/README.md": "notebooks.md",
}
# Blocks of code, links, and code in a line: whichever begins first.
PARTS = re.compile(
    r"^```.*?^```|(?P<mark>!?)\[(?P<text>[^\]]*)\]\(<?(?P<target>[^)>\s]+)>?\)|`[^`\n]+`",
    flags=re.DOTALL | re.MULTILINE,
)


def place(source: str) -> str | None:
    """Of a file of the repository on the site, relative to its root; None where it has none."""
    if source in TOP:
        return TOP[source]
    is_page = (
        source.startswith("docs/") and source.endswith((".md", ".png")) and not source.startswith("docs/builder/")
    )
    return source.removeprefix("docs/") if is_page else None


def prepared(text: str, source: str, repository: str = "") -> str:
    """A page with its links as the site has them."""
    here = posixpath.dirname(place(source))

    def link(found: re.Match) -> str:
        target = found["target"]
        if target is None or re.match(r"[a-z]+:|#", target):
            return found[0]
        path, _, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        page = place(path)
        if page is None:
            return f"[{found['text']}]({repository}/blob/main/{path})" if repository else found["text"]
        return f"{found['mark']}[{found['text']}]({posixpath.relpath(page, here or '.')}{anchor and '#'}{anchor})"

    return PARTS.sub(link, text)


def main(folder: str, repository: str = "") -> None:
    shutil.rmtree(folder, ignore_errors=True)
    sources = [*TOP, *(path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob("docs/**/*.*")))]
    for source in sources:
        if (name := place(source)) is None:
            continue
        page = Path(folder, name)
        page.parent.mkdir(parents=True, exist_ok=True)
        if page.suffix == ".md":
            page.write_text(
                prepared((ROOT / source).read_text(encoding="utf-8"), source, repository), encoding="utf-8"
            )
        else:
            shutil.copy(ROOT / source, page)
    shutil.copy(ROOT / "docs/builder/extra.css", folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
