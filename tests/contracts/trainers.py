"""One small job for every trainer: the one place of these tests that knows how each of them is built."""

import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from datasets import Dataset
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_unlearn import (
    AdaptThenUnlearnConfig,
    AdaptThenUnlearnTrainer,
    DCGANDiscriminator,
    DCGANGenerator,
    GANConfig,
    GANPipeline,
    GANTrainer,
    PBUConfig,
    PBUTrainer,
    UnlearnConfig,
    UnlearnSFTConfig,
    UnlearnSFTTrainer,
    UnlearnTrainer,
    VDUConfig,
    VDUTrainer,
)
from hf_unlearn.influence.config import FINEConfig, InfluenceConfig
from hf_unlearn.influence.report.records import read_observations
from hf_unlearn.influence.sft import FINETrainer
from hf_unlearn.influence.trainer import InfluenceTrainer


WORDS = ["<pad>", "</s>", "paris", "rome", "is", "the", "capital", "of", "france", "my", "order", "never", "arrived"]
# A gradient of zero in theory is one of rounding in practice, which Adam makes a whole step of, but for a large epsilon.
QUIET = {
    "report_to": "none", "use_cpu": True, "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no",
    "dataloader_pin_memory": False, "adam_epsilon": 1e-3,
}  # fmt: skip


def images(n, labels=(3,), *, seed=0, channels=1, size=8):
    """`n` random images in [−1, 1] as rows, brighter than what an untrained model draws. Another seed, other ids."""
    pixels = 1 - torch.rand(n, channels, size, size, generator=torch.Generator().manual_seed(seed))
    pixels[..., 0, 0] = -0.1  # or they might be in [0, 1]
    rows = {"id": [1000 * seed + 7 * row for row in range(n)], "pixel_values": pixels.numpy()}
    return Dataset.from_dict(rows | {"labels": [labels[row % len(labels)] for row in range(n)]}).with_format("torch")


def pairs(n, *, seed=0):
    """Questions and answers of different lengths."""
    draw = torch.Generator().manual_seed(seed)

    def words(count):
        return " ".join(WORDS[i] for i in torch.randint(2, len(WORDS), (count,), generator=draw).tolist())

    rows = [
        {"id": f"{seed} {row}", "prompt": words(2 + row % 3), "completion": " " + words(1 + row % 4)}
        for row in range(n)
    ]
    return Dataset.from_list(rows)


def tokenizer():
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", model_max_length=64)


def vit(dropout=0.0):
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, num_labels=5, hidden_dropout_prob=dropout, initializer_range=0.2, attn_implementation="eager",
    )  # fmt: skip
    return ViTForImageClassification(config)


def resnet():
    config = ResNetConfig(
        num_channels=1, embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=5
    )
    return ResNetForImageClassification(config)


def llama(dropout=0.0):
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64, initializer_range=0.2, attention_dropout=dropout, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def ddpm():
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=2,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=20))


def gan(norm="batch", size=8, channels=1, latent_dim=4):
    generator = DCGANGenerator(size, channels, latent_dim=latent_dim, base_channels=4, norm=norm)
    generator.mapping = nn.Identity()  # path lengths are of a mapping network, which a DCGAN has not
    return GANPipeline(generator, DCGANDiscriminator(size, channels, base_channels=4))


def seeded(make: Callable, *args: Any, **kwargs: Any) -> Any:
    """Always with the same weights; the global random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make(*args, **kwargs)


def own_images(n=40, norm="batch"):
    """What `gan` draws before it is trained."""
    return seeded(gan, norm).draw(torch.randn(n, 4, generator=torch.Generator().manual_seed(3)))


@dataclass(frozen=True)
class Job:
    """A trainer, its config, what its constructor is given besides, and settings.

    Attributes:
        given (callable): `dropout` to the constructor's arguments; called with the seed set.
        start (`str`): name of the argument that holds what is trained.
    """

    trainer: type
    config: type
    given: Callable[[float], dict[str, Any]]
    values: dict[str, Any]
    start: str = "model"


GUARDED = {"guard": True, "guard_patience": 50, "utility_tolerance": 100.0}
RETAIN = {"retain": images(6, [0, 1, 2], seed=2)}
RETAIN_16 = {"retain": images(6, [0, 1, 2], seed=2, size=16)}
INFLUENCE = {"target_batch_size": 3, "target_every": 3, "burn_in": 0.0, "max_grad_norm": 1.0}
GAN_VALUES = {"guard": True, "guard_steps": 1, "ema_decay": 0.5, "r1_every": 2, "learning_rate": 1e-3}


def _watched(observation):
    def given(dropout):
        return {"model": vit(dropout), "train_dataset": images(9, [0, 1, 2]), "target_dataset": images(5, seed=1)}

    values = {"observation": observation, "optim": "adamw_torch", "learning_rate": 1e-2}
    return Job(InfluenceTrainer, InfluenceConfig, given, INFLUENCE | values)


JOBS = {
    "unlearn": Job(
        UnlearnTrainer,
        UnlearnConfig,
        lambda dropout: {
            "model": vit(dropout), "forget_dataset": images(9), "retain_dataset": images(5, [0, 1], seed=1),
            "heldout_dataset": images(4, [2], seed=3), "eval_dataset": RETAIN,
        },
        {"forget": "examples", "learning_rate": 1e-2, "replay_weight": 1.0, "fisher_weight": 0.1, "max_grad_norm": 1.0} | GUARDED,
    ),
    "pbu": Job(
        PBUTrainer,
        PBUConfig,
        lambda dropout: {"model": resnet(), "forget_dataset": images(9, [4], size=16), "eval_dataset": RETAIN_16},
        {"learning_rate": 1e-2, "bn": "train", "guard_steps": 1} | GUARDED,
    ),
    "sft": Job(
        UnlearnSFTTrainer,
        UnlearnSFTConfig,
        lambda dropout: {"model": llama(dropout), "forget_dataset": pairs(9), "processing_class": tokenizer()},
        # Beside so few own samples no word is the subject, so that there are no further questions: nine rows, as the others have.
        {
            "learning_rate": 1e-2, "bf16": False, "gradient_checkpointing": False, "own_samples": 2, "retain_per_forget": 1,
            "per_device_train_batch_size": 8,
        } | GUARDED,
    ),
    "vdu": Job(
        VDUTrainer,
        VDUConfig,
        lambda dropout: {"pipeline": ddpm(), "forget_dataset": images(9)},
        {
            "learning_rate": 1e-2, "ema_decay": 0.5, "stability_weight": 1e-4, "stability": "fisher", "own_samples": 16,
            "num_inference_steps": 2, "batch_size": 16, "grid_images": 0, "max_steps": -1, "guard_steps": 1,
        } | GUARDED,
        "pipeline",
    ),
    "gan": Job(
        GANTrainer,
        GANConfig,
        lambda dropout: {"model": gan(), "train_dataset": own_images()},
        {"path_length_weight": 1.0, "path_length_every": 1} | GAN_VALUES,
    ),
    "adapt": Job(
        AdaptThenUnlearnTrainer,
        AdaptThenUnlearnConfig,
        lambda dropout: {
            "model": gan("pixel"), "undesired": own_images(30, "pixel")[:10], "clean": own_images(30, "pixel")[10:]
        },
        {"adapt_steps": 3, "fisher_samples": 8, "own_samples": 32, "grid_images": 0, "negative_share": 0.25} | GAN_VALUES,
    ),
    "in_run": _watched("in_run"),
    "propagated": _watched("propagated"),
    "fine": Job(
        FINETrainer,
        FINEConfig,
        lambda dropout: {
            "model": llama(dropout), "train_dataset": pairs(9), "target_dataset": pairs(4, seed=1),
            "processing_class": tokenizer(),
        },
        {"learning_rate": 1e-2, "bf16": False, "gradient_checkpointing": False} | INFLUENCE,
    ),
}  # fmt: skip
GANS = ("gan", "adapt")
INFLUENCES = ("in_run", "propagated", "fine")
UNLEARNERS = ("unlearn", "pbu", "sft", "vdu")


def arguments(name: str, dropout: float = 0.0) -> dict[str, Any]:
    """What the constructor is given besides `args`: anew, and always the same."""
    return seeded(JOBS[name].given, dropout)


def build(name: str, folder, *, mixin: type | None = None, dropout: float = 0.0, **changes: Any):
    """The trainer of a job that writes into `folder`; `changes` are settings or arguments of the constructor."""
    job = JOBS[name]
    known = {field.name for field in fields(job.config)}
    settings = {key: changes.pop(key) for key in list(changes) if key in known}
    given = arguments(name, dropout) | changes
    given.setdefault("args", None)
    if given["args"] is None:
        given["args"] = job.config(str(folder), **(QUIET | job.values | settings))
    trainer = job.trainer if mixin is None else type(mixin.__name__, (mixin, job.trainer), {})
    return trainer(**given)


def modules(given: Any) -> list[nn.Module]:
    """Of a model or a pipeline."""
    parts = [given, *getattr(given, "components", {}).values()]
    return [part for part in parts if isinstance(part, nn.Module)]


@torch.no_grad()
def spoilt(given: Any) -> Any:
    """The same model or pipeline with other weights."""
    for module in modules(given):
        for parameter in module.parameters():
            parameter.add_(0.1)
    return given


# What a run comes to


def outcome(trainer) -> dict[str, torch.Tensor]:
    """All that a run ends with, by `group/name`: weights, optimiser, what the guard saw, what was recorded."""
    found = {
        f"model/{name}": value for name, value in trainer.accelerator.unwrap_model(trainer.model).state_dict().items()
    }
    if hasattr(trainer, "players"):
        found |= {f"players/{name}": value for name, value in trainer.players().items()}
    for index, state in trainer.optimizer.state_dict()["state"].items():
        found |= {f"optimizer/{index}/{name}": torch.as_tensor(value) for name, value in state.items()}
    found["schedule/rate"] = torch.tensor(trainer.lr_scheduler.get_last_lr(), dtype=torch.float64)
    if getattr(trainer, "guard", None):
        looks = [list(asdict(look).values()) for look in trainer.guard.looks]
        found["looks/all"] = torch.tensor(looks, dtype=torch.float64)
    if hasattr(trainer, "records_dir"):
        found |= records(trainer)
    return {name: value.detach().clone().contiguous() for name, value in found.items()}


def records(trainer) -> dict[str, torch.Tensor]:
    """Those of `outcome` that an influence trainer has written."""
    seen, _ = read_observations(trainer.records_dir)
    columns = [("rows", seen, ("step", "example", "weight", "value"))]
    columns += [("steps", seen.steps, ("step", "weight", "size", "mean", "variance"))]
    found = {}
    for group, part, names in columns:
        for name in names:
            values = torch.tensor(getattr(part, name))
            found[f"{group}.{name}/all"] = values.nan_to_num(-1.0) if values.is_floating_point() else values
    return found


# Kernels may sum in another order where memory lies differently (MKL does, unless it is told that it must not), which puts
# √n·ε ≈ 1e-6 of a gradient of 0.1 wrong; a step of Adam makes at most 1/adam_epsilon = 1e3 times that of it, and a run has
# ten: 1e-3 of the way that the weights go.
TOLERANCE = 1e-3
EXACT = torch.backends.mkl.is_available() and os.environ.get("MKL_CBWR") == "COMPATIBLE"


def check_same(first: dict, second: dict, start: dict | None = None, exact: bool = EXACT) -> None:
    """Bit for bit; without `exact`, each group within `TOLERANCE` of its norm, for weights of the way from `start`."""
    assert first.keys() == second.keys()
    groups: dict[str, list[float]] = {}
    for name, value in first.items():
        assert value.shape == second[name].shape, name
        if exact or not value.is_floating_point():
            assert torch.equal(value, second[name]), name
        origin = 0.0 if start is None else start.get(name, torch.zeros(())).double()
        parts = groups.setdefault(name.split("/")[0], [0.0, 0.0])
        parts[0] += (value.double() - second[name].double()).nan_to_num().square().sum().item()
        parts[1] += (second[name].double() - origin).nan_to_num(posinf=0.0).square().sum().item()
    for group, (off, way) in groups.items():
        assert off <= TOLERANCE**2 * way, f"{group}: {(off / way) ** 0.5 if way else off:.2g} of the way apart"


def weights(trainer) -> dict[str, torch.Tensor]:
    """Those of `outcome` that training starts from."""
    found = {f"model/{name}": value for name, value in trainer.model.state_dict().items()}
    if hasattr(trainer, "players"):
        found |= {f"players/{name}": value for name, value in trainer.players().items()}
    return {name: value.detach().clone() for name, value in found.items()}
