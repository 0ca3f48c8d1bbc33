"""Against the definitions of TOFU, MUSE and open-unlearning, written out as loops over rows and tokens."""

import math
import zlib

import numpy as np
import pytest
import torch

from hf_unlearn.metrics.language import (
    answer_scores,
    choice_accuracy,
    exact_memorization,
    extraction_strength,
    forget_quality,
    mean_truth_ratio,
    membership_auc,
    model_utility,
    option_probability,
    privleak,
    rouge_l_f1,
    rouge_l_recall,
    truth_ratio,
    zlib_scores,
)


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(7, 9, 5, generator=generator)
    labels = torch.randint(5, (7, 9), generator=generator)
    for row, (start, end) in enumerate([(1, 9), (3, 8), (4, 6), (2, 9), (1, 5), (6, 7), (3, 9)]):
        labels[row, :start], labels[row, end:] = -100, -100
        right = start + (end - start) // 2  # the second half by heart
        for place in range(right, end):
            logits[row, place - 1, labels[row, place]] += 9
    return logits, labels


def answers(batch):
    """Of each row: log-probabilities `[tokens, vocabulary]` and tokens of its answer."""
    for logits, labels in zip(*batch, strict=True):
        places = [place for place, label in enumerate(labels.tolist()) if label != -100]
        yield torch.stack([logits[place - 1].log_softmax(-1) for place in places]), [int(labels[p]) for p in places]


def inner(log_p, tokens):
    return (log_p[:-1], tokens[:-1]) if len(tokens) > 1 else (log_p, tokens)


class TestAnswerScores:
    def test_likelihood(self, batch):
        scores = answer_scores(*batch)
        wanted = [-sum(float(row[t]) for row, t in zip(p, y, strict=True)) / len(y) for p, y in answers(batch)]
        torch.testing.assert_close(scores.nll, torch.tensor(wanted))
        torch.testing.assert_close(scores.probability, torch.tensor([math.exp(-value) for value in wanted]))

    def test_memorization_and_extraction(self, batch):
        scores = answer_scores(*batch)
        exact, strength = [], []
        for log_p, tokens in (inner(*answer) for answer in answers(batch)):
            guesses = log_p.argmax(-1).tolist()
            exact.append(sum(g == t for g, t in zip(guesses, tokens, strict=True)) / len(tokens))
            given = next((k for k in range(len(tokens)) if guesses[k:] == tokens[k:]), len(tokens))
            strength.append(1 - given / len(tokens))
        assert min(strength) == 0 < sorted(strength)[2] < max(strength)
        assert len(set(exact)) > 3
        torch.testing.assert_close(scores.exact_memorization, torch.tensor(exact))
        torch.testing.assert_close(scores.extraction_strength, torch.tensor(strength))
        choices = (batch[0].argmax(-1), batch[1])  # as a Trainer's evaluation has them
        torch.testing.assert_close(exact_memorization(*choices), torch.tensor(exact))
        torch.testing.assert_close(extraction_strength(*choices), torch.tensor(strength))

    @pytest.mark.parametrize("k", [0.2, 0.5, 1.0])
    def test_min_k(self, batch, k):
        scores = answer_scores(*batch, k=k)
        plain, plus = [], []
        for log_p, tokens in (inner(*answer) for answer in answers(batch)):
            number = max(1, int(len(tokens) * k))
            own = [float(row[token]) for row, token in zip(log_p, tokens, strict=True)]
            plain.append(-sum(sorted(own)[:number]) / number)
            moments = [(float((r.exp() * r).sum()), float((r.exp() * r**2).sum())) for r in log_p]
            normed = [
                (value - mean) / math.sqrt(max(square - mean**2, 1e-6))
                for value, (mean, square) in zip(own, moments, strict=True)
            ]
            plus.append(-sum(sorted(normed)[:number]) / number)
        torch.testing.assert_close(scores.min_k, torch.tensor(plain))
        torch.testing.assert_close(scores.min_k_plus_plus, torch.tensor(plus), rtol=1e-4, atol=1e-4)

    def test_padding_changes_nothing(self, batch):
        logits, labels = batch
        wide = answer_scores(
            torch.cat([torch.randn(7, 3, 5), logits, torch.randn(7, 2, 5)], 1),
            torch.cat([labels.new_full((7, 3), -100), labels, labels.new_full((7, 2), -100)], 1),
        )
        for name, value in vars(answer_scores(*batch)).items():
            torch.testing.assert_close(getattr(wide, name), value)

    def test_a_row_without_an_answer_is_named(self, batch):
        logits, labels = batch
        labels = labels.clone()
        labels[[2, 4]] = -100
        with pytest.raises(ValueError, match="no token counts in rows 2, 4"):
            answer_scores(logits, labels)


class TestFigures:
    def test_truth_ratio(self):
        ratio = truth_ratio([1.0, 2.0], [[1.0, 3.0], [0.5, 0.5]])
        np.testing.assert_allclose(ratio, [math.exp(-2) / math.exp(-1), math.exp(-0.5) / math.exp(-2)], rtol=1e-8)
        share = truth_ratio([1.0, 2.0], [[1.0, 3.0], [0.5, 0.5]], form="share")
        np.testing.assert_allclose(share, 1 / (1 + ratio), rtol=1e-8)
        assert mean_truth_ratio([0.5, 4.0], forgotten=True) == pytest.approx((0.5 + 0.25) / 2)
        assert mean_truth_ratio([0.5, 4.0], forgotten=False) == pytest.approx((0.5 + 0) / 2)

    def test_forget_quality_is_the_kolmogorov_smirnov_test(self):
        assert forget_quality([1.0, 2, 3, 4], [1.0, 2, 3, 4]) == 1
        # Two samples of n that do not overlap: 2 of the C(2n, n) orders are as extreme.
        assert forget_quality(range(6), range(10, 16)) == pytest.approx(2 / math.comb(12, 6))

    def test_utility_is_a_harmonic_mean(self):
        assert model_utility([0.5, 1.0, 0.25]) == pytest.approx(3 / (2 + 1 + 4))
        assert model_utility([0.5, 0.0]) == 0

    def test_rouge_counts_the_longest_common_subsequence(self):
        got = rouge_l_recall(
            ["The cat sat on a mat.", "", "größer als Öl", "b a"],
            ["the cat, on the mat", "a", "Größer ist Öl", "a b c"],
        )
        np.testing.assert_allclose(got, [4 / 5, 0, 2 / 3, 1 / 3], rtol=1e-6)
        # Of precision 4 / 6 and recall 4 / 5.
        np.testing.assert_allclose(
            rouge_l_f1(["The cat sat on a mat.", " "], ["the cat, on the mat", "a"]), [8 / 11, 0], rtol=1e-6
        )
        with pytest.raises(ValueError, match="answers: 1, but 2 references"):
            rouge_l_recall(["a"], ["a", "b"])

    def test_options(self):
        wanted = math.exp(-1) / (math.exp(-1) + math.exp(-2) + math.exp(-3))
        assert option_probability([1.0], [[2.0, 3.0]]) == pytest.approx(wanted)
        assert choice_accuracy([[-1.0, -2], [-5, -4], [-1, -3]], [0, 1, 1]) == pytest.approx(2 / 3)

    def test_membership(self):
        members, others = [0.1, 0.2, 0.9], [0.5, 0.8, 1.0, 0.9]
        pairs = [(m < o) + (m == o) / 2 for m in members for o in others]
        auc = membership_auc(members, others)
        assert auc == pytest.approx(sum(pairs) / len(pairs))
        assert privleak(auc, 0.5) == pytest.approx(((1 - auc) - 0.5) / 0.5 * 100)
        assert zlib_scores([3.0], ["abab"])[0] == pytest.approx(3 / len(zlib.compress(b"abab")))
