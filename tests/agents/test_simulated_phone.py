"""A simulated phone, seen by two clients that know nothing of it: adb-shell and Debian's adb."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Self

import psutil
import pytest
from adb_shell import exceptions
from adb_shell.adb_device import AdbDeviceTcp
from adb_shell.auth.keygen import keygen
from adb_shell.auth.sign_pythonrsa import PythonRSASigner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from phones import RunningPhone, phone

from device_agents.simulated_phone import phone as state
from device_agents.simulated_phone import programs, protocol, services
from device_agents.simulated_phone.control import Refused
from device_agents.simulated_phone.phone import Climate, Fault, Identity, Phone
from device_agents.simulated_phone.protocol import AUTH, CLSE, CNXN, OKAY, OPEN, WRTE, Packet, ProtocolError
from device_agents.simulated_phone.sandbox import ANDROID_PATH, Sandbox
from lut_db.errors import InvalidInput
from lut_db.lowering.onnx import to_onnx
from lut_db.lowering.tflite import to_tflite
from lut_db.networks import Network
from lut_db.operators import Convolution

TMP = "/data/local/tmp"
BENCHMARK = f"{TMP}/benchmark_model --graph={TMP}/conv.tflite --min_secs=0 --warmup_min_secs=0 --num_threads=1"
PERF_TEST = "onnxruntime_perf_test -I -e cpu -m times -x 1 -y 1 -S 0"
PATIENCE_S = 120.0
GONE = (
    OSError, exceptions.AdbConnectionError, exceptions.AdbTimeoutError, exceptions.TcpTimeoutException,
    exceptions.InvalidCommandError, exceptions.AdbCommandFailureException,
)  # fmt: skip


def wait_until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"in vain waited: {what}"
        time.sleep(0.02)


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# --- framing -------------------------------------------------------------------------------------------------------

WORD = st.integers(0, 0xFFFFFFFF)
VERSIONS = (protocol.WITH_CHECKSUM, protocol.WITHOUT_CHECKSUM)


@given(
    command=st.sampled_from(sorted(protocol.COMMANDS)), arg0=WORD, arg1=WORD, payload=st.binary(max_size=5000),
    version=st.sampled_from(VERSIONS),
)  # fmt: skip
def test_packets_survive_the_wire(command: int, arg0: int, arg1: int, payload: bytes, version: int) -> None:
    packet = Packet(command, arg0, arg1, payload)
    wire = protocol.pack(packet, version)
    header = protocol.unpack_header(wire[:24], protocol.MAX_PAYLOAD_BYTES)
    assert header.length == len(payload)
    assert protocol.complete(header, wire[24:], version) == packet
    assert protocol.COMMANDS[command] in str(packet)


@given(payload=st.binary(min_size=1, max_size=300), position=st.integers(0, 299))
def test_what_is_damaged_is_refused(payload: bytes, position: int) -> None:
    wire = bytearray(protocol.pack(Packet(WRTE, 1, 2, payload), protocol.WITH_CHECKSUM))
    header = protocol.unpack_header(bytes(wire[:24]), 1000)
    wire[24 + position % len(payload)] ^= 0x5A
    with pytest.raises(ProtocolError, match="checksum"):
        protocol.complete(header, bytes(wire[24:]), protocol.WITH_CHECKSUM)
    with pytest.raises(ProtocolError, match="allowed"):
        protocol.unpack_header(bytes(wire[:24]), len(payload) - 1)
    wire[20 + position % 4] ^= 1  # the magic
    with pytest.raises(ProtocolError, match="no header"):
        protocol.unpack_header(bytes(wire[:24]), 1000)


@given(
    packets=st.lists(st.tuples(st.integers(0, 5), st.binary(max_size=200)), max_size=8),
    cuts=st.lists(st.integers(0, 2000), max_size=12),
)
def test_shell_packets_arrive_in_any_pieces(packets: list[tuple[int, bytes]], cuts: list[int]) -> None:
    wire = b"".join(protocol.shell_packet(kind, data) for kind, data in packets)
    edges = sorted({0, len(wire), *(cut % (len(wire) + 1) for cut in cuts)})
    parser = protocol.ShellParser()
    found = [one for begin, end in pairwise(edges) for one in parser.feed(wire[begin:end])]
    assert found == packets


@pytest.fixture(scope="module")
def key_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "adbkey"
    keygen(str(path))
    return path


@pytest.fixture(scope="module")
def signer(key_path: Path) -> PythonRSASigner:
    return PythonRSASigner.FromRSAKeyPath(str(key_path))


def test_signatures_are_verified(signer: PythonRSASigner, tmp_path: Path) -> None:
    line = signer.GetPublicKey()
    line = line.encode() if isinstance(line, str) else line
    token = random.Random(0).randbytes(protocol.TOKEN_BYTES)
    signature = signer.Sign(token)
    key = protocol.public_key(line + b"\0")
    assert protocol.signed(key, token, signature)
    assert not protocol.signed(key, token[::-1], signature)
    assert not protocol.signed(key, token, signature[::-1])
    keygen(str(tmp_path / "other"))
    other = protocol.public_key((tmp_path / "other.pub").read_bytes())
    assert not protocol.signed(other, token, signature)
    for nonsense in (b"", b"%%%", b"AAAA", line[:100]):
        with pytest.raises(ProtocolError):
            protocol.public_key(nonsense)


# --- the phone's state ---------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_load_heats_and_heat_throttles() -> None:
    clock = Clock()
    one = Phone(climate=Climate(ambient_c=25, rise_c=40, seconds=10, throttle_c=45), clock=clock)
    key = object()
    assert one.khz(0) == state.MIN_KHZ
    one.begin_load(key, 4)
    assert one.khz(7) == state.BIG_MAX_KHZ
    clock.now = 10.0
    one.warm()
    assert one.temperature_c == pytest.approx(25 + 40 * (1 - 2.718281828**-1), abs=1e-6)
    assert one.thermal_status == 2
    assert one.pace() == pytest.approx(1 / (1 - 0.05 * (one.temperature_c - 45)))
    clock.now = 1000.0
    one.warm()
    assert one.thermal_status == 5
    assert one.pace() == pytest.approx(1 / state.LOWEST_CLOCK)
    one.end_load(key)
    clock.now = 2000.0
    one.warm()
    assert one.temperature_c == pytest.approx(25)
    assert one.pace() == 1.0


def test_fixed_performance_is_slower_and_steadier() -> None:
    one = Phone(climate=Climate(speed=2.0))
    assert one.tool(["cmd", "power", "set-fixed-performance-mode-enabled", "true"]).code == 0
    assert one.pace() == pytest.approx(2 / state.FIXED_CLOCK)
    one.set_temperature(one.climate.throttle_c + 5)
    assert one.pace() == pytest.approx(2 / state.FIXED_CLOCK)
    old = Phone(identity=Identity(api_level=29))
    assert old.tool(["cmd", "power", "set-fixed-performance-mode-enabled", "true"]).code != 0


def test_what_cannot_be_is_refused() -> None:
    for make in (
        lambda: Identity(little_cores=0, big_cores=0), lambda: Identity(little_cores=40), lambda: Identity(api_level=3),
        lambda: Climate(speed=0), lambda: Climate(noise=2), lambda: Climate(seconds=0), lambda: Fault("explode"),
        lambda: Fault("hang", times=0), lambda: Fault.parse("hang:often=2"), lambda: Fault.parse("hang:times=x"),
    ):  # fmt: skip
        with pytest.raises(InvalidInput):
            make()
    assert Fault.parse("drop-push:times=2,after=4096,match=/data") == Fault("drop-push", 2, 4096.0, 0.0, "/data")


def test_faults_are_counted_down() -> None:
    one = Phone(faults=[Fault("hang", times=2, match="sleep")])
    assert one.take("hang", "echo") is None
    assert one.take("hang", "sleep 1") is not None
    assert one.take("hang", "sleep 2") is not None
    assert one.take("hang", "sleep 3") is None


def make_sandbox(folder: Path) -> Sandbox:
    return Sandbox(folder, Phone(), {"benchmark_model": f"{TMP}/benchmark_model"}, False)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(st.sampled_from(["..", ".", "", "data", "local", "tmp", "up", "out", "loop", "x"]), max_size=12))
def test_no_path_leads_out_of_the_phone(tmp_path: Path, parts: list[str]) -> None:
    sandbox = make_sandbox(tmp_path / "phone")
    folder = sandbox.root / "data/local/tmp"
    for name, target in (("up", "../../../../../.."), ("out", "/etc/../../"), ("loop", "loop")):
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(target)
    path = f"{TMP}/" + "/".join(parts)
    try:
        found = sandbox.resolve(path)
    except OSError:
        found = sandbox.root  # links in a circle
    assert found == sandbox.root or sandbox.root in found.parents
    assert ".." not in found.parts


@given(text=st.text(alphabet="/tmpx-ab ", max_size=80), cuts=st.lists(st.integers(0, 200), max_size=10))
def test_the_folders_name_is_erased_however_it_comes(text: str, cuts: list[int]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        sandbox = Sandbox.__new__(Sandbox)
        sandbox.root, sandbox.isolated = Path(folder), False
        wire = f"{text}{folder}/data/x {folder}\n{text}{folder}".encode()
        edges = sorted({0, len(wire), *(cut % len(wire) for cut in cuts)})
        erase = sandbox.eraser()
        shown = b"".join(erase(wire[begin:end], False) for begin, end in pairwise(edges))
        assert shown + erase(b"", True) == f"{text}/data/x /\n{text}/".encode()


def test_android_paths_in_commands() -> None:
    def rewritten(command: str) -> str:
        return ANDROID_PATH.sub("ROOT/", command)

    assert rewritten("cat /data/x --a=/sys/b '/sdcard'") == "cat ROOT/data/x --a=ROOT/sys/b 'ROOT/sdcard'"
    for left in ("cat /proc/cpuinfo", "ls a/data /database", "echo $HOME/data", "ls /dev/null ~/data"):
        assert rewritten(left) == left


@pytest.mark.parametrize(
    ("values", "old", "new"),
    [
        ([], "count=0", "count=0"),
        ([1357602], "count=1 curr=1357602", "count=1 curr=1357602 p5=1357602 median=1357602 p95=1357602"),
        ([7, 7], "count=2 curr=7(all same)", "count=2 curr=7(all same) p5=7 median=7 p95=7"),
        (
            [6449, 6510], "count=2 first=6449 curr=6510 min=6449 max=6510 avg=6479.5 std=30",
            "count=2 first=6449 curr=6510 min=6449 max=6510 avg=6479.5 std=30 p5=6449 median=6510 p95=6510",
        ),
        (
            [1249964, 1230576], "count=2 first=1249964 curr=1230576 min=1230576 max=1249964 avg=1.24027e+06 std=9694",
            "count=2 first=1249964 curr=1230576 min=1230576 max=1249964 avg=1.24027e+06 std=9694 p5=1230576 "
            "median=1249964 p95=1249964",
        ),
    ],
)  # fmt: skip
def test_statistics_are_written_as_the_tool_writes_them(values: list[float], old: str, new: str) -> None:
    assert programs.statistics(values, percentiles=False) == old
    assert programs.statistics(values, percentiles=True) == new


# --- adb-shell -----------------------------------------------------------------------------------------------------


OPENED: list[AdbDeviceTcp] = []


def connect(one: RunningPhone, signer: PythonRSASigner | None, auth_timeout_s: float = 10.0) -> AdbDeviceTcp:
    device = AdbDeviceTcp("127.0.0.1", one.port, default_transport_timeout_s=PATIENCE_S)
    OPENED.append(device)
    device.connect(rsa_keys=[signer] if signer else None, auth_timeout_s=auth_timeout_s)
    return device


@pytest.fixture(autouse=True)
def everything_is_closed() -> Iterator[None]:
    yield
    while OPENED:
        OPENED.pop().close()


def can_isolate() -> str | None:
    """Why commands cannot be isolated on this machine; None where they can."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return "util-linux's unshare is missing"
    command = [unshare, "--user", "--map-root-user", "--mount", "--pid", "--fork", "--mount-proc", "true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else done.stderr.strip()


NOT_ISOLATED = can_isolate()


@pytest.fixture(scope="module", params=["isolated", "plain", "old protocol"])
def any_phone(request: pytest.FixtureRequest) -> Iterator[RunningPhone]:
    """Phones that differ in how commands run and in their protocol."""
    options = {"isolated": ["--isolate"], "plain": ["--plain"], "old protocol": ["--protocol", "old"]}
    if request.param == "isolated" and NOT_ISOLATED:
        pytest.skip(f"commands cannot be isolated here: {NOT_ISOLATED}")
    with phone("--model", "Pixel Test", *options[request.param]) as one:
        yield one


@pytest.fixture(scope="module")
def shared() -> Iterator[RunningPhone]:
    """One phone for tests that leave it as they found it, with models on it."""
    with phone() as one:
        yield one


@pytest.fixture
def device(any_phone: RunningPhone, signer: PythonRSASigner) -> Iterator[AdbDeviceTcp]:
    connected = connect(any_phone, signer)
    yield connected
    connected.close()


@pytest.fixture(scope="module")
def models() -> dict[str, bytes]:
    network = Network.of(
        Convolution(input=(1, 8, 16, 16), filters=16, kernel=(3, 3), padding=(1, 1, 1, 1), activation="relu")
    )
    return {"conv.tflite": to_tflite(network, None), "conv.onnx": to_onnx(network).SerializeToString()}


def put(device: AdbDeviceTcp, models: dict[str, bytes]) -> None:
    for name, content in models.items():
        device.push(io.BytesIO(content), f"{TMP}/{name}")


@pytest.fixture
def bench(shared: RunningPhone, signer: PythonRSASigner, models: dict[str, bytes]) -> Iterator[AdbDeviceTcp]:
    """The shared phone, with models on it."""
    connected = connect(shared, signer)
    put(connected, models)
    yield connected
    connected.close()
    shared.control.clear()


def run(device: AdbDeviceTcp, command: str) -> tuple[str, int]:
    """What a command prints, errors included, and its exit code."""
    said, _, code = device.shell(f"({command}) 2>&1; echo __RC:$?", read_timeout_s=PATIENCE_S).rpartition("__RC:")
    return said, int(code)


def test_commands_that_no_agent_uses(device: AdbDeviceTcp, any_phone: RunningPhone) -> None:
    assert device.shell("getprop ro.product.model") == "Pixel Test\n"
    assert run(device, "echo $((6 * 7)) | sed s/4/four-/") == ("four-2\n", 0)
    assert run(device, "for i in 1 2 3; do printf %s, $i; done; false") == ("1,2,3,", 1)
    assert run(device, f"mkdir -p {TMP}/d/e && cd {TMP}/d && pwd && touch e/f && find . -type f") == (
        f"{TMP}/d\n./e/f\n", 0,
    )  # fmt: skip
    assert run(device, f"printf abc > {TMP}/d/g; wc -c < {TMP}/d/g; sha256sum {TMP}/d/g")[0].split() == [
        "3", hashlib.sha256(b"abc").hexdigest(), f"{TMP}/d/g",
    ]  # fmt: skip
    assert run(device, f"rm -r {TMP}/d; ls {TMP}/d")[1] != 0
    assert run(device, "nosuchcommand")[1] == 127
    assert run(device, "setprop debug.x 7; getprop debug.x; setprop ro.x 1") == (
        "7\nFailed to set property 'ro.x' to '1'.\nSee dmesg for error reason.\n", 1,
    )  # fmt: skip
    assert run(device, "settings put global window_animation_scale 0; settings get global window_animation_scale") == (
        "0\n", 0,
    )  # fmt: skip
    assert device.shell("settings get system no_such") == "null\n"
    assert "shell" in device.shell("id; whoami")
    assert device.shell("uname -sm") == "Linux aarch64\n"
    assert re.search(r"\[ro.build.version.sdk\]: \[35\]", device.shell("getprop"))
    assert run(device, "dumpsys nosuch; cmd nosuch")[1] == 20
    assert "mWakefulness=Asleep" in device.shell("input keyevent POWER; dumpsys power; input keyevent WAKEUP")
    assert "/data" in device.shell(f"df {TMP}")
    assert run(device, "df /nowhere")[1] == 1
    assert any_phone.control.state()["history"][-1].startswith("shell (df /nowhere)")


def test_what_an_agent_reads_of_a_phone(device: AdbDeviceTcp) -> None:
    assert "Thermal Status: 0" in device.shell("dumpsys thermalservice")
    assert "  level: 85\n" in device.shell("dumpsys battery")
    temperatures = device.shell("cat /sys/class/thermal/thermal_zone*/temp").split()
    assert len(temperatures) == 4
    assert all(20_000 < int(text) < 60_000 for text in temperatures)
    clocks = device.shell("cat /sys/devices/system/cpu/cpu*/cpufreq/scaling_cur_freq").split()
    assert [int(text) for text in clocks] == [state.MIN_KHZ] * 8
    assert device.shell("cat /sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") == "sched_pixel\n"
    assert device.shell("taskset f0 nproc; taskset 3 nproc; nproc") == "4\n2\n8\n"
    assert run(device, "taskset 100 ls")[1] == 1
    assert run(device, "taskset 1 sh -c 'taskset -p $$'")[0].endswith("current affinity mask: 1\n")
    assert device.shell("cmd power set-fixed-performance-mode-enabled true; getprop ro.product.model").strip()
    device.shell("cmd power set-fixed-performance-mode-enabled false")
    assert run(device, "cmd thermalservice override-status 3; dumpsys thermalservice | grep Status:")[0].strip() == (
        "Thermal Status: 3"
    )
    device.shell("cmd thermalservice reset")


def test_processes_are_seen_and_killed(device: AdbDeviceTcp, any_phone: RunningPhone) -> None:
    pid = device.shell("sleep 1000 > /dev/null 2>&1 < /dev/null & echo $!").strip()
    assert pid in device.shell("ps -A -o PID,NAME")
    assert run(device, f"ps -p {pid} -o NAME")[0].split() == ["NAME", "sleep"]
    assert run(device, f"kill {pid}")[1] == 0
    wait_until(lambda: pid not in device.shell("ps -A -o PID").split(), "the process is gone")
    if any_phone.isolated:
        assert run(device, f"kill -0 {os.getpid()}")[1] != 0  # this machine's processes are out of reach


def test_files_are_listed_and_described(device: AdbDeviceTcp) -> None:
    device.push(io.BytesIO(b"12345"), f"{TMP}/five", mtime=1_700_000_000)
    mode, size, modified = device.stat(f"{TMP}/five")
    assert (mode & 0o170000, size, modified) == (0o100000, 5, 1_700_000_000)
    names = {bytes(entry.filename): entry.size for entry in device.list(TMP)}
    assert names[b"five"] == 5
    assert {b".", b"..", b"benchmark_model"} <= set(names)
    assert device.list("/no/such/folder") == []
    assert device.stat("/no/such/file") == (0, 0, 0)
    assert run(device, f"cat {TMP}/five")[0] == "12345"
    device.shell(f"rm {TMP}/five")


def test_the_machine_is_out_of_reach(device: AdbDeviceTcp, any_phone: RunningPhone, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    up = "/.." * 20
    for path in (f"{up}{secret}", f"{TMP}{up}{secret}", str(secret)):
        with pytest.raises(exceptions.AdbCommandFailureException):
            device.pull(path, io.BytesIO())
        with pytest.raises(exceptions.PushFailedError):
            device.push(io.BytesIO(b"x"), f"{path}.new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["secret"]
    device.shell(f"cd {TMP} && ln -sf {'../' * 20}{secret} link")
    with pytest.raises(exceptions.AdbCommandFailureException):
        device.pull(f"{TMP}/link", io.BytesIO())
    device.shell(f"rm {TMP}/link")
    if any_phone.isolated:
        assert run(device, f"cat {secret}")[1] != 0


def test_only_some_places_can_be_written(device: AdbDeviceTcp) -> None:
    for place in ("/system/x", "/data/app/x", "/x"):
        with pytest.raises(exceptions.PushFailedError):
            device.push(io.BytesIO(b"x"), place)
    device.push(io.BytesIO(b"photo"), "/sdcard/DCIM/x")
    assert device.shell("cat /storage/emulated/0/DCIM/x; rm -r /sdcard/DCIM") == "photo"


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.one_of(st.integers(0, 5000), st.integers(60_000, 70_000), st.integers(1_000_000, 2_500_000)),
    seed=st.integers(0, 99),
)
def test_what_is_pushed_is_pulled(device: AdbDeviceTcp, size: int, seed: int) -> None:
    content = random.Random(seed).randbytes(size)
    device.push(io.BytesIO(content), f"{TMP}/blob")
    found = io.BytesIO()
    device.pull(f"{TMP}/blob", found)
    assert found.getvalue() == content
    digest = hashlib.sha256(content).hexdigest()
    assert device.shell(f"sha256sum {TMP}/blob").split()[0] == digest


def test_large_output_arrives_whole(device: AdbDeviceTcp) -> None:
    said = device.shell("seq 1 200000", decode=False, read_timeout_s=PATIENCE_S)
    assert said == b"".join(b"%d\n" % number for number in range(1, 200_001))
    assert device.exec_out("printf 'a\\r\\nb\\0c'", decode=False) == b"a\r\nb\0c"


# --- Debian's adb --------------------------------------------------------------------------------------------------


@dataclass
class Adb:
    """Debian's client, with a server and a key of its own."""

    port: int
    home: Path

    def __call__(self, *arguments: str, data: bytes | None = None) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            self.command(*arguments), input=data if data is not None else b"", capture_output=True, check=False,
            timeout=PATIENCE_S, env=self.environment(),
        )  # fmt: skip

    def command(self, *arguments: str) -> list[str]:
        return ["adb", "-P", str(self.port), *arguments]

    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("ADB", "ANDROID"))}
        return {**kept, "HOME": str(self.home), "ADB_MDNS": "0"}

    def connect(self, one: RunningPhone) -> None:
        """Returns when the phone is ready: the first connection with an unknown key is answered before it is known."""
        self("connect", one.serial)
        wait_until(lambda: self("-s", one.serial, "get-state").stdout == b"device\n", "adb has the phone")


@pytest.fixture(scope="module")
def adb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Adb]:
    if shutil.which("adb") is None:
        pytest.skip("Debian's adb is missing: apt-get install adb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        client = Adb(free.getsockname()[1], tmp_path_factory.mktemp("adb-home"))
    started = client("start-server")
    assert started.returncode == 0, started.stderr
    yield client
    client("kill-server")


@pytest.fixture
def pixel(adb: Adb, any_phone: RunningPhone) -> Iterator[Callable[..., subprocess.CompletedProcess[bytes]]]:
    """Debian's adb, connected to one phone."""
    adb.connect(any_phone)
    yield lambda *arguments, data=None: adb("-s", any_phone.serial, *arguments, data=data)
    adb("disconnect", any_phone.serial)


def test_adb_sees_a_device(adb: Adb, pixel: Callable, any_phone: RunningPhone) -> None:
    listed = adb("devices", "-l").stdout.decode()
    assert re.search(rf"{any_phone.serial} +device product:shiba model:Pixel_Test device:shiba", listed)
    assert pixel("get-state").stdout == b"device\n"
    assert b"shell_v2" in pixel("features").stdout
    assert b"already connected" in adb("connect", any_phone.serial).stdout
    assert b"cannot run as root" in pixel("root").stdout
    assert pixel("get-serialno").stdout.strip().decode() == any_phone.serial


def test_adb_shell(pixel: Callable) -> None:
    done = pixel("shell", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")
    assert pixel("shell", "cat", data=b"through\0and through").stdout == b"through\0and through"
    done = pixel("shell", data=b"cd $TMPDIR\npwd\nexit 3\n")
    assert (done.returncode, done.stdout) == (3, b"/data/local/tmp\n")
    assert pixel("shell", "kill -9 $$").returncode == 137
    assert pixel("shell", "-tt", "stty size > /dev/null; tty | grep -c /dev/pts").stdout.strip() == b"1"
    assert pixel("exec-out", "head -c 100000 /dev/zero").stdout == bytes(100_000)
    big = random.Random(1).randbytes(1_500_000)
    assert pixel("shell", "cat | sha256sum", data=big).stdout.split()[0] == hashlib.sha256(big).hexdigest().encode()


def test_adb_pushes_and_pulls(pixel: Callable, tmp_path: Path) -> None:
    source = tmp_path / "tree"
    (source / "deep/er").mkdir(parents=True)
    contents = {
        "empty": b"",
        "one": b"1",
        "deep/large": random.Random(2).randbytes(3_000_001),
        "deep/er/x": b"y" * 65536,
    }
    for name, content in contents.items():
        (source / name).write_bytes(content)
    assert pixel("push", str(source), f"{TMP}/").returncode == 0
    assert pixel("pull", f"{TMP}/tree", str(tmp_path / "back")).returncode == 0
    assert {name: (tmp_path / "back" / name).read_bytes() for name in contents} == contents
    assert b"deep" in pixel("ls", f"{TMP}/tree").stdout
    refused = pixel("push", str(source / "one"), "/system/one")
    assert refused.returncode == 1
    assert b"Read-only file system" in refused.stdout + refused.stderr
    assert pixel("pull", "/no/such", str(tmp_path / "no")).returncode == 1
    pixel("shell", f"rm -r {TMP}/tree")


def test_many_shells_at_once(pixel: Callable) -> None:
    def one(number: int) -> bytes:
        return bytes(pixel("shell", f"sleep 0.2; seq 1 {number * 1000} | tail -1; exit {number}").stdout)

    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(one, range(1, 13))) == [b"%d\n" % (number * 1000) for number in range(1, 13)]


def test_a_command_ends_with_its_client(adb: Adb, pixel: Callable, any_phone: RunningPhone) -> None:
    client = subprocess.Popen(
        adb.command("-s", any_phone.serial, "shell", "echo begun; sleep 997"), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, env=adb.environment(),
    )  # fmt: skip
    assert client.stdout is not None
    assert client.stdout.readline() == b"begun\n"
    assert b"sleep 997" in pixel("shell", "ps -A -o PID,ARGS").stdout
    client.kill()
    client.wait()
    client.stdout.close()

    def gone() -> bool:
        return not re.search(rb"^ *\d+ sleep 997", pixel("shell", "ps -A -o PID,ARGS").stdout, re.MULTILINE)

    wait_until(gone, "the command is gone")


def test_a_phone_started_with_nohup_ends_commands_all_the_same(adb: Adb) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with phone() as one:
            adb.connect(one)
            one.process.send_signal(signal.SIGHUP)
            ignored = adb("-s", one.serial, "shell", "grep SigIgn /proc/self/status").stdout.split()[1]
            assert not int(ignored, 16) & 1 << signal.SIGHUP - 1
            adb("disconnect", one.serial)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_reboot_takes_a_while(adb: Adb, signer: PythonRSASigner) -> None:
    with phone("--reboot-seconds", "0.3") as one:
        adb.connect(one)
        adb("-s", one.serial, "shell", f"echo kept > {TMP}/kept; sleep 1000 > /dev/null 2>&1 < /dev/null &")
        adb("-s", one.serial, "reboot")
        wait_until(lambda: not one.control.state()["alive"], "it goes down")
        wait_until(lambda: one.control.state()["alive"], "it comes back")
        adb("disconnect", one.serial)
        adb.connect(one)
        assert adb("-s", one.serial, "shell", f"cat {TMP}/kept").stdout == b"kept\n"
        assert b"sleep" not in adb("-s", one.serial, "shell", "ps -A -o NAME").stdout
        adb("disconnect", one.serial)


# --- a client that knows the protocol only -------------------------------------------------------------------------


class Wire:
    """Packets over a socket."""

    def __init__(self, port: int, version: int = protocol.WITH_CHECKSUM) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
        self.version = version

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, command: int, arg0: int, arg1: int, payload: bytes = b"") -> None:
        self.socket.sendall(protocol.pack(Packet(command, arg0, arg1, payload), self.version))

    def receive(self) -> Packet:
        header = protocol.unpack_header(self._exactly(24), protocol.MAX_PAYLOAD_BYTES)
        return protocol.complete(header, self._exactly(header.length), self.version)

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            part = self.socket.recv(size - len(data))
            if not part:
                raise EOFError
            data += part
        return data

    def welcome(self) -> Packet:
        self.send(CNXN, self.version, 4096, b"host::\0")
        return self.receive()


def test_streams_word_by_word() -> None:
    with phone("--authorize", "off") as one, Wire(one.port) as wire:
        banner = wire.welcome()
        assert banner.command == CNXN
        assert banner.payload.startswith(b"device::ro.product.name=shiba;")
        wire.send(OPEN, 11, 0, b"shell:cat\0")
        opened = wire.receive()
        assert (opened.command, opened.arg1) == (OKAY, 11)
        wire.send(WRTE, 11, opened.arg0, b"one")
        answers = [wire.receive(), wire.receive()]
        assert sorted(packet.command for packet in answers) == sorted([OKAY, WRTE])
        wire.send(OPEN, 12, 0, b"shell:seq 1 3000\0")
        other = wire.receive()
        assert (other.command, other.arg1) == (OKAY, 12)
        piece = wire.receive()
        assert (piece.command, piece.arg1) == (WRTE, 12)
        assert len(piece.payload) <= 4096
        wire.send(OPEN, 13, 0, b"nosuch:service\0")  # the piece before is not acknowledged: nothing else may come
        assert wire.receive() == Packet(CLSE, 0, 13)
        said = piece.payload
        while True:
            wire.send(OKAY, 12, other.arg0)
            piece = wire.receive()
            if piece.command == CLSE:
                break
            said += piece.payload
        assert said == b"".join(b"%d\n" % number for number in range(1, 3001))
        wire.send(OKAY, 11, opened.arg0)
        wire.send(CLSE, 11, opened.arg0)
        assert wire.receive() == Packet(CLSE, opened.arg0, 11)
        wire.send(WRTE, 11, opened.arg0, b"too late")
        assert wire.receive() == Packet(CLSE, 0, 11)
        wire.socket.sendall(b"GET / HTTP/1.1\r\nHost: phone\r\n\r\n")
        with pytest.raises((EOFError, ConnectionError)):
            wire.receive()
        with Wire(one.port) as again:
            assert again.welcome().command == CNXN


def test_without_a_key_nothing_is_opened(shared: RunningPhone) -> None:
    with Wire(shared.port) as wire:
        challenge = wire.welcome()
        assert (challenge.command, challenge.arg0, len(challenge.payload)) == (AUTH, protocol.AUTH_TOKEN, 20)
        wire.send(OPEN, 1, 0, b"shell:id\0")
        wire.send(AUTH, protocol.AUTH_SIGNATURE, 0, bytes(256))
        again = wire.receive()
        assert (again.command, again.arg0) == (AUTH, protocol.AUTH_TOKEN)
        assert again.payload != challenge.payload
        wire.send(AUTH, protocol.AUTH_PUBLIC_KEY, 0, b"no key\0")
        with pytest.raises((EOFError, ConnectionError)):
            wire.receive()


def test_keys_are_kept_and_asked_for(signer: PythonRSASigner, tmp_path: Path, adb: Adb) -> None:
    with phone("--authorize", "never", "--root", str(tmp_path / "phone")) as one:
        with pytest.raises((exceptions.AdbTimeoutError, exceptions.TcpTimeoutException)):
            connect(one, signer, auth_timeout_s=0.3)
        with pytest.raises(exceptions.DeviceAuthError):
            connect(one, None)
        adb("connect", one.serial)
        wait_until(lambda: b"unauthorized" in adb("devices").stdout, "adb says unauthorized")
        adb("disconnect", one.serial)
        one.control.set(authorize="ask")
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(connect, one, signer)
            wait_until(lambda: one.control.answer(True), "the prompt is shown")
            waiting.result().close()
        connect(one, signer).close()  # known by now
        one.control.forget_keys()
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(connect, one, signer)
            (one.root / "authorize").write_text("yes\n")
            with_file = waiting.result()
        assert with_file.shell("echo known") == "known\n"
        with_file.close()
        with pytest.raises(Refused):
            one.control.set(authorize="perhaps")
    with phone("--authorize", "never", "--root", str(tmp_path / "phone")) as one:
        connect(one, signer).close()  # kept over a restart


# --- programs ------------------------------------------------------------------------------------------------------


def figures(said: str) -> list[dict[str, float]]:
    """The lines `count=…`."""
    lines = re.findall(r"^(?:INFO: )?(count=.*)$", said, re.MULTILINE)
    return [{name: float(text) for name, text in re.findall(r"(\w+)=([-\d.e+]+)", line)} for line in lines]


def test_benchmark_model_of_the_newer_generation(bench: AdbDeviceTcp) -> None:
    said, code = run(bench, f"{BENCHMARK} --num_runs=20 --use_xnnpack=true")
    assert code == 0
    assert said.startswith("INFO: STARTING!\nINFO: Log parameter values verbosely: [0]\nINFO: Min num runs: [20]\n")
    assert "INFO: Explicitly applied XNNPACK delegate, and the model graph will be completely executed by the" in said
    warmup, measured = figures(said)
    assert (warmup["count"], measured["count"]) == (1, 20)
    assert measured["min"] <= measured["p5"] <= measured["median"] <= measured["p95"] <= measured["max"]
    last = re.search(r"Inference timings in us: Init: \d+, First inference: (\d+), .* Inference \(avg\): (\S+)", said)
    assert last is not None
    assert (float(last[1]), float(last[2])) == (warmup["curr"], measured["avg"])


def test_benchmark_model_of_the_older_generation(bench: AdbDeviceTcp, shared: RunningPhone) -> None:
    shared.control.set(benchmark_format="old")
    try:
        said, code = run(bench, f"{BENCHMARK} --num_runs=20 --enable_op_profiling=true --use_xnnpack=true")
        refused, _ = run(bench, f"{BENCHMARK} --num_runs=1 --op_profiling_output_mode=csv")
    finally:
        shared.control.set(benchmark_format="new")
    assert code == 0
    assert "INFO" not in said.replace("INFO: Created", "")
    assert "p5=" not in said
    assert "\nApplied XNNPACK delegate, and the model graph will be completely executed w/ the delegate." in said
    assert "[node type]\t          [start]\t  [first]" in said
    assert "Delegate internal:" in said
    assert "\nUnconsumed cmdline flags: --op_profiling_output_mode=csv\n" in refused


@pytest.mark.parametrize("xnnpack", [True, False])
def test_operators_are_profiled(bench: AdbDeviceTcp, xnnpack: bool, models: dict[str, bytes]) -> None:
    command = f"{BENCHMARK} --num_runs=30 --enable_op_profiling=true --use_xnnpack={str(xnnpack).lower()}"
    said, code = run(bench, command)
    assert code == 0
    section = said.partition("INFO: Operator-wise Profiling Info for Regular Benchmark Runs:\n")[2]
    titles = re.findall(r"^=+ (.*?) =+$", section, re.MULTILINE)
    assert titles == ["Run Order", "Top by Computation Time", "Summary by node type"]
    header, row = section.splitlines()[1:3]
    names = [cell.strip() for cell in header.lstrip("\t").split("\t")]
    assert names == ["[node type]", "[first]", "[avg ms]", "[%]", "[cdf%]", "[mem KB]", "[times called]", "[Name]"]
    cells = dict(zip(names, (cell.strip() for cell in row.lstrip("\t").split("\t")), strict=True))
    assert cells["[cdf%]"] == "100.000%"
    assert cells["[times called]"] == "1"
    mean_ms = float(cells["[avg ms]"])
    assert 0 < mean_ms * 1e3 <= figures(said)[1]["avg"] + 1
    if xnnpack:
        assert cells["[Name]"] == f"Delegate/{cells['[node type]']}:0"
        assert cells["[node type]"].startswith("Convolution (NHWC, F32)")
    else:
        assert (cells["[node type]"], cells["[Name]"]) == ("CONV_2D", "[t1]:0")
    assert "Timings (microseconds): count=30 " in section
    assert "1 nodes observed" in section
    said, code = run(bench, f"cd {TMP} && {command} --op_profiling_output_mode=csv --op_profiling_output_file=o.csv")
    assert code == 0
    assert "Run Order" not in said
    table = bench.shell(f"cat {TMP}/o.csv").partition("Regular Benchmark Runs:\n")[2].splitlines()
    assert table[1] == "node type, first, avg_ms, %, cdf%, mem KB, times called, name"
    assert len(table[2].split(", ")) == 8 + xnnpack  # the comma in "Convolution (NHWC, F32)"; in names there are tabs


def test_benchmark_model_refuses_and_warns(bench: AdbDeviceTcp, shared: RunningPhone) -> None:
    for graph, what in (("none.tflite", "Could not open"), ("conv.onnx", "not a valid Flatbuffer")):
        said, code = run(bench, f"benchmark_model --graph={TMP}/{graph}")
        assert code == 1
        assert what in said
        assert said.endswith(f"ERROR: Failed to load model {TMP}/{graph}\nERROR: Benchmarking failed.\n")
    assert "on standard error" in bench.shell(
        "benchmark_model --graph=/none 2>&1 >/dev/null | grep -q ^ERROR: && echo on standard error"
    )
    assert run(bench, "benchmark_model")[1] == 1
    said, code = run(bench, f"{BENCHMARK} --num_runs=2 --affinity=f0 loose")
    assert code == 0
    assert "\nWARN: Unconsumed cmdline flags: --affinity=f0 loose\n" in said
    said, code = run(bench, "benchmark_model --help")
    assert code == 1
    assert re.search(r"^\t--num_runs=50 *\tint32\toptional\t", said, re.MULTILINE)
    assert run(bench, f"{BENCHMARK} --num_runs=many")[1] == 1
    said, _ = run(bench, f"{BENCHMARK} --num_runs=1000000 --max_secs=0.2")
    assert 0 < figures(said)[1]["count"] < 1_000_000


def test_delegates_are_claimed_as_the_phone_is_told(bench: AdbDeviceTcp, shared: RunningPhone) -> None:
    for extent, text in (
        ("full", "completely executed"),
        ("partial", "partially executed"),
        ("none", "will not be executed"),
    ):
        shared.control.set(gpu=extent, nnapi=extent)
        for flag, name in (("--use_gpu=true", "GPU"), ("--use_nnapi=true", "NNAPI")):
            said, code = run(bench, f"{BENCHMARK} --num_runs=2 {flag}")
            assert code == 0
            assert re.search(rf"{name} delegate.*{text}", said)
            said, code = run(bench, f"{BENCHMARK} --num_runs=2 {flag} --require_full_delegation=true")
            assert code == (0 if extent == "full" else 1)
            assert ("Disallowed CPU fallback detected." in said) == (extent != "full")
    shared.control.set(gpu="full", nnapi="full")


def test_the_result_is_a_message(bench: AdbDeviceTcp) -> None:
    said, code = run(bench, f"{BENCHMARK} --num_runs=9 --benchmark_name=b --result_file_path={TMP}/r.pb")
    assert code == 0
    found = io.BytesIO()
    bench.pull(f"{TMP}/r.pb", found)
    message = found.getvalue()
    assert message.startswith(b"\x0a\x01b\x12\x32\x0d")  # the name, then ten floats of five bytes
    mean_ms = struct.unpack("<f", message[6:10])[0]
    assert mean_ms * 1e3 == pytest.approx(figures(said)[1]["avg"], rel=1e-4)


def test_onnxruntime_perf_test(bench: AdbDeviceTcp) -> None:
    said, code = run(bench, f"cd {TMP} && rm -f r.csv && {PERF_TEST} -o 99 -r 7 -p prof -C 'a.b|1' conv.onnx r.csv")
    assert code == 0
    assert said.startswith("Setting intra_op_num_threads to 1\nSession creation time cost: ")
    assert "\nTotal inference requests: 7\n" in said
    rows = [line.split(",") for line in bench.shell(f"cat {TMP}/r.csv").splitlines()]
    assert [(row[0], row[4]) for row in rows] == [("tmp", str(number)) for number in range(7)]
    assert all(0 < float(row[1]) < 1 and int(row[2]) > 1 << 20 for row in rows)
    events = json.loads(bench.shell(f"cat {TMP}/prof_*.json; rm {TMP}/prof_*.json"))
    assert sum(event["name"] == "model_run" for event in events) == 8  # and one to warm up
    assert any(event["cat"] == "Node" and event["name"].endswith("_kernel_time") for event in events)
    said, code = run(bench, f"cd {TMP} && {PERF_TEST} -r=3 -s conv.onnx")
    assert code == 0
    assert re.search(r"^Runs:3\nMin Latency: \S+ s\nMax Latency: \S+ s\nP50 Latency: ", said, re.MULTILINE)
    assert "Total inference requests: " in run(bench, f"{PERF_TEST} -t 1 {TMP}/conv.onnx")[0]


def test_onnxruntime_perf_test_refuses(bench: AdbDeviceTcp, shared: RunningPhone) -> None:
    assert run(bench, f"{PERF_TEST} -r 3 {TMP}/none.onnx") == (
        "Setting intra_op_num_threads to 1\n"
        f"Load model from {TMP}/none.onnx failed:Load model {TMP}/none.onnx failed. File doesn't exist\n", 255,
    )  # fmt: skip
    assert run(bench, f"{PERF_TEST} -r 3 {TMP}/conv.tflite")[1] == 255
    for bad in ("-r 0", "-r x", "-m never", "-Q", "-x -1"):
        said, code = run(bench, f"{PERF_TEST} {bad} {TMP}/conv.onnx")
        assert code == 255
        assert "See 'onnxruntime_perf_test --help'." in said
    assert "there is no test data for model tmp" in run(bench, f"onnxruntime_perf_test -r 3 {TMP}/conv.onnx")[0]
    assert run(bench, f"onnxruntime_perf_test -I -e xnnpack -r 3 {TMP}/conv.onnx")[1] == 255
    nnapi = f"onnxruntime_perf_test -I -e nnapi -r 3 -C 'session.disable_cpu_ep_fallback|1' {TMP}/conv.onnx"
    assert run(bench, nnapi)[1] == 0
    shared.control.set(nnapi="partial")
    said, code = run(bench, nnapi)
    shared.control.set(nnapi="full")
    assert code == 255
    assert "fallback to CPU EP has been explicitly disabled" in said


def test_a_slow_phone_says_so(bench: AdbDeviceTcp, shared: RunningPhone) -> None:
    usual = figures(run(bench, f"{BENCHMARK} --num_runs=30")[0])[1]["median"]
    little = figures(run(bench, f"taskset 0f {BENCHMARK} --num_runs=30")[0])[1]["median"]
    shared.control.set(speed=60.0)
    try:
        slow = figures(run(bench, f"{BENCHMARK} --num_runs=30")[0])[1]["median"]
        run(bench, f"cd {TMP} && rm -f s.csv && {PERF_TEST} -r 5 -p slow conv.onnx s.csv")
    finally:
        shared.control.set(speed=1.0)
    assert little > usual
    assert slow > 10 * usual
    seconds = [float(line.split(",")[1]) for line in bench.shell(f"cat {TMP}/s.csv").splitlines()]
    events = json.loads(bench.shell(f"cat {TMP}/slow_*.json; rm {TMP}/slow_*.json"))
    runs = [event["dur"] / 1e6 for event in events if event["name"] == "model_run"]
    assert max(runs[1:]) <= max(seconds)
    assert min(runs[1:]) > 0.2 * min(seconds)


def test_noise_is_noise(bench: AdbDeviceTcp, shared: RunningPhone) -> None:
    shared.control.set(noise=0.9, speed=20.0)
    try:
        found = figures(run(bench, f"{BENCHMARK} --num_runs=60")[0])[1]
    finally:
        shared.control.set(noise=0.0, speed=1.0)
    assert found["p95"] > 3 * found["p5"]


def test_load_is_heat(signer: PythonRSASigner, models: dict[str, bytes]) -> None:
    with phone("--heat", "120", "--heat-seconds", "0.5", "--throttle-at", "35") as one:
        device = connect(one, signer)
        put(device, models)
        cold = one.control.state()
        assert (cold["temperature_c"], cold["thermal_status"], cold["pace"]) == (27.0, 0, 1.0)
        device.shell(f"{BENCHMARK.replace('--min_secs=0', '--min_secs=0.7')} --num_runs=1", read_timeout_s=PATIENCE_S)
        hot = one.control.state()
        assert hot["temperature_c"] > 35
        assert hot["thermal_status"] >= 1
        assert hot["pace"] > 1.0
        wait_until(lambda: one.control.state()["thermal_status"] == 0, "it cools")
        one.control.heat(90.0)
        assert "Thermal Status: 5" in device.shell("dumpsys thermalservice")
        assert int(device.shell("cat /sys/class/thermal/thermal_zone0/temp")) > 40_000
        device.close()


# --- faults --------------------------------------------------------------------------------------------------------


def test_a_push_is_cut_off(bench: AdbDeviceTcp, shared: RunningPhone, signer: PythonRSASigner) -> None:
    shared.control.fault("drop-push", after=100_000)
    with pytest.raises(GONE):
        bench.push(io.BytesIO(bytes(3_000_000)), f"{TMP}/cut")
    again = connect(shared, signer)
    assert again.stat(f"{TMP}/cut")[1] == 100_000  # what had come
    again.push(io.BytesIO(bytes(3_000_000)), f"{TMP}/cut")
    assert again.stat(f"{TMP}/cut")[1] == 3_000_000
    again.shell(f"rm {TMP}/cut")
    again.close()


def test_storage_runs_full(bench: AdbDeviceTcp, shared: RunningPhone) -> None:
    shared.control.fault("no-space", after=70_000, match="large")
    bench.push(io.BytesIO(bytes(200_000)), f"{TMP}/other")
    with pytest.raises(exceptions.PushFailedError, match="No space left on device"):
        bench.push(io.BytesIO(bytes(200_000)), f"{TMP}/large")
    assert bench.stat(f"{TMP}/large") == (0, 0, 0)
    bench.push(io.BytesIO(bytes(200_000)), f"{TMP}/large")
    bench.shell(f"rm {TMP}/large {TMP}/other")


def test_storage_is_really_limited(signer: PythonRSASigner) -> None:
    with phone("--storage-mib", "1") as one:
        device = connect(one, signer)
        with pytest.raises(exceptions.PushFailedError, match="No space left on device"):
            device.push(io.BytesIO(bytes(2 << 20)), f"{TMP}/large")
        device.push(io.BytesIO(bytes(1 << 19)), f"{TMP}/half")
        with pytest.raises(exceptions.PushFailedError):
            device.push(io.BytesIO(bytes(1 << 20)), f"{TMP}/more")
        device.close()


def test_a_pushed_file_is_wrong(bench: AdbDeviceTcp, shared: RunningPhone) -> None:
    content = random.Random(3).randbytes(10_000)
    shared.control.fault("corrupt-push")
    for same in (False, True):
        bench.push(io.BytesIO(content), f"{TMP}/content")
        found = io.BytesIO()
        bench.pull(f"{TMP}/content", found)
        assert len(found.getvalue()) == len(content)
        assert (found.getvalue() == content) == same


def test_a_command_hangs(bench: AdbDeviceTcp, shared: RunningPhone, signer: PythonRSASigner) -> None:
    shared.control.fault("hang", match="date")
    assert bench.shell("echo fine") == "fine\n"
    with pytest.raises(exceptions.TcpTimeoutException):
        bench.shell("date", transport_timeout_s=0.3, read_timeout_s=0.3)
    again = connect(shared, signer)
    assert again.shell("date").strip()
    again.close()


def test_a_run_goes_wrong(bench: AdbDeviceTcp, shared: RunningPhone) -> None:
    shared.control.fault("garbage", match="benchmark_model")
    shared.control.fault("crash-run", match="benchmark_model")
    shared.control.fault("fail-run", match="benchmark_model")
    said = bench.shell(f"{BENCHMARK} --num_runs=3; echo __RC:$?", decode=False)
    assert b"\x80\xfe\x00 count=50 first= curr=-nan" in said
    assert said.endswith(b"__RC:0\n")
    assert run(bench, f"{BENCHMARK} --num_runs=3")[1] == 139
    said_then, code = run(bench, f"{BENCHMARK} --num_runs=3")
    assert code == 1
    assert "failed to invoke" in said_then
    assert run(bench, f"{BENCHMARK} --num_runs=3")[1] == 0
    shared.control.fault("crash-run")
    shared.control.fault("fail-run")
    assert run(bench, f"{PERF_TEST} -r 3 {TMP}/conv.onnx")[1] == 139
    assert run(bench, f"{PERF_TEST} -r 3 {TMP}/conv.onnx")[1] == 255


def test_a_run_is_cut_off(bench: AdbDeviceTcp, shared: RunningPhone, signer: PythonRSASigner) -> None:
    shared.control.fault("drop-run", after=0.1)
    with pytest.raises(GONE):
        bench.shell(f"{BENCHMARK} --num_runs=100000000", read_timeout_s=PATIENCE_S)
    again = connect(shared, signer)
    assert shared.control.state()["load"] > 0  # nobody ended it
    pids = again.shell(
        "ps -A -o PID,ARGS | grep benchmark_model | grep -v grep | sed 's/^ *//' | cut -d' ' -f1"
    ).split()
    assert run(again, f"kill -9 {' '.join(pids)}")[1] == 0
    wait_until(lambda: shared.control.state()["load"] == 0, "the run has ended")
    again.close()


def test_what_a_terminal_showed_last_is_not_lost() -> None:
    async def read_late() -> bytes:
        outer, inner = os.openpty()
        reader, sink = await services._terminal(outer)
        os.write(inner, b"last words")
        os.close(inner)
        await asyncio.sleep(0.2)
        try:
            return await reader.read()
        finally:
            sink.close()

    assert asyncio.run(read_late()) == b"last words"


def test_shells_of_old_phones_have_terminals(signer: PythonRSASigner) -> None:
    with phone("--api-level", "23", "--android", "6.0.1") as one:
        device = connect(one, signer)
        assert device.shell("echo a; tty | grep -c /dev/pts") == "a\r\n1\r\n"
        with pytest.raises(exceptions.TcpTimeoutException):
            device.shell("sleep 996", transport_timeout_s=0.5, read_timeout_s=0.5)
        again = connect(one, signer)
        assert "sleep 996" in again.shell("ps -A -o ARGS | grep -v grep")
        device.close()
        wait_until(lambda: "sleep 996" not in again.shell("ps -A -o ARGS | grep -v grep"), "the terminal hung up")
        again.close()


def test_a_phone_dies_and_comes_back(signer: PythonRSASigner) -> None:
    with phone("--fault", "corrupt-push:match=armed") as one:
        device = connect(one, signer)
        device.push(io.BytesIO(b"armed"), f"{TMP}/armed")
        device.push(io.BytesIO(b"kept"), f"{TMP}/kept")
        assert device.shell(f"cat {TMP}/armed") != "armed"
        one.control.die()
        with pytest.raises(GONE):
            device.shell("echo there", read_timeout_s=1)
        with pytest.raises(OSError, match=r"refused|timed out"):
            socket.create_connection(("127.0.0.1", one.port), 1.0)
        one.control.wake()
        device = connect(one, signer)
        assert device.shell(f"cat {TMP}/kept") == "kept"
        one.control.fault("die", after=0.1, seconds=0.2)
        with pytest.raises(GONE):
            device.shell("sleep 100", read_timeout_s=1)
        wait_until(lambda: one.control.state()["alive"], "it comes back")
        device = connect(one, signer)
        one.control.drop()
        with pytest.raises(GONE):
            device.shell("echo there", read_timeout_s=1)


def test_a_phone_freezes(signer: PythonRSASigner) -> None:
    with phone() as one:
        device = connect(one, signer)
        one.control.fault("freeze", seconds=600)
        with pytest.raises(exceptions.TcpTimeoutException):
            device.shell("echo there", transport_timeout_s=0.3, read_timeout_s=0.3)
        one.control.clear()
        connect(one, signer).close()


def test_control_refuses_nonsense(shared: RunningPhone) -> None:
    with pytest.raises(InvalidInput, match="no fault"):
        shared.control.fault("explode")
    for values in ({"speed": 0}, {"colour": "red"}, {"gpu": "half"}):
        with pytest.raises(Refused):
            shared.control.set(**values)
    assert shared.control.state()["faults"] == []


# --- beginning and end ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nothing_is_left_behind(signer: PythonRSASigner, number: signal.Signals) -> None:
    with phone() as one:
        device = connect(one, signer)
        device.shell("trap '' HUP; sleep 1000 > /dev/null 2>&1 < /dev/null & sleep 1000 > /dev/null 2>&1 < /dev/null &")
        children = psutil.Process(one.process.pid).children(recursive=True)
        assert any(child.name() == "sleep" for child in children) or not one.isolated
        one.process.send_signal(number)
        assert one.process.wait(PATIENCE_S) == 0
        wait_until(lambda: not any(is_alive(child) for child in children), "its processes are gone")
        assert not one.root.exists()


@pytest.mark.skipif(NOT_ISOLATED is not None, reason=f"commands cannot be isolated here: {NOT_ISOLATED}")
def test_nothing_survives_a_killed_phone(signer: PythonRSASigner, tmp_path: Path) -> None:
    with phone("--isolate", "--root", str(tmp_path / "phone")) as one:
        device = connect(one, signer)
        device.shell("setsid nohup sleep 1000 > /dev/null 2>&1 < /dev/null &")
        wait_until(lambda: "sleep" in device.shell("ps -A -o NAME"), "it runs")
        children = psutil.Process(one.process.pid).children(recursive=True)
        one.process.kill()
        one.process.wait()
        wait_until(lambda: not any(is_alive(child) for child in children), "its processes are gone")


def phone_command(*options: str) -> Sequence[str]:
    return [str(Path(sys.executable).with_name("device-agent")), "simulated-phone", *options]


def test_the_command_says_what_is_wrong() -> None:
    for options, what in (
        (["--speed", "0"], "speed"), (["--fault", "explode"], "fault"), (["--little-cores", "-1"], "cores"),
        (["--port", "70000"], "port"),
    ):  # fmt: skip
        done = subprocess.run(phone_command(*options), capture_output=True, text=True, check=False, timeout=PATIENCE_S)
        assert done.returncode == 2
        assert what in done.stderr


def test_the_command_says_when_it_is_ready(signer: PythonRSASigner) -> None:
    process = subprocess.Popen(phone_command("--port", "0", "--model", "Pixel 8"), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        lines = [process.stdout.readline(), process.stdout.readline()]
        assert re.fullmatch(r"listening on 127\.0\.0\.1:\d+\n", lines[1])
        device = AdbDeviceTcp("127.0.0.1", int(lines[1].rpartition(":")[2]), default_transport_timeout_s=PATIENCE_S)
        device.connect(rsa_keys=[signer])
        assert device.shell("getprop ro.product.model") == "Pixel 8\n"
        device.close()
    finally:
        process.terminate()
        assert process.wait(PATIENCE_S) == 0
        process.stdout.close()
