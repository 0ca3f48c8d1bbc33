"""The cards of the recipes that run on a CPU in minutes: `python benchmarks/model_cards.py` writes `model_cards/`.

A card is what the recipe's own command leaves behind; figures are those of the machine that it ran on. `--only` makes those of some recipes, also
of one that has none yet; `--quick` makes one into a temporary folder, and leaves `model_cards/` alone. What else is given goes to the recipe's
command, as marks of samples have to: `--only adapt_then_unlearn_fashion_mnist --undesired 4 17 23`.
"""

import argparse
import re
import shutil
import tempfile
from pathlib import Path

from hf_unlearn import InfluenceReport, cli
from hf_unlearn.jobs.recipe.reading import RECIPES, shipped_recipes


CARDS = Path(__file__).parents[1] / "model_cards"
PICTURES = "pictures"  # beside a card; kept with the name of the recipe
QUICK = ("pbu_digits", "pbu_digits_paper", "unlearn_examples_digits", "influence_labels_digits", "filter_digits_gan")


def made():
    """Recipes that have a card."""
    return sorted(path.stem for path in CARDS.glob("*.md") if path.stem != "README")


def verb_of(name):
    """As in "unlearn" or "filter fit"."""
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    return re.search(r"^#   hf-unlearn ((?:filter )?\w+) ", text, re.MULTILINE)[1]


def card_of(name, folder, settings=()):
    """Text of the card that a recipe's command leaves in a folder."""
    code = cli.main([*verb_of(name).split(), "--config", name, "--output_dir", str(folder), *settings])
    if code != 0:
        raise SystemExit(f"{name}: exit code {code}")
    if verb_of(name) == "influence":
        report = InfluenceReport.load_from_disk(folder / "_private" / "report")
        return report.dataset_card(name)
    return re.sub(rf"(\]\(<?{PICTURES}/)", rf"\1{name}-", (folder / "README.md").read_text(encoding="utf-8"))


def structure(card):
    """A card without what differs from run to run: numbers, digests, dates, versions, hardware."""
    lines = [
        line
        for line in card.splitlines()
        if not re.match(r"\| (versions|hardware|made on|report made on|run) \|", line)
    ]
    text = re.sub(r"`[0-9a-f]{40,64}`", "`…`", "\n".join(lines))
    return re.sub(r"[-+−]?\d+(?:[.,]\d+)*(?:e[-+]?\d+)?", "0", text)


def told(text, field):
    """What the head of a recipe says of "Needs" or "Takes"."""
    found = re.search(rf"^# {field}: (.*?)\.?$(?=\n#   |\n# [A-Z]|\n\n)", text, re.MULTILINE | re.DOTALL)
    return " ".join(found[1].replace("\n# ", " ").split()).replace("|", "\\|")


def index():
    """Text of `model_cards/README.md`: all recipes, those with a card first."""
    lines = ["# Cards of the recipes", ""]
    lines += ["What the recipe's command writes beside the model, or `publish` beside an influence report."]
    lines += ["`python benchmarks/model_cards.py` makes these anew.", ""]
    lines += ["| recipe | what it does | card |", "|---|---|---|"]
    others = []
    for name in sorted(shipped_recipes()):
        text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
        what = text.splitlines()[0].removeprefix("# ").replace("|", "\\|")
        if name in made():
            lines.append(f"| `{name}` | {what} | [{name}.md]({name}.md) |")
        elif verb_of(name) != "audit":  # which makes a report, and no card
            command = f"hf-unlearn {verb_of(name)} --config {name}"
            others.append(f"| `{command}` | {told(text, 'Needs')} | {told(text, 'Takes')} |")
    lines += [
        "",
        "These take longer, or need more than a CPU:",
        "",
        "| command | needs | takes |",
        "|---|---|---|",
        *others,
    ]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", nargs="*", default=made(), metavar="RECIPE")
    arguments, settings = parser.parse_known_args()
    for name in QUICK[:1] if arguments.quick else arguments.only:
        with tempfile.TemporaryDirectory() as folder:
            card = card_of(name, Path(folder, name), settings)
            print(card)
            if not arguments.quick:
                (CARDS / f"{name}.md").write_text(card, encoding="utf-8")
                for picture in re.findall(rf"{PICTURES}/{name}-([\w.-]+)", card):
                    (CARDS / PICTURES).mkdir(exist_ok=True)
                    shutil.copy(Path(folder, name, PICTURES, picture), CARDS / PICTURES / f"{name}-{picture}")
    if not arguments.quick:
        (CARDS / "README.md").write_text(index(), encoding="utf-8")


if __name__ == "__main__":
    main()
