"""Training: the super-network with ordered dropout, a sub-network on its own; evaluation; checkpoints.

Everything random depends on (seed, epoch or step) alone, so a run that was killed and goes on from its last
checkpoint ends with the tensors of an undisturbed run, bit for bit, on the same machine and number of threads.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel

from lut_db.errors import InvalidInput, LatencyLabError
from search_client.architecture import Architecture
from search_client.data import Data
from search_client.description import Description
from search_client.elastic import Sample, SuperNetwork
from search_client.ordered_dropout import KernelMode, draw
from search_client.sliced import SlicedNetwork, fresh, slice_network

CHECKPOINT_FORMAT = 1
EVALUATION_BATCH = 64
"""Images at once in evaluation: on one core, feature maps of larger batches fall out of the cache."""
FASTEST = torch.channels_last
"""Order in memory of feature maps in evaluation: depthwise convolutions run faster with channels last."""
RMSPROP_ALPHA = 0.9
RMSPROP_EPSILON = 1e-3
_ORDER, _SHIFT, _DROPOUT = 0, 1, 2  # streams of random numbers


class TrainingDiverged(LatencyLabError):
    """The loss is no longer a number."""


@dataclass(frozen=True)
class TrainingOptions:
    """How to train. The paper's ImageNet settings (Sec. 4.1.1) are `rmsprop`, learning rate 0.064 for a batch of
    1,024 and linear in it, `exponential` with 0.963 every 3 epochs, weight decay 1e-5, dropout 0.2, EMA 0.9998.

    schedule: `cosine` falls to zero, `exponential` is multiplied by `decay` every `decay_epochs`. Weight decay
    leaves biases and batch-norm alone. ema_decay: of the moving average of the weights, which is what is kept in
    the end; it starts lower, as (1 + n) / (10 + n) after n steps; None keeps the last weights. shift: images are
    moved by up to so many pixels. clip_norm: bound of the gradient's norm, or None.

    Only for super-networks: kernels, see `ordered_dropout.draw`. opening: over this share of the run the grid of
    widths opens, from the full width alone to all of them. kept: see `ordered_dropout.draw`. The paper has 0 for
    both; in a training of a few hundred steps such a super-network learns nothing, because nearly every image goes
    through a network of which most layers are gone.
    """

    epochs: int = 8
    batch_size: int = 64
    learning_rate: float = 0.05
    schedule: Literal["cosine", "exponential", "constant"] = "cosine"
    decay: float = 0.963
    decay_epochs: float = 3.0
    warmup_epochs: float = 0.0
    optimizer: Literal["sgd", "rmsprop", "adamw"] = "sgd"
    momentum: float = 0.9
    weight_decay: float = 1e-5
    label_smoothing: float = 0.0
    ema_decay: float | None = 0.99
    dropout: float = 0.0
    shift: int = 0
    clip_norm: float | None = 5.0
    kernels: KernelMode = "groups"
    opening: float = 0.0
    kept: float = 0.0

    def __post_init__(self) -> None:
        limits: dict[str, tuple[bool, str]] = {
            "epochs": (self.epochs >= 1, "give 1 or more"),
            "batch_size": (self.batch_size >= 2, "give 2 or more: batch-norm needs them"),
            "learning_rate": (self.learning_rate > 0, "give a positive number"),
            "schedule": (self.schedule in ("cosine", "exponential", "constant"), "cosine, exponential or constant"),
            "decay": (0 < self.decay <= 1, "give a number above 0, up to 1"),
            "decay_epochs": (self.decay_epochs > 0, "give a positive number"),
            "warmup_epochs": (self.warmup_epochs >= 0, "give 0 or more"),
            "optimizer": (self.optimizer in ("sgd", "rmsprop", "adamw"), "sgd, rmsprop or adamw"),
            "momentum": (0 <= self.momentum < 1, "give a number from 0 to below 1"),
            "weight_decay": (self.weight_decay >= 0, "give 0 or more"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "give a number from 0 to below 1"),
            "ema_decay": (self.ema_decay is None or 0 <= self.ema_decay < 1, "give null or a number from 0 to below 1"),
            "dropout": (0 <= self.dropout < 1, "give a number from 0 to below 1"),
            "shift": (self.shift >= 0, "give 0 or more pixels"),
            "clip_norm": (self.clip_norm is None or self.clip_norm > 0, "give null or a positive number"),
            "kernels": (self.kernels in ("groups", "batch"), "groups or batch"),
            "opening": (0 <= self.opening <= 1, "give a share from 0 to 1"),
            "kept": (0 <= self.kept < 1, "give a share from 0 to below 1"),
        }
        for field, (holds, remedy) in limits.items():
            if not holds:
                raise InvalidInput(f"{getattr(self, field)!r} is out of range", field=field, remedy=remedy)

    def rate(self, step: int, steps_per_epoch: int) -> float:
        """The learning rate of a step, counted from 0 over the whole run."""
        epoch = step / steps_per_epoch
        if epoch < self.warmup_epochs:
            return self.learning_rate * (step + 1) / (self.warmup_epochs * steps_per_epoch + 1)
        match self.schedule:
            case "constant":
                return self.learning_rate
            case "exponential":
                return self.learning_rate * self.decay ** (epoch // self.decay_epochs)
            case "cosine":
                done = (epoch - self.warmup_epochs) / max(self.epochs - self.warmup_epochs, 1e-9)
                return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))


@dataclass(frozen=True)
class Progress:
    """Where training stands after a step. `step` counts from 1 to `steps` over the whole run, `epoch` to `epochs`.

    `epoch_done` is true after the last step of an epoch, when its checkpoint has been written.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    learning_rate: float
    epoch_done: bool


OnProgress = Callable[[Progress], None]
"""Called after every step. It may block, so that a machine stands still while it is being measured, or raise."""


# --- the two kinds of training ---------------------------------------------------------------------------------


def train_super_network(
    description: Description,
    data: Data,
    options: TrainingOptions,
    *,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: OnProgress | None = None,
) -> SuperNetwork:
    """Trains all sub-networks at once: every image of a batch goes through a sub-network of its own (Sec. 2.3).

    checkpoint: a file written after every epoch, from which training goes on if it is there. Returns the averaged
    weights, in evaluation mode. Raises InvalidInput if the images do not fit the network or the checkpoint belongs
    to another training; TrainingDiverged if the loss is no longer finite.
    """
    _check_data(description, data)
    model = SuperNetwork(description, seed=seed, dropout=options.dropout)
    space = description.space
    _, steps_per_epoch = _batches(data, options)
    steps = options.epochs * steps_per_epoch

    def forward(images: Tensor, step: int) -> Tensor:
        done = step / steps
        drawn = draw(
            space, len(images), seed=seed, step=step, kernels=options.kernels, kept=options.kept,
            opened=1.0 if done >= options.opening else done / options.opening,
        )  # fmt: skip
        logits: Tensor = model(images, Sample.drawn(drawn))
        return logits

    identity = _identity("super-network", description.key, data, options, seed)
    averaged = _fit(model, forward, data, options, seed, identity, checkpoint, progress)
    if not isinstance(averaged, SuperNetwork):
        raise TypeError(type(averaged).__name__)
    return averaged.eval()


def train_network(
    description: Description,
    architecture: Architecture,
    data: Data,
    options: TrainingOptions,
    *,
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: OnProgress | None = None,
    initial: SlicedNetwork | None = None,
) -> SlicedNetwork:
    """Trains one sub-network on its own, from new weights or from those of `initial`.

    As `train_super_network`; batch-norm is recalibrated on the averaged weights in the end, so the network that is
    returned, in evaluation mode, is ready for export.
    """
    _check_data(description, data)
    model = fresh(description, architecture, seed, options.dropout)
    if initial is not None:
        if initial.network != model.network:
            raise InvalidInput("the initial weights are of another network", field="initial",
                               remedy="slice them with the same architecture")  # fmt: skip
        model.load_state_dict(initial.state_dict())

    def forward(images: Tensor, step: int) -> Tensor:
        logits: Tensor = model(images)
        return logits

    start = "" if initial is None else _hash_state(initial)
    identity = _identity("network", model.network.key + start, data, options, seed)
    averaged = _fit(model, forward, data, options, seed, identity, checkpoint, progress)
    if not isinstance(averaged, SlicedNetwork):
        raise TypeError(type(averaged).__name__)
    recalibrate(averaged, data.train_images, options.batch_size)
    return averaged.eval()


def _fit(
    model: nn.Module,
    forward: Callable[[Tensor, int], Tensor],
    data: Data,
    options: TrainingOptions,
    seed: int,
    identity: str,
    checkpoint: Path | None,
    progress: OnProgress | None,
) -> nn.Module:
    """The loop. `forward(images, step)` runs `model`. Returns the averaged model, or the model where none is kept."""
    batch, steps_per_epoch = _batches(data, options)
    optimizer = _optimizer(model, options)
    averaged = None if options.ema_decay is None else _averaged(model, options.ema_decay)
    first_epoch = 0
    if checkpoint is not None and checkpoint.exists():
        state = load_checkpoint(checkpoint, identity)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if averaged is not None:
            averaged.load_state_dict(state["averaged"])
        first_epoch = state["epoch"]

    for epoch in range(first_epoch, options.epochs):
        model.train()
        order = torch.from_numpy(_random(seed, _ORDER, epoch).permutation(len(data.train_images)))
        for number in range(steps_per_epoch):
            step = epoch * steps_per_epoch + number
            rows = order[number * batch : (number + 1) * batch]
            images = shifted(data.train_images[rows], options.shift, data.background, _random(seed, _SHIFT, step))
            learning_rate = options.rate(step, steps_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            with _dropout_seed(options.dropout, seed, step):
                logits = forward(images, step)
            loss = functional.cross_entropy(logits, data.train_labels[rows], label_smoothing=options.label_smoothing)
            loss_value = loss.item()
            if not math.isfinite(loss_value):
                raise TrainingDiverged(f"the loss is {loss_value} in epoch {epoch + 1}", field="learning_rate",
                                       remedy="lower the learning rate or add warm-up")  # fmt: skip
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if options.clip_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm)
            optimizer.step()
            if averaged is not None:
                averaged.update_parameters(model)
            epoch_done = number == steps_per_epoch - 1
            if epoch_done and checkpoint is not None:
                save_checkpoint(
                    checkpoint,
                    {
                        "format": CHECKPOINT_FORMAT, "identity": identity, "epoch": epoch + 1,
                        "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                        "averaged": None if averaged is None else averaged.state_dict(),
                    },
                )  # fmt: skip
            if progress is not None:
                progress(Progress(epoch + 1, options.epochs, step + 1, options.epochs * steps_per_epoch, loss_value,
                                  learning_rate, epoch_done))  # fmt: skip
    return model if averaged is None else averaged.module


def _batches(data: Data, options: TrainingOptions) -> tuple[int, int]:
    """Images of a batch, and batches of an epoch; the rest of an epoch's images is left out of it."""
    batch = min(options.batch_size, len(data.train_images))
    return batch, len(data.train_images) // batch


def _check_data(description: Description, data: Data) -> None:
    if data.image != description.image:
        raise InvalidInput(f"images of {data.image} for a network of {description.image}", field="data.image_size",
                           remedy="give data set and network the same image size")  # fmt: skip
    if data.classes != description.classes:
        raise InvalidInput(f"{data.classes} classes for a network of {description.classes}", field="network.classes",
                           remedy=f"give the network classes: {data.classes}")  # fmt: skip


def _optimizer(model: nn.Module, options: TrainingOptions) -> torch.optim.Optimizer:
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": options.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    match options.optimizer:
        case "sgd":
            return torch.optim.SGD(groups, options.learning_rate, momentum=options.momentum)
        case "rmsprop":
            return torch.optim.RMSprop(
                groups, options.learning_rate, alpha=RMSPROP_ALPHA, eps=RMSPROP_EPSILON, momentum=options.momentum
            )
        case "adamw":
            return torch.optim.AdamW(groups, options.learning_rate)


def _averaged(model: nn.Module, decay: float) -> AveragedModel:
    """Exponential moving average of weights and batch-norm statistics."""

    def average(mean: Tensor, value: Tensor, updates: Tensor | int) -> Tensor:
        if not mean.is_floating_point():  # batch-norm's count of batches
            return value
        now = min(decay, (1 + int(updates)) / (10 + int(updates)))
        return mean.lerp(value, 1.0 - now)

    return AveragedModel(model, avg_fn=average, use_buffers=True)


def _random(seed: int, stream: int, number: int) -> np.random.Generator:
    return np.random.default_rng([seed, stream, number])


@contextmanager
def _dropout_seed(dropout: float, seed: int, step: int) -> Iterator[None]:
    """Seeds torch's own generator, which dropout draws from, for one step."""
    if dropout == 0.0:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(_random(seed, _DROPOUT, step).integers(1 << 62)))
        yield


def shifted(images: Tensor, pixels: int, background: float, random: np.random.Generator) -> Tensor:
    """Each image (B, C, H, W) moved by up to `pixels` in both directions, `background` moving in."""
    if pixels == 0:
        return images
    count, _, height, width = images.shape
    padded = functional.pad(images, (pixels,) * 4, value=background)
    offsets = torch.from_numpy(random.integers(0, 2 * pixels + 1, size=(2, count)))
    rows = offsets[0][:, None] + torch.arange(height)  # (B, H)
    columns = offsets[1][:, None] + torch.arange(width)  # (B, W)
    image = torch.arange(count)[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]]  # (B, H, W, C)
    return moved.permute(0, 3, 1, 2).contiguous()


# --- checkpoints -----------------------------------------------------------------------------------------------


def _identity(kind: str, key: str, data: Data, options: TrainingOptions, seed: int) -> str:
    """Hash of all that decides a training's result."""
    images = hashlib.sha256(data.train_images.numpy().tobytes() + data.train_labels.numpy().tobytes()).hexdigest()
    text = repr((kind, key, data.name, data.background, images, options, seed))
    return hashlib.sha256(text.encode()).hexdigest()


def _hash_state(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint in one step: a reader, or a killed writer, leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path, identity: str) -> dict[str, Any]:
    """Reads a checkpoint of the training with this identity; plain tensors and numbers only.

    Raises InvalidInput if it is of another training or version.
    """
    state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
    if state.get("format") != CHECKPOINT_FORMAT or state.get("identity") != identity:
        raise InvalidInput("the checkpoint is of another training: network, data, options or seed differ",
                           field=str(path), remedy="remove it, or use another folder")  # fmt: skip
    return state


# --- evaluation ------------------------------------------------------------------------------------------------


def evaluate(model: nn.Module, images: Tensor, labels: Tensor, batch: int = EVALUATION_BATCH) -> float:
    """Share of images (n, C, H, W) whose label (n,) gets the largest logit, in evaluation mode."""
    training = model.training
    model.eval()
    correct = 0
    with torch.inference_mode():
        for start in range(0, len(images), batch):
            logits = model(images[start : start + batch])
            correct += int((logits.argmax(1) == labels[start : start + batch]).sum())
    model.train(training)
    return correct / len(images)


def evaluate_architectures(
    super_network: SuperNetwork,
    architectures: Sequence[Architecture],
    images: Tensor,
    labels: Tensor,
    *,
    batch: int = EVALUATION_BATCH,
    recalibration: Tensor | None = None,
) -> list[float]:
    """Accuracy of each architecture with the super-network's weights, without further training (Sec. 2.1).

    The sub-networks are sliced, so a small one costs little; equal ones are evaluated once. recalibration: images
    (n, C, H, W) on which a copy's batch-norm statistics are taken anew first; None uses the super-network's.
    """
    known: dict[str, float] = {}
    found = []
    images = images.contiguous(memory_format=FASTEST)
    for architecture in architectures:
        architecture = super_network.description.canonical(architecture)
        if architecture.key not in known:
            sliced = slice_network(super_network, architecture)
            if recalibration is not None:
                recalibrate(sliced, recalibration, batch)
            model = sliced.folded()
            model.to(memory_format=FASTEST)  # type: ignore[call-overload]  # torch's overloads leave it out
            known[architecture.key] = evaluate(model, images, labels, batch)
        found.append(known[architecture.key])
    return found


def recalibrate(model: nn.Module, images: Tensor, batch: int = EVALUATION_BATCH) -> None:
    """Replaces batch-norm statistics by cumulative averages over `images` (n, C, H, W), in place.

    All else is as in evaluation: no dropout, no gradients. Batches are equal; the rest of the images is left out.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    training = model.training
    model.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative
        norm.train()
    batch = min(batch, len(images))
    with torch.no_grad():
        for number in range(len(images) // batch):
            model(images[number * batch : (number + 1) * batch])
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train(training)
