"""Random small networks, architectures and batch-norm statistics for the property tests."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import nn

from search_client.architecture import Architecture
from search_client.description import Block, Conv, Depthwise, Description, Linear, Stage

ACTIVATIONS = st.sampled_from(["none", "relu", "relu6", "hard_swish", "hard_sigmoid", "sigmoid"])
LIMITS = st.sampled_from([None, 1, 2, 3, 4, 6, 8, 16])
STRIDES = st.sampled_from([1, 1, 2])
KERNELS = st.sampled_from([3, 5])


@st.composite
def descriptions(draw: st.DrawFn) -> Description:
    """One to four convolutional stages, up to two hidden linear layers and a classifier."""
    stages: list[Stage] = []
    for number in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["conv", "depthwise", "block", "block"]))
        name = f"stage{number}"
        if kind == "conv":
            stages.append(
                Conv(
                    name, draw(st.integers(1, 8)), kernel=draw(st.sampled_from([1, 3, 5])), stride=draw(STRIDES),
                    limit=draw(st.sampled_from([0, None, 1, 3, 8])), activation=draw(ACTIVATIONS),
                    search=draw(st.sampled_from([True, True, False])),
                )
            )  # fmt: skip
        elif kind == "depthwise":
            stages.append(Depthwise(name, kernel=draw(KERNELS), stride=draw(STRIDES), activation=draw(ACTIVATIONS)))
        else:
            stages.append(
                Block(
                    name, draw(st.integers(1, 8)), draw(st.sampled_from([None, 2, 5, 8, 12])), kernel=draw(KERNELS),
                    stride=draw(STRIDES), limit=draw(LIMITS), activation=draw(ACTIVATIONS),
                    squeeze=draw(st.sampled_from([0, 1, 3])),
                )
            )  # fmt: skip
    for number in range(draw(st.integers(0, 2))):
        stages.append(Linear(f"hidden{number}", draw(st.integers(1, 8)), activation=draw(ACTIVATIONS),
                             limit=draw(LIMITS)))  # fmt: skip
    stages.append(Linear("classifier", 3))
    image = (draw(st.integers(1, 3)), draw(st.integers(5, 9)), draw(st.integers(5, 9)))
    return Description(
        "random", image, tuple(stages), width_count=draw(st.integers(2, 6)),
        literal_residual_bypass=draw(st.booleans()),
    )  # fmt: skip


def architectures(description: Description) -> st.SearchStrategy[Architecture]:
    """Any architecture of the description; the smallest and the largest width of a layer come more often."""
    layers = description.space.layers

    def width(options: tuple[int, ...]) -> st.SearchStrategy[int]:
        return st.one_of(st.sampled_from(options), st.just(options[0]), st.just(options[-1]))

    return st.builds(
        Architecture,
        widths=st.tuples(*(width(layer.widths) for layer in layers)),
        kernels=st.tuples(*(st.sampled_from(layer.kernels) for layer in layers)),
    )


def used_batch_norm(model: nn.Module, seed: int) -> nn.Module:
    """Batch-norms and biases as after training: fresh ones, 0 and 1, would hide a mask in the wrong place."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0.0, 0.5, generator=random)
                module.running_var.uniform_(0.5, 2.0, generator=random)
                module.weight.uniform_(0.5, 1.5, generator=random)
                module.bias.normal_(0.0, 0.5, generator=random)
        for name, parameter in model.named_parameters():
            if name.endswith("bias") and "batch_norm" not in name:
                parameter.normal_(0.0, 0.5, generator=random)
    return model


def closeness(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest value where that exceeds 1."""
    return float((a - b).abs().max()) / max(1.0, float(a.abs().max()))
