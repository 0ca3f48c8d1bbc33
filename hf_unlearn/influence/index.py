"""`InfluenceIndex`: projected gradients of a training set on disk, which new targets are asked of."""

from __future__ import annotations

import hashlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from safetensors import safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers.utils import logging

from ..data import looks_of
from ..files import complete_or_not_there, load_tensors, read_json, save_tensors, sized, undamaged, write_json
from ..training.checks import check_number
from .attribution import DAMPING, ONE_MODEL, Model, finished_trainer, model_and_checkpoints, ordered
from .checks import target_sets_of
from .config import FINEArguments
from .finished.blocks import Block
from .finished.looks import Looks
from .finished.projection import Projections
from .report.report import InfluenceReport
from .report.unit import ORDER_ONLY
from .trainer import FINEMixin


logger = logging.get_logger(__name__)

MANIFEST, PROJECTIONS, SAMPLES = "index.json", "projections.safetensors", "samples.json"
FORMAT = 1
SHARD_BYTES = 2**26
TARGETS_AT_ONCE = 64  # whose gradients are held whole
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class InfluenceIndex:
    """Gradients of a training set at a finished model, projected and whitened, in a folder; see
    [`~hf_unlearn.influence.finished.projection`] for what a row is.

        index = InfluenceIndex.build("me/my-model", rows, "index")
        index = InfluenceIndex.load("index", "me/my-model")  # later, elsewhere
        report = index.query({"complaints": complaints})

    A query says what [`attribute`] says of a finished model, in order and without a unit, as far as the projection keeps it. The index tells of the
    training data: keep it as private as those are.

    Args:
        folder (`str` or `Path`): of a finished index. Usually made by [`~InfluenceIndex.build`] and opened by [`~InfluenceIndex.load`].
        model: that the index was built with.
        arguments (`Mapping`): `args`, `processing_class`, `data_collator`, `trainer_class`, as for [`attribute`].
    """

    def __init__(self, folder: str | Path, model: Model, arguments: Mapping[str, Any]):
        self.folder, self.model, self._arguments = Path(folder), model, dict(arguments)
        self.manifest = _read_manifest(self.folder)
        if not self.manifest["complete"]:
            raise ValueError(
                f"folder={str(self.folder)!r}: holds {self._shards_there()} shards of an index that was not finished; build it again, which "
                "goes on"
            )
        self.sample_ids = json.loads((self.folder / SAMPLES).read_text(encoding="utf-8"))
        self.projections = _projections(self.folder, self.manifest)

    def __repr__(self) -> str:
        about = self.manifest
        return (
            f"InfluenceIndex({str(self.folder)!r}: {about['examples']:,} examples of {about['width']:,} numbers in "
            f"{about['dtype']}, {sized(self.bytes_per_example)} each)"
        )

    @property
    def bytes_per_example(self) -> int:
        """On disk, of its numbers."""
        return self.manifest["width"] * DTYPES[self.manifest["dtype"]].itemsize

    def _shards_there(self) -> int:
        return len(list(self.folder.glob("shard-*.safetensors")))

    # Building

    @classmethod
    def build(
        cls,
        model: Model,
        train_dataset: Any,
        folder: str | Path,
        *,
        projection: int | None = 16,
        random_projection: bool = False,
        dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
        damping: float = DAMPING,
        curvature_examples: int = 4096,
        args: FINEArguments | None = None,
        processing_class: Any = None,
        data_collator: Callable | None = None,
        trainer_class: type[FINEMixin] | None = None,
    ) -> InfluenceIndex:
        """Write the index of a training set, in one pass over it after two for the curvature; memory does not grow with it.

        What was interrupted goes on where it stopped, if it is of the same model, rows and settings.

        Args:
            model, train_dataset, damping, curvature_examples, args, processing_class, data_collator, trainer_class: as for [`attribute`].
            folder (`str` or `Path`): new, or of an index that was not finished.
            projection (`int`, *optional*, defaults to 16): what each side of a layer's gradients is projected to, so that a layer has at
                most its square of numbers; None keeps gradients whole.
            random_projection (`bool`, defaults to `False`): project at random, without bias and with much noise, instead of on the directions
                that count most in scores.
            dtype (`str`, defaults to `"bfloat16"`): of the numbers on disk.

        Raises:
            ValueError: the folder holds something else, or an index of another model, other rows or settings; or what [`attribute`] refuses.
        """
        check_number("projection", projection, "≥ 1")
        check_number("damping", damping, "> 0")
        check_number("curvature_examples", curvature_examples, "≥ 1")
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}: must be one of {', '.join(DTYPES)}")
        folder = Path(folder)
        before = _what_is_there(folder)
        model, _ = model_and_checkpoints(model, None)
        arguments = {
            "args": args, "processing_class": processing_class, "data_collator": data_collator, "trainer_class": trainer_class,
        }  # fmt: skip
        with finished_trainer(model, train_dataset, **arguments) as (trainer, looks):
            settings = {
                "projection": projection, "random_projection": random_projection, "dtype": dtype, "damping": damping, "layers": trainer.args.layers,
                "curvature_examples": min(curvature_examples, len(trainer.sample_ids)), "seed": trainer.args.seed,
                "batch_size": trainer.args.eval_batch_size,
            }  # fmt: skip
            about = {"model": digest_of(trainer.model), "settings": settings, "examples": len(trainer.sample_ids)}
            key = before["key"] if before else uuid.uuid4().hex
            about["rows"] = _rows_digest(trainer, key)
            if before is None:
                about |= {"format": FORMAT, "key": key, "complete": False, "dtype": dtype, "curvature": ""}
                _begin(folder, trainer, looks, about)
            else:
                for name, value in json.loads(json.dumps(about)).items():
                    if before[name] != value:
                        raise ValueError(
                            f"folder={str(folder)!r}: holds a part of an index of another {name} ({_short(before[name])}, this is "
                            f"{_short(value)}); build it as it was begun, or choose another folder"
                        )
            _fill(folder, trainer, looks)
        index = cls(folder, model, arguments)
        logger.warning(
            "Influence: index of %s examples in %s, %s each%s.", f"{len(index.sample_ids):,}", folder, sized(index.bytes_per_example),
            _missed(index.manifest),
        )  # fmt: skip
        return index

    # Asking

    @classmethod
    def load(
        cls,
        folder: str | Path,
        model: Model,
        *,
        args: FINEArguments | None = None,
        processing_class: Any = None,
        data_collator: Callable | None = None,
        trainer_class: type[FINEMixin] | None = None,
    ) -> InfluenceIndex:
        """The index in a folder, to be asked through the model that it was built with; others are refused when asked.

        Args:
            folder (`str` or `Path`): of a finished index.
            model, args, processing_class, data_collator, trainer_class: as for [`~InfluenceIndex.build`].

        Raises:
            ValueError: there is no index, it was not finished, or it is of another version of this file.
        """
        arguments = {
            "args": args, "processing_class": processing_class, "data_collator": data_collator, "trainer_class": trainer_class,
        }  # fmt: skip
        return cls(folder, model_and_checkpoints(model, None)[0], arguments)

    def query(self, target_dataset: Any, k: int | None = None) -> InfluenceReport | Dataset:
        """Which examples taught the model what these targets show.

        Args:
            target_dataset (`Dataset` or `dict[str, Dataset]`): as for [`InfluenceTrainer`].
            k (`int`, *optional*): give the k most helpful examples of each target alone, in memory that grows with k and not with the
                training set.

        Returns:
            [`InfluenceReport`], order only; with `k` a `Dataset` with `target`, `rank` from 1, `sample_id`, and `score`, which has no unit.

        Raises:
            ValueError: the model is another one than the index's, or a target set that cannot be taken.
        """
        check_number("k", k, "≥ 1")
        sets = target_sets_of(target_dataset)
        queries = self._queries(sets)
        if k is not None:
            return self._best(list(sets), queries, min(k, len(self.sample_ids)))
        values = np.zeros((len(self.sample_ids), len(sets)))
        weights = np.zeros(len(self.sample_ids))
        for start, weight, rows in self.blocks():
            weights[start : start + len(rows)] = weight.numpy()
            values[start : start + len(rows)] = (rows @ queries.T).numpy()
        settings = self.manifest["settings"]
        about = {
            "run_id": uuid.uuid4().hex, "targets": list(sets), "observation": "finished", ORDER_ONLY: ONE_MODEL,
            "seed": settings["seed"], "damping": settings["damping"], "curvature": self.manifest["curvature"], "settings": settings,
            "unseen": self.manifest["unseen"],
        }  # fmt: skip
        return InfluenceReport.from_observations(ordered(self.sample_ids, list(sets), weights, values), about)

    def blocks(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Shard by shard: the first example's position, weights `[rows]`, and rows `[rows, width]` in fp32."""
        start = 0
        for number in range(self.manifest["shards"]):
            with undamaged(file := _shard(self.folder, number)), safe_open(file, "pt") as opened:
                weight, rows = opened.get_tensor("weight"), opened.get_tensor("gradients").float()
            yield start, weight, rows
            start += len(rows)

    def _best(self, names: list[str], queries: Tensor, k: int) -> Dataset:
        values, places = torch.zeros(len(names), 0), torch.zeros(len(names), 0, dtype=torch.long)
        for start, weight, rows in self.blocks():
            here = (queries @ rows.T).masked_fill(weight == 0, -torch.inf)
            values, places = torch.cat([values, here], 1), torch.cat(
                [places, torch.arange(start, start + len(rows)).expand(len(names), -1)], 1
            )  # fmt: skip
            values, kept = values.topk(min(k, values.shape[1]), dim=1)
            places = places.gather(1, kept)
        return Dataset.from_dict(
            {
                "target": [name for name in names for _ in range(k)],
                "rank": list(range(1, k + 1)) * len(names),
                "sample_id": [self.sample_ids[place] for place in places.flatten().tolist()],
                "score": values.flatten().tolist(),
            }
        )

    def _queries(self, sets: Mapping[str, Any]) -> Tensor:
        """`[targets, width]`."""
        names, parts = list(sets), []
        first = sets[names[0]]
        columns = getattr(first, "column_names", None) or ()
        first = first.remove_columns("id") if "id" in columns else first  # ids of targets may repeat
        with finished_trainer(self.model, first, sets, **self._arguments) as (trainer, looks):
            if (own := digest_of(trainer.model)) != self.manifest["model"]:
                raise ValueError(
                    f"model: is another one than the index in {str(self.folder)!r} was built with (digest {own[:8]}…, that one's "
                    f"{self.manifest['model'][:8]}…); load that one, or build an index of this"
                )
            wanted = {name for block in self.projections.blocks.values() for name in block.names}
            if missing := wanted - trainer._ghost.covered.keys():
                raise ValueError(f"layers: {min(missing)} is in the index and is not seen now; set them as they were")
            trainer._ghost.give_up(dict.fromkeys(trainer._ghost.covered.keys() - wanted, "it is not in the index"))
            every = trainer.target_sets
            with tqdm(total=len(names), desc="Influence", unit="target", disable=trainer.args.disable_tqdm) as bar:
                for begin in range(0, len(names), TARGETS_AT_ONCE):
                    some = names[begin : begin + TARGETS_AT_ONCE]
                    trainer.target_sets = {name: every[name] for name in some}
                    covered = list(trainer._ghost.covered.values())
                    flat = trainer._targets().gradients(trainer.model, covered).float()
                    parts.append(self.projections.query(looks.split(flat.cpu())).float())
                    bar.update(len(some))
        return torch.cat(parts)


# Files


def digest_of(model: nn.Module) -> str:
    """Of all parameters, with their names and kinds."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _rows_digest(trainer: FINEMixin, key: str) -> str:
    ids = hashlib.blake2b(json.dumps(trainer.sample_ids).encode(), digest_size=8).hexdigest()
    return f"{ids} {looks_of(trainer.train_dataset, key)}"


def _what_is_there(folder: Path) -> dict[str, Any] | None:
    """The manifest of an index that was not finished."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"folder={str(folder)!r}: holds something else than an index; choose another one")
    about = _read_manifest(folder)
    if about["complete"]:
        raise ValueError(f"folder={str(folder)!r}: holds an index already; load it, or choose another folder")
    return about


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"folder={str(folder)!r}: holds no index (no {MANIFEST}); build one into it first")
    about = read_json(folder / MANIFEST)
    if about.get("format") != FORMAT:
        raise ValueError(f"folder={str(folder)!r}: has format {about.get('format')}, this version reads {FORMAT}")
    return about


def _projections(folder: Path, about: Mapping[str, Any]) -> Projections:
    blocks = {name: Block(**block) for name, block in about["blocks"].items()}
    return Projections(blocks, load_tensors(folder / PROJECTIONS))


def _shard(folder: Path, number: int) -> Path:
    return folder / f"shard-{number:05d}.safetensors"


def _begin(folder: Path, trainer: FINEMixin, looks: Looks, about: dict[str, Any]) -> None:
    """Curvature, projections and ids; the folder is there when all of them are."""
    settings, number = about["settings"], about["examples"]
    generator = torch.Generator().manual_seed(settings["seed"])
    chosen = torch.randperm(number, generator=generator)[: settings["curvature_examples"]].sort().values.tolist()
    total = 2 * looks.batches_of(len(chosen))
    with tqdm(total=total, desc="Curvature", unit="batch", disable=trainer.args.disable_tqdm) as bar, looks.quiet():
        curvature = looks.curvature(chosen, seed=settings["seed"], bar=bar)
    projections = Projections.of(
        curvature,
        damping=settings["damping"],
        size=settings["projection"],
        seed=settings["seed"],
        random=settings["random_projection"],
    )
    whole = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    seen = sum(p.numel() for p in trainer._ghost.covered.values())
    row = projections.width * DTYPES[about["dtype"]].itemsize
    size = looks.trainer.args.eval_batch_size
    at_once = max(1, SHARD_BYTES // row // size) * size
    about |= {
        "blocks": {name: asdict(block) for name, block in projections.blocks.items()}, "widths": projections.widths,
        "width": projections.width, "rows_per_shard": at_once, "shards": -(-number // at_once), "curvature": looks.labels,
        "unseen": {"share": 1 - seen / whole, "parameters": dict(trainer._ghost.uncovered)} if seen < whole else None,
    }  # fmt: skip
    shutil.rmtree(folder, ignore_errors=True)  # it is empty
    with complete_or_not_there(folder) as scratch:
        save_tensors({name: value.cpu() for name, value in projections.tensors.items()}, scratch / PROJECTIONS)
        (scratch / SAMPLES).write_text(json.dumps(trainer.sample_ids), encoding="utf-8")
        write_json(about, scratch / MANIFEST)


def _fill(folder: Path, trainer: FINEMixin, looks: Looks) -> None:
    """Write the shards that are not there yet, each whole or not at all."""
    about = _read_manifest(folder)
    device = next(iter(trainer._ghost.covered.values())).device
    blocks = {name: Block(**block) for name, block in about["blocks"].items()}
    projections = Projections(blocks, load_tensors(folder / PROJECTIONS, device))
    number, at_once, dtype = about["examples"], about["rows_per_shard"], DTYPES[about["dtype"]]
    missing = [one for one in range(about["shards"]) if not _shard(folder, one).is_file()]
    found: dict[str, Tensor] = {}

    def visit(layer, gradients):
        projections.see(layer, gradients, found)

    total = sum(looks.batches_of(min(at_once, number - one * at_once)) for one in missing)
    with tqdm(total=total, desc="Index", unit="batch", disable=trainer.args.disable_tqdm) as bar, looks.quiet():
        for one in missing:
            rows, weights = [], []
            for _, weight, _ in looks.own(range(one * at_once, min(number, (one + 1) * at_once)), visitor=visit):
                part = torch.cat([found[name] for name in blocks], dim=1)
                if not (part.isfinite().all() and part.to(dtype).isfinite().all()):
                    raise ValueError(
                        f"train_dataset: a gradient is not finite in {about['dtype']}; look at its rows, or set dtype='bfloat16'"
                    )
                rows.append(part.to(dtype).cpu())
                weights.append(weight.cpu())
                found.clear()
                bar.update()
            save_tensors({"gradients": torch.cat(rows), "weight": torch.cat(weights)}, _shard(folder, one))
    write_json(about | {"complete": True}, folder / MANIFEST)


def _missed(about: Mapping[str, Any]) -> str:
    share = (about["unseen"] or {"share": 0})["share"]
    return f"; {100 * share:.1f} % of the trainable parameters are not in it" if share else ""


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:199]}…"
