import platform
from importlib.metadata import version

import pytest

from hf_unlearn.hub.provenance import Provenance, library_versions


VALUES = {
    "method": "PBU",
    "method_title": "A method",
    "forgotten": "Übung — “x”",
    "forget_examples": 108,
    "seed": 7,
    "steps": 90,
    "paper": "2403.00001",
    "hyperparameters": {"learning_rate": 1e-4, "layers": [1, 2], "anchor": None},
    "forget_fingerprint": "ab" * 32,
    "versions": {"torch": "1.0"},
    "created": "2020-02-29",
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forget_examples": 0}, "forget_examples=0"),
        ({"steps": -1}, "steps=-1"),
        ({"hyperparameters": {"rate": float("nan")}}, "hyperparameters['rate']=nan"),
        ({"hyperparameters": {"model": object}}, "hyperparameters['model']"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError) as error:
        Provenance(**VALUES | changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_library_versions_are_those_installed():
    versions = library_versions()
    assert versions["python"] == platform.python_version()
    assert all(versions[name] == version(name) for name in ("torch", "transformers"))
