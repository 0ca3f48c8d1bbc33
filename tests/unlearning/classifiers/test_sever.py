import copy
import logging

import pytest
import torch
from image_data import images, weights
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForImageClassification

from hf_unlearn import PBUConfig, PBUTrainer, UnlearnConfig, UnlearnTrainer
from hf_unlearn.examples.classifier import digits_model, digits_processor, predict
from hf_unlearn.training.losses import cross_entropy
from hf_unlearn.unlearning.classifiers.sever import WEIGHT, Sever, close_rows, severed
from hf_unlearn.unlearning.forget_loss import ForgetLoss, Match, Redirect


QUIET = {"report_to": "none", "use_cpu": True, "disable_tqdm": True}
KEPT = [c for c in range(10) if c != 3]


def logits(model, rows):
    return torch.as_tensor(predict(model, digits_processor(), rows)).double()


def odds(values):
    """Log-odds of every class to all that are kept."""
    return values - values[:, KEPT].logsumexp(-1, keepdim=True)


@pytest.fixture(scope="module")
def forgotten(digits_folder, digits_parts, tmp_path_factory):
    """A trainer after its run, and the original."""
    folder = tmp_path_factory.mktemp("closed")
    trainer = PBUTrainer(str(digits_folder), PBUConfig(str(folder), **QUIET), forget_dataset=digits_parts["forget"])
    trainer.train()
    return trainer, AutoModelForImageClassification.from_pretrained(digits_folder)


def test_features_of_other_classes_are_what_is_asked_for():
    """Of a net that was trained to the end: class means on the vertices of a simplex, and rows that point at them."""
    vertices = torch.eye(4) - 1 / 4
    score = 2 * vertices[1].dot(vertices[1]).item()
    far = severed(2 * vertices, vertices[[1]].expand(4, -1), score, 4)
    torch.testing.assert_close(far, torch.tensor([0, (score * 4 / 3) ** 2, 0, 0]), atol=1e-6, rtol=0)


def test_the_loss_of_a_step_is_redirect_s_and_that_of_features_by_hand(digits_folder, digits_parts, tmp_path):
    losses, rows = {}, digits_parts["forget"].select(range(16))
    for name in ("redirect", "sever"):
        trainer = PBUTrainer(
            str(digits_folder),
            PBUConfig(str(tmp_path / name), **QUIET, forget_loss=name, learning_rate=0.0, max_steps=1, guard=False),
            forget_dataset=rows,
        )
        trainer.train()
        (batch,) = trainer._batches(trainer.forget_dataset, None)
        losses[name] = trainer.forget_loss(trainer.model.eval(), batch).detach()
    model = AutoModelForImageClassification.from_pretrained(digits_folder).eval()
    features = model.resnet(batch["pixel_values"]).pooler_output.flatten(1)
    weight = model.classifier[-1].weight
    scores = features @ (weight[3] - weight.mean(0))
    assert trainer.forgetting.score == pytest.approx(scores.mean().item(), rel=1e-4)
    by_hand = WEIGHT * (scores + scores.mean() / 9) ** 2
    torch.testing.assert_close(losses["sever"] - losses["redirect"], by_hand, rtol=1e-3, atol=1e-2)


def test_features_do_not_point_at_the_class_any_more(forgotten, digits_parts):
    trainer, original = forgotten

    def scores(model, rows):
        inputs = digits_processor()(rows["image"][:], return_tensors="pt")
        with torch.no_grad():
            features = copy.deepcopy(model).eval().resnet(**inputs).pooler_output.flatten(1)
        return features @ trainer.forgetting.directions[3]

    was, now = (scores(model, digits_parts["forget"]).mean() for model in (original, trainer.model))
    others = scores(original, digits_parts["retain"])
    assert abs(now - others.mean()) < 2 * others.std()
    assert was - others.mean() > 4 * others.std()


@pytest.mark.parametrize("rows", [[3], [0, 4]])
def test_a_closed_row_is_the_mean_of_those_that_are_kept_and_lower(rows):
    torch.manual_seed(0)
    head, inputs = nn.Linear(7, 5), torch.randn(20, 7)
    before = head(inputs)
    close_rows(head, rows, 2.5)
    after, kept = head(inputs), [c for c in range(5) if c not in rows]
    assert torch.equal(after[:, kept], before[:, kept])
    for row in rows:
        torch.testing.assert_close(after[:, row], before[:, kept].mean(-1) - 2.5)


def test_the_label_gets_the_odds_that_the_original_gives_to_being_wrong(forgotten, digits_parts):
    trainer, original = forgotten
    was, now = (odds(logits(model, digits_parts["forget"])) for model in (original, trainer.model))
    wrong = -was.logsumexp(-1).mean()  # log of the probability of all other classes
    level = min(wrong, now[:, KEPT].amin(-1).mean())
    assert now[:, 3].mean() == pytest.approx(level.item(), abs=1e-4)
    torch.testing.assert_close(now[:, 3], now[:, KEPT].mean(-1) - trainer.forgetting.gap, rtol=0, atol=1e-4)
    assert f"{trainer.forgetting.gap:.3g} nats lower" in trainer.outcome_line


def test_it_is_saved_and_told(forgotten, digits_parts, tmp_path):
    trainer, _ = forgotten
    trainer.save_model(str(tmp_path))
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, digits_parts["forget"]), logits(trainer.model, digits_parts["forget"]))
    assert "closed_rows" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("closed", [True, False])
def test_training_on_other_classes_alone_brings_a_class_nearer_unless_it_is_closed(
    closed, digits_folder, digits_parts, tmp_path
):
    """As `relearn_retained` of an audit does."""
    loss = {} if closed else {"forget_loss": "redirect"}
    trainer = PBUTrainer(
        str(digits_folder), PBUConfig(str(tmp_path), **QUIET, **loss), forget_dataset=digits_parts["forget"]
    )
    trainer.train()
    assert trainer.forget_loss_name == ("sever" if closed else "redirect")
    before = odds(logits(trainer.model, digits_parts["forget"]))[:, 3].mean()
    model, inputs = trainer.model.eval(), digits_processor()(digits_parts["retain"]["image"][:], return_tensors="pt")
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    labels, generator = torch.tensor(digits_parts["retain"]["label"][:]), torch.Generator().manual_seed(0)
    for _ in range(20):
        rows = torch.randperm(len(labels), generator=generator)[:64]
        optimizer.zero_grad()
        cross_entropy(model(pixel_values=inputs["pixel_values"][rows]).logits, labels[rows]).mean().backward()
        optimizer.step()
    after = odds(logits(model, digits_parts["forget"]))[:, 3].mean()
    assert after < before if closed else after > before + 1


def test_a_second_run_does_not_open_it(forgotten, digits_parts, tmp_path):
    trainer, _ = forgotten
    model = copy.deepcopy(trainer.model)
    before = odds(logits(model, digits_parts["forget"]))[:, 3].mean()
    again = PBUTrainer(
        model, PBUConfig(str(tmp_path), **QUIET, max_steps=1), forget_dataset=digits_parts["forget"],
        processing_class=digits_processor(),
    )  # fmt: skip
    again.train()
    assert odds(logits(model, digits_parts["forget"]))[:, 3].mean() <= before + 1e-3


def unchanged(trainer, name="classifier.weight"):
    before = weights(trainer.model)[name].clone()
    trainer.train()
    assert getattr(trainer.forgetting, "gap", None) is None
    assert "nats lower" not in trainer.outcome_line
    return torch.equal(weights(trainer.model)[name], before)


def test_what_is_still_known_is_not_hidden(tiny_vit, tmp_path):
    known = tiny_vit(pixel_values=images(20, [3])["pixel_values"][:]).logits.argmax(-1).mode().values.item()
    rows = images(20, [known])
    args = PBUConfig(str(tmp_path), **QUIET, learning_rate=0.0, max_steps=1)
    assert unchanged(PBUTrainer(tiny_vit, args, forget_dataset=rows))


@pytest.mark.parametrize(
    ("given", "loss"),
    [({}, Sever), ({"forget_loss": "redirect"}, Redirect), ({"forget": "examples", "heldout_loss": 2.0}, Match)],
)
def test_rows_are_closed_for_a_class_only_and_by_no_other_loss(given, loss, tiny_vit, tmp_path):
    args = UnlearnConfig(str(tmp_path), **QUIET, **given)
    trainer = UnlearnTrainer(tiny_vit, args, forget_dataset=images(20, [3]))
    assert type(trainer.forgetting) is loss
    assert (loss.ended is not ForgetLoss.ended) == (loss is Sever)


# `forget_accuracy=0.99`: an untrained model counts as one that has forgotten.
EASY = {**QUIET, "learning_rate": 0.0, "max_steps": 1, "forget_accuracy": 0.99, "guard": False}


def test_a_head_that_is_not_trained_stays(tiny_vit, tmp_path):
    tiny_vit.classifier.requires_grad_(False)
    trainer = PBUTrainer(tiny_vit, PBUConfig(str(tmp_path), **EASY), forget_dataset=images(20, [3]))
    assert trainer.forget_loss_name == "redirect"
    assert unchanged(trainer)
    with pytest.raises(
        ValueError, match="sever': the model has no linear head with a bias that is trained; use 'redirect'"
    ):
        PBUTrainer(tiny_vit, PBUConfig(str(tmp_path), **EASY, forget_loss="sever"), forget_dataset=images(20, [3]))


def test_a_head_that_does_not_give_the_logits_stays(tiny_vit, tmp_path, caplog):
    """As of two heads whose mean is the answer."""

    def halve(module, inputs, output):
        output.logits = output.logits / 2
        return output

    tiny_vit.register_forward_hook(halve)
    args = PBUConfig(str(tmp_path), **EASY)
    with caplog.at_level(logging.WARNING, "hf_unlearn"):
        trainer = PBUTrainer(tiny_vit, args, forget_dataset=images(20, [3]))
        assert unchanged(trainer)
    assert "does not give the model's logits" in caplog.text
    assert trainer._chosen()["forget_loss"] == "redirect"


def test_the_head_of_an_adapter_is_its_own(tiny_vit, tmp_path):
    base = tiny_vit.classifier.weight.detach().clone()
    adapter = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["classifier"])
    args = PBUConfig(str(tmp_path), **EASY)
    trainer = PBUTrainer(tiny_vit, args, forget_dataset=images(20, [3]), peft_config=adapter)
    head = trainer.model.base_model.model.classifier
    trainer.train()
    assert trainer.forgetting.head is head.modules_to_save["default"]
    close_rows(trainer.forgetting.head, [3], 1.0)
    assert torch.equal(head.original_module.weight, base)
    torch.testing.assert_close(head.modules_to_save["default"].weight[3], base[KEPT].mean(0), rtol=0, atol=1e-6)


def test_16_bits_close_alike():
    """In 16 bits the row is rounded and still far below what counts as off."""
    model = digits_model(0)
    head = copy.deepcopy(model.classifier[-1]).to(torch.bfloat16)
    close_rows(head, [3], 4.5)
    expected = copy.deepcopy(model.classifier[-1])
    close_rows(expected, [3], 4.5)
    torch.testing.assert_close(head.weight[3].float(), expected.weight[3], rtol=2**-7, atol=2**-8)
