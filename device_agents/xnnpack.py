"""Whose time is whose: what XNNPACK ran, in terms of the operators of a TFLite model.

A profile counts the runtime's own operators as the model does. What XNNPACK runs is told by XNNPACK's names, in the
order of running, and not which operator of the model it came from. Both are in the same order, so they are matched one
after the other, and whatever does not match is refused.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence

from device_agents.backends import Unsupported
from lut_db.lowering.tflite import ModelOperator

HALF = 0.5
CONVERSION = "Convert"
UNARY = ("Unary Elementwise",)
TABLE = ("Invalid Unary Op",)
"""A function of int8, for which XNNPACK has no name."""
TABLED = frozenset({"ADD", "LOGISTIC", "MUL", "QUANTIZE"})
"""What XNNPACK has a table for in int8; sums and products only with a constant."""
NAMES: dict[str, tuple[str, ...]] = {
    "ADD": ("Add", "Binary Elementwise"),
    "AVERAGE_POOL_2D": ("Average Pooling", "Copy", "Clamp"),
    "BATCH_MATMUL": ("Batch Matrix Multiply",),
    "CONCATENATION": ("Copy", "Concatenate"),
    "CONV_2D": ("Convolution", "Fully Connected"),
    "DEPTHWISE_CONV_2D": ("Convolution",),
    "DEQUANTIZE": ("Convert",),
    "FULLY_CONNECTED": ("Fully Connected",),
    "GELU": ("GELU", *UNARY),
    "HARD_SWISH": ("HardSwish", *UNARY),
    "LOGISTIC": ("Sigmoid", *UNARY),
    "MAX_POOL_2D": ("Max Pooling", "Copy", "Clamp"),
    "MEAN": ("Mean", "Global Average Pooling"),
    "MUL": ("Multiply", "Binary Elementwise"),
    "PAD": ("Constant Pad",),
    "QUANTIZE": ("Convert",),
    "RELU": ("Clamp", *UNARY),
    "RELU6": ("Clamp", *UNARY),
    "RESHAPE": ("Static Reshape", "Copy"),
    "RSQRT": ("Reciprocal Square Root", *UNARY),
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
    ran: Sequence[str], operators: Sequence[ModelOperator], own: Collection[int] = (), *, fp16: bool = False
) -> list[tuple[ModelOperator, float]]:
    """For each name of what XNNPACK ran: the model's operator that it came from, and what rounding down to whole ticks
    of its timer took off, in ticks: half of one, each time that it was done.

    `own` are the operators that the runtime ran itself, by their index. In `fp16` XNNPACK converts what it is given and
    what it gives back. Raises Unsupported, naming it, for whatever is not what the others are known to become.
    """
    rest = list(ran)
    found: list[tuple[ModelOperator, float]] = []

    def take(names: Sequence[str], operator: ModelOperator, objects: int = 1) -> bool:
        if not rest or not rest[0].startswith(tuple(names)):
            return False
        rest.pop(0)
        found.append((operator, HALF * objects))
        return True

    if fp16 and (wrong := next((name for name in ran if ", F32" in name), None)):
        raise Unsupported(f"XNNPACK ran {wrong!r} in fp32")
    tables = _tables(operators, own)
    joined = _joined(operators, tables)
    last: list[ModelOperator] = []
    for turn in _turns(operators, own):
        if turn[0] in own:
            continue
        if fp16:
            _take_conversions(rest, found, last, [operators[number] for number in turn])
            last = [operators[number] for number in turn]
        for number in turn:
            operator = operators[number]
            code = operator.code
            if number in joined:
                continue
            while take(BEFORE.get(code, ()), operator):
                continue
            # A concatenation is one copy for each of its inputs, each rounded.
            objects = len(operator.inputs) if code == "CONCATENATION" else 1
            names = NAMES.get(code, ()) + (TABLE if number in tables else ())
            if not take(names, operator, objects) and not _elided(operator):
                instead = repr(rest[0]) if rest else "nothing"
                raise Unsupported(f"the profile has {instead} where operator {number}, {code}, is due")
            if operator.clamped and code in CLAMPED_BY_ANOTHER:
                take(("Clamp",), operator)
    if fp16:
        _take_conversions(rest, found, last, [])
    if rest:
        raise Unsupported(f"the profile has {rest[0]!r} behind the model's last operator")
    return found


def _take_conversions(
    rest: list[str], found: list[tuple[ModelOperator, float]], before: Sequence[ModelOperator],
    behind: Sequence[ModelOperator],
) -> None:  # fmt: skip
    """Those between two turns of XNNPACK: of what the one gives back, then of what the next is given, of which there is
    one for each tensor, paid by its first reader."""
    given: dict[int, ModelOperator] = {}
    for operator in behind:
        for tensor in operator.inputs:
            given.setdefault(tensor, operator)
    for operator in behind:
        for tensor in operator.outputs:
            given.pop(tensor, None)
    count = next((number for number, name in enumerate(rest) if not name.startswith(CONVERSION)), len(rest))
    back = count - len(given)
    if back < 0 or (back and not before):
        raise Unsupported(f"the profile has {count} conversions to and from fp16 where {len(given)} tensors are given")
    # What is returned are the last results, but for networks that return others too.
    makers = list(before[-back:]) if back else []
    makers += list(before[-1:]) * (back - len(makers))
    found.extend((operator, HALF) for operator in (*makers, *given.values()))
    del rest[:count]


def _tables(operators: Sequence[ModelOperator], own: Collection[int]) -> dict[int, int]:
    """Operators on int8 that are functions of one tensor's single elements, with that tensor: XNNPACK has tables for
    them. Constants are not among the inputs; a sum of a tensor and what was made of it alone is such a function too."""
    source: dict[int, int] = {}
    tables: dict[int, int] = {}
    for number, operator in enumerate(operators):
        read = {source.get(tensor, tensor) for tensor in operator.inputs}
        table = operator.int8 and operator.code in TABLED and len(read) == 1 and number not in own
        if table and (len(operator.inputs) == 1 or any(tensor in source for tensor in operator.inputs)):
            tables[number] = source[operator.outputs[0]] = read.pop()
    return tables


def _joined(operators: Sequence[ModelOperator], tables: Collection[int]) -> set[int]:
    """Operators whose table XNNPACK joins with that of their only reader, at whose place it runs."""
    readers: dict[int, list[int]] = defaultdict(list)
    for number, operator in enumerate(operators):
        for tensor in operator.inputs:
            readers[tensor].append(number)
    behind = {number: readers[operators[number].outputs[0]] for number in tables}
    return {number for number, found in behind.items() if len(found) == 1 and found[0] in tables}


def _elided(operator: ModelOperator) -> bool:
    """Whether XNNPACK may take it into a neighbour; a square goes into the mean of squares."""
    square = operator.code == "MUL" and len(operator.inputs) == 2 and operator.inputs[0] == operator.inputs[1]
    return square or operator.code in ELIDED


def _turns(operators: Sequence[ModelOperator], own: Collection[int]) -> list[list[int]]:
    """The order in which operators run where all but the runtime's `own` are delegated.

    The runtime takes turns: as many as can run of one side, in the model's order, then as many of the other.
    """
    unmade = {tensor for operator in operators for tensor in operator.outputs}
    waiting = list(range(len(operators)))
    turns: list[list[int]] = []
    while waiting:
        turn: list[int] = []
        for number in waiting:
            ready = unmade.isdisjoint(operators[number].inputs)
            if ready and (not turn or (number in own) == (turn[0] in own)):
                turn.append(number)
                unmade.difference_update(operators[number].outputs)
        turns.append(turn)
        waiting = [number for number in waiting if number not in turn]
    return turns
