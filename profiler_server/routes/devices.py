"""Devices: registering them, and leasing them work."""

from __future__ import annotations

from fastapi import Request, Response
from starlette.concurrency import run_in_threadpool

from lut_db.errors import InvalidInput, NotFound
from lut_db.storage import queries
from lut_db.targets import Device, Name
from lut_db.wire import API, DeviceState, Lease, LeaseRequest
from profiler_server import leasing
from profiler_server.lab import LabHere
from profiler_server.routes import make_router
from profiler_server.waiting import device_state

router = make_router("devices", f"{API}/devices")


@router.put("/{name}")
def register_device(name: Name, device: Device, lab: LabHere) -> DeviceState:
    """Registers a device and its targets, or renews its registration."""
    if device.name != name:
        raise InvalidInput(
            f"the path names {name}, the body {device.name}", field="name", remedy="use one name in both"
        )
    with lab.database.write() as session:
        queries.put_device(session, device, queries.clock(session))
        (view,) = queries.read_devices(session, name=name)
    return device_state(view, lab.settings)


@router.get("")
def list_devices(lab: LabHere) -> list[DeviceState]:
    """Every device and its state."""
    with lab.database.read() as session:
        return [device_state(view, lab.settings) for view in queries.read_devices(session)]


@router.get("/{name}")
def read_device(name: Name, lab: LabHere) -> DeviceState:
    """One device and its state."""
    with lab.database.read() as session:
        views = queries.read_devices(session, name=name)
    if not views:
        raise NotFound(f"there is no device {name}", field="name", remedy=f"register it with PUT {API}/devices/{name}")
    return device_state(views[0], lab.settings)


@router.post("/{name}/release")
def release_device(name: Name, lab: LabHere) -> DeviceState:
    """Gives a quarantined device work again. One that was kept out of a pool is tested again first."""
    with lab.database.write() as session:
        queries.lock_device(session, name)
        queries.release_device(session, name)
        (view,) = queries.read_devices(session, name=name)
    lab.bell.ring()
    return device_state(view, lab.settings)


@router.post(
    "/{name}/leases", response_model=Lease, responses={204: {"description": "Nothing waits for this target"}}
)  # fmt: skip
async def claim_lease(name: Name, asked: LeaseRequest, lab: LabHere, request: Request) -> Lease | Response:
    """Leases measurements to a device, waiting for some to come.

    A device that asks while it holds a lease gives that one up: its agent was restarted.
    """
    seen_s = lab.settings.lost_after_s / 3
    claim = _Claim(lab, name, asked, seen_s)
    await lab.until(claim, asked.wait_s, request)
    if claim.lease is None:
        return Response(status_code=204)
    if await request.is_disconnected():
        # Nobody will measure it: back to the queue at once instead of at its deadline.
        await run_in_threadpool(claim.give_back)
        return Response(status_code=204)
    return claim.lease


class _Claim:
    """Tries to claim, again and again: the first try may give up a lease that the device still holds."""

    def __init__(self, lab: LabHere, name: str, asked: LeaseRequest, seen_s: float):
        self.lease: Lease | None = None
        self._lab, self._name, self._asked, self._seen_s = lab, name, asked, seen_s
        self._first = True

    def __call__(self) -> bool:
        """One try, in transactions of its own. True when waiting is over."""
        database, settings = self._lab.database, self._lab.settings
        first, self._first = self._first, False
        if not first and not self._worth_a_try():
            return False
        with database.write() as session:
            if not first and queries.holds_lease(session, self._name):
                return True  # a later request of this device was served: this one is a ghost
            granted = leasing.grant(
                session, self._name, self._asked.target, self._asked.max_operators, settings, give_up=first
            )
        if granted is None:
            return False
        with database.read() as session:
            self.lease = leasing.compose(session, granted.id, settings)
        return self.lease is not None

    def _worth_a_try(self) -> bool:
        """Whether something waits, found out without a lock; notes now and then that the device is there."""
        with self._lab.database.read() as session:
            now = queries.clock(session)
            asks = leasing.claimant(self._name, self._asked.target, now, self._lab.settings)
            worth = queries.has_claimable(session, asks)
            (view,) = queries.read_devices(session, name=self._name)
        if view.silent_s > self._seen_s:
            with self._lab.database.write() as session:
                queries.see_device(session, self._name, queries.clock(session))
        return worth

    def give_back(self) -> None:
        if self.lease is not None:
            with self._lab.database.write() as session:
                leasing.release(session, self.lease.token)
            self._lab.bell.ring()
