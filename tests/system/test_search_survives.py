"""Searches whose process or server is killed: they end as if undisturbed, and nothing is measured twice."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import HERE, LIGHT, PLAN, WHOLE_PLAN, Processes, kill, wait_until
from tables_kit import chain

from search_client.client import ProfilerClient, ServiceFault

TRAINING = {"epochs": 1, "batch_size": 64, "ema_decay": None}
TINY: dict[str, Any] = {
    "name": "tiny",
    "seed": 1,
    "threads": 1,
    "network": {"name": "digits", "image_size": 8},
    "data": {"name": "digits", "image_size": 8, "held_out": 100, "test": 1000},
    "super_network": TRAINING | {"kernels": "batch"},
    "discovered_network": TRAINING,
    "train_initial": False,
    "search": {"metric": "latency", "budget_ratio": 0.7, "samples": 2, "layers": 4, "reduction": 0.15, "look_ahead": 2},
    "calibration": {"networks": 0},
    "latency": {"plan": LIGHT, "whole": LIGHT},
}
PHASES = ["trained: super-network", "pin", "discovered:"]
WRITTEN = ["insert leases", "insert rows", "insert pending", "insert pins", "insert pin_rows", "insert calibrations",
           "update calibrations"]  # fmt: skip
"""What the deaths of the server must at least have covered: claim, report, enqueue, pin and freeze, calibration."""


def search(lab: Processes, out: str, *options: str) -> subprocess.Popen[bytes]:
    recipe = lab.folder / "tiny.yaml"
    recipe.write_text(yaml.safe_dump(TINY))
    where = ["--server", lab.url, "--out", str(lab.folder / out)]
    return lab.start(f"search-{out}", ["-m", "search_client.cli", "run", str(recipe), *where, *options])


def trajectory(lab: Processes, out: str) -> bytes:
    path = lab.folder / out / "tiny" / "trajectory.jsonl"
    return path.read_bytes() if path.exists() else b""


def pin(lab: Processes, out: str) -> str:
    return str(json.loads((lab.folder / out / "tiny" / "run.json").read_text())["pin"])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """A server and an agent after a search that nothing disturbed, in the folder `undisturbed`."""
    with Processes(tmp_path_factory.mktemp("lab")) as lab:
        lab.start_server()
        lab.start_agent()
        lab.target()
        assert search(lab, "undisturbed").wait() == 0, lab.log("search-undisturbed")
        lab.check_rows()
        yield lab


def disturb(lab: Processes, out: str, lines: list[int], phases: list[str], servers: bool) -> None:
    """Repeats the search under its pin, killed after these phases and at these lengths of its trajectory."""
    before = [row.id for row in lab.rows()]
    options = ("--pin", pin(lab, "undisturbed"), "--resume")

    def said() -> str:
        path = lab.folder / f"search-{out}.log"
        return path.read_text() if path.exists() else ""

    points = [lambda n=n: trajectory(lab, out).count(b"\n") >= n for n in lines]
    points += [lambda phase=phase: phase in said() for phase in phases]
    for point in points:
        process = search(lab, out, *options)
        wait_until(lambda p=process, at=point: at() or p.poll() is not None, "the search gets somewhere")
        if process.poll() is None:
            kill(process)
        if servers:
            kill(lab.server)
            lab.start_server()
    assert search(lab, out, *options).wait() == 0, said()
    assert trajectory(lab, out) == trajectory(lab, "undisturbed") != b""
    assert [row.id for row in lab.rows()] == before
    assert not lab.queue()


@pytest.mark.timeout(900)
def test_a_killed_search_ends_with_the_trajectory_of_an_undisturbed_one(undisturbed: Processes) -> None:
    disturb(undisturbed, "killed", [2], [], servers=True)


@pytest.mark.campaign
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("phase", PHASES)
def test_a_search_killed_after_any_phase(undisturbed: Processes, phase: str) -> None:
    disturb(undisturbed, f"phase-{PHASES.index(phase)}", [], [phase], servers=True)


@pytest.mark.campaign
@pytest.mark.timeout(1200)
def test_a_search_killed_after_every_iteration(undisturbed: Processes) -> None:
    count = trajectory(undisturbed, "undisturbed").count(b"\n")
    disturb(undisturbed, "iterations", list(range(1, count + 1)), [], servers=False)


# --- a server that dies at its commits ------------------------------------------------------------------------


@contextmanager
def revived(lab: Processes, *modes: str) -> Iterator[Path]:
    """Keeps a dying server alive: with each of these modes, with the last one again and again."""
    deaths, ended = lab.folder / "deaths.txt", threading.Event()

    def keep() -> None:
        left = list(modes)
        while not ended.is_set():
            mode = left.pop(0) if len(left) > 1 else left[0]
            server = lab.start_server(str(HERE / "dying_server.py"), mode, str(deaths))
            while server.poll() is None and not ended.wait(0.02):
                continue

    keeper = threading.Thread(target=keep)
    keeper.start()
    try:
        yield deaths
    finally:
        ended.set()
        keeper.join()


def search_through_deaths(lab: Processes, *modes: str) -> list[str]:
    """A search on empty tables while the server dies; then the same again in peace, which must be identical."""
    with revived(lab, *modes) as deaths:
        lab.start_agent()
        wait_until(lambda: lab.targets(), "an agent registers")
        with ProfilerClient(lab.url) as client:
            client.open_pin(lab.targets()[0], PLAN)
            # Whether so few quick runs can be fitted is up to the machine; that it ends, and once, is not.
            with suppress(ServiceFault):
                client.calibrate([chain(4, 4 + number, 8) for number in range(6)], WHOLE_PLAN)
        assert search(lab, "disturbed").wait() == 0, lab.log("search-disturbed")
        lab.check_rows()
        before = [row.id for row in lab.rows()]
    kill(lab.server)
    lab.start_server()
    assert search(lab, "again", "--pin", pin(lab, "disturbed")).wait() == 0, lab.log("search-again")
    assert trajectory(lab, "again") == trajectory(lab, "disturbed") != b""
    assert [row.id for row in lab.rows()] == before
    return deaths.read_text().splitlines()


@pytest.mark.campaign
@pytest.mark.timeout(1200)
def test_a_server_that_dies_at_every_transition_of_its_tables(tmp_path: Path) -> None:
    with Processes(tmp_path) as lab:
        died = search_through_deaths(lab, "each")
    for written in WRITTEN:
        for when in ("before", "after"):
            assert any(line.startswith(when) and written in line for line in died), (when, written, died)


@pytest.mark.campaign
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("number", range(1, 22, 5))
def test_a_server_that_dies_at_one_commit(tmp_path: Path, number: int, when: str) -> None:
    with Processes(tmp_path) as lab:
        assert len(search_through_deaths(lab, f"{number}:{when}", "never")) == 1
