"""When each kernel of ONNX Runtime begins, without a profiler: by what it makes.

ONNX Runtime's profiler takes two to nine microseconds around each kernel, more than many kernels, and writes a kilobyte
for it, which other things then lack in the caches: networks that are profiled take 1.4 to 2.5 times as long, and each
by a factor of its own. But a runtime that runs a graph makes an object for every result, always from the same places in
its code and in the same order. So a session is profiled in its first runs, with all objects written down that are made
meanwhile: those between the two readings of the clock around a kernel are the kernel's. Then profiling ends, and the
objects alone, for which the clock is read once each, say when a kernel began. It ends where the next one begins; so a
node has a share of what the runtime does between kernels.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from device_agents.backends import Unsupported

REMEDY = "set fine_clock=off"
OUTSIDE = -1


@dataclass(frozen=True)
class Marks:
    """How a trace of one run tells kernels apart.

    `order` is the place of each of a run's entries, shape (entries,). With the entry `first` a kernel begins, and
    `kernels` is its number, both of shape (marked kernels,) and ascending. At the place `end` something is made soon
    after the last one, and now and then elsewhere.
    """

    order: NDArray[np.int64]
    first: NDArray[np.intp]
    kernels: NDArray[np.intp]
    end: int

    @cached_property
    def places(self) -> NDArray[np.int64]:
        """What is to be kept in a trace."""
        return np.unique([*self.order, self.end])

    def within(self, kernels: int) -> NDArray[np.intp]:
        """For each of the kernels in the order of running, the mark between which and the next one it ran."""
        return np.searchsorted(self.kernels, np.arange(kernels), side="right") - 1

    def durations_ns(self, trace: NDArray, runs: int) -> NDArray[np.int64]:
        """What each marked kernel took in each run, shape (runs, marked kernels), from a trace of so many runs.

        Raises Unsupported where a run did not make what it should.
        """
        entries = len(self.order)
        where = np.flatnonzero(trace["place"] != self.end)
        if len(where) != runs * entries or np.any(trace["place"][where].reshape(runs, entries) != self.order):
            raise Unsupported(
                f"ONNX Runtime made {len(where)} objects in {runs} runs of a graph, not {entries} in each in the order "
                f"in which it made them before; {REMEDY}"
            )
        begins = where.reshape(runs, entries)[:, self.first]
        ends = np.flatnonzero(trace["place"] == self.end)
        ends = ends[np.searchsorted(ends[:-1], begins[:, -1])] if len(ends) else begins[:, -1]
        if np.any(ends <= begins[:, -1]) or np.any(ends[:-1] > begins[1:, 0]):
            raise Unsupported(f"ONNX Runtime did not make what it made before after the last kernel; {REMEDY}")
        return np.diff(trace["ns"][np.column_stack([begins, ends])], axis=1)


def find_marks(profiled: NDArray, plain: Sequence[NDArray], kernels: int) -> Marks:
    """From what was made in a run with so many profiled kernels, and in some without a profiler.

    Places that a run comes by as often with a profiler as without are the graph's; of these as few as possible that
    mark as many kernels as possible. Another one shows where the last kernel ends. What differs from run to run, as
    what is made for other threads may, shows nothing. Raises Unsupported where the readings of the clock are not those
    around so many kernels, where the first of them makes nothing, and where nothing is made after the last.
    """
    owners = _owners(profiled["place"], kernels)
    made, plainly = profiled["place"], plain[0]["place"]
    usually = Counter(made.tolist())
    now, *later = (Counter(run["place"].tolist()) for run in plain)
    steady = {place for place in now if place > 0 and all(count[place] == now[place] for count in later)}
    marked: dict[int, set[int]] = {
        place: set(owners[made == place].tolist()) - {OUTSIDE} for place in steady if usually[place] == now[place]
    }
    places: list[int] = []
    seen: set[int] = set()
    while marked:
        best = max(marked, key=lambda place: (len(marked[place] - seen), -place))
        if not marked[best] - seen:
            break
        places.append(best)
        seen |= marked.pop(best)
    kept = np.isin(made, places)
    where = np.flatnonzero(np.isin(plainly, places))
    if 0 not in seen or not np.array_equal(made[kept], plainly[where]):
        raise Unsupported(f"ONNX Runtime's kernels cannot be told apart by what they make; {REMEDY}")
    of_kernels, entries = np.unique(owners[kept], return_index=True)
    # What the profiler makes too, strings, is none of the last kernel's own.
    own = [place for place in made[owners >= max(seen)].tolist() if usually[place] == now[place]]
    behind = np.isin(plainly, list(steady.difference(own, places)))
    behind[: where[entries[-1]]] = False
    if not behind.any():
        raise Unsupported(f"ONNX Runtime makes nothing after the last kernel, which has no end so; {REMEDY}")
    inside = of_kernels != OUTSIDE
    return Marks(plainly[where], entries[inside], of_kernels[inside], int(plainly[np.argmax(behind)]))


def _owners(places: NDArray[np.int64], kernels: int) -> NDArray[np.intp]:
    """The kernel during which each entry of a profiled run was made, else `OUTSIDE`.

    The clock is read at one place before a kernel and at another one behind it; at the first also before that, where a
    run begins, and at the second as often after it. With more than one thread it is read within kernels too.
    """
    read = [np.flatnonzero(places == place) for place in np.unique(places[places < 0])]
    widest: NDArray[np.intp] = np.zeros((2, 0), dtype=np.intp)
    for begins, ends in permutations(read, 2):
        if len(begins) != len(ends) or len(begins) < kernels:
            continue
        around = np.stack([begins[-kernels:], ends[:kernels]])
        inside = np.all(around[0] < around[1]) and np.all(around[1][:-1] < around[0][1:])
        if inside and np.ptp(around, axis=0).sum() > np.ptp(widest, axis=0).sum():
            widest = around
    if not widest.size:
        raise Unsupported(
            f"ONNX Runtime's profiler does not read the clock once before and once behind a kernel; {REMEDY}"
        )
    owners = np.full(len(places), OUTSIDE)
    for number, (begin, end) in enumerate(widest.T):
        owners[begin:end] = number
    return owners
