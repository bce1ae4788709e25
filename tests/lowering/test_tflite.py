"""What is particular to TFLite. That it says what the reference computes is tested in `test_formats.py`."""

from __future__ import annotations

import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema
from hypothesis import HealthCheck, given, settings
from operators_at_random import ANY

from lut_db.canary import canary
from lut_db.lowering.tflite import ALIGNMENT, model_operators, owners, to_nchw, to_nhwc, to_tflite
from lut_db.networks import Network
from lut_db.operators import ChannelBypass, Convolution, Operator, Pool, ResidualAdd, SqueezeExcite, Upsample

MAP = (1, 16, 14, 14)


def codes(operator: Operator) -> list[str]:
    network = Network.of(operator)
    return [found.code for found in model_operators(to_tflite(network), network)]


@settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck))
@given(operator=ANY)
def test_every_operator_says_which_node_it_belongs_to(operator: Operator) -> None:
    network = Network.of(operator)
    found = owners(to_tflite(network), network)
    assert found
    assert set(found) == {0}


def test_the_operators_of_a_network_belong_to_its_nodes_in_order() -> None:
    found = owners(to_tflite(canary()), canary())
    assert found == sorted(found)
    assert sorted(set(found)) == list(range(len(canary().nodes)))


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "padding", "said"),
    [
        (14, 3, 1, (1, 1, 1, 1), ["CONV_2D"]),
        (15, 3, 2, (1, 1, 1, 1), ["CONV_2D"]),  # odd size: SAME pads both sides alike
        (14, 3, 2, (1, 1, 1, 1), ["PAD", "CONV_2D"]),  # even size: SAME would pad behind only
        (14, 3, 2, (0, 0, 1, 1), ["CONV_2D"]),
        (14, 3, 1, (0, 0, 0, 0), ["CONV_2D"]),
        (14, 1, 2, (0, 0, 0, 0), ["CONV_2D"]),
        (14, 5, 1, (1, 1, 1, 1), ["PAD", "CONV_2D"]),
        (14, 4, 1, (1, 1, 2, 2), ["CONV_2D"]),
        (14, 4, 1, (2, 2, 1, 1), ["PAD", "CONV_2D"]),
        (15, 2, 2, (0, 0, 0, 0), ["CONV_2D"]),  # the last row is never read
    ],
)
def test_same_padding_is_told_apart_from_explicit_padding(
    size: int, kernel: int, stride: int, padding: tuple[int, int, int, int], said: list[str]
) -> None:
    operator = Convolution(
        input=(1, 3, size, size), filters=4, kernel=(kernel, kernel), stride=(stride, stride), padding=padding
    )
    assert codes(operator) == said


def test_what_the_format_fuses_is_one_operator() -> None:
    convolution = Convolution(input=MAP, filters=16, kernel=(1, 1), residual=True, activation="relu6")
    assert codes(convolution) == ["CONV_2D", "ADD"]
    assert codes(convolution.model_copy(update={"residual": False})) == ["CONV_2D"]
    assert codes(convolution.model_copy(update={"activation": "hard_swish"})) == ["CONV_2D", "ADD", "HARD_SWISH"]
    assert codes(SqueezeExcite(input=MAP, squeeze=4)) == ["MEAN", "CONV_2D", "CONV_2D", "MUL", "MUL"]
    assert codes(ResidualAdd(input=MAP, shortcut_channels=4, activation="relu")) == ["PAD", "ADD"]
    assert codes(Upsample(input=MAP, scale=2)) == ["RESIZE_NEAREST_NEIGHBOR"]


def test_depthwise_and_grouped_convolutions() -> None:
    assert codes(Convolution(input=MAP, filters=32, kernel=(3, 3), groups=16)) == ["DEPTHWISE_CONV_2D"]
    assert codes(Convolution(input=MAP, filters=32, kernel=(3, 3), groups=4)) == ["CONV_2D"]
    bypass = ChannelBypass(input=MAP, filters=1, kernel=(3, 3), padding=(1, 1, 1, 1), depthwise=True)
    assert codes(bypass) == ["SLICE", "SLICE", "CONV_2D", "CONCATENATION"]


def test_pools_whose_padding_the_format_cannot_say() -> None:
    pool = {"input": MAP, "kernel": (3, 3), "stride": (2, 2), "padding": (1, 1, 1, 1)}
    assert codes(Pool(mode="average", **pool)) == ["PAD", "AVERAGE_POOL_2D", "MUL"]
    assert codes(Pool(mode="max", **pool)) == ["PADV2", "MAX_POOL_2D"]


def test_weights_lie_aligned() -> None:
    model = to_tflite(canary())
    root = schema.Model.GetRootAs(model)
    begin = np.frombuffer(model, np.uint8).ctypes.data
    buffers = [root.Buffers(number) for number in range(root.BuffersLength())]
    data = [buffer.DataAsNumpy() for buffer in buffers if buffer.DataLength()]
    assert data
    assert all((array.ctypes.data - begin) % ALIGNMENT == 0 for array in data)


def test_arrays_turn_and_turn_back() -> None:
    array = np.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    assert to_nhwc(array).shape == (2, 4, 5, 3)
    assert np.array_equal(to_nchw(to_nhwc(array)), array)
    assert to_nhwc(array[0, 0]).shape == (4, 5)
