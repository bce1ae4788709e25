"""LiteRT as a backend: what it computes, whose its times are, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import flatbuffers
import numpy as np
import pytest
import torch
from ai_edge_litert import schema_py_generated as schema
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from operators_at_random import ANY, BY_KIND

from device_agents import backends
from device_agents.backends import Options, Unsupported, cpu_litert
from device_agents.packing import pack
from device_agents.xnnpack import attribute
from lut_db.canary import canary, heavy_canary
from lut_db.errors import InvalidInput
from lut_db.lowering.tflite import FILE_IDENTIFIER, ModelOperator, model_operators, to_tflite
from lut_db.lowering.torch import to_torch
from lut_db.lowering.weights import made_up
from lut_db.networks import Network
from lut_db.operators import (
    KINDS,
    Activate,
    Activation,
    Add,
    ChannelBypass,
    Convolution,
    LayerNorm,
    Linear,
    MatMul,
    Operator,
    ResidualAdd,
    Softmax,
    SqueezeExcite,
)
from lut_db.plans import Plan
from search_client import networks

MAP, TOKENS = (1, 8, 12, 12), (2, 8, 8)
SOME: tuple[Activation, ...] = ("relu", "hard_swish", "hard_sigmoid", "sigmoid", "gelu")
ALIKE: list[Operator] = [
    *(Activate(input=shape, activation=activation) for shape in (MAP, TOKENS) for activation in SOME),
    *(Add(input=shape, activation=activation) for shape in (MAP, TOKENS) for activation in ("none", *SOME)),
    *(Convolution(input=MAP, filters=8, kernel=(1, 1), activation=activation) for activation in ("none", *SOME)),
    *(Linear(input=TOKENS, features=8, activation=activation) for activation in ("none", *SOME)),
    *(MatMul(input=TOKENS, columns=8, scaled=scaled) for scaled in (True, False)),
    ChannelBypass(input=MAP, filters=4, kernel=(1, 1), activation="sigmoid"), SqueezeExcite(input=MAP, squeeze=4),
    ResidualAdd(input=MAP, shortcut_channels=4, activation="sigmoid"), LayerNorm(input=TOKENS), Softmax(input=TOKENS),
]  # fmt: skip
"""Operators that fit each other, among them those that runtimes like to join."""
LOADS = settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))


VARIANTS = {"on": {"xnnpack": "on"}, "off": {"xnnpack": "off"}, "int8": {"precision": "int8"},
            "int8-off": {"precision": "int8", "xnnpack": "off"}, "fp16": {"precision": "fp16"}}  # fmt: skip
ERROR = {"fp32": 1e-4, "fp16": 0.02, "int8": 0.15}
"""Root mean square of the error over that of the values."""


def made(**settings: str) -> backends.Backend:
    """The backend, where this processor has it."""
    try:
        return backends.create("cpu-litert", Options(settings=settings))
    except InvalidInput as refused:
        if settings.get("precision") != "fp16":
            raise
        pytest.skip(str(refused))


@pytest.fixture(params=VARIANTS)
def backend(request: pytest.FixtureRequest) -> backends.Backend:
    return made(**VARIANTS[request.param])


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_it_computes_what_the_reference_does(backend: backends.Backend, kind: str) -> None:
    @settings(max_examples=5, deadline=None, suppress_health_check=list(HealthCheck))
    @given(operator=BY_KIND[kind])
    def check(operator: Operator) -> None:
        network = Network.of(operator)
        weights = made_up(network)
        random = np.random.default_rng(1)
        inputs = [random.standard_normal(shape, dtype=np.float32) for shape in network.inputs]
        with torch.inference_mode():
            expected = to_torch(network, weights)(*map(torch.from_numpy, inputs))
        (found,) = backend.compute(network, weights, inputs)
        error = np.sqrt(np.square(found - expected.numpy()).mean())
        size = np.sqrt(np.square(expected.numpy()).mean())
        assert error <= ERROR[backend.target().precision] * size + 1e-3

    check()


def test_the_times_of_nodes_add_up_to_the_run(backend: backends.Backend) -> None:
    loaded = backend.load(canary(), profile=True)
    runs = [latency for _ in range(4) for latency in loaded.time(5)]
    times = loaded.node_times()
    assert times.total_ms.shape == (20, len(canary().nodes))
    assert np.all(times.total_ms > 0)
    assert np.all(times.events > 0)
    # What the profiler itself does lies in the run and in no node.
    assert 0.5 < np.median(times.total_ms.sum(axis=1) / np.array(runs)) < 1.05


def test_a_profiler_that_fills_up_is_emptied(backend: backends.Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_litert, "FULL", 100)
    loaded = backend.load(canary(), profile=True)
    assert len(loaded.time(7)) == 7
    times = loaded.node_times()
    assert times.total_ms.shape == (7, len(canary().nodes))
    assert np.all(times.total_ms > 0)


@LOADS
@given(
    operators=st.lists(ANY, min_size=1, max_size=8, unique_by=lambda operator: operator.key)
    | st.lists(st.sampled_from(ALIKE), min_size=2, max_size=8, unique=True)
)
def test_the_profile_of_any_carrier_can_be_read(backend: backends.Backend, operators: list[Operator]) -> None:
    for carrier in pack(operators, [], 1, 8, 0):
        loaded = backend.load(carrier.network, profile=True)
        loaded.time(2)
        times = loaded.node_times()
        assert times.total_ms.shape == (2, len(carrier.network.nodes))
        # A pool of single elements is none: XNNPACK leaves it out.
        for node, timed in zip(carrier.network.nodes, times.events, strict=True):
            assert timed > 0 or getattr(node.operator, "kernel", None) == (1, 1)


def test_the_profile_of_a_searched_network_can_be_read(backend: backends.Backend) -> None:
    description = networks.load("mobilenet_v3", image_size=32, classes=10)
    network = description.network(description.space.full)
    loaded = backend.load(network, profile=True)
    loaded.time(1)
    assert np.all(loaded.node_times().events > 0)


def names_of(operators: list[ModelOperator]) -> list[str]:
    """What XNNPACK says that it ran of the heavy canary's first block."""
    known = {"CONV_2D": "Fully Connected (NC, F32) GEMM", "DEPTHWISE_CONV_2D": "Convolution (NHWC, F32) DWConv",
             "HARD_SWISH": "HardSwish (NC)", "MEAN": "Mean (ND) Reduce2", "MUL": "Multiply (ND)"}  # fmt: skip
    return [known[operator.code] for operator in operators if operator.code != "PAD"]


def test_what_does_not_match_is_refused() -> None:
    operators = model_operators(to_tflite(heavy_canary()), heavy_canary())[:9]
    names = names_of(operators)
    assert [operator.owner for operator, _ in attribute(names, operators)] == [0, 0, 1, 2, 2, 2, 2, 2]
    with pytest.raises(Unsupported, match="Softmax"):
        attribute([*names[:3], "Softmax (NC)", *names[3:]], operators)
    with pytest.raises(Unsupported, match="nothing"):
        attribute(names[:-1], operators)
    with pytest.raises(Unsupported, match="behind"):
        attribute([*names, "Convert (NC)"], operators)


def test_fp16_runs_kernels_of_fp16() -> None:
    loaded = made(precision="fp16").load(canary(), profile=True)
    loaded.time(1)
    loaded.node_times()
    names = [entry.name for entry in loaded.profile.entries]
    assert any(", F16)" in name for name in names)
    assert not any("F32" in name for name in names)


def test_int8_runs_kernels_of_int8() -> None:
    loaded = made(precision="int8").load(canary(), profile=True)
    loaded.time(1)
    loaded.node_times()
    names = [entry.name for entry in loaded.profile.entries]
    assert sum("QS8" in name or "QC8" in name for name in names) >= 15
    assert not any("F32" in name for name in names)
    assert names.count("Convert (NC)") == 2  # at the border only


def test_fp16_without_kernels_is_refused() -> None:
    with pytest.raises(InvalidInput, match="own kernels"):
        backends.create("cpu-litert", Options(settings={"precision": "fp16", "xnnpack": "off"}))


def test_fp32_in_place_of_fp16_is_refused() -> None:
    with pytest.raises(Unsupported, match="in fp32"):
        attribute(["Fully Connected (NC, F32) GEMM"], model_operators(to_tflite(canary()), canary()), fp16=True)


def test_conversions_belong_to_those_at_the_edges_of_a_turn() -> None:
    def made(code: str, owner: int, *inputs: int) -> ModelOperator:
        return ModelOperator(code, owner, False, inputs, (owner + 10,))

    operators = [made("MUL", 0, 0), made("MEAN", 1, 10), made("RESIZE_NEAREST_NEIGHBOR", 2, 11), made("ADD", 3, 12, 1)]
    names = ["Convert (NC)", "Multiply (ND)", "Mean (ND)", *["Convert (NC)"] * 3, "Add (ND)", "Convert (NC)"]
    found = attribute(names, operators, {2}, fp16=True)
    assert [operator.owner for operator, _ in found] == [0, 0, 1, 1, 3, 3, 3, 3]
    with pytest.raises(Unsupported, match="conversions"):
        attribute(names[1:], operators, {2}, fp16=True)


def test_tables_that_are_joined_belong_to_the_last() -> None:
    def made(code: str, owner: int, *inputs: int) -> ModelOperator:
        return ModelOperator(code, owner, False, inputs, (owner + 10,), int8=True)

    # A sum of a tensor and a function of it is one more function of it.
    operators = [made("CONV_2D", 0, 0), made("ADD", 1, 10), made("MUL", 2, 11), made("ADD", 3, 12, 10)]
    found = attribute(["Fully Connected (NC)", "Invalid Unary Op"], operators)
    assert [operator.owner for operator, _ in found] == [0, 3]
    # With what is no function of it, it is a sum.
    operators = [*operators[:3], made("ADD", 3, 12, 1)]
    found = attribute(["Fully Connected (NC)", "Invalid Unary Op", "Add (ND)"], operators)
    assert [operator.owner for operator, _ in found] == [0, 2, 3]


def test_operators_take_turns_with_the_runtime() -> None:
    def made(code: str, owner: int, *inputs: int) -> ModelOperator:
        return ModelOperator(code, owner, False, inputs, (owner + 10,))

    operators = [
        made("MUL", 0, 0),
        made("RESIZE_NEAREST_NEIGHBOR", 1, 10),
        made("HARD_SWISH", 2, 11),
        made("MEAN", 3, 0),
    ]
    # The last operator needs nothing of the runtime's own: XNNPACK runs it before.
    found = attribute(["Multiply (ND)", "Mean (ND)", "HardSwish (NC)"], operators, {1})
    assert [operator.owner for operator, _ in found] == [0, 3, 2]


def test_a_file_is_loaded(backend: backends.Backend, tmp_path: Path) -> None:
    model = tmp_path / "canary.tflite"
    model.write_bytes(to_tflite(canary()))
    loaded = backend.load(model, profile=False)
    assert len(loaded.time(3)) == 3
    (tmp_path / "broken.tflite").write_bytes(b"no model")
    with pytest.raises(Unsupported, match="LiteRtCreateModelFromFile"):
        backend.load(tmp_path / "broken.tflite", profile=False)


def saved(model: schema.ModelT, path: Path) -> Path:
    builder = flatbuffers.Builder()
    builder.Finish(model.Pack(builder), FILE_IDENTIFIER)
    path.write_bytes(bytes(builder.Output()))
    return path


def with_open_sizes(sizes: list[int]) -> schema.ModelT:
    model = schema.ModelT.InitFromPackedBuf(to_tflite(Network.of(Activate(input=MAP, activation="relu"))), 0)
    (graph,) = model.subgraphs
    for tensor in graph.tensors:
        tensor.shapeSignature = sizes
    return model


def lookup_of_rows() -> schema.ModelT:
    """Four rows of a table of eight, by their numbers."""
    table = np.arange(24, dtype=np.float32).reshape(8, 3)
    tensors = [
        schema.TensorT(shape=shape, type=kind, buffer=buffer, name=name.encode())
        for name, shape, kind, buffer in (
            ("table", [8, 3], schema.TensorType.FLOAT32, 1), ("ids", [1, 4], schema.TensorType.INT32, 0),
            ("rows", [1, 4, 3], schema.TensorType.FLOAT32, 0),
        )
    ]  # fmt: skip
    code = schema.BuiltinOperator.GATHER
    gather = schema.OperatorT(
        opcodeIndex=0, inputs=[0, 1], outputs=[2], builtinOptionsType=schema.BuiltinOptions.GatherOptions,
        builtinOptions=schema.GatherOptionsT(axis=0),
    )  # fmt: skip
    return schema.ModelT(
        version=3, operatorCodes=[schema.OperatorCodeT(builtinCode=code, deprecatedBuiltinCode=code, version=1)],
        subgraphs=[schema.SubGraphT(tensors=tensors, inputs=[1], outputs=[2], operators=[gather])],
        buffers=[schema.BufferT(), schema.BufferT(data=np.frombuffer(table.tobytes(), np.uint8))],
    )  # fmt: skip


def test_a_file_that_leaves_more_open_than_its_examples_is_refused(tmp_path: Path) -> None:
    backend = made()
    batches, channels, height, width = MAP
    loaded = backend.load(saved(with_open_sizes([-1, height, width, channels]), tmp_path / "one.tflite"), profile=False)
    assert len(loaded.time(2)) == 2
    with pytest.raises(Unsupported, match="input 0 leaves open more than how many examples"):
        backend.load(saved(with_open_sizes([batches, -1, -1, channels]), tmp_path / "any.tflite"), profile=False)


def test_a_file_that_takes_whole_numbers_gets_some_that_index(tmp_path: Path) -> None:
    loaded = made().load(saved(lookup_of_rows(), tmp_path / "rows.tflite"), profile=False)
    assert len(loaded.time(2)) == 2


def test_the_target_says_what_latencies_depend_on() -> None:
    targets = [
        backends.create("cpu-litert", Options(threads=threads, settings={"xnnpack": xnnpack})).target()
        for threads in (1, 2)
        for xnnpack in ("on", "off")
    ]
    assert len({target.key for target in targets}) == 4
    assert targets[0].runtime == "litert"
    assert targets[0].options["xnnpack"] == "on"
    assert targets[0].runtime_version.startswith(cpu_litert.SERIES)


def test_threads_are_the_runtime_s() -> None:
    backend = backends.create("cpu-litert", Options(threads=2))
    assert len(backend.load(canary(), profile=False).time(2)) == 2


def test_evidence_says_where_the_times_of_nodes_come_from(backend: backends.Backend) -> None:
    facts, _ = backend.watch().read(Plan())
    assert facts["node_times"] in ("XNNPACK's profiler", "LiteRT's profiler")


def test_a_setting_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidInput, match="neither on nor off"):
        backends.create("cpu-litert", Options(settings={"xnnpack": "maybe"}))


def test_the_doctor_finds_the_runtime() -> None:
    checks = {check.name: check for check in cpu_litert.doctor(Options())}
    assert checks["ai-edge-litert"].ok
    assert checks["C interface"].ok, checks["C interface"].found
