from __future__ import annotations

import pytest
import torch

from lut_db.errors import InvalidInput
from search_client import data


def test_digits_are_split_fairly_and_normalised() -> None:
    digits = data.load("digits", image_size=32)
    assert digits.image == (1, 32, 32)
    sizes = (len(digits.train_labels), len(digits.held_out_labels), len(digits.test_labels))
    assert sizes == (1247, 250, 300)
    assert float(digits.train_images.mean()) == pytest.approx(0.0, abs=1e-4)
    assert float(digits.train_images.std()) == pytest.approx(1.0, abs=1e-3)
    for labels in (digits.train_labels, digits.held_out_labels, digits.test_labels):
        shares = torch.bincount(labels, minlength=10) / len(labels)
        assert float(shares.min()) > 0.08
        assert float(shares.max()) < 0.12
    assert digits.background == pytest.approx(float(digits.train_images.min()), abs=1e-5)


def test_the_sets_are_disjoint_and_the_seed_decides_them() -> None:
    digits = data.load("digits", image_size=8)
    every = torch.cat([digits.train_images, digits.held_out_images, digits.test_images])
    assert len(every) == 1797
    assert len(torch.unique(every, dim=0)) == 1797  # no two digits are alike
    again, other = data.load("digits", image_size=8), data.load("digits", image_size=8, seed=1)
    assert torch.equal(digits.held_out_images, again.held_out_images)
    assert not torch.equal(digits.held_out_labels, other.held_out_labels)
    nearest = data.load("digits", image_size=16, interpolation="nearest").test_images
    assert torch.equal(nearest[:, :, ::2, ::2], nearest[:, :, 1::2, 1::2])


def test_what_cannot_be_is_explained() -> None:
    assert "digits" in data.names()
    assert "dataset" not in data.names()
    with pytest.raises(InvalidInput, match="digits"):
        data.load("imagenet")
    with pytest.raises(InvalidInput, match="image_size"):
        data.load("digits", size=32)
    with pytest.raises(InvalidInput, match="8 or more"):
        data.load("digits", image_size=4)
    with pytest.raises(InvalidInput, match="held_out"):
        data.load("digits", held_out=1700, test=90)
