"""Whole searches, small ones: what they write, how they go on after being killed, what they refuse.

Most of them count multiply-accumulates, which needs no service. Searches beside a real server and a real agent are
in tests/system.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import onnx
import pytest
import yaml
from rich.console import Console
from table_server import CORRECTION, TARGET, Table, serve
from typer.testing import CliRunner

from lut_db.errors import InvalidInput
from lut_db.targets import Target
from lut_db.wire import TargetState
from search_client import networks, recipe
from search_client import run as run_module
from search_client.cli import INVALID, app
from search_client.embedded import EmbeddedService, EmbeddedServiceFailed, database_url
from search_client.progress import Reporter
from search_client.run import Options, RunFolder, RunFolderInUse, calibration_architectures, choose_target

TRAINING = {"epochs": 1, "batch_size": 64, "ema_decay": None}
SMALL: dict[str, Any] = {
    "name": "small",
    "seed": 1,
    "threads": 1,
    "network": {"name": "digits", "image_size": 8},
    "data": {"name": "digits", "image_size": 8, "held_out": 60, "test": 1300},
    "super_network": TRAINING | {"kernels": "batch"},
    "discovered_network": TRAINING,
    "train_initial": False,
    "search": {"metric": "macs", "budget_ratio": 0.5, "samples": 5, "layers": 4, "reduction": 0.1},
}


def make(**changes: Any) -> recipe.Recipe:
    return recipe.parse(SMALL | changes)


class Listening(Reporter):
    """Keeps what was said, and stops the search at a given line."""

    def __init__(self, stop_at: str = "") -> None:
        super().__init__(Console(quiet=True))
        self.lines: list[str] = []
        self.stop_at = stop_at

    def say(self, line: str) -> None:
        self.lines.append(line)
        if self.stop_at and self.stop_at in line:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed")
    run_module.run(make(), Options(out=out), Listening())
    return out / "small"


def test_a_search_ends_with_all_its_files(undisturbed: Path) -> None:
    result = json.loads((undisturbed / "result.json").read_text())
    trajectory = [json.loads(line) for line in (undisturbed / "trajectory.jsonl").read_text().splitlines()]
    assert result["trajectory"] == trajectory
    assert result["discovered"]["cost"] <= result["budget"] == pytest.approx(result["initial"]["cost"] / 2)
    assert result["discovered"]["macs"] / 1e6 == result["discovered"]["cost"]
    for name in ("initial", "discovered"):
        assert 0 <= result[name]["accuracy"] <= 1
    for step in ("super_network", "samples", "discovered_network", "total"):
        assert result["seconds"][step] > 0
    onnx.checker.check_model(onnx.load(undisturbed / "discovered.onnx"))
    assert "</html>" in (undisturbed / "report.html").read_text()
    assert {path.stem for path in (undisturbed / "checkpoints").iterdir()} == {
        "super-network", "discovered-network",
    }  # fmt: skip


@pytest.mark.parametrize("stop_at", ["trained: super-network", "iteration 3", "discovered:"])
def test_a_search_that_was_interrupted_goes_on_to_the_same_end(undisturbed: Path, tmp_path: Path, stop_at: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_module.run(make(), Options(out=tmp_path), Listening(stop_at))
    trajectory = tmp_path / "small" / "trajectory.jsonl"
    if trajectory.exists():
        with trajectory.open("ab") as file:
            file.write(b'{"iteration": 4, "targ')  # what a kill may leave of a line
    listening = Listening()
    run_module.run(make(), Options(out=tmp_path, resume=True), listening)
    assert f"going on with {tmp_path / 'small'}" in listening.lines
    assert trajectory.read_bytes() == (undisturbed / "trajectory.jsonl").read_bytes()
    assert (tmp_path / "small" / "discovered.onnx").read_bytes() == (undisturbed / "discovered.onnx").read_bytes()


def test_killed_with_sigkill_and_resumed(undisturbed: Path, tmp_path: Path) -> None:
    """In processes of their own, at moments that the search does not choose."""
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    command = [sys.executable, "-m", "search_client.cli", "run", str(path), "--out", str(tmp_path), "--resume"]
    folder = tmp_path / "small"

    def lines() -> int:
        file = folder / "trajectory.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and lines() < 2:
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "result.json").exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "nothing to resume" not in done.stdout
    assert "what each iteration shrank" in done.stdout
    assert (folder / "trajectory.jsonl").read_bytes() == (undisturbed / "trajectory.jsonl").read_bytes()
    again = subprocess.run(command, capture_output=True, text=True)
    assert "finished already" in again.stdout


def test_an_earlier_run_is_kept(undisturbed: Path) -> None:
    out = undisturbed.parent
    before = (undisturbed / "trajectory.jsonl").read_bytes()
    with RunFolder.open(make(), Options(out=out, resume=True), Listening()) as folder:
        assert folder.path == undisturbed
    listening = Listening()
    with RunFolder.open(make(), Options(out=out), listening) as folder:
        assert not folder.trajectory_file.exists()
        kept = out / "small.1"
        assert (kept / "trajectory.jsonl").read_bytes() == before
        assert any(str(kept) in line for line in listening.lines)
    (undisturbed / "run.json").unlink()
    undisturbed.rmdir()
    kept.rename(undisturbed)


def test_resuming_with_another_recipe_is_refused(tmp_path: Path) -> None:
    with RunFolder.open(make(), Options(out=tmp_path), Listening()):
        pass
    with pytest.raises(InvalidInput, match=r"search\.samples, seed changed"):
        RunFolder.open(
            make(seed=2, search=SMALL["search"] | {"samples": 6}), Options(out=tmp_path, resume=True), Listening()
        )


def test_one_search_for_one_folder(tmp_path: Path) -> None:
    with RunFolder.open(make(), Options(out=tmp_path), Listening()), pytest.raises(RunFolderInUse):
        RunFolder.open(make(), Options(out=tmp_path), Listening())


def test_a_damaged_trajectory_is_not_guessed(undisturbed: Path, tmp_path: Path) -> None:
    lines = (undisturbed / "trajectory.jsonl").read_bytes().splitlines(keepends=True)
    with RunFolder.open(make(), Options(out=tmp_path), Listening()) as folder:
        folder.trajectory_file.write_bytes(lines[0] + lines[1][:40] + b"\n" + lines[2])
        with pytest.raises(InvalidInput, match="line 2 is damaged"):
            folder.trajectory()
        folder.trajectory_file.write_bytes(lines[0] + lines[2])
        with pytest.raises(InvalidInput, match="iterations are missing"):
            folder.trajectory()
        folder.trajectory_file.write_bytes(lines[0] + lines[1] + lines[2][:50])
        assert [entry.iteration for entry in folder.trajectory()] == [0, 1]
        assert folder.trajectory_file.read_bytes() == lines[0] + lines[1]


@pytest.mark.parametrize(
    ("changes", "options", "field"),
    [
        ({"search": SMALL["search"] | {"layers": 99}}, {}, "layers"),
        ({}, {"server": "http://127.0.0.1:9"}, "server"),
        ({"data": SMALL["data"] | {"image_size": 16}}, {}, "data.image_size"),
        ({"data": SMALL["data"] | {"size": 16}}, {}, "data"),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    tmp_path: Path, changes: dict[str, Any], options: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        run_module.run(make(**changes), Options(out=tmp_path, **options), Listening())
    assert caught.value.field == field


# --- with a service -------------------------------------------------------------------------------------------


def test_calibration_networks_are_distinct_and_reach_as_far_as_the_search() -> None:
    description = networks.load("digits")
    found = calibration_architectures(description, 12, seed=0, share=0.25)
    assert found == calibration_architectures(description, 12, seed=0, share=0.25)
    assert found[0] == description.canonical(description.space.full)
    assert len({description.network(one).key for one in found}) == 12
    shares = [description.network(one).macs / description.network(found[0]).macs for one in found]
    assert shares[-1] <= 0.25
    assert all(share <= 1 - 0.75 * number / 11 for number, share in enumerate(shares))


def test_choosing_a_target() -> None:
    other = Target(device_model="phone", os_build="b", runtime="tflite", runtime_version="2")
    states = [
        TargetState(key=target.key, target=target, devices=("d",), rows=0, pending=0) for target in (TARGET, other)
    ]
    assert choose_target(states, {"runtime": "tflite"}) == other.key
    assert choose_target(states[:1], {}) == TARGET.key
    with pytest.raises(InvalidInput, match=other.key):
        choose_target(states, {})
    with pytest.raises(InvalidInput, match="none of"):
        choose_target(states, {"runtime": "coreml"})
    with pytest.raises(InvalidInput, match="start an agent"):
        choose_target([], {})


def test_a_latency_search_calibrates_first_and_resumes_under_its_pin(tmp_path: Path) -> None:
    latency = make(
        search=SMALL["search"] | {"metric": "latency", "budget_ratio": 0.6},
        calibration={"networks": 6},
        train_initial=True,
    )
    table = Table()
    with serve(table) as url:
        with pytest.raises(KeyboardInterrupt):
            run_module.run(latency, Options(out=tmp_path, server=url), Listening("iteration 1"))
        assert table.calibrations == 6
        pin = json.loads((tmp_path / "small" / "run.json").read_text())["pin"]
        with pytest.raises(InvalidInput, match=f"no pin {pin}"):
            run_module.run(latency, Options(out=tmp_path, server=url, resume=True), Listening())
        table.pins.add(pin)
        table.calibrations = 0
        result = run_module.run(latency, Options(out=tmp_path, server=url, resume=True), Listening())
    assert table.calibrations == 0
    assert result["pin"] == pin
    assert result["correction"] == CORRECTION.model_dump(mode="json")
    service = result["service"]
    assert service["operators_measured"] == len(table.measured)
    measured_for_lookups = service["lookups"] - service["lookups_answered_without_measuring"]
    assert 0 < measured_for_lookups < service["operators_measured"]
    for name in ("initial", "discovered"):
        network = result[name]
        assert network["predicted_low_ms"] < network["predicted_latency_ms"] < network["predicted_high_ms"]
        assert network["predicted_latency_ms"] == network["cost"]
        assert network["latency_ms"] > 0


def test_an_embedded_service_that_cannot_start_shows_its_log(tmp_path: Path) -> None:
    database = tmp_path / "not-a-database.sqlite"
    database.write_bytes(b"these are no tables " * 100)
    with pytest.raises(EmbeddedServiceFailed, match=r"profiler-server ended with status 1(.|\n)*log"):
        EmbeddedService(str(database), tmp_path / "logs").__enter__()


def test_an_embedded_service_measures_with_the_agent_it_is_told(tmp_path: Path) -> None:
    agent = ["cpu-litert", "--cores", "0", "--setting", "xnnpack=off"]
    with EmbeddedService(str(tmp_path / "tables.sqlite"), tmp_path / "logs", agent=agent) as service:
        (target,) = httpx.get(f"{service.url}/v1/targets").raise_for_status().json()
    assert target["key"] == service.target
    fields = target["target"]
    assert (fields["runtime"], fields["cores"], fields["options"]["xnnpack"]) == ("litert", [0], "off")


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (("--agent", "cpu-litert", "--server", "http://127.0.0.1:9"), "leave --server or --agent out"),
        (("--agent", "cpu-litert 'a"), "close the quotation"),
    ],
)
def test_agents_that_cannot_be_are_refused_with_the_remedy(arguments: Sequence[str], remedy: str) -> None:
    done = CliRunner().invoke(app, ["run", "recipes/digits.yaml", *arguments])
    assert done.exit_code == INVALID
    assert "agent" in done.stderr
    assert remedy in done.stderr


def test_databases_by_file_or_url(tmp_path: Path) -> None:
    assert database_url("postgresql://host/name") == "postgresql://host/name"
    assert database_url(str(tmp_path / "a.sqlite")) == f"sqlite:///{tmp_path}/a.sqlite"
    with pytest.raises(InvalidInput, match="database"):
        database_url("")
