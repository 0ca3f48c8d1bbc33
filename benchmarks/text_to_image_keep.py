"""How much what is kept should weigh in the closed form, chosen on concepts that no other table has.

    python benchmarks/text_to_image_keep.py

The small Stable Diffusion of `text_to_image.py`, seed 0. The anchor is the one that is chosen by default. Of each setting: share of pictures that still show
the concept in three wordings, prompts for all else that are followed, and FID. What is there is not measured again; benchmarks/results/text_to_image_keep.json.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

from rows import by_line, rounded, save
from text_to_image import folder_of, quietly, quietly_loaded
from text_to_image_figures import Case, Figures, quick_look, real_pictures

from hf_unlearn import ConceptRedirection
from hf_unlearn.examples.attributes import attribute_classifier


RESULTS = Path(__file__).parent / "results" / "text_to_image_keep.json"
CONCEPTS = ("five", "nine", "blue", "yellow", "green")
WEIGHTS, RIDGES = (1.0, 3.0, 5.0, 10.0, 30.0), (1e-3, 1e-4)


def main() -> None:
    quietly()
    found = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    classifier, pictures = attribute_classifier(), real_pictures()
    for concept, weight, ridge in product(CONCEPTS, WEIGHTS, RIDGES):
        name = f"{concept} {weight:g} {ridge:g}"
        if name in found:
            continue
        pipeline = quietly_loaded(folder_of(0))
        redirection = ConceptRedirection.of(pipeline, concept, keep_weight=weight, ridge=ridge)
        redirection.apply(pipeline)
        (anchor,) = redirection.anchors.values()
        figures = Figures(Case(concept, anchor, number=36), classifier, pictures)
        found[name] = {"concept": concept, "anchor": anchor, "keep_weight": weight, "ridge": ridge}
        found[name] |= rounded(quick_look(figures, pipeline))
        save(RESULTS, by_line(found))
        print(json.dumps(found[name]), flush=True)


if __name__ == "__main__":
    main()
