"""What a user may get wrong with an image classifier: one line that names the argument and the fix, and nothing written."""

import os
from pathlib import Path

import datasets
import pytest
import torch
from image_data import QUIET, arguments, images
from torch.utils.data import IterableDataset
from transformers import ResNetConfig, ResNetModel, TrainingArguments, ViTForMaskedImageModeling

from hf_unlearn import PBUConfig, PBUTrainer, UnlearnConfig, UnlearnSFTConfig, UnlearnTrainer
from hf_unlearn.examples.classifier import digits_processor


FORGET, RETAIN = images(4, [3]), images(4, [0, 1], seed=1)


class Endless(IterableDataset):
    def __iter__(self):
        yield {"pixel_values": torch.zeros(1, 16, 16), "labels": 3}


@pytest.fixture
def check_refused(tiny_resnet, tmp_path):
    """Builds a trainer that must refuse, with `problem` as the beginning of what it says and `fix` somewhere behind."""

    def check_refused(
        problem, fix, *, trainer_class=UnlearnTrainer, model=tiny_resnet, args=None, config=None, **data
    ):
        folder = tmp_path / "not" / "yet"

        def attempt():
            trainer_class(model, args or arguments(folder, **(config or {})), **({"forget_dataset": FORGET} | data))

        with pytest.raises(ValueError) as error:
            attempt()
        message = str(error.value)
        assert message.startswith(problem)
        assert fix in message
        assert "\n" not in message
        assert len(message) < 300
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]

    return check_refused


def with_labels(labels):
    return FORGET.remove_columns("labels").add_column("labels", labels)


class TestDatasets:
    def test_train_dataset(self, check_refused):
        check_refused("train_dataset: UnlearnTrainer learns to forget", "pass forget_dataset=", train_dataset=FORGET)
        check_refused("train_dataset: PBUTrainer", "forget_dataset=", trainer_class=PBUTrainer, train_dataset=FORGET,
                args=PBUConfig("unused", **QUIET))  # fmt: skip
        assert not Path("unused").exists()

    def test_forget_dataset_missing(self, check_refused):
        check_refused("forget_dataset: missing", "pass the examples", forget_dataset=None)

    def test_empty(self, check_refused):
        check_refused("forget_dataset: is empty", "nothing to forget", forget_dataset=FORGET.select([]))
        check_refused("retain_dataset: is empty", "nothing to retain", retain_dataset=RETAIN.select([]))
        check_refused("forget_dataset: is empty", "", forget_dataset=[])

    @pytest.mark.parametrize("name", ["forget_dataset", "retain_dataset"])
    def test_splits(self, name, check_refused):
        splits = datasets.DatasetDict({"train": RETAIN, "test": RETAIN})
        check_refused(f"{name}: has splits train, test", "pass one of them", **{name: splits})

    @pytest.mark.parametrize("name", ["forget_dataset", "retain_dataset"])
    def test_streaming(self, name, check_refused):
        check_refused(f"{name}: a streaming dataset", "make it a Dataset", **{name: RETAIN.to_iterable_dataset()})
        check_refused(f"{name}: a streaming dataset", "make it a Dataset", **{name: Endless()})
        splits = datasets.IterableDatasetDict({"train": RETAIN.to_iterable_dataset()})
        check_refused(f"{name}: has splits train", "pass one of them", **{name: splits})

    def test_overlap(self, check_refused):
        retain = datasets.concatenate_datasets([RETAIN, FORGET.select([2, 1])])
        check_refused(
            "retain_dataset: 2 of its ids are in forget_dataset too (first: 1", "remove", retain_dataset=retain
        )

    def test_keeping_rows_of_a_class_to_forget(self, check_refused):
        check_refused("retain_dataset: holds class 3", "forget='examples'", retain_dataset=images(4, [3, 1], seed=1))

    def test_heldout_data_is_checked_too(self, check_refused):
        examples = {"forget": "examples"}
        check_refused("heldout_dataset: is empty", "pass rows", config=examples, heldout_dataset=RETAIN.select([]))
        check_refused("heldout_dataset: 4 of its ids", "remove them", config=examples, heldout_dataset=FORGET)
        without = RETAIN.remove_columns("labels")
        check_refused("heldout_dataset: has no label column", "label", config=examples, heldout_dataset=without)

    def test_overlap_by_another_column(self, tiny_resnet, check_refused, tmp_path):
        forget, retain = (part.rename_column("id", "name") for part in (FORGET, with_labels([1] * 4)))
        data = {"forget_dataset": forget, "retain_dataset": retain}
        check_refused("retain_dataset: 4 of its ids", "'name'", config={"id_column": "name"}, **data)
        UnlearnTrainer(tiny_resnet, arguments(tmp_path), **data)  # nothing identifies the rows

    def test_no_label_column(self, check_refused):
        for dataset in (FORGET.remove_columns("labels"), FORGET.rename_column("labels", "class")):
            check_refused("forget_dataset: has no label column", "labels, label", forget_dataset=dataset)
        check_refused(
            "retain_dataset: has no label column", "rename_column", retain_dataset=RETAIN.remove_columns("labels")
        )

    @pytest.mark.parametrize("label", [10, -1, 99])
    def test_labels_outside(self, label, check_refused):
        check_refused(
            f"forget_dataset: label {label} is outside",
            "num_labels=10 (0…9)",
            forget_dataset=with_labels([3, 3, label, 3]),
        )
        retain = RETAIN.remove_columns("labels").add_column("labels", [0, label, 1, 1])
        check_refused(f"retain_dataset: label {label} is outside", "num_labels=10", retain_dataset=retain)

    def test_labels_missing_or_no_numbers(self, check_refused):
        check_refused("forget_dataset: label None", "", forget_dataset=with_labels([3, None, 3, 3]))
        check_refused(
            "forget_dataset: label 'three'", "class_encode_column", forget_dataset=with_labels(["three"] * 4)
        )
        check_refused("forget_dataset: label 0.5", "", forget_dataset=with_labels([0.5, 3.0, 3.0, 3.0]))
        check_refused("forget_dataset: label [0, 1]", "one integer", forget_dataset=with_labels([[0, 1]] * 4))

    def test_every_class_forgotten(self, check_refused):
        everything = images(20, list(range(10)))
        check_refused("forget_dataset: holds every class", "forget='examples'", forget_dataset=everything)

    def test_single_examples_without_a_target(self, check_refused):
        check_refused("heldout_dataset: missing", "heldout_loss=", config={"forget": "examples"})
        check_refused("forget_loss='match' needs a target", "heldout_dataset=", config={"forget_loss": "match"})

    def test_raw_images_without_a_processor(self, check_refused, digits):
        check_refused(
            "processing_class: the dataset holds raw images", "image processor", forget_dataset=digits["train"]
        )


class TestModels:
    def test_missing(self, check_refused):
        check_refused("model: missing", "pass a model", model=None)

    def test_without_a_head(self, check_refused):
        body = ResNetModel(
            ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
        )
        check_refused("model: ResNetModel takes no labels", "AutoModelFor…", model=body)

    def test_of_another_task(self, check_refused, tiny_vit):
        check_refused("model: ViTForMaskedImageModeling", "", model=ViTForMaskedImageModeling(tiny_vit.config))

    @pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
    def test_regression_and_several_labels(self, problem, check_refused, tiny_resnet):
        tiny_resnet.config.problem_type = problem
        check_refused(f"model: problem_type='{problem}' is not supported", "single-label")

    def test_a_class_of_a_causal_language_model(self, check_refused, tiny_llama):
        text = datasets.Dataset.from_dict({"input_ids": [[1, 5, 6, 2]] * 4, "labels": [[1, 5, 6, 2]] * 4})
        check_refused(
            "forget='class' needs a classifier", "use forget='examples'", model=tiny_llama, forget_dataset=text
        )

    def test_nothing_trainable(self, check_refused, tiny_resnet):
        check_refused("model: none of its parameters", "requires_grad_", model=tiny_resnet.requires_grad_(False))


class TestArguments:
    def test_of_the_wrong_class(self, check_refused, tmp_path):
        check_refused("args: UnlearnTrainer needs UnlearnConfig, got TrainingArguments", "",
                args=TrainingArguments(str(tmp_path / "a"), **QUIET))  # fmt: skip
        check_refused("args: PBUTrainer needs PBUConfig, got UnlearnConfig", "",
                trainer_class=PBUTrainer, args=UnlearnConfig(str(tmp_path / "a"), **QUIET))  # fmt: skip
        check_refused("args: UnlearnTrainer needs UnlearnConfig, got UnlearnSFTConfig", "",
                args=UnlearnSFTConfig(str(tmp_path / "a"), **QUIET, bf16=False))  # fmt: skip

    def test_several_gpus_in_one_process(self, check_refused, tmp_path):
        args = arguments(tmp_path / "out")
        assert args.n_gpu == 0
        args._n_gpu = 2
        check_refused("several GPUs in one process", "accelerate launch", args=args)

    @pytest.mark.parametrize("strategy", ["every_save", "checkpoint", "all_checkpoints"])
    def test_pushing_what_is_half_forgotten(self, strategy, check_refused):
        config = {"push_to_hub": True, "hub_strategy": strategy}
        check_refused(
            f"hub_strategy='{strategy}': uploads half-forgotten weights", "hub_strategy='end'", config=config
        )

    def test_what_would_be_ignored(self, check_refused):
        check_refused(
            "compute_loss_func: would be ignored", "override task_loss", compute_loss_func=lambda *a, **k: 0.0
        )
        check_refused("label_smoothing_factor: would", "override task_loss", config={"label_smoothing_factor": 0.1})

    def test_what_would_go_wrong_silently(self, check_refused):
        check_refused("load_best_model_at_end", "the guard", config={"load_best_model_at_end": True, "save_strategy": "epoch",
                "eval_strategy": "epoch"})  # fmt: skip
        workers = {"dataloader_persistent_workers": True, "dataloader_num_workers": 1}
        check_refused("dataloader_persistent_workers", "set it to False", config=workers, retain_dataset=RETAIN)

    def test_an_adapter_that_cannot_be_merged(self, check_refused):
        from peft import IA3Config

        adapter = IA3Config(target_modules=["convolution"], feedforward_modules=[])
        check_refused("merge_adapter=True: a IA3 adapter cannot be folded", "merge_adapter=False", peft_config=adapter)

    def test_pushing_at_the_end_is_the_default(self, tmp_path):
        assert UnlearnConfig(str(tmp_path), push_to_hub=True, **QUIET).hub_strategy == "end"

    @pytest.mark.parametrize(
        ("name", "values", "fix"),
        [
            ("forget", ["classes", ""], "'class' or 'examples'"),
            ("forget_loss", ["redirct", "Ascent"], "bounded, ascent, npo, redirect, uniform, match"),
            ("fisher", ["diagonal"], "'exact' or 'monte_carlo'"),
            ("bn", ["eval"], "'frozen' or 'train'"),
            ("forget_weight", [0.0, -1.0, float("nan")], "> 0"),
            ("npo_beta", [0.0], "> 0"),
            ("retain_weight", [-1.0], "≥ 0"),
            ("replay_weight", [-0.1], "≥ 0"),
            ("isotropic_weight", [-0.1, float("nan")], "≥ 0"),
            ("fisher_weight", [-0.1], "≥ 0"),
            ("utility_tolerance", [-0.1], "≥ 0"),
            ("fisher_samples", [0], "≥ 1"),
            ("fisher_examples", [0], "≥ 1"),
            ("guard_steps", [0], "≥ 1"),
            ("guard_examples", [0], "≥ 1"),
            ("guard_patience", [0], "≥ 1"),
            ("forget_accuracy", [-0.1, 1.0], "[0, 1)"),
        ],
    )
    def test_values_that_make_no_sense(self, name, values, fix, check_refused):
        for value in values:
            check_refused(f"{name}={value!r}", fix, config={name: value})

    def test_unknown_names(self, tmp_path):
        with pytest.raises(TypeError, match="forget_weigth"):
            UnlearnConfig(str(tmp_path), forget_weigth=1.0)


class TestOutput:
    def test_below_a_file(self, tiny_resnet, tmp_path):
        (tmp_path / "file").write_text("mine")
        for folder in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(ValueError, match="^output_dir: cannot write to .*choose another folder$"):
                UnlearnTrainer(tiny_resnet, arguments(folder), forget_dataset=FORGET)
        assert (tmp_path / "file").read_text() == "mine"

    def test_read_only(self, tiny_resnet, tmp_path):
        args = arguments(tmp_path)
        tmp_path.chmod(0o500)
        user = os.geteuid()
        if user == 0:  # who may write anywhere
            os.seteuid(65534)
        try:
            with pytest.raises(ValueError, match="^output_dir: cannot write to .*Permission denied"):
                UnlearnTrainer(tiny_resnet, args, forget_dataset=FORGET)
        finally:
            os.seteuid(user)

    def test_a_good_trainer_writes_nothing_before_it_trains(self, tiny_resnet, tmp_path):
        UnlearnTrainer(tiny_resnet, arguments(tmp_path), forget_dataset=FORGET, processing_class=digits_processor())
        assert not list(tmp_path.iterdir())
