"""Simulated phones for tests: real processes that answer ADB on a loopback port."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
    said: list[str] = field(default_factory=list)

    @property
    def serial(self) -> str:
        """As `adb -s` wants it."""
        return f"127.0.0.1:{self.port}"

    def stop(self) -> int:
        """Ends it; returns its exit status."""
        self.control.close()
        self.process.terminate()
        return self.process.wait(PATIENCE_S)


@contextmanager
def phone(*options: str) -> Iterator[RunningPhone]:
    """A phone with these options of `device-agent simulated-phone`, on free ports. Ended afterwards."""
    command = [
        sys.executable,
        "-m",
        "device_agents.simulated_phone.cli",
        "--port",
        "0",
        "--control-port",
        "0",
        *options,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, bufsize=1)
    assert process.stdout is not None
    said: list[str] = []
    running: RunningPhone | None = None
    try:
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
            raise AssertionError(f"the phone does not start: {''.join(said)}")
        folder, _, how = found["files"].strip().partition(", commands ")
        running = RunningPhone(
            port=int(found["listening"].strip().rpartition(":")[2]),
            control=Control(int(found["control"].strip().rpartition(":")[2])),
            process=process, root=Path(folder), isolated=how == "isolated", said=said,
        )  # fmt: skip
        drain = threading.Thread(target=lambda: said.extend(process.stdout or ()), daemon=True)
        drain.start()
        yield running
    finally:
        if running is not None:
            running.control.close()
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if running is not None:
            drain.join(PATIENCE_S)
        process.stdout.close()
