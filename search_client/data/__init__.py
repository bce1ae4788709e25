"""Data sets, one file each.

A plug-in is a module of this package with a function `load(**options) -> Data` whose docstring shows its options.
The module's name is the data set's name in a recipe.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lut_db.errors import InvalidInput

__all__ = ["Data", "load", "names"]


@dataclass(frozen=True)
class Data:
    """Images (n, C, H, W) as normalised float32 and labels (n,) as int64, of three disjoint sets.

    train: the weights are learned on it. held_out: samples of a search are compared on it. test: seen by neither.
    background: the value of a pixel outside an image, where augmentation shifts one.
    """

    name: str
    classes: int
    train_images: Tensor
    train_labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    background: float = 0.0

    def __post_init__(self) -> None:
        for part in ("train", "held_out", "test"):
            images, labels = getattr(self, f"{part}_images"), getattr(self, f"{part}_labels")
            if len(images) != len(labels) or len(images) == 0:
                raise InvalidInput(f"{len(images)} images and {len(labels)} labels", field=part,
                                   remedy="give as many labels as images, at least one")  # fmt: skip

    @property
    def image(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width


def names() -> list[str]:
    """The data sets that exist."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str, **options: Any) -> Data:
    """A data set by name.

    Raises InvalidInput, listing what exists, for an unknown name or an unknown option.
    """
    if name not in names():
        raise InvalidInput(f"there is no data set {name!r}", field="data", remedy="one of " + ", ".join(names()))
    loader = importlib.import_module(f"{__name__}.{name}").load
    known = inspect.signature(loader).parameters
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise InvalidInput(
            f"data set {name!r} has no option {', '.join(map(repr, unknown))}",
            field="data", remedy="its options are " + ", ".join(known),
        )  # fmt: skip
    data: Data = loader(**options)
    return data
