"""Hypothesis strategies of operators, one for each kind; a kind without one fails the tests that go through all."""

from __future__ import annotations

from hypothesis import assume
from hypothesis import strategies as st

from lut_db.operators import (
    Activate,
    Add,
    ChannelBypass,
    Convolution,
    GlobalPool,
    LayerNorm,
    Linear,
    MatMul,
    Operator,
    Pool,
    Rearrange,
    ResidualAdd,
    Softmax,
    SqueezeExcite,
    TransposedConvolution,
    Upsample,
    extent,
    same_padding,
)

ACTIVATIONS = st.sampled_from(["none", "relu", "relu6", "hard_swish", "hard_sigmoid", "sigmoid", "gelu"])
CHANNELS = st.integers(1, 24)
SIZES = st.integers(1, 12)
TOKENS = st.tuples(st.integers(1, 4), SIZES, CHANNELS)


@st.composite
def maps(draw: st.DrawFn) -> tuple[int, int, int, int]:
    return (draw(st.integers(1, 2)), draw(CHANNELS), draw(SIZES), draw(SIZES))


@st.composite
def convolutions(draw: st.DrawFn) -> Operator:
    batch, _, height, width = draw(maps())
    groups = draw(st.integers(1, 4))
    kernel = (draw(st.sampled_from([1, 2, 3, 5])), draw(st.sampled_from([1, 3])))
    dilation = (draw(st.sampled_from([1, 1, 2])), draw(st.sampled_from([1, 1, 3])))
    padding = tuple(draw(st.integers(0, 2)) for _ in range(4))
    assume(height + padding[0] + padding[2] >= extent(kernel[0], dilation[0]))
    assume(width + padding[1] + padding[3] >= extent(kernel[1], dilation[1]))
    depthwise = draw(st.booleans())
    channels = draw(CHANNELS) if depthwise else groups * draw(st.integers(1, 6))
    return Convolution(
        input=(batch, channels, height, width),
        filters=channels if depthwise else groups * draw(st.integers(1, 6)),
        kernel=kernel,
        stride=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        padding=padding,
        groups=channels if depthwise else groups,
        dilation=dilation,
        bias=draw(st.booleans()),
        residual=draw(st.booleans()),
        activation=draw(ACTIVATIONS),
    )


@st.composite
def transposed_convolutions(draw: st.DrawFn) -> Operator:
    batch, _, height, width = draw(maps())
    groups = draw(st.integers(1, 3))
    kernel = (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    stride = (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    padding = tuple(draw(st.integers(0, min(2, kernel[side % 2] - 1))) for side in range(4))
    more = (draw(st.integers(0, stride[0] - 1)), draw(st.integers(0, stride[1] - 1)))
    size = [(height, width)[i] * stride[i] - stride[i] + kernel[i] + more[i] - padding[i] - padding[i + 2]
            for i in (0, 1)]  # fmt: skip
    assume(min(size) >= 1)
    return TransposedConvolution(
        input=(batch, groups * draw(st.integers(1, 6)), height, width), filters=groups * draw(st.integers(1, 6)),
        kernel=kernel, stride=stride, padding=padding, output_padding=more, groups=groups, bias=draw(st.booleans()),
        activation=draw(ACTIVATIONS),
    )  # fmt: skip


@st.composite
def rearrangements(draw: st.DrawFn) -> Operator:
    mode = draw(st.sampled_from(["map_to_tokens", "tokens_to_map", "split_heads", "merge_heads"]))
    if mode == "map_to_tokens":
        return Rearrange(input=draw(maps()), mode=mode)
    sequences, tokens, features = draw(TOKENS)
    parts = draw(st.integers(2, 4))
    if mode == "tokens_to_map":
        return Rearrange(input=(sequences, parts * tokens, features), mode=mode, rows=parts)
    if mode == "split_heads":
        return Rearrange(input=(sequences, tokens, parts * features), mode=mode, heads=parts)
    return Rearrange(input=(parts * sequences, tokens, features), mode=mode, heads=parts)


@st.composite
def bypasses(draw: st.DrawFn) -> Operator:
    batch, _, height, width = draw(maps())
    channels = draw(st.integers(2, 24))
    limit = draw(st.one_of(st.none(), st.integers(1, 32)))
    passed = channels if limit is None else min(channels, limit)
    filters = draw(st.integers(0, passed - 1))
    stride = draw(st.integers(1, 3))
    if filters == 0:
        assume(passed < channels or stride > 1)
        return ChannelBypass(
            input=(batch, channels, height, width), filters=0, kernel=(1, 1), limit=limit, stride=(stride, stride)
        )
    kernel = draw(st.sampled_from([1, 3, 5]))
    return ChannelBypass(
        input=(batch, channels, height, width), filters=filters, kernel=(kernel, kernel), limit=limit,
        stride=(stride, stride), padding=same_padding(kernel), depthwise=draw(st.booleans()),
        bias=draw(st.booleans()), activation=draw(ACTIVATIONS),
    )  # fmt: skip


@st.composite
def residual_adds(draw: st.DrawFn) -> Operator:
    shape = draw(maps())
    shortcut = draw(CHANNELS.filter(lambda channels: channels != shape[1]))
    return ResidualAdd(input=shape, shortcut_channels=shortcut, activation=draw(ACTIVATIONS))


@st.composite
def pools(draw: st.DrawFn) -> Operator:
    shape = draw(maps())
    kernel = draw(st.integers(1, 4))
    padding = tuple(draw(st.integers(0, kernel - 1)) for _ in range(4))
    assume(min(shape[2] + padding[0] + padding[2], shape[3] + padding[1] + padding[3]) >= kernel)
    stride = draw(st.integers(1, kernel))
    return Pool(
        input=shape, mode=draw(st.sampled_from(["average", "max"])), kernel=(kernel, kernel),
        stride=(stride, stride), padding=padding,
    )  # fmt: skip


BY_KIND: dict[str, st.SearchStrategy[Operator]] = {
    "convolution": convolutions(),
    "linear": st.builds(
        Linear, input=st.tuples(st.integers(1, 2), CHANNELS) | TOKENS, features=CHANNELS, bias=st.booleans(),
        activation=ACTIVATIONS,
    ),
    "squeeze_excite": st.builds(SqueezeExcite, input=maps(), squeeze=CHANNELS),
    "channel_bypass": bypasses(),
    "residual_add": residual_adds(),
    "add": st.builds(Add, input=maps() | TOKENS, activation=ACTIVATIONS),
    "global_pool": st.builds(GlobalPool, input=maps() | TOKENS),
    "pool": pools(),
    "upsample": st.builds(Upsample, input=maps(), scale=st.integers(2, 3)),
    "activation": st.builds(
        Activate, input=maps() | TOKENS,
        activation=st.sampled_from(["relu", "relu6", "hard_swish", "hard_sigmoid", "sigmoid", "gelu"]),
    ),
    "transposed_convolution": transposed_convolutions(),
    "matmul": st.builds(MatMul, input=TOKENS, columns=CHANNELS, transposed=st.booleans(), scaled=st.booleans()),
    "layer_norm": st.builds(LayerNorm, input=TOKENS, epsilon=st.sampled_from([1e-5, 1e-3])),
    "softmax": st.builds(Softmax, input=TOKENS),
    "rearrange": rearrangements(),
}  # fmt: skip

ANY = st.one_of(*BY_KIND.values())
