from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks_at_random import architectures, closeness, descriptions, used_batch_norm

from lut_db.errors import InvalidInput
from lut_db.lowering.torch import activate
from search_client import networks
from search_client.architecture import Architecture
from search_client.description import Block, Conv, Description, Linear
from search_client.elastic import Sample, SuperNetwork, centre
from search_client.ordered_dropout import draw
from search_client.sliced import slice_network

TOLERANCE = 1e-4


def super_network(description: Description, seed: int = 0) -> SuperNetwork:
    model = SuperNetwork(description, seed=seed)
    used_batch_norm(model, seed)
    return model.eval()


@settings(max_examples=120, deadline=None)
@given(data=st.data(), seed=st.integers(0, 1000))
def test_masked_super_network_equals_sliced_sub_network(data: st.DataObject, seed: int) -> None:
    description = data.draw(descriptions())
    architecture = data.draw(architectures(description))
    model = super_network(description, seed)
    images = torch.randn(2, *description.image, generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        masked = model(images, architecture)
        sliced = slice_network(model, architecture)(images)
        canonical = model(images, description.canonical(architecture))
    assert closeness(masked, sliced) <= TOLERANCE
    assert closeness(masked, canonical) <= TOLERANCE


@settings(max_examples=40, deadline=None)
@given(data=st.data(), seed=st.integers(0, 1000))
def test_every_image_goes_through_its_own_sub_network(data: st.DataObject, seed: int) -> None:
    description = data.draw(descriptions())
    chosen = data.draw(st.lists(architectures(description), min_size=4, max_size=4))
    model = super_network(description, seed)
    images = torch.randn(4, *description.image, generator=torch.Generator().manual_seed(seed))
    sample = Sample(torch.tensor([a.widths for a in chosen]).reshape(4, -1),
                    torch.tensor([a.kernels for a in chosen]).reshape(4, -1))  # fmt: skip
    with torch.inference_mode():
        together = model(images, sample)
        alone = torch.cat([slice_network(model, a)(images[n : n + 1]) for n, a in enumerate(chosen)])
    assert closeness(together, alone) <= TOLERANCE


@pytest.mark.parametrize("literal", [False, True])
def test_masked_equals_sliced_on_digits(literal: bool) -> None:
    description = networks.load("digits", image_size=17, literal_residual_bypass=literal)
    model = super_network(description)
    images = torch.randn(24, *description.image, generator=torch.Generator().manual_seed(0))
    drawn = draw(description.space, len(images), seed=3, step=0)
    with torch.inference_mode():
        together = model(images, Sample.drawn(drawn))
        alone = torch.cat(
            [
                slice_network(model, Architecture(tuple(map(int, widths)), tuple(map(int, kernels))))(image[None])
                for image, widths, kernels in zip(images, drawn.widths, drawn.kernels, strict=True)
            ]
        )
    assert closeness(together, alone) <= TOLERANCE
    assert float(together.std(0).max()) > 1e-3  # and they are not all alike


@settings(max_examples=40, deadline=None)
@given(channels=st.integers(1, 8), filters=st.integers(1, 8), expand=st.sampled_from([None, 4, 12]),
       squeeze=st.sampled_from([0, 2]), training=st.booleans())  # fmt: skip
def test_a_removed_residual_block_is_exactly_the_identity(
    channels: int, filters: int, expand: int | None, squeeze: int, training: bool
) -> None:
    stages = (Block("block", filters, expand, squeeze=squeeze, limit=4), Linear("classifier", 2))
    description = Description("case", (channels, 6, 6), stages, width_count=3)
    model = super_network(description).train(training)
    images = torch.randn(3, channels, 6, 6)
    block = description.units[0]
    sample = Sample.of(description.architecture({"block.project": (0, 1)}), 3)
    output, width = model._block(block, images, torch.full((3,), channels), sample)  # type: ignore[arg-type]
    assert torch.equal(output[:, :channels], images)
    assert not output[:, channels:].any()
    assert width.tolist() == [channels] * 3


@pytest.mark.parametrize(
    ("channels", "limit", "filters", "width"),
    [(4, 4, 0, 4), (4, 6, 5, 5), (4, 6, 2, 4), (4, 2, 1, 2), (32, 0, 1, 1)],
)
@pytest.mark.parametrize("stride", [1, 2])
@torch.no_grad()
def test_bypass_by_hand(channels: int, limit: int, filters: int, width: int, stride: int) -> None:
    """concat(act(bn(conv_M(x))), x[:, M:min(C, T)]), Fig. 3."""
    conv = Conv("layer", 6, kernel=3, limit=limit, stride=stride, activation="relu", widths=tuple({filters, 6}))
    description = Description("case", (channels, 5, 5), (conv, Linear("classifier", 2)))
    layer = super_network(description).part("layer")
    images = torch.randn(1, channels, 5, 5)
    output, found = layer(images, torch.tensor([channels]), torch.tensor([filters]), torch.tensor([3]))
    assert found.tolist() == [width]
    assert output.shape[1] == max(min(channels, limit), 6)
    convolved = torch.nn.functional.conv2d(images, layer.weight, stride=stride, padding=1)
    assert torch.allclose(output[:, :filters], activate("relu", layer.batch_norm(convolved))[:, :filters], atol=1e-6)
    rest = images[:, filters : max(filters, min(channels, limit))]
    if stride == 2 and rest.shape[1]:
        # 5 pixels become 3: the last window has one row or column only.
        assert output[0, filters, 2, 2] == pytest.approx(float(rest[0, 0, 4, 4]), abs=1e-6)
        assert output[0, filters, 0, 0] == pytest.approx(float(rest[0, 0, :2, :2].mean()), abs=1e-6)
    elif stride == 1:
        assert torch.equal(output[:, filters:width], rest)
    assert not output[:, width:].any()


def test_a_narrower_kernel_is_the_centre() -> None:
    weight = torch.arange(25.0).reshape(1, 1, 5, 5)
    assert torch.equal(centre(weight, 3)[0, 0], weight[0, 0, 1:4, 1:4])


def test_gradients_reach_only_what_a_sample_uses() -> None:
    description = Description("case", (3, 8, 8), (Conv("a", 8, kernel=5), Linear("classifier", 2)), width_count=5)
    model = super_network(description)
    # Values far apart reach both sides of every filter's batch-norm: no filter is silent for all of them.
    images = 10 * torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    model(images, description.architecture({"a": (4, 3)})).sum().backward()
    gradient = model.part("a").weight.grad
    assert gradient is not None
    assert gradient[:4, :, 1:4, 1:4].abs().min() > 0
    assert not gradient[4:].any()
    assert not gradient[:, :, 0].any()


def test_samples_of_another_size_are_refused() -> None:
    description = networks.load("digits")
    with pytest.raises(InvalidInput, match="sample"):
        SuperNetwork(description)(torch.zeros(2, 1, 32, 32), Sample.of(description.space.full, 3))
