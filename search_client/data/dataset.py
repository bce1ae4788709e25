"""What every data set is: three disjoint sets of images with their labels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lut_db.errors import InvalidInput


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
