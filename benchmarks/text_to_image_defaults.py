"""Defaults for a concept of a text-to-image pipeline, chosen on concepts that no other table has.

    python benchmarks/text_to_image_defaults.py [closed_form] [replay]

`closed_form`: how much what is kept weighs beside the concept, and the ridge. `replay`: the weight of replay in VDU alone, with a guard that lets everything
pass. The small Stable Diffusion of `text_to_image.py`, seed 0, and the anchor that is chosen by default. Of each setting: share of pictures that still show the
concept in three wordings, prompts for all else that are followed, and FID; of VDU also what is drawn without a prompt, and what the guard saw at the end.
What is there is not measured again: benchmarks/results/text_to_image_defaults.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import product
from pathlib import Path

from rows import by_line, rounded, save
from text_to_image import folder_of, quietly, quietly_loaded
from text_to_image_figures import STEPS, Case, Figures, quick_look, real_pictures

from hf_unlearn import ConceptRedirection, VDUConfig, VDUTrainer
from hf_unlearn.examples.attributes import attribute_classifier


RESULTS = Path(__file__).parent / "results" / "text_to_image_defaults.json"
KEPT = {"concept": ("five", "nine", "blue", "yellow", "green"), "keep_weight": (1.0, 3.0, 5.0, 10.0, 30.0), "ridge": (1e-3, 1e-4)}  # fmt: skip
REPLAYED = {"concept": ("five", "blue"), "replay_weight": (1.0, 4.0)}
ANYTHING = 1e6  # of utility may be lost


def closed_form(pipeline, concept: str, **settings) -> tuple[str, dict]:
    """Changes the pipeline; its anchor."""
    redirection = ConceptRedirection.of(pipeline, concept, **settings)
    redirection.apply(pipeline)
    return redirection.anchors[concept], {}


def replay(pipeline, concept: str, **settings) -> tuple[str, dict]:
    """Trains the pipeline; its anchor, and what the guard saw."""
    with tempfile.TemporaryDirectory() as folder:
        fixed = {"closed_form": False, "use_cpu": True, "num_inference_steps": STEPS, "report_to": "none"}
        fixed |= {"utility_tolerance": ANYTHING, "disable_tqdm": True}
        trainer = VDUTrainer(pipeline=pipeline, args=VDUConfig(folder, concept=concept, **fixed, **settings))
        trainer.train()
        return trainer.args.concept[concept], {"utility_drop": trainer.guard.looks[-1].utility_drop}


PARTS = {"closed_form": (closed_form, KEPT), "replay": (replay, REPLAYED)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=", ".join(PARTS), default=[*PARTS])
    quietly()
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    classifier, pictures = attribute_classifier(), real_pictures()
    for part in parser.parse_args().parts:
        change, values = PARTS[part]
        for chosen in product(*values.values()):
            settings = dict(zip(values, chosen, strict=True))
            name = " ".join([part, *(f"{value:g}" if isinstance(value, float) else value for value in chosen)])
            if name in found:
                continue
            pipeline = quietly_loaded(folder_of(0))
            anchor, seen = change(pipeline, **settings)
            figures = Figures(Case(settings["concept"], anchor, number=36), classifier, pictures)
            row = settings | {"anchor": anchor} | seen | quick_look(figures, pipeline)
            if part == "replay":
                row["unprompted"] = figures.share(figures.draw(pipeline, [""] * 36))
            found[name] = rounded(row)
            save(RESULTS, by_line(found))
            print(name, json.dumps(found[name]), flush=True)


if __name__ == "__main__":
    main()
