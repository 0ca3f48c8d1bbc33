"""Every run ends with a sentence on what became of what was to be forgotten; what went wrong is warned of and in the card."""

import logging
import re

import pytest
import torch
from image_data import arguments, images
from language_data import TEXTS, masked, nll, padding, settings

from hf_unlearn import PBUConfig, PBUTrainer, UnlearnTrainer
from hf_unlearn.unlearning.outcome import Outcome


@pytest.fixture
def ended(capsys, caplog):
    """Trains, and returns the line of the run and the warnings of what did not pass."""

    def ended(trainer):
        with caplog.at_level(logging.WARNING, "hf_unlearn"):
            trainer.train()
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(type(trainer).__name__)]
        warned = [record.getMessage() for record in caplog.records if record.name == "hf_unlearn.training.outcome"]
        assert warned == [f"not passed: {failed}" for failed in trainer.failed_checks]
        (line,) = lines
        return line

    return ended


def taught(model, rows):
    """The model, with the rows by heart."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(60):
        loss = sum(nll(model, torch.tensor(row["input_ids"]), torch.tensor(row["labels"])) for row in rows)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def figures(model, rows):
    """`(share known word for word, mean loss)`, one text at a time."""
    known, losses = [], []
    for row in rows:
        ids, labels = torch.tensor(row["input_ids"]), torch.tensor(row["labels"])
        said = model(input_ids=ids[None]).logits[0, :-1].argmax(-1)
        known.append(torch.equal(said[labels[1:] != -100], labels[1:][labels[1:] != -100]))
        losses.append(nll(model, ids, labels).item())
    return sum(known) / len(known), sum(losses) / len(losses)


class TestTexts:
    """Without a target, by figures taken one text at a time."""

    @pytest.mark.parametrize(("rate", "guard"), [(1e-4, True), (0.02, False)])
    def test_as_likely_as_before_is_never_silent(self, rate, guard, tiny_llama, tokenizer, tmp_path, ended):
        rows = masked(TEXTS, tokenizer)
        before = figures(taught(tiny_llama, rows), rows)
        args = settings(tmp_path, learning_rate=rate, guard=guard, forget_loss="uniform", max_steps=4)
        trainer = UnlearnTrainer(tiny_llama, args, data_collator=padding(tokenizer), forget_dataset=rows)
        line, after = ended(trainer), figures(tiny_llama, rows)
        assert (before[0], after[0]) == (1, float(guard))
        outcome = trainer.outcome
        assert (outcome.original["known"], outcome.original["loss"]) == pytest.approx(before, rel=1e-4)
        assert (outcome.now["known"], outcome.now["loss"]) == pytest.approx(after, rel=1e-4)
        assert f"{100 * after[0]:.1f} % of the forget texts are answered word for word (100.0 % before)" in line
        assert ("kept is step 4" in line) == guard
        said = (
            f"What was to be forgotten is as likely as before: a loss of {after[1]:.3g} nats, {before[1]:.3g} before."
        )
        assert trainer.failed_checks == ([said] if guard else [])
        card = trainer.model_card(tmp_path).content
        assert all(failed in card for failed in trainer.failed_checks)
        assert f"| Forget texts known word for word | forget set | 100.00 % | {100 * after[0]:.2f} % |" in card

    def test_most_of_it_known_word_for_word(self, tiny_llama, tokenizer, tmp_path):
        trainer = UnlearnTrainer(tiny_llama, settings(tmp_path), forget_dataset=masked(TEXTS, tokenizer))
        for known, loss, failures in ((0.5, 1.0, 1), (0.4, 1.0, 0), (0.0, 0.2, 1), (0.0, 0.21, 0)):
            trainer.outcome = Outcome({"known": known, "loss": loss}, {"known": 0.8, "loss": 0.1}, float("inf"))
            assert len(trainer.failed_checks) == failures


class TestClassifiers:
    def test_the_paper_s_objective_is_judged_without_a_guard(self, tiny_resnet, tmp_path, ended):
        """By accuracy over all forget images, or as many as a guard would look at; utility by retained data where there are some."""
        said = tiny_resnet(pixel_values=images(40, [3])["pixel_values"][:]).logits.argmax(-1).tolist()
        rows = images(40, [said[0]])
        share = sum(label == said[0] for label in said) / 40
        args = PBUConfig.paper(
            str(tmp_path), learning_rate=0.0, max_steps=1, bn="frozen", use_cpu=True, report_to="none"
        )
        trainer = PBUTrainer(tiny_resnet, args, forget_dataset=rows)
        line = ended(trainer)
        assert trainer.outcome.remembered == pytest.approx(share - 0.01)
        assert (
            f"{100 * share:.1f} % of the forget examples are answered right ({100 * share:.1f} % before, target 1.0 %)"
            in line
        )
        assert "what was lost elsewhere is not known" in line
        (failed,) = trainer.failed_checks
        assert failed.startswith(
            f"The forget target was not reached: {share - 0.01:.3g} accuracy on the forget set are missing; what"
        )
        assert f"{100 * share:.2f} % | {100 * share:.2f} % |" in trainer.model_card(tmp_path).content

    def test_utility_without_a_guard(self, tiny_vit, tmp_path, ended):
        retain = images(30, [6, 7], seed=1)

        def accuracy():
            with torch.no_grad():
                logits = tiny_vit(pixel_values=retain["pixel_values"][:]).logits
            return (logits.argmax(-1) == retain["labels"][:]).float().mean().item()

        before = accuracy()
        args = arguments(tmp_path, learning_rate=0.5, forget_loss="uniform", guard=False)
        trainer = UnlearnTrainer(tiny_vit, args, forget_dataset=images(8, [3]), retain_dataset=retain)
        line = ended(trainer)
        assert trainer.outcome.utility_drop == pytest.approx(before - accuracy(), abs=1e-6)
        assert (
            f"accuracy on what is kept {100 * accuracy():.3g}% ({100 * before:.3g}% before, tolerance 2 points)"
            in line
        )

    def test_a_destroyed_model(self, tiny_vit, tmp_path, ended):
        args = arguments(tmp_path, learning_rate=1e30, forget_loss="ascent", guard=False, max_steps=3)
        trainer = UnlearnTrainer(tiny_vit, args, forget_dataset=images(8, [3]))
        assert "nan" in ended(trainer)
        assert trainer.failed_checks[0] == "The model is destroyed: its loss on the forget set is not finite."
        assert re.search(r"\bnan\b", trainer.model_card(tmp_path).content) is None
