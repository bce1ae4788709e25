"""The super-network: all sub-networks of a description in one set of weights (NetAdaptV2, Sec. 2.1 to 2.3).

Tensors keep the width of the initial network. A narrower layer is emulated with zero channels, image by image:
ordered dropout zeroes the filters i >= M *after* batch-norm and activation (before it, zeros would become shifted
means), and the bypass lets through the complement, M <= i < min(C, T). The number of channels that exist, C and Z,
is followed for every image, because it depends on what was chosen in the layers before: a depthwise filter without
an input channel must not emit its bias, and T may cut at an image's own C.

Invariant: channels at and above Z are exactly zero in every tensor between layers. Hence convolutions,
squeeze-and-excite, global pool and zero-padded residual additions give what the sliced sub-network gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lut_db.errors import InvalidInput
from lut_db.lowering.torch import activate, add_padded, bypass_pool, pad_channels, squeeze_excite_scale
from search_client.architecture import Architecture
from search_client.description import BlockLayers, Description, Layer, Source, passed_channels
from search_client.ordered_dropout import Draw

BATCH_NORM_EPSILON = 1e-5


def initialise(weight: Tensor, random: torch.Generator) -> Tensor:
    """He initialisation by fan-in, in place."""
    fan_in = weight[0].numel()
    with torch.no_grad():
        return weight.normal_(0.0, sqrt(2.0 / fan_in), generator=random)


def centre(weight: Tensor, kernel: int) -> Tensor:
    """The `kernel` x `kernel` centre of a superkernel (..., K, K)."""
    edge = (weight.shape[-1] - kernel) // 2
    return weight if edge == 0 else weight[..., edge : edge + kernel, edge : edge + kernel]


@dataclass(frozen=True)
class Sample:
    """A sub-network for every image: filters and kernel sizes, each (images, searched layers), int64."""

    widths: Tensor
    kernels: Tensor

    @classmethod
    def of(cls, architecture: Architecture, images: int) -> Sample:
        """One sub-network for all images."""
        return cls(
            torch.tensor(architecture.widths, dtype=torch.int64).expand(images, -1),
            torch.tensor(architecture.kernels, dtype=torch.int64).expand(images, -1),
        )

    @classmethod
    def drawn(cls, draw: Draw) -> Sample:
        return cls(torch.from_numpy(np.ascontiguousarray(draw.widths)), torch.from_numpy(draw.kernels.copy()))


class ElasticLayer(nn.Module):
    """A convolution, depthwise or linear layer with ordered dropout and its channel-level bypass."""

    def __init__(self, layer: Layer, random: torch.Generator):
        super().__init__()
        self.layer = layer
        inputs = 1 if layer.kind == "depthwise" else layer.channels
        shape = (layer.filters, inputs) if layer.kind == "linear" else (layer.filters, inputs, *(layer.kernel,) * 2)
        self.weight = nn.Parameter(initialise(torch.empty(shape), random))
        self.batch_norm = nn.BatchNorm2d(layer.filters, eps=BATCH_NORM_EPSILON) if layer.batch_norm else None
        self.bias = None if layer.batch_norm else nn.Parameter(torch.zeros(layer.filters))

    def forward(self, x: Tensor, channels: Tensor, filters: Tensor, kernels: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C_full, H, W) or (B, C_full); channels C, filters M and kernels of each image, (B,).

        Returns the merged output (B, Z_full, …), zero at and above each image's Z, and Z (B,).
        """
        layer = self.layer
        if layer.kind == "depthwise":
            filters = torch.minimum(filters, channels)
        y = functional.linear(x, self.weight, self.bias) if layer.kind == "linear" else self._convolve(x, kernels)
        if self.batch_norm is not None:
            y = self.batch_norm(y)
        y = activate(layer.activation, y)
        spread = (1,) * (x.dim() - 2)
        position = torch.arange(layer.filters, device=x.device)
        kept = position < filters[:, None]
        if not bool(kept.all()):
            y = y * kept.to(y.dtype).view(*kept.shape, *spread)
        passed = channels if layer.limit is None else channels.clamp(max=layer.limit)
        width = torch.maximum(passed, filters)
        full = passed_channels(layer.channels, layer.limit)
        position = torch.arange(full, device=x.device)
        bypassed = (position >= filters[:, None]) & (position < passed[:, None])
        if bool(bypassed.any()):
            rest = bypass_pool(x[:, :full], layer.stride) * bypassed.to(y.dtype).view(*bypassed.shape, *spread)
            y = add_padded(y, rest)
        elif full > layer.filters:
            y = pad_channels(y, full)
        return y, width

    def _convolve(self, x: Tensor, kernels: Tensor) -> Tensor:
        """Convolution with each image's kernel size: once for each size that occurs."""
        layer = self.layer
        groups = layer.filters if layer.kind == "depthwise" else 1
        sizes = [layer.kernel] if layer.kernel == 1 else torch.unique(kernels).tolist()
        if len(sizes) == 1:
            return functional.conv2d(x, centre(self.weight, sizes[0]), None, layer.stride, sizes[0] // 2, 1, groups)
        members = [torch.nonzero(kernels == size).flatten() for size in sizes]
        parts = [
            functional.conv2d(
                x.index_select(0, member), centre(self.weight, size), None, layer.stride, size // 2, 1, groups
            )
            for size, member in zip(sizes, members, strict=True)
        ]
        return torch.cat(parts).index_select(0, torch.argsort(torch.cat(members)))

    def sliced(self, source: Source) -> dict[str, Tensor]:
        """Copies of the weights, and of batch-norm's tensors as `batch_norm.*`, that a sub-network's node takes."""
        with torch.no_grad():
            weight = self.weight[: source.filters, : source.channels]
            found = {"weight": centre(weight, source.kernel) if weight.dim() == 4 else weight}
            if self.bias is not None:
                found["bias"] = self.bias[: source.filters]
            if self.batch_norm is not None:
                for name, tensor in self.batch_norm.state_dict().items():
                    found[f"batch_norm.{name}"] = tensor[: source.filters] if tensor.dim() else tensor
            return {name: tensor.detach().clone() for name, tensor in found.items()}


class ElasticSqueezeExcite(nn.Module):
    """Squeeze-and-excite of a fixed inner size on however many channels there are."""

    def __init__(self, channels: int, squeeze: int, random: torch.Generator):
        super().__init__()
        self.reduce_weight = nn.Parameter(initialise(torch.empty(squeeze, channels), random))
        self.reduce_bias = nn.Parameter(torch.zeros(squeeze))
        self.expand_weight = nn.Parameter(initialise(torch.empty(channels, squeeze), random))
        self.expand_bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        """x (B, C_full, H, W); `present` (B,) is False for images whose block is removed."""
        scale = squeeze_excite_scale(x, self.reduce_weight, self.reduce_bias, self.expand_weight, self.expand_bias)
        if not bool(present.all()):
            scale = torch.where(present[:, None, None, None], scale, torch.ones_like(scale))
        return x * scale

    def sliced(self, source: Source) -> dict[str, Tensor]:
        channels = source.channels
        with torch.no_grad():
            return {
                "reduce_weight": self.reduce_weight[:, :channels].detach().clone(),
                "reduce_bias": self.reduce_bias.detach().clone(),
                "expand_weight": self.expand_weight[:channels].detach().clone(),
                "expand_bias": self.expand_bias[:channels].detach().clone(),
            }


def module_key(name: str) -> str:
    """A layer's name as torch allows it for a submodule."""
    return name.replace(".", "/")


class SuperNetwork(nn.Module):
    """The shared weights of all sub-networks of a description.

    >>> super_network = SuperNetwork(description)
    >>> logits = super_network(images, description.space.full)                  # one sub-network for all images
    >>> logits = super_network(images, Sample.drawn(draw(description.space, len(images), seed=0, step=0)))

    dropout: the share of features dropped before the classifier while training.
    """

    def __init__(self, description: Description, *, seed: int = 0, dropout: float = 0.0):
        super().__init__()
        self.description = description
        self.dropout = dropout
        random = torch.Generator().manual_seed(seed)
        modules: dict[str, nn.Module] = {
            module_key(layer.name): ElasticLayer(layer, random) for layer in description.layers
        }
        for unit in description.units:
            if isinstance(unit, BlockLayers) and unit.squeeze:
                modules[module_key(unit.squeeze_name)] = ElasticSqueezeExcite(
                    unit.depthwise.width, unit.squeeze, random
                )
        self.parts = nn.ModuleDict(modules)

    def part(self, name: str) -> ElasticLayer | ElasticSqueezeExcite:
        """The module of a layer or of a block's squeeze-and-excite, by the name in the description."""
        module = self.parts[module_key(name)]
        if not isinstance(module, ElasticLayer | ElasticSqueezeExcite):
            raise TypeError(f"{name} is a {type(module).__name__}")
        return module

    def forward(self, images: Tensor, sample: Sample | Architecture) -> Tensor:
        """images (B, C, H, W) to logits (B, classes).

        Raises InvalidInput if the sample is not for so many images and layers.
        """
        if isinstance(sample, Architecture):
            self.description.space.check(sample)
            sample = Sample.of(sample, len(images))
        expected = (len(images), len(self.description.space.layers))
        if tuple(sample.widths.shape) != expected or tuple(sample.kernels.shape) != expected:
            raise InvalidInput(f"a sample of shape {tuple(sample.widths.shape)} where {expected} is needed",
                               field="sample", remedy="draw one width per image and searched layer")  # fmt: skip
        sample = Sample(sample.widths.to(images.device), sample.kernels.to(images.device))
        x = images
        channels = torch.full((len(images),), images.shape[1], dtype=torch.int64, device=images.device)
        for unit in self.description.units:
            if isinstance(unit, BlockLayers):
                x, channels = self._block(unit, x, channels, sample)
                continue
            if unit.kind == "linear" and x.dim() == 4:
                x = x.mean((2, 3))
            if unit is self.description.layers[-1]:
                x = functional.dropout(x, self.dropout, self.training)
            x, channels = self._layer(unit, x, channels, sample)
        return x

    def _chosen(self, layer: Layer, sample: Sample) -> tuple[Tensor, Tensor]:
        """M and kernel size of every image, (B,) each."""
        if layer.index is None:
            full = torch.full((len(sample.widths),), layer.filters, device=sample.widths.device)
            return full, torch.full_like(full, layer.kernel)
        return sample.widths[:, layer.index], sample.kernels[:, layer.index]

    def _layer(self, layer: Layer, x: Tensor, channels: Tensor, sample: Sample) -> tuple[Tensor, Tensor]:
        y, width = self.part(layer.name)(x, channels, *self._chosen(layer, sample))
        return y, width

    def _block(self, block: BlockLayers, x: Tensor, channels: Tensor, sample: Sample) -> tuple[Tensor, Tensor]:
        inner, width = x, channels
        for layer in block.layers[:-1]:
            inner, width = self._layer(layer, inner, width, sample)
        if block.squeeze:
            chosen = torch.stack([self._chosen(layer, sample)[0] for layer in block.layers])
            inner = self.part(block.squeeze_name)(inner, (chosen > 0).any(0))
        inner, width = self._layer(block.project, inner, width, sample)
        if not block.residual:
            return inner, width
        return add_padded(inner, x), torch.maximum(width, channels)
