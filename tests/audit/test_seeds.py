"""Training, unlearning and evaluation: their variances, and an audit that repeats all three."""

import copy
import re

import numpy as np
import pytest
import torch
from planted_classifiers import FORGOTTEN, Network

from hf_unlearn.audit.report import AuditReport
from hf_unlearn.audit.run import audit
from hf_unlearn.audit.seeds import nested_components


class TestComponents:
    def test_by_hand(self):
        """Two trainings at 0 and 10, two unlearnings ±1 each, two evaluations ±0.5 each."""
        values = [[[t + u + e for e in (-0.5, 0.5)] for u in (-1, 1)] for t in (0, 10)]
        found = nested_components(values)
        assert found["evaluation"] == pytest.approx(0.5)  # ½² · 2 / (2 − 1)
        assert found["unlearning"] == pytest.approx((2 * 2.0 - 0.5) / 2)  # MS_U = 2 · 2
        assert found["training"] == pytest.approx((4 * 50.0 - 2 * 2.0) / 4)  # MS_T = 4 · 50

    @pytest.mark.parametrize("sizes", [(5, 2, 2), (6, 3, 4)])
    def test_known_components_are_found_on_average(self, sizes):
        random, known = np.random.default_rng(0), {"training": 4.0, "unlearning": 1.0, "evaluation": 0.25}
        found = {name: [] for name in known}
        for _ in range(1500):
            effects = [random.normal(0, known[name] ** 0.5, sizes[: k + 1]) for k, name in enumerate(known)]
            values = effects[0][:, None, None] + effects[1][..., None] + effects[2] + 100.0
            for name, value in nested_components(values).items():
                found[name].append(value)
        for (
            name,
            values,
        ) in found.items():  # of 1,500 draws four standard errors; clipping at 0 is rare here and upwards
            assert np.mean(values) == pytest.approx(known[name], abs=4 * np.std(values) / 1500**0.5 + 0.01)

    def test_what_does_not_vary_has_no_variance(self):
        assert nested_components(np.ones((3, 2, 2))) == {"training": 0.0, "unlearning": 0.0, "evaluation": 0.0}
        only = np.ones((3, 2, 2)) * np.arange(3)[:, None, None]
        assert nested_components(only) == {"training": 1.0, "unlearning": 0.0, "evaluation": 0.0}

    @pytest.mark.parametrize("shape", [(5, 2), (1, 2, 2), (5, 1, 2), (5, 2, 1)])
    def test_refused(self, shape):
        with pytest.raises(ValueError, match="2 of each or more"):
            nested_components(np.zeros(shape))


def train(rows, seed):
    """A few steps on all rows."""
    torch.manual_seed(seed)
    model = Network()
    pixels, labels = rows["pixel_values"][:], rows["label"][:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40 if seed % 2 else 8):  # trainings differ
        optimizer.zero_grad()
        model(pixels, labels).loss.backward()
        optimizer.step()
    return model.eval()


def masks(model, forget, retain):
    with torch.no_grad():
        model.head.bias[FORGOTTEN] = -1e4
        model.body.weight += 1e-3 * torch.randn(model.body.weight.shape)
    return model


CHECKS = ["forget_accuracy", "membership_loss", "unseen_error", "answer_distance"]


class TestRepeated:
    @pytest.fixture(scope="class")
    def report(self, models, sets, tmp_path_factory):
        settings = {"checks": CHECKS, "progress": False, "output_dir": tmp_path_factory.mktemp("audit")}
        state = torch.get_rng_state()
        made = audit(
            masks(copy.deepcopy(models.originals[0]), None, None),
            models.originals[0],
            **sets,
            unlearn_fn=masks,
            train_fn=train,
            **settings,
        )
        return made, state, settings["output_dir"]

    def test_references_are_made(self, report):
        made, _, _ = report
        assert len(made.residual.retrained_loss) == 5
        assert made.models["retrained 5"] == "retrained"
        assert made["forget_accuracy"].retrained == (0.0,) * 5  # none of them saw the class
        assert len(set(made.residual.retrained_loss)) == 5

    def test_values_and_parts(self, report):
        made, state, folder = report
        found = made["unseen_error"].over_seeds
        values = np.array(found["values"])
        assert values.shape == (5, 2, 2)
        assert found["mean"] == pytest.approx(values.mean())
        parts = nested_components(values)
        assert {name: found[name] for name in parts} == parts
        assert found["sd"] ** 2 == pytest.approx(sum(parts.values()))
        assert found["training"] > 0
        # Masked whatever the training: nothing varies.
        assert made["forget_accuracy"].over_seeds["sd"] == 0.0
        assert made["answer_distance"].over_seeds is None  # a comparison
        assert AuditReport.load(folder / "audit.json")["unseen_error"].over_seeds["values"] == found["values"]

    def test_is_on_the_page_and_in_the_table(self, report, tmp_path):
        made, _, folder = report
        one = made["unseen_error"]
        frame = made.to_pandas().set_index("name")
        assert frame.loc["unseen_error", "over_seeds_sd"] == one.over_seeds["sd"]
        assert np.isnan(frame.loc["answer_distance", "over_seeds_sd"])
        text = (folder / "audit.html").read_text().partition("Over training seeds")[2].partition("</table>")[0]
        (line,) = [row for row in text.split("<tr>") if one.title in row]
        parts = [one.over_seeds[part] for part in ("training", "unlearning", "evaluation")]
        shares = [f"{100 * (part / sum(parts)):.0f} %" for part in parts]
        assert re.findall(r"<td>([^<]*)</td>", line) == [
            one.shown(one.over_seeds["mean"]),
            one.shown(one.over_seeds["sd"]),
            *shares,
        ]

    def test_evaluations_ask_halves_of_their_own(self, report):
        """The spread of an evaluation is that of a share among as many rows as there are, though it asks half of them."""
        made, _, _ = report
        found = made["unseen_error"]
        p = np.mean(found.over_seeds["values"], axis=2)
        expected = (p * (1 - p)).mean() / found.n  # 10 pairs: a relative standard error of √(2/10)
        assert found.over_seeds["evaluation"] == pytest.approx(expected, rel=3 * (2 / 10) ** 0.5)

    def test_functions_that_do_not_fit(self, models, sets):
        settings = {"checks": ["forget_accuracy"], "progress": False}
        model = masks(copy.deepcopy(models.originals[0]), None, None)
        with pytest.raises(ValueError, match="train_fn: gives the same model whatever the seed"):
            audit(
                model,
                models.originals[0],
                **sets,
                train_fn=lambda rows, seed: copy.deepcopy(models.retrained[0]),
                **settings,
            )
        with pytest.raises(ValueError, match="train_fn: returned NoneType; return the model"):
            audit(model, models.originals[0], **sets, train_fn=lambda rows, seed: None, **settings)
