"""What a user may get wrong with a diffusion pipeline: one line that names the argument and the fix, and no model written."""

import copy

import datasets
import pytest
import torch
from image_data import QUIET
from image_data import arguments as other_arguments
from PIL import Image
from vdu_data import PROMPTS, arguments, images, prompted_arguments, prompted_images, trained

from hf_unlearn import VDUConfig, VDUTrainer


@pytest.fixture
def check_refused(tiny_ddpm, tmp_path):
    """Builds a trainer (and trains it) that must refuse, with `problem` as the beginning of what it says and `fix` behind."""

    def check_refused(problem, fix="", *, train=False, make=arguments, config=None, args=None, tmp=tmp_path, **given):
        tmp.mkdir(exist_ok=True)
        there = set(tmp.rglob("*"))
        if not {"model", "pipeline"} & set(given):
            given["pipeline"] = copy.deepcopy(tiny_ddpm)

        def attempt():
            settings = args or make(tmp / "out", **(config or {}))
            if "forget_dataset" not in given and not settings.forget_prompts:
                given["forget_dataset"] = images()
            trainer = VDUTrainer(args=settings, **given)
            if train:
                trainer.train()

        with pytest.raises(ValueError) as error:
            attempt()
        message = str(error.value)
        assert message.startswith(problem), message
        assert fix in message
        assert "\n" not in message
        assert len(message) < 300
        written = {path for path in set(tmp.rglob("*")) - there if path.is_file()}
        # What the original has drawn is kept where only training can tell.
        assert not [path for path in written if not train or "_private" not in path.parts]

    return check_refused


def rows(*pictures):
    return datasets.Dataset.from_dict({"image": list(pictures)})


def settings(unet, **values):
    """What a denoiser like `unet` is made from."""
    return {name: value for name, value in unet.config.items() if not name.startswith("_")} | values


class TestImages:
    def test_size(self, check_refused):
        check_refused("forget_dataset: an image has shape (1, 16, 16), the model's is (1, 8, 8)",
                      forget_dataset=images(4, size=16))  # fmt: skip
        pictures = rows(Image.new("L", (8, 8)), Image.new("L", (12, 8)))
        check_refused(
            "forget_dataset: an image is 12 × 8, the model draws 8 × 8", "resize=True", forget_dataset=pictures
        )

    def test_channels(self, check_refused):
        check_refused("forget_dataset: an image has shape (3, 8, 8), the model's is (1, 8, 8)",
                      forget_dataset=images(4, channels=3))  # fmt: skip
        check_refused("forget_dataset: images have 3 channels, the model has 1", "grey",
                      forget_dataset=rows(Image.new("RGB", (8, 8))))  # fmt: skip

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_not_finite(self, check_refused, value):
        pixels = torch.zeros(3, 1, 8, 8)
        pixels[1, 0, 2, 2] = value
        data = [{"pixel_values": image} for image in pixels]
        check_refused("forget_dataset: an image holds NaN or infinite pixels", "remove it", forget_dataset=data)

    def test_another_range(self, check_refused):
        data = [{"pixel_values": torch.full((1, 8, 8), 255.0)}] * 2
        check_refused("forget_dataset: pixel values reach 255", "[−1, 1]; rescale them", forget_dataset=data)

    def test_missing(self, check_refused):
        check_refused("forget_dataset: has no images", "rename_column", forget_dataset=[{"pixels": 1.0}])
        check_refused("forget_dataset: row 1 has no image", "fill it in",
                      forget_dataset=rows(Image.new("L", (8, 8)), None))  # fmt: skip

    @pytest.mark.parametrize("argument", ["retain_dataset", "heldout_dataset", "replay_dataset"])
    def test_the_other_datasets_are_looked_at_too(self, check_refused, argument):
        check_refused(f"{argument}: an image has shape (1, 4, 4)", **{argument: images(4, size=4)})
        check_refused(f"{argument}: is empty", **{argument: images(4).select([])})

    def test_of_evaluation(self, check_refused):
        check_refused("eval_dataset['test']: an image has shape", eval_dataset={"test": images(4, size=4)})
        check_refused("eval_dataset['test']: is empty", eval_dataset={"test": images(4).select([])})

    def test_nothing_to_forget(self, check_refused):
        check_refused("forget_dataset: is empty", forget_dataset=images().select([]))
        check_refused("forget_dataset: missing", "pass the examples", forget_dataset=None)
        splits = datasets.DatasetDict({"train": images()})
        check_refused("forget_dataset: has splits train", "pass one of them", forget_dataset=splits)
        check_refused("train_dataset: VDUTrainer learns to forget", "forget_dataset=", train_dataset=images())


class TestPrompts:
    def test_missing(self, check_refused, tiny_stable_diffusion):
        check_refused("forget_dataset: prompts are missing for a prompted model", "prompt, text, caption",
                      pipeline=tiny_stable_diffusion, make=prompted_arguments,
                      forget_dataset=images(4, channels=3))  # fmt: skip

    def test_for_a_model_that_takes_none(self, check_refused):
        check_refused("forget_prompts: this model takes no prompts", "forget_dataset=",
                      config={"forget_prompts": PROMPTS})  # fmt: skip

    def test_beside_images(self, check_refused, tiny_stable_diffusion):
        check_refused("forget_dataset: given beside forget_prompts", "keep one", pipeline=tiny_stable_diffusion,
                      make=prompted_arguments, config={"forget_prompts": PROMPTS},
                      forget_dataset=prompted_images())  # fmt: skip

    def test_of_what_is_kept(self, check_refused, tiny_stable_diffusion):
        check_refused("replay_prompts: missing", "replay_samples=0", pipeline=tiny_stable_diffusion, train=True,
                      make=prompted_arguments, config={"replay_prompts": None},
                      forget_dataset=prompted_images())  # fmt: skip


class TestModels:
    def test_none_or_two(self, check_refused, tiny_ddpm):
        check_refused("pipeline: missing", "noise_scheduler=", pipeline=None)
        check_refused("model: given beside pipeline", "keep one", model=tiny_ddpm.unet, pipeline=tiny_ddpm)

    def test_without_a_scheduler(self, check_refused, tiny_ddpm):
        check_refused("noise_scheduler: missing", "the whole pipeline=", model=tiny_ddpm.unet)

    def test_a_scheduler_too_many(self, check_refused, tiny_ddpm):
        check_refused("noise_scheduler: the pipeline has its own", "leave it out", noise_scheduler=tiny_ddpm.scheduler)

    def test_a_prompted_denoiser_alone(self, check_refused, tiny_stable_diffusion):
        check_refused("model: a prompted denoiser needs its VAE and text encoder", "pipeline=",
                      model=tiny_stable_diffusion.unet, noise_scheduler=tiny_stable_diffusion.scheduler)  # fmt: skip

    def test_a_part_is_missing(self, check_refused, tiny_stable_diffusion):
        tiny_stable_diffusion.text_encoder = None
        check_refused("pipeline: StableDiffusionPipeline has no text_encoder", pipeline=tiny_stable_diffusion)

    def test_flow_matching(self, check_refused, tiny_ddpm):
        from diffusers import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler()
        check_refused("noise_scheduler: FlowMatchEulerDiscreteScheduler has no add_noise", "DDPMScheduler",
                      model=tiny_ddpm.unet, noise_scheduler=scheduler)  # fmt: skip
        tiny_ddpm.register_modules(scheduler=scheduler)
        check_refused("noise_scheduler: FlowMatchEulerDiscreteScheduler", pipeline=tiny_ddpm)

    def test_without_a_denoiser(self, check_refused, tiny_stable_diffusion):
        from diffusers import DiffusionPipeline

        class OnlyVAE(DiffusionPipeline):
            def __init__(self, vae):
                super().__init__()
                self.register_modules(vae=vae)

        check_refused(
            "pipeline: OnlyVAE has no unet to train (it has vae)", pipeline=OnlyVAE(tiny_stable_diffusion.vae)
        )

    def test_other_kinds(self, check_refused, tiny_resnet, tiny_stable_diffusion, tiny_ddpm):
        check_refused("model: ResNetForImageClassification is not supported", "UNet2DModel", model=tiny_resnet)
        check_refused("model: AutoencoderKL is not supported", "UNet2DModel", model=tiny_stable_diffusion.vae)
        check_refused("pipeline: dict is no pipeline of diffusers", "pass one", pipeline={})

    def test_classes(self, check_refused, tiny_ddpm):
        from diffusers import UNet2DModel

        classes = UNet2DModel(**settings(tiny_ddpm.unet, num_class_embeds=10))
        check_refused("model: its num_class_embeds=10 needs more than an image and a prompt", model=classes,
                      noise_scheduler=tiny_ddpm.scheduler)  # fmt: skip

    def test_more_channels_than_it_answers(self, check_refused, tiny_ddpm):
        from diffusers import UNet2DModel

        wide = UNet2DModel(**settings(tiny_ddpm.unet, out_channels=3))
        check_refused("model: it sees 1 channels and answers 3", model=wide, noise_scheduler=tiny_ddpm.scheduler)

    def test_folders(self, check_refused, tiny_resnet, tmp_path):
        with pytest.raises(
            ValueError, match="^pipeline='nobody/nothing': neither a folder with a pipeline nor an id .*$"
        ):
            VDUTrainer(pipeline="nobody/nothing", args=arguments(tmp_path / "out"), forget_dataset=images())
        (tmp_path / "empty").mkdir()
        check_refused(f"pipeline={str(tmp_path / 'empty')!r}: neither a folder", pipeline=str(tmp_path / "empty"))
        tiny_resnet.save_pretrained(tmp_path / "classifier")
        check_refused(f"model={str(tmp_path / 'classifier')!r}: its config names None", "UNet2DModel",
                      pipeline=str(tmp_path / "classifier"))  # fmt: skip

    def test_half_of_a_pipeline(self, check_refused, tiny_ddpm, tmp_path):
        folder = tmp_path / "half"
        tiny_ddpm.save_pretrained(folder)
        (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
        check_refused(f"pipeline={str(folder)!r}: neither a folder with a pipeline", pipeline=str(folder))


class TestTrainable:
    def test_a_pattern_that_fits_nothing(self, check_refused):
        check_refused("trainable: no parameter's name fits 'attention.*' (one is called 'conv_in.weight')",
                      config={"trainable": ["conv_in.*", "attention.*"]})  # fmt: skip
        check_refused("trainable: no parameter's name fits 'cross_attention'", config={"trainable": "cross_attention"})

    def test_lora(self, check_refused, tiny_stable_diffusion):
        check_refused("trainable: UNet2DModel takes no LoRA in diffusers", "patterns", config={"trainable": ["lora"]})
        prompted = {"make": prompted_arguments, "forget_dataset": prompted_images(), "pipeline": tiny_stable_diffusion}
        check_refused(
            "trainable=['lora', 'all']: 'lora' stands alone", config={"trainable": ["lora", "all"]}, **prompted
        )
        checkpoints = {"trainable": ["lora"], "stability_weight": 1.0, "checkpoints": ["a"]}
        check_refused("stability_weight: means nothing for LoRA", "isotropic_weight", config=checkpoints, **prompted)

    def test_an_adapter_is_there_already(self, check_refused, tiny_stable_diffusion):
        from peft import LoraConfig

        tiny_stable_diffusion.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
        check_refused("trainable: the model has an adapter already", "fuse it", config={"trainable": ["lora"]},
                      make=prompted_arguments, forget_dataset=prompted_images(), pipeline=tiny_stable_diffusion)  # fmt: skip


class TestCheckpoints:
    """Of the run that trained the model."""

    @pytest.fixture
    def saved(self, tiny_ddpm, tmp_path):
        def save(name, change):
            pipeline = copy.deepcopy(tiny_ddpm)
            with torch.no_grad():
                change(pipeline.unet)
            pipeline.unet.save_pretrained(tmp_path / name / "unet")
            return str(tmp_path / name)

        return save

    def refused(self, check_refused, problem, fix, checkpoints, **config):
        config = {"stability_weight": 1.0, "checkpoints": checkpoints} | config
        check_refused(problem, fix, train=True, config=config)

    def test_none(self, check_refused):
        check_refused("checkpoints: K = 0", "leave it out", config={"stability_weight": 1.0, "checkpoints": []})

    def test_not_there(self, check_refused, tmp_path):
        nowhere = str(tmp_path / "nowhere")
        self.refused(check_refused, f"checkpoints: {nowhere} is neither a folder nor a Hub model", "", [nowhere])

    def test_identical(self, check_refused, saved):
        paths = [saved(name, lambda unet: None) for name in "ab"]
        self.refused(check_refused, "checkpoints: all 2 hold the same parameters", "no variance", paths)

    def test_another_architecture(self, check_refused, saved, tiny_ddpm, tmp_path):
        from diffusers import UNet2DModel

        path = saved("a", lambda unet: unet.conv_in.weight.add_(1))
        UNet2DModel(**settings(tiny_ddpm.unet, block_out_channels=(8, 16))).save_pretrained(tmp_path / "b" / "unet")
        self.refused(check_refused, "checkpoints: ", "is of another architecture", [path, str(tmp_path / "b")])

    def test_unreadable(self, check_refused, saved, tmp_path):
        paths = [saved(name, lambda unet: unet.conv_in.weight.add_(1)) for name in "ab"]
        (tmp_path / "b" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
        self.refused(check_refused, f"checkpoints: {paths[1]}", "cannot be read", paths)

    def test_a_single_one_has_no_variance(self, check_refused, saved):
        path = saved("a", lambda unet: None)
        self.refused(check_refused, "checkpoints: K = 1 has no variance", "stability='fisher'", [path],
                     stability="inverse_variance")  # fmt: skip


class TestWhatIsKept:
    def test_everything_is_of_the_forgotten_kind(self, check_refused):
        check_refused("replay_samples: all 16 samples of the original are of the forgotten kind", "replay_filter",
                      train=True, replay_filter=lambda x: torch.ones(len(x), dtype=torch.bool))  # fmt: skip

    def test_the_forget_set_is_what_the_model_draws(self, tiny_ddpm):
        """Then nearly all samples are of its kind, which the next test is about, or all are, which the last one was."""
        from hf_unlearn.unlearning.diffusion.drawing import generate
        from hf_unlearn.unlearning.diffusion.own_samples import resembles

        forget, samples = (generate(tiny_ddpm, 64, seed=seed, num_inference_steps=2) for seed in (11, 12))
        assert resembles(samples, forget).float().mean() > 0.8

    @pytest.mark.parametrize(("marked", "warned"), [(12, False), (14, True)])
    def test_nearly_everything_is(self, tiny_ddpm, tmp_path, caplog, marked, warned):
        with caplog.at_level("WARNING", "hf_unlearn"):
            trained(tiny_ddpm, arguments(tmp_path, max_steps=1), replay_filter=lambda x: torch.arange(16) < marked)
        found = [
            record.getMessage() for record in caplog.records if record.getMessage().startswith("forget_dataset: ")
        ]
        assert len(found) == warned
        assert not warned or "88 % of what the original draws" in found[0]

    @pytest.mark.parametrize(
        "marks", [lambda x: torch.zeros(3, dtype=torch.bool), lambda x: torch.zeros(len(x)), lambda x: x[:, 0] > 0]
    )
    def test_a_filter_that_gives_something_else(self, check_refused, marks):
        check_refused("replay_filter: gave torch.", "for 16 images; it must mark", train=True, replay_filter=marks)

    def test_redirect_needs_it(self, check_refused):
        for name in ("redirect", "bounded"):
            check_refused("forget_loss='redirect' needs what is to be kept", "replay_samples",
                          config={"forget_loss": name, "replay_samples": 0})  # fmt: skip

    def test_so_does_the_guard(self, check_refused):
        check_refused("guard: has nothing to look at", "guard=False",
                      config={"guard": True, "forget_loss": "ascent", "replay_samples": 0})  # fmt: skip

    def test_match_needs_a_target(self, check_refused):
        check_refused("forget_loss='match' needs a target", "heldout_dataset=", config={"forget_loss": "match"})

    def test_a_model_that_draws_nothing(self, check_refused, tiny_ddpm):
        with torch.no_grad():
            tiny_ddpm.unet.conv_out.bias.fill_(float("nan"))
        check_refused("pipeline: the original's own samples are not finite", train=True, pipeline=tiny_ddpm)


class TestArguments:
    def test_of_the_wrong_class(self, check_refused, tmp_path):
        check_refused("args: VDUTrainer needs VDUConfig, got UnlearnConfig", args=other_arguments(tmp_path / "out"),
                      forget_dataset=images())  # fmt: skip

    @pytest.mark.parametrize(
        ("name", "values", "fix"),
        [
            ("gamma", [0.0, 1.0, -0.5, float("nan")], "(0, 1)"),
            ("stability", ["variance"], "auto, inverse_variance, fisher, isotropic"),
            ("anchor", ["mean"], "original, checkpoint_mean"),
            ("loss_weighting", ["snr"], "simple, elbo, min_snr"),
            ("forget_loss", ["redirct"], "redirect"),
            ("variance_floor", [0.0, float("inf"), float("nan")], "> 0"),
            ("snr_gamma", [0.0], "> 0"),
            ("caution", [0.0, -1.0], "> 0"),
            ("t_range", [[0.0], [0.5, 0.5], [0.2, 1.1], [-0.1, 1.0]], "0 ≤ low < high ≤ 1"),
            ("ema_decay", [1.0, -0.1, float("nan")], "[0, 1)"),
            ("stability_weight", [-1.0, float("nan")], "≥ 0"),
            ("negative_guidance", [-1.0], "≥ 0"),
            ("replay_samples", [-1], "≥ 0"),
            ("grid_images", [-1], "≥ 0"),
            ("lora_rank", [0], "≥ 1"),
            ("lora_alpha", [0], "≥ 1"),
            ("forget_samples", [0], "≥ 1"),
            ("sample_batch_size", [0], "≥ 1"),
            ("num_inference_steps", [0], "≥ 1"),
            ("grid_steps", [0], "≥ 1"),
        ],
    )
    def test_values_that_make_no_sense(self, name, values, fix, check_refused):
        for value in values:
            check_refused(f"{name}={value!r}", fix, config={name: value})

    def test_what_belongs_to_classifiers(self, check_refused):
        check_refused("forget='class': a generator has no labels", "forget='examples'", config={"forget": "class"})
        check_refused("fisher_weight: set stability='fisher'", "stability_weight", config={"fisher_weight": 0.1})

    def test_gamma_is_the_balance(self, tmp_path):
        config = VDUConfig(str(tmp_path), gamma=0.25, **QUIET)
        assert (config.forget_weight, config.stability_weight) == (0.75, 0.25)
        paper = VDUConfig.paper(str(tmp_path), gamma=0.1, checkpoints=["a", "b"], **QUIET)
        assert (paper.forget_weight, paper.stability_weight, paper.replay_samples, paper.guard) == (0.9, 0.1, 0, False)

    def test_the_paper_preset_needs_checkpoints(self, tmp_path):
        with pytest.raises(ValueError, match=r"^checkpoints: missing; anchor='checkpoint_mean'"):
            VDUConfig.paper(str(tmp_path), **QUIET)


class TestOutput:
    @pytest.mark.parametrize("form", ["folder", "pipeline", "denoiser", "denoiser's folder"])
    def test_holds_the_original(self, tiny_ddpm, tmp_path, form):
        from diffusers import DDPMPipeline, UNet2DModel

        folder = tmp_path / "original"
        tiny_ddpm.save_pretrained(folder)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        scheduler = {"noise_scheduler": tiny_ddpm.scheduler}
        given = {
            "folder": lambda: {"pipeline": str(folder)},
            "pipeline": lambda: {"pipeline": DDPMPipeline.from_pretrained(folder)},
            "denoiser": lambda: {"model": UNet2DModel.from_pretrained(folder, subfolder="unet"), **scheduler},
            "denoiser's folder": lambda: {"model": str(folder / "unet"), **scheduler},
        }[form]()
        with pytest.raises(ValueError, match="^output_dir: .* holds the original model; choose another folder$"):
            VDUTrainer(**given, args=arguments(folder), forget_dataset=images())
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

    def test_a_good_trainer_writes_nothing_before_it_trains(self, tiny_ddpm, tmp_path):
        VDUTrainer(pipeline=tiny_ddpm, args=arguments(tmp_path, grid_images=4), forget_dataset=images())
        assert not list(tmp_path.iterdir())
