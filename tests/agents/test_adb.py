"""One phone over ADB: commands, files, keys, and what happens when it is gone."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import usb1
from adb_shell import exceptions
from phones import RunningPhone
from phones import phone as running_phone

from device_agents import adb
from device_agents.adb import Address, NoSpace, Phone, TimedOut
from device_agents.backends import Unreachable
from lut_db.errors import InvalidInput


@pytest.fixture(scope="module")
def simulated() -> Iterator[RunningPhone]:
    with running_phone() as running:
        yield running


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "adb"


@pytest.fixture
def connect(simulated: RunningPhone, keys: Path) -> Iterator:  # type: ignore[type-arg]
    """Makes connections to the phone; its faults and files are gone afterwards."""
    made: list[Phone] = []

    def one(**options: float) -> Phone:
        made.append(Phone(Address.parse(simulated.serial), keys, **options))  # type: ignore[arg-type]
        return made[-1]

    yield one
    simulated.control.clear()
    simulated.control.wake()
    made[0].run(f"rm -rf {adb.FOLDER}")
    for phone in made:
        phone.close()


def pushes(simulated: RunningPhone) -> list[str]:
    return [line for line in simulated.control.state()["history"] if line.startswith("push ")]


@pytest.mark.parametrize(
    ("command", "code", "output"),
    [
        ("exit 7", 7, ""),
        ("printf without-end", 0, "without-end"),
        ("echo out; echo err >&2; false", 1, "out\nerr\n"),
        ("echo 'it''s'; echo \"$((1 + 1))\"", 0, "its\n2\n"),
        ("printf '\\377\\n'", 0, "\N{REPLACEMENT CHARACTER}\n"),
        ("echo 00112233445566778899aabbccddeeff:0; exit 3", 3, "00112233445566778899aabbccddeeff:0\n"),
        ("kill -9 $$", 137, None),
        ("no-such-program", 127, None),
    ],
)
def test_commands_tell_their_output_and_exit_code(connect, command: str, code: int, output: str | None) -> None:  # type: ignore[no-untyped-def]
    result = connect().run(command)
    assert result.code == code
    assert output is None or result.output == output


def test_what_is_not_even_a_command_fails(connect) -> None:  # type: ignore[no-untyped-def]
    assert connect().run("if").code != 0
    with pytest.raises(Unreachable, match="exit code 3"):
        connect().check("exit 3")


def test_a_command_that_runs_too_long_is_killed_with_its_children(connect) -> None:  # type: ignore[no-untyped-def]
    phone = connect()
    with pytest.raises(TimedOut, match="begun") as late:
        phone.run("echo begun; sleep 987 & sleep 988; echo ended", timeout_s=0.5)
    assert isinstance(late.value, Unreachable), "a phone whose system hangs is not ready, like one that is gone"
    assert "sleep 98" not in phone.run("ps -A -o ARGS | grep -v grep").output
    assert phone.run("echo fine").output == "fine\n"


def test_a_command_without_an_answer_is_lost(connect, simulated: RunningPhone) -> None:  # type: ignore[no-untyped-def]
    phone = connect()
    phone.run("true")
    simulated.control.fault("hang", match="hear-me")
    with pytest.raises(Unreachable, match="lost"):
        phone.run("echo hear-me", timeout_s=0.5)
    assert phone.run("echo hear-me").output == "hear-me\n"


class OverUsb:
    """What adb-shell has for a phone on USB, one whose commands hang."""

    refuses: Exception | None = None
    begun = ""

    def __init__(self, serial: str | None, default_transport_timeout_s: float) -> None: ...

    def connect(self, *_: object, **__: object) -> None:
        if OverUsb.refuses is not None:
            raise OverUsb.refuses

    def close(self) -> None: ...

    def streaming_shell(self, command: str, **_: object) -> Iterator[bytes]:
        if begins := re.search(r"echo \$\$ > \S+/(\w+)\.pid", command):
            OverUsb.begun = begins[1]
            raise exceptions.UsbReadFailedError("nothing was read", usb1.USBErrorTimeout())
        word = re.search(r"echo (\w+):\$code", command)
        assert word is not None
        yield f"begun {OverUsb.begun}.pid\n\n{word[1]}:0\n".encode()


def test_a_phone_on_usb_that_cannot_be_had_or_hangs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(adb, "AdbDeviceUsb", OverUsb)
    phone = Phone(Address.parse("usb:1A2B3C"), tmp_path)
    for refuses in (usb1.USBErrorAccess(), usb1.USBErrorBusy(), usb1.USBErrorNoDevice()):
        monkeypatch.setattr(OverUsb, "refuses", refuses)
        with pytest.raises(Unreachable, match=type(refuses).__name__):
            phone.run("true")
    monkeypatch.setattr(OverUsb, "refuses", None)
    with pytest.raises(TimedOut):
        phone.run("sleep 100", timeout_s=0.5)


def test_what_a_lost_connection_left_is_killed(connect) -> None:  # type: ignore[no-untyped-def]
    phone = connect()
    # As if a connection had been lost while this ran on: nohup takes no notice of it.
    phone.run(
        f"nohup sh -c 'echo $$ > {adb.FOLDER}/run/0123.pid; sleep 989; : 0123.pid' >/dev/null 2>&1 & "
        f"while [ ! -s {adb.FOLDER}/run/0123.pid ]; do :; done"
    )
    assert "sleep 989" in phone.run("ps -A -o ARGS | grep -v grep").output
    assert "sleep 989" not in connect().run("ps -A -o ARGS | grep -v grep").output


def test_one_command_at_a_time(connect) -> None:  # type: ignore[no-untyped-def]
    said: list[str] = []
    phones = [connect() for _ in range(3)]

    def use(phone: Phone) -> None:
        for _ in range(2):
            said.append(phone.run("mkdir /data/local/tmp/held && sleep 0.05 && rmdir /data/local/tmp/held").output)

    threads = [threading.Thread(target=use, args=(phone,)) for phone in [*phones, phones[0]]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert said == [""] * 8


def test_who_waits_too_long_for_others_is_told(connect, keys: Path) -> None:  # type: ignore[no-untyped-def]
    first, second = connect(), connect()
    with first.hold(), pytest.raises(Unreachable, match="another process"), second.hold(wait_s=0.05):
        pytest.fail("both held it")


def test_files_are_pushed_once(connect, simulated: RunningPhone) -> None:  # type: ignore[no-untyped-def]
    before = len(pushes(simulated))
    content = os.urandom(200_000)
    path = connect().put(content, ".tflite")
    assert path == f"{adb.FOLDER}/models/{hashlib.sha256(content).hexdigest()}.tflite"
    assert connect().put(content, ".tflite") == path
    assert len(pushes(simulated)) == before + 1
    assert connect().get(path) == content
    assert (simulated.root / path[1:]).read_bytes() == content


def test_programs_can_be_run(connect, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    program = tmp_path / "tool"
    program.write_text("#!/bin/sh\necho it runs\n")
    phone = connect()
    path = phone.put(program, program=True)
    assert phone.check(path) == "it runs\n"
    with pytest.raises(InvalidInput, match="cannot be read"):
        phone.put(tmp_path / "missing")


def test_a_push_that_arrives_wrong_is_repeated(connect, simulated: RunningPhone) -> None:  # type: ignore[no-untyped-def]
    phone = connect()
    simulated.control.fault("corrupt-push")
    path = phone.put(b"a model" * 1000, ".onnx")
    assert phone.get(path) == b"a model" * 1000
    simulated.control.fault("corrupt-push", times=2)
    with pytest.raises(Unreachable, match="not what was sent"):
        phone.put(b"another" * 1000, ".onnx")
    assert len(phone.run(f"ls -A {adb.FOLDER}/models").output.split()) == 1


def test_a_connection_that_breaks_in_a_push(connect, simulated: RunningPhone) -> None:  # type: ignore[no-untyped-def]
    phone = connect()
    simulated.control.fault("drop-push", after=70_000)
    content = os.urandom(300_000)
    with pytest.raises(Unreachable):
        phone.put(content, ".onnx")
    assert phone.run(f"ls -A {adb.FOLDER}/models").output == ""
    assert phone.get(phone.put(content, ".onnx")) == content


def test_old_models_give_way(connect, simulated: RunningPhone) -> None:  # type: ignore[no-untyped-def]
    used, unused = connect().put(b"x" * 5000, ".onnx"), connect().put(b"y" * 5000, ".onnx")
    phone = connect()
    phone.run(f"touch -d '2020-01-01' {unused}; touch -d '2021-01-01' {used}")
    assert phone.put(b"x" * 5000, ".onnx") == used
    simulated.control.fault("no-space", after=1000)
    path = phone.put(b"z" * 5000, ".onnx")
    assert phone.get(path) == b"z" * 5000
    assert set(phone.run(f"ls {adb.FOLDER}/models").output.split()) == {Path(path).name, Path(used).name}
    simulated.control.fault("no-space", after=1000)
    with pytest.raises(NoSpace, match="free storage"):
        phone.put(b"w" * 5000, ".onnx")


def test_storage_that_was_never_enough(keys: Path) -> None:
    with running_phone("--storage-mib", "1") as small:
        phone = Phone(Address.parse(small.serial), keys)
        assert (phone.free_bytes() or 0) < 2 << 20
        with pytest.raises(NoSpace, match="no space for a file of 3145728 bytes"):
            phone.put(bytes(3 << 20), ".onnx")
        phone.close()


def test_the_key_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "adb"
    first = adb.signer(folder)
    assert stat.S_IMODE((folder / adb.KEY).stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert adb.signer(folder).GetPublicKey() == first.GetPublicKey()
    (folder / adb.KEY).chmod(0o644)
    with pytest.raises(InvalidInput, match="chmod 600"):
        adb.signer(folder)


def test_a_phone_that_does_not_know_the_key(connect, simulated: RunningPhone) -> None:  # type: ignore[no-untyped-def]
    phone = connect(authorise_s=0.3)
    phone.run("true")
    simulated.control.set(authorize="never")
    simulated.control.forget_keys()
    with pytest.raises(Unreachable, match="not authorised"):
        phone.run("true")
    simulated.control.set(authorize="always")
    assert phone.run("echo known").output == "known\n"


def test_a_phone_that_goes_and_comes_back(connect, simulated: RunningPhone) -> None:  # type: ignore[no-untyped-def]
    phone = connect()
    phone.run("true")
    simulated.control.drop()
    assert phone.run("echo still there").output == "still there\n"
    simulated.control.die()
    with pytest.raises(Unreachable, match="no answer"):
        phone.run("true")
    simulated.control.wake()
    assert phone.run("echo back").output == "back\n"


def test_a_phone_that_says_nothing(connect, simulated: RunningPhone, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    phone = connect()
    phone.run("true")
    monkeypatch.setattr(adb, "CONNECT_S", 0.3)
    simulated.control.fault("freeze", seconds=60)
    with pytest.raises(Unreachable, match="no answer"):
        phone.run("true", timeout_s=0.3)
    simulated.control.clear()
    assert phone.run("echo thawed").output == "thawed\n"


def test_a_broken_connection_in_a_command(connect, simulated: RunningPhone) -> None:  # type: ignore[no-untyped-def]
    phone = connect()
    timer = threading.Timer(0.3, simulated.control.drop)
    timer.start()
    with pytest.raises(Unreachable, match="broke"):
        phone.run("sleep 990")
    timer.join()
    assert "sleep 990" not in phone.run("ps -A -o ARGS | grep -v grep").output


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("192.168.0.7", Address("192.168.0.7", 5555)), ("phone.lan:37001", Address("phone.lan", 37001)),
        ("[::1]:5555", Address("::1", 5555)), ("usb:1A2B", Address(serial="1A2B")), ("usb", Address()),
    ],
)  # fmt: skip
def test_addresses(text: str, address: Address) -> None:
    assert Address.parse(text) == address


@pytest.mark.parametrize("text", ["", "a:b", ":5555", "a:0", "a:99999"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(InvalidInput, match="HOST:PORT"):
        adb.split(text)


def test_a_phone_on_usb_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(Unreachable, match="usb:1A2B"):
        Phone(Address.parse("usb:1A2B"), tmp_path).run("true")
