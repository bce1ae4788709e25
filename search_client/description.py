"""One declarative description of a network, from which everything derives. Pure data, no torch.

A `Description` lists the stages of the initial network (convolutions, depthwise convolutions, MobileNetV3-style
blocks, then linear layers). From it come the search space, the operators of any sub-network, and, in
`search_client.elastic` and `search_client.sliced`, the super-network and the sub-networks cut out of it.

Channel-level bypass connections (NetAdaptV2, Sec. 2.2): a layer with C input channels, limit T and M remaining
filters has Z = max(min(C, T), M) output channels; input channel i is bypassed for M <= i < min(C, T).

- Depthwise layers have T = infinity and M <= C: a larger M is clipped to C.
- Across a stride, the bypassed channels are average pooled by the stride, rounding up.
- A residual addition pads the narrower side with zero channels: its width is max(C_in, Z).
- In a residual block the projection has no bypass, so that M = 0 there removes the block: it is exactly the
  identity. `literal_residual_bypass` keeps the bypass beside the residual, as the paper may be read.
- Squeeze-and-excite has a fixed size and scales the merged Z channels of the depthwise layer. It goes when all
  layers of its block have M = 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeAlias

from lut_db.errors import InvalidInput
from lut_db.networks import Network, NetworkBuilder
from lut_db.operators import (
    Activation,
    Add,
    ChannelBypass,
    Convolution,
    GlobalPool,
    Operator,
    Pool,
    ResidualAdd,
    SqueezeExcite,
    same_padding,
)
from lut_db.operators import Linear as LinearOperator
from search_client.architecture import Architecture, SearchLayer, SearchSpace

# --- the arithmetic of widths ----------------------------------------------------------------------------------


def output_width(channels: int, limit: int | None, filters: int) -> int:
    """Z = max(min(C, T), M); `limit` None is T = infinity, 0 is no bypass."""
    return max(passed_channels(channels, limit), filters)


def passed_channels(channels: int, limit: int | None) -> int:
    """min(C, T): one past the last input channel that may be bypassed."""
    return channels if limit is None else min(channels, limit)


def round_to(value: float, divisor: int) -> int:
    """The multiple of `divisor` nearest to `value`, halves upwards, at least one `divisor`."""
    return max(divisor, int(value + divisor / 2) // divisor * divisor)


def width_grid(full: int, count: int, divisor: int = 1) -> tuple[int, ...]:
    """`count` uniformly spaced widths from 0 to `full`, rounded to multiples of `divisor`, distinct, ascending.

    Where `full` is below twice the divisor, rounding would leave next to nothing: such widths are not rounded.
    """
    divisor = divisor if full >= 2 * divisor else 1
    steps = {round_to(full * number / (count - 1), divisor) for number in range(1, count - 1)}
    return tuple(sorted({0, full} | {width for width in steps if width < full}))


def kernel_grid(full: int) -> tuple[int, ...]:
    """Odd kernel sizes from 3 to `full`; a pointwise layer has only 1."""
    return (1,) if full == 1 else tuple(range(3, full + 1, 2))


# --- what an author writes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conv:
    """Convolution, batch-norm, activation. `limit` is T: None for infinity, 0 for no bypass.

    `widths` replaces the description's grid; `search=False` keeps the layer as it is.
    """

    name: str
    filters: int
    kernel: int = 1
    stride: int = 1
    limit: int | None = None
    activation: Activation = "relu"
    search: bool = True
    widths: tuple[int, ...] | None = None
    tie: str | None = None


@dataclass(frozen=True)
class Depthwise:
    """Depthwise convolution over all its input channels, batch-norm, activation; T = infinity."""

    name: str
    kernel: int = 3
    stride: int = 1
    activation: Activation = "relu"
    search: bool = True
    tie: str | None = None


@dataclass(frozen=True)
class Block:
    """MobileNetV3-style block: expansion, depthwise, squeeze-and-excite, projection; residual at stride 1.

    `expand` None: no expansion layer. `squeeze` 0: no squeeze-and-excite, else its inner channels. `limit` is the T
    of the two pointwise layers. The projection has no activation.
    """

    name: str
    filters: int
    expand: int | None
    kernel: int = 3
    stride: int = 1
    limit: int | None = None
    activation: Activation = "relu"
    squeeze: int = 0
    search: bool = True
    tie: str | None = None
    """Ties the projection with other layers of the same tie."""


@dataclass(frozen=True)
class Linear:
    """Linear layer of the head, with bias and without batch-norm. The last of a description is its classifier."""

    name: str
    features: int
    activation: Activation = "none"
    limit: int | None = None
    search: bool = True


Stage: TypeAlias = Conv | Depthwise | Block | Linear


def separable(
    name: str, filters: int, *, kernel: int = 3, stride: int = 1, limit: int | None = None,
    activation: Activation = "relu",
) -> tuple[Depthwise, Conv]:  # fmt: skip
    """Depthwise separable convolution of MobileNetV1: depthwise, then pointwise, each with batch-norm."""
    return (
        Depthwise(f"{name}.depthwise", kernel=kernel, stride=stride, activation=activation),
        Conv(f"{name}.pointwise", filters, limit=limit, activation=activation),
    )


# --- what it is compiled to ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A layer with weights, in the initial network: C = `channels`, M = `filters`, T = `limit`."""

    name: str
    kind: Literal["convolution", "depthwise", "linear"]
    channels: int
    filters: int
    kernel: int
    stride: int
    limit: int | None
    activation: Activation
    batch_norm: bool
    index: int | None
    """Its position in the search space; None if it is not searched."""

    @property
    def width(self) -> int:
        """Z in the initial network."""
        return output_width(self.channels, self.limit, self.filters)

    def chosen(self, architecture: Architecture) -> tuple[int, int]:
        """M and kernel size in a sub-network, as the architecture says them (a depthwise M is not yet clipped)."""
        if self.index is None:
            return self.filters, self.kernel
        return architecture.widths[self.index], architecture.kernels[self.index]


@dataclass(frozen=True)
class BlockLayers:
    """A block with its layers compiled. `removable`: a projection without filters removes the whole block."""

    name: str
    expand: Layer | None
    depthwise: Layer
    squeeze: int
    project: Layer
    residual: bool
    removable: bool

    @property
    def layers(self) -> tuple[Layer, ...]:
        return (self.depthwise, self.project) if self.expand is None else (self.expand, self.depthwise, self.project)

    @property
    def channels(self) -> int:
        return self.layers[0].channels

    @property
    def width(self) -> int:
        """Output channels in the initial network."""
        return max(self.channels, self.project.width) if self.residual else self.project.width

    @property
    def squeeze_name(self) -> str:
        return f"{self.name}.squeeze_excite"


Unit: TypeAlias = Layer | BlockLayers
Part = Literal["layer", "squeeze_excite", "bypass", "residual", "pool"]


@dataclass(frozen=True)
class Source:
    """Where a node of a sub-network comes from.

    For the parts `layer` and `squeeze_excite`, `module` names the layer whose weights the node takes: the first
    `filters` filters, their first `channels` channels, the `kernel` x `kernel` centre of each. Other parts (a removed
    layer's bypass, a residual addition, the global pool) have no weights; `module` names what they belong to.
    """

    module: str
    part: Part
    channels: int = 0
    filters: int = 0
    kernel: int = 1
    batch_norm: bool = False

    @property
    def has_weights(self) -> bool:
        return self.part in ("layer", "squeeze_excite")


# --- the description -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Description:
    """An initial network and the grid of its sub-networks.

    image: (channels, height, width) of the input.
    stages: convolutional stages, then, behind a global pool, linear ones; the last is the classifier.
    width_count: N widths per layer, uniformly spaced from 0 to full. divisor: they are rounded to multiples of it.

    Raises InvalidInput if the stages cannot make a network.
    """

    name: str
    image: tuple[int, int, int]
    stages: tuple[Stage, ...]
    width_count: int = 9
    divisor: int = 1
    literal_residual_bypass: bool = False

    def __post_init__(self) -> None:
        if len(self.image) != 3 or min(self.image) < 1:
            raise InvalidInput(f"{self.image} is no image", field="image", remedy="give (channels, height, width)")
        if self.width_count < 2:
            raise InvalidInput(f"{self.width_count} widths leave nothing to search", field="width_count",
                               remedy="give 2 or more")  # fmt: skip
        if self.divisor < 1:
            raise InvalidInput(f"{self.divisor} is no divisor", field="divisor", remedy="give 1 or more")
        kinds = [isinstance(stage, Linear) for stage in self.stages]
        if not any(kinds) or all(kinds) or kinds != sorted(kinds):
            raise InvalidInput(
                "a network is one or more convolutional stages, then one or more linear ones",
                field="stages", remedy="end the stages with the classifier, a Linear",
            )  # fmt: skip
        for stage in self.stages:
            if not isinstance(stage, Linear) and (stage.kernel < 1 or stage.kernel % 2 == 0):
                raise InvalidInput(f"{stage.name}: kernel {stage.kernel} must be odd", field="stages")
        names = [layer.name for layer in self.layers]
        if len(set(names)) != len(names):
            raise InvalidInput("two layers have the same name", field="stages")
        self.network(self.space.full)  # everything else that can be wrong is wrong here

    @cached_property
    def key(self) -> str:
        """Hash of everything that the description says."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    @property
    def classes(self) -> int:
        return self.layers[-1].filters

    @cached_property
    def units(self) -> tuple[Unit, ...]:
        """The stages with every layer's full C, M and T, in order."""
        units: list[Unit] = []
        counter = iter(range(1 << 30))
        channels = self.image[0]
        for number, stage in enumerate(self.stages):
            unit: Unit
            index = next(counter) if not isinstance(stage, Block) and self._searched(number) else None
            match stage:
                case Conv():
                    unit = Layer(stage.name, "convolution", channels, stage.filters, stage.kernel, stage.stride,
                                 stage.limit, stage.activation, True, index)  # fmt: skip
                case Depthwise():
                    unit = Layer(stage.name, "depthwise", channels, channels, stage.kernel, stage.stride,
                                 None, stage.activation, True, index)  # fmt: skip
                case Linear():
                    limit = 0 if number == len(self.stages) - 1 else stage.limit
                    unit = Layer(stage.name, "linear", channels, stage.features, 1, 1, limit, stage.activation,
                                 False, index)  # fmt: skip
                case Block():
                    unit = self._block(stage, channels, counter)
            units.append(unit)
            channels = unit.width
        return tuple(units)

    def _block(self, stage: Block, channels: int, counter: Iterator[int]) -> BlockLayers:
        residual = stage.stride == 1
        removable = residual and not self.literal_residual_bypass

        def index() -> int | None:
            return next(counter) if stage.search else None

        expand = None
        inner = channels
        if stage.expand is not None:
            expand = Layer(f"{stage.name}.expand", "convolution", channels, stage.expand, 1, 1, stage.limit,
                           stage.activation, True, index())  # fmt: skip
            inner = expand.width
        depthwise = Layer(f"{stage.name}.depthwise", "depthwise", inner, inner, stage.kernel, stage.stride, None,
                          stage.activation, True, index())  # fmt: skip
        # Bypass and residual together would give x + x[:T] where M = 0. T = 0 leaves the residual alone.
        project = Layer(f"{stage.name}.project", "convolution", inner, stage.filters, 1, 1,
                        0 if removable else stage.limit, "none", True, index())  # fmt: skip
        return BlockLayers(stage.name, expand, depthwise, stage.squeeze, project, residual, removable)

    def _searched(self, number: int) -> bool:
        return self.stages[number].search and number < len(self.stages) - 1

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """Every layer with weights but squeeze-and-excite, in order; the classifier is the last."""
        return tuple(
            layer for unit in self.units for layer in (unit.layers if isinstance(unit, BlockLayers) else (unit,))
        )

    @cached_property
    def space(self) -> SearchSpace:
        """The search space: one entry for every searched layer, in order."""
        found: list[SearchLayer] = []
        for stage, unit in zip(self.stages, self.units, strict=True):
            for layer in unit.layers if isinstance(unit, BlockLayers) else (unit,):
                if layer.index is None:
                    continue
                widths = width_grid(layer.filters, self.width_count, self.divisor)
                if isinstance(stage, Conv) and stage.widths is not None:
                    widths = stage.widths
                carried = isinstance(unit, BlockLayers) and unit.removable and layer is unit.project
                if layer.limit == 0 and not carried:
                    widths = tuple(width for width in widths if width > 0)
                if not widths or widths[-1] != layer.filters:
                    raise InvalidInput(f"{layer.name}: widths {widths} must end with the full width, {layer.filters}",
                                       field="stages")  # fmt: skip
                tie = None if isinstance(stage, Linear) else stage.tie
                if isinstance(unit, BlockLayers) and layer is not unit.project:
                    tie = None
                found.append(SearchLayer(layer.name, widths, kernel_grid(layer.kernel), tie))
        return SearchSpace(tuple(found))

    def architecture(self, choices: dict[str, tuple[int, int]] | None = None) -> Architecture:
        """The full network with the (filters, kernel) of some layers, by name, replaced."""
        architecture = self.space.full
        positions = {layer.name: number for number, layer in enumerate(self.space.layers)}
        for name, (filters, kernel) in (choices or {}).items():
            if name not in positions:
                raise InvalidInput(f"no searched layer {name!r}", field="choices",
                                   remedy="one of " + ", ".join(positions))  # fmt: skip
            architecture = architecture.with_width(positions[name], filters).with_kernel(positions[name], kernel)
        self.space.check(architecture)
        return architecture

    def canonical(self, architecture: Architecture) -> Architecture:
        """The architecture that all architectures of the same sub-network share.

        Layers of a removed residual block, whose results reach nothing, get width 0; a depthwise M is clipped to
        its C; a layer without filters gets its smallest kernel. `network()` is the same for both.
        """
        self.space.check(architecture)
        widths, kernels = list(architecture.widths), list(architecture.kernels)
        channels = self.image[0]

        def settle(layer: Layer, channels: int, dead: bool = False) -> int:
            filters, _ = layer.chosen(architecture)
            filters = 0 if dead else min(filters, channels) if layer.kind == "depthwise" else filters
            if layer.index is not None:
                widths[layer.index] = filters
                if filters == 0:
                    kernels[layer.index] = self.space.layers[layer.index].kernels[0]
            return output_width(channels, layer.limit, filters)

        for unit in self.units:
            if isinstance(unit, Layer):
                channels = settle(unit, channels)
                continue
            dead = unit.removable and unit.project.chosen(architecture)[0] == 0
            inner = channels
            for layer in unit.layers:
                inner = settle(layer, inner, dead)
            channels = max(channels, inner) if unit.residual else inner
        return Architecture(tuple(widths), tuple(kernels))

    def network(self, architecture: Architecture, batch: int = 1) -> Network:
        """The operators of a sub-network, as a runtime runs them: batch-norm folded, activations and residuals fused.

        There is no operator for an identity, and a bypass only where channels are bypassed. Raises InvalidInput if
        the architecture does not fit the space or leaves a layer without channels.
        """
        return self.network_with_sources(architecture, batch)[0]

    def network_with_sources(self, architecture: Architecture, batch: int = 1) -> tuple[Network, tuple[Source, ...]]:
        """The same network, and for every node where it comes from."""
        self.space.check(architecture)
        emit = _Emitter(architecture, (batch, *self.image))
        tensor = 0
        head = [unit for unit in self.units if isinstance(unit, Layer) and unit.kind == "linear"]
        for unit in self.units[: len(self.units) - len(head)]:
            tensor = emit.block(unit, tensor) if isinstance(unit, BlockLayers) else emit.layer(unit, tensor)
        emit.head(head, tensor)
        return emit.build.network(), tuple(emit.sources)


class _Emitter:
    """Writes the nodes of a sub-network and, beside them, their sources."""

    def __init__(self, architecture: Architecture, image: tuple[int, int, int, int]):
        self.architecture = architecture
        self.build = NetworkBuilder()
        self.build.input(image)
        self.sources: list[Source] = []

    def add(self, source: Source, operator: Operator, *inputs: int) -> int:
        self.sources.append(source)
        return self.build.add(operator, *inputs)

    def layer(self, layer: Layer, tensor: int, shortcut: int | None = None) -> int:
        """A layer on a map, with its bypass. `shortcut` is added: fused if the widths are equal."""
        shape = self.build.shape(tensor)
        channels = shape[1]
        filters, kernel = layer.chosen(self.architecture)
        passed = passed_channels(channels, layer.limit)
        depthwise = layer.kind == "depthwise"
        if depthwise:
            filters = min(filters, channels)
        if max(filters, passed) == 0:
            raise InvalidInput(f"layer {layer.name!r} has no filters and no bypass: it has no output", field="widths",
                               remedy="keep at least one filter")  # fmt: skip
        limit = None if layer.limit is None or layer.limit >= channels else layer.limit
        source = Source(layer.name, "layer", 1 if depthwise else channels, filters, kernel, layer.batch_norm)
        stride = (layer.stride, layer.stride)
        result = tensor
        if filters == 0:
            if passed < channels or layer.stride > 1:
                removed = ChannelBypass(input=shape, kernel=(1, 1), stride=stride, filters=0, limit=limit)
                result = self.add(Source(layer.name, "bypass"), removed, tensor)
        elif filters < passed:
            merged = ChannelBypass(
                input=shape, kernel=(kernel, kernel), stride=stride, padding=same_padding(kernel), filters=filters,
                limit=limit, depthwise=depthwise, activation=layer.activation,
            )  # fmt: skip
            result = self.add(source, merged, tensor)
        else:
            fused = shortcut is not None and self.build.shape(shortcut)[1] == filters
            convolution = Convolution(
                input=shape, kernel=(kernel, kernel), stride=stride, padding=same_padding(kernel), filters=filters,
                groups=channels if depthwise else 1, residual=fused, activation=layer.activation,
            )  # fmt: skip
            if fused and shortcut is not None:
                return self.add(source, convolution, tensor, shortcut)
            result = self.add(source, convolution, tensor)
        return result if shortcut is None else self.residual(layer, result, shortcut)

    def residual(self, layer: Layer, tensor: int, shortcut: int) -> int:
        shape, other = self.build.shape(tensor), self.build.shape(shortcut)[1]
        operator = Add(input=shape) if shape[1] == other else ResidualAdd(input=shape, shortcut_channels=other)
        return self.add(Source(layer.name, "residual"), operator, tensor, shortcut)

    def block(self, block: BlockLayers, tensor: int) -> int:
        chosen = [layer.chosen(self.architecture)[0] for layer in block.layers]
        if block.removable and chosen[-1] == 0:
            return tensor
        inner = tensor
        for layer in block.layers[:-1]:
            inner = self.layer(layer, inner)
        if block.squeeze and any(chosen):
            shape = self.build.shape(inner)
            inner = self.add(Source(block.squeeze_name, "squeeze_excite", shape[1], block.squeeze),
                             SqueezeExcite(input=shape, squeeze=block.squeeze), inner)  # fmt: skip
        return self.layer(block.project, inner, shortcut=tensor if block.residual else None)

    def head(self, layers: list[Layer], tensor: int) -> int:
        """Global pool and linear layers.

        A bypass is an operator on maps: up to the last layer that needs one, linear layers are written as pointwise
        convolutions on a map of one pixel.
        """
        channels = self.build.shape(tensor)[1]
        last = -1
        for number, layer in enumerate(layers):
            filters, passed = layer.chosen(self.architecture)[0], passed_channels(channels, layer.limit)
            if filters < passed and (filters or passed < channels):
                last = number
            channels = max(filters, passed)
        shape = self.build.shape(tensor)
        if last >= 0 and shape[2:] != (1, 1):
            pool = Pool(input=shape, kernel=(shape[2], shape[3]), mode="average")
            tensor = self.add(Source("pool", "pool"), pool, tensor)
        for layer in layers[: last + 1]:
            tensor = self.layer(layer, tensor)
        shape = self.build.shape(tensor)
        tensor = self.add(Source("pool", "pool"), GlobalPool(input=shape), tensor)
        for layer in layers[last + 1 :]:
            filters, _ = layer.chosen(self.architecture)
            if filters == 0:  # removed, and its input passed on whole
                continue
            shape = self.build.shape(tensor)
            operator = LinearOperator(input=shape, features=filters, activation=layer.activation)
            tensor = self.add(Source(layer.name, "layer", shape[1], filters), operator, tensor)
        return tensor
