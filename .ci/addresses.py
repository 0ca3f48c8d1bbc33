"""`python .ci/addresses.py https://github.com/OWNER/hf_unlearn FOLDER`: writes the project's address into a copy of it.

PyPI shows pictures and follows links only by whole addresses, and lists those of `[project.urls]`. In the project itself they are
relative, so that they lead to the files beside them in every fork and checkout.
"""

import re
import sys
from pathlib import Path


PICTURES = (".png", ".jpg", ".gif", ".svg")


def whole(text: str, address: str) -> str:
    """A Markdown page whose relative links lead to files below `address`."""

    def link(found: re.Match) -> str:
        target = found[1]
        if re.match(r"[a-z]+:|#", target):
            return found[0]
        kind = "raw" if target.endswith(PICTURES) else "blob"
        return f"]({address}/{kind}/main/{target})"

    return re.sub(r"\]\(([^)\s]+)\)", link, text)


def urls(address: str) -> str:
    """A table of `pyproject.toml`."""
    places = {"Repository": "", "Issues": "/issues"}
    places |= {
        name: f"/blob/main/{file}"
        for name, file in {"Changelog": "CHANGELOG.md", "Benchmarks": "docs/benchmarks.md"}.items()
    }
    return "\n[project.urls]\n" + "".join(f'{name} = "{address}{place}"\n' for name, place in places.items())


def main(address: str, folder: str) -> None:
    readme, project = Path(folder, "README.md"), Path(folder, "pyproject.toml")
    if "[project.urls]" in project.read_text():
        sys.exit(f"{project}: has [project.urls]; give a fresh copy")
    readme.write_text(whole(readme.read_text(), address.rstrip("/")))
    project.write_text(project.read_text() + urls(address.rstrip("/")))


if __name__ == "__main__":
    main(*sys.argv[1:])
