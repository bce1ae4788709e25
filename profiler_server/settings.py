"""Settings of the service. Each can be given in the environment, as `PROFILER_LEASE_S=60`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

DEFAULT_DATABASE = "sqlite:///latency-lab.sqlite"
Seconds = Annotated[float, Field(gt=0, le=86_400, allow_inf_nan=False)]


class Settings(BaseSettings):
    """Settings of one server process.

    `auto_upgrade` makes or upgrades the tables at start. Left open, only a SQLite file that does not exist yet is
    made; any other database must be of the right schema already.
    """

    model_config = SettingsConfigDict(env_prefix="PROFILER_", frozen=True, extra="forbid")

    database: str = DEFAULT_DATABASE
    auto_upgrade: bool | None = None
    lease_s: Seconds = Field(default=120.0, description="how long a lease holds without a heartbeat")
    lost_after_s: Seconds = Field(default=30.0, description="silence after which a device counts as lost")
    refusal_pause_s: Seconds = Field(default=5.0, description="pause before a refused measurement is tried again")
    elsewhere_s: Seconds = Field(
        default=300.0, description="how long what failed on a device is left to others of its target"
    )
    quarantine_after: int = Field(default=10, ge=1, description="leases adrift or hot that quarantine a device")
    reference_operators: int = Field(
        default=16, ge=0, le=256, description="operators that test who joins a pool; 0: whoever comes joins"
    )
    pool_tolerance: float = Field(
        default=0.1, gt=0, description="largest relative distance of a device that joins from the table it joins"
    )
    poll_s: Seconds = Field(default=0.5, description="how often a waiting request looks for what other servers did")
    tend_s: Seconds = Field(default=2.0, description="how often expired leases are looked for")
    known_operators: int = Field(default=2000, ge=0, description="known operators or networks that leases choose from")
    max_body_bytes: int = Field(default=64 << 20, ge=1 << 10)
