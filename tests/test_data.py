import copy
import datetime
import gzip
import hashlib
import json
import pickle

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import Subset
from transformers import ConvNextImageProcessor, DataCollatorWithPadding, ViTImageProcessor, default_data_collator

from hf_unlearn import data
from hf_unlearn.data import fingerprint
from hf_unlearn.examples import datasets as example_data
from hf_unlearn.training.collators import ForgetRetainDataset, NestedCollator, RawCollator


KEY = b"a private key"


def animals():
    features = Features({"id": Value("string"), "label": ClassLabel(names=["cat", "dog", "cow"]), "n": Value("int64")})
    rows = {"id": list("abcdef"), "label": [0, 1, 2, 1, 0, 1], "n": [5, 5, 7, 7, 9, 9]}
    return Dataset.from_dict(rows, features=features)


class TestDigits:
    def test_splits_are_always_the_same_stratified_and_cover_everything(self, digits):
        again = example_data.load("digits")
        assert {name: len(part) for name, part in digits.items()} == {"train": 1077, "validation": 270, "test": 450}
        assert sorted(i for part in digits.values() for i in part["id"]) == list(range(1797))
        for name, part in digits.items():
            assert again[name]["id"][:] == part["id"][:]
            assert np.abs(np.bincount(part["label"], minlength=10) / len(part) - 0.1).max() < 0.01

    def test_images_and_labels_are_scikit_learns(self, digits):
        source = load_digits()
        for part in digits.values():
            for row in part.select(range(0, len(part), 7)):
                assert row["label"] == source.target[row["id"]]
                pixels = np.asarray(row["image"])
                assert (pixels.shape, pixels.dtype) == ((8, 8), np.uint8)
                np.testing.assert_array_equal(np.rint(pixels.astype(float) * 16 / 255), source.images[row["id"]])


@pytest.mark.skipif(not example_data.FASHION_MNIST.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_fashion_mnist_of_the_package():
    clothes = example_data.load("fashion_mnist")
    assert {name: len(part) for name, part in clothes.items()} == {"train": 60_000, "test": 10_000}
    assert clothes["train"].features["label"].names[1] == "Trouser"
    for part in clothes.values():
        assert (np.bincount(part["label"]) == len(part) // 10).all()
    image = clothes["train"][0]["image"]
    assert (image.size, image.mode) == ((28, 28), "L")
    widths = {1: [], 8: []}  # images and labels belong together: trousers are narrow, bags are wide
    for row in clothes["test"].select(range(300)):
        if row["label"] in widths:
            widths[row["label"]].append((np.asarray(row["image"]) > 30).any(0).sum())
    assert np.mean(widths[1]) + 8 < np.mean(widths[8])


def test_fashion_mnist_in_its_own_format_and_of_the_hub_where_it_is_not_installed(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(example_data, "FASHION_MNIST", tmp_path / "nothing")
    monkeypatch.setattr("datasets.load_dataset", lambda name, config, revision: asked.append(name) or DatasetDict())
    example_data.load("fashion_mnist")
    assert asked == ["zalando-datasets/fashion_mnist"]
    monkeypatch.setattr(example_data, "FASHION_MNIST", tmp_path)
    array = np.arange(2 * 3 * 260, dtype=np.uint8).reshape(2, 3, 260)
    header = bytes([0, 0, 8, 3]) + np.array(array.shape, ">u4").tobytes()
    (tmp_path / "x.gz").write_bytes(gzip.compress(header + array.tobytes()))
    assert np.array_equal(example_data.read_idx("x.gz"), array)


class TestLoad:
    def test_folders(self, tmp_path, digits):
        few = DatasetDict({"train": digits["train"].select(range(3)), "test": digits["test"].select(range(2))})
        few.save_to_disk(tmp_path / "both")
        few["test"].save_to_disk(tmp_path / "one")
        for name, expected in (("both", few), ("one", {"train": few["test"]})):
            loaded = example_data.load(str(tmp_path / name))
            assert {k: v["id"][:] for k, v in loaded.items()} == {k: v["id"][:] for k, v in expected.items()}

    def test_images_in_folders_or_nothing(self, tmp_path):
        for name, grey in (("cat", 10), ("dog", 200)):
            (tmp_path / "images" / name).mkdir(parents=True)
            Image.new("L", (4, 4), grey).save(tmp_path / "images" / name / "0.png")
        loaded = example_data.load(str(tmp_path / "images"))["train"]
        names = loaded.features["label"].names
        assert {names[row["label"]]: row["image"].getpixel((0, 0)) for row in loaded} == {"cat": 10, "dog": 200}
        (tmp_path / "empty").mkdir()
        for name in ("nobody/has-such-a-dataset", str(tmp_path / "empty")):
            with pytest.raises(ValueError, match="dataset="):
                example_data.load(name)


class TestWrongLabels:
    @settings(deadline=None, max_examples=40)
    @given(st.integers(1, 60), st.floats(0, 1), st.integers(0, 99))
    def test_exactly_the_share_is_wrong_and_nothing_else_changes(self, n, share, seed):
        features = Features({"id": Value("string"), "label": ClassLabel(names=list("abcd")), "n": Value("int8")})
        labels = [(row * row + row // 5) % 4 for row in range(n)]
        rows = {"id": [f"row {row}" for row in range(n)], "label": labels, "n": [row % 7 for row in range(n)]}
        dataset = Dataset.from_dict(rows, features=features)
        changed = example_data.with_wrong_labels(dataset, share, seed=seed)
        assert sum(changed["wrong"]) == round(share * n)
        for before, after, wrong in zip(labels, changed["label"], changed["wrong"], strict=True):
            assert (after != before) == wrong
            assert 0 <= after < 4
        assert changed["id"][:] == rows["id"]
        assert changed["n"][:] == rows["n"]
        assert dict(changed.features) == {**features, "wrong": Value("bool")}
        assert dataset["label"][:] == labels
        assert dataset.column_names == ["id", "label", "n"]

    def test_a_function_of_the_seed(self, digits):
        def labels(seed):
            return tuple(example_data.with_wrong_labels(digits["test"], 0.2, seed=seed)["label"][:])

        assert labels(1) == labels(1)
        assert len({labels(seed) for seed in range(4)}) == 4
        assert labels(0) == tuple(example_data.with_wrong_labels(digits["test"], 0.2)["label"][:])

    def test_every_other_class_is_as_likely(self):
        n = 9000
        rows = Dataset.from_dict({"label": [row % 3 for row in range(n)], "n": range(n)})
        changed = example_data.with_wrong_labels(rows, 1.0)["label"][:]
        counts = np.bincount([3 * (row % 3) + label for row, label in enumerate(changed)], minlength=9).reshape(3, 3)
        assert np.diag(counts).tolist() == [0, 0, 0]
        off = counts[~np.eye(3, dtype=bool)]
        assert np.abs(off - n / 6).max() < 4 * (n / 3 / 4) ** 0.5  # four standard deviations of a fair coin

    def test_labels_that_do_not_count_from_zero_and_classes_that_do_not_occur(self):
        for name, labels in (("labels", [7, 2, 40, 7, 40, 2]), ("label", [-1, 5] * 3), ("label_ids", [3, 4] * 3)):
            changed = example_data.with_wrong_labels(
                Dataset.from_dict({"text": list("abcdef"), name: labels}), 0.5, seed=3
            )
            assert sum(changed["wrong"]) == 3
            assert set(changed[name]) <= set(labels)
            assert [a != b for a, b in zip(changed[name], labels, strict=True)] == changed["wrong"][:]
        cats = data.split_by_values(animals(), "label", ["cat"])[0].select([0, 1] * 25)
        assert set(example_data.with_wrong_labels(cats, 1.0)["label"]) == {1, 2}

    @pytest.mark.parametrize("form", [None, "torch"])
    def test_images_stay_images_in_every_format(self, digits, form):
        few = digits["train"].select([5, 3, 8, 1])
        changed = example_data.with_wrong_labels(few.with_format(form), 0.5).with_format(None)
        assert changed["id"][:] == few["id"][:]
        assert changed["label"][:] == example_data.with_wrong_labels(few, 0.5)["label"][:]
        assert changed.features["image"] == few.features["image"]
        assert all(a.tobytes() == b.tobytes() for a, b in zip(changed["image"], few["image"], strict=True))

    def test_bad_input(self):
        assert example_data.with_wrong_labels(Dataset.from_dict({"label": [0, 1]}), 1.0)["label"][:] == [1, 0]
        for dataset, share, message in (
            (animals().remove_columns("label"), 0.1, "the dataset has no label column; name it one of labels"),
            (example_data.with_wrong_labels(animals(), 0.1), 0.1, "the dataset has a column 'wrong' already"),
            (animals(), -0.5, "-0.5 is not a share"),
            (animals(), 1.5, "1.5 is not a share"),
            (Dataset.from_dict({"label": [1, 1]}), 0.5, "column 'label' has one class"),
        ):
            with pytest.raises(ValueError, match=f"^wrong_labels: {message}"):
                example_data.with_wrong_labels(dataset, share)


class TestSplits:
    @settings(deadline=None, max_examples=25)
    @given(st.lists(st.integers(0, 4), min_size=1, max_size=20), st.sets(st.integers(0, 4), min_size=1))
    def test_by_values_is_a_partition_in_order(self, column, values):
        dataset = Dataset.from_dict({"row": range(len(column)), "kind": column})
        if not values <= set(column):
            with pytest.raises(ValueError, match="forget_values"):
                data.split_by_values(dataset, "kind", sorted(values))
            return
        forget, retain = data.split_by_values(dataset, "kind", sorted(values))
        assert forget["row"][:] == [i for i, v in enumerate(column) if v in values]
        assert retain["row"][:] == [i for i, v in enumerate(column) if v not in values]

    def test_by_values_understands_class_names(self):
        for values in (["dog"], [1], ["dog", 1]):
            forget, retain = data.split_by_values(animals(), "label", values)
            assert forget["id"][:] == ["b", "d", "f"]
            assert retain["id"][:] == ["a", "c", "e"]
        forget, _ = data.split_by_values(animals(), "id", ["c", "a"])
        assert forget["id"][:] == ["a", "c"]
        forget, _ = data.split_by_values(animals().with_format("torch"), "label", [1])
        assert torch.stack(list(forget["n"][:])).tolist() == [5, 7, 9]

    def test_refuse_what_is_not_there(self):
        for split, arguments, message in (
            (data.split_by_values, ("colour", [1]), "column 'colour' is not"),
            (data.split_by_values, ("label", ["horse"]), "forget_values: 'horse' does not occur"),
            (data.split_by_values, ("label", [0, 3]), "forget_values: 3 does not occur"),
            (data.split_by_values, ("label", "dog"), "forget_values='dog': is one text"),
            (data.split_by_values, ("label", 2), r"forget_values=2: is no list; pass a list of values, as in \[2\]"),
            (data.split_by_ids, (["a", "z", "y"],), "forget_ids: 'y' is not in column 'id' .2 unknown"),
        ):
            with pytest.raises(ValueError, match=f"^{message}"):
                split(animals(), *arguments)
        with pytest.raises(ValueError, match="^dataset: has splits train, test; pass one of them"):
            data.split_by_values({"train": animals(), "test": animals()}, "label", [1])
        with pytest.raises(ValueError, match="sample_id"):
            data.split_by_ids(animals(), ["a"], column="sample_id")

    @settings(deadline=None, max_examples=25)
    @given(st.permutations(list(range(12))), st.sets(st.integers(0, 11)))
    def test_by_ids_is_a_partition_in_order(self, ids, chosen):
        forget, retain = data.split_by_ids(Dataset.from_dict({"id": ids}), iter(chosen))
        assert forget["id"][:] == [i for i in ids if i in chosen]
        assert retain["id"][:] == [i for i in ids if i not in chosen]

    def test_by_ids_takes_every_row_of_an_id(self):
        dataset = Dataset.from_dict({"person": ["ann", "bob", "ann", "eve"], "n": range(4)})
        forget, retain = data.split_by_ids(dataset, ["ann"], column="person")
        assert forget["n"][:] == [0, 2]
        assert retain["n"][:] == [1, 3]

    def test_overlap(self):
        forget, retain = data.split_by_ids(animals(), ["a", "c"])
        assert data.overlap(forget, retain, "id") is None
        assert data.overlap(forget, animals(), "id").startswith(
            "2 of its ids are in forget_dataset too (first: 'a' in column"
        )
        assert data.overlap(forget, animals().rename_column("n", "m"), "id").startswith("2 of its ids")
        assert data.overlap(forget, animals(), "nothing").startswith(
            "2 of its rows are in forget_dataset too (first: row 0)"
        )
        assert data.overlap(forget, animals().remove_columns("id"), "id").startswith("2 of its rows")  # by n and label
        assert data.overlap(forget, animals().rename_column("n", "m"), "nothing") is None

    def test_overlap_of_contents(self):
        """Without ids, or with row numbers for ids, whatever rows hold; where they come from does not matter."""
        pictures = [Image.new("L", (4, 4), shade) for shade in range(0, 120, 20)]
        draw = np.random.default_rng(0)
        kinds = {
            "image": pictures,
            "pixel_values": list(draw.random((6, 1, 3, 5), dtype=np.float32)),
            "text": list("abcdef"),
            "input_ids": [[1, 2], [1, 2, 0], [2, 1], [3], [4, 4], [5]],
            "messages": [[{"role": "user", "content": word}] for word in "abcdef"],
        }
        for name, values in kinds.items():
            whole = Dataset.from_dict({name: values, "source": ["web"] * 6, "label": [0, 1] * 3})
            forget, retain = whole.select([1, 4]), whole.select([0, 2, 3, 5])
            for ids in ("none", "numbers", "of the whole"):

                def numbered(rows, values, ids=ids):
                    return rows if ids == "none" else rows.add_column("id", list(values))

                two = numbered(forget, [1, 4] if ids == "of the whole" else range(2))
                four = numbered(retain, [0, 2, 3, 5] if ids == "of the whole" else range(4))
                assert data.overlap(two, four, "id") is None
                found = data.overlap(two, numbered(whole, range(6)).with_format("torch"), "id")
                assert found == "2 of its rows are in forget_dataset too (first: row 1)"
                relabelled = whole.remove_columns("label").add_column("label", [7] * 6)
                assert data.overlap(two, numbered(relabelled, range(6)), "id") is None
            # Row numbers may be texts, and begin anywhere; they hide nothing.
            texts = numbered(forget, ["0", "1"], "texts"), numbered(retain, list("0123"), "texts")
            assert data.overlap(*texts, "id") is None
            later = numbered(whole, range(1, 7), "later")
            assert data.overlap(numbered(forget, [1, 2], "later"), later, "id") == found
            # Numbers out of two splits, with gaps, are no ids; the same row under the same number is one.
            two, three = numbered(forget, [4, 9], "gaps"), numbered(retain.select([0, 1, 2]), [4, 9, 11], "gaps")
            assert data.overlap(two, three, "id") is None
            same = numbered(whole.select([5, 4]), [4, 9], "gaps")
            assert data.overlap(two, same, "id") == "1 of its ids are in forget_dataset too (first: 9 in column 'id')"

    def test_overlap_of_parts(self):
        rows = [{"x": torch.zeros(2), "labels": 1}] * 6
        forget, within = Subset(rows, [0, 2, 4]), Subset(Subset(rows, [5, 4, 3, 2]), [0, 1, 3])
        assert data.overlap(forget, within, "id") == "2 of its rows are in forget_dataset too"
        assert data.overlap(forget, rows, "id") == "3 of its rows are in forget_dataset too"
        assert data.overlap(forget, Subset(rows, [1, 3]), "id") is None
        assert data.overlap(forget, Subset([*rows], [0]), "id") is None  # another dataset

    def test_labels(self, digits):
        assert data.label_column(digits["train"]) == "label"
        assert data.labels_of(animals()) == [0, 1, 2, 1, 0, 1]
        assert data.labels_of(animals().with_format("torch")) == [0, 1, 2, 1, 0, 1]
        assert data.label_column(animals().remove_columns("label")) is None
        rows = [{"x": 0, "labels": torch.tensor(4)}, {"x": 1, "labels": torch.tensor(2)}]
        assert data.label_column(rows) == "labels"
        assert data.labels_of(rows) == [4, 2]


class TestForgetRetainDataset:
    @settings(deadline=None, max_examples=40)
    @given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 1000), st.integers(0, 50))
    def test_pairs_are_a_function_of_seed_and_epoch_and_use_retain_rows_evenly(self, forget, retain, seed, epoch):
        def pairs(*epochs):
            dataset = ForgetRetainDataset(range(forget), range(100, 100 + retain), seed=seed)
            for e in epochs:
                dataset.set_epoch(e)
            return [dataset[row] for row in range(len(dataset))]

        rows = pairs(epoch)
        assert rows == pairs(3, 1, epoch)
        assert [row["forget"] for row in rows] == list(range(forget))
        counts = np.bincount([row["retain"] - 100 for row in rows], minlength=retain)
        assert len(counts) == retain
        assert counts.max() - counts.min() <= 1

    def test_pairs_change_with_epoch_and_seed(self):
        def partners(seed, epoch):
            dataset = ForgetRetainDataset(range(30), range(30), seed=seed)
            dataset.set_epoch(epoch)
            return tuple(dataset[row]["retain"] for row in range(30))

        assert len({partners(seed, epoch) for seed in range(3) for epoch in range(4)}) == 12
        rounds = [row["retain"] for row in map(ForgetRetainDataset(range(60), range(30)).__getitem__, range(60))]
        assert rounds[:30] != rounds[30:]

        dataset = ForgetRetainDataset(["a", "b"])  # without retain data
        dataset.set_epoch(5)
        assert [dataset[0], dataset[1], len(dataset)] == [{"forget": "a"}, {"forget": "b"}, 2]


class TestCollators:
    def test_nested_parts_and_flat_rows(self, tiny_vit):
        collator = NestedCollator(default_data_collator)
        rows = [{"x": [1.0, 2.0], "label": 3}, {"x": [4.0, 5.0], "label": 6}]
        flat = collator(rows)
        assert flat["labels"].tolist() == [3, 6]
        nested = collator([{"forget": row, "retain": other} for row, other in zip(rows, rows[::-1], strict=True)])
        assert set(nested) == {"forget", "retain"}
        assert torch.equal(nested["forget"]["x"], flat["x"])
        assert torch.equal(nested["retain"]["x"], flat["x"].flip(0))
        assert set(collator([{"forget": rows[0]}])) == {"forget"}

    def test_nested_forwards_attributes_and_can_be_copied(self, tokenizer):
        collator = NestedCollator(DataCollatorWithPadding(tokenizer))
        assert collator.tokenizer is tokenizer
        with pytest.raises(AttributeError):
            collator.nothing  # noqa: B018
        rows = [{"forget": dict(tokenizer(text))} for text in ("a", "Paris is large")]
        expected = collator(rows)["forget"]
        for other in (pickle.loads(pickle.dumps(collator)), copy.copy(collator), copy.deepcopy(collator)):
            assert torch.equal(other(rows)["forget"]["input_ids"], expected["input_ids"])

    @pytest.mark.parametrize("processor_class", [ViTImageProcessor, ConvNextImageProcessor])
    def test_raw_images(self, processor_class, digits):
        size = {"height": 8, "width": 8} if processor_class is ViTImageProcessor else {"shortest_edge": 8}
        processor = processor_class(
            size=size, do_resize=False, image_mean=[0.5], image_std=[0.25], do_center_crop=False
        )
        rows = [digits["test"][row] for row in range(3)]
        batch = RawCollator(processor, "image")(rows)
        assert set(batch) == {"pixel_values", "labels"}
        assert batch["labels"].tolist() == [row["label"] for row in rows]
        pixels = torch.stack([torch.tensor(np.asarray(row["image"]) / 255, dtype=torch.float32) for row in rows])
        torch.testing.assert_close(batch["pixel_values"], ((pixels - 0.5) / 0.25).unsqueeze(1))

    def test_raw_texts(self, tokenizer, tiny_bert):
        texts = ["Paris is the capital of France", "no", ""]
        rows = [{"text": text, "labels": label} for label, text in enumerate(texts)]
        batch = RawCollator(tokenizer, "text", max_length=5)(rows)
        assert batch["labels"].tolist() == [0, 1, 2]
        for row, text in enumerate(texts):
            expected = tokenizer(text)["input_ids"][:5]
            length = batch["attention_mask"][row].sum()
            assert batch["input_ids"][row][:length].tolist() == expected
            assert (batch["input_ids"][row][length:] == tokenizer.pad_token_id).all()
        assert tiny_bert(**batch).logits.shape == (3, 3)
        whole = RawCollator(tokenizer, "text")([{"text": texts[0]}])
        assert set(whole) == {"input_ids", "attention_mask"}
        assert tokenizer.decode(whole["input_ids"][0]) == texts[0]


def sorted_items(row):
    return sorted(row.items())


class TestFingerprint:
    def test_does_not_depend_on_the_order_of_rows_or_columns_but_on_the_key(self, digits):
        few = digits["train"].select(range(12))
        value = fingerprint(few, KEY)
        assert len(bytes.fromhex(value)) == 32
        assert fingerprint(few.shuffle(seed=1), KEY) == value
        assert fingerprint(few.select_columns(["label", "image", "id"]), KEY) == value
        assert fingerprint([dict(reversed(row.items())) for row in few], KEY) == value
        assert fingerprint(few, KEY + b".") != value

    def test_every_change_shows(self, digits):
        rows = list(digits["train"].select(range(4)))
        pixels = np.asarray(rows[2]["image"]).copy()
        pixels[3, 3] += 1
        renamed = [{("class" if k == "label" else k): v for k, v in row.items()} for row in rows]
        variants = [
            rows,
            rows[:3],
            [*rows, rows[0]],
            [*rows, rows[1]],
            [*rows[:2], {**rows[2], "image": Image.fromarray(pixels)}, rows[3]],
            [*rows[:2], {**rows[2], "image": Image.fromarray(pixels.reshape(4, 16))}, rows[3]],
            [{**rows[0], "label": rows[0]["label"] + 1}, *rows[1:]],
            [{**rows[0], "label": str(rows[0]["label"])}, *rows[1:]],
            [{**rows[0], "label": None}, *rows[1:]],
            [{**rows[0], "more": None}, *rows[1:]],
            renamed,
            [],
        ]
        assert len({fingerprint(variant, KEY) for variant in variants}) == len(variants)

    VALUES = st.one_of(st.text(max_size=3), st.integers(-3, 3), st.none(), st.lists(st.integers(0, 2), max_size=2))
    ROWS = st.lists(st.dictionaries(st.sampled_from(["a", "b", "ab", "a\x00b"]), VALUES, max_size=3), max_size=3)

    @settings(deadline=None, max_examples=100)
    @given(first=ROWS, second=ROWS)
    def test_equal_exactly_when_the_rows_are(self, first, second):
        same = sorted(map(repr, map(sorted_items, first))) == sorted(map(repr, map(sorted_items, second)))
        assert (fingerprint(first, KEY) == fingerprint(second, KEY)) == same

    def test_values_that_look_alike_are_told_apart(self):
        def picture(colour, mode="P"):
            image = Image.new(mode, (2, 2), 0)
            if mode == "P":
                image.putpalette(colour)
            return image

        tensor, long, dot = torch.arange(6), np.zeros(2000), Image.new("L", (2, 2), 1)
        changed, dotted = long.copy(), dot.copy()
        changed[1000] = 1
        dotted.putpixel((0, 0), 2)
        views = [tensor, tensor.view(2, 3), tensor.view(3, 2), tensor + 1]
        groups = {
            "bytes cannot move between columns": [
                [{"a": np.frombuffer(b"abc"[:cut], np.uint8), "b": np.frombuffer(b"abc"[cut:], np.uint8)}] for cut in range(4)
            ],
            "nor between names and values": [
                [row] for row in ({"a": 12}, {"a1": 2}, {"a": 1, "b": 2}, {"a1b": 2}, {"a": "1", "b": 2}, {'a"1"b': 2})
            ],
            "what belongs together": [[{"x": 1, "y": 2}, {"x": 2, "y": 1}], [{"x": 1, "y": 1}, {"x": 2, "y": 2}]],
            "tensors of other shapes or types": [[{"x": v}] for v in (*views, tensor.int(), tensor[:5])],
            "scalars": [[{"x": torch.tensor(v)}] for v in (1, 2)],
            "arrays of other shapes": [[{"x": v.numpy()}] for v in views],
            "of other types, with the same bytes": [[{"x": np.zeros(2, kind)}] for kind in (np.int32, np.float32)],
            "arrays inside lists": [[{"x": [v]}] for v in (long, changed)],
            "images inside lists": [[{"x": [v]}] for v in (dot, dotted)],
            "palettes": [[{"x": picture(colour)}] for colour in ([255, 0, 0], [0, 0, 255])],
            "modes": [[{"x": picture(None, mode)}] for mode in ("L", "1")],
            "dates": [[{"x": datetime.date(2020, 1, day)}] for day in (1, 2)],
            "bytes and texts": [[{"x": b"a"}], [{"x": "a"}], [{"x": b"b"}]],
        }  # fmt: skip
        for name, variants in groups.items():
            assert len({fingerprint(variant, KEY) for variant in variants}) == len(variants), name

    NUMBERS = st.one_of(
        st.integers(), st.floats(), st.booleans(), st.sampled_from([0.0, -0.0, 1, 1.0, True, 1e22, 10**22])
    )
    NESTED = st.recursive(
        st.one_of(NUMBERS, st.text(max_size=3), st.none()),
        lambda parts: st.lists(parts, max_size=4) | st.dictionaries(st.text(max_size=2), parts, max_size=2),
        max_leaves=12,
    )

    @settings(deadline=None, max_examples=200)
    @given(rows=st.lists(st.one_of(NESTED, st.lists(NUMBERS)), max_size=4))
    def test_digests_are_those_of_every_number_by_itself(self, rows):
        """They are published: what was written by an earlier version must be found again."""

        def joined(*parts):
            content = b"".join(len(part).to_bytes(8, "little") + part for part in parts)
            return hashlib.blake2b(content, key=KEY, digest_size=32).digest()

        def one(value):
            if isinstance(value, dict):
                return joined(b"dict", *(one(part) for name in sorted(value) for part in (name, value[name])))
            if isinstance(value, list):
                return joined(b"list", *map(one, value))
            return joined(b"json", json.dumps(value).encode())

        expected = hashlib.blake2b(b"".join(sorted(map(one, rows))), key=KEY, digest_size=32).hexdigest()
        assert fingerprint(rows, KEY) == expected

    def test_a_number_that_occurs_again_is_hashed_once(self, monkeypatch):
        hashed, digest = [], hashlib.blake2b
        monkeypatch.setattr(hashlib, "blake2b", lambda *args, **kwargs: hashed.append(1) or digest(*args, **kwargs))
        fingerprint([{"pixels": [[column % 7 for column in range(100)]] * 50}] * 3, KEY)
        assert len(hashed) == 7 + 3 * (50 + 1 + 1 + 1) + 1  # numbers; rows of pixels, pictures, names and rows; all

    def test_equal_values_in_other_memory_are_equal(self):
        transposed = torch.arange(6).view(2, 3).T
        for one, other in (
            (transposed, transposed.clone()),
            ([Image.new("L", (2, 2), 1)], [Image.new("L", (2, 2), 1)]),
        ):
            assert fingerprint([{"x": one}], KEY) == fingerprint([{"x": other}], KEY)

    def test_refuses_keys_and_values_that_it_cannot_take(self):
        for rows, key in (([{"x": 1}], b""), ([{"x": 1}], b"x" * 65), ([{"x": {1, 2}}], KEY)):
            with pytest.raises(ValueError, match="key|fingerprint"):
                fingerprint(rows, key)
