"""The programs on the phone that run models: `python -m device_agents.simulated_phone.programs NAME ARGUMENTS…`.

`benchmark_model` runs them with LiteRT, `onnxruntime_perf_test` with ONNX Runtime. Both print what the real tools
print. What they report is what was measured here, times the phone's pace: they wait for the difference, so that the
phone is as slow as it says. Accelerators are claimed as the phone is told to, and compute on the processor.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from device_agents.simulated_phone import toolbox

US = 1e6
GARBAGE = b"\x80\xfe\x00 count=50 first= curr=-nan min=0x1f avg=inf std\n\xffInference (avg): twelve\ncount=7 curr=\n"


class Phone:
    """What a program asks of the phone: how slow it is, and what is to go wrong."""

    def __init__(self, argv: Sequence[str], threads: int) -> None:
        self.connection = toolbox.connect()
        self.answer = toolbox.ask(self.connection, {"run": {"argv": list(argv), "threads": threads}})
        described = toolbox.describe()
        khz: list[int] = described["khz"]
        # The scheduler prefers fast cores.
        self.slowness = max(khz) / max(khz[core] for core in toolbox.own_cores())
        self.noise = float(self.answer["noise"])
        self.random = random.Random()
        self.pace_file = os.open(os.path.join(os.environ[toolbox.DEV], "pace"), os.O_RDONLY)

    def mishap(self, failed: Callable[[], NoReturn]) -> None:
        """Goes wrong, if it is to; `failed` is how the tool itself fails."""
        match self.answer["mishap"]:
            case "garbage":
                sys.stdout.flush()
                os.write(1, GARBAGE)
                os._exit(0)
            case "crash-run":
                sys.stdout.flush()
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                os.kill(os.getpid(), signal.SIGSEGV)
            case "fail-run":
                failed()
            case "hang-run":
                while True:
                    signal.pause()

    def stretch(self, seconds: float) -> float:
        """What a run that took `seconds` here takes on the phone, once that time has passed."""
        factor = float(os.pread(self.pace_file, toolbox.PACE_BYTES, 0)) * self.slowness
        if self.noise:
            factor *= math.exp(self.random.gauss(0.0, self.noise))
        if factor > 1.0:
            time.sleep(seconds * (factor - 1.0))
        return seconds * factor


def random_input(shape: Sequence[int], dtype: type[np.generic], generator: np.random.Generator) -> NDArray:
    """Values as both tools draw them."""
    if np.issubdtype(dtype, np.floating):
        return generator.uniform(-0.5, 0.5, shape).astype(dtype)
    return generator.integers(0, 2 if dtype is np.bool_ else 100, shape).astype(dtype)


def memory_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# --- benchmark_model -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flag:
    """One flag of benchmark_model: its default, whose type is its own, and its label where its value is logged."""

    default: bool | int | float | str
    label: str = ""
    usage: str = ""


FLAGS: dict[str, Flag] = {
    "num_runs": Flag(50, "Min num runs", "expected number of runs, see also min_secs, max_secs"),
    "min_secs": Flag(1.0, "Min runs duration (seconds)", "minimum number of seconds to rerun for"),
    "max_secs": Flag(150.0, "Max runs duration (seconds)", "maximum number of seconds to rerun for"),
    "run_delay": Flag(-1.0, "Inter-run delay (seconds)", "delay between runs in seconds"),
    "num_threads": Flag(-1, "Num threads", "number of threads"),
    "benchmark_name": Flag("", "Benchmark name", "benchmark name"),
    "output_prefix": Flag("", "Output prefix", "benchmark output prefix"),
    "warmup_runs": Flag(1, "Min warmup runs", "minimum number of runs performed on initialization"),
    "warmup_min_secs": Flag(0.5, "Min warmup runs duration (seconds)", "minimum number of seconds to warm up"),
    "verbose": Flag(False, "", "Whether to log parameters whose values are not set."),
    "dry_run": Flag(False, "Run w/o invoking kernels", "Whether to run the tool just with simply loading the model"),
    "graph": Flag("", "Graph", "graph file name"),
    "allow_fp16": Flag(False, "Allow fp16", "allow fp16"),
    "require_full_delegation": Flag(False, "Require full delegation", "require delegate to run the entire graph"),
    "enable_op_profiling": Flag(False, "Enable op profiling", "enable op profiling"),
    "op_profiling_output_mode": Flag("stdout", "Op profiling output mode.", "Output mode for op profiling results."),
    "op_profiling_output_file": Flag("", "Op profiling output file.", "Output file for op profiling results."),
    "max_profiling_buffer_entries": Flag(1024, "Max initial profiling buffer entries", "max profiling buffer entries"),
    "profiling_output_csv_file": Flag("", "CSV File to export profiling data to", "[DEPRECATED]"),
    "result_file_path": Flag("", "Result file path", "File path to store the result"),
    "use_gpu": Flag(False, "Use gpu", "use gpu"),
    "gpu_precision_loss_allowed": Flag(True, "Allow lower precision in gpu", "Allow lower precision"),
    "use_nnapi": Flag(False, "Use NNAPI", "use nnapi delegate api"),
    "nnapi_allow_fp16": Flag(False, "Allow fp16 in NNAPI", "Allow fp16 computation to be run"),
    "nnapi_execution_preference": Flag("", "NNAPI execution preference", "execution preference for nnapi delegate"),
    "disable_nnapi_cpu": Flag(True, "Disable NNAPI cpu", "Disable the NNAPI CPU device"),
    "use_xnnpack": Flag(False, "Use xnnpack", "explicitly apply the XNNPACK delegate"),
    "xnnpack_force_fp16": Flag(False, "xnnpack_force_fp16", "enforce float16 inference"),
    "help": Flag(False, "", "Print out all supported flags if true."),
}  # fmt: skip
NEW_FLAGS = frozenset(
    {"op_profiling_output_mode", "op_profiling_output_file", "result_file_path", "xnnpack_force_fp16"}
)
DELEGATES = {"use_gpu": ("GPU", "gpu"), "use_nnapi": ("NNAPI", "nnapi")}
TOP_ROWS = 10


class Failed(Exception):
    """The tool cannot go on; the message is an error of its own."""


class Log:
    """benchmark_model's: INFO and WARN to standard output, ERROR to standard error, in both generations."""

    def __init__(self, new: bool) -> None:
        self.new = new

    def info(self, text: str) -> None:
        print(f"INFO: {text}" if self.new else text, flush=True)

    def warn(self, text: str) -> None:
        print(f"WARN: {text}" if self.new else text, flush=True)

    def error(self, text: str) -> None:
        sys.stdout.flush()
        print(f"ERROR: {text}" if self.new else text, file=sys.stderr, flush=True)


def statistics(values_us: Sequence[float], percentiles: bool) -> str:
    """The line `count=…` for whole microseconds."""
    if not values_us:
        return "count=0"
    count, last = len(values_us), values_us[-1]
    if min(values_us) == max(values_us):
        text = f"count={count} curr={last:g}" if last >= 1e6 and last % 1 else f"count={count} curr={int(last)}"
        text += "(all same)" if count > 1 else ""
    else:
        mean = sum(values_us) / count
        deviation = int(math.sqrt(max(0.0, sum(value * value for value in values_us) / count - mean * mean)))
        text = (
            f"count={count} first={int(values_us[0])} curr={int(last)} min={int(min(values_us))} "
            f"max={int(max(values_us))} avg={mean:g} std={deviation}"
        )
    if percentiles:
        ordered = sorted(values_us)
        text += "".join(
            f" {name}={int(ordered[min(count - 1, count * percent // 100)])}"
            for name, percent in (("p5", 5), ("median", 50), ("p95", 95))
        )
    return text


@dataclass
class Node:
    """A row of the profile: `times_us[run]`, `starts_us[run]`. `name` as in the column `[Name]`."""

    type: str
    name: str
    inside: bool
    times_us: list[float]
    starts_us: list[float]


class Graph:
    """A model loaded by LiteRT. `nodes` is its profile so far, where one was asked for, or fp16, which only what is
    profiled calculates in."""

    def __init__(self, path: str, threads: int, xnnpack: bool, profile: bool, fp16: bool = False) -> None:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType

        resolver = OpResolverType.AUTO if xnnpack else OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
        self.interpreter = Interpreter(model_path=path, num_threads=threads, experimental_op_resolver_type=resolver)
        self.interpreter.allocate_tensors()
        generator = np.random.default_rng()
        for tensor in self.interpreter.get_input_details():
            self.interpreter.set_tensor(tensor["index"], random_input(tensor["shape"], tensor["dtype"], generator))
        self.operators: list[dict[str, Any]] = self.interpreter._get_ops_details()
        self.profiled = None
        if profile or fp16:
            from device_agents.simulated_phone.profile import ProfiledModel

            tensors = self.interpreter.get_input_details(), self.interpreter.get_output_details()
            self.profiled = ProfiledModel(Path(path), threads, xnnpack, *tensors, fp16)
        self.nodes: dict[str, Node] = {}

    def delegated(self) -> int | None:
        """How many kernels of XNNPACK run the graph; None where one runs all of it."""
        delegates = [operator for operator in self.operators if operator["op_name"] == "DELEGATE"]
        made = {int(tensor) for operator in self.operators for tensor in operator["outputs"]}
        if len(delegates) == 1 and not made & {int(tensor) for tensor in delegates[0]["inputs"]}:
            wanted = {tensor["index"] for tensor in self.interpreter.get_output_details()}
            if wanted <= {int(tensor) for tensor in delegates[0]["outputs"]}:
                return None
        return len(delegates)

    def run(self) -> float:
        """Seconds that one run took here."""
        if self.profiled is not None:
            return self.profiled.run()
        begin = time.perf_counter()
        self.interpreter.invoke()
        return time.perf_counter() - begin

    def collect(self, factors: Sequence[float], keep: bool) -> list[float]:
        """What the profiler says of the latest runs, in seconds, each of which is told to have taken `factor` times as
        long. `keep`: adds their operators to `nodes`."""
        assert self.profiled is not None
        runs = self.profiled.runs()
        if len(runs) != len(factors):
            raise Failed(f"the profile holds {len(runs)} runs instead of {len(factors)}")
        for run, factor in zip(runs, factors, strict=True):
            begin = run.events[0].start_us if run.events else 0.0
            for event in run.events if keep else ():
                if event.delegated:
                    name = f"Delegate/{event.name}:{event.index}"
                else:
                    tensors = self.operators[event.index]["outputs"]
                    name = f"[{', '.join(self._tensor_name(int(tensor)) for tensor in tensors)}]:{event.index}"
                node = self.nodes.setdefault(name, Node(event.name, name, event.delegated, [], []))
                node.times_us.append(event.elapsed_us * factor)
                node.starts_us.append(max(0.0, event.start_us - begin) * factor)
        return [run.elapsed_us * factor / US for run, factor in zip(runs, factors, strict=True)]

    def _tensor_name(self, index: int) -> str:
        name: str = self.interpreter._get_tensor_details(index, 0)["name"]
        return name


class BenchmarkModel:
    """One start of the tool."""

    def __init__(self, argv: Sequence[str]) -> None:
        self.argv = argv
        self.given: dict[str, Any] = {}
        self.unknown: list[str] = []
        self.bad: list[str] = []

    def __getitem__(self, name: str) -> Any:
        return self.given.get(name, FLAGS[name].default)

    def parse(self, new: bool) -> None:
        for argument in self.argv:
            name, equals, text = argument.removeprefix("--").partition("=")
            if not argument.startswith("--") or name not in FLAGS or (not new and name in NEW_FLAGS):
                self.unknown.append(argument)
                continue
            default = FLAGS[name].default
            try:
                if isinstance(default, bool):
                    self.given[name] = {"true": True, "1": True, "": True, "false": False, "0": False}[text.lower()]
                elif not equals:
                    raise ValueError(argument)
                else:
                    self.given[name] = type(default)(text)
            except (KeyError, ValueError):
                self.bad.append(argument)

    def usage(self) -> str:
        kinds = {bool: "bool", int: "int32", float: "float", str: "string"}
        lines = []
        for name, flag in FLAGS.items():
            if name in NEW_FLAGS and not self.new:
                continue
            default = str(flag.default).lower() if isinstance(flag.default, bool) else f"{flag.default}"
            lines.append(f"\t--{name}={default}".ljust(40) + f"\t{kinds[type(flag.default)]}\toptional\t{flag.usage}")
        return "usage: benchmark_model\nFlags:\n" + "\n".join(lines)

    def main(self) -> int:
        threads = next(
            (argument.partition("=")[2] for argument in self.argv if argument.startswith("--num_threads=")), ""
        )
        self.phone = Phone(["benchmark_model", *self.argv], int(threads) if threads.isdigit() else 1)
        new = self.phone.answer["format"] == "new"
        self.new = new
        self.log = Log(new)
        self.log.info("STARTING!")
        try:
            self._run()
        except Failed as error:
            if str(error):
                self.log.error(str(error))
            self.log.error("Benchmarking failed.")
            return 1
        return 0

    def _run(self) -> None:
        self.parse(self.new)
        if self.bad or self["help"]:
            raise Failed(self.usage())
        if self.unknown:
            self.log.warn(f"Unconsumed cmdline flags: {' '.join(self.unknown)}")
        path = str(self["graph"])
        if not path:
            raise Failed("Please specify the name of your TF Lite input file with --graph")
        modes = ("stdout", "csv") if self.new else ("stdout",)
        if self["enable_op_profiling"] and self["op_profiling_output_mode"] not in modes:
            mode = self["op_profiling_output_mode"]
            raise Failed(f"Output mode{mode} is not supported. Supported values are: 'stdout' and 'csv'.")
        self._log_parameters()
        begin = time.perf_counter()
        graph = self._load(path)
        self.log.info(f"Loaded model {path}")
        self._delegate(graph)
        init_us = int(self.phone.stretch(time.perf_counter() - begin) * US)
        init_mb = memory_mb() - self.start_mb
        self.log.info(f"The input model file size (MB): {Path(path).stat().st_size / 1e6:g}")
        self.log.info(f"Initialized session in {init_us / 1e3:g}ms.")

        def failed() -> NoReturn:
            raise Failed("Node number 0 (CONV_2D) failed to invoke.")

        self.phone.mishap(failed)
        dry = bool(self["dry_run"])
        warmup = self._repeat(graph, 0 if dry else self["warmup_runs"], -1.0 if dry else self["warmup_min_secs"])
        measured = self._repeat(graph, 0 if dry else self["num_runs"], -1.0 if dry else self["min_secs"], regular=True)
        first = int(warmup[0]) if warmup else 0
        means = [sum(values) / len(values) if values else math.nan for values in (warmup, measured)]
        self.log.info(
            f"Inference timings in us: Init: {init_us}, First inference: {first}, Warmup (avg): {means[0]:g}, "
            f"Inference (avg): {means[1]:g}"
        )
        self.log.info(
            "Note: as the benchmark tool itself affects memory footprint, the following is only APPROXIMATE to the "
            "actual memory footprint of the model at runtime. Take the information at your discretion."
        )
        overall_mb = memory_mb() - self.start_mb
        title = "Memory footprint delta from the start of the tool (MB)" if self.new else "Peak memory footprint (MB)"
        self.log.info(f"{title}: init={init_mb:g} overall={overall_mb:g}")
        if self["enable_op_profiling"]:
            self._print_profile(graph, init_us, measured)
        if self["result_file_path"]:
            memory_kb = [int(init_mb * 1024), int(overall_mb * 1024)]
            if not warmup or not measured:
                raise Failed("There is no run to write a result of.")
            self._write_result(str(self["result_file_path"]), init_us, warmup, measured, memory_kb)

    def _log_parameters(self) -> None:
        self.log.info("Log parameter values verbosely: [0]") if self.new else None
        for name, flag in FLAGS.items():
            if not flag.label or (name not in self.given and name != "graph" and not self["verbose"]):
                continue
            value = self[name]
            text = value if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else int(value)
            self.log.info(f"{flag.label}: [{text}]")
            if name == "graph" and self.new:
                self.log.info("Signature to run: []")
        if "num_threads" in self.given:
            self.log.info(f"#threads used for CPU inference: [{self['num_threads']}]")

    def _load(self, path: str) -> Graph:
        self.start_mb = memory_mb()
        threads = int(self["num_threads"])
        explicit = any(self[name] for name in DELEGATES)
        xnnpack = bool(self.given.get("use_xnnpack", not explicit))
        try:
            fp16 = xnnpack and bool(self["xnnpack_force_fp16"])
            return Graph(path, max(1, threads), xnnpack or explicit, bool(self["enable_op_profiling"]), fp16)
        except (ValueError, RuntimeError) as error:
            for line in re.split(r"(?<=\.)(?=[A-Z])", str(error)):
                self.log.error(line)
            raise Failed(f"Failed to load model {path}") from error

    def _delegate(self, graph: Graph) -> None:
        applied: list[tuple[str, str, int]] = []
        for flag in self.given:
            if flag in DELEGATES and self[flag]:
                name, key = DELEGATES[flag]
                applied.append((name, self.phone.answer[key], 2))
            elif flag == "use_xnnpack" and self[flag]:
                kernels = graph.delegated()
                applied.append(
                    ("XNNPACK", "full" if kernels is None else "partial" if kernels else "none", kernels or 0)
                )
        if self.new:
            self.log.info(f"Going to apply {len(applied)} delegates one after another.") if applied else None
        for name, extent, kernels in applied:
            if self["require_full_delegation"] and extent != "full":
                raise Failed("Disallowed CPU fallback detected.")
            by = "by the delegate" if self.new else "w/ the delegate"
            explicitly = "Explicitly applied" if self.new else "Applied"
            if extent == "full":
                self.log.info(f"{explicitly} {name} delegate, and the model graph will be completely executed {by}.")
            elif extent == "partial":
                self.log.info(
                    f"{explicitly} {name} delegate, and the model graph will be partially executed by the delegate w/ "
                    f"{kernels} delegate kernels."
                )
            else:
                though = f"Though {name} delegate is {explicitly.lower()}"
                self.log.info(f"{though}, the model graph will not be executed by the delegate.")

    def _repeat(self, graph: Graph, runs: int, seconds: float, regular: bool = False) -> list[float]:
        """Latencies in whole microseconds, as `BenchmarkModel::Run` takes them. Only regular runs are profiled."""
        longest = float(self["max_secs"])
        self.log.info(
            f"Running benchmark for at least {runs} iterations and at least {seconds:g} seconds but terminate if "
            f"exceeding {longest:g} seconds."
        )
        taken: list[float] = []
        factors: list[float] = []
        now = begin = time.perf_counter()
        while (len(taken) + len(factors) < runs or now < begin + seconds) and now <= begin + longest:
            measured = graph.run()
            told = self.phone.stretch(measured)
            if graph.profiled is None:
                taken.append(told)
            else:
                factors.append(told / measured)
                if len(factors) >= PROFILE_EVERY:
                    taken += graph.collect(factors, keep=regular)
                    factors.clear()
            if self["run_delay"] > 0:
                time.sleep(self["run_delay"])
            now = time.perf_counter()
        if graph.profiled is not None:
            taken += graph.collect(factors, keep=regular)
        taken_us = [float(int(seconds_taken * US)) for seconds_taken in taken]
        self.log.info(statistics(taken_us, percentiles=self.new) + "\n")
        return taken_us

    # --- the profile -------------------------------------------------------------------------------------------

    def _print_profile(self, graph: Graph, init_us: int, measured: Sequence[float]) -> None:
        csv = self["op_profiling_output_mode"] == "csv" or bool(self["profiling_output_csv_file"])
        file = str(self["op_profiling_output_file"] or self["profiling_output_csv_file"])
        nodes = list(graph.nodes.values())
        delegate = "TfLiteXNNPackDelegate"
        setup = [Node("AllocateTensors", "AllocateTensors/0", False, [float(init_us)], [0.0])]
        sections = [("Profiling Info for Benchmark Initialization:", self._tables(setup, 1, csv) + "\n")]
        if self.new or not any(node.inside for node in nodes):
            body = self._tables(nodes, len(measured), csv)
        else:
            body = self._tables(_folded(nodes, delegate, len(graph.operators)), len(measured), csv)
            inside = [
                Node("DelegateOpInvoke", node.name, True, node.times_us, node.starts_us)
                for node in nodes
                if node.inside
            ]
            body += "\nDelegate internal: \n" + self._tables(inside, len(measured), csv)
        sections.append(("Operator-wise Profiling Info for Regular Benchmark Runs:", body + "\n"))
        if file:
            Path(file).write_text("".join(f"{title}\n{text}\n" for title, text in sections))
            return
        for title, text in sections:
            self.log.info(f"{title}\n{text}")

    def _tables(self, nodes: Sequence[Node], runs: int, csv: bool) -> str:
        totals = [float(total) for total in np.sum([_by_run(node, runs) for node in nodes], axis=0)] if nodes else []
        table = _Table(self.new, csv, runs, sum(totals))
        top = sorted(nodes, key=lambda node: -sum(node.times_us))[:TOP_ROWS]
        return "\n".join([
            table.rows("Run Order", nodes), table.rows("Top by Computation Time", top), table.types(nodes),
            f"Timings (microseconds): {statistics([float(int(total)) for total in totals], False)}",
            "Memory (bytes): count=0", f"{len(nodes)} nodes observed", "",
        ])  # fmt: skip

    def _write_result(
        self, path: str, init_us: int, warmup: Sequence[float], measured: Sequence[float], memory_kb: Sequence[int]
    ) -> None:
        """Writes the message `BenchmarkResult` of `tflite/tools/benchmark/proto/benchmark_result.proto`."""
        ordered = sorted(measured)
        count = len(ordered)
        mean = sum(ordered) / count
        latencies_us = {
            1: mean, 2: ordered[0], 3: ordered[-1],
            4: math.sqrt(sum((value - mean) ** 2 for value in ordered) / count),
            5: ordered[count // 2], 6: ordered[count * 5 // 100], 7: ordered[min(count - 1, count * 95 // 100)],
            8: init_us, 9: warmup[0], 10: sum(warmup) / len(warmup),
        }  # fmt: skip
        size_mb = Path(str(self["graph"])).stat().st_size / 1e6
        misc = [(1, size_mb), (2, count), (3, len(warmup)), (4, size_mb * US / mean), (5, US / mean)]
        message = _message([
            (1, str(self["benchmark_name"])), (2, _message([(tag, us / 1e3) for tag, us in latencies_us.items()])),
            (3, _message(list(enumerate(memory_kb, start=1)))), (4, _message(misc)),
        ])  # fmt: skip
        try:
            Path(path).write_bytes(message)
        except OSError as error:
            raise Failed(f"Failed to open result file {path}: {error.strerror}") from error


def _message(fields: Sequence[tuple[int, int | float | str | bytes]]) -> bytes:
    """A protobuf message: integers as varints, floats of 32 bits, strings and messages with their length."""

    def varint(number: int) -> bytes:
        low, rest = number & 0x7F, number >> 7
        return bytes([low | 0x80]) + varint(rest) if rest else bytes([low])

    encoded = b""
    for tag, value in fields:
        if isinstance(value, float):
            encoded += varint(tag << 3 | 5) + struct.pack("<f", value)
        elif isinstance(value, int):
            encoded += varint(tag << 3) + varint(value)
        else:
            data = value.encode() if isinstance(value, str) else value
            encoded += varint(tag << 3 | 2) + varint(len(data)) + data
    return encoded


PROFILE_EVERY = 200
"""Runs after which the profiler is emptied: it has room for half a million entries."""


def _by_run(node: Node, runs: int) -> NDArray[np.float64]:
    """Its time in each run."""
    times = np.asarray(node.times_us)
    return times.reshape(runs, -1).sum(axis=1) if runs and len(times) % runs == 0 else np.full(runs, times.sum() / runs)


def _folded(nodes: Sequence[Node], delegate: str, operators: int) -> list[Node]:
    """As builds before XNNPACK's own profile tell it: each part that a delegate runs is one node."""
    folded: list[Node] = []
    parts = 0
    for node in nodes:
        if not node.inside:
            folded.append(node)
        elif folded and folded[-1].type == delegate:
            folded[-1].times_us = [a + b for a, b in zip(folded[-1].times_us, node.times_us, strict=True)]
        else:
            name = f"[delegated_{parts}]:{operators - 1 + parts}"
            folded.append(Node(delegate, name, False, list(node.times_us), node.starts_us))
            parts += 1
    return folded


class _Table:
    """Lays out the tables of `StatsCalculator`. Times in microseconds come out in milliseconds."""

    def __init__(self, new: bool, csv: bool, runs: int, total_us: float) -> None:
        self.new = new
        self.csv = csv
        self.runs = max(1, runs)
        self.total_us = total_us or math.nan
        self.width = 40 if new else 24

    def rows(self, title: str, nodes: Sequence[Node]) -> str:
        names = ["node type", "start", "first", "avg ms", "%", "cdf%", "mem KB", "times called"]
        widths = [self.width, 17, 9, 9, 8, 8, 10, 9]
        if self.new:
            del names[1], widths[1]
        if self.csv:
            lines = [", ".join("avg_ms" if name == "avg ms" else name for name in [*names, "name"])]
        else:
            titles = "".join(f"\t{f'[{name}]':>{width}}" for name, width in zip(names, widths, strict=True))
            lines = [f"{titles}\t[Name]"]
        done_us = 0.0
        for node in nodes:
            done_us += sum(node.times_us)
            figures = [
                sum(node.starts_us) / len(node.starts_us) / 1e3, node.times_us[0] / 1e3,
                sum(node.times_us) / len(node.times_us) / 1e3, 100 * sum(node.times_us) / self.total_us,
                100 * done_us / self.total_us, 0.0,
            ]  # fmt: skip
            figures = figures[1:] if self.new else figures
            calls = len(node.times_us) // self.runs
            percents = (len(figures) - 3, len(figures) - 2)
            if self.csv:
                texts = [
                    f"{figure:g}%" if number in percents else f"{figure:g}" for number, figure in enumerate(figures)
                ]
                name = node.name.replace(", ", "\t ")
                lines.append(", ".join([node.type, *texts, str(calls), name]))
            else:
                texts = [
                    f"{figure:.3f}%" if number in percents else f"{figure:.3f}" for number, figure in enumerate(figures)
                ]
                cells = [node.type, *texts, str(calls)]
                lines.append(
                    "".join(f"\t{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)) + f"\t{node.name}"
                )
        return f"{'=' * 30} {title} {'=' * 30}\n" + "\n".join(lines) + "\n"

    def types(self, nodes: Sequence[Node]) -> str:
        kinds: dict[str, list[float]] = {}
        for node in nodes:
            kind = kinds.setdefault(node.type, [0, 0.0, 0])
            kind[0] += 1
            kind[1] += int(sum(node.times_us) / self.runs)
            kind[2] += len(node.times_us) // self.runs
        total_us = sum(kind[1] for kind in kinds.values()) or math.nan
        names = ["Node type", "count", "avg ms", "avg %", "cdf %", "mem KB", "times called"]
        widths = [self.width, 9, 10, 11, 11, 10, 10]
        if self.csv:
            lines = ["node type, count, avg_ms, avg %, cdf %, mem KB, times called"]
        else:
            lines = ["".join(f"\t{f'[{name}]':>{width}}" for name, width in zip(names, widths, strict=True))]
        done = 0.0
        for name, (count, time_us, calls) in sorted(kinds.items(), key=lambda item: -item[1][1]):
            share = 100 * time_us / total_us
            done += share
            if self.csv:
                lines.append(f"{name}, {int(count)}, {time_us / 1e3:g}, {share:g}%, {done:g}%, 0, {int(calls)}")
            else:
                cells = [
                    name,
                    str(int(count)),
                    f"{time_us / 1e3:.3f}",
                    f"{share:.3f}%",
                    f"{done:.3f}%",
                    "0.000",
                    str(int(calls)),
                ]
                lines.append("".join(f"\t{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)))
        head = f"Number of nodes executed: {len(nodes)}\n{'=' * 30} Summary by node type {'=' * 30}\n"
        return head + "\n".join(lines) + "\n"


# --- onnxruntime_perf_test -----------------------------------------------------------------------------------------

SWITCHES = frozenset("IsvPnMADZzlqgXh")
VALUES = frozenset("fFmertpxycdouiSTCR")
ERRORS_ONLY = 3
ONNX_TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32, "tensor(double)": np.float64, "tensor(float16)": np.float16,
    "tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(int16)": np.int16, "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8, "tensor(bool)": np.bool_,
}  # fmt: skip
UNKNOWN_FLAG = "ERROR: Unknown command line flag '{}'"
SEE_HELP = "See 'onnxruntime_perf_test --help'."
DEFAULTS = {"m": "duration", "e": "cpu", "r": "1000", "t": "600", "x": "0", "y": "0", "o": "99", "S": "-1", "c": "1"}


class PerfTest:
    """One start of the tool."""

    def __init__(self, argv: Sequence[str]) -> None:
        self.argv = argv
        self.values: dict[str, str] = {}
        self.switches: set[str] = set()
        self.dimensions: list[str] = []
        self.positional: list[str] = []

    def _parse(self) -> bool:
        """Options with one dash or two, `-x 1` or `-x=1`, anywhere."""
        rest = list(self.argv)
        while rest:
            argument = rest.pop(0)
            if not argument.startswith("-") or argument == "-":
                self.positional.append(argument)
                continue
            name, equals, value = argument.lstrip("-").partition("=")
            if name in SWITCHES or name == "help":
                self.switches.add("h" if name == "help" else name)
            elif name in VALUES and (equals or rest):
                value = value if equals else rest.pop(0)
                if name in ("f", "F"):
                    self.dimensions += value.split()
                self.values[name] = value
            else:
                print(UNKNOWN_FLAG.format(name), file=sys.stderr)
                return False
        return self._check()

    def _check(self) -> bool:
        numbers = [self[name] for name in "rtxyo"]
        if (
            not all(text.lstrip("-").isdigit() and int(text) >= 0 for text in numbers)
            or not self["S"].lstrip("-").isdigit()
        ):
            return False
        if self["m"] not in ("duration", "times") or "0" in (self["r"], self["t"], self["c"]) or self["c"] != "1":
            return False
        if any(":" not in dimension for dimension in self.dimensions):
            return False
        return bool(self.positional) and len(self.positional) <= 2

    def __getitem__(self, name: str) -> str:
        return self.values.get(name, DEFAULTS.get(name, ""))

    def main(self) -> int:
        if not self._parse() or "h" in self.switches:
            if "h" in self.switches:
                print("onnxruntime_perf_test [options...] model_path [result_file]\n\nOptions:")
                print("\n".join(f"    -{name}" for name in sorted(SWITCHES | VALUES)))
                return 1
            print(SEE_HELP, end="", file=sys.stderr)
            return 255
        self.phone = Phone(["onnxruntime_perf_test", *self.argv], int(self["x"]) or 1)
        try:
            return self._run(self.positional[0])
        except Failed as error:
            print(error, file=sys.stderr)
            return 255

    def _session(self, path: str) -> Any:
        os.environ["ORT_DISABLE_TELEMETRY"] = "1"
        import onnxruntime

        onnxruntime.set_default_logger_severity(ERRORS_ONLY)
        levels = onnxruntime.GraphOptimizationLevel
        settings = onnxruntime.SessionOptions()
        settings.log_severity_level = ERRORS_ONLY
        settings.intra_op_num_threads = int(self["x"])
        settings.inter_op_num_threads = int(self["y"])
        settings.enable_mem_pattern = "M" not in self.switches
        settings.enable_cpu_mem_arena = "A" not in self.switches
        settings.graph_optimization_level = {
            0: levels.ORT_DISABLE_ALL, 1: levels.ORT_ENABLE_BASIC, 2: levels.ORT_ENABLE_EXTENDED,
        }.get(int(self["o"]), levels.ORT_ENABLE_ALL)  # fmt: skip
        if "P" in self.switches:
            settings.execution_mode = onnxruntime.ExecutionMode.ORT_PARALLEL
        if self["p"]:
            settings.enable_profiling = True
            settings.profile_file_prefix = self["p"]
        if self["u"]:
            settings.optimized_model_filepath = self["u"]
        for dimension in self.dimensions:
            name, _, size = dimension.rpartition(":")
            settings.add_free_dimension_override_by_name(name, int(size))
        if self["T"]:
            settings.add_session_config_entry("session.intra_op_thread_affinities", self["T"])
        entries = dict(pair.split("|", 1) for pair in self["C"].split() if "|" in pair)
        self._provider(entries)
        for key, value in entries.items():
            settings.add_session_config_entry(key, value)
        try:
            return onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime's own exceptions have no common class
            raise Failed(str(error).rpartition(" : ")[2]) from error

    def _provider(self, entries: dict[str, str]) -> None:
        if self["e"] == "cpu":
            entries.pop("session.disable_cpu_ep_fallback", None)  # the processor is what was asked for
        elif self["e"] == "nnapi":
            if entries.pop("session.disable_cpu_ep_fallback", "0") == "1" and self.phone.answer["nnapi"] != "full":
                raise Failed(
                    "This session contains graph nodes that are assigned to the default CPU EP, but fallback to CPU EP "
                    "has been explicitly disabled by the user."
                )
        else:
            raise Failed(f"{self['e'].upper()} is not supported in this build\n")

    def _run(self, path: str) -> int:
        if int(self["x"]):
            print(f"Setting intra_op_num_threads to {self['x']}", flush=True)
        begin = time.perf_counter()
        session = self._session(path)
        created = self.phone.stretch(time.perf_counter() - begin)
        if "n" in self.switches:
            print(f"\nSession creation time cost: {created:g} s")
            return 0
        # Named after the folder that the model lies in.
        name = Path(path).absolute().parent.name
        if "I" not in self.switches:
            print(f"there is no test data for model {name}")
            print("Run failed:failed to initialize.")
            return 255
        binding = self._bind(session)

        def failed() -> NoReturn:
            raise Failed(
                "Non-zero status code returned while running Conv node. Name:'n0' Status Message: out of memory"
            )

        self.phone.mishap(failed)
        factors: list[float] = []
        first, _ = self._once(session, binding, factors)
        times_s: list[float] = []
        own = time.process_time()
        start = now = time.perf_counter()
        by_time = "t" in self.values or (self["m"] == "duration" and "r" not in self.values)
        while now < start + int(self["t"]) if by_time else len(times_s) < int(self["r"]):
            told, now = self._once(session, binding, factors)
            times_s.append(told)
        self._report(name, created, first, times_s, now - start, time.process_time() - own)
        if self["p"]:
            self._scale_profile(Path(session.end_profiling()), factors)
        return 0

    def _bind(self, session: Any) -> Any:
        import onnxruntime

        seed = int(self["S"])
        generator = np.random.default_rng(None if seed < 0 else seed)
        binding = session.io_binding()
        for tensor in session.get_inputs():
            # Sizes that a file leaves open are one.
            shape = [size if isinstance(size, int) and size > 0 else 1 for size in tensor.shape]
            values = random_input(shape, ONNX_TYPES[tensor.type], generator)
            binding.bind_ortvalue_input(tensor.name, onnxruntime.OrtValue.ortvalue_from_numpy(values))
        for tensor in session.get_outputs():
            binding.bind_output(tensor.name)
        return binding

    def _once(self, session: Any, binding: Any, factors: list[float]) -> tuple[float, float]:
        """What one run took on the phone, and the time of day."""
        begin = time.perf_counter()
        session.run_with_iobinding(binding)
        measured = time.perf_counter() - begin
        told = self.phone.stretch(measured)
        factors.append(told / measured)
        return told, time.perf_counter()

    def _report(
        self, name: str, created: float, first: float, times_s: Sequence[float], elapsed: float, processor: float
    ) -> None:
        count = len(times_s)
        usage = min(100, int(100 * processor / max(elapsed, 1e-9) / toolbox.describe()["cores"]))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(
            f"Session creation time cost: {created:g} s\n"
            f"First inference time cost: {int(first * 1e3)} ms\n"
            f"Total inference time cost: {sum(times_s):g} s\n"
            f"Total inference requests: {count}\n"
            f"Average inference time cost total: {1e3 * sum(times_s) / count:.6f} ms\n"
            f"Total inference run time: {elapsed:g} s\n"
            f"Number of inferences per second: {count / elapsed:g} \n"
            f"Avg CPU usage: {usage} %\n"
            f"Peak working set size: {peak} bytes"
        )
        ordered = sorted(times_s)
        shares = {"P50": 0.5, "P90": 0.9, "P95": 0.95, "P99": 0.99, "P999": 0.999}
        lines = [f"Min Latency: {ordered[0]:g} s", f"Max Latency: {ordered[-1]:g} s"]
        lines += [f"{title} Latency: {ordered[int(count * share)]:g} s" for title, share in shares.items()]
        described = "s" in self.switches
        if len(self.positional) == 2:
            try:
                with open(self.positional[1], "a", encoding="utf-8") as file:
                    for run, seconds in enumerate(times_s):
                        file.write(f"{name},{seconds:g},{peak},{usage},{run}\n")
                    if described:
                        file.write("\n" + "\n".join(lines) + "\n")
            except OSError:
                print(f"failed to open result file '{self.positional[1]}'. will dump stats to output.", file=sys.stderr)
                described = True
        else:
            print(f"Avg CPU usage:{usage}\nPeak working set size:{peak}\nRuns:{count}")
            described = True
        if described:
            print("\n".join(lines))

    def _scale_profile(self, path: Path, factors: Sequence[float]) -> None:
        """The profile tells the phone's times: what lies before the end of a run belongs to it."""
        provider = "NnapiExecutionProvider" if self["e"] == "nnapi" else None
        if all(factor == 1.0 for factor in factors) and provider is None:
            return
        events = json.loads(path.read_text())
        run = 0
        for event in events:
            if event.get("cat") not in ("Node", "Session") or run >= len(factors):
                continue
            ends_run = event["name"] == "model_run"
            if event["cat"] == "Node" or ends_run or event["name"] == "SequentialExecutor::Execute":
                event["dur"] = int(event["dur"] * factors[run])
            if provider is not None and "provider" in event.get("args", {}):
                event["args"]["provider"] = provider
            run += ends_run
        path.write_text(json.dumps(events, indent=None))


PROGRAMS: dict[str, Callable[[Sequence[str]], int]] = {
    "benchmark_model": lambda argv: BenchmarkModel(argv).main(),
    "onnxruntime_perf_test": lambda argv: PerfTest(argv).main(),
}


if __name__ == "__main__":
    try:
        status = PROGRAMS[sys.argv[1]](sys.argv[2:])
        sys.stdout.flush()
    except BrokenPipeError:
        os._exit(1)
    # The runtimes' threads are not waited for.
    sys.stderr.flush()
    os._exit(status)
