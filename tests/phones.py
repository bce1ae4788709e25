"""Simulated phones for tests: real processes that answer ADB on a loopback port."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from device_agents.simulated_phone.control import Control

PATIENCE_S = 60.0


@dataclass
class RunningPhone:
    """A phone, its port, the control over it, and its file system: the phone's `/data` is `root / "data"`."""

    port: int
    control: Control
    process: subprocess.Popen[str]
    root: Path
    isolated: bool
    options: tuple[str, ...]
    said: list[str]
    drain: threading.Thread

    @property
    def serial(self) -> str:
        """As `adb -s` wants it."""
        return f"127.0.0.1:{self.port}"

    def stop(self) -> int:
        """Ends it; returns its exit status."""
        self.control.close()
        self.process.terminate()
        return self.process.wait(PATIENCE_S)

    def kill(self) -> None:
        """Ends it as a battery that is pulled out does."""
        self.control.close()
        self.process.kill()
        self.process.wait(PATIENCE_S)
        self._let_go()

    def start_again(self) -> None:
        """Starts it after `kill`, on the same port, with the same files."""
        again = _start(*self.options, "--port", str(self.port), "--root", str(self.root))
        self.control, self.process, self.said, self.drain = again.control, again.process, again.said, again.drain

    def end(self) -> None:
        self.control.close()
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self._let_go()

    def _let_go(self) -> None:
        self.drain.join(PATIENCE_S)
        assert self.process.stdout is not None
        self.process.stdout.close()


def _start(*options: str) -> RunningPhone:
    command = [
        sys.executable, "-m", "device_agents.simulated_phone.cli", "--port", "0", "--control-port", "0", *options
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1)
    assert process.stdout is not None
    said: list[str] = []
    timer = threading.Timer(PATIENCE_S, process.kill)
    timer.start()
    for line in process.stdout:
        said.append(line)
        if line.startswith("listening on"):
            break
    timer.cancel()
    found = dict(line.split(" ", 2)[::2] for line in said if " " in line)
    if "listening" not in found:
        process.wait()
        process.stdout.close()
        raise AssertionError(f"the phone does not start: {''.join(said)}")
    folder, _, how = found["files"].strip().partition(", commands ")
    drain = threading.Thread(target=lambda: said.extend(process.stdout or ()), daemon=True)
    drain.start()
    return RunningPhone(
        port=int(found["listening"].strip().rpartition(":")[2]),
        control=Control(int(found["control"].strip().rpartition(":")[2])),
        process=process, root=Path(folder), isolated=how == "isolated", options=options, said=said, drain=drain,
    )  # fmt: skip


@contextmanager
def phone(*options: str) -> Iterator[RunningPhone]:
    """A phone with these options of `device-agent simulated-phone`, on free ports. Ended afterwards."""
    running = _start(*options)
    try:
        yield running
    finally:
        running.end()
