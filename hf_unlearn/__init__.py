"""hf_unlearn: find, forget, verify, filter and publish, for Hugging Face models. Names are imported when first used."""

from importlib import import_module


__version__ = "0.2.0"

_EXPORTS = {
    "AdaptThenUnlearnConfig": "unlearning.gan.adapt_then_unlearn",
    "AdaptThenUnlearnTrainer": "unlearning.gan.adapt_then_unlearn",
    "AuditReport": "audit.report",
    "ChoiceEvaluation": "training.choices",
    "ChoiceScores": "training.choices",
    "ConceptAblationConfig": "unlearning.diffusion.concept_ablation",
    "ConceptAblationTrainer": "unlearning.diffusion.concept_ablation",
    "ConceptRedirection": "unlearning.diffusion.redirect",
    "DCGANDiscriminator": "gan.dcgan",
    "DCGANGenerator": "gan.dcgan",
    "DiffusionInfluenceConfig": "influence.diffusion",
    "DiffusionInfluenceTrainer": "influence.diffusion",
    "ESDConfig": "unlearning.diffusion.esd",
    "ESDTrainer": "unlearning.diffusion.esd",
    "FASTConfig": "filtering.checker",
    "FASTFitter": "filtering.fitting.fast",
    "FASTResult": "filtering.fitting.fast",
    "FASTSafetyChecker": "filtering.checker",
    "FINEConfig": "influence.config",
    "FINEMixin": "influence.trainer",
    "FINETrainer": "influence.sft",
    "ForgettingCallback": "training.watching",
    "FilterBlock": "filtering.drawing.blocks",
    "FilterEncoder": "filtering.encoding.encoders",
    "FilterOutput": "filtering.checker",
    "FilteredImageError": "filtering.drawing.actions",
    "FilteredPipeline": "filtering.drawing.pipeline",
    "GANConfig": "gan.config",
    "GANPipeline": "gan.pipeline",
    "GANTrainer": "gan.trainer",
    "InfluenceConfig": "influence.config",
    "InfluenceIndex": "influence.index",
    "InfluenceReport": "influence.report.report",
    "InfluenceTrainer": "influence.trainer",
    "LanguageEvaluation": "training.evaluation",
    "LanguageScores": "training.evaluation",
    "PBUConfig": "unlearning.classifiers.pbu",
    "PBUTrainer": "unlearning.classifiers.pbu",
    "PromptEffect": "unlearning.diffusion.prompt_effect",
    "SalUnConfig": "unlearning.diffusion.salun",
    "SalUnTrainer": "unlearning.diffusion.salun",
    "TextMoments": "unlearning.diffusion.text_moments",
    "UnlearnConfig": "unlearning.config",
    "UnlearnMixin": "unlearning.trainer",
    "UnlearnSFTConfig": "unlearning.config",
    "UnlearnSFTTrainer": "unlearning.language.trainer",
    "UnlearnTrainer": "unlearning.trainer",
    "VDUConfig": "unlearning.diffusion.vdu",
    "VDUTrainer": "unlearning.diffusion.vdu",
    "attribute": "influence.attribution",
    "attribute_tokens": "influence.tokens",
    "in_forget_set": "hub.verify",
    "publish": "hub.objects",
    "redirect_concept": "unlearning.diffusion.redirect",
    "smoothness": "influence.smoothness",
    "speed": "unlearning.diffusion.speed",
    "uce": "unlearning.diffusion.uce",
    "verify_provenance": "hub.verify",
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
