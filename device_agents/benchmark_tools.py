"""What the benchmark tools of two runtimes print, read back: `benchmark_model` and `onnxruntime_perf_test`. Pure.

A number is returned only where everything around it is as expected: the flags were all understood, the number of
runs is the one asked for, the figures agree with each other, and the delegate that was asked for took every node.
Anything else raises ToolFailed, which keeps the text.

`benchmark_model` has two generations of formats. The newer one puts `INFO: ` before its lines, adds percentiles to its
statistics (`p5=… median=… p95=…`) and leaves out the column `[start]` of its tables. Durations are microseconds.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lut_db.errors import LatencyLabError

KEPT_TEXT = 3000
"""Characters of a tool's output that go into an error: its end, where tools say what went wrong."""

FEW_TICKS_US = 10.0
"""Below this a median, in whole microseconds, is coarse; what ticks cut off evens out in a mean."""

LATER_TOLERANCE = 1e-3
"""Relative difference allowed between two places where a tool prints the same mean, rounded differently."""


class ToolFailed(LatencyLabError):
    """A tool did not say what it should; the message keeps what it said."""

    def __init__(self, what: str, text: str = "") -> None:
        said = text.strip()
        super().__init__(f"{what}; it said: {said[-KEPT_TEXT:]}" if said else f"{what}; it said nothing")


class NotDelegated(ToolFailed):
    """The delegate that was asked for did not take the whole graph."""


@dataclass(frozen=True)
class Statistics:
    """One line `count=…` of `benchmark_model`, in microseconds. `median_us` only where the tool tells it."""

    count: int
    min_us: float
    max_us: float
    mean_us: float
    median_us: float | None


@dataclass(frozen=True)
class Delegation:
    """How much of a graph a delegate took."""

    delegate: str
    extent: Literal["complete", "partial", "none"]


@dataclass(frozen=True)
class Row:
    """A row of a profile: what ran, how often in one run of the graph, and the mean of its times.

    `outputs` are the names of the tensors that an operator of the graph makes. There are none for what is `inside` a
    delegate, nor for the runtime's other work, which has no `index` either: that counts a graph's operators, or
    those inside a delegate.
    """

    type: str
    mean_ms: float
    calls: int
    outputs: tuple[str, ...]
    inside: bool
    index: int | None


@dataclass(frozen=True)
class BenchmarkRun:
    """What one start of `benchmark_model` says. `profile` is empty where none was asked for."""

    measured: Statistics
    delegations: tuple[Delegation, ...]
    profile: tuple[Row, ...]

    @property
    def latency_ms(self) -> float:
        """The median where the tool tells it and it is more than a few ticks of its timer, else the mean."""
        median_us = self.measured.median_us
        return (self.measured.mean_us if median_us is None or median_us < FEW_TICKS_US else median_us) / 1e3


_PREFIX = re.compile(r"^(?P<level>INFO|WARN|WARNING|ERROR|VERBOSE): (?:\[[^\]]*:\d+\] )?")
_NUMBER = r"[0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?"
_PERCENTILES = rf"(?: p5=(?P<p5>{_NUMBER}) median=(?P<median>{_NUMBER}) p95=(?P<p95>{_NUMBER}))?"
_SAME = re.compile(rf"count=(?P<count>[0-9]+) curr=(?P<curr>{_NUMBER})(?P<all>\(all same\))?{_PERCENTILES}")
_SPREAD = re.compile(
    rf"count=(?P<count>[0-9]+) first=(?P<first>{_NUMBER}) curr=(?P<curr>{_NUMBER}) min=(?P<min>{_NUMBER}) "
    rf"max=(?P<max>{_NUMBER}) avg=(?P<avg>{_NUMBER}) std=(?P<std>{_NUMBER}|-?nan)" + _PERCENTILES
)
_RUNNING = re.compile(rf"Running benchmark for at least (?P<runs>[0-9]+) iterations and at least {_NUMBER} seconds.*")
_SUMMARY = re.compile(
    rf"(?:Inference timings in us: Init: {_NUMBER}, First inference: {_NUMBER}, Warmup \(avg\): {_NUMBER}, "
    rf"Inference \(avg\): (?P<newer>{_NUMBER})"
    rf"|Average inference timings in us: Warmup: {_NUMBER}, Init: {_NUMBER}, (?:Inference|no stats): "
    rf"(?P<older>{_NUMBER}))"
)
_COMPLETE = re.compile(r"(?:Explicitly a|A)pplied (\S+) delegate, and the model graph will be completely executed")
_PARTIAL = re.compile(r"(?:Explicitly a|A)pplied (\S+) delegate, and the model graph will be pa\w+ executed")
_NONE = re.compile(r"Though (\S+) delegate is (?:explicitly )?applied, the model graph will not be executed")
_PROFILE = "Operator-wise Profiling Info for Regular Benchmark Runs:"
_TITLE = re.compile(r"=+ (?P<title>.+?) =+")
_ROWS = "Run Order"
_TIMINGS = re.compile(
    rf"Timings \(microseconds\): count=(?P<count>[0-9]+)(?: [a-z0-9]+=(?:{_NUMBER}|-?nan)(?:\(all same\))?)*"
)
_OBSERVED = re.compile(r"([0-9]+) nodes observed")


def parse_flags(text: str) -> frozenset[str]:
    """The flags that `benchmark_model --help` names. Raises ToolFailed where there are none."""
    flags = frozenset(re.findall(r"^\s*(?:ERROR: )?--(\w+)=", text, re.MULTILINE))
    if "num_runs" not in flags or "graph" not in flags:
        raise ToolFailed("benchmark_model --help names no flags", text)
    return flags


def parse_benchmark(
    text: str, runs: int, *, warmup_runs: int = 1, delegate: str | None = None, profiled: bool = False
) -> BenchmarkRun:
    """Reads the output of one start of `benchmark_model` with exact numbers of runs (`--min_secs=0` and so on).

    `delegate` names one that must have taken the whole graph (`GPU`, `NNAPI`). Raises ToolFailed.
    """
    lines = [_Line.of(line) for line in text.replace("\r\n", "\n").split("\n")]
    for line in lines:
        if "Unconsumed cmdline flags" in line.text:
            raise ToolFailed(f"benchmark_model does not know a flag ({line.text.strip()})", text)
        if line.level == "ERROR":
            raise ToolFailed(f"benchmark_model reported an error ({line.text.strip()})", text)
    warmup, measured = _statistics(lines, text)
    if warmup.count != warmup_runs:
        raise ToolFailed(f"benchmark_model made {warmup.count} warm-up runs instead of {warmup_runs}", text)
    if measured.count != runs:
        raise ToolFailed(f"benchmark_model made {measured.count} runs instead of {runs}", text)
    _check_summary(lines, measured, text)
    delegations = _delegations(lines)
    if delegate is not None:
        _check_delegation(delegations, delegate, text)
    return BenchmarkRun(measured, delegations, _profile(lines, runs, text) if profiled else ())


@dataclass(frozen=True)
class _Line:
    level: str
    text: str

    @classmethod
    def of(cls, line: str) -> _Line:
        found = _PREFIX.match(line)
        return cls(found["level"], line[found.end() :]) if found else cls("", line)


def _statistics(lines: Sequence[_Line], text: str) -> tuple[Statistics, Statistics]:
    """The two lines of statistics, each right behind the line that announces it: warm-up, then measured."""
    found: list[Statistics] = []
    for number, line in enumerate(lines):
        if not _RUNNING.fullmatch(line.text):
            continue
        after = next((later.text.strip() for later in lines[number + 1 :] if later.text.strip()), "")
        found.append(_read_statistics(after, text))
    if len(found) != 2:
        raise ToolFailed(f"benchmark_model printed {len(found)} statistics instead of two", text)
    return found[0], found[1]


def _read_statistics(line: str, text: str) -> Statistics:
    if same := _SAME.fullmatch(line):
        count, value = int(same["count"]), float(same["curr"])
        if count < 1 or (count > 1) != bool(same["all"]) or float(same["median"] or value) != value:
            raise ToolFailed("benchmark_model printed statistics that contradict themselves", text)
        read = Statistics(count, value, value, value, value)
    elif spread := _SPREAD.fullmatch(line):
        median = None if spread["median"] is None else float(spread["median"])
        read = Statistics(
            int(spread["count"]), float(spread["min"]), float(spread["max"]), float(spread["avg"]), median
        )
    else:
        raise ToolFailed("benchmark_model printed no statistics where they belong", text)
    middles = [read.mean_us] if read.median_us is None else [read.mean_us, read.median_us]
    slack = LATER_TOLERANCE * read.max_us  # means are printed with six digits, extremes with all
    if not math.isfinite(read.max_us) or any(
        not read.min_us - slack <= middle <= read.max_us + slack for middle in middles
    ):
        raise ToolFailed("benchmark_model printed statistics that contradict themselves", text)
    if read.mean_us <= 0:
        raise ToolFailed("the graph is faster than the tick of benchmark_model's timer, 1 us", text)
    return read


def _check_summary(lines: Sequence[_Line], measured: Statistics, text: str) -> None:
    """The tool's last word repeats the mean: without it the tool did not come to its end."""
    summaries = [found for line in lines if (found := _SUMMARY.fullmatch(line.text.strip()))]
    if len(summaries) != 1:
        raise ToolFailed(f"benchmark_model printed {len(summaries)} summaries instead of one", text)
    mean_us = float(summaries[0]["newer"] or summaries[0]["older"])
    # The oldest builds cut the mean to whole microseconds.
    if abs(mean_us - measured.mean_us) > LATER_TOLERANCE * measured.mean_us + (1 if summaries[0]["older"] else 0):
        raise ToolFailed("the summary of benchmark_model contradicts its statistics", text)


def _delegations(lines: Sequence[_Line]) -> tuple[Delegation, ...]:
    found = []
    for line in lines:
        if complete := _COMPLETE.search(line.text):
            found.append(Delegation(complete[1], "complete"))
        elif partial := _PARTIAL.search(line.text):
            found.append(Delegation(partial[1], "partial"))
        elif none := _NONE.search(line.text):
            found.append(Delegation(none[1], "none"))
    return tuple(found)


def _check_delegation(delegations: Sequence[Delegation], delegate: str, text: str) -> None:
    mine = [found for found in delegations if found.delegate.upper() == delegate.upper()]
    if not mine:
        raise NotDelegated(f"nothing proves that the {delegate} delegate ran the graph", text)
    if any(found.extent != "complete" for found in mine):
        raise NotDelegated(f"the {delegate} delegate did not run the whole graph", text)


def _profile(lines: Sequence[_Line], runs: int, text: str) -> tuple[Row, ...]:
    """The tables `Run Order` of the measured runs: one of the graph, then one of what ran inside a delegate."""
    starts = [number for number, line in enumerate(lines) if line.text.strip() == _PROFILE]
    if len(starts) != 1:
        raise ToolFailed(f"benchmark_model printed {len(starts)} profiles of its measured runs instead of one", text)
    rows: list[Row] = []
    tables: list[int] = []
    runs_of: list[int] = []
    tail = [line.text.strip("\r") for line in lines[starts[0] + 1 :]]
    for number, line in enumerate(tail):
        title = _TITLE.fullmatch(line.strip())
        if title is not None and title["title"] == _ROWS:
            found = _table(tail[number + 1 :], text)
            tables.append(len(found))
            rows.extend(found)
        elif timings := _TIMINGS.fullmatch(line):
            runs_of.append(int(timings["count"]))
        elif observed := _OBSERVED.fullmatch(line):
            if not tables or tables[-1] != int(observed[1]):
                raise ToolFailed(f"a table of benchmark_model does not hold the {observed[1]} nodes observed", text)
            tables[-1] = 0
    if not rows or any(tables) or not runs_of:
        raise ToolFailed("the profile of benchmark_model is not whole", text)
    if runs_of[0] != runs:
        raise ToolFailed(f"the profile of benchmark_model is of {runs_of[0]} runs instead of {runs}", text)
    # Builds that do not count calls print 0 everywhere; elsewhere 0 stands for less than one call per run.
    if not any(row.calls for row in rows):
        return tuple(replace(row, calls=1) for row in rows)
    if not all(row.calls for row in rows):
        raise ToolFailed("an operator in the profile of benchmark_model did not run every time", text)
    return tuple(rows)


def _table(lines: Sequence[str], text: str) -> list[Row]:
    if not lines:
        raise ToolFailed("a table of benchmark_model is cut off", text)
    csv = "[" not in lines[0]
    header = [cell.strip(" []").lower() for cell in lines[0].strip().split("," if csv else "\t") if cell.strip()]
    wanted = {"type": "node type", "mean": "avg_ms" if csv else "avg ms", "calls": "times called", "name": "name"}
    missing = [title for title in wanted.values() if title not in header]
    if missing or header[0] != "node type" or header[-1] != "name":
        raise ToolFailed(f"a table of benchmark_model has no column {(missing or ['node type, …, name'])[0]!r}", text)
    read = _csv_row if csv else _tab_row
    rows: list[Row] = []
    for line in lines[1:]:
        if not line.strip():
            return rows
        cells = read(line, len(header))
        if cells is None:
            raise ToolFailed(f"a row of benchmark_model's profile does not fit its header: {line.strip()!r}", text)
        cell = dict(zip(header, cells, strict=True))
        mean, calls = cell[wanted["mean"]], cell["times called"]
        if not re.fullmatch(_NUMBER, mean) or not re.fullmatch("[0-9]+", calls):
            raise ToolFailed(f"a row of benchmark_model's profile has no figures: {line.strip()!r}", text)
        rows.append(_row(cell["node type"], cell["name"], float(mean), int(calls)))
    raise ToolFailed("a table of benchmark_model is cut off", text)


def _row(kind: str, name: str, mean_ms: float, calls: int) -> Row:
    """`[tensor, …]:index` is an operator of the graph, `Delegate/type:index` one inside a delegate."""
    if inside := re.fullmatch(r"Delegate/(.*):([0-9]+)", name):
        # Older builds call all of them the same.
        return Row(inside[1], mean_ms, calls, (), True, int(inside[2]))
    if operator := re.fullmatch(r"\[(.*)\]:([0-9]+)", name):
        return Row(kind, mean_ms, calls, tuple(re.split(r"[,\t] ", operator[1])), False, int(operator[2]))
    return Row(kind, mean_ms, calls, (), False, None)


def _tab_row(line: str, columns: int) -> list[str] | None:
    cells = [cell.strip() for cell in line.lstrip("\t").split("\t", columns - 1)]
    return cells if len(cells) == columns else None


def _csv_row(line: str, columns: int) -> list[str] | None:
    """Types and names can hold commas, figures cannot."""
    figures = rf"((?:, -?{_NUMBER}%?|, -?nan%?|, inf%?){{{columns - 2}}}), "
    found = re.fullmatch(rf"(.*?){figures}(.*)", line)
    if found is None:
        return None
    return [found[1].strip(), *found[2][2:].split(", "), found[3].strip()]


def parse_results(text: str, runs: int, said: str = "") -> list[float]:
    """The latencies in ms that `onnxruntime_perf_test -m times -r runs` wrote to its result file. Raises ToolFailed.

    A line for each run: `model,seconds,peak working set,CPU usage,run`. `said` is what the tool printed.
    """
    lines = [line for line in text.replace("\r\n", "\n").split("\n") if line.strip()]
    text = f"{said}\n{text}"
    latencies_ms = []
    for number, line in enumerate(lines):
        found = re.fullmatch(rf".*,({_NUMBER.replace('e[', '[eE][')}),[0-9]+,-?[0-9]+,([0-9]+)", line)
        if found is None or int(found[2]) != number:
            raise ToolFailed(f"line {number + 1} of onnxruntime_perf_test's results is not that of a run", text)
        latencies_ms.append(float(found[1]) * 1e3)
        if not 0 < latencies_ms[-1] < math.inf:
            raise ToolFailed(f"line {number + 1} of onnxruntime_perf_test's results gives no time", text)
    if len(latencies_ms) != runs:
        raise ToolFailed(f"onnxruntime_perf_test made {len(latencies_ms)} runs instead of {runs}", text)
    return latencies_ms


def parse_events(text: str) -> list[dict[str, Any]]:
    """The events of a profile that ONNX Runtime wrote. Raises ToolFailed."""
    try:
        events = json.loads(text)
    except ValueError as error:
        raise ToolFailed(f"the profile of onnxruntime_perf_test is no JSON ({error})", text) from error
    if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
        raise ToolFailed("the profile of onnxruntime_perf_test is no list of events", text)
    for event in events:
        if event.get("cat") in ("Node", "Session") and not (
            isinstance(event.get("name"), str) and isinstance(event.get("dur"), int) and event["dur"] >= 0
        ):
            raise ToolFailed(f"an event of onnxruntime_perf_test's profile has no duration: {event}", text)
    return events
