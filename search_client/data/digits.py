"""scikit-learn's digits: 1,797 handwritten digits of 8 x 8 pixels, upsampled."""

from __future__ import annotations

from typing import Literal

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.nn import functional

from lut_db.errors import InvalidInput
from search_client.data import Data

BRIGHTEST = 16.0
"""Value of a fully inked pixel in the data set."""


def load(
    image_size: int = 32,
    held_out: int = 250,
    test: int = 300,
    interpolation: Literal["bilinear", "nearest"] = "bilinear",
    seed: int = 0,
) -> Data:
    """Digits as images of one channel, split by label into equal shares, normalised by the training images.

    data: {name: digits, image_size: 32, held_out: 250, test: 300, interpolation: bilinear, seed: 0}
    """
    if image_size < 8:
        raise InvalidInput(f"digits have 8 pixels, {image_size} are asked", field="image_size", remedy="give 8 or more")
    if interpolation not in ("bilinear", "nearest"):
        raise InvalidInput(f"no interpolation {interpolation!r}", field="interpolation", remedy="bilinear or nearest")
    raw, labels = load_digits(return_X_y=True)
    if held_out < 10 or test < 10 or held_out + test > len(raw) - 10:
        raise InvalidInput(f"held_out={held_out} and test={test} of {len(raw)} images", field="held_out",
                           remedy="leave at least 10 images to every set")  # fmt: skip
    order = list(range(len(raw)))
    rest, test_rows = train_test_split(order, test_size=test, stratify=labels, random_state=seed)
    train_rows, held_out_rows = train_test_split(
        rest, test_size=held_out, stratify=labels[rest], random_state=seed + 1
    )  # fmt: skip
    images = torch.tensor(raw / BRIGHTEST, dtype=torch.float32).reshape(-1, 1, 8, 8)
    size = (image_size, image_size)
    if interpolation == "bilinear":
        images = functional.interpolate(images, size, mode="bilinear", align_corners=False)
    else:
        images = functional.interpolate(images, size, mode="nearest")
    mean, deviation = images[train_rows].mean(), images[train_rows].std()
    images = (images - mean) / deviation
    targets = torch.tensor(labels, dtype=torch.int64)
    return Data(
        "digits", 10,
        images[train_rows], targets[train_rows],
        images[held_out_rows], targets[held_out_rows],
        images[test_rows], targets[test_rows],
        background=float(-mean / deviation),
    )  # fmt: skip
