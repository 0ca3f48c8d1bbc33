"""What a user may get wrong with a GAN: one line that names the argument and the fix, and no model written."""

import datasets
import pytest
import torch
from gan_data import arguments, images, pipeline
from PIL import Image

from hf_unlearn import DCGANDiscriminator, GANConfig, GANPipeline, GANTrainer


@pytest.fixture
def check_refused(tmp_path):
    """Builds a trainer (and trains it) that must refuse, with `problem` as the beginning of what it says and `fix` behind."""

    def check_refused(problem, fix="", *, train=False, config=None, **given):
        def attempt():
            args = given.pop("args", None) or arguments(tmp_path / "out", **(config or {}))
            given.setdefault("train_dataset", images())
            trainer = GANTrainer(given.pop("model", None) or pipeline(), args, **given)
            if train:
                trainer.train()

        with pytest.raises(ValueError) as error:
            attempt()
        message = str(error.value)
        assert message.startswith(problem), message
        assert fix in message
        assert "\n" not in message
        assert len(message) < 300
        assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]

    return check_refused


class TestModel:
    def test_none(self, tmp_path):
        with pytest.raises(ValueError, match=r"^model: NoneType is no GANPipeline; pass GANPipeline\("):
            GANTrainer(args=arguments(tmp_path), train_dataset=images())

    def test_a_generator_alone(self, check_refused):
        check_refused("model: DCGANGenerator is no GANPipeline", "GANPipeline(", model=pipeline().generator)

    def test_no_such_folder(self, check_refused, tmp_path):
        check_refused("model=", "neither a folder with a GANPipeline", model=str(tmp_path / "nowhere"))
        (tmp_path / "empty").mkdir()
        check_refused("model=", "neither a folder with a GANPipeline", model=tmp_path / "empty")

    def test_another_pipeline_s_folder(self, check_refused, tiny_ddpm, tmp_path):
        tiny_ddpm.save_pretrained(tmp_path / "ddpm")
        check_refused("model=", "neither a folder with a GANPipeline", model=str(tmp_path / "ddpm"))

    def test_no_discriminator(self, check_refused):
        model = GANPipeline(pipeline().generator)
        check_refused("model: the pipeline has no discriminator", "GANPipeline(generator, discriminator)", model=model)

    @pytest.mark.parametrize(("size", "channels", "name"), [(9, 1, "sample_size"), (8, 3, "channels")])
    def test_players_that_do_not_fit(self, check_refused, size, channels, name):
        model = GANPipeline(pipeline().generator, DCGANDiscriminator(size, channels, base_channels=4))
        check_refused(f"model: the generator's {name} is", "must be equal", model=model)


class TestImages:
    def test_none(self, check_refused):
        check_refused("train_dataset: missing or empty", train_dataset=None)
        check_refused("train_dataset: missing or empty", train_dataset=images(0))
        check_refused("train_dataset: missing or empty", train_dataset=[])

    @pytest.mark.parametrize("argument", ["train_dataset", "eval_dataset"])
    def test_shape(self, check_refused, argument):
        for wrong, shape in ((images(4, size=9), "(1, 9, 9)"), (images(4, channels=3), "(3, 8, 8)")):
            check_refused(f"{argument}: an image has shape {shape}, the model's is (1, 8, 8)", **{argument: wrong})

    @pytest.mark.parametrize("argument", ["train_dataset", "eval_dataset"])
    def test_pictures(self, check_refused, argument):
        wide = [{"image": Image.new("L", (12, 8))}] * 4
        check_refused(f"{argument}: an image is 12 × 8, the model draws 8 × 8", "resize=True", **{argument: wide})
        colour = [{"image": Image.new("RGB", (8, 8))}] * 4
        check_refused(f"{argument}: images have 3 channels, the model has 1", "grey", **{argument: colour})

    def test_a_column_with_images(self, check_refused):
        rows = datasets.Dataset.from_dict({"picture": [Image.new("L", (8, 8))] * 4})
        check_refused("train_dataset: has no images", "pixel_values, image", train_dataset=rows)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_not_finite(self, check_refused, value):
        data = images()
        data[7, 0, 3, 3] = value
        check_refused("train_dataset: an image holds NaN or infinite pixels", "remove it", train_dataset=data)

    def test_another_range(self, check_refused):
        check_refused("train_dataset: pixel values reach 255", "[−1, 1]", train_dataset=torch.full((4, 1, 8, 8), 255))

    @pytest.mark.parametrize("row", [0, 7])
    def test_another_range_in_rows(self, check_refused, row):
        """Of a tensor as of a list, in the first row or a later one."""
        for form in (lambda x: x, lambda x: x.tolist()):
            rows = [{"pixel_values": form(image)} for image in images()]
            rows[row] = {"pixel_values": form(torch.full((1, 8, 8), 255.0))}
            check_refused("train_dataset: pixel values reach 255", train_dataset=rows, train=True)

    def test_evaluation_without_images(self, tmp_path):
        trainer = GANTrainer(pipeline(), arguments(tmp_path), train_dataset=images())
        with pytest.raises(ValueError, match="^eval_dataset: missing; evaluate"):
            trainer.evaluate()


class TestConfig:
    def test_another_config(self, check_refused, tmp_path):
        from transformers import TrainingArguments

        args = TrainingArguments(str(tmp_path / "out"), use_cpu=True)
        check_refused("args: GANTrainer needs GANConfig, got TrainingArguments", args=args)

    @pytest.mark.parametrize(
        ("values", "problem"),
        [
            ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps=2: two players take turns"),
            ({"fp16": True}, "fp16=True: the two players have one loss scaler; use bf16"),
            ({"r1_weight": -1.0}, "r1_weight=-1.0: must be ≥ 0"),
            ({"r1_weight": float("nan")}, "r1_weight=nan: must be ≥ 0"),
            ({"r1_every": 0}, "r1_every=0: must be ≥ 1"),
            ({"path_length_weight": -0.5}, "path_length_weight=-0.5: must be ≥ 0"),
            ({"path_length_every": 0}, "path_length_every=0: must be ≥ 1"),
            ({"discriminator_warmup": -1}, "discriminator_warmup=-1: must be ≥ 0"),
            ({"guard_steps": 0}, "guard_steps=0: must be ≥ 1"),
            ({"guard_samples": 15}, "guard_samples=15: must be ≥ 16"),
            ({"sample_batch_size": 0}, "sample_batch_size=0: must be ≥ 1"),
            ({"ema_decay": 1.0}, "ema_decay=1.0: must be in [0, 1)"),
            ({"ema_decay": -0.1}, "ema_decay=-0.1: must be in [0, 1)"),
            ({"collapse_tolerance": 0.0}, "collapse_tolerance=0.0: must be in (0, 1)"),
            ({"collapse_tolerance": 1.0}, "collapse_tolerance=1.0: must be in (0, 1)"),
            ({"push_to_hub": True, "hub_strategy": "every_save"}, "hub_strategy: uploads half-trained states"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
    )
    def test_out_of_range(self, check_refused, values, problem):
        check_refused(problem, config=values)

    def test_the_ends_of_the_ranges_are_allowed(self, tmp_path):
        GANConfig(
            str(tmp_path), use_cpu=True, r1_weight=0, ema_decay=0, path_length_weight=0, guard_samples=16, r1_every=1,
            push_to_hub=True, hub_strategy="end",
        )  # fmt: skip
