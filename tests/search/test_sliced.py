from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from networks_at_random import architectures, closeness, descriptions, used_batch_norm
from torch import nn

from lut_db.errors import InvalidInput
from lut_db.lowering.torch import RUN, to_torch
from lut_db.lowering.weights import made_up
from lut_db.networks import Network
from lut_db.operators import KINDS
from search_client import networks, sliced
from search_client.architecture import Architecture
from search_client.elastic import SuperNetwork
from search_client.ordered_dropout import draw
from search_client.sliced import ExportRefused, export_onnx, fold, fresh, parameter_count, slice_network


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 1000))
def test_modules_hold_exactly_the_counted_parameters(data: st.DataObject, seed: int) -> None:
    description = data.draw(descriptions())
    architecture = data.draw(architectures(description))
    model = SuperNetwork(description, seed=seed)
    part = slice_network(model, architecture)
    network, sources = description.network_with_sources(architecture)
    assert sum(parameter.numel() for parameter in part.parameters()) == parameter_count(network, sources)
    folded, weights = fold(part.eval())
    assert folded == network
    assert sum(array.size for arrays in weights for array in arrays.values()) == network.parameters
    assert sum(parameter.numel() for parameter in part.folded().parameters()) == network.parameters
    statistics = {"running_mean", "running_var", "num_batches_tracked"}
    assert {name.rsplit(".", 1)[-1] for name, _ in part.named_buffers()} <= statistics  # no masks
    assert fresh(description, architecture).state_dict().keys() == part.state_dict().keys()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), seed=st.integers(0, 1000))
def test_the_exported_file_computes_what_the_super_network_does(data: st.DataObject, seed: int, tmp_path: Path) -> None:
    description = data.draw(descriptions())
    architecture = data.draw(architectures(description))
    model = SuperNetwork(description, seed=seed)
    used_batch_norm(model, seed)
    model.eval()
    path = tmp_path / f"{description.key}-{architecture.key}.onnx"
    assert export_onnx(slice_network(model, architecture), path) <= 1e-4
    images = torch.randn(1, *description.image, generator=torch.Generator().manual_seed(seed))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.inference_mode():
        masked = model(images, architecture)
    assert closeness(masked, torch.from_numpy(logits)) <= 1e-4


def test_digits_export(tmp_path: Path) -> None:
    description = networks.load("digits")
    model = SuperNetwork(description)
    used_batch_norm(model, 1)
    model.eval()
    drawn = draw(description.space, 6, seed=5, step=0)
    for widths, kernels in zip(drawn.widths, drawn.kernels, strict=True):
        architecture = Architecture(tuple(map(int, widths)), tuple(map(int, kernels)))
        assert export_onnx(slice_network(model, architecture), tmp_path / "network.onnx") <= 1e-4
    assert [path.name for path in tmp_path.iterdir()] == ["network.onnx"]


def test_a_wrong_export_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    description = networks.load("digits", image_size=8)
    part = fresh(description, description.space.full).eval()
    honest = sliced.fold

    def altered(network: sliced.SlicedNetwork) -> tuple[Network, list[dict[str, np.ndarray]]]:
        graph, weights = honest(network)
        weights[0]["bias"] = weights[0]["bias"] + 1
        return graph, weights

    monkeypatch.setattr(sliced, "fold", altered)
    with pytest.raises(ExportRefused, match="differ"):
        export_onnx(part, tmp_path / "network.onnx")
    assert not list(tmp_path.iterdir())


def test_folding_keeps_the_function() -> None:
    description = networks.load("digits", image_size=16)
    part = fresh(description, description.space.full, seed=3)
    used_batch_norm(part, 3)
    part.eval()
    images = torch.randn(4, 1, 16, 16)
    with torch.inference_mode():
        assert closeness(part(images), part.folded()(images)) <= 1e-4
    assert not any(isinstance(module, nn.BatchNorm2d) for module in part.folded().modules())


def test_every_kind_can_be_run() -> None:
    assert set(RUN) == set(KINDS)


def test_asymmetric_padding_and_averages_at_the_border() -> None:
    from lut_db.operators import Convolution, Pool

    x = torch.randn(1, 2, 6, 6)
    convolution = Network.of(Convolution(input=(1, 2, 6, 6), filters=3, kernel=(3, 3), padding=(0, 1, 2, 1)))
    weights = made_up(convolution)
    wanted = nn.functional.conv2d(
        nn.functional.pad(x, (1, 1, 0, 2)), torch.from_numpy(weights[0]["weight"]), torch.from_numpy(weights[0]["bias"])
    )
    assert torch.allclose(to_torch(convolution, weights)(x), wanted, atol=1e-6)
    pool = Network.of(Pool(input=(1, 2, 6, 6), kernel=(3, 3), stride=(2, 2), padding=(1, 1, 0, 0), mode="average"))
    assert torch.allclose(to_torch(pool, [{}])(x)[0, 0, 0, 0], x[0, 0, :2, :2].mean(), atol=1e-6)


def test_weights_of_another_network_are_refused() -> None:
    description = networks.load("digits", image_size=8)
    network = description.network(description.space.full)
    with pytest.raises(InvalidInput, match="weights"):
        to_torch(network, made_up(network)[:-1])
