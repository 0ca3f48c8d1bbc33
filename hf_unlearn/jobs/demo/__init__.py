"""The whole loop on real handwritten digits: find, forget, verify, filter, publish, load again, and a page that shows it.

`hf-unlearn demo` runs it. One file an act, written as a user of the package would: read them in the order of [`run`].
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from ..recipe.demo import DemoJob


PAGE = "report.html"


def run_demo(job: DemoJob) -> None:
    """The job of `hf-unlearn demo`.

    Raises:
        KeyboardInterrupt: by Ctrl-C, saying where things are.
    """
    try:
        run(job.output_dir, job.forgotten, job.seed)
    except KeyboardInterrupt:
        if not any(Path(job.output_dir).glob("*")):
            raise
        say = f"stopped; what was made so far is in {job.output_dir}: delete it, or choose another --output_dir"
        raise KeyboardInterrupt(say) from None


def run(output_dir: str | Path = "demo", forgotten: int = 3, seed: int = 0) -> Path:
    """Play all acts.

    Args:
        output_dir: gets the models, the audit and `report.html`; new or empty.
        forgotten (`int`, defaults to 3): the digit to forget, 0 to 9.
        seed (`int`, defaults to 0): of weights, orders, wrong labels and latents.

    Returns:
        `Path`: of the page.

    Raises:
        ValueError: the folder holds something, or is a file.
    """
    begun = time.monotonic()
    folder = Path(output_dir)
    if folder.is_file():
        raise ValueError(f"output_dir: {str(output_dir)!r} is a file; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise ValueError(f"output_dir: {str(output_dir)!r} is not empty; empty it, or choose another folder")
    print(
        f"hf-unlearn demo: the whole loop on 1,797 real handwritten digits, into {folder}; importing the libraries",
        flush=True,
    )

    from ...examples.datasets import digits
    from ...modes import one_thread
    from . import filtering, find, forget, page, publishing, verify
    from .stage import Stage, hushed

    stage, splits = Stage(folder, forgotten, seed, begun=begun), digits()
    with hushed(), one_thread():
        with stage.act("Find what taught it nonsense"):
            found = find.play(stage, splits["train"])
        with stage.act("Forget wrong answers"):
            corrected = forget.forget_answers(stage, found, splits)
        with stage.act("Forget a whole class"):
            forgotten_class = forget.forget_class(stage, corrected, found, splits)
        with stage.act("Verify"):
            report = verify.play(stage, corrected, forgotten_class, splits["test"])
        with stage.act("Filter what a generator draws"):
            filtered = filtering.play(stage, encoder=corrected.model, looks=corrected.retrained)
        with stage.act("Publish, and load again"):
            published = publishing.play(stage, found, corrected, forgotten_class, report, filtered)
        acts = (found, corrected, forgotten_class, report, filtered, published)
        cards = page.measured(stage, *acts)
        path = page.write(folder / PAGE, stage, splits, *acts, cards)
    print(f"\nMeasured, in {time.monotonic() - begun:.0f} s:")
    for card in cards:
        print(f"  {card.verb:15} {card.number}  {card.words}")
    print(f"\nOpen {path} in a browser. Beside it:")
    for name, what in page.PLACES.items():
        print(f"  {name:15} {what}")
    return path
