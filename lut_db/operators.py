"""Operators: one layer each, as an inference engine runs it.

An operator is its kind, the shapes of its inputs and its attributes, and nothing else: no layer name, no
weights, no device. Two layers that an engine cannot tell apart are one operator and share one row of a table.
The rank of a shape says what a tensor is, in every format: `(N, C, H, W)` is a map, `(N, F)` are vectors, and
`(N, T, F)` are tokens: N sequences of T tokens with F features. The heads of an attention are sequences too, as
`split_heads` makes them: (sequences x heads, tokens, features of a head).

Counts follow the reading of NetAdaptV2 in which Tables 8 and 9 of the paper come out right: `macs` counts
convolution, linear, matrix products and the two linear layers of squeeze-and-excite; `macs_with_elementwise` adds
pools, scalings, norms, softmax and additions, one per element touched.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from math import prod
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator

VOCABULARY_VERSION = 1
"""Part of every key. Raised when the meaning of a kind or of an attribute changes."""

MAX_DIMENSION = 1 << 16
MAX_ELEMENTS = 1 << 28
"""Largest tensor that a network may hold (1 GiB of float32): checked before anything is allocated."""

Activation = Literal["none", "relu", "relu6", "hard_swish", "hard_sigmoid", "sigmoid", "gelu"]
"""`gelu` is the exact one, x (1 + erf(x / sqrt(2))) / 2."""
Size = Annotated[int, Field(ge=1, le=MAX_DIMENSION)]
Count = Annotated[int, Field(ge=0, le=MAX_DIMENSION)]
Kernel = Annotated[int, Field(ge=1, le=255)]
Stride = Annotated[int, Field(ge=1, le=64)]
Dilation = Annotated[int, Field(ge=1, le=64)]
Map: TypeAlias = tuple[Size, Size, Size, Size]
"""Shape of a feature map, (N, C, H, W)."""
Tokens: TypeAlias = tuple[Size, Size, Size]
"""Shape of sequences of tokens, (N, T, F)."""
MapOrTokens: TypeAlias = Annotated[tuple[Size, ...], Field(min_length=3, max_length=4)]
"""Shape of a feature map or of sequences of tokens."""
VectorOrTokens: TypeAlias = Annotated[tuple[Size, ...], Field(min_length=2, max_length=3)]
"""Shape of a batch of vectors, (N, F), or of sequences of tokens."""
Shape: TypeAlias = tuple[int, ...]
Padding: TypeAlias = tuple[Count, Count, Count, Count]
"""Zeros added at (top, left, bottom, right)."""

KEY_LENGTH = 32


def canonical_key(kind: str, definition: dict[str, Any]) -> str:
    """Key of a record of the vocabulary: the first 128 bits, in hex, of the SHA-256 of its canonical JSON.

    Canonical JSON has sorted keys, no spaces and ASCII only; the version of the vocabulary and `kind` are in it.
    """
    text = json.dumps(
        {"vocabulary": VOCABULARY_VERSION, "record": kind, "definition": definition},
        sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False,
    )  # fmt: skip
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def window_output(size: int, kernel: int, stride: int, pad: int) -> int:
    """Positions of a window of `kernel` along `size` elements with `pad` zeros in all, rounded down."""
    return (size + pad - kernel) // stride + 1


def extent(kernel: int, dilation: int) -> int:
    """Elements from the first to the last that a dilated kernel reads."""
    return (kernel - 1) * dilation + 1


def same_padding(kernel: int, dilation: int = 1) -> Padding:
    """Symmetric padding of an odd kernel: keeps the size at stride 1."""
    return (extent(kernel, dilation) // 2,) * 4


class Record(BaseModel):
    """A frozen, keyed word of the vocabulary."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @cached_property
    def key(self) -> str:
        return canonical_key("operator", self.model_dump(mode="json"))


class BaseOperator(Record):
    """What every operator can say of itself."""

    kind: str

    @property
    def inputs(self) -> tuple[Shape, ...]:
        """Shapes of the inputs, in order."""
        raise NotImplementedError

    @property
    def output(self) -> Shape:
        """Shape of the only output."""
        raise NotImplementedError

    @property
    def weights(self) -> dict[str, Shape]:
        """Shapes of the parameters after batch-norm is folded, by name."""
        return {}

    @property
    def family(self) -> str:
        """The kind, told apart further where runtimes run it in kernels of another sort."""
        return self.kind

    @property
    def macs(self) -> int:
        """Multiply-accumulates of convolutions, linear layers and matrix products."""
        return 0

    @property
    def elementwise(self) -> int:
        """Elements that pools, scalings, norms, softmax and additions touch."""
        return 0

    @property
    def macs_with_elementwise(self) -> int:
        return self.macs + self.elementwise

    @property
    def parameters(self) -> int:
        """Weights and biases, after batch-norm is folded."""
        return sum(prod(shape) for shape in self.weights.values())

    def bytes(self, element_size: int = 4) -> int:
        """Bytes read and written once each: inputs, parameters and output; `element_size` bytes an element."""
        activations = sum(prod(shape) for shape in self.inputs) + prod(self.output)
        return (activations + self.parameters) * element_size

    @model_validator(mode="after")
    def _check_sizes(self) -> BaseOperator:
        for name, shape in [
            *(("input", s) for s in self.inputs),
            ("output", self.output),
            *self.weights.items(),
        ]:
            if min(shape) < 1:
                raise ValueError(f"{name} would have shape {shape}: every dimension must be at least 1")
            if max(shape) > MAX_DIMENSION:
                raise ValueError(f"{name} would have shape {shape}: no dimension may exceed {MAX_DIMENSION}")
            if prod(shape) > MAX_ELEMENTS:
                raise ValueError(f"{name} of shape {shape} has more than {MAX_ELEMENTS} elements")
        return self


class _Windowed(BaseOperator):
    """A window slid over a feature map."""

    input: Map
    kernel: tuple[Kernel, Kernel]
    stride: tuple[Stride, Stride] = (1, 1)
    padding: Padding = (0, 0, 0, 0)

    @property
    def inputs(self) -> tuple[Shape, ...]:
        return (self.input,)

    @property
    def extent(self) -> tuple[int, int]:
        """Rows and columns that a window spans."""
        return self.kernel

    @property
    def output_size(self) -> tuple[int, int]:
        top, left, bottom, right = self.padding
        return (
            window_output(self.input[2], self.extent[0], self.stride[0], top + bottom),
            window_output(self.input[3], self.extent[1], self.stride[1], left + right),
        )

    @model_validator(mode="after")
    def _check_window(self) -> _Windowed:
        if min(self.output_size) < 1:
            raise ValueError(f"a window of {self.extent} is larger than the padded input {self.input}")
        return self


class Convolution(_Windowed):
    """Convolution with its batch-norm folded in, an optional residual added, then the activation.

    `residual` adds a second input of the output's shape before the activation, as runtimes fuse it.
    A depthwise convolution has `groups` equal to its input channels and to its filters. `dilation` is the step
    between the elements that a kernel reads.
    """

    kind: Literal["convolution"] = "convolution"
    filters: Size
    groups: Size = 1
    # Younger than the first keys: left out of the canonical JSON where it says nothing.
    dilation: tuple[Dilation, Dilation] = Field((1, 1), exclude_if=lambda dilation: dilation == (1, 1))
    bias: bool = True
    residual: bool = False
    activation: Activation = "none"

    @property
    def extent(self) -> tuple[int, int]:
        return (extent(self.kernel[0], self.dilation[0]), extent(self.kernel[1], self.dilation[1]))

    @property
    def inputs(self) -> tuple[Shape, ...]:
        return (self.input, self.output) if self.residual else (self.input,)

    @property
    def output(self) -> Shape:
        return (self.input[0], self.filters, *self.output_size)

    @property
    def depthwise(self) -> bool:
        return self.groups == self.input[1] == self.filters and self.groups > 1

    @property
    def family(self) -> str:
        return f"depthwise_{self.kind}" if self.depthwise else self.kind

    @property
    def weights(self) -> dict[str, Shape]:
        weight = (self.filters, self.input[1] // self.groups, *self.kernel)
        return {"weight": weight, "bias": (self.filters,)} if self.bias else {"weight": weight}

    @property
    def macs(self) -> int:
        return prod(self.output) * (self.input[1] // self.groups) * prod(self.kernel)

    @property
    def elementwise(self) -> int:
        return prod(self.output) if self.residual else 0

    @model_validator(mode="after")
    def _check_groups(self) -> Convolution:
        if self.input[1] % self.groups or self.filters % self.groups:
            raise ValueError(
                f"groups={self.groups} must divide the input channels ({self.input[1]}) "
                f"and the filters ({self.filters})"
            )
        return self


class TransposedConvolution(BaseOperator):
    """Transposed convolution, then the activation: every element of the input is spread over a window of the output.

    The output has `(size - 1) stride + kernel + output_padding` rows and columns, less the `padding` at each side.
    The weights are `(channels, filters / groups, kernel height, kernel width)`.
    """

    kind: Literal["transposed_convolution"] = "transposed_convolution"
    input: Map
    filters: Size
    kernel: tuple[Kernel, Kernel]
    stride: tuple[Stride, Stride] = (1, 1)
    padding: Padding = (0, 0, 0, 0)
    output_padding: tuple[Count, Count] = (0, 0)
    groups: Size = 1
    bias: bool = True
    activation: Activation = "none"

    @property
    def inputs(self) -> tuple[Shape, ...]:
        return (self.input,)

    @property
    def output_size(self) -> tuple[int, int]:
        height, width = (
            (self.input[2 + axis] - 1) * self.stride[axis] + self.kernel[axis] + self.output_padding[axis]
            - self.padding[axis] - self.padding[axis + 2]
            for axis in (0, 1)
        )  # fmt: skip
        return (height, width)

    @property
    def output(self) -> Shape:
        return (self.input[0], self.filters, *self.output_size)

    @property
    def weights(self) -> dict[str, Shape]:
        weight = (self.input[1], self.filters // self.groups, *self.kernel)
        return {"weight": weight, "bias": (self.filters,)} if self.bias else {"weight": weight}

    @property
    def macs(self) -> int:
        """What is spread beyond the output's edge is counted too, as it is computed."""
        return prod(self.input) * (self.filters // self.groups) * prod(self.kernel)

    @model_validator(mode="after")
    def _check_spread(self) -> TransposedConvolution:
        if self.input[1] % self.groups or self.filters % self.groups:
            raise ValueError(
                f"groups={self.groups} must divide the input channels ({self.input[1]}) "
                f"and the filters ({self.filters})"
            )
        if any(more >= stride for more, stride in zip(self.output_padding, self.stride, strict=True)):
            raise ValueError(f"output_padding {self.output_padding} must be smaller than the stride {self.stride}")
        top, left, bottom, right = self.padding
        if max(top, bottom) >= self.kernel[0] or max(left, right) >= self.kernel[1]:
            raise ValueError(f"padding {self.padding} must be smaller than the kernel {self.kernel}")
        return self


class Linear(BaseOperator):
    """Fully connected layer over the last dimension, then the activation.

    `(N, F)` to `(N, features)`, or `(N, T, F)` to `(N, T, features)`.
    """

    kind: Literal["linear"] = "linear"
    input: VectorOrTokens
    features: Size
    bias: bool = True
    activation: Activation = "none"

    @property
    def inputs(self) -> tuple[Shape, ...]:
        return (self.input,)

    @property
    def output(self) -> Shape:
        return (*self.input[:-1], self.features)

    @property
    def weights(self) -> dict[str, Shape]:
        weight = (self.features, self.input[-1])
        return {"weight": weight, "bias": (self.features,)} if self.bias else {"weight": weight}

    @property
    def macs(self) -> int:
        return prod(self.input) * self.features


class MatMul(BaseOperator):
    """Product of two batches of matrices: `(N, T, D)` by `(N, D, columns)` to `(N, T, columns)`.

    transposed: the second is given as `(N, columns, D)`, as the keys of an attention are.
    scaled: the product is divided by sqrt(D), as the scores of an attention are.
    """

    kind: Literal["matmul"] = "matmul"
    input: Tokens
    columns: Size
    transposed: bool = False
    scaled: bool = False

    @property
    def inputs(self) -> tuple[Shape, ...]:
        batch, _, inner = self.input
        return (self.input, (batch, self.columns, inner) if self.transposed else (batch, inner, self.columns))

    @property
    def output(self) -> Shape:
        return (*self.input[:2], self.columns)

    @property
    def macs(self) -> int:
        return prod(self.input) * self.columns

    @property
    def elementwise(self) -> int:
        return prod(self.output) if self.scaled else 0


class _Tokenwise(BaseOperator):
    """What is done to each token by itself, and keeps its shape."""

    input: Tokens

    @property
    def inputs(self) -> tuple[Shape, ...]:
        return (self.input,)

    @property
    def output(self) -> Shape:
        return self.input

    @property
    def elementwise(self) -> int:
        return prod(self.input)


class LayerNorm(_Tokenwise):
    """Layer normalisation over the last dimension: `weight (x - mean) / sqrt(variance + epsilon) + bias`."""

    kind: Literal["layer_norm"] = "layer_norm"
    epsilon: Annotated[float, Field(ge=1e-12, le=1.0)] = 1e-5

    @property
    def weights(self) -> dict[str, Shape]:
        return {"weight": self.input[2:], "bias": self.input[2:]}


class Softmax(_Tokenwise):
    """Softmax over the last dimension."""

    kind: Literal["softmax"] = "softmax"


class Rearrange(BaseOperator):
    """The same elements in another order, which an attention needs before and behind it.

    - `map_to_tokens`: `(N, C, H, W)` to `(N, H W, C)`, row by row;
    - `tokens_to_map`: back, `(N, rows W, C)` to `(N, C, rows, W)`;
    - `split_heads`: `(N, T, heads D)` to `(N heads, T, D)`;
    - `merge_heads`: back, `(N heads, T, D)` to `(N, T, heads D)`.
    """

    kind: Literal["rearrange"] = "rearrange"
    input: MapOrTokens
    mode: Literal["map_to_tokens", "tokens_to_map", "split_heads", "merge_heads"]
    rows: Size | None = None
    heads: Annotated[int, Field(ge=2, le=MAX_DIMENSION)] | None = None

    @property
    def inputs(self) -> tuple[Shape, ...]:
        return (self.input,)

    @property
    def output(self) -> Shape:
        if len(self.input) == 4:
            batch, channels, height, width = self.input
            return (batch, height * width, channels)
        batch, tokens, features = self.input
        if self.mode == "tokens_to_map":
            rows = self.rows or 1
            return (batch, features, rows, tokens // rows)
        heads = self.heads or 1
        if self.mode == "split_heads":
            return (batch * heads, tokens, features // heads)
        return (batch // heads, tokens, features * heads)

    @model_validator(mode="after")
    def _check_mode(self) -> Rearrange:
        if (self.mode == "map_to_tokens") != (len(self.input) == 4):
            wanted = "a map (N, C, H, W)" if self.mode == "map_to_tokens" else "tokens (N, T, F)"
            raise ValueError(f"input {self.input}: {self.mode} reads {wanted}")
        for name, modes in (("rows", ("tokens_to_map",)), ("heads", ("split_heads", "merge_heads"))):
            if (getattr(self, name) is not None) != (self.mode in modes):
                raise ValueError(f"{self.mode} {f'needs {name}' if self.mode in modes else f'takes no {name}'}")
        for name, divided, of in (
            ("rows", self.input[1], "tokens"),
            ("heads", self.input[0 if self.mode == "merge_heads" else 2],
             "sequences" if self.mode == "merge_heads" else "features"),
        ):  # fmt: skip
            parts = getattr(self, name)
            if parts is not None and divided % parts:
                raise ValueError(f"{name}={parts} must divide the {of} ({divided})")
        return self


class SqueezeExcite(BaseOperator):
    """Squeeze-and-excite: pool, linear to `squeeze` channels, ReLU, linear back, hard sigmoid, scale the input."""

    kind: Literal["squeeze_excite"] = "squeeze_excite"
    input: Map
    squeeze: Size

    @property
    def inputs(self) -> tuple[Shape, ...]:
        return (self.input,)

    @property
    def output(self) -> Shape:
        return self.input

    @property
    def weights(self) -> dict[str, Shape]:
        channels = self.input[1]
        return {
            "reduce_weight": (self.squeeze, channels), "reduce_bias": (self.squeeze,),
            "expand_weight": (channels, self.squeeze), "expand_bias": (channels,),
        }  # fmt: skip

    @property
    def macs(self) -> int:
        return 2 * self.input[0] * self.input[1] * self.squeeze

    @property
    def elementwise(self) -> int:
        return 2 * prod(self.input)


class ChannelBypass(_Windowed):
    """A convolution and its channel-level bypass (NetAdaptV2, Sec. 2.2), as one layer.

    `concat(activation(convolution(x)), x[:, M:min(C, T)])`: C are the channels of `input`, M (`filters`) the
    filters that remain, T (`limit`) bounds the bypass, None for infinity. The output has Z = max(min(C, T), M)
    channels. A `depthwise` layer reads the first M channels with one filter each. At stride s the bypassed
    channels are average pooled, s x s, stride s, rounding up and leaving the padding out of the mean; the
    convolution must round alike.

    There is such a layer only where channels are bypassed: M < min(C, T). When M = 0 the layer is removed and
    there is no convolution: kernel (1, 1), no padding, no activation. A removed layer that passes its whole input
    on at stride 1 is no operator at all.

    Layer and bypass are one operator because runtimes pay for what lies between them (layout conversions around
    slice and concat), and because a lowering may join them in other ways.
    """

    kind: Literal["channel_bypass"] = "channel_bypass"
    filters: Count
    limit: Size | None = None
    depthwise: bool = False
    bias: bool = True
    activation: Activation = "none"

    @property
    def family(self) -> str:
        return f"depthwise_{self.kind}" if self.depthwise else self.kind

    @property
    def passed(self) -> int:
        """min(C, T): one past the last input channel that may be bypassed."""
        return self.input[1] if self.limit is None else min(self.input[1], self.limit)

    @property
    def output(self) -> Shape:
        return (self.input[0], self.passed, *self.output_size)

    @property
    def weights(self) -> dict[str, Shape]:
        if self.filters == 0:
            return {}
        weight = (self.filters, 1 if self.depthwise else self.input[1], *self.kernel)
        return {"weight": weight, "bias": (self.filters,)} if self.bias else {"weight": weight}

    @property
    def macs(self) -> int:
        inputs = 1 if self.depthwise else self.input[1]
        return self.input[0] * self.filters * prod(self.output_size) * inputs * prod(self.kernel)

    @property
    def elementwise(self) -> int:
        if self.stride == (1, 1):
            return 0
        return self.input[0] * (self.passed - self.filters) * self.input[2] * self.input[3]

    @model_validator(mode="after")
    def _check_bypass(self) -> ChannelBypass:
        if self.filters >= self.passed:
            raise ValueError(
                f"filters={self.filters} leave no channel to bypass (min(C, T) = {self.passed}): use a convolution"
            )
        if self.output_size != tuple(-(-n // s) for n, s in zip(self.input[2:], self.stride, strict=True)):
            raise ValueError(
                f"the convolution makes a map of {self.output_size}, the bypass one of the input's size divided by "
                f"the stride {self.stride} and rounded up: choose a padding that keeps them equal"
            )
        if self.filters == 0:
            if self.passed == self.input[1] and self.stride == (1, 1):
                raise ValueError("a bypass of every channel at stride 1 is the identity: leave it out")
            bare = self.kernel == (1, 1) and not any(self.padding) and self.activation == "none"
            if not bare or self.depthwise or not self.bias:
                raise ValueError("a removed layer (filters=0) has no kernel, padding or activation: leave them out")
        return self


class ResidualAdd(BaseOperator):
    """Addition of two maps of unequal widths: the narrower is padded with zero channels at its end."""

    kind: Literal["residual_add"] = "residual_add"
    input: Map
    shortcut_channels: Size
    activation: Activation = "none"

    @property
    def inputs(self) -> tuple[Shape, ...]:
        batch, _, height, width = self.input
        return (self.input, (batch, self.shortcut_channels, height, width))

    @property
    def output(self) -> Shape:
        batch, channels, height, width = self.input
        return (batch, max(channels, self.shortcut_channels), height, width)

    @property
    def elementwise(self) -> int:
        batch, channels, height, width = self.input
        return batch * min(channels, self.shortcut_channels) * height * width

    @model_validator(mode="after")
    def _check_widths(self) -> ResidualAdd:
        if self.shortcut_channels == self.input[1]:
            raise ValueError("equal widths: use the kind 'add', or a convolution with residual=true")
        return self


class Add(BaseOperator):
    """Elementwise addition of two maps, or of tokens, of one shape, then the activation."""

    kind: Literal["add"] = "add"
    input: MapOrTokens
    activation: Activation = "none"

    @property
    def inputs(self) -> tuple[Shape, ...]:
        return (self.input, self.input)

    @property
    def output(self) -> Shape:
        return self.input

    @property
    def elementwise(self) -> int:
        return prod(self.input)


class GlobalPool(BaseOperator):
    """Mean over height and width, `(N, C, H, W)` to the vectors `(N, C)`; or over tokens, `(N, T, F)` to `(N, F)`."""

    kind: Literal["global_pool"] = "global_pool"
    input: MapOrTokens

    @property
    def inputs(self) -> tuple[Shape, ...]:
        return (self.input,)

    @property
    def output(self) -> Shape:
        return self.input[:2] if len(self.input) == 4 else (self.input[0], self.input[2])

    @property
    def elementwise(self) -> int:
        return prod(self.input)


class Pool(_Windowed):
    """Average or maximum over a window. An average leaves the padding out of the mean."""

    kind: Literal["pool"] = "pool"
    mode: Literal["average", "max"]

    @property
    def output(self) -> Shape:
        return (*self.input[:2], *self.output_size)

    @property
    def elementwise(self) -> int:
        return prod(self.output) * prod(self.kernel)

    @model_validator(mode="after")
    def _check_padding(self) -> Pool:
        top, left, bottom, right = self.padding
        if max(top, bottom) >= self.kernel[0] or max(left, right) >= self.kernel[1]:
            raise ValueError(f"padding {self.padding} must be smaller than the kernel {self.kernel}")
        return self


class Upsample(BaseOperator):
    """Nearest-neighbour upsampling by a whole factor."""

    kind: Literal["upsample"] = "upsample"
    input: Map
    scale: Annotated[int, Field(ge=2, le=64)]

    @property
    def inputs(self) -> tuple[Shape, ...]:
        return (self.input,)

    @property
    def output(self) -> Shape:
        batch, channels, height, width = self.input
        return (batch, channels, height * self.scale, width * self.scale)


class Activate(BaseOperator):
    """An activation that no other operator could take in."""

    kind: Literal["activation"] = "activation"
    input: MapOrTokens
    activation: Literal["relu", "relu6", "hard_swish", "hard_sigmoid", "sigmoid", "gelu"]

    @property
    def inputs(self) -> tuple[Shape, ...]:
        return (self.input,)

    @property
    def output(self) -> Shape:
        return self.input


Operator = Annotated[
    Convolution | Linear | SqueezeExcite | ChannelBypass | ResidualAdd | Add
    | GlobalPool | Pool | Upsample | Activate
    | TransposedConvolution | MatMul | LayerNorm | Softmax | Rearrange,
    Field(discriminator="kind"),
]  # fmt: skip

OPERATOR: TypeAdapter[Operator] = TypeAdapter(Operator)
"""Reads an operator from JSON or from a dict, whatever its kind."""

KINDS: dict[str, type[BaseOperator]] = {
    cls.model_fields["kind"].default: cls
    for cls in (
        Convolution, Linear, SqueezeExcite, ChannelBypass, ResidualAdd, Add,
        GlobalPool, Pool, Upsample, Activate,
        TransposedConvolution, MatMul, LayerNorm, Softmax, Rearrange,
    )
}  # fmt: skip
