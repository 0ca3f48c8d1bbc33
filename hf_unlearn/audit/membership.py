"""Membership by entropy: does the model still answer the forgotten examples as if it had trained on them?"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def entropy(logits: ArrayLike) -> NDArray[np.float64]:
    """Entropy of each prediction, in nats: `[n, classes] -> [n]`."""
    from scipy.special import entr, softmax

    return entr(softmax(np.asarray(logits, dtype=np.float64), axis=-1)).sum(-1)


def membership_by_entropy(members: ArrayLike, nonmembers: ArrayLike, suspects: ArrayLike) -> float:
    """Share of the suspects that an attacker takes for training examples (arXiv 2403.16246).

    The attacker fits a support vector machine (C = 3, RBF kernel, gamma "auto") to the entropies of examples known to be
    in the training set and known not to be, as many of one as of the other (the first ones), and asks it about the
    suspects. A low figure alone is no proof of forgetting: compare it with a model retrained without the examples.

    Args:
        members, nonmembers, suspects (`array`): logits `[n, classes]` of retained training examples, of test examples of the
            same classes, and of the forgotten examples.

    Returns:
        `float`: in [0, 1].

    Raises:
        ValueError: one of them is empty.
    """
    from sklearn.svm import SVC

    groups = {"members": members, "nonmembers": nonmembers, "suspects": suspects}
    features = {name: entropy(logits)[:, None] for name, logits in groups.items() if len(np.asarray(logits))}
    if missing := groups.keys() - features.keys():
        raise ValueError(f"{min(missing)}: is empty; the attack needs examples of all three groups")
    size = min(len(features["members"]), len(features["nonmembers"]))
    attacker = SVC(C=3, gamma="auto", kernel="rbf")
    attacker.fit(
        np.concatenate([features["members"][:size], features["nonmembers"][:size]]),
        np.repeat([1, 0], size),
    )
    return float(attacker.predict(features["suspects"]).mean())
