"""Whose time is whose: what XNNPACK ran, in terms of the operators of a TFLite model.

A profile counts the runtime's own operators as the model does. What XNNPACK runs is told by XNNPACK's names, in the
order of running, and not which operator of the model it came from. Both are in the same order, so they are matched one
after the other, and whatever does not match is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from device_agents.backends import Unsupported
from lut_db.lowering.tflite import ModelOperator

HALF_US = 0.5
"""XNNPACK tells whole microseconds, rounded down: the middle of what was meant is half a microsecond later."""

NAMES: dict[str, tuple[str, ...]] = {
    "ADD": ("Add", "Binary Elementwise"),
    "AVERAGE_POOL_2D": ("Average Pooling", "Copy", "Clamp"),
    "BATCH_MATMUL": ("Batch Matrix Multiply",),
    "CONCATENATION": ("Copy", "Concatenate"),
    "CONV_2D": ("Convolution", "Fully Connected"),
    "DEPTHWISE_CONV_2D": ("Convolution",),
    "FULLY_CONNECTED": ("Fully Connected",),
    "GELU": ("GELU", "Unary Elementwise"),
    "HARD_SWISH": ("HardSwish", "Unary Elementwise"),
    "LOGISTIC": ("Sigmoid", "Unary Elementwise"),
    "MAX_POOL_2D": ("Max Pooling", "Copy", "Clamp"),
    "MEAN": ("Mean", "Global Average Pooling"),
    "MUL": ("Multiply", "Binary Elementwise"),
    "PAD": ("Constant Pad",),
    "RELU": ("Clamp", "Unary Elementwise"),
    "RELU6": ("Clamp", "Unary Elementwise"),
    "RESHAPE": ("Static Reshape", "Copy"),
    "RSQRT": ("Reciprocal Square Root", "Unary Elementwise"),
    "SLICE": ("Slice",),
    "SOFTMAX": ("Softmax",),
    "SUB": ("Subtract", "Binary Elementwise"),
    "TRANSPOSE": ("Transpose",),
    "TRANSPOSE_CONV": ("Deconvolution",),
}
"""How the names begin that XNNPACK, in its newer and older builds, gives to what it makes of an operator."""
BEFORE = {"FULLY_CONNECTED": ("Static Reshape", "Pack"), "CONV_2D": ("Static Reshape", "Pack")}
"""What XNNPACK may put before an operator."""
ELIDED = frozenset({"PAD", "RELU", "RELU6", "AVERAGE_POOL_2D", "MAX_POOL_2D"})
"""What XNNPACK may take into a neighbour: padding into a convolution, a clamp into what makes its input, and a pool
of single elements, which is none."""
CLAMPED_BY_ANOTHER = frozenset({"ADD", "MUL"})
"""Operators whose fused activation is an operator of its own to XNNPACK."""


def attribute(
    ran: Sequence[str], operators: Sequence[ModelOperator], own: Collection[int] = ()
) -> list[tuple[ModelOperator, float]]:
    """For each name of what XNNPACK ran: the model's operator that it came from, and what rounding took off in
    microseconds.

    `own` are the operators that the runtime ran itself, by their index. Raises Unsupported, naming it, for whatever is
    not what the others are known to become.
    """
    rest = list(ran)
    found: list[tuple[ModelOperator, float]] = []

    def take(names: Sequence[str], operator: ModelOperator, objects: int = 1) -> bool:
        if not rest or not rest[0].startswith(tuple(names)):
            return False
        rest.pop(0)
        found.append((operator, HALF_US * objects))
        return True

    for number in _execution_order(operators, own):
        operator = operators[number]
        code = operator.code
        if number in own:
            continue
        while take(BEFORE.get(code, ()), operator):
            continue
        # A concatenation is one copy for each of its inputs, each rounded.
        objects = len(operator.inputs) if code == "CONCATENATION" else 1
        if not take(NAMES.get(code, ()), operator, objects) and not _elided(operator):
            instead = repr(rest[0]) if rest else "nothing"
            raise Unsupported(f"the profile has {instead} where operator {number}, {code}, is due")
        if operator.clamped and code in CLAMPED_BY_ANOTHER:
            take(("Clamp",), operator)
    if rest:
        raise Unsupported(f"the profile has {rest[0]!r} behind the model's last operator")
    return found


def _elided(operator: ModelOperator) -> bool:
    """Whether XNNPACK may take it into a neighbour; a square goes into the mean of squares."""
    square = operator.code == "MUL" and len(operator.inputs) == 2 and operator.inputs[0] == operator.inputs[1]
    return square or operator.code in ELIDED


def _execution_order(operators: Sequence[ModelOperator], own: Collection[int]) -> list[int]:
    """The order in which operators run where all but the runtime's `own` are delegated.

    The runtime takes turns: as many as can run of one side, in the model's order, then as many of the other.
    """
    unmade = {tensor for operator in operators for tensor in operator.outputs}
    waiting = list(range(len(operators)))
    order: list[int] = []
    while waiting:
        turn: list[int] = []
        for number in waiting:
            ready = unmade.isdisjoint(operators[number].inputs)
            if ready and (not turn or (number in own) == (turn[0] in own)):
                turn.append(number)
                unmade.difference_update(operators[number].outputs)
        order.extend(turn)
        waiting = [number for number in waiting if number not in turn]
    return order
