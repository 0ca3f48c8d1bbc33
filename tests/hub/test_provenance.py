import json
import platform
from importlib.metadata import version

import pytest

from hf_unlearn.hub.provenance import Provenance, library_versions


def provenance(**changes):
    values = {
        "method": "PBU",
        "method_title": "A method",
        "forgotten": "class 3",
        "forget_examples": 108,
        "seed": 7,
        "steps": 90,
        "hyperparameters": {"learning_rate": 1e-4, "layers": [1, 2], "anchor": None},
        "versions": {"torch": "1.0"},
        "created": "2020-02-29",
    }
    return Provenance(**{**values, **changes})


class TestProvenance:
    def test_json_gives_the_same_back(self):
        original = provenance(forgotten="Übung — “x”", paper="2403.00001", forget_fingerprint="ab" * 32)
        assert Provenance.from_json(original.to_json()) == original

    def test_same_values_give_the_same_text(self):
        assert provenance().to_json() == provenance().to_json()
        assert json.loads(provenance().to_json())["created"] == "2020-02-29"

    def test_is_frozen(self):
        with pytest.raises(AttributeError):
            provenance().seed = 1

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"forget_examples": 0}, "forget_examples=0"),
            ({"steps": -1}, "steps=-1"),
            ({"hyperparameters": {"rate": float("nan")}}, "hyperparameters['rate']=nan"),
            ({"hyperparameters": {"model": object}}, "hyperparameters['model']"),
        ],
    )
    def test_refuses(self, changes, message):
        with pytest.raises(ValueError) as error:
            provenance(**changes)
        assert message in str(error.value)
        assert "\n" not in str(error.value)

    def test_reading_refuses_missing_and_unknown_fields(self):
        values = json.loads(provenance().to_json())
        with pytest.raises(ValueError, match="'colour' is no field"):
            Provenance.from_json(json.dumps({**values, "colour": "red"}))
        del values["versions"]
        with pytest.raises(ValueError, match="'versions' is missing"):
            Provenance.from_json(json.dumps(values))
        with pytest.raises(ValueError, match="JSON object"):
            Provenance.from_json("[]")


def test_library_versions_are_those_installed():
    versions = library_versions()
    assert versions["python"] == platform.python_version()
    assert versions["torch"] == version("torch")
    assert versions["transformers"] == version("transformers")
