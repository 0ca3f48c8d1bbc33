"""What a GAN's trainer writes: a pipeline with its card, and checkpoints to go on from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..files import load_tensors, save_tensors
from ..hub.loading import loading_code
from ..hub.origin import hub_id
from ..hub.provenance import hardware, library_versions, today
from ..hub.publish import forget_local_paths, save_settings
from ..hub.text import all_tags, line
from ..training.publishing import PushingMixin
from ..training.runs import RunMixin
from .pipeline import GANPipeline


if TYPE_CHECKING:
    from huggingface_hub import ModelCard


STATE = "gan.safetensors"


class GANSavingMixin(PushingMixin, RunMixin):
    """Saving, resuming, card and push of a [`GANTrainer`]."""

    _method = "gan"
    # Settings that decide what a step does: a run that is resumed must have them too.
    _decisive: tuple[str, ...] = (
        "discriminator_learning_rate", "r1_weight", "r1_every", "path_length_weight", "path_length_every",
        "discriminator_warmup", "ema_decay",
    )  # fmt: skip

    def players(self) -> dict[str, Tensor]:
        """The state of both players, of the average and of the path lengths, by name; live tensors."""
        state = {f"gan.{name}": value for name, value in self.model.state_dict().items()}
        state |= {f"averaged.{name}": value for name, value in self.averaged.state_dict().items()}
        return state | {"path_mean": self.path_mean}

    @torch.no_grad()
    def load_players(self, state: dict[str, Tensor]) -> None:
        """Write what [`~GANTrainer.players`] gave back into the players, in place.

        Raises:
            ValueError: a state of other players.
        """
        now = self.players()
        if {name: value.shape for name, value in now.items()} != {name: value.shape for name, value in state.items()}:
            raise ValueError(
                "resume_from_checkpoint: holds the state of other models; pass the pipeline it was trained with"
            )
        for name, value in now.items():
            value.copy_(state[name])

    def _train(self, checkpoint: str | None, **kwargs):
        if self.guard and not checkpoint:
            self.guard.begin()
        self._terms, self._terms_count = {}, 0  # of an earlier run, after its last log
        return super()._train(checkpoint, **kwargs)

    def _run_settings(self) -> dict[str, Any]:
        return super()._run_settings() | {name: getattr(self.args, name) for name in self._decisive}

    def _run_rows(self) -> dict[str, Any]:
        return {"train_dataset": getattr(self.train_dataset, "images", self.train_dataset)}

    @property
    def _is_over(self) -> bool:
        return super()._is_over or bool(self.guard and self.guard.collapsed)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.load_players(load_tensors(Path(resume_from_checkpoint, STATE), self.args.device))
        if self.guard:
            self.guard.load(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        self.load_players(load_tensors(Path(self.state.best_model_checkpoint, STATE), self.args.device))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if not self.args.should_save:
            return
        if folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            folder.mkdir(parents=True, exist_ok=True)
            save_tensors(self.players(), folder / STATE)
            if self.guard:
                self.guard.save(folder)
            return
        self.save_pipeline(folder)
        self._write_card(folder)

    def save_pipeline(self, folder: Path) -> None:
        """The pipeline, with its discriminator."""
        self.pipeline.save_pretrained(folder)
        forget_local_paths(folder)

    def _save_settings(self, folder: Path) -> None:
        save_settings(self.pipeline, folder)

    def model_card(self, source: str | Path, **kwargs: Any) -> ModelCard:
        """A short card: how the GAN was made, and how to draw with it.

        Args:
            source (`str` or `Path`): repository id, or folder that it was saved to, of which only the name is written.
            kwargs: metadata, as of [`~huggingface_hub.ModelCardData`]: `license`, `language`, `tags`, `datasets`. Default: what
                the card of the model that training started from says.
        """
        from huggingface_hub import ModelCard, ModelCardData

        name = str(source) if source == self.hub_model_id else Path(source).resolve().name
        args, tags = self.args, kwargs.pop("tags", ())
        title = kwargs.pop("model_name", Path(name).name)
        base = hub_id(self.base_model)
        data = ModelCardData(
            library_name="hf_unlearn",
            tags=all_tags("gan", tags),
            pipeline_tag="unconditional-image-generation",
            **({"base_model": base, "base_model_relation": "finetune"} if base else {}),
            **self._inherited(kwargs),
        )
        versions = ", ".join(f"{name} {number}" for name, number in library_versions().items())
        text = (
            f"# {line(title)}\n\nA {type(self.averaged).__name__} of {self.averaged.config.sample_size} pixels, trained by "
            f"hf_unlearn's GANTrainer: {self.state.global_step:,} steps of {self._train_batch_size * args.world_size} images, "
            f"learning rate {args.learning_rate:g}, R1 {args.r1_weight:g}, seed {args.seed}.\n\n"
            f"```python\n{loading_code(GANPipeline, name)}\n```\n\n"
            f"| | |\n|---|---|\n| made on | {today()} |\n| hardware | {hardware()} |\n| versions | {versions} |\n\n"
            "## Limitations\n\n- It draws what its training images were like, mistakes and biases of theirs included.\n"
            "- Nothing was measured of it here, and no audit was run.\n"
        )
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}")
