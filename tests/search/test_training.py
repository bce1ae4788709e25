from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lut_db.errors import InvalidInput
from search_client import data as data_sets
from search_client.architecture import Architecture
from search_client.data import Data
from search_client.description import Block, Conv, Description, Linear
from search_client.elastic import SuperNetwork
from search_client.sliced import fresh, slice_network
from search_client.training import (
    Progress,
    TrainingDiverged,
    TrainingOptions,
    evaluate,
    evaluate_architectures,
    load_checkpoint,
    recalibrate,
    shifted,
    train_network,
    train_super_network,
)

OPTIONS = TrainingOptions(
    epochs=3, batch_size=64, learning_rate=0.01, optimizer="adamw", warmup_epochs=0.5, shift=1, dropout=0.1
)  # fmt: skip


@pytest.fixture(scope="module")
def digits() -> Data:
    return data_sets.load("digits", image_size=8)


@pytest.fixture(scope="module")
def few(digits: Data) -> Data:
    """Three batches of 64 an epoch, for tests of how a training goes rather than of what it learns."""
    return replace(digits, train_images=digits.train_images[:200], train_labels=digits.train_labels[:200])


@pytest.fixture(scope="module")
def description() -> Description:
    stages = (
        Conv("stem", 8, kernel=3, limit=4, activation="hard_swish"),
        Block("block1", 8, 16, kernel=5, limit=4, squeeze=4),
        Block("block2", 16, 24, kernel=5, stride=2, limit=8, activation="hard_swish"),
        Block("block3", 16, 24, kernel=3, limit=8, activation="hard_swish"),
        Linear("hidden", 16, activation="relu", limit=16),
        Linear("classifier", 10),
    )
    return Description("small", (1, 8, 8), stages, width_count=5)


class Killed(Exception):
    pass


def kill_after(epoch: int) -> object:
    def on_progress(progress: Progress) -> None:
        if progress.epoch_done and progress.epoch == epoch:
            raise Killed

    return on_progress


def equal(a: nn.Module, b: nn.Module) -> bool:
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("optimizer", ["sgd", "rmsprop", "adamw"])
@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_killed_super_network_training_resumes_bit_for_bit(
    description: Description, few: Data, tmp_path: Path, optimizer: str, ema_decay: float | None
) -> None:
    options = replace(OPTIONS, optimizer=optimizer, ema_decay=ema_decay, epochs=2)
    undisturbed = train_super_network(description, few, options, seed=1)
    checkpoint = tmp_path / "super_network.pt"
    with pytest.raises(Killed):
        train_super_network(description, few, options, seed=1, checkpoint=checkpoint, progress=kill_after(1))
    steps: list[int] = []
    resumed = train_super_network(
        description, few, options, seed=1, checkpoint=checkpoint, progress=lambda p: steps.append(p.step)
    )
    assert equal(undisturbed, resumed)
    assert steps == list(range(4, 7))  # the first epoch's 3 steps are not repeated
    finished = train_super_network(description, few, options, seed=1, checkpoint=checkpoint,
                                   progress=kill_after(2))  # fmt: skip
    assert equal(undisturbed, finished)
    assert [path.name for path in tmp_path.iterdir()] == ["super_network.pt"]


def test_a_killed_network_training_resumes_bit_for_bit(description: Description, few: Data, tmp_path: Path) -> None:
    architecture = description.architecture({"block1.expand": (8, 1), "block3.project": (0, 1), "hidden": (4, 1)})
    undisturbed = train_network(description, architecture, few, OPTIONS, seed=2)
    checkpoint = tmp_path / "network.pt"
    for epoch in (1, 2):
        with pytest.raises(Killed):
            train_network(description, architecture, few, OPTIONS, seed=2, checkpoint=checkpoint,
                          progress=kill_after(epoch))  # fmt: skip
    resumed = train_network(description, architecture, few, OPTIONS, seed=2, checkpoint=checkpoint)
    assert equal(undisturbed, resumed)
    other = train_network(description, architecture, few, OPTIONS, seed=3)
    assert not equal(undisturbed, other)


def test_a_network_learns_the_digits(description: Description, digits: Data) -> None:
    losses: list[float] = []
    trained = train_network(description, description.space.full, digits, replace(OPTIONS, epochs=6, shift=0),
                            progress=lambda p: losses.append(p.loss))  # fmt: skip
    assert not trained.training
    assert np.mean(losses[-5:]) < 0.5 * losses[0]
    assert evaluate(trained, digits.test_images, digits.test_labels) > 0.8


def test_a_checkpoint_of_another_training_is_refused(description: Description, few: Data, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint.pt"
    short = replace(OPTIONS, epochs=1)
    train_super_network(description, few, short, checkpoint=checkpoint)
    for changed in (replace(short, epochs=2), replace(short, dropout=0.0)):
        with pytest.raises(InvalidInput, match="another training"):
            train_super_network(description, few, changed, checkpoint=checkpoint)
    with pytest.raises(InvalidInput, match="another training"):
        train_super_network(description, few, short, seed=1, checkpoint=checkpoint)
    state = torch.load(checkpoint, weights_only=True)
    assert load_checkpoint(checkpoint, state["identity"])["epoch"] == 1


def test_training_from_given_weights(description: Description, few: Data) -> None:
    super_network = SuperNetwork(description, seed=4)
    architecture = description.architecture({"stem": (4, 3)})
    initial = slice_network(super_network, architecture)
    slow = replace(OPTIONS, epochs=1, learning_rate=1e-9, weight_decay=0.0, ema_decay=None)
    trained = train_network(description, architecture, few, slow, initial=initial)
    assert torch.allclose(trained.nodes[0].weight, initial.nodes[0].weight, atol=1e-5)
    with pytest.raises(InvalidInput, match="another network"):
        train_network(description, description.space.full, few, slow, initial=initial)


def test_images_must_fit_the_network(description: Description) -> None:
    with pytest.raises(InvalidInput, match="image_size"):
        train_super_network(description, data_sets.load("digits", image_size=16), OPTIONS)


def test_a_loss_that_is_no_number_stops_the_training(description: Description, digits: Data) -> None:
    broken = replace(digits, train_images=torch.full_like(digits.train_images, math.inf))
    with pytest.raises(TrainingDiverged, match="learning_rate"):
        train_super_network(description, broken, OPTIONS)


def test_options_out_of_range_name_themselves() -> None:
    for field, value in (("epochs", 0), ("schedule", "step"), ("momentum", 1.0), ("ema_decay", 1.0), ("kept", 1.0)):
        with pytest.raises(InvalidInput, match=field):
            TrainingOptions(**{field: value})


def test_learning_rates() -> None:
    cosine = TrainingOptions(epochs=10, learning_rate=1.0, warmup_epochs=1.0)
    rates = [cosine.rate(step, 10) for step in range(100)]
    assert rates[0] < rates[5] < rates[9] < 1.0
    assert rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] < 0.01
    paper = TrainingOptions(epochs=9, learning_rate=0.064, schedule="exponential")
    assert [paper.rate(step, 1) for step in (0, 2, 3)] == [0.064, 0.064, 0.064 * 0.963]


def test_shifts_move_images_whole() -> None:
    images = torch.arange(2 * 16, dtype=torch.float32).reshape(2, 1, 4, 4) + 1
    moved = shifted(images, 1, -5.0, np.random.default_rng(0))
    again = shifted(images, 1, -5.0, np.random.default_rng(0))
    assert torch.equal(moved, again)
    for before, after in zip(images, moved, strict=True):
        padded = nn.functional.pad(before, (1, 1, 1, 1), value=-5.0)
        windows = [padded[:, y : y + 4, x : x + 4] for y in range(3) for x in range(3)]
        assert any(torch.equal(after, window) for window in windows)
    assert shifted(images, 0, 0.0, np.random.default_rng(0)) is images


def test_recalibration_takes_the_statistics_of_the_images(description: Description, digits: Data) -> None:
    network = fresh(description, description.space.full).eval()
    before = {name: tensor.clone() for name, tensor in network.named_parameters()}
    recalibrate(network, digits.train_images[:512], batch=128)
    assert not network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.named_parameters())
    stem = network.operator_modules[0]
    convolved = nn.functional.conv2d(digits.train_images[:512], stem.weight, padding=1)
    assert stem.batch_norm is not None
    assert torch.allclose(stem.batch_norm.running_mean, convolved.mean((0, 2, 3)), atol=1e-5)
    assert stem.batch_norm.momentum == 0.1


def test_samples_are_evaluated_as_the_super_network_would(description: Description, digits: Data) -> None:
    super_network = train_super_network(
        description,
        digits,
        replace(OPTIONS, epochs=4, batch_size=32, dropout=0.0, opening=0.5, kept=0.5, shift=0, kernels="batch"),
    )
    images, labels = digits.held_out_images, digits.held_out_labels
    smallest = Architecture(
        tuple(layer.widths[0] for layer in description.space.layers),
        tuple(layer.kernels[0] for layer in description.space.layers),
    )
    removed = description.architecture({"block3.project": (0, 1)})
    chosen = [description.space.full, smallest, removed, description.canonical(removed)]
    state = {name: tensor.clone() for name, tensor in super_network.state_dict().items()}
    found = evaluate_architectures(super_network, chosen, images, labels)
    assert found[2] == found[3]
    with torch.inference_mode():
        for architecture, accuracy in zip(chosen, found, strict=True):
            correct = (super_network(images, architecture).argmax(1) == labels).float().mean()
            assert float(correct) == pytest.approx(accuracy, abs=1 / len(labels))  # one tie may fall either way
    recalibrated = evaluate_architectures(super_network, chosen, images, labels, recalibration=digits.train_images)
    assert len(recalibrated) == 4
    assert recalibrated[0] > 0.3  # it has learned something
    assert all(torch.equal(state[name], tensor) for name, tensor in super_network.state_dict().items())
