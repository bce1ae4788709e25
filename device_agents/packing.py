"""Packs operators into carriers: graphs in which they are timed among neighbours, as in a network. Pure.

Alone in a graph an operator pays for things that a network pays once (layout conversions, cold caches), so
isolated latencies do not add up. A carrier is a random walk over operators whose shapes fit, which looks like
a network because the operators of a search do fit each other. Where nothing fits, an *adapter* (a convolution
1 x 1 or a linear layer with ReLU, through few channels where it would have many weights; its time is thrown away) leads
on: from maps to smaller or larger ones, to tokens and to vectors, and from tokens to as many others.

What an operator costs depends on what the caches hold of its weights and of its input, and so on everything that runs
before it comes again. Every carrier therefore is as long as a plan says, with the weights of a network of that length
(ballast), and takes operators from all sizes of maps in the proportion in which there are such. It is one line wherever
an adapter can lead back: a runtime may run branches that nothing reads last of all, when what they read has left the
caches.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor, isqrt, prod

from lut_db.networks import Network, NetworkBuilder
from lut_db.operators import (
    MAX_ELEMENTS,
    Activate,
    Activation,
    Add,
    BaseOperator,
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
    Shape,
    TransposedConvolution,
    Upsample,
)

BOTTLENECK = 16
"""Channels between the two halves of an adapter from many channels to many: a carrier's weights should be in its
operators and its ballast. A multiple of what runtimes block channels by."""

LED = frozenset({"convolution", "channel_bypass", "squeeze_excite", "pool", "global_pool", "upsample", "linear"})
"""Kinds before which a carrier puts an operator that makes what they read. It is not timed there: what it reads itself
is an adapter's."""

WEIGHTED = frozenset({"convolution", "transposed_convolution", "linear"})
"""Kinds that begin with weights. Where others read one tensor, as two pools do, or a pool and a bypass that pools, a
runtime does once what both begin with, and one of them seems to take no time."""

FUSED_INTO_CONVOLUTIONS = frozenset({"add", "activation"})
CLAMPS = frozenset({"relu", "relu6"})
TABLES = frozenset({"sigmoid", "hard_sigmoid"})
"""Activations that are looked up in a table where there are only 256 values."""

IMAGE_CHANNELS = 8
"""Channels of a carrier's input: enough for a runtime's blocked layout, so that the first adapter is ordinary. Also
the features of its tokens."""

TIMED = 0.5
TIMED_BESIDE = 0.3
"""Share of a carrier's operators that are timed; less where neighbours are known, more of which stand there."""

RAW_CHANNELS = 4
"""What reads a map of so few channels, and came behind nothing in a network, reads an image: it gets one, as there, not
what an adapter makes, which can be in another layout."""

ROOM_PARAMETERS = 1 << 28
ROOM_ACTIVATIONS = 1 << 30
"""Weights and elements in all beyond which a carrier takes nothing more (1 and 4 GiB of float32): operators that may
each be there must not make a graph together that no device holds. The first and its adapters are always taken."""

BOTH = (False, True)
"""Whether what is read is a sum, where that is not known or may be."""

MIN_BALLAST = 64
"""Features of a ballast's layers below which its weights do not matter."""

MAX_BALLAST = 1 << 24
"""Weights beyond which more make no difference: no cache holds them (64 MiB of float32). A carrier that lacks more
stays lighter."""

MAX_STRIDE = 64
MAX_GROWTH = 16
"""How much larger than the map it leads to an adapter may let a smaller one grow."""

MAX_HEADS = 64
"""Heads that an adapter splits off or merges."""


@dataclass(frozen=True)
class Carrier:
    """A graph, and which of its nodes time which operator."""

    network: Network
    places: dict[int, str]
    """Key of the operator timed by a node, by the node's number; adapters have none."""


def pack(
    wanted: Sequence[Operator], fillers: Sequence[Operator], carriers: int, length: int, seed: int,
    successions: Sequence[tuple[str, str]] = (), neighbours: Sequence[Operator] = (),
    shortcuts: Sequence[tuple[str, str]] = (), mean_parameters: float | None = None,
) -> list[Carrier]:  # fmt: skip
    """Carriers in which every wanted operator has a place in `carriers` different graphs.

    Each has about `length` operators, adapters and all: as many as the networks have that will be asked for, since what
    an operator costs depends on what the caches hold. `fillers` have places in half as many: what is known of them
    shows whether the device has drifted. `successions` are pairs of keys, of operators that came right behind each
    other in networks that were asked for, and `neighbours` those of them that are neither wanted nor fillers: operators
    get the neighbours that they have in networks, wherever that can be. `shortcuts` are such pairs where the first made
    what the second adds, be it through sums of equal shapes, which keep its layout. `mean_parameters` are the weights
    that an operator has on average in those networks; where they are not told, it is as with those to be packed. A
    carrier has as many weights as `length` such operators: it takes nothing with weights any more once it has them.
    """
    packer = _Packer(
        wanted, fillers, carriers, length, random.Random(seed), successions, neighbours, shortcuts, mean_parameters
    )
    return packer.pack()


_Kind = tuple[tuple[int, int], bool]
"""The size of what an operator reads, and whether what it makes is as large."""


@dataclass(frozen=True, eq=False)
class _Piece:
    """An operator that carriers are made of. `level` is the size of what it reads, `stays` whether what it makes is as
    large."""

    operator: Operator
    key: str
    reads: Shape
    level: tuple[int, int]
    stays: bool
    family: str
    makes: Shape
    parameters: int
    activations: int

    @property
    def kind(self) -> _Kind:
        return self.level, self.stays

    @classmethod
    def of(cls, operator: Operator) -> _Piece:
        inputs, output = operator.inputs, operator.output
        return cls(
            operator, operator.key, inputs[0], _size(inputs[0]), _size(output) == _size(inputs[0]), _family(operator),
            output, operator.parameters,
            sum(prod(shape) for shape in (*inputs, output)),
        )  # fmt: skip


class _Packer:
    def __init__(
        self, wanted: Sequence[Operator], fillers: Sequence[Operator], carriers: int, length: int, rng: random.Random,
        successions: Sequence[tuple[str, str]], neighbours: Sequence[Operator], shortcuts: Sequence[tuple[str, str]],
        mean_parameters: float | None,
    ):  # fmt: skip
        self.need: Counter[str] = Counter({operator.key: max(1, carriers // 2) for operator in fillers})
        self.need.update({operator.key: carriers for operator in wanted})
        self.rng = rng
        self.pieces = list({operator.key: _Piece.of(operator) for operator in [*wanted, *fillers]}.values())
        known = {piece.key: piece for piece in self.pieces}
        known |= {operator.key: _Piece.of(operator) for operator in neighbours if operator.key not in known}
        self.natures: dict[tuple[str, int], set[bool]] = {}
        """Whether what made an operator's input in networks was a sum, by its key and the input's number."""
        self.before: dict[str, list[_Piece]] = {}
        self.behind: dict[str, list[_Piece]] = {}
        """Operators that came right before and right behind an operator in networks, by its key."""
        for first, second in successions:
            if first not in known or second not in known:
                continue
            maker, reader = known[first], known[second]
            if maker.makes != reader.reads:
                continue
            summed = BOTH if _adds(maker.operator) else (_is_sum(maker.operator),)
            self.natures.setdefault((second, 0), set()).update(summed)
            if not _would_fuse(maker.operator, reader.operator):
                self.behind.setdefault(first, []).append(reader)
                self.before.setdefault(second, []).append(maker)
        self.images = {piece.key for piece in known.values() if _is_image(piece.operator)}
        self.images -= {key for key, _ in self.natures}
        self.roots: dict[str, list[_Piece]] = {}
        """Operators that made the shortcuts which an operator added in networks, by its key."""
        for first, second in shortcuts:
            if first in known and second in known and known[second].operator.inputs[1:] == (known[first].makes,):
                self.roots.setdefault(second, []).append(known[first])
                self.natures.setdefault((second, 1), set()).add(_is_sum(known[first].operator))
        self.makers: dict[Shape, list[_Piece]] = {}
        for piece in self.pieces:
            if len(piece.operator.inputs) == 1:
                self.makers.setdefault(piece.makes, []).append(piece)
        self.length = length
        if mean_parameters is None:
            mean_parameters = sum(piece.parameters for piece in self.pieces) / len(self.pieces)
        self.parameters = int(length * mean_parameters)
        """Weights that a carrier should have."""
        share = sum(piece.key in self.before for piece in self.pieces) / len(self.pieces)
        self.timed = max(1, int(length * (TIMED + share * (TIMED_BESIDE - TIMED))))
        """Operators of a carrier that have places there; the others are adapters and neighbours."""
        self.kinds = Counter(piece.kind for piece in self.pieces)

    def pack(self) -> list[Carrier]:
        packed = []
        while before := (+self.need).total():
            # A walk can pass by what still needs a place: then nothing else may lead it on to smaller maps, and at
            # last it begins there.
            for begin, straight in ((self.pieces, False), (self.pieces, True), (None, True)):
                needing = [piece for piece in self.pieces if self.need[piece.key] > 0]
                carrier = self._carrier(self._start(begin or needing), straight)
                if (+self.need).total() < before:
                    break
            packed.append(carrier)
        return packed

    def _quota(self) -> Counter[_Kind]:
        """How many operators a carrier takes of each kind: its share of the places that are still needed, so that all
        kinds last until the end, and where these are too few, of all operators. Parts of one are drawn."""
        need: Counter[_Kind] = Counter()
        for piece in self.pieces:
            need[piece.kind] += max(0, self.need[piece.key])
        images = sum(max(0, self.need[key]) for key in self.images)
        carriers = max(ceil(need.total() / self.timed), images, *self.need.values())
        spare = (self.timed - need.total() / carriers) / len(self.pieces)
        shares = {kind: need[kind] / carriers + spare * count for kind, count in self.kinds.items()}
        return Counter({kind: floor(share + self.rng.random()) for kind, share in shares.items()})

    def _start(self, pieces: Sequence[_Piece]) -> _Piece:
        """The largest maps come first, as in a network: from there a walk can reach every smaller one. What reads an
        image can stand nowhere else."""
        level = max(piece.level for piece in pieces)
        largest = [piece for piece in pieces if piece.level == level]
        return self._choose([p for p in largest if p.key in self.images and self.need[p.key] > 0] or largest)

    def _choose(self, pieces: Sequence[_Piece]) -> _Piece:
        """One that needs most places, so that none is left over for carriers of its own."""
        most = max(self.need[piece.key] for piece in pieces)
        return self.rng.choice([piece for piece in pieces if self.need[piece.key] == most or most <= 0])

    def _carrier(self, start: _Piece, straight: bool) -> Carrier:
        """`straight`: it takes what makes maps smaller only where that needs a place."""
        left = self._quota()
        unused = {piece.key: piece for piece in self.pieces}
        walk = _Walk(self.natures, self.parameters)
        found = self._read(walk, walk.begin(start.operator), [start]) if start.key in self.before else None
        if found is None:
            walk = _Walk(self.natures, self.parameters)
            found = (start, walk.enter(start.operator, image=start.key in self.images))
        while found is not None:
            piece, current = found
            left[piece.kind] -= 1
            del unused[piece.key]
            self.need[piece.key] -= 1
            fork = current
            current = walk.place(piece.operator, current)
            level = _size(walk.shape(current))
            takes = [
                p
                for p in unused.values()
                if left[p.kind] > 0
                and p.key not in self.images  # it would leave what came before it unread
                and walk.has_room(p)
                and (p.stays or not straight or self.need[p.key] > 0)
            ]
            current = self._go_on(walk, current, takes)
            takes = [p for p in takes if walk.has_room(p)]
            found = None
            if not piece.stays:
                leaving = [p for p in takes if p.level == piece.level and not p.stays and self.need[p.key] > 0]
                found = self._read(walk, current, leaving)
                if found is None:  # from vectors, and to some odd sizes, nothing leads back
                    found = self._read(walk, fork, leaving)
                    if found is not None:
                        walk.end(current)
            found = found or self._next(walk, current, level, takes)
        return Carrier(walk.finish(current), walk.places)

    def _next(
        self, walk: _Walk, current: int, level: tuple[int, int], takes: Sequence[_Piece]
    ) -> tuple[_Piece, int] | None:
        """The next operator and what it reads; None: the walk is over.

        A walk stays where maps are as large as what was timed last made, until it has its share of operators there,
        then goes on to smaller ones; everywhere those come first that need a place.
        """
        if coming := self._coming(walk, current, takes):
            return self._choose(coming), current
        smaller = sorted({piece.level for piece in takes if piece.level < level}, reverse=True)
        groups = [
            [p for p in takes if p.level == level and p.stays],
            [p for p in takes if p.level == level and not p.stays],
        ]
        for group in (*groups, *([p for p in takes if p.level == size] for size in smaller)):
            for needing in (True, False):
                found = self._read(walk, current, [p for p in group if (self.need[p.key] > 0) == needing])
                if found is not None:
                    return found
        return None

    def _coming(self, walk: _Walk, current: int, takes: Sequence[_Piece]) -> list[_Piece]:
        """Of what needs a place, what came right behind the last operator in a network; what makes maps smaller only
        where the walk has all that it takes of the larger ones."""
        behind = [p for p in self._behind(walk, current) if p in takes and self.need[p.key] > 0]
        staying = any(p.stays and p.level == _size(walk.shape(current)) for p in takes)
        return _fitting(walk, current, [p for p in behind if p.stays or not staying])

    def _behind(self, walk: _Walk, tensor: int) -> list[_Piece]:
        """What came right behind the operator that made a tensor, in networks."""
        return self.behind.get(walk.keys.get(tensor, ""), [])

    def _go_on(self, walk: _Walk, current: int, takes: Sequence[_Piece]) -> int:
        """What a walk goes on from: where nothing that needs a place came behind the last operator in a network,
        something that did stands there, untimed; from one that makes maps smaller the walk can climb back."""
        if not takes or len(walk.build) >= self.length or self._coming(walk, current, takes):
            return current
        here = walk.shape(current)
        untimed = [
            p
            for p in self._behind(walk, current)
            if len(p.operator.inputs) == 1 and (p.stays or _can_adapt(p.makes, here)) and walk.has_room(p)
        ]
        fitting = _fitting(walk, current, untimed)
        return walk.lead(current, self.rng.choice(fitting)) if fitting else current

    def _read(self, walk: _Walk, tensor: int, pieces: Sequence[_Piece]) -> tuple[_Piece, int] | None:
        """One of these that can read a tensor, and what it is to read: the tensor, or what adapters make of it.

        Whether a runtime converts a layout between two operators depends on both, so what an operator reads should be
        made by one of those that make it in a network. Where none is known, it should be unlike: of operators alike, as
        of two pointwise convolutions, few follow each other there.
        """
        here = walk.shape(tensor)
        fitting = _fitting(walk, tensor, pieces)
        behind = self._behind(walk, tensor)
        if real := [piece for piece in fitting if piece in behind]:
            return self._choose(real), tensor
        unlike = [piece for piece in fitting if piece.family != walk.families.get(tensor)]
        leading = [piece for piece in pieces if piece.key in self.before] if unlike else pieces
        if leading:
            led = [(piece, leads) for piece in leading if (leads := self._leads(walk, here, piece))]
            while led:
                piece = self._choose([piece for piece, _ in led])
                lead = self.rng.choice(next(leads for p, leads in led if p is piece))
                source = self._bring(walk, tensor, piece, piece.reads if lead is None else lead.reads)
                source = walk.adapt(source, piece.reads, piece.operator) if lead is None else walk.lead(source, lead)
                if walk.can_place(piece.operator, source):
                    return piece, source
                led = [(p, leads) for p, leads in led if p is not piece]
        if fitting:
            return self._choose(unlike or fitting), tensor
        adaptable = [
            p
            for p in pieces
            if _can_adapt(here, p.reads) and walk.has_room(p, adapters=_adapter_parameters(here, p.reads))
        ]
        while adaptable:
            piece = self._choose(adaptable)
            adapted = walk.adapt(tensor, piece.reads, piece.operator)
            if walk.can_place(piece.operator, adapted):
                return piece, adapted
            adaptable.remove(piece)
        return None

    def _bring(self, walk: _Walk, tensor: int, piece: _Piece, reads: Shape) -> int:
        """What leads on to an operator's two inputs, through what reads such a shape: where it adds a shortcut that is
        not there yet, that comes first, as in a network, made by what makes it there."""
        if len(piece.operator.inputs) == 1 or walk.has_shortcut(piece.operator, tensor):
            return tensor
        here, shape = walk.shape(tensor), piece.operator.inputs[1]
        if not (_can_adapt(here, shape) and _can_adapt(shape, reads)):
            return tensor
        possible = [
            root
            for root in self.roots.get(piece.key, [])
            if self._can_lead(here, root) and walk.has_room(root, piece.parameters, piece.activations)
        ]
        if not possible:
            return walk.adapt(tensor, shape, piece.operator)
        return walk.lead(tensor, self.rng.choice(possible))

    def _leads(self, walk: _Walk, here: Shape, piece: _Piece) -> list[_Piece | None]:
        """Operators that make what another reads, reachable from here: one stands between an adapter and it. None
        stands for a convolution that cannot be there, as one that reads an image: an adapter is one too."""
        real = self.before.get(piece.key, [])
        if piece.operator.kind not in LED and not real:
            return []
        leads: list[_Piece | None] = []
        for lead in real or self.makers.get(piece.reads, []):
            if not real and lead.family == piece.family:
                continue
            if (
                lead.level <= max(_size(here), piece.level)
                and self._can_lead(here, lead)
                and walk.has_room(piece, lead.parameters, lead.activations, _adapter_parameters(here, lead.reads))
            ):
                leads.append(lead)
            elif (
                real
                and isinstance(lead.operator, Convolution)
                and _can_adapt(here, piece.reads)
                and walk.has_room(piece, adapters=_adapter_parameters(here, piece.reads))
            ):
                leads.append(None)
        return leads

    def _can_lead(self, here: Shape, lead: _Piece) -> bool:
        """Whether an operator can stand untimed behind such a tensor, behind adapters where it does not fit."""
        if lead.reads == here and len(lead.operator.inputs) == 1:
            return True
        if lead.key in self.images or _adds(lead.operator):
            return False
        return all(_can_adapt(here, read) for read in lead.operator.inputs)


def _fitting(walk: _Walk, tensor: int, pieces: Sequence[_Piece]) -> list[_Piece]:
    """Those of these operators that can read a tensor as it is."""
    here = walk.shape(tensor)
    return [
        p
        for p in pieces
        if p.reads == here
        and walk.may_read(p, tensor)
        and walk.can_place(p.operator, tensor)
        and walk.is_alike(p.operator, 0, tensor)
        and ((p.key, 1) not in walk.natures or walk.has_shortcut(p.operator, tensor))
    ]


def _is_sum(operator: Operator) -> bool:
    """Whether an operator adds what differs in shape, which a runtime does apart from whatever made it."""
    return isinstance(operator, ResidualAdd)


def _adds(operator: Operator) -> bool:
    """Whether an operator has a second input and is no sum of different shapes: it keeps the layout of what it adds."""
    return len(operator.inputs) > 1 and not _is_sum(operator)


def _family(operator: Operator) -> str:
    if isinstance(operator, Convolution | ChannelBypass):
        return "depthwise" if operator.depthwise else "dense"
    return operator.kind


def _size(shape: Shape) -> tuple[int, int]:
    """Rank, then height times width, or tokens: a walk leads from what is larger to what is smaller."""
    return (len(shape), shape[2] * shape[3] if len(shape) == 4 else shape[1] if len(shape) == 3 else 0)


def _channels(shape: Shape) -> int:
    return shape[1] if len(shape) == 4 else shape[-1]


def _few(shape: Shape) -> int:
    """Channels or features for a tensor that otherwise is like this one: few, and no more than may be."""
    return min(IMAGE_CHANNELS, MAX_ELEMENTS // (prod(shape) // _channels(shape)))


def _scale(here: Shape, there: Shape) -> int | None:
    """The factor by which a map is to grow before strides lead to the size of another; None: none does."""
    least = max(1, -(-there[2] // here[2]), -(-there[3] // here[3]))
    for scale in range(least, least + 1 if least == 1 else MAX_STRIDE + 1):
        grown = (*here[:2], scale * here[2], scale * here[3])
        strides = _strides(grown, there)
        area = grown[2] * grown[3]
        too_large = scale > 1 and (area > MAX_GROWTH * there[2] * there[3] or area * here[0] > MAX_ELEMENTS)
        if too_large or max(strides) > MAX_STRIDE:
            continue
        if all(_strided(size, stride) == out for size, stride, out in zip(grown[2:], strides, there[2:], strict=True)):
            return scale
    return None


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


def _would_fuse(maker: Operator, operator: Operator) -> bool:
    """Whether a runtime would fuse an operator into the one that makes its input."""
    if isinstance(operator, Rearrange):
        return isinstance(maker, Rearrange)
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


def _is_narrowed(here: Shape, there: Shape) -> bool:
    """Whether a bottleneck saves most of an adapter's weights."""
    narrowed = BOTTLENECK * (_channels(here) + _channels(there))
    return 2 * narrowed < _channels(here) * _channels(there)


def _adapter_parameters(here: Shape, there: Shape) -> int:
    """Weights of an adapter, but for biases."""
    narrowed = BOTTLENECK * (_channels(here) + _channels(there))
    return narrowed if _is_narrowed(here, there) else _channels(here) * _channels(there)


def _pointwise(shape: Shape, channels: int, strides: tuple[int, int], activation: Activation) -> Operator:
    """A linear map of channels, at every position of a map."""
    if len(shape) == 4:
        return Convolution(input=shape, filters=channels, kernel=(1, 1), stride=strides, activation=activation)
    return Linear(input=shape, features=channels, activation=activation)


def _can_adapt(here: Shape, there: Shape) -> bool:
    """Whether adapters lead from a tensor of one shape to one of another, with weights that may be."""
    if len(there) > len(here):
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
    return _scale(here, there) is not None


def _is_image(operator: Operator) -> bool:
    """Whether what an operator reads can be an image."""
    shape = operator.inputs[0]
    return len(operator.inputs) == 1 and len(shape) == 4 and shape[1] <= RAW_CHANNELS


def _image(shape: Shape) -> Shape:
    """The input of a carrier from which an adapter leads to a shape."""
    if len(shape) == 4:
        return (shape[0], _few(shape), *shape[2:])
    return (*shape[:2], _few(shape)) if len(shape) == 3 else shape


class _Walk:
    """A carrier under construction."""

    def __init__(self, natures: Mapping[tuple[str, int], Collection[bool]], asked_parameters: int) -> None:
        self.natures = natures
        self.asked_parameters = asked_parameters
        self.sums: set[int] = set()
        """Sums of different shapes, and what else was added to these: a runtime has them in its plain layout."""
        self.build = NetworkBuilder()
        self.places: dict[int, str] = {}
        self.tensors: dict[Shape, list[int]] = {}
        self.read: set[int] = set()
        self.inputs = 0
        self.families: dict[int, str] = {}
        self.keys: dict[int, str] = {}
        """The keys of the operators that made tensors, timed or not; adapters have none."""
        self.parameters = 0
        self.activations = 0

    def has_room(self, piece: _Piece, parameters: int = 0, activations: int = 0, adapters: int = 0) -> bool:
        """Whether the carrier can take an operator too, behind others of so many weights and elements, and behind
        adapters of so many weights."""
        parameters += piece.parameters
        return (
            (parameters == 0 or self.parameters < self.asked_parameters)
            and self.parameters + parameters + adapters <= ROOM_PARAMETERS
            and self.activations + piece.activations + activations <= ROOM_ACTIVATIONS
        )

    def shape(self, tensor: int) -> Shape:
        return self.build.shape(tensor)

    def begin(self, operator: Operator) -> int:
        """A tensor from which adapters lead to what an operator reads."""
        self.inputs = 1
        shape = _image(operator.inputs[0])
        return self.adapt(self.build.input(shape), shape, operator)

    def enter(self, operator: Operator, *, image: bool) -> int:
        """The carrier's inputs, adapted to those of its first operator if that reads no image; returns the first."""
        self.inputs = len(operator.inputs)
        sources = [self.build.input(shape if image else _image(shape)) for shape in operator.inputs]
        if image:
            return self._keep(sources[0])
        read = [self.adapt(source, shape, operator) for source, shape in zip(sources, operator.inputs, strict=True)]
        return read[0]

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
        if len(shape) == 3:
            tensor = self._to_sequences(tensor, shape)
            here = self.shape(tensor)
        if len(shape) == 4 and (scale := _scale(here, shape) or 1) > 1:
            few = min(BOTTLENECK, MAX_ELEMENTS // (here[0] * scale * scale * here[2] * here[3]))
            tensor = self._add(_pointwise(here, few, (1, 1), "relu"), tensor)
            tensor = self._add(Upsample(input=self.shape(tensor), scale=scale), tensor)
            here = self.shape(tensor)
        strides = _strides(here, shape) if len(shape) == 4 else (1, 1)
        if _is_narrowed(here, shape):
            tensor = self._add(_pointwise(here, BOTTLENECK, strides, "relu"), tensor)
            strides = (1, 1)
        last: Activation = "none" if len(shape) == 2 else activation
        return self._keep(self._add(_pointwise(self.shape(tensor), _channels(shape), strides, last), tensor))

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
        if isinstance(operator, Rearrange) and self._undone(operator, tensor):
            return True
        return _would_fuse(self.build.operator(tensor), operator)

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
        """A tensor other than `current` for the second input: the latest that fits, as a block's shortcut is, of those
        that are sums, or none, as in networks, if there is one.

        An activation and its own input do not go together: in int8 their sum is one more function of the input.
        """
        fitting = [
            t for t in reversed(self.tensors.get(operator.inputs[1], [])) if t != current
            and not self._would_fuse(operator, t) and not self._activates(current, t)
            and not self._activates(t, current)
        ]  # fmt: skip
        return next((t for t in fitting if self.is_alike(operator, 1, t)), fitting[0] if fitting else None)

    def is_alike(self, operator: Operator, number: int, tensor: int) -> bool:
        """Whether a tensor is a sum, or none, as an operator's input of this number is in networks."""
        return (tensor in self.sums) in self.natures.get((operator.key, number), BOTH)

    def has_shortcut(self, operator: Operator, current: int) -> bool:
        """Whether there is what an operator adds in networks, beside what it reads."""
        second = self._second_input(operator, current)
        return second is not None and self.is_alike(operator, 1, second)

    def _activates(self, tensor: int, other: int) -> bool:
        """Whether one tensor is the activation of the other, and nothing else."""
        if tensor < self.inputs or not isinstance(self.build.operator(tensor), Activate):
            return False
        return other in self.build.read(tensor)

    def _origin(self, operator: Operator) -> int | None:
        """A tensor from which an adapter can make the second input: the smallest map, then the narrowest."""
        wanted = operator.inputs[1]
        origins = [s for s in self.tensors if _size(s) >= _size(wanted) and _can_adapt(s, wanted)]
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
        if len(inputs) == 2 and (_is_sum(operator) or inputs[1] in self.sums):
            self.sums.add(tensor)
        self.places[len(self.build) - 1] = operator.key
        self.families[tensor] = _family(operator)
        self.keys[tensor] = operator.key
        return self._keep(tensor)

    def may_read(self, piece: _Piece, tensor: int) -> bool:
        """Whether nothing that another operator begins with could serve this one too."""
        return tensor not in self.read or piece.operator.kind in WEIGHTED

    def lead(self, tensor: int, piece: _Piece) -> int:
        """An operator that is not timed, behind an adapter where it does not fit."""
        if _is_sum(piece.operator):
            main, other = piece.operator.inputs
            shortcut = tensor if self.shape(tensor) == other else self.adapt(tensor, other, piece.operator)
            made = self._add(piece.operator, self.adapt(shortcut, main, piece.operator), shortcut)
            self.sums.add(made)
        else:
            fits = self.shape(tensor) == piece.reads and self.may_read(piece, tensor)
            if not (fits and self.can_place(piece.operator, tensor)):
                tensor = self.adapt(tensor, piece.reads, piece.operator)
            made = self._add(piece.operator, tensor)
        self.families[made] = piece.family
        self.keys[made] = piece.key
        return self._keep(made)

    def end(self, tensor: int) -> int:
        """An adapter of few channels behind an operator that nothing else reads: graphs return what is unread, and it
        should not be much."""
        shape = self.shape(tensor)
        return self._add(_pointwise(shape, _few(shape), (1, 1), "none"), tensor)

    def finish(self, current: int) -> Network:
        """Ends with an adapter behind the last operator and the ballast, and returns every tensor that nothing reads.

        The ballast are the weights that the carrier lacks: what an operator costs depends on what else passes through
        the caches before it comes again.
        """
        tensor = self.end(current)
        lacking = self.asked_parameters - self.parameters
        features = min(isqrt(min(max(0, lacking), MAX_BALLAST)), MAX_ELEMENTS // self.shape(tensor)[0])
        if features >= MIN_BALLAST:
            if len(self.shape(tensor)) > 2:
                tensor = self._add(GlobalPool(input=self.shape(tensor)), tensor)
            for _ in range(2):
                tensor = self._add(Linear(input=self.shape(tensor), features=features, activation="relu"), tensor)
        return self.build.network(
            *(tensor for tensor in range(self.inputs, len(self.build) + self.inputs) if tensor not in self.read)
        )
