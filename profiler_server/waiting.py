"""Why what is pending is not measured yet, in one sentence for whoever waits."""

from __future__ import annotations

from typing import Literal

from sqlalchemy.orm import Session

from lut_db.storage import queries
from lut_db.storage.queries import DeviceView
from lut_db.wire import DeviceState
from profiler_server.settings import Settings


def device_state(view: DeviceView, settings: Settings) -> DeviceState:
    """A device as it goes over the wire. A device that is silent for too long is lost, unless it is quarantined."""
    state: Literal["ready", "lost", "quarantined"] = "ready"
    reason = view.reason
    if view.state == "quarantined":
        state = "quarantined"
    elif view.silent_s > settings.lost_after_s:
        state, reason = "lost", f"no sign of life for {view.silent_s:.0f} s"
    return DeviceState(
        device=view.device, state=state, reason=reason, last_seen=view.last_seen, agreement=view.agreement
    )


def waiting_for(session: Session, target: str, settings: Settings) -> str | None:
    """What measurements of a target wait for; None where nothing waits."""
    queue = queries.read_queue(session, target, queries.clock(session))
    if queue.pending == 0:
        return None
    devices = [device_state(view, settings) for view in queries.read_devices(session, target=target)]
    if not devices:
        return f"no device serves target {target}: start an agent for it"
    ready = [device for device in devices if device.state == "ready"]
    if not ready:
        return "; ".join(f"device {device.device.name} is {device.state} ({device.reason})" for device in devices)
    refusing = [device for device in ready if device.reason]
    if len(refusing) == len(ready):
        return "; ".join(f"device {device.device.name} refused its last lease ({device.reason})" for device in refusing)
    names = ", ".join(device.device.name for device in ready)
    return f"{queue.pending} measurements are queued for {names}, {queue.leased} of them being measured"
