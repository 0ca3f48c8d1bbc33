import pytest
import torch
from datasets import Dataset

from hf_unlearn.audit.classifiers.data import Part, classifier_data
from hf_unlearn.audit.classifiers.relearning import RelearnForget, RelearnRetained, drawn, in_pieces


def labelled(labels, begin=0):
    rows = torch.arange(begin, begin + len(labels))
    return Dataset.from_dict({"pixel_values": rows.view(-1, 1, 1, 1).float().numpy(), "label": labels}).with_format(
        "torch"
    )


def read(forget, retain, test, **settings):
    given = {"num_labels": 4, "processing_class": None, "size": "standard", "seed": 0} | settings
    return classifier_data(labelled(forget), labelled(retain, 1000), labelled(test, 2000), **given)


class TestParts:
    def test_classes_that_no_retained_row_has_were_to_be_forgotten(self):
        data = read([1] * 6 + [3] * 2, [0, 2] * 5, [0, 1, 2, 3, 3])
        assert (data.classes, data.forgotten) == ((1, 3), "classes 1, 3")
        assert data.is_forgotten.tolist() == [False, True, False, True]
        assert data.sizes == {"forget": 8, "retain": 10, "test_forget": 3, "test_retain": 2}
        assert data.test_forget.labels.tolist() == [1, 3, 3]
        assert data.test_forget.inputs["pixel_values"].flatten().tolist() == [2001, 2003, 2004]

    def test_else_single_examples_were(self):
        data = read([1] * 6, [0, 1] * 5, [0, 1, 2])
        assert (data.classes, data.forgotten) == ((), "6 examples")
        assert data.sizes["test_forget"] == 0
        assert data.sizes["test_retain"] == 3

    def test_a_limit_draws_by_the_seed(self, monkeypatch):
        monkeypatch.setattr("hf_unlearn.audit.classifiers.data.EXAMPLES", {"standard": 5, "quick": 3})
        one, same, other = (
            read([1] * 20, [0] * 20, [0, 1], seed=seed).forget.inputs["pixel_values"] for seed in (0, 0, 1)
        )
        assert len(one) == 5
        assert torch.equal(one, same)
        assert not torch.equal(one, other)
        assert len(read([1] * 20, [0] * 20, [0, 1], size="quick").forget) == 3

    def test_texts_of_other_lengths_are_joined(self):
        one = Part({"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.ones(1, 2).long()}, torch.tensor([0]))
        two = Part(
            {"input_ids": torch.tensor([[7, 8, 9]]), "attention_mask": torch.ones(1, 3).long()}, torch.tensor([1])
        )
        both = one + two
        assert both.inputs["input_ids"].tolist() == [[5, 6, 0], [7, 8, 9]]
        assert both.inputs["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]

    def test_the_digest_is_of_all_rows(self):
        data, same, other = (read([1] * 6, [0, 2], labels) for labels in ([0, 1], [0, 1], [1, 0]))
        assert data.digest == same.digest != other.digest

    def test_a_label_that_the_model_does_not_have(self):
        with pytest.raises(ValueError, match="test: has label 7, but the model has 4 classes"):
            read([1], [0], [7])


class TestWhatIsRelearned:
    def data(self):
        return read([1] * 21, [0] * 30 + [2] * 10, [0] * 4 + [1] * 5)

    def test_no_row_is_shown_and_asked_about(self):
        shown, asked = RelearnForget().halves(self.data(), seed=0)
        of = [set(part.inputs["pixel_values"].flatten().tolist()) for part in (shown, asked)]
        assert (len(shown), len(asked)) == (11, 10 + 5)
        assert not of[0] & of[1]
        assert of[0] | of[1] == set(range(21)) | {2004, 2005, 2006, 2007, 2008}

    def test_all_are_asked_about_where_none_is_shown(self):
        shown, asked = RelearnRetained().halves(self.data(), seed=0)
        assert (len(shown), len(asked)) == (0, 21 + 5)

    def test_batches_take_every_row_once_before_one_again(self):
        batch = drawn(self.data().forget, 7, 0, 1)
        rows = [batch(step).inputs["pixel_values"].flatten().tolist() for step in range(20)]
        for begin in range(0, 18, 3):
            assert sorted(sum(rows[begin : begin + 3], [])) == list(range(21))
        assert rows[0] != rows[3]

    def test_in_pieces_nothing_is_left_but_the_numbers(self):
        generator = torch.Generator().manual_seed(0)
        images = torch.arange(2 * 3 * 8 * 8).float().view(2, 3, 8, 8)
        broken = in_pieces(images, generator)
        assert broken.shape == images.shape
        assert torch.equal(broken.flatten(1).sort(1).values, images.flatten(1))
        assert (broken == images).float().mean() < 0.1
        mask = torch.tensor([[1, 1, 0]])
        assert in_pieces(mask, generator) is mask
