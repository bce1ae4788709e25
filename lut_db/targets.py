"""Targets and devices: what a latency is a property of, and the physical units that can measure it."""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Literal, get_args

from pydantic import Field

from lut_db.operators import Record, canonical_key

Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""A name that is safe in a URL and in a file name."""

Text = Annotated[str, Field(min_length=1, max_length=200)]
Precision = Literal["fp32", "fp16", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


class Target(Record):
    """What a latency is a property of. Two targets that differ in any field share no row.

    `runtime_version` is the version of a library, or the hash of a tool on a phone. `cores` pins the threads to
    these cores; empty leaves them free. `options` are the runtime's own settings that change latency.
    """

    device_model: Text
    os_build: Text
    runtime: Name
    runtime_version: Text
    accelerator: Name = "cpu"
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    cores: tuple[Annotated[int, Field(ge=0, le=4095)], ...] = ()
    precision: Precision = "fp32"
    clock_policy: Text = "default"
    options: dict[Name, str] = Field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        return canonical_key("target", self.model_dump(mode="json"))[:16]

    def __str__(self) -> str:
        cores = f" on cores {','.join(map(str, self.cores))}" if self.cores else ""
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.device_model}, {self.runtime} {self.runtime_version}, {self.precision}, {threads}{cores}"


class Device(Record):
    """One physical unit, and the targets it can measure. A device is leased to one agent at a time."""

    name: Name
    targets: tuple[Target, ...] = Field(min_length=1, max_length=64)
