"""A search from a recipe to a report: the super-network, samples by MCD, the discovered network.

Everything lies in one run folder, written so that a search that is killed at any point goes on where it was:

    run.json              what was fixed at the start (recipe, target, pin) and what was counted so far
    trajectory.jsonl      one line for each iteration, appended; a line that was cut off is dropped
    checkpoints/          of the three trainings, one after every epoch
    discovered.onnx, result.json, report.html

Names in `result.json`: `initial` and `discovered` hold accuracy (on test images), latency_ms (measured whole),
latency_half_width_ms, predicted_latency_ms, predicted_low_ms, predicted_high_ms, energy_j and predicted_energy_j (null
where the device does not count it), cost (in `metric.unit`), macs, parameters, operators, architecture; `service` holds
operators_measured (those of the calibration included), lookups and lookups_answered_without_measuring; `seconds` holds
super_network, samples, discovered_network and total; `trajectory` is what trajectory.jsonl holds.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Self

import torch

from lut_db.errors import InvalidInput, LatencyLabError
from lut_db.estimates import Estimate, OperatorRow
from lut_db.measurements import Status
from lut_db.networks import Network
from lut_db.targets import Target
from lut_db.wire import Calibration, TargetState
from search_client import data as data_sets
from search_client import metrics, networks, report, training
from search_client.architecture import Architecture, SearchSpace
from search_client.client import ProfilerClient, UnknownRecord, Waiting
from search_client.data import Data
from search_client.description import Description
from search_client.elastic import SuperNetwork
from search_client.embedded import AGENT, EmbeddedService
from search_client.optimizers import mcd
from search_client.progress import Reporter, Task
from search_client.recipe import Recipe
from search_client.sliced import SlicedNetwork, export_onnx

FORMAT = 1
DATABASE = "latency-lab.sqlite"
CALIBRATION_TRIES = 50
CALIBRATION_REACH = 0.5
"""The smallest network of a calibration, as a share of the budget, in multiply-accumulates."""
SMALLEST_SHARE = 0.1
STEPS = ("super_network", "samples", "discovered_network", "initial_network")

Result = dict[str, Any]


class RunFolderInUse(LatencyLabError):
    """Another search works in this folder."""


class NetworkNotMeasured(LatencyLabError):
    """A whole network could not be measured on the device."""


@dataclass(frozen=True)
class Options:
    """Where a search runs, beside what its recipe says.

    `server` is the URL of a service; without it one is started over `database` (a file or URL; a file in `out` by
    default), with the backend that measures and its options in `agent`. `target` picks one of several targets, `pin`
    goes on with the view of another search.
    """

    out: Path = Path("runs")
    server: str | None = None
    target: str | None = None
    pin: int | None = None
    resume: bool = False
    database: str | None = None
    agent: Sequence[str] = (AGENT,)
    patience_s: float = 900.0


def run(recipe: Recipe, options: Options, reporter: Reporter) -> Result:
    """Runs a search, or with `options.resume` the rest of one, and returns what `result.json` holds.

    Raises InvalidInput before anything is trained where recipe and options cannot work, ServiceError and
    EmbeddedServiceFailed where latencies cannot be had, NoValidSample, TrainingDiverged and NetworkNotMeasured.
    """
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    description = networks.load(recipe.network.name, **recipe.network.options)
    data = data_sets.load(recipe.data.name, **recipe.data.options)
    config = recipe.optimizer
    mcd.check(config, description.space)
    metric = metrics.load(recipe.search.metric)
    if not metric.needs_service and (options.server or options.target or options.pin):
        raise InvalidInput(
            f"{metric.name} needs no profiling service", field="server", remedy="leave --server, --target, --pin out"
        )
    with RunFolder.open(recipe, options, reporter) as folder:
        if folder.result.exists():
            reporter.say(f"{folder.path} is finished already")
            result: Result = json.loads(folder.result.read_text())
            return result
        search = _Search(recipe, config, metric, description, data, folder, reporter)
        if not metric.needs_service:
            return search.run()
        with (
            _service(options, reporter) as (url, embedded),
            ProfilerClient(
                url, patience_s=options.patience_s, still_there=embedded.check if embedded else None
            ) as client,
        ):
            search.connect(client, options, embedded.target if embedded else None)
            return search.run()


@contextmanager
def _service(options: Options, reporter: Reporter) -> Iterator[tuple[str, EmbeddedService | None]]:
    if options.server is not None:
        yield options.server, None
        return
    database = options.database or str(options.out / DATABASE)
    reporter.say(f"starting a profiling service over {database} and an agent for this machine")
    with EmbeddedService(database, options.out / "logs", agent=options.agent, tell=reporter.say) as embedded:
        reporter.say(f"service on {embedded.url}, target {embedded.target}")
        yield embedded.url, embedded


# --- the run folder -------------------------------------------------------------------------------------------


@dataclass
class RunFolder:
    """The folder of one search, held by one process at a time."""

    path: Path
    facts: dict[str, Any]
    _lock: IO[bytes] = field(repr=False)

    @classmethod
    def open(cls, recipe: Recipe, options: Options, reporter: Reporter) -> RunFolder:
        """The folder to work in: a new one, or with `resume` the one that is there.

        Without `resume` an earlier folder of the same name is kept beside the new one under a number.
        """
        path = options.out / recipe.name
        options.out.mkdir(parents=True, exist_ok=True)
        # Beside the folder, not in it: the folder may be moved.
        lock = (options.out / f".{recipe.name}.lock").open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise RunFolderInUse(
                f"another search works in {path}", field="out", remedy="wait for it, or give another --out"
            ) from None
        try:
            return cls._open(path, recipe, options, reporter, lock)
        except BaseException:
            lock.close()
            raise

    @classmethod
    def _open(
        cls, path: Path, recipe: Recipe, options: Options, reporter: Reporter, lock: IO[bytes]
    ) -> RunFolder:  # fmt: skip
        said = recipe.model_dump(mode="json")
        said = json.loads(json.dumps(said))
        if options.resume and (path / "run.json").exists():
            facts = json.loads((path / "run.json").read_text())
            if facts.get("format") != FORMAT:
                raise InvalidInput(
                    f"{path} is of another version", field="resume", remedy="start anew without --resume"
                )
            if different := _differences(facts["recipe"], said):
                raise InvalidInput(
                    f"the recipe is not that of {path}: {', '.join(different)} changed", field="resume",
                    remedy="restore the recipe, give it another name, or start anew without --resume",
                )  # fmt: skip
            reporter.say(f"going on with {path}")
            return cls(path, facts, lock)
        if options.resume:
            reporter.say(f"nothing to resume in {path}: starting anew")
        if path.exists() and any(path.iterdir()):
            number = 1
            while (kept := path.with_name(f"{path.name}.{number}")).exists():
                number += 1
            unfinished = not (path / "result.json").exists()
            path.rename(kept)
            hint = " (unfinished; to go on with it instead, rename it back and give --resume)" if unfinished else ""
            reporter.say(f"the earlier run is kept in {kept}{hint}")
        path.mkdir(parents=True, exist_ok=True)
        facts = {
            "format": FORMAT, "recipe": said, "started_at": _now(), "pin": None, "target": None,
            "counters": {}, "seconds": {}, "calibration": None, "calibrated": False,
        }  # fmt: skip
        folder = cls(path, facts, lock)
        folder.save()
        return folder

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.close()

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    @property
    def trajectory_file(self) -> Path:
        return self.path / "trajectory.jsonl"

    def checkpoint(self, name: str) -> Path:
        return self.path / "checkpoints" / f"{name}.pt"

    def save(self) -> None:
        write_atomically(self.path / "run.json", json.dumps(self.facts, indent=1))

    def trajectory(self) -> tuple[mcd.Entry, ...]:
        """The iterations that were finished. What a killed process left of a line is cut off."""
        if not self.trajectory_file.exists():
            return ()
        entries: list[mcd.Entry] = []
        whole = 0
        for line in self.trajectory_file.read_bytes().splitlines(keepends=True):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("cut off")
                entry = mcd.Entry.from_json(json.loads(line))
            except (ValueError, KeyError, TypeError):
                break
            entries.append(entry)
            whole += len(line)
        rest = self.trajectory_file.stat().st_size - whole
        if rest:
            if b"\n" in self.trajectory_file.read_bytes()[whole:].rstrip(b"\n"):
                raise InvalidInput(
                    f"line {len(entries) + 1} is damaged", field=str(self.trajectory_file),
                    remedy="cut the file off before that line: the search goes on from there",
                )  # fmt: skip
            os.truncate(self.trajectory_file, whole)
        if [entry.iteration for entry in entries] != list(range(len(entries))):
            raise InvalidInput("iterations are missing", field=str(self.trajectory_file), remedy="start anew")
        return tuple(entries)

    def append(self, entry: mcd.Entry) -> None:
        """One write and a sync: an iteration is there as a whole line, or it is not."""
        line = (json.dumps(entry.to_json()) + "\n").encode()
        descriptor = os.open(self.trajectory_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Writes a file as a whole, or leaves the old one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            difference
            for name in sorted({*old, *new})
            for difference in _differences(old.get(name), new.get(name), f"{path}.{name}".lstrip("."))
        ]
    return [] if old == new else [path]


# --- the search -----------------------------------------------------------------------------------------------


class _Search:
    """One search on its way. Strictly one thing after another: nothing computes here while a device measures."""

    def __init__(
        self,
        recipe: Recipe,
        config: mcd.Config,
        metric: metrics.Metric,
        description: Description,
        data: Data,
        folder: RunFolder,
        reporter: Reporter,
    ) -> None:
        self.recipe = recipe
        self.config = config
        self.metric = metric
        self.description = description
        self.data = data
        self.folder = folder
        self.reporter = reporter
        self.client: ProfilerClient | None = None
        self.target: Target | None = None
        self._qualities: dict[str, float] = {}
        self._costed: dict[str, float | None] = {}
        self._counted: dict[str, int] = dict(folder.facts["counters"])

    # --- the service ------------------------------------------------------------------------------------------

    def connect(self, client: ProfilerClient, options: Options, own_target: str | None) -> None:
        """Takes the target and the pin: those of the run folder, of the command line, or new ones."""
        self.client = client
        client.progress = self._waits()
        facts = self.folder.facts
        pin = facts["pin"] if facts["pin"] is not None else options.pin
        states = client.targets()
        if pin is not None:
            try:
                opened = client.use_pin(pin)
            except UnknownRecord as error:
                raise InvalidInput(
                    f"the service has no pin {pin}: its tables are not those that this search began with",
                    field="pin", remedy="give the same --server or --database, or start anew without --resume",
                ) from error  # fmt: skip
            wanted = options.target or own_target
            if wanted is not None and wanted != opened.target:
                raise InvalidInput(
                    f"pin {pin} reads target {opened.target}, not {wanted}", field="target",
                    remedy="has the runtime of the agent changed? start anew without --resume",
                )  # fmt: skip
            if opened.plan != self.recipe.latency.plan:
                raise InvalidInput(
                    f"pin {pin} was opened with another measurement plan", field="latency.plan",
                    remedy="restore the recipe's plan, or leave --pin out",
                )  # fmt: skip
        else:
            key = options.target or own_target or choose_target(states, self.recipe.latency.target)
            if key not in [state.key for state in states]:
                raise InvalidInput(f"the service has no target {key}", field="target", remedy=_list(states))
            opened = client.open_pin(key, self.recipe.latency.plan)
        self.target = next(state.target for state in states if state.key == opened.target)
        facts["pin"], facts["target"] = opened.id, opened.target
        self.folder.save()
        self.reporter.say(f"pin {opened.id} on {self.target}")

    def _waits(self) -> Callable[[Waiting], None]:
        """Shows what is waited for: a bar that comes with the first news and goes with the last."""
        stack = contextlib.ExitStack()
        shown: dict[str, Task] = {}

        def tell(waiting: Waiting) -> None:
            if waiting.total == 0:
                return
            if waiting.things not in shown:
                shown[waiting.things] = stack.enter_context(
                    self.reporter.task(f"measuring {waiting.things}", waiting.total)
                )
            shown[waiting.things].update(waiting.total - waiting.pending, waiting.total, waiting.reason or "")
            if waiting.pending == 0:
                stack.close()
                shown.clear()

        return tell

    @property
    def _waited_s(self) -> float:
        return self.client.waited_s if self.client is not None else 0.0

    def _service(self) -> ProfilerClient:
        if self.client is None:
            raise InvalidInput(f"{self.metric.name} needs a profiling service", field="server")
        return self.client

    # --- steps ------------------------------------------------------------------------------------------------

    def run(self) -> Result:
        recipe, folder, say = self.recipe, self.folder, self.reporter.say
        full = self.description.canonical(self.description.space.full)
        say(f"{recipe.name}: {self.description.network(full).macs / 1e6:.1f} M MACs, "
            f"{len(self.description.space.layers)} searchable layers")  # fmt: skip

        with self._timed("super_network"):
            super_network = self._train_super_network()
        with self._timed("samples"):
            self._calibrate()
            state = self._search(super_network)
        with self._timed("discovered_network"):
            last = state.trajectory[-1]
            say(f"discovered: {self.metric.name} {report.number(last.cost, self.metric.unit)}, "
                f"{report.percent(last.cost / state.initial_cost)} of the initial network's")  # fmt: skip
            discovered = self._train("discovered-network", "discovered network", state.architecture)
            measured_as = self.target.options.get("bypass") if self.target is not None else None
            export_onnx(discovered, folder.path / "discovered.onnx", bypass="sum" if measured_as == "sum" else "concat")
        initial: SlicedNetwork | None = None
        if recipe.train_initial:
            with self._timed("initial_network"):
                initial = self._train("initial-network", "initial network, to compare with", full)
        with self._timed("discovered_network"):
            rows = self._measure([full, state.architecture])

        images, labels = self.data.test_images, self.data.test_labels
        (super_accuracy,) = training.evaluate_architectures(super_network, [full], images, labels)
        accuracy = super_accuracy if initial is None else training.evaluate(initial, images, labels)
        result = self._result(state, full, rows, accuracy, training.evaluate(discovered, images, labels))
        result["initial"]["accuracy_super_network"] = super_accuracy
        result["initial"]["accuracy_of"] = "super_network" if initial is None else "trained"
        # The result comes last: where it is, the run is finished.
        write_atomically(folder.path / "report.html", report.html(result))
        write_atomically(folder.result, json.dumps(result, indent=1))
        return result

    def _train_super_network(self) -> SuperNetwork:
        with self._training("super-network") as progress:
            return training.train_super_network(
                self.description, self.data, self.recipe.super_network, seed=self.recipe.seed,
                checkpoint=self.folder.checkpoint("super-network"), progress=progress,
            )  # fmt: skip

    def _train(self, name: str, label: str, architecture: Architecture) -> SlicedNetwork:
        with self._training(label) as progress:
            return training.train_network(
                self.description, architecture, self.data, self.recipe.discovered_network, seed=self.recipe.seed,
                checkpoint=self.folder.checkpoint(name), progress=progress,
            )  # fmt: skip

    @contextmanager
    def _training(self, label: str) -> Iterator[training.OnProgress]:
        with self.reporter.task(f"training: {label}") as task:
            begin = time.monotonic()
            last: list[training.Progress] = []

            def progress(now: training.Progress) -> None:
                last[:] = [now]
                task.update(now.step, now.steps, f"epoch {now.epoch}/{now.epochs}, loss {now.loss:.3f}")

            yield progress
        after = f" after {last[0].epochs} epochs, loss {last[0].loss:.3f}" if last else ": as it was"
        self.reporter.say(f"trained: {label}{after} ({report.duration(time.monotonic() - begin)})")

    def _calibrate(self) -> None:
        """Has a correction fitted, before the pin reads its first row and freezes whatever there is."""
        if not self.metric.needs_service or self.folder.facts["calibrated"]:
            return
        client, count = self._service(), self.recipe.calibration.networks
        if count and client.correction is None:
            # Latency falls more slowly than multiply-accumulates do: operators cost something for being there.
            share = CALIBRATION_REACH * (self.config.budget_ratio or SMALLEST_SHARE)
            drawn = calibration_architectures(self.description, count, self.recipe.seed, max(share, SMALLEST_SHARE))
            fitted = client.calibrate([self.description.network(one) for one in drawn], self.recipe.latency.whole)
            self._tell_calibration(fitted)
        self.folder.facts["calibrated"] = True
        self._save()

    def _tell_calibration(self, fitted: Calibration) -> None:
        self.folder.facts["calibration"] = [one.model_dump(mode="json") for one in fitted.networks]
        if fitted.correction is not None:
            left_out = fitted.correction.left_out
            self.reporter.say(
                f"correction from {left_out.networks} whole networks; left out of the fit they are off by "
                f"{report.percent(left_out.mean_error)} on average, {report.percent(left_out.max_error)} at most"
            )

    def _search(self, super_network: SuperNetwork) -> mcd.State:
        """MCD from the full network to the budget, from wherever the trajectory stands."""
        folder, space, canonical = self.folder, self.description.space, self.description.canonical

        def quality(architectures: Sequence[Architecture]) -> list[float]:
            missing = [one for one in architectures if one.key not in self._qualities]
            count = self.recipe.search.recalibration_images
            images = self.data.train_images[:count] if count else None
            with self.reporter.task("evaluating samples", len(missing)) as task:
                for done, one in enumerate(missing, start=1):
                    (self._qualities[one.key],) = training.evaluate_architectures(
                        super_network, [one], self.data.held_out_images, self.data.held_out_labels, recalibration=images
                    )
                    task.update(done)
            return [self._qualities[one.key] for one in architectures]

        entries = folder.trajectory()
        if entries:
            targets = mcd.schedule(self.config, entries[0].cost)
            state = mcd.State(targets[-1] if targets else entries[0].cost, entries)
            for entry in entries:
                self._qualities[entry.architecture.key] = entry.quality
            self.reporter.say(f"going on after iteration {state.iteration}")
        else:
            state = mcd.start(self.config, space, self._cost, quality, canonical)
            folder.append(state.trajectory[0])
            self._tell_iteration(state)
        for following in mcd.search(state, self.config, space, self._cost, quality, canonical):
            state = following
            folder.append(state.trajectory[-1])
            self._save()
            self._tell_iteration(state)
        return state

    def _tell_iteration(self, state: mcd.State) -> None:
        entry = state.trajectory[-1]
        result = {
            "layers": _layers(self.description.space),
            "trajectory": [one.to_json() for one in state.trajectory[-2:]],
        }
        words = "; ".join(report.shrunk(result)[0]) if entry.iteration else "the initial network"
        self.reporter.say(
            f"iteration {entry.iteration}: {report.number(entry.cost, self.metric.unit)} "
            f"(target {report.number(entry.target)}, budget {report.number(state.budget)}), "
            f"accuracy {report.percent(entry.quality)}: {words or 'kept'}"
        )

    def _cost(self, architectures: Sequence[Architecture]) -> list[float | None]:
        found: dict[str, Network] = {}
        for one in architectures:
            if one.key in self._costed:
                continue
            try:
                found[one.key] = self.description.network(one)
            except InvalidInput:  # it leaves a layer without channels: no network, no cost
                self._costed[one.key] = None
        if found:
            costs = self.metric.costs(list(found.values()), self.client)
            self._costed.update(zip(found, costs, strict=True))
        return [self._costed[one.key] for one in architectures]

    def _measure(self, architectures: Sequence[Architecture]) -> list[OperatorRow]:
        """Whole networks on the device; nothing where no device is asked."""
        if not self.metric.needs_service:
            return []
        rows = self._service().measure_networks(
            [self.description.network(one) for one in architectures], self.recipe.latency.whole
        )
        for row in rows:
            if row.status is not Status.MEASURED:
                raise NetworkNotMeasured(
                    f"the whole network is {row.status}: {row.message or 'no reason given'}",
                    remedy="see the agent's log, then go on with --resume",
                )
        return rows

    # --- what is written --------------------------------------------------------------------------------------

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        """Adds to the seconds of a step and of waiting within it; they are kept even if it ends in an error."""
        begin, waited = time.monotonic(), self._waited_s
        try:
            yield
        finally:
            seconds = self.folder.facts["seconds"]
            seconds[step] = seconds.get(step, 0.0) + time.monotonic() - begin
            key = f"waiting_for_device_{step.removesuffix('_network')}"
            seconds[key] = seconds.get(key, 0.0) + self._waited_s - waited
            self._save()

    def _save(self) -> None:
        if self.client is not None:
            counted = self.client.counters.to_json()
            counted["answered_without_measuring"] = self.client.counters.answered_without_measuring
            self.folder.facts["counters"] = {
                name: self._counted.get(name, 0) + value for name, value in counted.items()
            }  # fmt: skip
        self.folder.save()

    def _result(
        self, state: mcd.State, full: Architecture, rows: Sequence[OperatorRow], initial: float, discovered: float
    ) -> Result:
        facts, client = self.folder.facts, self.client
        predictions = client.estimates([self.description.network(one) for one in (full, state.architecture)]) if (
            client is not None
        ) else []  # fmt: skip
        self._save()
        seconds = {f"waiting_for_device_{step}": 0.0 for step in ("samples", "discovered")}
        seconds |= dict.fromkeys(STEPS, 0.0) | facts["seconds"]
        seconds["total"] = sum(seconds[step] for step in STEPS)
        counters = facts["counters"]
        result: Result = {
            "format": FORMAT,
            "name": self.recipe.name,
            "version": importlib.metadata.version("latency-lab"),
            "started_at": facts["started_at"],
            "finished_at": _now(),
            "metric": {"name": self.metric.name, "unit": self.metric.unit},
            "budget": state.budget,
            "initial": self._network(full, state.trajectory[0], initial),
            "discovered": self._network(state.architecture, state.trajectory[-1], discovered),
            "seconds": seconds,
            "samples": {
                "iterations": state.iteration,
                "drawn": sum(entry.drawn for entry in state.trajectory),
                "evaluated": sum(len(entry.candidates) for entry in state.trajectory),
            },
            "layers": _layers(self.description.space),
            "trajectory": [entry.to_json() for entry in state.trajectory],
            "recipe": facts["recipe"],
        }
        if client is not None and self.target is not None:
            for name, row, prediction in zip(("initial", "discovered"), rows, predictions, strict=True):
                result[name] |= _latencies(row, prediction)
            result["target"] = {"key": facts["target"], "description": str(self.target)} | self.target.model_dump(
                mode="json"
            )
            result["pin"] = facts["pin"]
            result["correction"] = client.correction.model_dump(mode="json") if client.correction else None
            result["calibration"] = facts["calibration"]
            result["service"] = {
                "networks": counters["networks"],
                "lookups": counters["lookups"],
                "lookups_answered_without_measuring": counters["answered_without_measuring"],
                "operators_measured": counters["measured"] + counters["calibrated"],
                "operators_failed": counters["failed"],
                "whole_networks_measured": counters["whole_networks_measured"],
                "requests": counters["requests"],
                "retries": counters["retries"],
                "failures": client.failures,
            }
        return result

    def _network(self, architecture: Architecture, entry: mcd.Entry, accuracy: float) -> dict[str, Any]:
        network = self.description.network(architecture)
        return {
            "accuracy": accuracy,
            "accuracy_held_out_super_network": entry.quality,
            "cost": entry.cost,
            "macs": network.macs,
            "parameters": network.parameters,
            "operators": len(network.operators),
            "architecture": {"widths": list(architecture.widths), "kernels": list(architecture.kernels)},
        }


def _latencies(row: OperatorRow, prediction: Estimate) -> dict[str, float | None]:
    return {
        "latency_ms": row.latency_ms,
        "latency_half_width_ms": row.half_width_ms,
        "energy_j": row.energy_j,
        "predicted_energy_j": prediction.energy_j,
        "predicted_latency_ms": prediction.latency_ms,
        "predicted_low_ms": prediction.low_ms,
        "predicted_high_ms": prediction.high_ms,
        "predicted_sum_ms": prediction.sum_ms,
    }


def _layers(space: SearchSpace) -> list[dict[str, Any]]:
    return [
        {"name": layer.name, "widths": list(layer.widths), "kernels": list(layer.kernels)} for layer in space.layers
    ]


def calibration_architectures(description: Description, count: int, seed: int, share: float) -> list[Architecture]:
    """The networks that a correction is fitted on: the full one, and sub-networks such as MCD makes on its way down.

    Each shrinks random layers, one after another, by a random number of random single steps, until it keeps its
    share of the full network's multiply-accumulates; the shares fall evenly to `share`. All are distinct networks.
    A correction holds where it was fitted, so `share` should lie beyond where the search will end.
    """
    space, draw = description.space, random.Random(f"calibration {seed}").random
    full = description.canonical(space.full)
    full_macs = description.network(full).macs
    found = {full.key: full}
    tries = 0
    while len(found) < count and tries < CALIBRATION_TRIES * count:
        tries += 1
        least = full_macs * (1 - (1 - share) * len(found) / (count - 1))
        current = full
        while (options := _shrinkable(space, current)) and description.network(current).macs > least:
            layer = options[int(draw() * len(options))]
            following = current
            for _ in range(1 + int(draw() * (len(space.layers[layer].widths) - 1))):
                steps = space.shrink(following, layer)
                if not steps:
                    break
                following = steps[int(draw() * len(steps))]
            try:
                description.network(following)
            except InvalidInput:  # it would leave a layer without channels
                break
            current = description.canonical(following)
        found.setdefault(current.key, current)
    return list(found.values())


def _shrinkable(space: SearchSpace, architecture: Architecture) -> list[int]:
    return [layer for layer in range(len(space.layers)) if space.shrink(architecture, layer)]


def choose_target(states: Sequence[TargetState], wanted: dict[str, str]) -> str:
    """The key of the only target whose fields are as wanted. Raises InvalidInput where it is not exactly one."""
    fitting = [
        state
        for state in states
        if all(str(getattr(state.target, name)) == value for name, value in wanted.items())
    ]  # fmt: skip
    if len(fitting) == 1:
        return fitting[0].key
    if not states:
        raise InvalidInput(
            "the service knows no target", field="target",
            remedy="start an agent: device-agent cpu-onnxruntime --server URL",
        )  # fmt: skip
    raise InvalidInput(
        f"{len(fitting) or 'none'} of the service's targets fit", field="target", remedy=_list(fitting or states)
    )  # fmt: skip


def _list(states: Sequence[TargetState]) -> str:
    return "give --target " + " or ".join(f"{state.key} ({state.target})" for state in states)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
