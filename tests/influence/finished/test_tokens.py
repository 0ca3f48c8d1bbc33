"""`attribute_tokens`: one backward pass a token beside ours, what a report keeps of it, and what is refused."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from brute_force import QUIET, mlp, vectors
from datasets import Dataset

from hf_unlearn import FINEConfig, InfluenceReport, InfluenceTrainer, attribute, attribute_tokens
from hf_unlearn.influence.attribution import Attribution, finished_trainer
from hf_unlearn.influence.tokens import _directions, _pieces


TEXTS = [
    " The quick brown fox",
    " jumps over the lazy dog",
    " Paris — ça va?",
    " my order",
    " and Rome is the capital",
]
TARGETS = Dataset.from_list([{"prompt": "Who?", "completion": " The lazy dog", "target": "dog"},
                             {"prompt": "Where?", "completion": " Paris", "target": "city"}])  # fmt: skip


def rows_of(texts=TEXTS):
    return Dataset.from_list(
        [{"prompt": "Say it.", "completion": text, "id": f"t{row}"} for row, text in enumerate(texts)]
    )


@pytest.fixture
def given(tiny_llama, tokenizer, tmp_path):
    args = FINEConfig(
        output_dir=str(tmp_path / "a"), per_device_eval_batch_size=2, bf16=False, id_column="id", **QUIET
    )
    return {"args": args, "processing_class": tokenizer, "curvature_examples": 3}


@pytest.fixture
def report(tiny_llama, given):
    return attribute(tiny_llama, rows_of(), TARGETS, **given)


def by_brute_force(model, rows, given):
    """∇ of each token's loss by a backward pass of its own, times the target's direction: `{id: [C, predicted tokens]}`."""
    given = dict(given)
    count = given.pop("curvature_examples")
    with finished_trainer(model, rows, TARGETS, **given) as (trainer, looks):
        vectors_ = _directions(Attribution(trainer, looks, 0.1, count))
        parameters = [looks.ghost.covered[name] for name in vectors_]
        found = {}
        for sample_id, row in zip(trainer.sample_ids, looks.rows, strict=True):
            batch = trainer._collate([row])
            labels = batch["labels"][0, 1:]
            logits = trainer.model(input_ids=batch["input_ids"]).logits[0, :-1]
            losses = F.cross_entropy(logits, labels, reduction="none")
            scores = []
            for place in (labels != -100).nonzero()[:, 0].tolist():
                gradients = torch.autograd.grad(losses[place], parameters, retain_graph=True)
                scores.append([
                    sum((g * v[c]).sum() for g, v in zip(gradients, vectors_.values(), strict=True)).item()
                    for c in range(len(trainer.target_sets))
                ])  # fmt: skip
            found[sample_id] = np.array(scores).T / len(scores)
        return found, list(trainer.target_sets)


def test_each_token_is_a_backward_pass_of_its_own(tiny_llama, given, report):
    found = attribute_tokens(report, tiny_llama, rows_of(), TARGETS, ["t2", "t0", "t1"], **given)
    expected, targets = by_brute_force(tiny_llama, rows_of(), given)
    for sample_id in ("t0", "t1", "t2"):
        for c, target in enumerate(targets):
            tokens = found.tokens(sample_id, target)
            scores = tokens.scores[np.isfinite(tokens.scores)]
            np.testing.assert_allclose(scores, expected[sample_id][c], rtol=2e-4, atol=2e-4 * np.abs(scores).max())
            # They add up to the example's, by the passes of `attribute`.
            place = report.observations.sample_ids.tolist().index(sample_id)
            whole = report.observations.value[place, report.targets.index(target)]
            assert tokens.total == pytest.approx(whole, rel=1e-3, abs=1e-4 * np.abs(scores).max())
            assert tokens.top(1)[0][1] == scores.max()


def test_pieces_are_the_text_that_was_trained_on(tiny_llama, given, report):
    tokens = attribute_tokens(report, tiny_llama, rows_of(), TARGETS, ["t2"], **given).tokens("t2", "dog")
    assert "".join(tokens.pieces).startswith("Say it. Paris — ça va?")
    predicted = "".join(piece for piece, score in zip(tokens.pieces, tokens.scores, strict=True) if np.isfinite(score))
    assert predicted.startswith(" Paris — ça va?")
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(tokens.pieces)
    assert _pieces([3, 5], None) == ["3", "5"]


def test_of_the_ends_kept_and_shown(tiny_llama, given, report, tmp_path):
    joined = report.join(rows_of(), "id", "completion")
    found = attribute_tokens(joined, tiny_llama, rows_of(), TARGETS, k=1, **given)
    found.save_to_disk(tmp_path / "report")
    again = InfluenceReport.load_from_disk(tmp_path / "report")
    best, worst = again.top(1, "dog")["sample_id"][0], again.top(1, "dog", harmful=True)["sample_id"][0]
    for sample_id in (best, worst):
        kept, made = again.tokens(sample_id, "dog"), found.tokens(sample_id, "dog")
        assert kept.pieces == made.pieces
        np.testing.assert_array_equal(kept.scores, made.scores)
    other = ({"t0", "t1", "t2", "t3", "t4"} - {best, worst}).pop()
    with pytest.raises(
        ValueError, match=f"'{other}': its tokens are not known for target 'dog'; see attribute_tokens"
    ):
        again.tokens(other, "dog")

    text = again.to_html(tmp_path / "report.html", k=2).read_text()
    assert text.count("<article>") == 2 * 4
    assert "http" not in text
    shaded = re.findall(r'style="--much: (\d+)%" title="([-+][^"]+)"', text)
    assert max(int(much) for much, _ in shaded) == 100
    assert any(title.startswith("-") for _, title in shaded)
    # The texts of those whose tokens nobody looked at stand as they are.
    assert TEXTS[int(other[1])] in text


def test_texts_are_escaped(report, tmp_path):
    texts = [f"<script>{row}</script> & so on, at some length" for row in range(5)]
    page = report.join(rows_of(texts), "id", "completion").to_html(tmp_path / "a.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;3&lt;/script&gt; &amp; so on" in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample_ids": ["t0", "t9"]}, "sample_ids: 't9' is not in train_dataset"),
        ({"k": 0}, "k=0: must be ≥ 1"),
        ({"target_dataset": TARGETS.select([0])}, "target_dataset: has targets dog, the report has"),
    ],
)
def test_refused(change, message, tiny_llama, given, report):
    arguments = {"target_dataset": TARGETS} | given | change
    with pytest.raises(ValueError, match=re.escape(message)):
        attribute_tokens(report, tiny_llama, rows_of(), **arguments)


def test_classifiers_and_self_are_refused(tmp_path, tiny_llama, given):
    from hf_unlearn import InfluenceConfig

    args = InfluenceConfig(output_dir=str(tmp_path / "a"), **QUIET)
    targets = {"a": vectors(4, seed=1)}
    report = attribute(mlp(), vectors(9), targets, args=args, trainer_class=InfluenceTrainer)
    with pytest.raises(ValueError, match="predicts no tokens; only causal language models"):
        attribute_tokens(report, mlp(), vectors(9), targets, args=args)
    own = attribute(mlp(), vectors(9), target="self", args=args, trainer_class=InfluenceTrainer)
    with pytest.raises(ValueError, match="report: is of every example on itself"):
        attribute_tokens(own, mlp(), vectors(9), targets, args=args)
