"""What else one could filter with, each from the same marks: functions `(undesired, clean, …) -> score of embeddings`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.neighbors import NearestNeighbors
from sklearn.svm import SVC
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

from hf_unlearn.metrics.features import ClassifierFeatures


Array = NDArray[np.float64]
Scorer = Callable[[Array], Array]
NEIGHBORS = 3
POOL = 2_000  # unmarked samples that stand in for clean ones where there are none


def cosine(undesired: Array, clean: Array) -> Scorer:
    """The rule of Stable Diffusion's stock checker: the cosine to a concept's embedding, here the mean mark."""
    concept = undesired.mean(0) / np.linalg.norm(undesired.mean(0))
    return lambda rows: rows @ concept / np.linalg.norm(rows, axis=1).clip(1e-12)


def neighbors(undesired: Array, clean: Array) -> Scorer:
    """How much nearer the nearest undesired marks are than the nearest others."""
    near = NearestNeighbors(n_neighbors=min(NEIGHBORS, len(undesired))).fit(undesired)
    far = NearestNeighbors(n_neighbors=min(NEIGHBORS, len(clean))).fit(clean)
    return lambda rows: far.kneighbors(rows)[0].mean(1) - near.kneighbors(rows)[0].mean(1)


def kernel_svm(undesired: Array, clean: Array) -> Scorer:
    """A support-vector classifier with a Gaussian kernel."""
    rows = np.concatenate([undesired, clean])
    centre, scale = rows.mean(0), rows.std()
    classifier = SVC(C=10.0, gamma=1 / rows.shape[1], class_weight="balanced")
    classifier.fit((rows - centre) / scale, np.arange(len(rows)) < len(undesired))
    return lambda rows: classifier.decision_function((rows - centre) / scale)


PEERS = {"cosine": cosine, "nearest neighbours": neighbors, "Gaussian SVM": kernel_svm}


def fine_tuned(
    folder: str, images: Tensor, undesired: Array, clean: Array, test: Array, *, seed: int, steps: int = 60
) -> Array:
    """Scores of the test images by a classifier of the other nine classes, fine-tuned on the marks with a head of two classes.

    Args:
        undesired, clean, test (array of `int`): rows of `images`.
    """
    torch.manual_seed(seed)
    network = ClassifierFeatures(
        AutoModelForImageClassification.from_pretrained(
            folder, num_labels=2, id2label={0: "clean", 1: "undesired"}, ignore_mismatched_sizes=True
        ),
        _processor(folder),
        name="fine-tuned",
    )
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        picks = [
            torch.from_numpy(kind)[torch.randint(len(kind), (16,), generator=generator)] for kind in (undesired, clean)
        ]
        labels = torch.cat([torch.ones(16), torch.zeros(16)]).long()
        loss = F.cross_entropy(network._features_and_logits(images[torch.cat(picks)])[1], labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return _scores(network.eval(), images[torch.from_numpy(test)])


@torch.no_grad()
def _scores(network: nn.Module, images: Tensor) -> Array:
    logits = torch.cat([network._features_and_logits(part)[1] for part in images.split(500)])
    return (logits[:, 1] - logits[:, 0]).double().numpy()


def _processor(folder: str):
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(folder)
