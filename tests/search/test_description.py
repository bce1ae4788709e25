from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from networks_at_random import architectures, descriptions

from lut_db.errors import InvalidInput
from search_client import networks
from search_client.architecture import Architecture
from search_client.description import (
    Block,
    Conv,
    Description,
    Linear,
    output_width,
    round_to,
    separable,
    width_grid,
)

# NetAdaptV2, Tables 8 and 9: the searched filters of a row, then the kernel size of its depthwise layer.
TABLE_8 = (
    (16, 3),
    (8, 8, 16, 3),
    (48, 48, 20, 5), (48, 48, 32, 3),
    (80, 80, 32, 7), (112, 80, 40, 3), (64, 32, 16, 3), (96, 96, 8, 3),
    (192, 192, 128, 5), (224, 192, 128, 5), (128, 32, 48, 3), (0, 0, 0, 3),
    (512, 256, 80, 3), (256, 256, 112, 3), (512, 512, 64, 5),
    (640, 640, 224, 7), (640, 384, 224, 7), (896, 512, 224, 5),
    (1024, 1), (1792, 1),
)  # fmt: skip
TABLE_9 = (
    (24, 3),
    (24, 24, 3),
    (64, 48, 32, 5), (128, 64, 32, 3),
    (96, 96, 48, 5), (128, 80, 56, 3), (0, 0, 0, 3), (0, 0, 0, 3),
    (224, 224, 96, 5), (224, 96, 96, 3), (256, 256, 96, 3), (0, 0, 0, 3),
    (640, 640, 144, 5), (640, 512, 144, 3), (0, 0, 0, 3),
    (768, 640, 192, 5), (768, 256, 192, 5), (896, 768, 192, 7), (1152, 1152, 192, 7),
    (1152, 1), (2048, 1),
)  # fmt: skip


def from_table(rows: tuple[tuple[int, ...], ...]) -> Architecture:
    widths: list[int] = []
    kernels: list[int] = []
    for *filters, kernel in rows:
        widths += filters
        # expansion, depthwise, projection; without expansion depthwise, projection; or one layer
        kernels += {3: [1, kernel, 1], 2: [kernel, 1], 1: [kernel]}[len(filters)]
    return Architecture(tuple(widths), tuple(kernels))


@pytest.mark.parametrize(
    ("initial", "rows", "macs", "with_elementwise"),
    [("latency", TABLE_8, 223.06, 225.25), ("macs", TABLE_9, 311.30, 313.70)],
)
def test_the_networks_of_the_paper_have_its_macs(
    initial: str, rows: tuple[tuple[int, ...], ...], macs: float, with_elementwise: float
) -> None:
    description = networks.load("mobilenet_v3", initial=initial)
    architecture = from_table(rows)
    for layer, width, kernel in zip(
        description.space.layers, architecture.widths, architecture.kernels, strict=True
    ):  # fmt: skip
        assert width in layer.widths, layer.name
        assert kernel in layer.kernels, layer.name
    network = description.network(architecture)
    assert network.macs / 1e6 == pytest.approx(macs, abs=0.005)
    # The average pools of bypasses at stride 2 are this repository's choice: the paper cannot have counted them.
    pools = sum(op.elementwise for op in network.operators if op.kind == "channel_bypass")
    assert (network.macs_with_elementwise - pools) / 1e6 == pytest.approx(with_elementwise, abs=0.05)


def test_mobilenet_v1_has_the_macs_of_its_paper() -> None:
    description = networks.load("mobilenet_v1")
    assert description.network(description.space.full).macs / 1e6 == pytest.approx(568.74, abs=0.005)
    assert len(description.space.layers) == 27  # J in the ablation study, appendix D.2


def test_digits_fits_the_demo() -> None:
    description = networks.load("digits")
    network = description.network(description.space.full)
    assert 15e6 < network.macs < 30e6
    kinds = {operator.kind for operator in network.operators}
    assert {"squeeze_excite", "residual_add", "global_pool", "linear"} <= kinds
    assert all(width % 8 == 0 for layer in description.space.layers for width in layer.widths)


@pytest.mark.parametrize(
    ("channels", "limit", "filters", "width"),
    [(4, 4, 0, 4), (4, 6, 5, 5), (4, 6, 2, 4), (4, 2, 1, 2), (32, 0, 1, 1), (4, None, 1, 4)],
)
def test_output_width(channels: int, limit: int | None, filters: int, width: int) -> None:
    assert output_width(channels, limit, filters) == width
    stages = (
        Conv("before", channels, search=False, limit=0),
        Conv("layer", max(filters, 8), limit=limit, widths=tuple(sorted({filters, max(filters, 8)}))),
        Linear("classifier", 2),
    )
    description = Description("case", (3, 5, 5), stages)
    architecture = description.architecture({"layer": (filters, 1)})
    pooled = next(op for op in description.network(architecture).operators if op.kind == "global_pool")
    assert pooled.input[1] == width


def test_grids_are_uniform_and_distinct() -> None:
    assert width_grid(32, 9) == (0, 4, 8, 12, 16, 20, 24, 28, 32)
    assert width_grid(2048, 9)[-2] == 1792
    assert width_grid(24, 11, 8) == (0, 8, 16, 24)
    assert width_grid(80, 11, 8) == (0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80)
    assert width_grid(3, 9) == (0, 1, 2, 3)
    assert [round_to(value, 8) for value in (20, 16, 3)] == [24, 16, 8]


@given(full=st.integers(1, 3000), count=st.integers(2, 20), divisor=st.sampled_from([1, 8]))
def test_every_grid_runs_from_zero_to_full(full: int, count: int, divisor: int) -> None:
    grid = width_grid(full, count, divisor)
    assert grid[0] == 0
    assert grid[-1] == full
    assert list(grid) == sorted(set(grid))
    assert len(grid) <= count


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_equal_functions_have_equal_architectures(data: st.DataObject) -> None:
    description = data.draw(descriptions())
    architecture = data.draw(architectures(description))
    canonical = description.canonical(architecture)
    assert description.canonical(canonical) == canonical
    assert description.network(canonical) == description.network(architecture)
    for layer, width, kernel in zip(description.space.layers, canonical.widths, canonical.kernels, strict=True):
        if width == 0:
            assert kernel == layer.kernels[0]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_node_has_a_source_and_identities_have_no_node(data: st.DataObject) -> None:
    description = data.draw(descriptions())
    network, sources = description.network_with_sources(data.draw(architectures(description)))
    assert len(sources) == len(network.nodes)
    for node, source in zip(network.nodes, sources, strict=True):
        operator = node.operator
        assert source.has_weights == bool(operator.weights)
        if operator.kind == "channel_bypass":
            assert operator.filters < operator.passed
    assert network.shapes[-1] == (1, description.classes)


def test_a_removed_residual_block_has_no_operators() -> None:
    stages = (
        Conv("stem", 8, kernel=3, limit=4),
        Block("block", 8, 16, kernel=5, limit=4, squeeze=2),
        Linear("classifier", 2),
    )
    description = Description("case", (3, 8, 8), stages)
    removed = description.architecture({"block.project": (0, 1)})
    assert [op.kind for op in description.network(removed).operators] == ["convolution", "global_pool", "linear"]
    assert description.canonical(removed).widths == (8, 0, 0, 0)
    assert description.canonical(removed).kernels == (3, 1, 3, 1)
    literal = Description("case", (3, 8, 8), stages, literal_residual_bypass=True)
    kinds = [op.kind for op in literal.network(removed).operators]
    assert kinds == ["convolution", "convolution", "convolution", "squeeze_excite", "channel_bypass", "residual_add",
                     "global_pool", "linear"]  # fmt: skip


def test_residuals_are_fused_only_where_widths_are_equal() -> None:
    stages = (Conv("stem", 8, search=False), Block("block", 8, 16), Linear("classifier", 2))
    description = Description("case", (3, 8, 8), stages, width_count=3)
    fused = description.network(description.space.full)
    assert [op.kind for op in fused.operators].count("residual_add") == 0
    assert any(getattr(op, "residual", False) for op in fused.operators)
    unequal = description.network(description.architecture({"block.project": (4, 1)}))
    assert [op.kind for op in unequal.operators].count("residual_add") == 1


def test_descriptions_that_cannot_be_networks_are_refused() -> None:
    with pytest.raises(InvalidInput, match="stages"):
        Description("case", (3, 8, 8), (Conv("stem", 8),))
    with pytest.raises(InvalidInput, match="same name"):
        Description("case", (3, 8, 8), (Conv("a", 8), Conv("a", 8), Linear("classifier", 2)))
    with pytest.raises(InvalidInput, match="odd"):
        Description("case", (3, 8, 8), (Conv("a", 8, kernel=2), Linear("classifier", 2)))
    with pytest.raises(InvalidInput, match="full width"):
        Description("case", (3, 8, 8), (Conv("a", 8, widths=(0, 4)), Linear("classifier", 2)))
    description = Description("case", (3, 8, 8), (*separable("a", 8), Linear("classifier", 2)))
    assert [layer.name for layer in description.space.layers] == ["a.depthwise", "a.pointwise"]
    with pytest.raises(InvalidInput, match="no searched layer"):
        description.architecture({"nothing": (1, 1)})
    with pytest.raises(InvalidInput, match="outside"):
        description.network(Architecture((3, 9), (3, 1)))


def test_plug_ins_are_found_and_explained() -> None:
    assert {"digits", "mobilenet_v1", "mobilenet_v3"} <= set(networks.names())
    with pytest.raises(InvalidInput, match="mobilenet_v3"):
        networks.load("resnet")
    with pytest.raises(InvalidInput, match="image_size"):
        networks.load("digits", image_sizes=32)
    for name in networks.names():
        assert name in (networks.load(name).name, "")
