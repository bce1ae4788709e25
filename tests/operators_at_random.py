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
    Linear,
    Operator,
    Pool,
    ResidualAdd,
    SqueezeExcite,
    Upsample,
    same_padding,
)

ACTIVATIONS = st.sampled_from(["none", "relu", "relu6", "hard_swish", "hard_sigmoid", "sigmoid"])
CHANNELS = st.integers(1, 24)
SIZES = st.integers(1, 12)


@st.composite
def maps(draw: st.DrawFn) -> tuple[int, int, int, int]:
    return (draw(st.integers(1, 2)), draw(CHANNELS), draw(SIZES), draw(SIZES))


@st.composite
def convolutions(draw: st.DrawFn) -> Operator:
    batch, _, height, width = draw(maps())
    groups = draw(st.integers(1, 4))
    kernel = (draw(st.sampled_from([1, 2, 3, 5])), draw(st.sampled_from([1, 3])))
    padding = tuple(draw(st.integers(0, 2)) for _ in range(4))
    assume(height + padding[0] + padding[2] >= kernel[0])
    assume(width + padding[1] + padding[3] >= kernel[1])
    depthwise = draw(st.booleans())
    channels = draw(CHANNELS) if depthwise else groups * draw(st.integers(1, 6))
    return Convolution(
        input=(batch, channels, height, width),
        filters=channels if depthwise else groups * draw(st.integers(1, 6)),
        kernel=kernel,
        stride=(draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        padding=padding,
        groups=channels if depthwise else groups,
        bias=draw(st.booleans()),
        residual=draw(st.booleans()),
        activation=draw(ACTIVATIONS),
    )


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
        Linear, input=st.tuples(st.integers(1, 2), CHANNELS), features=CHANNELS, bias=st.booleans(),
        activation=ACTIVATIONS,
    ),
    "squeeze_excite": st.builds(SqueezeExcite, input=maps(), squeeze=CHANNELS),
    "channel_bypass": bypasses(),
    "residual_add": residual_adds(),
    "add": st.builds(Add, input=maps(), activation=ACTIVATIONS),
    "global_pool": st.builds(GlobalPool, input=maps()),
    "pool": pools(),
    "upsample": st.builds(Upsample, input=maps(), scale=st.integers(2, 3)),
    "activation": st.builds(
        Activate, input=maps(),
        activation=st.sampled_from(["relu", "relu6", "hard_swish", "hard_sigmoid", "sigmoid"]),
    ),
}  # fmt: skip

ANY = st.one_of(*BY_KIND.values())
