"""The command `device-agent`: what it takes, and what it says to what it does not take."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tables_kit import TARGET
from typer.testing import CliRunner

from device_agents import backends, cli, evidence, ort_session
from device_agents.backends import Options
from device_agents.cli import _device_name, _options, app
from lut_db.canary import canary
from lut_db.errors import InvalidInput
from lut_db.lowering.onnx import to_onnx
from lut_db.targets import Device

BACKEND = "cpu-onnxruntime"
ALLOWED = sorted(os.sched_getaffinity(0))


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, arguments)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


@pytest.mark.parametrize(
    ("text", "cores"),
    [("0", {0}), ("2,3", {2, 3}), ("4-7", {4, 5, 6, 7}), ("0,2-3", {0, 2, 3}), ("0-6:2", {0, 2, 4, 6}), ("1-1", {1})],
)
def test_cores_are_told_as_taskset_takes_them(monkeypatch: pytest.MonkeyPatch, text: str, cores: set[int]) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert _options(1, text, []) == Options(cores=tuple(sorted(cores)))
    assert _options(1, "any", []) == Options()
    assert _options(1, "any", [], energy=False) == Options(energy=False)


def test_no_two_agents_of_a_host_have_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A service takes two agents of one name for one that was started again."""
    monkeypatch.setattr(cli.platform, "node", lambda: "lab of many_words.example.org")
    each = [
        Options(), Options(threads=2), Options(cores=(0, 1)), Options(settings={"precision": "int8"}),
        *(Options(settings={"gpu": gpu}) for gpu in ("0", "1")), Options(settings={"gpu": "1", "precision": "fp16"}),
        *(Options(settings={"devices": one}) for one in ("192.168.100.107:5555", "192.168.100.108:5555", "usb:1A2B")),
    ]  # fmt: skip
    names = [_device_name(backend, options) for options in each for backend in ("cuda-onnxruntime", "cpu-litert")]
    assert len(set(names)) == len(names)
    for name in names:
        assert Device(name=name, targets=(TARGET,)).name == name
    assert _device_name("android", each[-1]).endswith("-android-1A2B")
    assert _device_name("android", each[-1], "shelf") == "shelf", "as it is told"
    assert _device_name("android", each[-1], "shelf", several=True) == "shelf-1A2B", "wherever it stands in the list"
    assert _device_name("cpu-litert", Options(cores=evidence.default_cores(1))) == _device_name("cpu-litert", Options())


@pytest.mark.parametrize("text", ["", "a", "-1", "3-2", "0-2:0", "0:2", "1,,2", "1;2", "0x1", "0-99999999999"])
def test_what_is_no_list_of_cores(text: str) -> None:
    with pytest.raises(InvalidInput, match="no list of cores"):
        _options(1, text, [])


@pytest.mark.skipif(len(ALLOWED) < 2, reason="this process may use one core only")
@pytest.mark.parametrize("backend", ["cpu-onnxruntime", "cpu-litert"])
def test_one_thread_moves_from_core_to_core(backend: str) -> None:
    def moving(threads: int, *cores: int) -> backends.Movable:
        found = backends.create(backend, Options(threads=threads, cores=cores))
        assert isinstance(found, backends.Movable)
        return found

    last, first = ALLOWED[-1], ALLOWED[0]
    two = moving(1, last, first)
    try:
        went = []
        for _ in range(3):
            assert two.move()
            went.append(os.sched_getaffinity(0))
        assert went == [{last}, {first}, {last}]
        assert not moving(1, first).move(), "there is no other"
        assert not moving(1).move(), "the system chooses"
        assert not moving(2, last, first).move(), "both are needed"
        assert os.sched_getaffinity(0) == {last}
        with pytest.raises(backends.Unreachable, match="core 4096"):
            moving(1, last, 4096).move()
    finally:
        os.sched_setaffinity(0, ALLOWED)


def test_cores_must_be_had_and_suffice() -> None:
    with pytest.raises(InvalidInput, match="may not use core 4095"):
        _options(1, f"{ALLOWED[0]},4095", [])
    with pytest.raises(InvalidInput, match="2 threads on 1 cores"):
        _options(2, str(ALLOWED[0]), [])


def test_the_doctor_sees_settings_that_an_agent_would_not_take() -> None:
    code, said = run("doctor", BACKEND, "--setting", "graph_optimization=most")
    assert code == 1
    assert "LACK  settings" in said
    code, said = run("doctor", BACKEND, "--setting", "speed=high")
    assert code == 1
    assert "no setting 'speed'" in said
    _, said = run("doctor", BACKEND, "--setting", "precision=int8")
    assert "ok    settings: precision=int8" in said


def test_a_file_is_measured_without_a_service(tmp_path: Path) -> None:
    model = tmp_path / "canary.onnx"
    model.write_bytes(to_onnx(canary()).SerializeToString())
    arguments = ["bench", BACKEND, str(model), "--runs", "20", "--sessions", "2", "--load-tolerance", "64"]
    huge = ("--setting", "huge_pages=off")  # the command would start itself again
    code, said = run(*arguments, *huge, "--cores", "any", "--json")
    assert code == 0, said
    found = json.loads(said)
    assert found["runs"] <= 40
    assert 0 < found["p5_ms"] <= found["p95_ms"]
    code, said = run(*arguments, *huge, "--cores", "any", "--setting", "precision=int8")
    assert code == 2
    assert "the precision that it was written in" in said


def file(tmp_path: Path, elements: int, shape: list[int | str]) -> Path:
    given = helper.make_tensor_value_info("given", elements, shape)
    made = helper.make_tensor_value_info("made", TensorProto.INT64, None)
    graph = helper.make_graph([helper.make_node("Shape", ["given"], ["made"])], "graph", [given], [made])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("elements", "shape", "told"),
    [
        (TensorProto.FLOAT, ["N", 3, "H", "W"], "leaves sizes of input 'given' open"),
        (TensorProto.STRING, [1], "nothing can be made up for input 'given'"),
    ],
)
def test_inputs_that_nobody_can_make_up(tmp_path: Path, elements: int, shape: list[int | str], told: str) -> None:
    path = file(tmp_path, elements, shape)
    options = ("--setting", "huge_pages=off", "--cores", "any", "--load-tolerance", "64")
    code, said = run("bench", BACKEND, str(path), *options)
    assert code == 2
    assert told in said


def test_an_open_batch_is_one_and_integers_are_zeros(tmp_path: Path) -> None:
    session = ort_session.open_session(
        str(file(tmp_path, TensorProto.INT64, ["N", 7])), ort_session.session_options(1, "all")
    )
    (given,) = ort_session.made_up(session).values()
    assert given.dtype == np.int64
    assert given.tolist() == [[0] * 7]


def test_a_signal_that_comes_while_one_is_answered_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answered too, it would wait for ever for what the first one holds."""
    told = []

    def stop(agent: cli.Agent) -> None:
        told.append(agent)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(cli.Agent, "stop", stop)
    monkeypatch.setattr(cli, "serve_all", lambda agents: signal.raise_signal(signal.SIGTERM))
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        cli._serve("cpu-onnxruntime", "http://127.0.0.1:9", None, Options(), max_operators=1)
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    assert len(told) == 1
