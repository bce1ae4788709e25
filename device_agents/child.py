"""The process in which a lease is measured: what crashes or hangs here costs a lease, never the agent.

Started as `python -m device_agents.child FOLDER`; reads `job.json` there and leaves `report.json`. Ends when its
standard input closes, so that it never outlives the agent.
"""

from __future__ import annotations

import os
import resource
import sys
import threading
from pathlib import Path

import psutil
from pydantic import BaseModel

from device_agents.backends import Options, Unreachable, create
from lut_db.errors import LatencyLabError
from lut_db.wire import Lease

MEMORY_SHARE = 0.75
MAX_FILE_BYTES = 4 << 30


class Job(BaseModel):
    """What a child is to do: a lease, on a backend, run in this way."""

    backend: str
    options: Options
    lease: Lease


def _limit() -> None:
    """Limits on memory and on the size of files, and no core dumps."""
    memory = int(psutil.virtual_memory().total * MEMORY_SHARE)
    for limit, value in (
        (resource.RLIMIT_DATA, memory), (resource.RLIMIT_FSIZE, MAX_FILE_BYTES), (resource.RLIMIT_CORE, 0),
    ):  # fmt: skip
        _, hard = resource.getrlimit(limit)
        resource.setrlimit(limit, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


def _end_with_the_agent() -> None:
    # Not through sys.stdin: its lock, held here, would abort the interpreter when it shuts down.
    while os.read(0, 1):
        continue
    os._exit(3)


def _pin(cores: tuple[int, ...]) -> str | None:
    """Pins this process to cores. Why that cannot be, where it cannot: they can be taken away while an agent runs."""
    if not cores:
        return None
    try:
        os.sched_setaffinity(0, cores)
    except OSError as error:
        return f"it cannot be pinned to the cores {cores}: {error}"
    left = os.sched_getaffinity(0)
    return None if left == set(cores) else f"of the cores {cores} this process may only use {sorted(left)}"


def main(folder: Path) -> None:
    threading.Thread(target=_end_with_the_agent, daemon=True).start()
    job = Job.model_validate_json((folder / "job.json").read_bytes())
    _limit()
    lack = _pin(job.options.cores)
    # The runtime is imported only now: its threads inherit the cores.
    from device_agents.measuring import failed, measure

    try:
        if lack:
            raise Unreachable(lack)
        backend = create(job.backend, job.options)
    except LatencyLabError as error:  # the agent had one: the driver, a package or a core went since
        report = failed(job.lease, "unreachable", str(error))
    else:
        report = measure(
            backend, job.lease, lambda text: print(text, flush=True), count_energy=job.options.energy
        )  # fmt: skip
    partial = folder / "report.partial"
    partial.write_text(report.model_dump_json())
    partial.replace(folder / "report.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
