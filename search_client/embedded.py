"""A profiling service of one's own: a server and an agent as child processes, for as long as a search runs.

Used where no service is given. The tables live in a database that stays, so the next search finds what this one
had measured. The children write to log files, sit in process groups of their own (Ctrl-C reaches only the search,
which then ends them in order), and die with their parent even if that is killed with SIGKILL (Linux). One that dies
by itself is started again, a few times.

`python -m search_client.embedded PARENT COMMAND …` is the child's side of it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import importlib.metadata
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from lut_db.errors import InvalidInput, LatencyLabError

READY_S = 60.0
"""How long a child may take to be ready."""
STOP_S = 10.0
"""How long a child may take to end before it is killed."""
WATCH_S = 0.5
RESTARTS = 5
"""How often a child that died by itself is started again."""
TAIL_LINES = 15

AGENT = "cpu-onnxruntime"
"""What measures where nothing else is said."""

LISTENING = re.compile(r"(https?://[^\s/\"']+:\d+)")
REGISTERED = re.compile(r"registered (\S+) as ([0-9a-f]{16})")

PR_SET_PDEATHSIG = 1


class EmbeddedServiceFailed(LatencyLabError):
    """The profiling service beside this search did not start, or died."""


@dataclass
class _Child:
    """A process, the command that started it, and the log it writes to."""

    name: str
    command: list[str]
    log: Path
    ready: re.Pattern[str]
    process: subprocess.Popen[bytes] | None = None
    restarts: int = 0

    def start(self, is_over: Callable[[], bool] = lambda: False) -> re.Match[str]:
        """Starts it and waits for its line of readiness, unless it `is_over` before. Raises
        EmbeddedServiceFailed with the end of its log."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            begin = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "search_client.embedded", str(os.getpid()), *self.command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | {"PYTHONUNBUFFERED": "1"},
            )
        deadline = time.monotonic() + READY_S
        while True:
            ended = self.process.poll() is not None
            found = self.ready.search(self._written(begin))
            if found and not ended:
                return found
            if ended:
                raise self.failure(f"{self.name} ended with status {self.process.returncode} before it was ready")
            if is_over():
                raise self.failure(f"{self.name} was ended before it was ready")
            if time.monotonic() > deadline:
                raise self.failure(f"{self.name} was not ready within {READY_S:.0f} s")
            time.sleep(0.05)

    def failure(self, what: str) -> EmbeddedServiceFailed:
        tail = self._written(0).strip().splitlines()[-TAIL_LINES:]
        text = "\n".join(f"    {line}" for line in tail) or "    (it wrote nothing)"
        return EmbeddedServiceFailed(f"{what}; the end of {self.log}:\n{text}")

    def _written(self, begin: int) -> str:
        with self.log.open("rb") as log:
            log.seek(begin)
            return log.read().decode(errors="replace")

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def stop(self) -> None:
        """Ends it and everything it started: politely, then not."""
        if self.process is None:
            return
        if self.running:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_S)
        # Whatever it left behind is in its group; the group's id is its own until its last member is gone.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class EmbeddedService:
    """`profiler-server` on a free loopback port and `device-agent` beside it, as a context manager.

    `url` is where the service listens and `target` the key of what the agent measures. `database` is a file or an
    SQLAlchemy URL; a file is held by one search at a time. `agent` is the backend that measures and its options, as
    `device-agent` takes them.
    """

    def __init__(
        self,
        database: str,
        logs: Path,
        *,
        agent: Sequence[str] = (AGENT,),
        tell: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.database = database_url(database)
        self.url = ""
        self.target = ""
        self._logs = logs
        self._agent = agent
        self._tell = tell
        self._children: list[_Child] = []
        self._watcher: threading.Thread | None = None
        self._ending = threading.Event()
        self._restarting = threading.Lock()
        self._failure: EmbeddedServiceFailed | None = None
        self._held: IO[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            self._hold()
            server = self._child("profiler-server", ["--port", "0", "--database", self.database], LISTENING)
            self._children.append(server)
            self.url = server.start()[1].rstrip("/")
            # Started again it must be found where it was.
            server.command = ["profiler-server", "--port", self.url.rsplit(":", 1)[1], "--database", self.database]
            agent = self._child("device-agent", [*self._agent, "--server", self.url], REGISTERED)
            self._children.append(agent)
            self.target = agent.start()[2]
        except BaseException:
            self.close()
            raise
        self._watcher = threading.Thread(target=self._watch, name="embedded-service", daemon=True)
        self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends both processes, the agent first."""
        self._ending.set()
        with self._restarting:
            for child in reversed(self._children):
                child.stop()
            self._children.clear()
        if self._watcher is not None:
            self._watcher.join()  # what it started ends with its thread, so that comes last
            self._watcher = None
        if self._held is not None:
            self._held.close()
            self._held = None

    def check(self) -> None:
        """Raises EmbeddedServiceFailed if a process died and could not be started again."""
        if self._failure is not None:
            raise self._failure

    @property
    def processes(self) -> dict[str, int]:
        """The process ids, by command."""
        return {child.name: child.process.pid for child in self._children if child.process is not None}

    def _child(self, name: str, arguments: list[str], ready: re.Pattern[str]) -> _Child:
        return _Child(name, [name, *arguments], self._logs / f"{name}.log", ready)

    def _hold(self) -> None:
        """Two services over one file would compete for the device that both measure."""
        if not self.database.startswith("sqlite:///"):
            return
        path = Path(self.database.removeprefix("sqlite:///"))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._held = path.with_name(path.name + ".lock").open("ab")
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EmbeddedServiceFailed(
                f"another search holds {path}", field="database",
                remedy="wait for it, give another --database, or start one profiler-server for both and give --server",
            ) from None  # fmt: skip

    def _watch(self) -> None:
        while not self._ending.wait(WATCH_S):
            with self._restarting:
                for child in self._children:
                    if child.running or child.process is None or self._ending.is_set():
                        continue
                    try:
                        self._start_again(child, child.process.returncode)
                    except EmbeddedServiceFailed as error:
                        self._failure = error
                        return

    def _start_again(self, child: _Child, status: int | None) -> None:
        if child.restarts >= RESTARTS:
            raise child.failure(f"{child.name} died {RESTARTS + 1} times, the last time with status {status}")
        child.restarts += 1
        self._tell(f"{child.name} died with status {status}: started again")
        child.stop()
        child.start(self._ending.is_set)


def database_url(database: str) -> str:
    """The SQLAlchemy URL of a database given as a file or as a URL."""
    if "://" in database:
        return database
    if not database or database.endswith("/"):
        raise InvalidInput(f"{database!r} is no file", field="database", remedy="give a file or a URL")
    return f"sqlite:///{Path(database).absolute()}"


def _die_with(parent: int) -> None:
    """Asks the kernel to end this process when its parent is gone, however that happens (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it was gone before we asked
        sys.exit(1)


def _main(parent: str, command: str, *arguments: str) -> None:
    _die_with(int(parent))
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name=command)
    sys.argv = [command, *arguments]
    entry.load()()


if __name__ == "__main__":
    _main(*sys.argv[1:])
