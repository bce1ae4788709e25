"""Packs operators into carriers: graphs in which they are timed among neighbours, as in a network. Pure.

Alone in a graph an operator pays for things that a network pays once (layout conversions, cold caches), so
isolated latencies do not add up. A carrier is a random walk over operators whose shapes fit, which looks like
a network because the operators of a search do fit each other. Where nothing fits, an *adapter* (a convolution
1 x 1 or a linear layer with ReLU, as cheap as shapes allow, whose time is thrown away) leads on to an operator that
still needs a place: from maps to smaller ones, to tokens and to vectors, and from tokens to as many others.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

from lut_db.networks import Network, NetworkBuilder
from lut_db.operators import (
    MAX_ELEMENTS,
    Activate,
    Activation,
    Add,
    BaseOperator,
    Convolution,
    GlobalPool,
    LayerNorm,
    Linear,
    MatMul,
    Operator,
    Pool,
    Rearrange,
    Shape,
    TransposedConvolution,
)

MAX_FILLERS_IN_A_ROW = 3
"""How far a carrier may walk over operators that need no more places, to reach one that does."""

SHORTEST = 12
"""Operators of a carrier at least, where there are that many to fill it up with."""

FUSED_INTO_CONVOLUTIONS = frozenset({"add", "activation"})
CLAMPS = frozenset({"relu", "relu6"})
TABLES = frozenset({"sigmoid", "hard_sigmoid"})
"""Activations that are looked up in a table where there are only 256 values."""

IMAGE_CHANNELS = 8
"""Channels of a carrier's input: enough for a runtime's blocked layout, so that the first adapter is ordinary. Also
the features of its tokens."""

ADAPTER_PARAMETERS = 1 << 24
"""Weights at most of the adapter that leads from a carrier's input to vectors."""
ROOM_PARAMETERS = 1 << 28
ROOM_ACTIVATIONS = 1 << 30
"""Weights and elements in all beyond which a carrier takes nothing more (1 and 4 GiB of float32): operators that may
each be there must not make a graph together that no device holds. The first, and its adapters, are always taken."""

MAX_STRIDE = 64
MAX_HEADS = 64
"""Heads that an adapter splits off or merges."""


@dataclass(frozen=True)
class Carrier:
    """A graph, and which of its nodes time which operator."""

    network: Network
    places: dict[int, str]
    """Key of the operator timed by a node, by the node's number; adapters have none."""


def pack(
    wanted: Sequence[Operator], fillers: Sequence[Operator], carriers: int, length: int, seed: int
) -> list[Carrier]:
    """Carriers in which every wanted operator has a place in `carriers` different graphs.

    Each has up to `length` operators beside its adapters. `fillers` are used where they lead on to wanted ones and
    get places too: what is known of them shows whether the device has drifted.
    """
    return _Packer(wanted, fillers, carriers, length, random.Random(seed)).pack()


def _main_input(operator: BaseOperator) -> Shape:
    return operator.inputs[0]


class _Packer:
    def __init__(
        self, wanted: Sequence[Operator], fillers: Sequence[Operator], carriers: int, length: int, rng: random.Random
    ):
        self.need: Counter[str] = Counter({operator.key: carriers for operator in wanted})
        self.length = length
        self.rng = rng
        self.operators: dict[str, Operator] = {o.key: o for o in [*wanted, *fillers]}
        self.by_input: dict[Shape, list[Operator]] = {}
        for operator in self.operators.values():
            self.by_input.setdefault(_main_input(operator), []).append(operator)

    def pack(self) -> list[Carrier]:
        packed = []
        while +self.need:
            # A carrier that begins with a known operator shows what follows it in no privileged place.
            before = (+self.need).total()
            begun = self._known_start()
            carrier = self._carrier(begun) if begun is not None else None
            if carrier is None or (+self.need).total() == before:
                carrier = self._carrier(self._start())
            packed.append(carrier)
        return packed

    def _carrier(self, start: Operator) -> Carrier:
        walk = _Walk(self.rng)
        current = walk.enter(start)
        operator: Operator | None = start
        used: set[str] = set()
        in_a_row = 0
        while True:
            if operator is None:
                adapted = self._adapt(walk, current, used)
                if adapted is None:
                    break
                operator, current = adapted
            in_a_row = 0 if self.need[operator.key] > 0 else in_a_row + 1
            used.add(operator.key)
            self.need[operator.key] -= 1
            current = walk.place(operator, current)
            if len(walk.places) >= self.length:
                break
            operator = self._fitting(walk, current, used, allow_fillers=in_a_row < MAX_FILLERS_IN_A_ROW)
        return Carrier(walk.finish(current), walk.places)

    def _known_start(self) -> Operator | None:
        """A known operator to begin with, if few operators need a place: no larger map than theirs, nor smaller."""
        needing = self._needing()
        if len(needing) * 2 >= self.length:
            return None
        size = max(_size(_main_input(operator)) for operator in needing)
        known = [o for o in self.operators.values() if self.need[o.key] <= 0 and _size(_main_input(o)) == size]
        return self.rng.choice(known) if known else None

    def _needing(self, used: Iterable[str] = ()) -> list[Operator]:
        used = set(used)
        return [self.operators[key] for key, places in self.need.items() if places > 0 and key not in used]

    def _start(self) -> Operator:
        """The largest maps come first, as in a network: from there a walk can reach every smaller one."""
        needing = self._needing()
        most = max(needing, key=lambda operator: _size(_main_input(operator)))
        return self.rng.choice([o for o in needing if _size(_main_input(o)) == _size(_main_input(most))])

    def _fitting(self, walk: _Walk, current: int, used: set[str], allow_fillers: bool) -> Operator | None:
        """An operator that can read `current`: one that needs a place if there is any, else one that leads to some."""
        fitting = [
            operator
            for operator in self.by_input.get(walk.shape(current), [])
            if operator.key not in used and walk.has_room(operator) and walk.can_place(operator, current)
        ]
        needing = [operator for operator in fitting if self.need[operator.key] > 0]
        if needing:
            return self.rng.choice(needing)
        if not allow_fillers:
            return None
        leading = [
            operator
            for operator in fitting
            if any(self.need[o.key] > 0 and o.key not in used for o in self.by_input.get(operator.output, []))
        ]
        if leading or len(walk.places) >= min(self.length, SHORTEST):
            return self.rng.choice(leading) if leading else None
        return self.rng.choice(fitting) if fitting else None

    def _adapt(self, walk: _Walk, current: int, used: set[str]) -> tuple[Operator, int] | None:
        """Leads on by an adapter to an operator that needs a place, the largest map first; None if there is none.

        A short carrier goes on to any operator: what is timed in it should have neighbours.
        """
        here = walk.shape(current)
        reachable = [o for o in self._needing(used) if _can_adapt(here, _main_input(o))]
        if not reachable and len(walk.places) < min(self.length, SHORTEST):
            unused = [operator for key, operator in self.operators.items() if key not in used]
            reachable = [operator for operator in unused if _can_adapt(here, _main_input(operator))]
        largest = max((_size(_main_input(operator)) for operator in reachable), default=0)
        reachable = [o for o in reachable if _size(_main_input(o)) == largest]
        self.rng.shuffle(reachable)
        for operator in reachable:
            if not walk.has_room(operator, _channels(here) * _channels(_main_input(operator))):
                continue
            adapted = walk.adapt(current, _main_input(operator), operator)
            if walk.can_place(operator, adapted):
                return operator, adapted
        return None


def _size(shape: Shape) -> tuple[int, int]:
    """Rank, then height times width, or tokens: a walk leads from what is larger to what is smaller."""
    return (len(shape), shape[2] * shape[3] if len(shape) == 4 else shape[1] if len(shape) == 3 else 0)


def _channels(shape: Shape) -> int:
    return shape[1] if len(shape) == 4 else shape[-1]


def _few(shape: Shape) -> int:
    """Channels or features for a tensor that otherwise is like this one: few, and no more than may be."""
    return min(IMAGE_CHANNELS, MAX_ELEMENTS // (prod(shape) // _channels(shape)))


def _strides(here: Shape, there: Shape) -> tuple[int, int]:
    """The strides by which a convolution 1 x 1 leads from one size of map to another."""
    return (-(-here[2] // there[2]), -(-here[3] // there[3]))


def _strided(size: int, stride: int) -> int:
    return (size - 1) // stride + 1


def _stride_to_tokens(here: Shape, tokens: int) -> int | None:
    """The stride, alike in both directions, by which a convolution 1 x 1 leaves this many positions of a map."""
    strides = range(1, min(max(here[2:]), MAX_STRIDE) + 1)
    return next((s for s in strides if _strided(here[2], s) * _strided(here[3], s) == tokens), None)


def _clamps(operator: BaseOperator) -> bool:
    return isinstance(operator, Activate) and operator.activation in CLAMPS


def _can_adapt(here: Shape, there: Shape) -> bool:
    """Whether adapters lead from a tensor of one shape to one of another, with weights that may be."""
    if len(there) > len(here) or _channels(here) * _channels(there) > MAX_ELEMENTS:
        return False
    if len(there) == 3:
        more, fewer = max(here[0], there[0]), min(here[0], there[0])
        if more % fewer or more // fewer > MAX_HEADS:
            return False
        if len(here) == 3:
            return here[1] == there[1]
        return here[0] == fewer and _stride_to_tokens(here, there[1]) is not None
    if here[0] != there[0]:
        return False
    if len(there) == 2:
        return True
    if here[2] < there[2] or here[3] < there[3]:
        return False
    strides = _strides(here, there)
    if max(strides) > MAX_STRIDE:
        return False
    return all(_strided(size, stride) == out for size, stride, out in zip(here[2:], strides, there[2:], strict=True))


def _image(shape: Shape) -> Shape:
    """The input of a carrier from which an adapter leads to a shape."""
    if len(shape) == 4:
        return (shape[0], _few(shape), *shape[2:])
    if len(shape) == 3:
        return (*shape[:2], _few(shape))
    return (shape[0], min(shape[1], max(1, ADAPTER_PARAMETERS // shape[1])))


class _Walk:
    """A carrier under construction."""

    def __init__(self, rng: random.Random) -> None:
        self.build = NetworkBuilder()
        self.rng = rng
        self.places: dict[int, str] = {}
        self.tensors: dict[Shape, list[int]] = {}
        self.read: set[int] = set()
        self.inputs = 0
        self.parameters = 0
        self.activations = 0

    def has_room(self, operator: Operator, adapters: int = 0) -> bool:
        """Whether the carrier can take an operator too, behind adapters of so many weights."""
        activations = sum(prod(shape) for shape in (*operator.inputs, operator.output))
        return (
            self.parameters + operator.parameters + adapters <= ROOM_PARAMETERS
            and self.activations + activations <= ROOM_ACTIVATIONS
        )

    def shape(self, tensor: int) -> Shape:
        return self.build.shape(tensor)

    def enter(self, operator: Operator) -> int:
        """The carrier's inputs, adapted to those of its first operator; returns the first of them."""
        self.inputs = len(operator.inputs)
        images = [self.build.input(_image(shape)) for shape in operator.inputs]
        adapted = [self.adapt(image, shape, operator) for image, shape in zip(images, operator.inputs, strict=True)]
        return adapted[0]

    def _keep(self, tensor: int) -> int:
        self.tensors.setdefault(self.shape(tensor), []).append(tensor)
        return tensor

    def adapt(self, tensor: int, shape: Shape, reader: Operator) -> int:
        """Leads from a tensor to a shape by adapters, for an operator that reads it."""
        here = self.shape(tensor)
        activation: Activation = "hard_swish" if _clamps(reader) else "relu"
        if len(here) > 2 and len(shape) == 2:
            tensor = self._add(GlobalPool(input=here), tensor)
            here = self.shape(tensor)
            if here == shape:
                return self._keep(tensor)
        if len(shape) == 2:
            return self._keep(self._add(Linear(input=here, features=shape[1]), tensor))
        if len(shape) == 3:
            tensor = self._to_sequences(tensor, shape)
            adapter: Operator = Linear(input=self.shape(tensor), features=shape[2], activation=activation)
            return self._keep(self._add(adapter, tensor))
        adapter = Convolution(
            input=here, filters=shape[1], kernel=(1, 1), stride=_strides(here, shape), activation=activation
        )
        return self._keep(self._add(adapter, tensor))

    def _to_sequences(self, tensor: int, shape: Shape) -> int:
        """As many sequences of as many tokens, with any features. A linear layer comes behind, so that nothing that is
        timed adjoins a rearrangement."""
        here = self.shape(tensor)
        split, merged = shape[0] // here[0], here[0] // shape[0]
        few = min(_few(here if merged > 1 else shape), _channels(here))
        if len(here) == 4:
            stride = _stride_to_tokens(here, shape[1])
            assert stride is not None, "_can_adapt was not asked"
            strided = Convolution(input=here, filters=few, kernel=(1, 1), stride=(stride, stride), activation="relu")
            tensor = self._add(strided, tensor)
            tensor = self._add(Rearrange(input=strided.output, mode="map_to_tokens"), tensor)
        if max(split, merged) > 1:  # two rearrangements in a row would be one to a runtime
            features = few * max(split, 1)
            tensor = self._add(Linear(input=self.shape(tensor), features=features, activation="relu"), tensor)
        if split > 1:
            return self._add(Rearrange(input=self.shape(tensor), mode="split_heads", heads=split), tensor)
        if merged > 1:
            return self._add(Rearrange(input=self.shape(tensor), mode="merge_heads", heads=merged), tensor)
        return tensor

    def _add(self, operator: Operator, *inputs: int) -> int:
        self.read.update(inputs)
        self.parameters += operator.parameters
        self.activations += prod(operator.output)
        return self.build.add(operator, *inputs)

    def _would_fuse(self, operator: Operator, tensor: int) -> bool:
        """Whether a runtime would fuse the operator into what makes its input: then its time could not be read.

        In a network such a pair is one operator already: a convolution with its activation, or its residual.
        """
        if tensor < self.inputs:
            return False
        maker = self.build.operator(tensor)
        if isinstance(operator, Rearrange):
            return isinstance(maker, Rearrange) or self._undone(operator, tensor)
        if isinstance(operator, LayerNorm):
            return isinstance(maker, Add)  # runtimes have one kernel for both
        if isinstance(operator, MatMul) and operator.scaled:
            return isinstance(maker, Activate) and maker.activation in TABLES
        if isinstance(operator, Activate) and getattr(maker, "activation", None) in TABLES:
            return True  # in int8 two tables are one
        if operator.kind not in FUSED_INTO_CONVOLUTIONS:
            return False
        if _clamps(operator) and (isinstance(maker, Pool) or getattr(maker, "activation", None) in CLAMPS):
            return True  # two clamps are one, and a pool can clamp
        if isinstance(operator, Activate) and isinstance(maker, Linear | TransposedConvolution):
            return maker.activation == "none"
        return isinstance(maker, Convolution) and maker.activation == "none"

    def _undone(self, operator: Rearrange, tensor: int) -> bool:
        """Whether a map becomes tokens that was made of tokens, with nothing but what can be done in either order
        between: runtimes leave both out."""
        while operator.mode == "map_to_tokens" and tensor >= self.inputs:
            maker = self.build.operator(tensor)
            if isinstance(maker, Rearrange):
                return True
            if isinstance(maker, Convolution | TransposedConvolution):
                return False
            tensor = self.build.read(tensor)[0]
        return False

    def _second_input(self, operator: Operator, current: int) -> int | None:
        """A tensor other than `current` for the second input: the latest that fits, as a block's shortcut is.

        An activation and its own input do not go together: in int8 their sum is one more function of the input.
        """
        fitting = reversed(self.tensors.get(operator.inputs[1], []))
        return next(
            (t for t in fitting if t != current and not self._would_fuse(operator, t)
             and not self._activates(current, t) and not self._activates(t, current)), None,
        )  # fmt: skip

    def _activates(self, tensor: int, other: int) -> bool:
        """Whether one tensor is the activation of the other, and nothing else."""
        if tensor < self.inputs or not isinstance(self.build.operator(tensor), Activate):
            return False
        return other in self.build.read(tensor)

    def _origin(self, operator: Operator) -> int | None:
        """A tensor from which an adapter can make the second input: the smallest map, then the narrowest."""
        origins = [shape for shape in self.tensors if _can_adapt(shape, operator.inputs[1])]
        return self.tensors[min(origins, key=lambda shape: (_size(shape), shape[1]))][-1] if origins else None

    def can_place(self, operator: Operator, current: int) -> bool:
        if self._would_fuse(operator, current):
            return False
        return (
            len(operator.inputs) == 1
            or self._second_input(operator, current) is not None
            or self._origin(operator) is not None
        )

    def place(self, operator: Operator, current: int) -> int:
        inputs = [current]
        if len(operator.inputs) == 2:
            second = self._second_input(operator, current)
            if second is None:
                origin = self._origin(operator)
                assert origin is not None, "can_place was not asked"
                second = self.adapt(origin, operator.inputs[1], operator)
            inputs.append(second)
        tensor = self._add(operator, *inputs)
        self.places[len(self.build) - 1] = operator.key
        return self._keep(tensor)

    def finish(self, current: int) -> Network:
        """Ends with an adapter behind the last operator, and returns every tensor that nothing reads."""
        shape = self.shape(current)
        last = self._add(
            Convolution(input=shape, filters=_few(shape), kernel=(1, 1))
            if len(shape) == 4
            else Linear(input=shape, features=_few(shape)),
            current,
        )
        unread = [tensor for tensor in range(self.inputs, last) if tensor not in self.read]
        return self.build.network(*unread, last)
