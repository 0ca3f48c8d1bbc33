"""hf_unlearn: find, forget, verify, filter and publish, for Hugging Face models. Names are imported when first used."""

from importlib import import_module


__version__ = "0.1.0.dev0"

_EXPORTS = {
    "AdaptThenUnlearnConfig": "unlearning.adapt_then_unlearn",
    "AdaptThenUnlearnTrainer": "unlearning.adapt_then_unlearn",
    "DCGANDiscriminator": "models.dcgan",
    "DCGANGenerator": "models.dcgan",
    "FASTConfig": "filtering.checker",
    "FASTFitter": "filtering.fast",
    "FASTResult": "filtering.fast",
    "FASTSafetyChecker": "filtering.checker",
    "FINEConfig": "influence.config",
    "FINEMixin": "influence.trainer",
    "FINETrainer": "influence.sft",
    "FilterEncoder": "filtering.encoders",
    "FilterOutput": "filtering.checker",
    "FilteredImageError": "filtering.actions",
    "FilteredPipeline": "filtering.pipeline",
    "GANConfig": "models.gan_config",
    "GANPipeline": "models.pipeline",
    "GANTrainer": "models.gan_trainer",
    "InfluenceConfig": "influence.config",
    "InfluenceReport": "influence.report",
    "InfluenceTrainer": "influence.trainer",
    "PBUConfig": "unlearning.pbu",
    "PBUTrainer": "unlearning.pbu",
    "UnlearnConfig": "unlearning.config",
    "UnlearnMixin": "unlearning.trainer",
    "UnlearnSFTConfig": "unlearning.config",
    "UnlearnSFTTrainer": "unlearning.trainer",
    "UnlearnTrainer": "unlearning.trainer",
    "VDUConfig": "unlearning.vdu",
    "VDUTrainer": "unlearning.vdu",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_EXPORTS[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})
