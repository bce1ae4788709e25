"""Architectures and the space they are drawn from: what an optimizer sees of a network. Pure data, no torch.

A search space is a list of layers, each with its widths and its kernel sizes; an architecture is one choice of
both for every layer. Shrinking a layer by one step takes its next smaller width or its next smaller kernel
(NetAdaptV2, Sec. 2.4). Layers that must keep equal widths share a `tie` and shrink together.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property

from lut_db.errors import InvalidInput


@dataclass(frozen=True)
class Architecture:
    """One sub-network: the filters and the kernel size of every searchable layer, in the space's order."""

    widths: tuple[int, ...]
    kernels: tuple[int, ...]

    @cached_property
    def key(self) -> str:
        text = f"{','.join(map(str, self.widths))};{','.join(map(str, self.kernels))}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def with_width(self, layer: int, width: int) -> Architecture:
        return replace(self, widths=(*self.widths[:layer], width, *self.widths[layer + 1 :]))

    def with_kernel(self, layer: int, kernel: int) -> Architecture:
        return replace(self, kernels=(*self.kernels[:layer], kernel, *self.kernels[layer + 1 :]))


@dataclass(frozen=True)
class SearchLayer:
    """A searchable layer. `widths` and `kernels` are ascending; the last of each is the initial network's."""

    name: str
    widths: tuple[int, ...]
    kernels: tuple[int, ...]
    tie: str | None = None

    def __post_init__(self) -> None:
        for field in ("widths", "kernels"):
            options = getattr(self, field)
            if not options or list(options) != sorted(set(options)) or options[0] < 0:
                raise InvalidInput(
                    f"layer {self.name!r}: {options} must be distinct, ascending and not negative",
                    field=field,
                )


@dataclass(frozen=True)
class SearchSpace:
    """All sub-networks of an initial network."""

    layers: tuple[SearchLayer, ...]

    @property
    def full(self) -> Architecture:
        """The initial network: every layer at its largest."""
        return Architecture(
            widths=tuple(layer.widths[-1] for layer in self.layers),
            kernels=tuple(layer.kernels[-1] for layer in self.layers),
        )

    def tied(self, layer: int) -> tuple[int, ...]:
        """The layers that shrink together with `layer`, itself included."""
        tie = self.layers[layer].tie
        if tie is None:
            return (layer,)
        return tuple(number for number, other in enumerate(self.layers) if other.tie == tie)

    def shrink(self, architecture: Architecture, layer: int) -> tuple[Architecture, ...]:
        """The single steps that shrink `layer`: its next smaller width, its next smaller kernel; may be empty.

        Widths off the grid (a table of a paper may hold some) step to the next smaller one on it. A removed
        layer has no kernel to shrink.
        """
        steps = []
        smaller = [width for width in self.layers[layer].widths if width < architecture.widths[layer]]
        if smaller:
            step = architecture
            for other in self.tied(layer):
                step = step.with_width(other, smaller[-1])
            steps.append(step)
        kernels = [kernel for kernel in self.layers[layer].kernels if kernel < architecture.kernels[layer]]
        if kernels and architecture.widths[layer] > 0:
            steps.append(architecture.with_kernel(layer, kernels[-1]))
        return tuple(steps)

    def check(self, architecture: Architecture) -> None:
        """Raises InvalidInput unless the architecture has a width and a kernel for every layer, none too large."""
        for field, given in (("widths", architecture.widths), ("kernels", architecture.kernels)):
            if len(given) != len(self.layers):
                raise InvalidInput(f"{len(given)} given for {len(self.layers)} layers", field=field)
            for layer, value in zip(self.layers, given, strict=True):
                if not 0 <= value <= getattr(layer, field)[-1]:
                    raise InvalidInput(f"layer {layer.name!r}: {value} is outside the super-network", field=field)
