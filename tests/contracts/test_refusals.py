"""What a user may get wrong: one line that names the argument and the fix, and nothing written, lost or changed."""

import copy
import os
import re
from types import SimpleNamespace

import datasets
import diffusers
import pytest
import torch
from accelerate import cpu_offload
from accelerate.utils import FullyShardedDataParallelPlugin
from PIL import Image
from torch.utils.data import IterableDataset


from trainers import GANS, INFLUENCES, JOBS, QUIET, UNLEARNERS, arguments, build, ddpm, gan, images, llama, modules  # isort: skip
from trainers import pairs, resnet, seeded, vit  # isort: skip
from transformers import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    MixtralConfig,
    MixtralForCausalLM,
    PPLCNetConfig,
    PPLCNetForImageClassification,
    ResNetModel,
    TrainingArguments,
    ViTForMaskedImageModeling,
)
from trl import SFTConfig

from hf_unlearn import DCGANDiscriminator, DCGANGenerator, GANPipeline
from hf_unlearn.influence.checks import check_model
from hf_unlearn.jobs import demo
from hf_unlearn.training.checks import check_parallelism
from hf_unlearn.training.collators import ROW
from hf_unlearn.unlearning.checks import check_arguments


def one_line(message):
    """Short, but for what another library said."""
    return "\n" not in message and len(re.sub(r"\(.*\)", "", message)) < 300


@pytest.fixture
def check_refused(tmp_path):
    """Builds a trainer (and trains it) that must refuse, with `problem` as the beginning of what it says and `fix` behind."""

    def check_refused(name, problem, fix="", *, train=False, untouched=True, **changes):
        folder = tmp_path / "out"
        for earlier in (
            "_private/influence/manifest.json",
            "_private/influence/rows-00000.arrow",
            "checkpoint-3/mine",
        ):
            (folder / earlier).parent.mkdir(parents=True, exist_ok=True)
            (folder / earlier).write_text("of an earlier run")
        start = JOBS[name].start
        changes.setdefault(start, None if "model" in changes else arguments(name)[start])
        states = [copy.deepcopy(module.state_dict()) for module in modules(changes[start])]
        claim = [
            folder / "_private" / file for file in ("lock", "run.json") if train
        ]  # a run that starts has the folder
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path not in claim}
        trainer = build(name, folder, **changes) if train else None
        with pytest.raises(ValueError) as error:
            trainer.train() if train else build(name, folder, **changes)
        message = str(error.value)
        assert message.startswith(problem), message
        assert fix in message
        assert one_line(message)
        after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path not in claim}
        for path in after.keys() - before.keys():  # what the original has drawn is kept where only training can tell
            assert (train, name, path.parent) == (True, "vdu", folder / "_private"), path
        assert {path: after[path] for path in before} == before
        for module, state in zip(modules(changes[start]), states, strict=True) if untouched else ():
            assert module.state_dict().keys() == state.keys()
            assert all(
                torch.equal(value.nan_to_num(), state[key].nan_to_num()) for key, value in module.state_dict().items()
            )

    return check_refused


CALLABLE = ("marker", "compute_loss_func", "model_init")


class Endless(IterableDataset):
    def __iter__(self):
        yield {"pixel_values": torch.zeros(1, 8, 8), "labels": 3}


FORGET, RETAIN = images(4, [3]), images(4, [0, 1], seed=1)


def labelled(labels, rows=FORGET):
    return rows.remove_columns("labels").add_column("labels", labels)


def pictures(*shown):
    return datasets.Dataset.from_dict({"image": list(shown)})


def rows_of(value, n=3):
    """The last of `n` images is full of a value."""
    pixels = torch.zeros(n, 1, 8, 8)
    pixels[-1] = value
    return pixels


# Data

EVERYWHERE = [
    *((name, f"{argument}: a streaming dataset", "make it a Dataset", {argument: rows})
      for name, argument in (("unlearn", "forget_dataset"), ("unlearn", "retain_dataset"), ("in_run", "train_dataset"))
      for rows in (FORGET.to_iterable_dataset(), Endless())),
    *(("unlearn", f"{argument}: has splits train, test", "pass one of them",
       {argument: datasets.DatasetDict({"train": RETAIN, "test": RETAIN})})
      for argument in ("forget_dataset", "retain_dataset")),
    ("unlearn", "forget_dataset: has splits train", "", {"forget_dataset": datasets.IterableDatasetDict({"train": FORGET})}),
    *((name, f"{argument}: is empty", fix, {argument: FORGET.select([])})
      for name, argument, fix in (
          ("unlearn", "forget_dataset", "nothing to forget"), ("unlearn", "retain_dataset", "nothing to retain"),
          ("unlearn", "heldout_dataset", "pass rows"), ("vdu", "forget_dataset", ""), ("vdu", "retain_dataset", ""),
          ("vdu", "heldout_dataset", ""), ("vdu", "replay_dataset", ""), ("in_run", "train_dataset", "pass rows"))),
    ("unlearn", "forget_dataset: is empty", "", {"forget_dataset": []}),
    *((name, "forget_dataset: missing", "pass the", {"forget_dataset": None, "train": name != "sft"}) for name in UNLEARNERS),
    *((name, f"train_dataset: {JOBS[name].trainer.__name__} learns to forget", "pass forget_dataset=",
       {"train_dataset": FORGET}) for name in UNLEARNERS),
    ("adapt", "train_dataset: this trainer needs none", "undesired=", {"train_dataset": FORGET}),
    *((name, "train_dataset: missing", "pass", {"train_dataset": None}) for name in ("gan", *INFLUENCES)),
    *(("gan", "train_dataset: missing or empty", "", {"train_dataset": rows}) for rows in ([], torch.zeros(0, 1, 8, 8))),
]  # fmt: skip


LABELS = [
    ("retain_dataset: 2 of its ids are in forget_dataset too (first: 14", "remove",
     {"retain_dataset": datasets.concatenate_datasets([RETAIN, FORGET.select([2, 1])])}),
    ("retain_dataset: 4 of its ids", "'name'", {
        "forget_dataset": FORGET.rename_column("id", "name"), "id_column": "name",
        "retain_dataset": labelled([1] * 4).rename_column("id", "name")}),
    ("heldout_dataset: 4 of its ids", "remove them", {"heldout_dataset": FORGET, "forget": "examples"}),
    ("retain_dataset: 4 of its rows are in forget_dataset too (first: row 4)", "remove", {
        "forget_dataset": FORGET.remove_columns("id"), "forget": "examples", "heldout_dataset": RETAIN,
        "retain_dataset": datasets.concatenate_datasets([RETAIN, FORGET]).remove_columns("id")}),
    ("retain_dataset: holds class 3", "forget='examples'", {"retain_dataset": images(4, [4, 3], seed=1)}),
    ("forget_dataset: holds every class", "forget='examples'", {"forget_dataset": images(5, range(5)), "retain_dataset": None}),
    *((f"{argument}: has no label column", fix, {argument: rows})
      for argument, rows, fix in (
          ("forget_dataset", FORGET.remove_columns("labels"), "labels, label"),
          ("forget_dataset", FORGET.rename_column("labels", "class"), "labels, label"),
          ("retain_dataset", RETAIN.remove_columns("labels"), "rename_column"),
          ("heldout_dataset", images(4, seed=1).remove_columns("labels"), "label"))),
    *((f"forget_dataset: label {label} is outside", "num_labels=5 (0…4)", {"forget_dataset": labelled([3, 3, label, 3])})
      for label in (5, -1, 99)),
    ("retain_dataset: label 5 is outside", "num_labels=5", {"retain_dataset": labelled([0, 5, 1, 1], RETAIN)}),
    ("forget_dataset: label None", "", {"forget_dataset": labelled([3, None, 3, 3])}),
    ("forget_dataset: label 'three'", "class_encode_column", {"forget_dataset": labelled(["three"] * 4)}),
    ("forget_dataset: label 0.5", "", {"forget_dataset": labelled([0.5, 3.0, 3.0, 3.0])}),
    ("forget_dataset: label [0, 1]", "one integer", {"forget_dataset": labelled([[0, 1]] * 4)}),
    ("heldout_dataset: missing", "heldout_loss=", {"forget": "examples"}),
    ("forget_loss='match' needs a target", "heldout_dataset=", {"forget_loss": "match"}),
    ("forget_loss='simnpo': is for language models", "redirect", {"forget_loss": "simnpo"}),
    ("processing_class: the dataset holds raw images", "image processor",
     {"forget_dataset": pictures(Image.new("L", (8, 8))).add_column("label", [3]), "retain_dataset": None}),
]  # fmt: skip


BAD_IMAGES = [
    *((name, f"{argument}: {problem}", fix, {argument: rows})
      for name, argument in (("vdu", "forget_dataset"), ("gan", "train_dataset"), ("gan", "eval_dataset"), ("adapt", "clean"))
      for problem, fix, rows in (
          ("an image has shape (1, 9, 9), the model's is (1, 8, 8)", "", images(4, size=9)),
          ("an image has shape (3, 8, 8), the model's is (1, 8, 8)", "", images(4, channels=3)),
          ("an image is 12 × 8, the model draws 8 × 8", "resize=True", pictures(Image.new("L", (12, 8)))),
          ("images have 3 channels, the model has 1", "grey", pictures(Image.new("RGB", (8, 8)))),
          ("has no images", "pixel_values, image", datasets.Dataset.from_dict({"pixels": [1.0]})))),
    *((name, f"{argument}: {problem}", fix, {argument: form(rows)})
      for name, argument, form in (
          ("vdu", "forget_dataset", lambda rows: [{"pixel_values": row} for row in rows]),
          ("gan", "train_dataset", lambda rows: rows), ("adapt", "undesired", lambda rows: rows))
      for problem, fix, rows in (
          ("an image holds NaN or infinite pixels", "remove it", rows_of(float("nan"))),
          ("an image holds NaN or infinite pixels", "remove it", rows_of(float("inf"))),
          ("pixel values reach 255", "[−1, 1]", rows_of(255.0)))),
    ("vdu", "forget_dataset: an image is 12 × 8", "resize=True",
     {"forget_dataset": pictures(Image.new("L", (8, 8)), Image.new("L", (12, 8)))}),
    ("vdu", "forget_dataset: row 1 has no image", "fill it in", {"forget_dataset": pictures(Image.new("L", (8, 8)), None)}),
    *(("vdu", f"{argument}: an image has shape (1, 4, 4)", "", {argument: images(4, seed=1, size=4)})
      for argument in ("retain_dataset", "heldout_dataset", "replay_dataset")),
    ("vdu", "eval_dataset['test']: an image has shape", "", {"eval_dataset": {"test": images(4, size=4)}}),
    ("vdu", "eval_dataset['test']: is empty", "", {"eval_dataset": {"test": images(4).select([])}}),
]  # fmt: skip


@pytest.mark.parametrize("row", [0, 2])
def test_another_range_in_rows_that_are_read_one_by_one(row, check_refused):
    """Of tensors as of lists, in the first row or a later one."""
    for form in (lambda image: image, lambda image: image.tolist()):
        rows = [{"pixel_values": form(image)} for image in (rows_of(255.0) if row else rows_of(255.0).flip(0))]
        check_refused("gan", "train_dataset: pixel values reach 255", train_dataset=rows)
        rows = [{"pixel_values": form(image)} for image in rows_of(1.0)]
        check_refused("gan", "train_dataset: has no pixel below 0", "images * 2 - 1", train_dataset=rows)


def ids(values):
    return {"train_dataset": images(4, [0, 1]).remove_columns("id").add_column("id", values)}


TARGETS = [
    *(("target_dataset: ", "is empty; pass", {"target_dataset": rows})
      for rows in (RETAIN.select([]), {}, {"one": RETAIN, "two": RETAIN.select([])}, [],
                   RETAIN.add_column("target", ["a"] * 4).select([]))),
    ("target_dataset: 'bad' gives batches without 'labels'", "",
     {"target_dataset": {"good": RETAIN, "bad": RETAIN.remove_columns("labels")}}),
    ("target_dataset: 'target' ", "", {"target_dataset": datasets.Dataset.from_dict({"question": ["who?"]})}),
    ("target_dataset: 'target' cannot be collated", "",
     {"target_dataset": datasets.Dataset.from_dict({"pixel_values": [["one"] * 8], "labels": [1]})}),
    ("target_dataset: 'target' is a stream", "", {"target_dataset": RETAIN.to_iterable_dataset()}),
    ("target_dataset: pass it, or target='self', and not both", "", {"target_dataset": None}),
    ("target_dataset: pass it, or", "", {"target": "self"}),
    ("target: 'other' is not 'self'", "", {"target": "other"}),
    ("target_dataset: a target cannot be called 'self'", "rename", {"target_dataset": {"self": RETAIN}}),
    ("train_dataset: gives batches without 'labels'", "", {"train_dataset": FORGET.remove_columns("labels")}),
    ("train_dataset: has 2 numbers in 'labels', and the model answers with 5", "num_labels", dict.fromkeys(
        ("train_dataset", "target_dataset"), images(4).remove_columns("labels").add_column("labels", [[0.0, 1.0]] * 4))),
    ("train_dataset: id 'b' occurs twice in column 'id'", "", ids(["a", "b", "c", "b"])),
    *(("train_dataset: column 'id' must hold ids", "", ids(values))
      for values in (["a", None, "c", "d"], [0.5, 1.5, 2.5, 3.5], [[1], [2], [3], [4]])),
    ("id_column: 'none' is not in the training set", "", {"id_column": "none"}),
]  # fmt: skip


# Models


def regression(model, problem):
    model.config.problem_type = problem
    return model


def of_unet(**values):
    config = {key: value for key, value in ddpm().unet.config.items() if not key.startswith("_")}
    return diffusers.UNet2DModel(**(config | values))


def broken_ddpm():
    pipeline = ddpm()
    pipeline.unet.conv_out.bias.data.fill_(float("nan"))
    return pipeline


SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
SCHEDULER = {"noise_scheduler": ddpm().scheduler}
FLOW = diffusers.FlowMatchEulerDiscreteScheduler()
MODELS = [
    *((name, "model: missing", "pass a model", {"model": None}) for name in ("unlearn", "pbu")),
    *((name, "model: NoneType is no GANPipeline", "pass GANPipeline(", {"model": None}) for name in GANS),
    ("unlearn", "model: ResNetModel takes no labels", "AutoModelFor…", {"model": lambda: ResNetModel(resnet().config)}),
    *(("unlearn", f"model: {kind.__name__} takes no labels", fix, {"model": lambda kind=kind, config=config: kind(config)})
      for kind, config, fix in (
          (DeiTForImageClassificationWithTeacher, DeiTConfig(**SMALL), "load it with DeiTForImageClassification"),
          (PPLCNetForImageClassification, PPLCNetConfig(), "for inference only"))),
    ("unlearn", "model: ViTForMaskedImageModeling", "", {"model": lambda: ViTForMaskedImageModeling(vit().config)}),
    *(("unlearn", f"model: problem_type='{problem}' is not supported", "single-label",
       {"model": lambda problem=problem: regression(vit(), problem)})
      for problem in ("regression", "multi_label_classification")),
    ("unlearn", "forget='class' needs a classifier", "use forget='examples'", {
        "forget": "class", "model": lambda: llama(), "retain_dataset": None, "heldout_dataset": None, "forget_dataset":
        datasets.Dataset.from_dict({"input_ids": [[1, 5, 6]] * 4, "labels": [[1, 5, 6]] * 4})}),
    *((name, "model: none of its parameters", "requires_grad_", {"model": lambda: vit().requires_grad_(False)})
      for name in ("unlearn", "in_run", "propagated")),
    ("in_run", "layers: 'nowhere' matches no module", "", {"layers": ["nowhere"]}),
    *((name, "model: DCGANGenerator is no GANPipeline", "GANPipeline(", {"model": lambda: gan().generator}) for name in GANS),
    *((name, "model: the pipeline has no discriminator", fix, {"model": lambda: GANPipeline(gan().generator)})
      for name, fix in (("gan", "GANPipeline(generator, discriminator)"), ("adapt", "discriminator='fresh'"))),
    *((name, f"model: the generator's {what} is", "must be equal",
       {"model": lambda size=size: GANPipeline(gan().generator, DCGANDiscriminator(*size, base_channels=4))})
      for name in GANS for what, size in (("sample_size", (9, 1)), ("channels", (8, 3)))),
    *((name, "model: the generator's weights are torch.bfloat16", "float32", {"model": lambda: gan().to(torch.bfloat16)})
      for name in GANS),
    ("gan", "path_length_weight=1.0: DCGANGenerator has no mapping network", "set it to 0",
     {"model": lambda: GANPipeline(DCGANGenerator(8, 1, base_channels=4), gan().discriminator)}),
    ("adapt", "discriminator='fresh': the pipeline has one", "leave it out", {"discriminator": "fresh", "adapt_steps": 300}),
    ("vdu", "pipeline: missing", "noise_scheduler=", {"pipeline": None}),
    ("vdu", "model: given beside pipeline", "keep one", {"model": lambda: ddpm().unet, "pipeline": lambda: ddpm()}),
    ("vdu", "noise_scheduler: missing", "the whole pipeline=", {"model": lambda: ddpm().unet}),
    ("vdu", "noise_scheduler: the pipeline has its own", "leave it out", SCHEDULER),
    ("vdu", "noise_scheduler: FlowMatchEulerDiscreteScheduler has no add_noise", "DDPMScheduler",
     {"model": lambda: ddpm().unet, "noise_scheduler": FLOW}),
    ("vdu", "noise_scheduler: FlowMatchEulerDiscreteScheduler", "",
     {"pipeline": lambda: diffusers.DDPMPipeline(ddpm().unet, FLOW)}),
    ("vdu", "model: ResNetForImageClassification is not supported", "UNet2DModel", {"model": lambda: resnet()}),
    ("vdu", "pipeline: dict is no pipeline of diffusers", "pass one", {"pipeline": lambda: {}}),
    ("vdu", "model: it has num_class_embeds=10", "",
     {"model": lambda: of_unet(num_class_embeds=10)} | SCHEDULER),
    ("vdu", "model: it sees 1 channels and answers 3", "", {"model": lambda: of_unet(out_channels=3)} | SCHEDULER),
    ("vdu", "pipeline: its unet answers with a variance too", "learned_range", {"model": lambda: of_unet(out_channels=2)} | SCHEDULER),
    ("vdu", "model: its weights are torch.bfloat16", "float32", {"pipeline": lambda: ddpm().to(torch.bfloat16)}),
    *((name, f"model: its weights are {dtype}", "peft_config=", {"model": lambda dtype=dtype, make=make: make().to(dtype)})
      for name, make, dtype in (("unlearn", vit, torch.bfloat16), ("pbu", resnet, torch.float16), ("sft", llama, torch.bfloat16),
                                ("in_run", resnet, torch.float16), ("fine", llama, torch.bfloat16))),
    ("vdu", "trainable: no parameter's name fits 'attention.*' (one is called 'conv_in.weight')", "",
     {"trainable": ["conv_in.*", "attention.*"]}),
    ("vdu", "trainable: no parameter's name fits 'cross_attention'", "", {"trainable": "cross_attention"}),
    ("vdu", "trainable: UNet2DModel takes no LoRA in diffusers", "patterns", {"trainable": ["lora"], "stability_weight": 0.0}),
]  # fmt: skip


def prompted(n=4):
    return images(n, channels=3).add_column("prompt", ["a photo", "a hot pot"] * (n // 2))


REPLAY = {"replay_prompts": ["pot"], "own_samples": 4, "stability_weight": 0.0}
LORA = {"trainable": ["lora"]}


class OnlyVAE(diffusers.DiffusionPipeline):
    def __init__(self, vae):
        super().__init__()
        self.register_modules(vae=vae)


def without_text(pipe):
    pipe.text_encoder = None
    return pipe


def with_adapter(pipe):
    from peft import LoraConfig

    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    return pipe


PROMPTED = [  # by the pipeline what is passed
    ("forget_dataset: prompts are missing for a prompted model", "prompt, text, caption",
     lambda pipe: {"pipeline": pipe, "forget_dataset": images(4, channels=3)}),
    ("forget_dataset: given beside forget_prompts", "keep one", lambda pipe: {"pipeline": pipe, "forget_prompts": ["a photo"]}),
    ("replay_prompts: missing, and the neutral prompt '' is among forget_prompts", "",
     lambda pipe: {"pipeline": pipe, "replay_prompts": None, "forget_prompts": [""], "forget_dataset": None, "forget_loss": "npo"}),
    ("redirect_prompt: has none for 'a hot pot'", "add it", lambda pipe: {"pipeline": pipe, "redirect_prompt": {"a photo": "a"}}),
    ("replay_prompts: 'pot' is among forget_prompts too", "keep it in one",
     lambda pipe: {"pipeline": pipe, "forget_prompts": ["pot"], "forget_dataset": None}),
    ("model: a prompted denoiser needs its VAE and text encoder", "pipeline=",
     lambda pipe: {"model": pipe.unet, "noise_scheduler": pipe.scheduler}),
    ("pipeline: StableDiffusionPipeline has no text_encoder", "", lambda pipe: {"pipeline": without_text(pipe)}),
    ("pipeline: OnlyVAE is not supported", "StableDiffusion,", lambda pipe: {"pipeline": OnlyVAE(pipe.vae)}),
    ("model: AutoencoderKL is not supported", "UNet2DModel", lambda pipe: {"model": pipe.vae}),
    ("trainable=['lora', 'all']: 'lora' stands alone", "", lambda pipe: {"pipeline": pipe, "trainable": ["lora", "all"]}),
    ("stability_weight: an anchor on LoRA factors means nothing", "isotropic_weight",
     lambda pipe: {"pipeline": pipe, "stability_weight": 1.0, "checkpoints": ["a"]} | LORA),
    ("pipeline: unet holds an adapter", "fuse it", lambda pipe: {"pipeline": with_adapter(pipe)} | LORA),
]  # fmt: skip


@pytest.mark.parametrize(
    ("problem", "fix", "given"), PROMPTED, ids=lambda value: value[:40] if isinstance(value, str) else ""
)
def test_prompted_models(problem, fix, given, check_refused, tiny_stable_diffusion):
    check_refused("vdu", problem, fix, **({"forget_dataset": prompted()} | REPLAY | given(tiny_stable_diffusion)))


def test_prompts_for_a_model_that_takes_none(check_refused):
    check_refused("vdu", "forget_prompts: this model takes no prompts", "forget_dataset=", forget_dataset=None,
                  forget_prompts=["a photo"])  # fmt: skip


def test_folders_that_hold_no_model(check_refused, tmp_path):
    for folder in ("empty", "half"):
        (tmp_path / folder).mkdir()
    pipeline = ddpm()
    pipeline.save_pretrained(tmp_path / "half")
    (tmp_path / "half" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    resnet().save_pretrained(tmp_path / "classifier")
    for name in ("empty", "half", "nowhere/at-all"):
        folder = name if "nowhere" in name else str(tmp_path / name)
        check_refused("vdu", f"pipeline={folder!r}: neither a folder with a pipeline nor an id", pipeline=folder)
        check_refused("gan", f"model={folder!r}: neither a folder with a GANPipeline", model=folder)
    classifier = tmp_path / "classifier"
    for name in ("pbu", "in_run"):
        check_refused(name, "model='nowhere/at-all': neither a folder with a model nor an id", model="nowhere/at-all")
    (classifier / "model.safetensors").write_bytes(b"half")
    check_refused("pbu", f"model='{classifier}': its weights are damaged", "restore the file", model=classifier)
    folder = str(tmp_path / "classifier")
    check_refused("vdu", f"model={folder!r}: its config names resnet", "UNet2DModel", pipeline=folder)


# Arguments

ANY = {"own_samples": 0, "stability_weight": 0.0}
ARGUMENTS = [
    *((name, f"args: {JOBS[name].trainer.__name__} needs {JOBS[name].config.__name__}, got {kind.__name__}", "",
       {"args": lambda kind=kind: kind("unused", use_cpu=True, report_to="none", **({} if kind is TrainingArguments else {"bf16": False}))})
      for name, kind in (("unlearn", TrainingArguments), ("unlearn", JOBS["sft"].config), ("pbu", JOBS["unlearn"].config),
                         ("sft", JOBS["unlearn"].config), ("vdu", JOBS["unlearn"].config), ("gan", TrainingArguments),
                         ("adapt", JOBS["gan"].config), ("in_run", SFTConfig), ("fine", JOBS["in_run"].config))),
    *((name, f"compute_loss_func: {why}", "", {"compute_loss_func": lambda *args, **kwargs: 0.0})
      for name, why in (("unlearn", "would be ignored"), ("fine", "not supported"))),
    *((name, f"load_best_model_at_end: {why}", "", {
        "load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps", "eval_dataset": RETAIN})
      for name, why in (("unlearn", "the guard"), ("propagated", "the sweep"))),
    ("unlearn", "model_init: given beside model", "keep one", {"model_init": lambda: vit(), "model": lambda: vit()}),
    ("sft", "model_init: SFTTrainer takes none", "new trainer", {"model_init": lambda: llama(), "model": None}),
    ("fine", "model_init: SFTTrainer takes none", "pass a model", {"model_init": lambda: llama(), "model": None}),
    ("vdu", "model_init: a pipeline is changed in place", "new trainer", {"model_init": lambda: ddpm()}),
    ("unlearn", "model: dict is no model", "path or an id", {"model": lambda: {}}),
    ("unlearn", "data_collator: Dataset makes no batches", "forget_dataset=", {"data_collator": FORGET}),
    ("unlearn", "eval_dataset['retain']: is empty", "leave it out", {"eval_dataset": {"retain": RETAIN.select([])}}),
    ("unlearn", "eval_dataset: is empty", "leave it out", {"eval_dataset": RETAIN.select([])}),
    ("unlearn", "dataloader_drop_last=True: leaves none of 9", "set it to False",
     {"dataloader_drop_last": True, "per_device_train_batch_size": 16}),
    ("pbu", "neftune_noise_alpha: ResNetForImageClassification has no token embeddings", "leave it out", {"neftune_noise_alpha": 1.0}),
    ("pbu", "activation_checkpointing=True: ResNetForImageClassification has none", "False", {"gradient_checkpointing": True}),
    ("sft", "quantization_config: would be ignored", "model_init_kwargs", {"quantization_config": object()}),
    ("unlearn", "train_sampling_strategy='group_by_length': the forget examples", "'random'",
     {"train_sampling_strategy": "group_by_length"}),
    ("unlearn", "dataloader_persistent_workers", "set it to False",
     {"dataloader_persistent_workers": True, "dataloader_num_workers": 1}),
    *((name, f"{what}=True: {why}", f"set {'it' if name == 'fine' else what} to False" if name == "fine" else "", {what: True})
      for name, why in (("fine", "mixes documents"), ("sft", "takes away the boundaries"))
      for what in ("packing", "padding_free")),
    ("in_run", "n_calibration_runs: needs model_init=", "", {"n_calibration_runs": 2}),
    ("in_run", "last_steps: observation='in_run' does not use it", "observation='propagated'", {"last_steps": 2}),
    ("propagated", "layers: observation='propagated' does not use it", "observation='in_run'", {"layers": ["*"]}),
    ("in_run", "n_calibration_runs: ", "target='self'", {"n_calibration_runs": 2, "target": "self", "target_dataset": None}),
    ("fine", "n_calibration_runs: SFTTrainer", "set it to 0", {"n_calibration_runs": 2}),
    ("in_run", "preconditioned: ", "target='self'", {"preconditioned": True, "target": "self", "target_dataset": None}),
    ("in_run", "per_device_train_batch_size: target='self'", "2 or more",
     {"per_device_train_batch_size": 1, "target": "self", "target_dataset": None}),
    ("fine", "model: its weights are torch.bfloat16", "float32", {"model": lambda: llama().bfloat16()}),
    ("fine", "target_dataset: 'target': row 0 has None", "mend or remove", {
        "target_dataset": lambda: pairs(2).map(lambda row: {"completion": None})}),
    ("fine", "train_dataset: list is not a", "", {"train_dataset": lambda: list(pairs(3))}),
    ("fine", f"train_dataset: column '{ROW}'", "rename", {"train_dataset": lambda: pairs(2).add_column(ROW, [0, 1])}),
    ("sft", "model: ResNetForImageClassification is no language model", "UnlearnTrainer", {"model": lambda: resnet()}),
    ("unlearn", "forget_dataset: its rows are of type int", "Dataset", {
        "forget": "class", "heldout_dataset": None, "forget_dataset": lambda: [1, 2]}),
    ("sft", "forget_dataset: holds images", "UnlearnTrainer", {"forget_dataset": pictures(Image.new("L", (8, 8)))}),
    *(("vdu", "forget_loss='redirect' needs what is to be kept", "own_samples", {"forget_loss": loss} | ANY)
      for loss in ("redirect", "bounded")),
    ("vdu", "guard: has nothing to look at", "guard=False", {"forget_loss": "ascent"} | ANY),
    ("vdu", "forget_loss='match' needs a target", "heldout_dataset=", {"forget_loss": "match"}),
    ("adapt", "undesired: missing or empty", "", {"undesired": None}),
    ("adapt", "clean: missing or empty", "", {"clean": torch.zeros(0, 4)}),
    ("adapt", "marker: given beside", "keep one", {"marker": lambda images: images > 0}),
]  # fmt: skip


WHILE_TRAINING = [
    *(("propagated", "optim: ", "cannot be carried influence through", {"optim": optim})
      for optim in ("adafactor", "rmsprop", "adagrad")),
    ("in_run", "preconditioned: needs Adam or AdamW of torch, and optim is SGD", "", {"preconditioned": True, "optim": "sgd"}),
    ("vdu", "own_samples: all 16 samples of the original are of the forgotten kind", "marker",
     {"marker": lambda x: torch.ones(len(x), dtype=torch.bool)}),
    *(("vdu", "marker: gave torch.", "for 16 images; it must mark", {"marker": marks})
      for marks in (lambda x: torch.zeros(3, dtype=torch.bool), lambda x: torch.zeros(len(x)), lambda x: x[:, 0] > 0)),
    ("vdu", "pipeline: the original's own samples are not finite", "", {"pipeline": lambda: broken_ddpm()}),
    ("vdu", "checkpoints: nowhere is neither a folder nor a Hub model", "", {"stability": "auto", "checkpoints": ["nowhere"]}),
]  # fmt: skip


LABELS = [("unlearn", *case[:2], {"forget": "class", "heldout_dataset": None} | case[2]) for case in LABELS]
TARGETS = [("in_run", *case) for case in TARGETS]
WHILE_TRAINING = [(*case[:3], {"train": True, "max_steps": 2} | case[3]) for case in WHILE_TRAINING]
REFUSED = [*EVERYWHERE, *LABELS, *BAD_IMAGES, *TARGETS, *MODELS, *ARGUMENTS, *WHILE_TRAINING]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: f"{case[0]} {case[1]}"[:60])
def test_refused(case, check_refused):
    """A value that is a lambda, but for arguments that are callables, is called for what it makes."""
    name, problem, fix, changes = case
    for key, value in changes.items():
        if getattr(value, "__name__", "") == "<lambda>" and key not in CALLABLE:
            changes = changes | {key: value()}
    check_refused(name, problem, fix, **changes)


@pytest.mark.parametrize("name", JOBS)
def test_arguments_in_the_order_of_trainer(name, tmp_path):
    """Model, args, collator, training set: as of the stock trainers, or a line that says what goes there."""
    job, given = JOBS[name], arguments(name)
    if name in UNLEARNERS or name == "adapt":
        with pytest.raises(ValueError, match="^train_dataset: "):
            job.trainer(given[job.start], job.config(str(tmp_path), **(QUIET | job.values)), None, FORGET, None)
        return
    rest = {key: value for key, value in given.items() if key not in ("model", "train_dataset")}
    trainer = job.trainer(
        given["model"], job.config(str(tmp_path), **(QUIET | job.values)), None, given["train_dataset"], **rest
    )
    assert len(trainer.train_dataset) == len(given["train_dataset"])


def test_a_path_is_a_path(tmp_path):
    resnet().save_pretrained(tmp_path / "original")
    trainer = build("pbu", tmp_path / "out", model=tmp_path / "original")
    assert trainer.base_model == str(tmp_path / "original")


def test_experts_that_are_balanced_over_a_batch(tmp_path):
    config = MixtralConfig(vocab_size=13, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                           num_key_value_heads=1, num_local_experts=2, output_router_logits=True)  # fmt: skip
    with pytest.raises(ValueError, match="^router_aux_loss_coef: the load-balancing loss is of a whole batch"):
        build("fine", tmp_path, model=MixtralForCausalLM(config))
    assert build("fine", tmp_path, model=MixtralForCausalLM(config), router_aux_loss_coef=0.0)


def test_checkpoints_of_the_training_run(check_refused, tmp_path):
    """What [`ParameterMoments`] refuses, and a single one, which has no variance."""
    paths = [str(tmp_path / name) for name in "abc"]
    for path in paths:
        seeded(ddpm).unet.save_pretrained(f"{path}/unet")
    given = {"stability": "inverse_variance", "stability_weight": 1.0, "train": True, "max_steps": 1}
    check_refused("vdu", "checkpoints: K = 1 has no variance", "stability='fisher'", checkpoints=paths[:1], **given)
    check_refused("vdu", "checkpoints: all 3 hold the same parameters", "no variance", checkpoints=paths, **given)
    of_unet(block_out_channels=(8, 16)).save_pretrained(f"{paths[1]}/unet")
    check_refused("vdu", "checkpoints: ", "is of another architecture", checkpoints=paths, **given)
    (tmp_path / "b" / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"nothing")
    check_refused("vdu", f"checkpoints: {paths[1]}", "cannot be read", checkpoints=paths, **given)


NAN, PUSHED = float("nan"), {"push_to_hub": True, "hub_token": "none"}
BOUNDED, NATURAL, SHARE = "must be in [0, 1)", "must be ≥ 1", "must be ≥ 0"
SETTINGS = {  # by job: name, values, and what is said of them
    "unlearn": [
        ("forget", ["classes", ""], "must be one of class, examples"),
        ("forget_loss", ["redirct", "Ascent"], "bounded, ascent, npo, redirect, sever, uniform, match, simnpo, "),
        ("loss_reduction", ["mean"], "must be one of example, token, sum; it is called 'example' now"),
        ("retain_loss", ["KL"], "must be one of nll, kl"),
        ("fisher", ["diagonal"], "must be one of exact, monte_carlo"),
        ("bn", ["eval"], "must be one of frozen, train"),
        ("forget_weight", [0.0, -1.0, NAN], "> 0"),
        *((name, [0.0, NAN], "> 0") for name in ("preference_beta", "rmu_coefficient", "pdu_rate")),
        ("rmu_layer", [-1], SHARE),
        ("rmu_layer", [1.5], "must be a whole number"),
        *((name, [-0.1, NAN], SHARE)
          for name in ("retain_weight", "replay_weight", "isotropic_weight", "fisher_weight", "utility_tolerance")),
        *((name, [0], NATURAL) for name in ("fisher_samples", "fisher_examples", "guard_steps", "guard_examples", "guard_patience")),
        ("forget_accuracy", [-0.1, 1.0], "[0, 1)"),
        ("hub_strategy", ["every_save", "checkpoint", "all_checkpoints"], "uploads half-finished weights; use hub_strategy='end'"),
        ("learning_rate", ["1e-4"], "must be a number"),
        ("bf16", ["no"], "must be True or False"),
        ("output_dir", ["", " "], "is empty; name a folder"),
    ],
    "sft": [("loss_type", ["dft"], "only 'nll'"), ("hub_strategy", ["every_save"], "uploads half-finished weights")],
    "vdu": [
        ("gamma", [0.0, 1.0, -0.5, NAN], "(0, 1)"),
        ("stability", ["variance"], "auto, inverse_variance, fisher, isotropic"),
        ("anchor", ["mean"], "original, checkpoint_mean"),
        ("loss_weighting", ["snr"], "simple, elbo, min_snr"),
        ("checkpoints", [[]], "K = 0"),
        *((name, [float("inf")], "must be finite") for name in ("variance_floor", "caution")),
        *((name, [0.0, NAN], "> 0") for name in ("variance_floor", "snr_gamma", "caution")),
        ("t_range", [[0.0], [0.5, 0.5], [0.2, 1.1], [-0.1, 1.0]], "0 ≤ low < high ≤ 1"),
        ("ema_decay", [1.0, -0.1, NAN], BOUNDED),
        *((name, [-1, NAN], SHARE) for name in ("stability_weight", "negative_guidance", "own_samples", "grid_images")),
        *((name, [0], NATURAL) for name in ("lora_rank", "lora_alpha", "forget_samples", "batch_size",
                                            "num_inference_steps", "grid_steps")),
    ],
    "gan": [
        ("gradient_accumulation_steps", [2], "two players take turns"),
        ("fp16", [True], "one loss scaler; use bf16"),
        ("gradient_checkpointing", [True], "these networks have none"),
        *((name, [-0.5, NAN], SHARE)
          for name in ("r1_weight", "path_length_weight", "discriminator_warmup", "discriminator_learning_rate")),
        *((name, [0], NATURAL) for name in ("r1_every", "path_length_every", "guard_steps", "batch_size")),
        ("guard_examples", [15], "≥ 16"),
        ("ema_decay", [1.0, -0.1], BOUNDED),
        ("collapse_tolerance", [0.0, 1.0], "must be in (0, 1)"),
        ("hub_strategy", ["every_save"], "uploads half-finished weights"),
    ],
    "adapt": [
        *((name, ["other"], "must be one of") for name in ("repulsion", "distance", "discriminator")),
        ("max_steps", [-1], "must be ≥ 1"),
        *((name, [0], NATURAL) for name in ("adapted_models", "fisher_samples", "mark_samples", "grid_steps")),
        ("adapt_steps", [0], NATURAL),
        *((name, [-1.0], SHARE) for name in ("consolidation_weight", "repulsion_weight", "own_samples", "grid_images")),
        *((name, [0.0, NAN], "> 0") for name in ("adapt_learning_rate", "repulsion_rate")),
        ("negative_share", [1.0, -0.1], BOUNDED),
        ("miss_rate", [0.0, 1.0], "(0, 1)"),
        ("gradient_accumulation_steps", [2], "two players take turns"),
    ],
    **{name: [
        ("per_device_train_batch_size", [0], "must be ≥ 1"),
        ("learning_rate", [-1.0, NAN], "must be ≥ 0"),
        ("num_train_epochs", [0, NAN], "must be > 0"),
        ("seed", [-1, 2**32], "must be in [0, 4294967296)"),
        ("observation", ["magic"], "must be one of in_run, propagated"),
        *((what, [0], "must be ≥ 1") for what in ("target_every", "target_batch_size", "target_rank", "last_steps")),
        ("burn_in", [1.0, NAN], "must be in [0, 1)"),
        ("target_window", [-0.1], "must be in [0, 1)"),
        ("trajectory_gigabytes", [0], "must be > 0"),
        ("n_calibration_runs", [1], "have no spread"),
        ("n_calibration_runs", [-1], "must be ≥ 0"),
        ("train_sampling_strategy", ["other"], "must be one of random, sequential"),
    ] for name in ("in_run", "fine")},
}  # fmt: skip


@pytest.mark.parametrize("job", SETTINGS)
def test_settings_that_make_no_sense(job, tmp_path):
    kind, plain = JOBS[job].config, QUIET | {"report_to": "none"} | ({"bf16": False} if job in ("sft", "fine") else {})
    for name, values, fix in SETTINGS[job]:
        for value in values:
            more = PUSHED if name == "hub_strategy" else {}
            with pytest.raises(ValueError) as error:
                kind(**({"output_dir": str(tmp_path / "new")} | plain | more | {name: value}))
            message = str(error.value)
            assert message.startswith(name), message
            assert fix in message, message
            assert one_line(message)
    assert not list(tmp_path.iterdir())


def test_settings_that_do_not_go_together(tmp_path):
    vdu, adapt, unlearn = (JOBS[name].config for name in ("vdu", "adapt", "unlearn"))
    with pytest.raises(
        ValueError, match=r"^checkpoints: missing; .* or set anchor='original' and stability='fisher'$"
    ):
        vdu.paper(str(tmp_path), **QUIET)
    assert vdu.paper(str(tmp_path), anchor="original", stability="fisher", **QUIET).checkpoints is None
    for given, problem in (
        (["a", "b"], "has 2 prompts for 3 forget_prompts; give one for all, one for each"),
        (["a", "b", "p"], "'p' is among forget_prompts"),
        ({"p": "a", "q": "b"}, "has none for 'r'; add it"),
        ({"p": "a", "q": "b", "r": 3}, "3 is no text"),
    ):
        with pytest.raises(ValueError, match=f"^redirect_prompt: {problem}"):
            vdu(str(tmp_path), forget_prompts=["p", "q", "r"], redirect_prompt=given, **QUIET)
    config = vdu(str(tmp_path), forget_prompts=["p", "q"], redirect_prompt=["a", "b"], **QUIET)
    assert config.redirected(["q", "p"]) == ["b", "a"]
    with pytest.raises(ValueError, match="^gamma: sets forget_weight and stability_weight"):
        vdu(str(tmp_path), gamma=0.5, forget_weight=0.3, **QUIET)
    with pytest.raises(ValueError, match="^adapt_steps=200: must be more than discriminator_warmup=200"):
        adapt(str(tmp_path), discriminator="fresh", adapt_steps=200, **QUIET)
    with pytest.raises(TypeError, match="forget_weigth"):
        unlearn(str(tmp_path), forget_weigth=1.0)


def test_the_ends_of_the_ranges_are_allowed(tmp_path):
    gan_config, vdu, unlearn = (JOBS[name].config for name in ("gan", "vdu", "unlearn"))
    gan_config(
        str(tmp_path), r1_weight=0, ema_decay=0, path_length_weight=0, guard_examples=16, r1_every=1, **PUSHED, **QUIET
    )
    assert unlearn(str(tmp_path), forget_accuracy=0.0, **PUSHED, **QUIET).hub_strategy == "end"
    config = vdu(str(tmp_path), gamma=0.25, t_range=[0.0, 1.0], **QUIET)
    assert (config.forget_weight, config.stability_weight) == (0.75, 0.25)
    paper = vdu.paper(str(tmp_path), gamma=0.1, checkpoints=["a", "b"], **QUIET)
    assert (paper.forget_weight, paper.stability_weight, paper.own_samples, paper.guard) == (0.9, 0.1, 0, False)


def test_an_adapter_that_cannot_be_merged(check_refused):
    from peft import IA3Config

    adapter = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    check_refused("unlearn", "merge_adapter=True: a IA3 adapter cannot be folded", "merge_adapter=False", peft_config=adapter,
                  fisher_weight=0.0, untouched=False)  # fmt: skip


# Machines


@pytest.mark.parametrize("name", [name for name in JOBS if name not in ("sft", "fine")])  # TRL refuses
def test_several_gpus_in_one_process(name, check_refused, tmp_path):
    job = JOBS[name]
    args = job.config(str(tmp_path / "out"), **(QUIET | job.values))
    assert args.n_gpu == 0
    args._n_gpu = 2
    check_refused(name, "several GPUs in one process", "accelerate launch", args=args)


@pytest.mark.parametrize("flag", ["is_deepspeed_enabled", "is_fsdp_enabled"])
def test_sharded_parameters(flag):
    """As a trainer that only looks says of itself; there is none without GPUs."""
    flags = {"is_deepspeed_enabled": False, "is_fsdp_enabled": False, flag: True}
    kind = {"is_deepspeed_enabled": "DeepSpeed", "is_fsdp_enabled": "FSDP"}[flag]
    with pytest.raises(ValueError, match=f"^{kind} is not supported: .*; use DDP") as error:
        check_model(SimpleNamespace(args=SimpleNamespace(n_gpu=0, only_looks=True), model=vit(), **flags))
    assert one_line(str(error.value))


@pytest.mark.parametrize(("name", "value", "words"), [
    ("FSDP_VERSION", "1", "fsdp_version=1: flattens parameters; set it to 2"),
    ("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT", "fsdp_state_dict_type: no model would be saved"),
    ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "fsdp_cpu_ram_efficient_loading: "),
    ("FSDP_ACTIVATION_CHECKPOINTING", "true", "fsdp_activation_checkpointing: .*set activation_checkpointing=True of the arguments"),
    ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params: "),
])  # fmt: skip
def test_settings_of_fsdp(name, value, words, tmp_path, monkeypatch):
    """As `accelerate launch` tells of its config: before a model is looked for, and of a plugin that the trainer was given."""
    usual = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT"}
    for known, setting in (usual | {name: value}).items():
        monkeypatch.setenv(known, setting)
    with pytest.raises(ValueError, match=f"^{words}") as error:
        build("unlearn", tmp_path, model="nowhere")
    assert one_line(str(error.value))
    state = SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin())
    trainer = SimpleNamespace(
        args=SimpleNamespace(n_gpu=0), is_deepspeed_enabled=False, is_fsdp_enabled=True, accelerator=SimpleNamespace(state=state),
    )  # fmt: skip
    with pytest.raises(ValueError, match=f"^{words}"):
        check_parallelism(trainer, "it steps or shards out of sight", shares=True)


@pytest.mark.parametrize(("launched", "told"), [("true", 1), ("false", 0)])
def test_fsdp_on_the_cpu_is_told_to_be_none(launched, told, tmp_path, monkeypatch, caplog):
    """accelerate takes DDP there, and every process needs the memory of the whole model."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", launched)
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")
    assert not build("unlearn", tmp_path).is_fsdp_enabled
    assert sum(record.message.startswith("FSDP: is for accelerators") for record in caplog.records) == told


@pytest.mark.parametrize("name", ["unlearn", "in_run"])
def test_deepspeed_is_refused_before_a_model_is_loaded(name, tmp_path, monkeypatch):
    args = JOBS[name].config(str(tmp_path), **QUIET)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(
        ValueError, match="^DeepSpeed is not supported: .*; use FSDP2 .recipes/accelerate/fsdp2.yaml.*"
    ) as error:
        build(name, tmp_path, model="nowhere", args=args)
    assert one_line(str(error.value))


def sharing():
    """What is asked of a trainer under FSDP2."""
    settings = {"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": False}
    state = SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin(**settings))
    return SimpleNamespace(
        args=SimpleNamespace(n_gpu=0), is_deepspeed_enabled=False, is_fsdp_enabled=True, accelerator=SimpleNamespace(state=state),
        model=vit(), model_init=vit,
    )  # fmt: skip


def test_a_model_that_is_made_anew_where_it_is_shared():
    with pytest.raises(ValueError, match="^model_init: is not supported with FSDP2, .*; pass model=") as error:
        check_model(sharing())
    assert one_line(str(error.value))


@pytest.mark.parametrize("name", ["unlearn", "in_run"])
def test_processes_that_do_not_know_of_each_other(name, check_refused, monkeypatch):
    args = JOBS[name].config("unused", **QUIET)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_refused(name, "use_cpu: 2 processes were launched", "set use_cpu=True", args=args)


# Where it is written to


@pytest.mark.parametrize("name", JOBS)
def test_a_good_trainer_writes_nothing_before_it_trains(name, tmp_path):
    build(name, tmp_path, **({"grid_images": 4} if name in ("vdu", "adapt") else {}))
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", UNLEARNERS)
def test_a_folder_that_cannot_be_written_to(name, tmp_path):
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="^output_dir: cannot write to .*choose another folder$"):
            build(name, folder)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_is_read_only(tmp_path):
    args = JOBS["unlearn"].config(str(tmp_path), **QUIET)
    tmp_path.chmod(0o500)
    user = os.geteuid()
    if user == 0:  # who may write anywhere
        os.seteuid(65534)
    try:
        with pytest.raises(ValueError, match="^output_dir: cannot write to .*Permission denied"):
            check_arguments(
                "any", args, train_dataset=None, forget_dataset=FORGET, retain_dataset=None, heldout_dataset=None
            )
    finally:
        os.seteuid(user)


ORIGINALS = {  # jobs, what is saved, and what they are given of its folder
    "name": (("unlearn", "in_run"), vit, lambda folder: {"model": str(folder)}),
    "object": (("unlearn", "in_run"), vit, lambda folder: {"model": type(vit()).from_pretrained(folder)}),
    "language model": (("sft", "fine"), llama, lambda folder: {"model": type(llama()).from_pretrained(folder)}),
    "pipeline's name": (("vdu",), ddpm, lambda folder: {"pipeline": str(folder)}),
    "pipeline": (("vdu",), ddpm, lambda folder: {"pipeline": diffusers.DDPMPipeline.from_pretrained(folder)}),
    "denoiser": (("vdu",), ddpm, lambda folder: (
        {"model": diffusers.UNet2DModel.from_pretrained(folder, subfolder="unet"), "pipeline": None} | SCHEDULER
    )),
    "denoiser's folder": (("vdu",), ddpm, lambda folder: {"model": str(folder / "unet"), "pipeline": None} | SCHEDULER),
    "GAN's name": (GANS, gan, lambda folder: {"model": str(folder), "path_length_weight": 0.0}),
    "GAN": (GANS, gan, lambda folder: {"model": GANPipeline.from_pretrained(folder), "path_length_weight": 0.0}),
}  # fmt: skip


@pytest.mark.parametrize("form", ORIGINALS)
def test_a_folder_that_holds_the_original(form, tmp_path):
    """By its name or as an object, and by a link to it or within it."""
    names, make, given_of = ORIGINALS[form]
    make().save_pretrained(tmp_path / "original")
    (tmp_path / "link").symlink_to(tmp_path / "original")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name in names:
        for folder in ("link", "original/below"):
            with pytest.raises(ValueError, match="^output_dir: .* holds the original model; choose another folder$"):
                build(name, tmp_path / folder, **given_of(tmp_path / "original"))
        trainer = build(name, tmp_path / "new", **given_of(tmp_path / "original"))
        with pytest.raises(ValueError, match="^output_dir: .* holds the original model; choose another folder$"):
            trainer.save_model(tmp_path / "link")
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_demo_in_a_folder_that_is_used(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(ValueError, match="^output_dir: .* is not empty; empty it, or choose another folder$"):
        demo.run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


# Asked too early


def test_evaluation_without_images(tmp_path):
    with pytest.raises(ValueError, match="^eval_dataset: missing; evaluate"):
        build("gan", tmp_path).evaluate()


def test_influence_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"^influence: this trainer has not trained; call train\(\) first") as error:
        build("in_run", tmp_path).influence  # noqa: B018 (a property)
    assert one_line(str(error.value))


def test_nothing_is_refused_that_only_looks_like_it(tmp_path):
    """Rows that nothing identifies may be the same with another label; the best model may be loaded where nothing is swept."""
    build(
        "unlearn",
        tmp_path,
        forget_dataset=FORGET.remove_columns("id"),
        retain_dataset=labelled([1] * 4).remove_columns("id"),
    )
    best = {
        "load_best_model_at_end": True,
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "save_steps": 2,
        "eval_steps": 2,
    }
    trainer = build("in_run", tmp_path, eval_dataset=RETAIN, max_steps=3, **best)
    trainer.train()
    assert trainer.state.global_step == 3


@pytest.mark.parametrize(("name", "make"), [("unlearn", vit), ("sft", llama), ("fine", llama)])
def test_refuses_a_model_that_is_not_in_memory(name, make, tmp_path):
    with pytest.raises(ValueError, match=r"^model: some of its weights are not in memory [^\n]*load it whole"):
        build(name, tmp_path / "out", model=cpu_offload(make()))
