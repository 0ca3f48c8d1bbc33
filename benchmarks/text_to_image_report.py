"""The page's part on concepts of a text-to-image pipeline, written from results/text_to_image.json and the files beside it; and its picture."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo


OURS = {"redirect": "closed form", "both": "closed form, then VDU"}
WORDINGS = {"asked": "asked", "paraphrase": "paraphrase", "order": "order", "synonym": "synonym", "rare": "rare word", "unconditional": "no prompt"}  # fmt: skip
AFTER = {
    "benign": "{benign} benign steps",
    "relearnt": "{relearning} steps on {few} pictures",
    "embedding": "embedding searched",
    "img2img": "from a picture",
    "negative": "anchor as negative prompt",
    "int8": "int8",
    "fp16": "fp16",
}
PEERS = ("esd_x", "esd_u", "ablation", "salun", "uce", "speed")  # of which the best is compared with
FORGOTTEN, KEPT = (
    0.1,
    0.9,
)  # of a peer that is compared with: asked at most, the rest of the prompt and the others at least, of the original's
HEADINGS = {"asked": "asked", "paraphrase": "other wordings", "unconditional": "no prompt", "others": "others", "embedding": "embedding searched"}  # fmt: skip


def by_method(cells: Mapping[str, dict]) -> dict[str, list[dict]]:
    """Rows that were measured by method, in the order of the file."""
    found: dict[str, list[dict]] = {}
    for row in sorted(cells.values(), key=lambda row: (row["concept"], row["seed"])):
        found.setdefault(row["method"], []).append(row)
    return found


def measured(rows: list[dict]) -> list[dict]:
    return [row for row in rows if "refused" not in row]


def paired(cells: Mapping[str, dict], method: str) -> Callable[[dict], dict | None]:
    """That method's row of the same concept and seed."""
    rows = {(row["concept"], row["seed"]): row for row in cells.values() if row["method"] == method}
    return lambda row: rows.get((row["concept"], row["seed"]))


def shown(values: list[float | None], worst: Callable = max, form: str = "{:.0f}") -> str:
    """Median / worst of what is known."""
    known = [value for value in values if value is not None]
    return f"{form} / {form}".format(statistics.median(known), worst(known)) if known else "—"


def percent(rows: list[dict], key: str | Callable, worst: Callable = max) -> str:
    values = [key(row) if callable(key) else row[key] for row in rows]
    return shown([None if value is None else 100 * value for value in values], worst)


def in_order(cells: dict, labels: dict) -> list[tuple[str, list[dict]]]:
    found = by_method(cells)
    return [(method, found[method]) for method in labels if method in found]


def refused(label: str, rows: list[dict], columns: int) -> str | None:
    """The line of a method that refused every case."""
    return None if measured(rows) else f"| {label} | refused |{' |' * (columns - 2)}"


def left(cells: dict, labels: dict) -> str:
    """What is still drawn, and what was to stay."""
    columns = [
        *WORDINGS.values(),
        "rest of the prompt",
        "others",
        "worst neighbour",
        "FID of others, × original",
        "seconds",
        "memory, MB",
    ]
    lines = [f"| method | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    before = paired(cells, "original")
    for method, rows in in_order(cells, labels):
        if line := refused(labels[method], rows, len(columns) + 1):
            lines.append(line)
            continue
        rows = measured(rows)
        ratios = [row["fid"] / first["fid"] for row in rows if (first := before(row))]
        entries = [
            *(percent(rows, wording) for wording in WORDINGS),
            *(percent(rows, key, min) for key in ("rest", "others")),
            percent(rows, lambda row: min(row["neighbours"].values()), min),
            shown(ratios, form="{:.2f}"),
            *(
                f"{statistics.median(row[key] for row in rows):.3g}" if key in rows[0] else "—"
                for key in ("seconds", "memory")
            ),
        ]
        lines.append(f"| {labels[method]} | {' | '.join(entries)} |")
    return "\n".join(lines)


def back(cells: dict, labels: dict, budget: dict) -> str:
    """The concept, asked for, after attacks and at other scales of guidance."""
    scales = [f"{scale:g}" for scale in budget["scales"]]
    columns = [
        "asked",
        *(text.format(**budget) for text in AFTER.values()),
        *(f"guidance {scale}" for scale in scales),
    ]
    lines = [f"| method | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for method, rows in in_order(cells, labels):
        if line := refused(labels[method], rows, len(columns) + 1):
            lines.append(line)
            continue
        rows = measured(rows)
        entries = [
            percent(rows, "asked"),
            *(percent(rows, lambda row, name=name: row["after"][name]) for name in AFTER),
            *(percent(rows, lambda row, scale=scale: row["guidance"][scale]) for scale in scales),
        ]
        lines.append(f"| {labels[method]} | {' | '.join(entries)} |")
    return "\n".join(lines)


def by_concept(cells: dict, labels: dict) -> str:
    """Asked / rest / others / no prompt, medians over seeds."""
    concepts = list(dict.fromkeys(row["concept"] for row in cells.values()))
    lines = [f"| method | {' | '.join(concepts)} |", "|---" * (len(concepts) + 1) + "|"]
    for method, rows in in_order(cells, labels):
        entries = []
        for concept in concepts:
            some = measured([row for row in rows if row["concept"] == concept])
            keys = ("asked", "rest", "others", "unconditional")
            medians = [f"{100 * statistics.median(row[key] for row in some):.0f}" for key in keys] if some else ["—"]
            entries.append(" / ".join(medians))
        lines.append(f"| {labels[method]} | {' | '.join(entries)} |")
    return "\n".join(lines)


def neighbours(cells: dict, labels: dict, concept: str) -> str:
    """Points that each neighbour's prompts lost, medians over seeds."""
    some = {name: row for name, row in cells.items() if row["concept"] == concept}
    before = paired(cells, "original")
    values = list(next(row for row in some.values() if row["method"] == "original")["neighbours"])
    lines = [f"| {concept} forgotten | {' | '.join(values)} |", "|---" * (len(values) + 1) + "|"]
    for method, rows in in_order(some, labels):
        rows = [row for row in measured(rows) if before(row)]
        if method == "original" or not rows:
            continue
        changes = (
            statistics.median(100 * (row["neighbours"][value] - before(row)["neighbours"][value]) for row in rows)
            for value in values
        )
        lines.append(f"| {labels[method]} | {' | '.join(f'{change:+.0f}' for change in changes)} |")
    return "\n".join(lines)


# Goals of our defaults: what, against which row of the same concept and seed, its bound, and whether it may not be higher.


def _points(*keys: str) -> Callable[[dict, dict], float | None]:
    def difference(row: dict, other: dict) -> float | None:
        for key in keys:
            row, other = row[key], other[key]
        return None if row is None else 100 * (row - other)

    return difference


def _above_best_peer(cells: dict) -> Callable[[dict, dict], float | None]:
    """Of the peers that forgot and kept, if there are any: whoever draws nothing any more cannot be searched."""
    rows = [paired(cells, peer) for peer in PEERS]

    def difference(row: dict, original: dict) -> float | None:
        peers = measured([peer for of in rows if (peer := of(row))])
        fair = [
            peer["after"]["embedding"]
            for peer in peers
            if peer["asked"] <= FORGOTTEN and all(peer[key] >= KEPT * original[key] for key in ("rest", "others"))
        ]
        return 100 * (row["after"]["embedding"] - min(fair)) if fair else None

    return difference


GOALS: list[tuple[str, Callable[[dict], Callable], str, float, bool]] = [
    *((f"{name}, points above retrained", lambda _, key=key: _points(key), "retrained", 2, True)
      for key, name in WORDINGS.items() if key != "unconditional"),
    *((f"{name}, points above the original", lambda _, key=key: _points(key), "original", -1, False)
      for key, name in (("rest", "rest of the prompt"), ("others", "others followed"))),
    ("FID of others, × the original's", lambda _: lambda row, other: row["fid"] / other["fid"], "original", 1.1, True),
    ("after benign steps, points above retrained", lambda _: _points("after", "benign"), "retrained", 2, True),
    ("after steps on pictures of it, points above retrained", lambda _: _points("after", "relearnt"), "retrained", float("inf"), True),
    ("no prompt, points above retrained", lambda _: _points("unconditional"), "retrained", 5, True),
    ("embedding searched, points above the best peer that forgot and kept", _above_best_peer, "original", 0, True),
]  # fmt: skip


def goals(cells: dict, methods: Mapping[str, str] = OURS) -> str:
    """How far ours are from what they are to reach: median / worst over concepts and seeds; bold where the median misses it."""
    lines = [f"| | goal | {' | '.join(methods.values())} |", "|---" * (2 + len(methods)) + "|"]
    for name, difference, against, bound, at_most in GOALS:
        goal = "reported" if bound == float("inf") else f"{'≤' if at_most else '≥'} {bound:g}"
        other, of, entries = paired(cells, against), difference(cells), []
        for method in methods:
            ours = measured([row for row in cells.values() if row["method"] == method])
            values = [of(row, other(row)) for row in ours if other(row)]
            values = [value for value in values if value is not None]
            if not values:
                entries.append("—")
                continue
            middle, worst = statistics.median(values), (max if at_most else min)(values)
            met = middle <= bound + 1e-9 if at_most else middle >= bound - 1e-9
            entries.append(f"{f'{middle:.3g}' if met else f'**{middle:.3g}**'} / {worst:.3g}")
        lines.append(f"| {name} | {goal} | {' | '.join(entries)} |")
    return "\n".join(lines)


def chosen(tuning: dict, labels: dict) -> str:
    lines = ["| method | setting | composite there | forgotten / rest / others there |", "|---|---|---|---|"]
    for method, row in tuning.items():
        if row["chosen"]:
            setting = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in row["chosen"].items())
            best = max(row["tried"], key=lambda tried: tried["composite"])
            shares = " / ".join(f"{100 * best[key]:.0f}" for key in ("forgotten", "rest", "others"))
            lines.append(f"| {labels[method]} | {setting} | {best['composite']:.2f} | {shares} |")
    return "\n".join(lines)


PARTS = {"closed_form": ("keep_weight", "ridge"), "replay": ("replay_weight",)}
SEEN = {"forgotten": "still drawn", "rest": "rest", "others": "others", "unprompted": "no prompt"}


def defaults(found: dict, part: str) -> str:
    """What settings of ours do on the concepts that they were chosen on: mean / worst."""
    rows: dict[tuple, list[dict]] = {}
    for name, row in found.items():
        if name.startswith(f"{part} "):
            rows.setdefault(tuple(row[key] for key in PARTS[part]), []).append(row)
    seen = [key for key in SEEN if key in next(iter(rows.values()))[0]]
    headings = [*PARTS[part], *(SEEN[key] for key in seen)]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for values, some in sorted(rows.items()):
        entries = []
        for key in seen:
            shares = [100 * row[key] for row in some]
            worst = (min if key in ("rest", "others") else max)(shares)
            entries.append(f"{statistics.mean(shares):.1f} / {worst:.0f}")
        lines.append(f"| {' | '.join(f'{value:g}' for value in values)} | {' | '.join(entries)} |")
    return "\n".join(lines)


def cost_table(cost: dict) -> str:
    columns = ["shape", "U-Net / text encoders", "concepts", "encoding", "solving", "changing weights", "together", "from scratch", "peak memory / weights"]  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    names = {"sd15": "Stable Diffusion 1.5", "sdxl": "SDXL"}
    for row in cost["rows"]:
        sizes = " / ".join(f"{row[key] / 1e6:,.0f} M" for key in ("unet", "text"))
        seconds = " | ".join(f"{row[key]:.3g}" for key in ("encoding", "solving", "applying", "known", "scratch"))
        lines.append(
            f"| {names[row['shape']]}, {row['dtype']} | {sizes} | {row['concepts']} | {seconds} | {row['memory']:.2f} |"
        )
    return "\n".join(lines)


def followed(bench: dict) -> str:
    """How far the pipeline that others start from follows its prompts."""
    shares = {name: row["all"] for name, row in bench.items() if "all" in row}
    seen = shares.pop("classifier")
    listed = ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items())
    return f"""The original follows its prompts in all three attributes (`text_to_image_bench.py`, a picture of each combination; a real picture is read right in
{100 * seen:.1f} %): {listed}.

![A picture of each combination](pictures/coloured-digits-stable-diffusion-0-0.png)
"""


def render(results: dict, tuning: dict, cost: dict | None, bench: dict, tried: dict) -> str:
    """The page's part."""
    cells, budget, labels = results["cells"], results["budget"], results["labels"]
    search, finetuning = budget["search"], budget["finetuning"]
    concepts = list(dict.fromkeys(row["concept"] for row in cells.values()))
    seeds = sorted({row["seed"] for row in cells.values()})
    rates, looks = (", ".join(f"{value:g}" for value in budget[key]) for key in ("rates", "looks"))
    anchors = ", ".join(f"{word} → {anchor}" for word, anchor in budget["anchors"].items())
    kinds = [concept for concept in ("three", "red") if concept in concepts]
    text = f"""## Forgetting a concept of a text-to-image pipeline

`python benchmarks/text_to_image.py`: a small Stable Diffusion (VAE, CLIP text encoder, U-Net of 2.5 M parameters) draws digits at 16 × 16 in six
colours on four backgrounds, all of it asked for by words. Forgotten: {", ".join(concepts)}; training seeds of the pipeline: {", ".join(map(str, seeds))}.
Pictures are drawn by DDIM in {budget["steps"]} steps at guidance {budget["guidance"]:g}, from the same noise for all rows, and seen by a classifier that no method was
given: {budget["number"]} pictures in most columns, all combinations without the concept for the *others*. Entries are *median / worst over concepts and seeds*, shares in percent.
*Retrained* never saw the concept, in picture or word. *Paraphrase*: other templates that captions have; *order*: templates that none has; *synonym* and
*rare word*: another name ("3"; "iii", "scarlet") that no method was told. *Rest*: of the pictures asked for, the attribute that is right least often.
*Others*: followed in all three attributes; *worst neighbour*: the one digit or colour that is followed least. *FID*: Fréchet distance in the classifier's
features to real pictures without the concept.

Ours are given one word and choose the anchor themselves, unless it says "given". All others are given more: the anchor ({anchors}), the closed forms all other words
as what is to be kept, what is trained on prompts all usual prompts for the concept and the same with the anchor, where it takes one. Peers that are trained have
at most {budget["max_steps"]} steps of {budget["per_device_train_batch_size"]} pictures; rate ({rates}) and steps ({looks}), and what else there is to choose, were chosen by a composite on another concept,
"{budget["tuned_on"]}" (below); the defaults of ours on other concepts than those of this page, too.

{followed(bench)}
{left(cells, labels)}

### What brings it back

The concept, asked for in the usual wording, after: {budget["benign"]} steps of ordinary training on other things at rate {finetuning["rate"]:g}, batch {finetuning["batch"]};
{budget["relearning"]} such steps on {budget["few"]} pictures of it; a *white-box search* of the embedding of a new word on pictures of it (textual inversion, arXiv
[2208.01618](https://arxiv.org/abs/2208.01618), {search["steps"]} steps of {search["batch"]}, Adam at {search["rate"]:g}); img2img from its pictures at strength {budget["strength"]:g}; with the anchor as negative prompt; U-Net and
text encoder rounded to 8 bits with a scale for each output channel; half precision (float16 on the CPU, {budget["halves"]} pictures); and at other scales of guidance.

{back(cells, labels, budget)}

### Ours and their goals

Differences to the row of the same concept and seed, median / worst; bold where the median misses the goal. The embedding is compared with the best peer of those that draw the
concept in at most {100 * FORGOTTEN:.0f} % and keep {100 * KEPT:.0f} % of the rest and of the others.

{goals(cells)}

### By concept

Asked / rest / others / no prompt, medians over seeds:

{by_concept(cells, labels)}

By how many points the prompts of each neighbour are followed more or less often, medians over seeds:

{chr(10).join(neighbours(cells, labels, concept) + chr(10) for concept in kinds)}
![Rows of all methods from the same noise and prompts](pictures/text_to_image_rows.png)

*"Three" forgotten, seed 0; the same noise and prompts in all rows.*

### Settings that were chosen

The composite is the harmonic mean of what is forgotten (asked, paraphrase, synonym), and of the rest, the others and the original's FID over the
row's, each of the original's and at most 1.

{chosen(tuning, labels)}

Defaults of ours (`python benchmarks/text_to_image_defaults.py`), on {", ".join(dict.fromkeys(row["concept"] for row in tried.values()))}, anchors chosen; percent, mean / worst over concepts. What is
still drawn is asked for in three wordings. Of the closed form, what is kept beside one concept, and the ridge:

{defaults(tried, "closed_form")}
"""
    if any(name.startswith("replay ") for name in tried):
        text += f"""
Of VDU alone, the weight of what is replayed:

{defaults(tried, "replay")}
"""
    if cost:
        text += f"""
### What the closed form costs on large pipelines

`python benchmarks/text_to_image_cost.py`: random weights in the shapes of Stable Diffusion 1.5 and SDXL, {cost["threads"]} threads; seconds. A small vocabulary (what a token is does
not change the arithmetic), a small VAE, text encoders in float32. *Encoding*: the wordings and those of the anchor. *From scratch*: with {max(row["kept"] for row in cost["rows"]):,} kept
prompts encoded first, estimated from a part of them; with `TextMoments` that is done once for all.

{cost_table(cost)}
"""
    return text


FONT, HEAD, GAP, BORDER = ImageFont.load_default(13), 20, 10, 2  # of the page of rows, in pixels
NAMES = "rows"  # of the file's own text


def _beside(names: Iterable[str]) -> int:
    """What the names take."""
    return int(max(FONT.getlength(name) for name in names)) + 12


def write_rows(strips: Mapping[str, Image.Image], columns: Mapping[str, int], file: Path) -> None:
    """A picture of a row for each method, with its name before it and what the columns are above.

    Args:
        strips: a row of framed pictures by name.
        columns (`Mapping[str, int]`): how many pictures of each kind stand side by side.
    """
    wide, first = _beside(strips), next(iter(strips.values()))
    each, high = first.width // sum(columns.values()), first.height
    size = wide + first.width + GAP * len(columns), HEAD + len(strips) * (high + BORDER)
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for row, (name, strip) in enumerate(strips.items()):
        top, place, left_of = HEAD + row * (high + BORDER), 0, wide
        draw.text((4, top + high // 2 - 8), name, "black", FONT)
        for kind, count in columns.items():
            if row == 0:
                draw.text((left_of, 2), HEADINGS[kind], "black", FONT)
            page.paste(strip.crop((place * each, 0, (place + count) * each, high)), (left_of, top))
            place, left_of = place + count, left_of + count * each + GAP
    about = PngInfo()
    about.add_itxt(NAMES, json.dumps([*strips]))
    page.save(file, optimize=True, pnginfo=about)


def read_rows(file: Path, columns: Mapping[str, int]) -> dict[str, Image.Image]:
    """The strips of such a picture by name, so that a row stays of which nothing is drawn anew; none where there is no such picture."""
    if not file.is_file():
        return {}
    with Image.open(file) as page:
        page.load()
    names = json.loads(page.info.get(NAMES, "[]"))
    if not names:
        return {}
    wide, high = _beside(names), (page.height - HEAD) // len(names) - BORDER
    each = (page.width - wide - GAP * len(columns)) // sum(columns.values())
    strips = {}
    for row, name in enumerate(names):
        top, place, left_of = HEAD + row * (high + BORDER), 0, wide
        strips[name] = Image.new("RGB", (each * sum(columns.values()), high))
        for count in columns.values():
            strips[name].paste(page.crop((left_of, top, left_of + count * each, top + high)), (place * each, 0))
            place, left_of = place + count, left_of + count * each + GAP
    return strips
