"""`attribute`: which examples taught a model that is already trained, from its checkpoints or from its last state alone."""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.utils import logging

from ..data import looks_of
from ..files import loading
from ..training.checks import check_number
from ..training.models import is_causal_lm, load_model
from .config import FINEArguments, FINEConfig, InfluenceConfig
from .diffusion import DiffusionInfluenceConfig, DiffusionInfluenceTrainer, is_pipeline
from .finished.checkpoints import Checkpoint, Optimizer, checkpoints_of, has_checkpoints, optimizer_of, segments_of
from .finished.curvature import Curvature, damped
from .finished.looks import Looks
from .finished.unrolled import Unrolled, basis_of, shared_out, target_shares
from .report.observations import Observations, Steps, step_statistics
from .report.report import InfluenceReport
from .report.unit import ORDER_ONLY
from .sft import FINETrainer
from .trainer import FINEMixin, InfluenceTrainer


logger = logging.get_logger(__name__)

Model = nn.Module | str | os.PathLike
DAMPING = 0.1
ONE_MODEL = "one finished model does not tell how losses differ from training to training"
NO_OPTIMIZER = "a checkpoint has no state of SGD, Adam or AdamW (optimizer.pt), so the steps' noise is not known"


def attribute(
    model: Model | Sequence[str | Path],
    train_dataset: Any,
    target_dataset: Any = None,
    *,
    target: Literal["self"] | None = None,
    checkpoints: str | Path | Sequence[str | Path] | None = None,
    args: FINEArguments | None = None,
    processing_class: Any = None,
    data_collator: Callable | None = None,
    trainer_class: type[FINEMixin] | None = None,
    damping: float = DAMPING,
    curvature_examples: int = 4096,
    target_window: float = 0.2,
) -> InfluenceReport:
    r"""Which training examples taught a finished model a behaviour. Nothing is trained.

    With **checkpoints** of its training, influence is unrolled in segments around them
    ([SOURCE](https://arxiv.org/abs/2405.12186), see [`~hf_unlearn.influence.finished.unrolled`]), and μ is in standard deviations of the
    target's loss over trainings, as with `observation="propagated"`. From **the model alone** it is the influence function with EK-FAC
    curvature ([Grosse et al. 2023](https://arxiv.org/abs/2308.03296)),

    $$ a_{i,c} = \nabla \ell_c(\hat\theta)^\top (F + \delta)^{-1} \nabla \ell_i(\hat\theta), $$

    F the Gauss–Newton matrix by layer and δ `damping` times its mean eigenvalue in the layer. It says who taught more and who less:
    **order only**, without a unit. The same holds of checkpoints whose optimiser is not known. See `report.unit`.

    What is seen are weights and biases of linear layers (LoRA's among them), convolutions and norms that are trainable: of a model with adapters those
    alone. Embeddings, heads of more than 8,192 outputs and what shares weights are not, and it is said how much that is.

    Args:
        model: a model, a folder or id of one; or the `output_dir` of a training, or a list of its checkpoints. Or a diffusion pipeline as for
            [`DiffusionInfluenceTrainer`], a folder of one with `args` of its kind.
        train_dataset, target_dataset, processing_class, data_collator: as for [`InfluenceTrainer`], or for [`FINETrainer`] where the model
            is a causal language model and the rows are not tokenized.
        target (`"self"`, *optional*): how much each example is learned by heart; from the last state alone.
        checkpoints (*optional*): an `output_dir` or checkpoints, where `model` is a model into which their weights are loaded.
        args ([`InfluenceConfig`] or [`FINEConfig`], *optional*): batch size (`per_device_eval_batch_size`), `layers`, `id_column`,
            `max_length`, `seed`, `max_grad_norm` as it was in training (where gradients' norms were logged), device and precision.
        trainer_class (*optional*): a subclass whose `per_example_loss` is the loss. Its curvature is that of its own gradients.
        damping (`float`, defaults to 0.1): see above.
        curvature_examples (`int`, defaults to 4096): training examples that the curvature is measured on, drawn at random.
        target_window (`float`, defaults to 0.2): with checkpoints, the target is its mean loss at those in this last share of the steps.

    Returns:
        [`InfluenceReport`], in memory; [`~InfluenceReport.save_to_disk`] keeps it.

    Raises:
        ValueError: naming the argument, what is wrong with it and what to do.
    """
    for name, value, rule in (
        ("damping", damping, "> 0"), ("curvature_examples", curvature_examples, "≥ 1"),
        ("target_window", target_window, "in [0, 1)"),
    ):  # fmt: skip
        check_number(name, value, rule)
    model, found = model_and_checkpoints(model, checkpoints)
    loads = bool(found) and isinstance(model, nn.Module)
    kept = {name: value.clone() for name, value in model.state_dict().items()} if loads else {}
    with finished_trainer(
        model, train_dataset, target_dataset, target=target, args=args, processing_class=processing_class,
        data_collator=data_collator, trainer_class=trainer_class, factored=not found or target == "self",
    ) as (trainer, looks):  # fmt: skip
        sweep = Attribution(trainer, looks, damping, curvature_examples)
        try:
            if found and target != "self":
                observations, about = sweep.of_segments(found, target_window)
            else:
                if found:
                    trainer._load_from_checkpoint(str(found[-1].folder), trainer.model)
                observations, about = sweep.of_one()
        finally:
            if kept:
                trainer.model.load_state_dict(kept)
        report = InfluenceReport.from_observations(observations, about)
    logger.warning("Influence: %s μ has %s.", sweep.said, report.unit)
    return report


def model_and_checkpoints(model: Any, checkpoints: Any) -> tuple[Model, list[Checkpoint]]:
    """The model or its name, and the checkpoints that it was."""
    named = isinstance(model, str | os.PathLike)
    if named or isinstance(model, nn.Module) or is_pipeline(model):
        if checkpoints is None and named and has_checkpoints(model):
            checkpoints = model
        found = [] if checkpoints is None else checkpoints_of(checkpoints)
        whole = named and any(Path(model, name).is_file() for name in ("config.json", "adapter_config.json"))
        return (model if not (named and found) or whole else found[-1].folder), found
    if checkpoints is not None:
        raise ValueError("checkpoints: given beside a list of them as the model; keep one of them")
    try:
        found = checkpoints_of(list(model))
    except TypeError:
        raise ValueError(
            f"model: {type(model).__name__} is no model; pass a model, a path, an id, or a list of checkpoints"
        ) from None
    return found[-1].folder, found


@contextmanager
def finished_trainer(
    model: Model,
    train_dataset: Any,
    target_dataset: Any = None,
    *,
    target: str | None = None,
    args: FINEArguments | None = None,
    processing_class: Any = None,
    data_collator: Callable | None = None,
    trainer_class: type[FINEMixin] | None = None,
    factored: bool = True,
) -> Iterator[tuple[FINEMixin, Looks]]:
    """A trainer that is not to train, and looks through it; its folder is gone afterwards."""
    if isinstance(args, DiffusionInfluenceConfig) or is_pipeline(model):
        trainer_class = trainer_class or DiffusionInfluenceTrainer
    elif isinstance(model, str | os.PathLike):
        model, processing_class = _loaded(model, args, processing_class)
    if trainer_class is None:
        tokenized = "input_ids" in (getattr(train_dataset, "column_names", None) or ())
        instructs = isinstance(args, FINEConfig) or (args is None and is_causal_lm(model) and not tokenized)
        trainer_class = FINETrainer if instructs else InfluenceTrainer
    with tempfile.TemporaryDirectory() as folder:
        if args is None:
            args = trainer_class._config_class(output_dir=folder, report_to="none", save_strategy="no")
        elif not isinstance(args, trainer_class._config_class):
            raise ValueError(f"args: needs {trainer_class._config_class.__name__}, got {type(args).__name__}")
        args = copy(args)
        args.output_dir, args.observation, args.push_to_hub, args.only_looks = folder, "in_run", False, True
        args.preconditioned, args.target_rank, args.last_steps, args.n_calibration_runs = False, None, None, 0
        if args.world_size > 1:
            raise ValueError("attribute: runs in one process; start it without accelerate launch")
        if target_dataset is None and target is None:
            target_dataset = train_dataset  # of which nothing is asked
        extra = {} if data_collator is None else {"data_collator": data_collator}
        trainer = trainer_class(
            model, args, train_dataset=train_dataset, target_dataset=target_dataset, target=target,
            processing_class=processing_class, **extra,
        )  # fmt: skip
        looks = Looks(trainer, own_loss=not trainer.has_classes)
        looks.prepare(factored=factored)
        yield trainer, looks


def _loaded(name: str | os.PathLike, args: Any, processing_class: Any) -> tuple[nn.Module, Any]:
    args = args if args is not None else InfluenceConfig  # of which only settings of loading are asked
    if not Path(name, "adapter_config.json").is_file():
        model, processing_class, _ = load_model(name, args, processing_class, any_head=True)
        return model, processing_class
    from peft import PeftConfig, PeftModel

    with loading("model", name, "an adapter"):
        base = PeftConfig.from_pretrained(str(name)).base_model_name_or_path
    model, processing_class, _ = load_model(base, args, processing_class, any_head=True)
    with loading("model", name, "an adapter"):
        return PeftModel.from_pretrained(model, str(name), is_trainable=True), processing_class


def ordered(sample_ids: Sequence, targets: Sequence[str], weight: np.ndarray, values: np.ndarray) -> Observations:
    """Scores `[examples, targets]` of a finished model as observations of one step.

    The model is taken for a minimum, as influence functions do: without S the gradient of the loss is not zero but that of S.
    """
    number = len(weight)
    total, _, variance = step_statistics(weight, values)
    mean = np.zeros((1, len(targets)))
    return Observations(
        np.array(sample_ids), tuple(targets), np.zeros(number, int), np.arange(number), weight, values,
        Steps(np.zeros(1, int), np.array([total]), np.array([number]), mean, variance[None]),
    )  # fmt: skip


class Attribution:
    """One attribution."""

    def __init__(self, trainer: FINEMixin, looks: Looks, damping: float, curvature_examples: int):
        self.trainer, self.looks, self.ghost = trainer, looks, trainer._ghost
        self.damping, self.said = damping, ""
        self.number = len(trainer.sample_ids)
        generator = torch.Generator().manual_seed(trainer.args.seed)
        chosen = torch.randperm(self.number, generator=generator)[:curvature_examples]
        self.chosen = chosen.sort().values.tolist()

    def of_one(self) -> tuple[Observations, dict[str, Any]]:
        """At the model as it is."""
        own, names = self.trainer.target == "self", self.trainer.target_sets
        looks = self.looks
        with self._bar(1, 2) as bar, looks.quiet():
            curvature = looks.curvature(self.chosen, seed=self.trainer.args.seed, bar=bar)
            if own:
                weight, values = self._own_scores(curvature, bar)
            else:
                vectors = curvature.apply(looks.split(self.target_gradients()), damped(self.damping))
                weight, values = self._products(vectors, bar)
        about = self._about("finished", f"EK-FAC of {len(curvature.blocks)} blocks") | {
            ORDER_ONLY: ONE_MODEL,
            "damping": self.damping,
        }
        if own:
            steps = Steps(np.zeros(1, int), weight.sum()[None], np.array([self.number]), *np.full((2, 1, 1), np.nan))
            known = values[weight > 0]
            spread = np.full(self.number, known.var(ddof=1) / len(known) if len(known) > 1 else 1.0)
            values = np.stack([values, np.zeros(self.number), spread], axis=1)
            return self._observed([0], [weight], [values], steps), about
        return ordered(self.trainer.sample_ids, list(names), weight, values), about

    def of_segments(self, checkpoints: list[Checkpoint], window: float) -> tuple[Observations, dict[str, Any]]:
        """Around checkpoints of the training."""
        trainer, looks, last = self.trainer, self.looks, checkpoints[-1]
        grouped = self._grouped()
        optimizers = [optimizer_of(one, self.ghost.covered, grouped) for one in checkpoints]
        rates = [one and one.rate for one in optimizers]
        segments = segments_of(checkpoints, rates, trainer.args.max_grad_norm or 0.0)
        shares = target_shares([one.step for one in checkpoints], window)
        unrolled = Unrolled(last.step / last.epoch, self.number)
        rows, columns = [], []
        options: dict[str, Any] = {"chosen": self.chosen, "seed": trainer.args.seed}
        with self._bar(len(checkpoints), 2) as bar:
            for index in reversed(range(len(checkpoints))):
                trainer._load_from_checkpoint(str(checkpoints[index].folder), trainer.model)
                with looks.quiet():
                    if shares[index]:
                        unrolled.add(self.target_gradients(), shares[index])
                    root, decay = self._steps_of(optimizers[index])
                    basis = basis_of(
                        unrolled.vectors, root, decay, partial(looks.fisher_products, bar=bar, **options),
                        partial(looks.fisher_forms, bar=bar, **options),
                    )  # fmt: skip
                    weight, coordinates = self._products(looks.split(basis.probes), bar)
                share = torch.from_numpy(weight / weight.mean())
                gains, *noise = unrolled.through(segments[index], basis, torch.from_numpy(coordinates), share)
                total, mean, _ = step_statistics(weight, gains.numpy())
                rows.append((weight, gains.numpy()))
                columns.append((segments[index].stop - 1, total, mean, torch.stack(noise)))
        rows, columns = rows[::-1], columns[::-1]
        step, total, mean = (np.array([one[place] for one in columns]) for place in range(3))
        variance = shared_out(*torch.stack([one[3] for one in columns], dim=1)).numpy()
        steps = Steps(step, total, np.full(len(step), self.number), mean, variance)
        about = self._about("segments", f"{len(segments)} segments") | {"steps": last.step, "segments": len(segments)}
        if not all(optimizers):
            about[ORDER_ONLY] = NO_OPTIMIZER
        if last.step < last.max_steps:
            self.said += (
                f" The last checkpoint is after step {last.step} of {last.max_steps}; what came then is not counted."
            )
        weights, values = zip(*rows, strict=True)
        return self._observed(step, weights, values, steps), about

    # Parts

    def target_gradients(self) -> Tensor:
        """`[C, parameters]`, in fp32."""
        trainer = self.trainer
        flat = trainer._targets().gradients(trainer.model, list(self.ghost.covered.values())).float()
        if not flat.isfinite().all():
            raise ValueError("target_dataset: its gradient is not finite; look at its rows and at the model's weights")
        return flat

    def _steps_of(self, optimizer: Optimizer | None) -> tuple[Tensor, Tensor]:
        """√P and weight decay, `[parameters]` each; of plain gradient descent where they are not known."""
        covered = self.ghost.covered
        if optimizer is None:
            one = torch.cat([torch.ones_like(p, dtype=torch.float32).flatten() for p in covered.values()])
            return one, torch.zeros_like(one)
        decay = [torch.full_like(p, optimizer.decay[n], dtype=torch.float32).flatten() for n, p in covered.items()]
        return torch.cat([optimizer.preconditioner[name].flatten() for name in covered]).sqrt(), torch.cat(decay)

    def _products(self, vectors: Mapping[str, Tensor], bar) -> tuple[np.ndarray, np.ndarray]:
        """Weights `[examples]` and products `[examples, C]` of all training examples."""
        weights, values = np.zeros(self.number), None
        for positions, weight, dots in self.looks.own(range(self.number), targets=vectors):
            if values is None:
                values = np.zeros((self.number, dots.shape[1]))
            weights[positions], values[positions] = weight.cpu().numpy(), dots.double().cpu().numpy()
            bar.update()
        if not np.isfinite(values).all():
            raise ValueError("train_dataset: a gradient is not finite; look at its rows and at the model's weights")
        return weights, values

    def _own_scores(self, curvature: Curvature, bar) -> tuple[np.ndarray, np.ndarray]:
        inverse, weights, values = damped(self.damping), np.zeros(self.number), np.zeros(self.number)
        each = {name: inverse(mine.eigenvalues) for name, mine in curvature.blocks.items()}
        sums: list[Tensor] = []

        def visit(layer, found):
            sums.append(curvature.scores(layer, found, each))

        for positions, weight, _ in self.looks.own(range(self.number), visitor=visit):
            weights[positions], values[positions] = weight.cpu().numpy(), sum(sums).cpu().numpy()
            sums.clear()
            bar.update()
        return weights, values

    def _observed(self, steps: Sequence[int], weights: Sequence, values: Sequence, whole: Steps) -> Observations:
        trainer, times = self.trainer, len(steps)
        return Observations(
            sample_ids=np.array(trainer.sample_ids),
            targets=("self",) if trainer.target == "self" else tuple(trainer.target_sets),
            step=np.repeat(np.asarray(steps), self.number),
            example=np.tile(np.arange(self.number), times),
            weight=np.concatenate(weights),
            value=np.concatenate(values),
            steps=whole,
        )

    def _about(self, observation: str, how: str) -> dict[str, Any]:
        trainer, run = self.trainer, uuid.uuid4().hex
        unseen = dict(self.ghost.uncovered)
        whole = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        seen = sum(p.numel() for p in self.ghost.covered.values())
        labels = {"all": "every class", "drawn": "labels drawn from the model", "own": "the training set's own losses"}
        about = {
            "run_id": run, "looks": looks_of(trainer.train_dataset, run), "targets": ["self"] if trainer.target == "self" else
            list(trainer.target_sets), "observation": observation, "seed": trainer.args.seed, "curvature": labels[self.looks.labels],
            "settings": {"layers": trainer.args.layers, "curvature_examples": len(self.chosen)},
        }  # fmt: skip
        self.said = f"{how}; curvature by {labels[self.looks.labels]} on {len(self.chosen):,} examples."
        if unseen and seen < whole:
            about["unseen"] = {"share": 1 - seen / whole, "parameters": unseen}
            name, why = next(iter(unseen.items()))
            more = f" and {len(unseen) - 1} more" if len(unseen) > 1 else ""
            self.said += (
                f" {100 * (1 - seen / whole):.1f} % of the trainable parameters are not seen: {name} ({why}){more}."
            )
        return about

    def _grouped(self) -> list[list[str]]:
        """Names of the trainable parameters in the optimiser's groups, as `Trainer` makes them."""
        trained = [name for name, p in self.trainer.model.named_parameters() if p.requires_grad]
        decayed = set(self.trainer.get_decay_parameter_names(self.trainer.model))
        return [[name for name in trained if name in decayed], [name for name in trained if name not in decayed]]

    @contextmanager
    def _bar(self, points: int, passes: int) -> Iterator[tqdm]:
        looks = self.looks
        each = passes * looks.batches_of(len(self.chosen)) + looks.batches_of(self.number)
        with tqdm(total=points * each, desc="Influence", unit="batch", disable=self.trainer.args.disable_tqdm) as bar:
            yield bar
