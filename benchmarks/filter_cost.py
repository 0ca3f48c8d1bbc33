"""What a filter costs: scoring embeddings of many concepts, and `FilteredPipeline` beside its pipeline and encoder.

    python benchmarks/filter_cost.py [--quick]

Medians of the process's own time, one thread; what is compared is measured in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from time import process_time

import torch
from diffusers import DDPMPipeline
from filter_encoders import classifier_folder
from generators import start

from hf_unlearn import FASTFitter, FilteredPipeline, FilterEncoder
from hf_unlearn.examples.ddpm import DIGITS, cached
from hf_unlearn.filtering.fitting import forms
from hf_unlearn.filtering.fitting.background import Moments
from hf_unlearn.filtering.scores import ScoreBank


RESULTS = Path(__file__).parent / "results" / "filter_cost.json"
SAMPLES, CONCEPTS, MARKS = 10_000, 20, 20
DIMENSIONS = {384: "MiniLM", 512: "CLIP ViT-B/32", 768: "CLIP ViT-L/14, DINOv2-B"}


def medians(*functions: Callable[[], object], repeats: int) -> list[float]:
    """Milliseconds of the processor of each, measured in turn."""
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        function()
    for _ in range(repeats):
        for function, found in zip(functions, times, strict=True):
            begin = process_time()
            function()
            found.append(1e3 * (process_time() - begin))
    return [statistics.median(found) for found in times]


def scoring(dimension: int, samples: int, repeats: int) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(samples, dimension, generator=generator)
    pool = torch.randn(2_000, dimension, generator=generator).double().numpy()
    marks = [torch.randn(MARKS, dimension, generator=generator).double().numpy() + 0.5 for _ in range(CONCEPTS)]
    moments = Moments(dimension)
    moments.update(pool)
    basis = forms.basis_of(moments, 64)
    quadratic = ScoreBank.of([forms.quadratic(rows, basis) for rows in marks])
    linear = ScoreBank.of([forms.mean_difference(rows, pool[:MARKS]) for rows in marks])
    times = medians(lambda: quadratic(embeddings), lambda: linear(embeddings), repeats=repeats)
    return {"dimension": dimension, "encoder": DIMENSIONS[dimension], "quadratic": times[0], "linear": times[1]}


def pipelines(images: int, steps: int, repeats: int) -> dict[str, float]:
    """The digits' diffusion model and an encoder, with and without the wrapper."""
    pipeline = DDPMPipeline.from_pretrained(cached(DIGITS))
    pipeline.set_progress_bar_config(disable=True)
    encoder = FilterEncoder.from_pretrained(classifier_folder("digits", 3))
    arguments = {"batch_size": images, "num_inference_steps": steps, "output_type": "np"}

    def drawn(pipe, seed: int = 0):
        return pipe(**arguments, generator=torch.Generator().manual_seed(seed)).images

    def seen(found) -> torch.Tensor:
        return encoder(torch.from_numpy(found).permute(0, 3, 1, 2) * 2 - 1)

    pool = [torch.from_numpy(drawn(pipeline, seed)).permute(0, 3, 1, 2) * 2 - 1 for seed in range(1, 5)]
    fitter = FASTFitter(encoder).update(undesired=pool[0][:MARKS])
    for part in pool:
        fitter.update(unmarked=part)
    checker = fitter.fit(max_prevalence=0.5, rate=0.3).checker()
    filtered = FilteredPipeline(pipeline, checker)
    bare, both, wrapped = medians(
        lambda: drawn(pipeline), lambda: seen(drawn(pipeline)), lambda: drawn(filtered), repeats=repeats
    )
    return {"images": images, "steps": steps, "pipeline": bare, "with encoder": both, "filtered": wrapped}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few repeats, nothing is written")
    quick = parser.parse_args().quick
    start()
    found = {
        "samples": SAMPLES,
        "concepts": CONCEPTS,
        "marks": MARKS,
        "scoring": [scoring(d, 1_000 if quick else SAMPLES, 3 if quick else 50) for d in DIMENSIONS],
        "pipelines": pipelines(64, 2 if quick else 25, 1 if quick else 15),
    }
    print(json.dumps(found, indent=1))
    if not quick:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
