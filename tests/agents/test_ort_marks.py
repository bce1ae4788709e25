"""Kernels are told apart by what a runtime makes, whatever its profiler and its executor make beside."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from device_agents.backends import Unsupported
from device_agents.fine_clock import ENTRY
from device_agents.ort_marks import find_marks

RESULT = 100
"""The place at which every kernel that is marked makes its result."""
BEGIN, END = -1000, -2000
"""Where the profiler reads the clock before and behind a kernel."""
SCRATCH = st.lists(st.integers(1, 9), max_size=3)
EXECUTORS = st.lists(st.integers(5, 14), max_size=3)
PROFILERS = st.lists(st.integers(10, 20), max_size=4)
"""Places that kernels, what runs them and a profiler come by; what runs kernels shares some with either."""


@dataclass(frozen=True)
class Kernel:
    makes: list[int]
    before: list[int]
    profiled_before: list[int]
    profiled_behind: list[int]
    readings: int = 0
    """How often the clock is read within it, at two places."""


def kernels(readings: st.SearchStrategy[int]) -> st.SearchStrategy[Kernel]:
    makes = st.builds(lambda before, behind: [*before, RESULT, *behind], SCRATCH, SCRATCH)
    return st.builds(Kernel, makes, EXECUTORS, PROFILERS, PROFILERS, readings)


def trace(places: list[int], begin_ns: int = 0, step_ns: int = 7) -> NDArray:
    return np.array([(begin_ns + step_ns * number, place) for number, place in enumerate(places)], dtype=ENTRY)


def plain_run(graph: list[Kernel]) -> list[int]:
    return [30, *(place for kernel in graph for place in (*kernel.before, *kernel.makes)), 31]


def profiled_run(graph: list[Kernel]) -> list[int]:
    places = [-1, 30, BEGIN, BEGIN, -2]
    for kernel in graph:
        places += [*kernel.before, BEGIN, *kernel.profiled_before, *[-3000, -4000] * kernel.readings, *kernel.makes]
        places += [*kernel.profiled_behind, END]
    return [*places, END, END, 31]


def owners(graph: list[Kernel]) -> NDArray[np.int64]:
    """Whose each entry of a plain run is; -1 of none."""
    found = [-1]
    for number, kernel in enumerate(graph):
        found += [-1] * len(kernel.before) + [number] * len(kernel.makes)
    return np.array([*found, -1])


GRAPHS = st.lists(kernels(st.just(0)), min_size=1, max_size=12) | st.lists(kernels(st.integers(2, 4)), min_size=3)
"""With one thread, and with more."""


@given(GRAPHS, st.integers(1, 4))
def test_every_kernel_has_the_time_from_its_beginning_to_the_next(graph: list[Kernel], runs: int) -> None:
    marks = find_marks(trace(profiled_run(graph)), [trace(plain_run(graph))], len(graph))
    assert marks.kernels.tolist() == list(range(len(graph)))
    assert marks.within(len(graph)).tolist() == list(range(len(graph)))
    whole = [trace(plain_run(graph), 10_000 * number, 3 + number) for number in range(runs)]
    kept = np.concatenate([run[np.isin(run["place"], marks.places)] for run in whole])
    durations_ns = marks.durations_ns(kept, runs)
    assert durations_ns.shape == (runs, len(graph))
    ends_ns = np.array([run["ns"][-1] for run in whole])
    begins_ns = ends_ns[:, None] - np.cumsum(durations_ns[:, ::-1], axis=1)[:, ::-1]
    for run, found in zip(whole, begins_ns, strict=True):
        assert owners(graph)[np.searchsorted(run["ns"], found)].tolist() == list(range(len(graph)))


@given(st.lists(kernels(st.just(0)), min_size=2, max_size=6), st.data())
def test_what_makes_nothing_is_a_part_of_what_ran_before(graph: list[Kernel], data: st.DataObject) -> None:
    number = data.draw(st.integers(1, len(graph)))
    silent = Kernel([], [], data.draw(PROFILERS), [])
    graph = [*graph[:number], silent, *graph[number:]]
    marks = find_marks(trace(profiled_run(graph)), [trace(plain_run(graph))], len(graph))
    assert marks.kernels.tolist() == [other for other in range(len(graph)) if other != number]
    assert marks.within(len(graph)).tolist() == [*range(number), *range(number - 1, len(graph) - 1)]


SILENT = Kernel([], [], [8], [])
SIMPLE = [Kernel([RESULT, 1], [5], [8], [9]), Kernel([RESULT], [], [8, 8], []), Kernel([RESULT, 2], [6], [], [9])]


@pytest.mark.parametrize(
    "places",
    [[RESULT, RESULT, 31], [*[RESULT] * 4, 31], [RESULT, RESULT, 3, 31], []],
    ids=["too few", "too many", "another", "nothing"],
)  # fmt: skip
def test_a_run_that_makes_something_else_is_refused(places: list[int]) -> None:
    marks = find_marks(trace(profiled_run(SIMPLE)), [trace(plain_run(SIMPLE))], len(SIMPLE))
    assert (marks.order.tolist(), marks.end) == ([RESULT] * 3, 31)
    with pytest.raises(Unsupported, match="not 3 in each in the order in which it made them before"):
        marks.durations_ns(trace(places), 1)


@pytest.mark.parametrize("number", [2, 4, 7])
def test_another_number_of_kernels_than_the_profiler_tells_is_refused(number: int) -> None:
    with pytest.raises(Unsupported, match="does not read the clock once before and once behind a kernel"):
        find_marks(trace(profiled_run(SIMPLE)), [trace(plain_run(SIMPLE))], number)


@pytest.mark.parametrize(
    ("graph", "profiled", "plain", "told"),
    [(SIMPLE, [30, 31], plain_run(SIMPLE), "does not read the clock"),
     (SIMPLE, profiled_run(SIMPLE), [30, 31], "cannot be told apart"),
     ([SILENT, *SIMPLE], profiled_run([SILENT, *SIMPLE]), plain_run(SIMPLE), "cannot be told apart"),
     (SIMPLE[1:2], profiled_run(SIMPLE[1:2]), [*plain_run(SIMPLE[1:2]), RESULT], "cannot be told apart"),
     (SIMPLE, profiled_run(SIMPLE)[:-1], plain_run(SIMPLE)[:-1], "nothing after the last kernel")],
    ids=["no clock is read", "nothing is made", "the first kernel makes nothing", "more is made without a profiler",
         "nothing is made at the end"],
)  # fmt: skip
def test_kernels_that_cannot_be_told_apart_are_refused(
    graph: list[Kernel], profiled: list[int], plain: list[int], told: str
) -> None:
    with pytest.raises(Unsupported, match=told):
        find_marks(trace(profiled), [trace(plain)], len(graph))


def test_what_ends_a_run_may_be_made_elsewhere_too() -> None:
    marks = find_marks(trace(profiled_run(SIMPLE)), [trace(plain_run(SIMPLE))], len(SIMPLE))
    runs = [31, RESULT, RESULT, RESULT, 31, 31, RESULT, 31, 31, RESULT, RESULT, 31]
    assert marks.durations_ns(trace(runs), 2).tolist() == [[7, 7, 7], [21, 7, 7]]
    for missing in (4, 5), (11,):
        places = [place for number, place in enumerate(runs) if number not in missing]
        with pytest.raises(Unsupported, match="did not make what it made before after the last kernel"):
            marks.durations_ns(trace(places), 2)


def test_what_differs_from_run_to_run_marks_nothing() -> None:
    plain = plain_run(SIMPLE)
    runs = [trace(places) for places in (plain, [*plain[:3], RESULT, *plain[3:]], plain)]
    with pytest.raises(Unsupported, match="cannot be told apart"):
        find_marks(trace(profiled_run(SIMPLE[1:2])), runs, 1)
    marks = find_marks(trace(profiled_run(SIMPLE)), [trace([*plain, *[32] * number]) for number in (2, 1, 1)], 3)
    assert (marks.order.tolist(), marks.end) == ([RESULT] * 3, 31)
