import io
import json
import math
import os
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from fresh import run_python
from made_up import of_themselves, record
from PIL import Image as PILImage
from rich.console import Console
from scipy.special import stdtr

from hf_unlearn.influence.checks import target_sets_of
from hf_unlearn.influence.report import kept
from hf_unlearn.influence.report import report as module
from hf_unlearn.influence.report.report import InfluenceReport
from hf_unlearn.influence.report.shuffling import Shuffling
from hf_unlearn.tradeoff.discoveries import benjamini_hochberg, z_scores
from hf_unlearn.tradeoff.estimate import estimate_mu


EXAMPLES, MANIFEST = 20, {"run_id": "run-7", "targets": ["a", "b"]}
METHODS = ("accumulated", "composed", "gaussian", "auc", "max_abs")


def observe(value, ids=None, targets=("a", "b"), seed=0, batch=5, weighted=False, silent=None):
    """A run over `value` `[epochs, examples, targets]`, in random batches of 5; one example may be without predictions."""
    generator = np.random.default_rng(seed)
    epochs, examples, _ = value.shape
    order = np.concatenate([generator.permutation(examples) for _ in range(epochs)])
    gain = value[np.arange(epochs).repeat(examples), order]
    weight = generator.integers(1, 5, len(order)).astype(float) if weighted else np.where(order == silent, 0.0, 1.0)
    parts = [slice(first, first + batch) for first in range(0, len(order), batch)]
    batches = [(step, order[part], weight[part], gain[part]) for step, part in enumerate(parts)]
    return record(batches, examples=examples, targets=targets, ids=ids)


def noise(epochs=8, examples=EXAMPLES, targets=2, seed=0):
    return np.random.default_rng(seed).normal(size=(epochs, examples, targets))


def make(value=None, *, manifest=MANIFEST, **kwargs):
    names = ("burn_in", "scale", "confidence")
    own = {name: kwargs.pop(name) for name in names if name in kwargs}
    observations = observe(noise() if value is None else value, **kwargs)
    return InfluenceReport.from_observations(observations, manifest, **own)


FEWER = Shuffling(4, ((0.01, 0.01),) * 200, (4,) * 200)  # less noise than independent draws have


@pytest.fixture
def report():
    return make(weighted=True)


@pytest.fixture
def known():
    """One target; examples 3 and 5 help, 7 and 8 harm."""
    value = noise(targets=1, epochs=20) * 0.5
    value[:, [3, 5, 7, 8], 0] += np.array([4, 3, -3, -4])
    return make(value, targets=("a",))


@pytest.fixture
def training_set():
    """In another order than the report, with one row more."""
    ids = np.random.default_rng(5).permutation(EXAMPLES + 1) + 100
    columns = {
        "key": (ids, Value("int64")),
        "topic": ([int(i) % 3 for i in ids], ClassLabel(names=["sport", "law", "art"])),
        "poisoned": ([bool(i < 104) for i in ids], Value("bool")),
        "note": ([None if i % 2 else f"[bold]{i}" for i in ids], Value("string")),
        "words": ([[1, 2] for _ in ids], [Value("int64")]),
        "image": ([PILImage.new("L", (8, 8), int(i)) for i in ids], Image()),
    }
    features = Features({name: feature for name, (_, feature) in columns.items()})
    return Dataset.from_dict({name: values for name, (values, _) in columns.items()}, features=features)


# The table


def test_rows_are_examples_by_target(report):
    estimates = report.observations.example_mu()
    table = report.dataset
    assert table.column_names == list(module.COLUMNS)
    assert table["sample_id"][:] == [*range(100, 120)] * 2
    assert table["target"][:] == ["a"] * 20 + ["b"] * 20
    assert table["n_observations"][:] == [8] * 40
    for column, values in (("mu", estimates.mu), ("mu_low", estimates.low), ("mu_high", estimates.high)):
        np.testing.assert_allclose(table[column][:], values.T.ravel())
    z = np.concatenate([z_scores(estimates.mu[:, 0]), z_scores(estimates.mu[:, 1])])
    np.testing.assert_allclose(table["z"][:], z)


def test_mu_of_two_steps_by_hand():
    value = np.array([[[3.0], [1.0]], [[4.0], [0.0]]])
    report = make(value, targets=("a",), batch=2)
    # δ of an example in a batch of two is half its distance from the other; σ² of a step is (3 − 1)²/4 and (4 − 0)²/4.
    assert report.dataset["mu"][:] == pytest.approx([3 / math.sqrt(5), -3 / math.sqrt(5)])
    assert report.sigma == {"a": pytest.approx(math.sqrt(5))}


def test_scale_multiplies_sigma(report):
    scaled = InfluenceReport.from_observations(report.observations, MANIFEST, scale=2.0)
    for name in ("mu", "mu_low", "mu_high"):
        np.testing.assert_allclose(2 * np.array(scaled.dataset[name][:]), report.dataset[name][:])
    np.testing.assert_allclose(scaled.dataset["z"][:], report.dataset["z"][:])
    assert scaled.sigma["b"] == pytest.approx(2 * report.sigma["b"])
    for method, factor in zip(METHODS, (2, 2, 1, 1, 1), strict=True):
        groups = [one.group([100, 101, 102], "a", method)[0] for one in (report, scaled)]
        for name in ("mu", "mu_low", "mu_high"):
            assert factor * groups[1][name] == pytest.approx(groups[0][name])


def test_burn_in_leaves_out_the_first_steps(report):
    late = InfluenceReport.from_observations(report.observations, MANIFEST, burn_in=8)
    estimates = report.observations.since(8).example_mu()
    np.testing.assert_allclose(late.dataset["mu"][:], estimates.mu.T.ravel())
    assert late.dataset["n_observations"][:] == [6] * 40
    assert late.group([100], "a")["mu"][0] == pytest.approx(late.dataset["mu"][0])
    assert len(late.observations.steps.step) == 32  # all of them are kept


# Single examples


def test_top(known, report):
    assert known.top(2)["sample_id"][:] == [103, 105]
    assert known.top(2, harmful=True)["sample_id"][:] == [108, 107]
    everything = known.top(99)
    assert len(everything) == EXAMPLES
    assert everything["mu"][:] == sorted(known.dataset["mu"][:], reverse=True)
    for target in "ab":
        top = report.top(3, target)
        assert set(top["target"][:]) == {target}
        assert top["mu"][0] == max(report.select(target=target)["mu"][:])


def test_top_per_token():
    """A mean over tokens: what a long example gains a little in counts for more than what a short one gains much in."""
    gain, tokens = np.array([[6.0], [3], [1], [2]]), np.array([1.0, 9, 2, 3])
    report = InfluenceReport.from_observations(record([(0, np.arange(4), tokens, gain)], targets=("a",)), {})
    total = gain[:, 0] * tokens
    by_hand = total.sum() / 15 - (total.sum() - total) / (
        15 - tokens
    )  # the batch's gain, less what it is without each
    for per_token, values in ((False, by_hand), (True, by_hand / tokens)):
        assert report.top(4, per_token=per_token)["sample_id"][:] == (100 + np.argsort(-values)).tolist()
    assert report.top(2)["sample_id"][:] == [101, 100]
    assert report.top(2, per_token=True)["sample_id"][:] == [100, 101]
    assert report.top(1, harmful=True, per_token=True)["sample_id"][:] == [102]
    assert set(report.top(12, per_token=True)["sample_id"][4:]) == {*range(104, 112)}  # never seen


def test_examples_that_were_never_seen_come_last():
    observations = observe(noise(examples=10, targets=1), ids=list("abcdefghijkl"), targets=("a",))
    report = InfluenceReport.from_observations(observations, {})
    for harmful in (False, True):
        assert report.top(12, harmful=harmful)["sample_id"][-2:] == ["k", "l"]
    row = report.select(["k"])[0]
    assert all(math.isnan(row[name]) for name in ("mu", "mu_low", "mu_high", "z"))
    assert row["n_observations"] == 0
    assert len(report.select(min_mu=-1e9)) == 10
    assert not set(report.discoveries(0.99, side="both")["sample_id"][:]) & {"k", "l"}
    group = report.group({"never": ["k", "l"], "partly": ["a", "k"]})
    assert math.isnan(group["mu"][0])
    assert group["n_observations"][:] == [0, 8]
    assert group["n_examples"][:] == [2, 2]
    assert group["mu"][1] == pytest.approx(report.select(["a"])["mu"][0])
    assert report.summary().row_count == 12


def test_select(report):
    assert report.select([104, 101], "b")["sample_id"][:] == [104, 101]
    everything = report.select()
    assert everything["mu"][:] == report.dataset["mu"][:]
    mu, z = (np.array(report.dataset[name][:20]) for name in ("mu", "z"))
    assert report.select(target="a", min_mu=0.1, min_z=0.5)["mu"][:] == mu[(mu >= 0.1) & (z >= 0.5)].tolist()
    assert len(report.select(target="a", min_mu=1e9)) == 0


# Discoveries


def test_discoveries(known):
    for side, found in (("helpful", [103, 105]), ("harmful", [108, 107])):
        table = known.discoveries(0.05, side=side)
        assert table["sample_id"][:] == found
        p = stdtr(0.367 * 20, -np.array(known.dataset["z"][:]) * (1 if side == "helpful" else -1))
        q = dict(zip(known.dataset["sample_id"][:], benjamini_hochberg(p), strict=True))
        assert table["q_value"][:] == pytest.approx([q[i] for i in found])
    both = known.discoveries(side="both")
    assert sorted(both["sample_id"][:]) == [103, 105, 107, 108]
    assert np.abs(both["z"][:]).tolist() == sorted(np.abs(both["z"][:]), reverse=True)
    q = benjamini_hochberg(2 * stdtr(0.367 * 20, -np.abs(known.dataset["z"][:])))
    assert sorted(both["q_value"][:]) == pytest.approx(sorted(q)[:4])
    assert known.discoveries(1e-100)["sample_id"][:] == []


@pytest.mark.parametrize("side", ["helpful", "harmful", "both"])
def test_where_nothing_has_influence_discoveries_are_rare(side, monkeypatch):
    generator = np.random.default_rng(0)
    report = make(noise(2, 100, 1), targets=("a",))
    monkeypatch.setitem(report.__dict__, "_rows", lambda positions, target: positions)  # no table, for speed
    monkeypatch.setattr(module, "_with_columns", lambda rows, *_: rows)
    any_found = 0
    for _ in range(200):
        z = module._z_scores(generator.normal(3, 2, 100))
        monkeypatch.setitem(report.__dict__, "_values", lambda column, target, z=z: z)
        any_found += len(report.discoveries(0.1, side=side)) > 0
    assert any_found / 200 < 0.1 + 3 * math.sqrt(0.1 * 0.9 / 200)


def test_false_discoveries_among_true_ones():
    """Over runs whose gains are noise (NumPy's draws, always the same) but for a tenth of the examples."""
    shares = []
    for seed in range(8):
        value = noise(20, 300, 1, seed)
        value[:, :30] += 1.2
        found = make(value, targets=("a",), batch=20, seed=seed).discoveries(0.2)["sample_id"][:]
        assert len(found) >= 20
        shares.append(sum(i >= 130 for i in found) / len(found))
    assert np.mean(shares) < 0.2


def test_bad_settings(report):
    def remake(**change):
        return InfluenceReport.from_observations(report.observations, MANIFEST, **change)

    one_of = r"^target=.*: must be one of 'a', 'b'$"
    for call, message in (
        (partial(remake, burn_in=32), r"^burn_in=32: leaves no steps \(the last one observed is 31\)$"),
        (partial(remake, burn_in=-1), r"^burn_in=-1: "),
        (partial(remake, scale=0.0), r"^scale=0.0: must be positive"),
        (partial(remake, scale=math.nan), r"^scale=nan: must be positive"),
        (partial(remake, confidence=95), r"^confidence=95: must be strictly between 0 and 1"),
        (partial(report.discoveries, 5, "a"), r"^level=5: must be strictly between 0 and 1$"),
        (
            partial(report.discoveries, target="a", side="up"),
            r"^side='up': must be one of 'helpful', 'harmful', 'both'$",
        ),
        (partial(report.top, 0, "a"), r"^k=0: must be at least 1$"),
        (partial(report.group, [100], "a", "magic"), "^method='magic': must be one of 'accumulated'"),
        (partial(report.group, [100], "a", confidence=0), "confidence=0: "),
        (partial(report.group, [100], "a", n_resamples=0), "n_resamples=0: "),
        (partial(report.group, [100], "a", block_length=99), "block_length=99: "),
        # several targets: which one is to be said
        (partial(report.top, 3), one_of),
        (report.discoveries, one_of),
        (partial(report.plot, "x.png"), one_of),
        (partial(report.top, 3, "c"), one_of),
        (partial(report.select, target="c"), one_of),
        (partial(report.group, [100], ["a", "c"]), one_of),
        (partial(report.summary, target="c"), one_of),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# Groups


def test_group_of_one_is_its_example(report):
    groups = report.group({str(i): [i] for i in range(100, 120)})
    assert groups["target"][:] == report.dataset["target"][:]
    np.testing.assert_allclose(groups["mu"][:], report.dataset["mu"][:])
    assert groups["n_observations"][:] == [8] * 40


def test_group_by_hand():
    """Two steps of four; the group is the first two examples, in step 0 with the others, in step 1 split."""
    first, second = np.array([[4.0], [2.0], [0.0], [-2.0]]), np.array([[5.0], [1.0], [3.0], [3.0]])
    batches = [(0, np.arange(4), np.ones(4), first), (1, np.array([0, 4, 5, 6]), np.ones(4), second)]
    report = InfluenceReport.from_observations(record(batches, examples=7, targets=("a",)), {})
    # Step 0: 1 − (−1) = 2, step 1: 3 − 7/3 = 2/3; variances (9+1+1+9)/3/4 and (4+4)/3/4.
    sigma = math.sqrt(20 / 12 + 8 / 12)
    found = report.group({"first": [100, 101]})[0]
    assert found["mu"] == pytest.approx((2 + 2 / 3) / sigma)
    assert (found["n_examples"], found["n_observations"]) == (2, 2)
    assert math.isnan(found["mu_low"])  # two steps leave nothing to resample


@pytest.mark.parametrize("method", METHODS)
def test_groups_are_estimated_by_estimate_mu(method, report):
    observations = replace(report.observations, shuffling=FEWER)
    report = InfluenceReport.from_observations(observations, MANIFEST)
    members = {"x": [103, 107, 111], "y": [119]}
    found = report.group(members, "b", method, confidence=0.8, n_resamples=300, block_length=4, seed=5)
    for index, ids in enumerate(members.values()):
        signal = observations.group_signals([np.array(ids) - 100])[0, :, 1]
        gain = observations.steps.mean[:, 1]
        steps = np.isin(observations.steps.step, observations.step[np.isin(observations.example, np.array(ids) - 100)])
        sigma = {}
        if method in ("accumulated", "composed"):
            steps[:] = True
            known = observations.variance if method == "accumulated" else observations.independent_variance
            assert (observations.variance < observations.independent_variance).all()
            sigma = {"sigma": np.sqrt(known[:, 1])}
        settings = {"confidence": 0.8, "n_resamples": 300, "block_length": 4, "seed": 5, "method": method, **sigma}
        expected = estimate_mu(gain[steps], (gain - signal)[steps], statistic="gain", **settings)
        row = found[index]
        estimates = row["mu"], row["mu_low"], row["mu_high"]
        assert estimates == pytest.approx((expected.mu, expected.low, expected.high))
        assert row["mu_low"] <= row["mu"] <= row["mu_high"] or method == "composed"
    assert found["group"][:] == ["x", "y"]


def test_many_groups_are_worked_off_in_parts(report, monkeypatch):
    members = {str(i): [i, 119] for i in range(100, 107)}
    expected = report.group(members, ["b", "a"])
    monkeypatch.setattr("hf_unlearn.influence.report.groups.SIGNALS_AT_ONCE", 150)
    for name, values in report.group(members, ["b", "a"]).to_dict().items():
        assert values == (pytest.approx(expected[name][:]) if name.startswith("mu") else expected[name][:])
    assert expected["target"][:] == ["b"] * 7 + ["a"] * 7
    assert report.group(members, "a")["mu"][:] == pytest.approx(expected["mu"][7:])


def test_bootstrap_covers_the_noise_of_the_sum():
    """The spread of μ over runs of pure noise, and the width of one run's interval."""
    runs = [
        make(noise(60, 40, 1, seed), targets=("a",), batch=20, seed=seed).group(range(100, 110)) for seed in range(60)
    ]
    mu, low, high = (np.array([run[name][0] for run in runs]) for name in ("mu", "mu_low", "mu_high"))
    # NumPy's draws, always the same; over other seeds a standard deviation of 60 runs varies by 9 %.
    assert (high - low).mean() / (2 * 1.96) == pytest.approx(mu.std(), rel=0.25)
    assert ((low <= 0) & (high >= 0)).mean() > 0.85


def test_examples_without_predictions_are_not_seen():
    report = make(noise(6, 20, 1), targets=("a",), silent=4)
    found = report.group({"silent": [104], "other": [105]})
    assert found["n_observations"][:] == [0, 6]
    assert math.isnan(found["mu"][0])
    assert math.isnan(report.select([104])["mu"][0])


def test_groups_seen_in_few_steps_have_no_estimate_of_two_samples():
    report = make(noise(3, 20, 1), targets=("a",))
    for method in METHODS:
        row = report.group([100], method=method)[0]
        assert math.isnan(row["mu"]) == (method in ("gaussian", "auc", "max_abs"))
        assert row["n_observations"] == 3


@pytest.mark.parametrize(
    ("by", "message"),
    [
        ([100, 999], r"^group 'group': no sample has id 999; this run's look like 100$"),
        ({"x": [100], "y": ["100"]}, r"^group 'y': no sample has id '100'"),
        ([100, 101, 100], r"^group 'group': id 100 occurs twice; name every sample once$"),
        ([], r"^group 'group': is empty; a group needs at least one sample id$"),
        ({"x": [100], "y": []}, r"^group 'y': is empty"),
        ({}, r"^by: no groups"),
        ({1: [100], "1": [101]}, r"^by: two groups are called '1'; give each a name of its own$"),
        ({"x": "100"}, r"^group 'x': '100' is one text; pass a list of sample ids$"),
        ("topic", r"^by='topic': is not a joined column \(the report has none yet\); attach it with join\(\)$"),
        ("mu", r"^by='mu': is not a joined column"),
    ],
)
def test_bad_groups(by, message, report):
    with pytest.raises(ValueError, match=message) as caught:
        report.group(by, "a")
    assert "\n" not in str(caught.value)


# Columns of the training data


def test_join_matches_by_id_and_groups_by_value(report, training_set):
    first = report.join(training_set.shuffle(seed=1), "key", ["topic", "poisoned"])
    joined = first.join(training_set, "key", ["note", "words"])
    for row in joined.dataset:
        assert row["topic"] == row["sample_id"] % 3
        assert row["poisoned"] == (row["sample_id"] < 104)
    assert joined.dataset["mu"][:] == report.dataset["mu"][:]
    found = joined.group("topic", "b")
    assert found["group"][:] == ["sport", "law", "art"]
    expected = report.group({str(topic): [i for i in range(100, 120) if i % 3 == topic] for topic in range(3)}, "b")
    assert found["mu"][:] == pytest.approx(expected["mu"][:])
    assert joined.group("poisoned", "a")["n_examples"][:] == [16, 4]
    assert joined.group("note", "a")["n_examples"][:] == [1] * 10  # rows without a value are in no group
    assert joined.top(3, "a").column_names[-4:] == ["topic", "poisoned", "note", "words"]
    with pytest.raises(ValueError, match=r"^by='words': holds list values"):
        joined.group("words", "a")
    with pytest.raises(
        ValueError, match=r"^by='key': is not a joined column \(the report has topic, poisoned, note, words\)"
    ):
        joined.group("key", "a")
    assert report.dataset.column_names == list(module.COLUMNS)


def test_values_that_name_no_group_of_their_own(report):
    """No NaN equals another; class −1 is how datasets write that there is none, and no name for the last class."""
    ids = report.observations.sample_ids.tolist()
    values = [float("nan") if row % 3 == 0 else 0.5 if row % 3 == 1 else None for row in range(len(ids))]
    classes = ClassLabel(names=["cat", "dog"])
    features = Features({"key": Value("int64"), "score": Value("float64"), "animal": classes})
    data = Dataset.from_dict(
        {"key": ids, "score": values, "animal": [row % 3 - 1 for row in range(len(ids))]}, features
    )
    joined = report.join(data, "key", ["score", "animal"])
    for column, names in (("score", ["0.5", "nan"]), ("animal", ["-1", "cat", "dog"])):
        groups = joined.group(column, "a", n_resamples=5)
        assert groups["group"][:] == names
        assert sum(groups["n_examples"][:]) == sum(value is not None for value in data[column][:])
    shown = joined.summary(len(ids), "a")
    assert {"cat", "dog", "-1"} <= set(shown.columns[-1]._cells)
    sets = target_sets_of(data.rename_column("animal", "target"))
    assert {name: len(rows) for name, rows in sets.items()} == {
        n: len(ids) // 3 + (k < len(ids) % 3) for k, n in enumerate(("-1", "cat", "dog"))
    }


def test_bad_joins(report, training_set):
    dataset, few, texts = (
        training_set,
        training_set.select(range(15)),
        training_set.cast_column("key", Value("string")),
    )
    for arguments, message in (
        ((dataset, "id", "topic"), r"^column 'id' is not in the dataset \(it has key, topic"),
        ((dataset, "key", ["colour"]), r"^column 'colour' is not in the dataset"),
        ((dataset.rename_column("topic", "mu"), "key", "mu"), r"^columns: the report has a column 'mu' already"),
        ((dataset.select([0, 0]), "key", "topic"), r"^id_column='key': \d+ occurs twice$"),
        (
            (few, "key", "topic"),
            r"sample \d+ is not in the dataset \([56] of 20 are not\); is it a report from another",
        ),
        ((texts, "key", "topic"), r"^id_column='key': sample 100 is not in the dataset \(20 of 20"),
    ):
        with pytest.raises(ValueError, match=message):
            report.join(*arguments)


# Every example its own target


def test_self_report(tmp_path):
    observations, mu = of_themselves()
    report = InfluenceReport.from_observations(observations, {"run_id": "x"}, scale=2.0)
    assert report.dataset["mu"][:] == pytest.approx([value / 2 for value in mu])
    assert report.top(1)["sample_id"][:] == [2]
    assert math.isnan(report.sigma["self"])
    with pytest.raises(ValueError, match=r"^group: with target='self'"):
        report.group([0, 1])
    report.save_to_disk(tmp_path / "report")
    assert InfluenceReport.load_from_disk(tmp_path / "report").observations.is_self


# To look at


def test_summary(report, training_set):
    joined = report.join(training_set, "key", ["note", "topic", "words"])
    console = Console(file=io.StringIO(), width=200)
    console.print(joined.summary(k=3))
    text = console.file.getvalue()
    assert joined.summary(k=3).row_count == 2 * 2 * 3
    assert joined.summary(k=99, target="a").row_count == EXAMPLES  # each once
    best = joined.top(1, "a")[0]
    assert f"{best['mu']:+.3g}" in text
    assert "run-7" in text
    assert "[bold]" in text  # not taken for markup
    assert "sport" in text
    assert "No privacy guarantee." in " ".join(text.split())


def test_plots(report, training_set, tmp_path):
    joined = report.join(training_set, "key", ["topic", "image", "note"])
    for kind, settings in (
        ("ranked", {"highlight": [100, 104]}),
        ("ranked", {}),
        ("groups", {"by": "topic"}),
        ("groups", {"by": [100, 101], "method": "auc"}),
        ("tradeoff", {"by": "topic"}),
        ("examples", {"k": 5, "caption_column": "topic"}),
        ("examples", {"k": 3, "harmful": True, "caption_column": "note"}),
    ):
        path = joined.plot(tmp_path / "new" / f"{kind}.png", kind, target="b", **settings)
        assert path == tmp_path / "new" / f"{kind}.png"
        assert PILImage.open(path).size[0] > 100
    for kind, settings, message in (
        ("pie", {}, r"^kind='pie': must be one of 'ranked'"),
        ("groups", {}, r"^by: kind='groups' shows groups"),
        (
            "examples",
            {"image_column": "picture"},
            r"^column 'picture': is not in the report; attach it with join\(\)$",
        ),
        ("ranked", {"highlight": [7]}, r"^highlight: no sample has id 7"),
    ):
        with pytest.raises(ValueError, match=message):
            joined.plot(tmp_path / "x.png", kind, target="a", **settings)
    with pytest.raises(ValueError, match=r"^group 'group': is in 3 steps; a curve needs at least 4$"):
        make(noise(3)).plot(tmp_path / "x.png", "tradeoff", target="a", by=[100])


# To keep

LOADED = """
import json, sys
for name in [name for name in sys.modules if name.split(".")[0] == "trl"]:
    del sys.modules[name]  # whoever needs it would import it again
from hf_unlearn.influence.report.report import InfluenceReport
report = InfluenceReport.load_from_disk(sys.argv[1])
group = report.group("topic", "b")
print(json.dumps([report.dataset["mu"][:], group["mu_low"][:], group["group"][:], report.sigma, report.manifest, repr(report)]))
print([name for name in sys.modules if name.startswith(("trl", "hf_unlearn.influence.trainer"))])
"""


def test_saved_and_loaded_in_another_process(report, training_set, tmp_path):
    late = InfluenceReport.from_observations(report.observations, MANIFEST, burn_in=4, scale=1.5)
    joined = late.join(training_set, "key", ["topic", "image"])
    joined.save_to_disk(tmp_path / "report")
    found, heavy = run_python(LOADED, tmp_path / "report").stdout.splitlines()
    mu, low, groups, sigma, *others = json.loads(found)
    group = joined.group("topic", "b")
    first = [i for i in range(100, 120) if i % 3 == 0]
    assert group["mu"][0] == pytest.approx(late.group(first, "b")["mu"][0])
    assert group["mu"][0] != pytest.approx(report.group(first, "b")["mu"][0])
    assert mu == joined.dataset["mu"][:]
    assert low == pytest.approx(group["mu_low"][:])
    assert sigma == pytest.approx(joined.sigma)
    assert [groups, *others] == [group["group"][:], MANIFEST, repr(joined)]
    assert heavy == "[]"


def test_shuffling_is_saved(report, tmp_path):
    observations = replace(report.observations, shuffling=FEWER)
    late = InfluenceReport.from_observations(observations, MANIFEST)
    late.save_to_disk(tmp_path / "report")
    loaded = InfluenceReport.load_from_disk(tmp_path / "report")
    assert loaded.observations.shuffling == observations.shuffling
    assert loaded.sigma == pytest.approx(late.sigma)
    assert loaded.sigma["a"] < 0.9 * report.sigma["a"]


def test_a_report_replaces_a_report_and_nothing_else(report, known, tmp_path):
    folder = tmp_path / "report"
    folder.mkdir()
    known.save_to_disk(folder)
    loaded = InfluenceReport.load_from_disk(folder)
    loaded.save_to_disk(folder)  # what it is read from
    assert loaded.top(1)["sample_id"][:] == InfluenceReport.load_from_disk(folder).top(1)["sample_id"][:] == [103]
    report.save_to_disk(folder)
    assert InfluenceReport.load_from_disk(folder).targets == ("a", "b")
    assert os.listdir(tmp_path) == ["report"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_text("x")
    for place in (tmp_path / "mine", tmp_path / "mine" / "file"):
        with pytest.raises(ValueError, match=r"^folder=.*: holds something else than a report; choose another one$"):
            report.save_to_disk(place)
    assert os.listdir(tmp_path / "mine") == ["file"]


def test_a_report_that_could_not_be_written_is_not_there(report, tmp_path, monkeypatch):
    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(kept, "write_observations", full)
    with pytest.raises(OSError, match="no space left"):
        report.save_to_disk(tmp_path / "report")
    with pytest.raises(ValueError, match=r"^folder=.*: holds no influence report \(no report.json\)$"):
        InfluenceReport.load_from_disk(tmp_path / "report")
    monkeypatch.undo()
    report.save_to_disk(tmp_path / "report")
    assert os.listdir(tmp_path) == ["report"]
    marker = tmp_path / "report" / "report.json"
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "format": 2}))
    with pytest.raises(ValueError, match=r"^folder=.*: has another format, this version reads 1$"):
        InfluenceReport.load_from_disk(tmp_path / "report")
