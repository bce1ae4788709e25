"""The tree of errors that the rooms share. One root, one class per cause; the docstring is the default message.

LatencyLabError
├── InvalidInput               what was given cannot be right; `field` names it, `remedy` says what to do
├── StorageError
│   ├── StaleSchema            the tables are of another version of this program
│   └── NotFound               no such target, device, plan, row, pin, lease
├── Conflict                   what was asked contradicts what is there
└── MeasurementRefused         a figure was taken and cannot be trusted
"""

from __future__ import annotations


class LatencyLabError(Exception):
    """Something went wrong in latency-lab."""

    def __init__(self, message: str | None = None, *, field: str | None = None, remedy: str | None = None):
        self.message = message or (type(self).__doc__ or "").split("\n")[0]
        self.field = field
        self.remedy = remedy
        super().__init__(self.message)

    def __str__(self) -> str:
        where = f"{self.field}: " if self.field else ""
        what_to_do = f" ({self.remedy})" if self.remedy else ""
        return f"{where}{self.message}{what_to_do}"


class InvalidInput(LatencyLabError, ValueError):
    """The input is not valid."""


class StorageError(LatencyLabError):
    """The tables cannot be used."""


class StaleSchema(StorageError):
    """The database schema is not the one this program was written for."""


class NotFound(StorageError):
    """There is no such record."""


class Conflict(LatencyLabError):
    """The request contradicts what is recorded."""


class MeasurementRefused(LatencyLabError):
    """A latency was measured and cannot be trusted."""
