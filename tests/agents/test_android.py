"""The backend android on a simulated phone: what it measures, and what it makes of everything that can go wrong."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from phones import RunningPhone
from phones import phone as running_phone
from test_measuring import ONE_OF_EACH, lease, light

from device_agents import adb, backends
from device_agents.backends import Backend, LoadFailed, Options, Unreachable, Unsupported, android
from device_agents.bench import bench_file
from device_agents.child import Job
from device_agents.measuring import measure
from lut_db.canary import canary
from lut_db.errors import InvalidInput, MeasurementRefused
from lut_db.lowering.onnx import to_onnx
from lut_db.lowering.tflite import to_tflite
from lut_db.measurements import Failure
from lut_db.networks import Network, NetworkBuilder
from lut_db.operators import Convolution, Upsample
from lut_db.plans import Plan
from lut_db.wire import Report

TOOLS = ("benchmark_model", "onnxruntime_perf_test")
WARM_C = 27.0


@pytest.fixture(scope="module")
def simulated() -> Iterator[RunningPhone]:
    with running_phone() as running:
        yield running


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys")


@pytest.fixture
def options(simulated: RunningPhone, keys: Path) -> Iterator[Options]:
    """Those of the phone, which is healthy again afterwards."""
    simulated.control.wake()
    yield Options(settings={"devices": simulated.serial, "keys": str(keys)})
    simulated.control.clear()
    simulated.control.wake()
    simulated.control.set(temperature_c=WARM_C, gpu="full", nnapi="full", benchmark_format="new", authorize="always")


@pytest.fixture
def make(options: Options, simulated: RunningPhone):  # type: ignore[no-untyped-def]
    """Makes backends with settings."""
    made: list[Backend] = []

    def one(**settings: str) -> Backend:
        made.append(backends.create("android", replace(options, settings={**options.settings, **settings})))
        return made[-1]

    yield one
    simulated.control.clear()
    simulated.control.wake()
    for backend in made:
        backend.phone.run("settings put global low_power 0; cmd thermalservice reset")  # type: ignore[attr-defined]
        backend.phone.close()  # type: ignore[attr-defined]


def history(simulated: RunningPhone, start: str) -> list[str]:
    return [line for line in simulated.control.state()["history"] if line.startswith(start)]


def small(activation: str = "relu") -> Network:
    """Small, but not faster than the ticks of benchmark_model's timer."""
    return Network.of(Convolution(input=(1, 16, 28, 28), filters=16, kernel=(3, 3), activation=activation))


@pytest.mark.parametrize("tool", TOOLS)
def test_figures_come_with_what_the_phone_was_like(make, tool: str) -> None:  # type: ignore[no-untyped-def]
    backend = make(tool=tool, cores="6,7")
    report = measure(backend, lease(backend, light(backend, carriers=1), operators=ONE_OF_EACH[:2]))
    assert [measurement.failure for measurement in report.measurements] == [None, None]
    assert report.canary_ms is not None
    evidence = report.evidence
    assert evidence["thermal_status"] == [0, 0]
    assert evidence["battery_percent"] == [85, 85]
    assert evidence["charging"] is True
    assert evidence["cpu_model"] == "Tensor G3"
    assert evidence["clock_limit_mhz"] == {"6": [2914.0, 2914.0], "7": [2914.0, 2914.0]}
    assert all(26 < celsius < 40 for celsius in evidence["temperature_c"])
    assert evidence["cores"] == [6, 7]


def test_the_older_format_of_benchmark_model(make, simulated: RunningPhone) -> None:  # type: ignore[no-untyped-def]
    simulated.control.set(benchmark_format="old")
    backend = make(xnnpack="false")
    report = measure(backend, lease(backend, light(backend, carriers=1), operators=ONE_OF_EACH[:3]))
    assert [measurement.failure for measurement in report.measurements] == [None] * 3


def test_a_target_names_what_a_latency_depends_on(make, simulated: RunningPhone) -> None:  # type: ignore[no-untyped-def]
    target = make(cores="6,7").target()
    assert (target.device_model, target.runtime, target.accelerator) == ("Pixel 8", "tflite-benchmark_model", "cpu")
    assert target.os_build.startswith("google/shiba/shiba:15/")
    assert len(target.runtime_version) == 12
    assert (target.cores, target.clock_policy) == ((6, 7), "sched_pixel")
    other = make(tool="onnxruntime_perf_test", fixed_performance="true").target()
    assert other.runtime_version != target.runtime_version
    assert (other.runtime, other.clock_policy) == ("onnxruntime-perf_test", "fixed-performance")
    make().phone.run("cmd power set-fixed-performance-mode-enabled false")


def test_the_tool_is_pinned_to_cores(make, simulated: RunningPhone) -> None:  # type: ignore[no-untyped-def]
    make(cores="6-7").load(small(), profile=False)
    assert any("taskset c0 /data/local/tmp/benchmark_model" in line for line in history(simulated, "shell"))


def test_a_tool_from_this_computer(make, simulated: RunningPhone, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    tool = tmp_path / "tool"
    tool.write_bytes((simulated.root / "data/local/tmp/benchmark_model").read_bytes())
    backend = make(tool_file=str(tool))
    backend.ready()
    assert backend.load(small(), profile=False).time(2)[0] > 0
    assert make(tool_path="/data/local/tmp/benchmark_model").target() == backend.target()


@pytest.mark.parametrize("tool", TOOLS)
def test_a_model_file_is_measured(make, tool: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / ("model.tflite" if tool == "benchmark_model" else "model.onnx")
    file.write_bytes(to_tflite(small()) if file.suffix == ".tflite" else to_onnx(small()).SerializeToString())
    backend = make(tool=tool)
    assert bench_file(backend, file, 10, 1).latency_ms > 0
    with pytest.raises(Unsupported, match="files, not"):
        backend.load(tmp_path / "model.txt", profile=False)


def test_models_are_pushed_once(make, simulated: RunningPhone) -> None:  # type: ignore[no-untyped-def]
    network = small("sigmoid")
    make().load(network, profile=False)
    before = len(history(simulated, "push"))
    make().load(network, profile=True)
    make().load(network, profile=False)
    assert len(history(simulated, "push")) == before


@pytest.mark.parametrize("tool", TOOLS)
def test_files_on_a_phone_are_called_by_their_hashes(make, simulated: RunningPhone, tool: str) -> None:  # type: ignore[no-untyped-def]
    backend = make(tool=tool)
    before = len(history(simulated, "push"))
    measure(backend, lease(backend, light(backend, carriers=2), operators=ONE_OF_EACH[5:9]))
    pushed = history(simulated, "push")[before:]
    assert pushed
    for line in pushed:
        assert re.fullmatch(rf"push {adb.FOLDER}/models/\.[0-9a-f]{{64}}\.(tflite|onnx)\.part", line), line
    for path in (simulated.root / adb.FOLDER[1:] / "models").iterdir():
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem


def test_samples_are_raw_where_the_tool_tells_them(make) -> None:  # type: ignore[no-untyped-def]
    assert len(make(tool="onnxruntime_perf_test").load(small(), profile=False).time(5)) == 5
    loaded = make().load(small(), profile=True)
    assert len(loaded.time(5)) == 1
    loaded.time(5)
    assert loaded.node_times().total_ms.shape == (2, 1)


def test_a_hot_phone_is_not_ready_until_it_has_cooled(make, simulated: RunningPhone) -> None:  # type: ignore[no-untyped-def]
    backend = make(max_temperature_c="35")
    backend.ready()
    simulated.control.heat(60)
    with pytest.raises(Unreachable, match="throttles"):
        backend.ready()
    simulated.control.heat(40)
    with pytest.raises(Unreachable, match="too hot"):
        backend.ready()
    simulated.control.heat(WARM_C + (34.5 - WARM_C) / 0.7)  # at the skin below the limit, but only just
    with pytest.raises(Unreachable, match="too hot"):
        backend.ready()
    simulated.control.heat(WARM_C)
    backend.ready()


def test_what_a_phone_measured_while_it_throttled_is_refused(make, simulated: RunningPhone) -> None:  # type: ignore[no-untyped-def]
    backend = make()
    backend.ready()
    backend.phone.run("cmd thermalservice override-status 2")
    report = measure(backend, lease(backend, light(backend, context="isolated", carriers=1), operators=ONE_OF_EACH[:1]))
    assert [m.failure.cause for m in report.measurements if m.failure] == ["hot"]
    assert report.canary_ms is None
    assert report.evidence["thermal_status"] == [2, 2]


def test_a_phone_that_saves_its_battery_is_not_ready(make) -> None:  # type: ignore[no-untyped-def]
    backend = make()
    backend.phone.run("settings put global low_power 1")
    with pytest.raises(Unreachable, match="saves its battery"):
        backend.ready()


def test_a_phone_without_the_tool_is_not_ready(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(Unreachable, match="nightly builds"):
        make(tool_path="/data/local/tmp/missing").ready()


@pytest.mark.parametrize("accelerator", ["gpu", "nnapi"])
def test_accelerators_must_take_the_whole_graph(make, simulated: RunningPhone, accelerator: str) -> None:  # type: ignore[no-untyped-def]
    backend = make(accelerator=accelerator)
    assert backend.target().accelerator == accelerator
    assert backend.load(small(), profile=False).time(2)[0] > 0
    simulated.control.set(**{accelerator: "partial"})
    with pytest.raises(Unsupported, match=r"Disallowed CPU fallback|did not run the whole graph"):
        backend.load(small(), profile=False)
    with pytest.raises(Unsupported):
        backend.load(small(), profile=True)


def test_nnapi_through_onnx_runtime(make, simulated: RunningPhone) -> None:  # type: ignore[no-untyped-def]
    backend = make(tool="onnxruntime_perf_test", accelerator="nnapi")
    backend.load(small(), profile=False)
    simulated.control.set(nnapi="none")
    with pytest.raises(Unsupported, match="fallback to CPU EP"):
        backend.load(small(), profile=False)


@pytest.mark.parametrize("tool", TOOLS)
def test_runs_that_go_wrong(make, simulated: RunningPhone, tool: str) -> None:  # type: ignore[no-untyped-def]
    backend = make(tool=tool)
    loaded = backend.load(small(), profile=False)
    simulated.control.fault("garbage")
    assert loaded.time(3)[0] > 0  # once is no more than a start lost
    simulated.control.fault("garbage", times=2)
    with pytest.raises(LoadFailed, match="count=7 curr="):
        loaded.time(3)
    simulated.control.fault("crash-run", times=2)
    with pytest.raises(LoadFailed, match="signal 11"):
        loaded.time(3)
    simulated.control.fault("fail-run")
    backend.load(small(), profile=False)
    simulated.control.fault("fail-run", times=2)
    with pytest.raises(Unsupported, match="exit code"):
        backend.load(small(), profile=False)
    simulated.control.fault("crash-run", times=2)
    with pytest.raises(LoadFailed, match="signal 11") as crashed:
        backend.load(small(), profile=False)
    assert crashed.value.cause == "crashed"
    simulated.control.fault("drop-run")
    with pytest.raises(Unreachable):
        loaded.time(3)
    assert loaded.time(3)[0] > 0


def test_a_run_that_takes_too_long_is_killed(make, simulated: RunningPhone) -> None:  # type: ignore[no-untyped-def]
    backend = make(timeout_s="3")
    loaded = backend.load(small(), profile=False)
    simulated.control.set(speed=1e5)
    try:
        with pytest.raises(LoadFailed) as slow:
            loaded.time(100)
        assert slow.value.cause == "timed_out"
    finally:
        simulated.control.set(speed=1)
    assert "benchmark_model" not in backend.phone.run("ps -A -o ARGS | grep -v grep").output
    simulated.control.fault("hang-run")
    with pytest.raises(LoadFailed, match="killed after 3 s"):
        loaded.time(1)
    assert loaded.time(1)[0] > 0


@pytest.mark.parametrize("tool", TOOLS)
def test_what_fails_while_it_is_timed_fails_alone(make, simulated: RunningPhone, tool: str) -> None:  # type: ignore[no-untyped-def]
    backend = make(tool=tool)
    operators = [Convolution(input=(1, 8, 28, 28), filters=filters, kernel=(3, 3)) for filters in (21, 22, 23)]
    bad = Network.of(operators[1])
    content = to_tflite(bad) if tool == "benchmark_model" else to_onnx(bad).SerializeToString()
    asked = lease(backend, light(backend, context="isolated", carriers=1), operators=tuple(operators))

    def progress(text: str) -> None:
        if text.startswith("timing"):
            simulated.control.fault("crash-run", times=2, match=hashlib.sha256(content).hexdigest())

    report = measure(backend, asked, progress)
    assert [m.failure and m.failure.cause for m in report.measurements] == [None, "crashed", None]


def test_a_canary_that_fails_holds_nothing_against_operators(make, simulated: RunningPhone) -> None:  # type: ignore[no-untyped-def]
    backend = make()
    asked = lease(backend, light(backend, context="isolated", carriers=1), operators=ONE_OF_EACH[:2])
    content = to_tflite(canary())
    simulated.control.fault("crash-run", times=100, match=hashlib.sha256(content).hexdigest())
    report = measure(backend, asked)
    assert [m.failure and m.failure.cause for m in report.measurements] == ["unreachable"] * 2
    assert "canary" in str(report.measurements[0].failure)


def test_a_folder_that_is_cleared_is_filled_again(make, simulated: RunningPhone, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    tool = tmp_path / "tool"
    tool.write_bytes((simulated.root / "data/local/tmp/benchmark_model").read_bytes() + b"\n")
    backend = make(tool_file=str(tool))
    loaded = backend.load(small(), profile=False)
    backend.phone.check(f"rm -rf {adb.FOLDER}/models/*")
    with pytest.raises(Unreachable, match="no longer there"):
        loaded.time(1)
    backend.phone.check(f"rm -rf {adb.FOLDER}/tools")
    with pytest.raises(Unreachable):
        loaded.time(1)
    backend.ready()
    assert backend.load(small(), profile=False).time(1)[0] > 0


def test_another_library_beside_the_tool_is_another_target(make, simulated: RunningPhone) -> None:  # type: ignore[no-untyped-def]
    backend = make(tool="onnxruntime_perf_test")
    alone = backend.target()
    versions = []
    library = "/data/local/tmp/libonnxruntime.so"
    try:
        for content in ("one", "another"):
            backend.phone.check(f"echo {content} > {library}")
            backend.ready()
            versions.append(backend.target().runtime_version)
    finally:
        backend.phone.check(f"rm {library}")
    assert len({alone.runtime_version, *versions}) == 3


def test_a_profile_that_no_cut_makes_plain_is_refused(make, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    def added_up(*_: object, **__: object) -> None:
        raise android._AddedUp(frozenset())

    monkeypatch.setattr(android, "_tflite_times", added_up)
    with pytest.raises(Unsupported, match="adds up"):
        make().load(small(), profile=True)


def test_an_optimised_model_that_is_cut_off(make, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    backend = make(tool="onnxruntime_perf_test")
    whole = backend.phone.get
    monkeypatch.setattr(android.ort_profile, "owners_by_name", lambda *_: None)
    assert backend.load(small(), profile=True).time(1)[0] > 0
    monkeypatch.setattr(backend.phone, "get", lambda path: whole(path)[:-20])
    with pytest.raises(LoadFailed, match="cannot be read"):
        backend.load(small("hard_swish"), profile=True)


def test_energy_where_a_phone_counts_its_rails(make, simulated: RunningPhone) -> None:  # type: ignore[no-untyped-def]
    backend = make(cores="7")
    operator = Convolution(input=(1, 32, 56, 56), filters=64, kernel=(3, 3))
    asked = lease(backend, light(backend, context="isolated", carriers=1), operators=(operator,))
    assert "does not tell" in str(measure(backend, asked).evidence["energy"])
    simulated.control.set(watts=8.0)
    try:
        report = measure(backend, asked)
    finally:
        simulated.control.set(watts=0.0)
    (row,) = report.measurements
    assert "S2M_VDD_CPUCL2" in str(report.evidence["energy"])
    assert row.energy_j is not None
    assert row.latency_ms is not None
    # One thread of four that make full load draws two watts, for the time that runs take beside what else is done here.
    assert 0.3 < row.energy_j / (2.0 * row.latency_ms / 1e3) < 10


@pytest.mark.parametrize(("fault", "after"), [("drop-push", 500.0), ("drop-run", 0.05)])
def test_a_phone_that_is_lost_in_a_lease_serves_the_next(
    make,
    simulated: RunningPhone,
    fault: str,
    after: float,  # type: ignore[no-untyped-def]
) -> None:
    operator = Convolution(input=(1, 16, 28, 28), filters=int(after * 4) % 61 + 3, kernel=(3, 3))  # not pushed before
    backend = make()
    backend.ready()
    asked = lease(backend, light(backend, context="isolated", carriers=1), operators=(operator,))
    simulated.control.fault(fault, after=after)
    report = measure(backend, asked)
    assert [m.failure.cause for m in report.measurements if m.failure] == ["unreachable"]
    assert report.canary_ms is None
    report = measure(backend, asked)
    assert report.measurements[0].failure is None


def test_a_phone_that_is_gone_is_not_ready_and_needs_no_hand(make, simulated: RunningPhone) -> None:  # type: ignore[no-untyped-def]
    backend = make()
    backend.ready()
    simulated.control.die()
    with pytest.raises(Unreachable):
        backend.ready()
    assert backend.target().device_model == "Pixel 8"  # as it was when it was last ready
    simulated.control.wake()
    backend.ready()


def test_storage_that_is_full(make, simulated: RunningPhone) -> None:  # type: ignore[no-untyped-def]
    backend = make()
    backend.phone.run(f"rm -rf {adb.FOLDER}")
    simulated.control.fault("no-space", after=100)
    with pytest.raises(LoadFailed, match="no space") as full:
        backend.load(small("hard_swish"), profile=False)
    assert full.value.cause == "out_of_memory"
    backend.load(small("hard_swish"), profile=False)


def test_storage_that_its_own_models_filled_is_freed(keys: Path) -> None:
    with running_phone("--storage-mib", "40") as filled:
        backend = backends.create("android", Options(settings={"devices": filled.serial, "keys": str(keys)}))
        assert isinstance(backend, android.Android)
        backend.ready()
        model, other = f"{adb.FOLDER}/models/{'0' * 64}.onnx", f"{adb.FOLDER}/other"
        for path in (model, other):
            backend.phone.check(f"head -c 30000000 /dev/zero > {path}")
            assert (backend.phone.free_bytes() or 0) < adb.RESERVE
            if path == model:
                backend.ready()
        with pytest.raises(adb.NoSpace, match="bytes of storage are free"):
            backend.ready()
        assert backend.phone.run(f"ls {model}").code != 0
        backend.phone.close()


def test_a_clock_policy_that_changes_meanwhile_is_refused(make) -> None:  # type: ignore[no-untyped-def]
    backend = make()
    watch = backend.watch()
    backend.phone.run("cmd power set-fixed-performance-mode-enabled true")
    assert watch.read(Plan())[1] is None, "nobody asked for it"
    fixed = make(fixed_performance="true").watch()
    facts, refusal = fixed.read(Plan())
    assert (facts["clock_policy"], refusal) == ("fixed-performance", None)
    fixed.before = replace(fixed.before, fixed_performance=False)
    refusal = fixed.read(Plan())[1]
    assert refusal.cause == "drift"
    assert "is fixed-performance now" in refusal.message
    backend.phone.run("cmd power set-fixed-performance-mode-enabled false")


def test_garbage_in_a_lease_becomes_a_failure_that_keeps_it(make, options: Options, tmp_path: Path, simulated) -> None:  # type: ignore[no-untyped-def]
    backend = make()
    asked = lease(backend, light(backend, context="isolated", carriers=1), operators=ONE_OF_EACH[:1])
    (tmp_path / "job.json").write_text(Job(backend="android", options=options, lease=asked).model_dump_json())

    def serve() -> Failure | None:
        with (tmp_path / "log").open("w") as log, subprocess.Popen(
            [sys.executable, "-m", "device_agents.child", str(tmp_path)], stdin=subprocess.PIPE, stdout=log, stderr=log
        ) as child:  # fmt: skip
            assert child.wait() == 0, (tmp_path / "log").read_text()
        return Report.model_validate_json((tmp_path / "report.json").read_bytes()).measurements[0].failure

    simulated.control.fault("garbage", times=50)
    failure = serve()
    assert failure is not None
    assert failure.cause == "unreachable", "not even the canary runs"
    assert "count=7 curr=" in failure.message
    simulated.control.clear()
    model = hashlib.sha256(to_tflite(Network.of(ONE_OF_EACH[0]))).hexdigest()
    simulated.control.fault("garbage", times=50, match=model)
    failure = serve()
    assert failure is not None
    assert failure.cause == "crashed"
    assert "count=7 curr=" in failure.message
    simulated.control.clear()
    assert serve() is None


def test_a_hot_bench_is_refused(make, simulated: RunningPhone, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    file = tmp_path / "model.tflite"
    file.write_bytes(to_tflite(small()))
    backend = make()
    ready = backend.ready
    backend.ready = lambda: (ready(), backend.phone.run("cmd thermalservice override-status 3"))  # type: ignore[method-assign]
    with pytest.raises(MeasurementRefused, match="throttles"):
        bench_file(backend, file, 5, 1)


def test_what_xnnpack_does_not_take_splits_the_graph(make) -> None:  # type: ignore[no-untyped-def]
    build = NetworkBuilder()
    tensor = build.input((1, 8, 8, 8))
    for _ in range(2):
        tensor = build.add(Convolution(input=build.shape(tensor), filters=8, kernel=(1, 1)), tensor)
        tensor = build.add(Upsample(input=build.shape(tensor), scale=2), tensor)
    loaded = make().load(build.network(), profile=True)
    loaded.time(3)
    times = loaded.node_times()
    assert times.total_ms.shape == (1, 4)
    assert (times.total_ms > 0).all()


NOTHING = dict.fromkeys(("properties", "tool", "fixed", "cores", "zones", "thermal", "battery", "saver"), "")


def test_a_phone_that_says_nothing_of_itself() -> None:
    state = android._read_state(NOTHING)
    assert (state.tool, state.cores, state.temperature_c, state.thermal_status, state.charging) == (
        "",
        {},
        None,
        None,
        None,
    )
    assert android._heat(state, 40) is None


def test_temperatures_in_whatever_unit_and_place() -> None:
    zones = "/sys/class/thermal/thermal_zone0/type:{}\n/sys/class/thermal/thermal_zone0/temp:{}\n"
    for kind, reading, celsius in (("skin", "41500", 41.5), ("battery", "415", 41.5), ("pm8998", "41", 41.0)):
        state = android._read_state({**NOTHING, "zones": zones.format(kind, reading)})
        assert state.temperature_c == celsius
        assert "too hot" in (android._heat(state, 40) or "")
    assert android._read_state({**NOTHING, "zones": zones.format("skin", "-273000")}).temperature_c is None
    cached = (
        "Thermal Status: 0\nCached temperatures:\n\tTemperature{mValue=80.0, mType=3, mName=skin, mStatus=3}\n"
        "Current temperatures from HAL:\n\tTemperature{mValue=26.274, mType=3, mName=skin, mStatus=0}\n"
        "\tTemperature{mValue=4200.0, mType=3, mName=odd, mStatus=0}\n"
        "\tTemperature{mValue=62.5, mType=0, mName=CPU0, mStatus=0}\nCurrent cooling devices from HAL:\n"
        "\tCoolingDevice{mValue=88, mType=3, mName=wrong}\n"
    )
    state = android._read_state({**NOTHING, "thermal": cached})
    assert (state.temperature_c, state.cpu_temperature_c, state.thermal_status) == (26.274, 62.5, 0)


def test_one_process_serves_several_phones(options: Options) -> None:
    several = replace(options, settings={**options.settings, "devices": "a:1, usb:2"})
    assert [each.settings["devices"] for each in backends.devices("android", several)] == ["a:1", "usb:2"]
    with pytest.raises(InvalidInput, match="one phone"):
        backends.create("android", several)


def test_a_build_that_cannot_be_told_to_use_fp16_is_refused(make, simulated: RunningPhone) -> None:  # type: ignore[no-untyped-def]
    simulated.control.set(benchmark_format="old")
    with pytest.raises(Unsupported, match="no flag --xnnpack_force_fp16"):
        make(precision="fp16").load(small(), profile=False)


@pytest.mark.parametrize(
    ("settings", "precision"),
    [
        ({}, "fp32"), ({"precision": "int8"}, "int8"), ({"precision": "fp16"}, "fp16"),
        ({"precision": "int8", "tool": "onnxruntime_perf_test"}, "int8"),
        ({"precision": "int8", "accelerator": "gpu"}, "int8"), ({"precision": "int8", "accelerator": "nnapi"}, "int8"),
    ],
)  # fmt: skip
def test_a_precision_is_part_of_the_target(make, settings: dict[str, str], precision: str) -> None:  # type: ignore[no-untyped-def]
    backend = make(**settings)
    assert backend.target().precision == precision
    assert backend.load(small(), profile=False).time(2)


@pytest.mark.parametrize(
    "settings",
    [
        {"tool": "abacus"}, {"accelerator": "abacus"}, {"accelerator": "gpu", "tool": "onnxruntime_perf_test"},
        {"precision": "fp16", "xnnpack": "false"}, {"precision": "fp16", "tool": "onnxruntime_perf_test"},
        {"precision": "fp8"}, {"cores": "all"}, {"max_temperature_c": "warm"}, {"timeout_s": "-1"},
        {"xnnpack": "maybe"}, {"tool_path": "/x; reboot"}, {"folder": "relative"}, {"devices": ""},
        {"tool_path": "/x", "tool_file": "y"},
    ],
)  # fmt: skip
def test_settings_that_make_no_sense(options: Options, settings: dict[str, str]) -> None:
    with pytest.raises(InvalidInput, match=r"settings\."):
        backends.create("android", replace(options, settings={**options.settings, **settings}))


@pytest.mark.parametrize("tool", TOOLS)
def test_the_doctor_of_a_healthy_phone(options: Options, tool: str) -> None:
    settings = {**options.settings, "tool": tool, "fixed_performance": "true", "cores": "6,7"}
    checks = list(backends.module("android").doctor(replace(options, settings=settings)))
    assert [check for check in checks if not check.ok] == []
    assert {"adb-shell", "key"} < {check.name for check in checks}
    assert any("Pixel 8" in check.found for check in checks)


def test_the_doctor_of_a_phone_that_lacks_everything(options: Options, simulated: RunningPhone, make) -> None:  # type: ignore[no-untyped-def]
    make().phone.run("settings put global low_power 1")
    simulated.control.heat(60)
    settings = {**options.settings, "tool_path": "/data/local/tmp/missing", "cores": "99"}
    lacks = [check for check in backends.module("android").doctor(replace(options, settings=settings)) if not check.ok]
    assert [check.name.partition(": ")[2] for check in lacks] == [
        "benchmark_model", "temperature", "clock policy", "cores", "battery",
    ]  # fmt: skip
    assert all(check.remedy for check in lacks)
    simulated.control.die()
    (lack,) = (check for check in backends.module("android").doctor(options) if not check.ok)
    assert "adb tcpip 5555" in lack.remedy


def test_nothing_computes_on_a_phone(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(NotImplementedError, match="prints times"):
        make().compute(small(), [], [])
