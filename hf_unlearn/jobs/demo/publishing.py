"""PUBLISH: everything goes to a Hub on loopback, and comes back in a process that has never seen any of it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from hf_unlearn import in_forget_set, publish, verify_provenance
from hf_unlearn.audit.report import AuditReport
from hf_unlearn.examples.datasets import digits
from hf_unlearn.examples.loopback_hub import LoopbackHub
from hf_unlearn.hub.card import Figure
from hf_unlearn.hub.sending import Publication
from hf_unlearn.hub.verify import ProvenanceReport
from hf_unlearn.modes import THREADS

from .filtering import Filtered
from .find import Found
from .forget import Corrected, Forgotten, logits
from .stage import Stage


@dataclass(frozen=True)
class Published:
    """What the last act leaves.

    Args:
        publications (`dict[str, Publication]`): by what it is, in words.
        record ([`ProvenanceReport`]): of the classifier that forgot a digit.
        proven (`bool`): whether the owner could show that an example was to be forgotten.
        same (`dict[str, Any]`): what the new process found; see [`hf_unlearn.jobs.demo.loading`].
    """

    publications: dict[str, Publication]
    record: ProvenanceReport
    proven: bool
    same: dict[str, Any]


def play(
    stage: Stage, found: Found, corrected: Corrected, forgotten: Forgotten, report: AuditReport, filtered: Filtered
) -> Published:
    """Publish, load again, compare."""
    with LoopbackHub() as hub, TemporaryDirectory() as home, hub.in_this_process(home):
        stage.say(f"a Hub of its own listens on {hub.url}, as long as the demo runs")
        name_on_cards(corrected, forgotten, stage)
        publications = {
            "the corrected classifier": publish(corrected.trainer, "digits-corrected", show=quiet),
            "the classifier that forgot a digit": publish(
                forgotten.trainer, f"digits-without-{stage.forgotten}", audit=report, show=quiet
            ),
            "the GAN with its filter": publish(
                filtered.pipeline, "digits-gan-filtered", license="apache-2.0", show=quiet
            ),
            "what f-INE found, as a dataset": publish(
                found.report, "digits-influence", license="apache-2.0", show=quiet
            ),
        }
        for what, one in publications.items():
            stage.say(f"{what}: {one.repo_id}, {len(one.files)} files{', private' if one.private else ''}")
        record = verify_provenance(f"me/digits-without-{stage.forgotten}")
        stage.say(f"provenance of {record}".replace("\n", "\n  "))
        # The key lies in the run's folder and is not published.
        proven = in_forget_set(record, key=forgotten.model, example=forgotten.forget[0])
        stage.say(f"the owner proves with the key that an image was in the forget set: {'yes' if proven else 'no'}")
        return Published(publications, record, proven, loaded_again(stage, hub, forgotten, filtered))


def quiet(text: str) -> None:
    """`publish` shows every file that goes up and every one that stays; the page has them too."""


def name_on_cards(corrected: Corrected, forgotten: Forgotten, stage: Stage) -> None:
    """What the cards cannot know by themselves: the data, where the models came from, and figures before, after and of retraining."""
    about = {"dataset_name": "scikit-learn digits", "dataset_type": "digits", "license": "apache-2.0"}
    answers, digit = corrected.answers, stage.forgotten
    corrected.trainer.results = [
        compared(
            "Names the digit, of images whose label was wrong",
            {name: one.right / len(one.said) for name, one in answers.items()},
        ),
        compared("Accuracy on test images", {name: one.accuracy for name, one in answers.items()}),
    ]
    forgotten.trainer.results = [
        compared(
            "Accuracy on the forgotten class", {name: forgotten.on(name, digit)[0] for name in forgotten.accuracy}
        ),
        compared("Accuracy on the other classes", {name: forgotten.on(name, digit)[1] for name in forgotten.accuracy}),
    ]
    corrected.trainer.base_model = None  # a folder on this machine: no one else could look it up
    forgotten.trainer.base_model = "me/digits-corrected"  # which is what lies in the folder that it came from
    corrected.trainer.card_values = forgotten.trainer.card_values = about


def compared(name: str, shares: dict[str, float]) -> Figure:
    """A row of a card's table."""
    before, after, retrained = (100 * shares[model] for model in ("original", "unlearned", "retrained"))
    return Figure(metric="accuracy", name=name, before=before, after=after, retrained=retrained)


def loaded_again(stage: Stage, hub: LoopbackHub, forgotten: Forgotten, filtered: Filtered) -> dict[str, Any]:
    """A new process asks the Hub for what was published, and compares it with what this one has at hand."""
    stage.say("a new process loads both again, the classifier with stock classes alone")
    test = digits()["test"]
    names = [f"me/digits-without-{stage.forgotten}", "me/digits-gan-filtered"]
    with TemporaryDirectory() as home:
        expected = Path(home, "expected.npz")
        np.savez(
            expected,
            images=np.stack([np.asarray(image) for image in test["image"]]),
            logits=logits(forgotten.model, test),
            latents=filtered.latents.numpy(),
            drawn=np.stack([np.asarray(image) for image in filtered.after]),
        )
        command = [sys.executable, str(Path(__file__).with_name("loading.py")), *names, str(expected)]
        done = subprocess.run(  # in a session of its own, so that Ctrl-C is answered by this process alone
            command,
            env={THREADS: "1"} | hub.environment(home) | {"TQDM_DISABLE": "1"},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    same = json.loads(done.stdout.splitlines()[-1])
    stage.say(
        f"the classifier gives the same {same['answers']} answers of {same['asked']} (logits differ by {same['largest']:.0e} at most), "
        f"the filtered GAN the same {same['images']} images of {same['drawn']}"
    )
    return same
