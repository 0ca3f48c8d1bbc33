"""What somebody else does with what was published. Run as a file by a new process, in which hf_unlearn is not imported until a filter needs it.

`python loading.py CLASSIFIER FILTERED_GAN EXPECTED.npz`, with the Hub in the environment.
"""

import json
import sys

import numpy as np
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification


@torch.no_grad()
def classified(repo_id: str, images: list[Image.Image]) -> np.ndarray:
    """Logits `[n, classes]` of the published classifier."""
    processor = AutoImageProcessor.from_pretrained(repo_id)
    model = AutoModelForImageClassification.from_pretrained(repo_id)
    return model(**processor(images=images, return_tensors="pt")).logits.numpy()


def drawn(repo_id: str, latents: np.ndarray) -> np.ndarray:
    """What the published pipeline releases."""
    from hf_unlearn import FilteredPipeline

    pipe = FilteredPipeline.from_pretrained(repo_id)
    return np.stack([np.asarray(image) for image in pipe(latents=torch.from_numpy(latents)).images])


def main(classifier: str, filtered_gan: str, file: str) -> None:
    expected = np.load(file)
    logits = classified(classifier, [Image.fromarray(image) for image in expected["images"]])
    stock = "hf_unlearn" not in sys.modules
    images = drawn(filtered_gan, expected["latents"])
    same = {
        "asked": len(logits),
        "answers": int((logits.argmax(1) == expected["logits"].argmax(1)).sum()),
        "largest": float(np.abs(logits - expected["logits"]).max()),
        "stock": stock,
        "drawn": len(images),
        "images": int((images == expected["drawn"]).reshape(len(images), -1).all(1).sum()),
    }
    print(json.dumps(same))


if __name__ == "__main__":
    main(*sys.argv[1:])
