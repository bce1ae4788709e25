"""Whose time is whose: ONNX Runtime's profile read back in terms of a network's nodes.

The lowering names every ONNX node `n<number>/<part>` and every tensor of the network `t<i>`. Optimised nodes keep such
a name, or are named after the tensor that they now make. Layout conversions (`ReorderInput`, `ReorderOutput`, around
int8 convolutions `Transpose`) have names of their own: they are charged to the operator that forces them, the one at
their plain end.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from device_agents.backends import NodeTimes, Unsupported
from lut_db.lowering.onnx import node_number
from lut_db.networks import Network

LAYOUT_CONVERSIONS = frozenset({"ReorderInput", "ReorderOutput"})
CHANNELS_LAST = [0, 2, 3, 1]
"""The permutation of axes that plain maps, (N, C, H, W), undergo before an int8 convolution."""
COPIES = frozenset({"MemcpyFromHost", "MemcpyToHost"})
KERNEL = "_kernel_time"
TICK_MS = 1e-3

Owners = Mapping[str, tuple[int, bool]]
"""For a node of the optimised graph: the network's node that it is charged to, and whether it converts a layout."""


def owner(name: str, network: Network) -> int:
    """The network's node that a name of the lowering, or one derived from it, belongs to. Raises Unsupported."""
    number = node_number(name)
    if number is None and (tensor := re.match(r"t(\d+)(?!\d)", name)):
        number = int(tensor[1]) - len(network.inputs)
    if number is None or not 0 <= number < len(network.nodes):
        raise Unsupported(f"node {name!r} of the optimised graph belongs to no operator of the network")
    return number


def owners_in_graph(graph: onnx.GraphProto, network: Network) -> Owners:
    """The owners of all nodes of an optimised graph. Raises Unsupported where one has none."""
    owners: dict[str, tuple[int, bool]] = {}
    made_by = {output: node for node in graph.node for output in node.output}
    read_by: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    conversions = []
    for node in graph.node:
        for name in node.input:
            read_by[name].append(node)
        if _converts_layout(node):
            conversions.append(node)
        else:
            owners[node.name] = (_owner_of(node, network), False)

    def producer(name: str) -> int | None:
        """Whose a tensor is, through any conversions before it."""
        try:  # a tensor keeps its name where a reshape that makes it was joined with the one before
            return owner(name, network)
        except Unsupported:
            maker = made_by.get(name)
        if maker is None:
            return None
        return owners[maker.name][0] if maker.name in owners else producer(maker.input[0])

    def reader(name: str) -> int | None:
        """Who reads a tensor, through any conversions behind it."""
        behind = (owners[node.name][0] if node.name in owners else reader(node.output[0]) for node in read_by[name])
        return next((number for number in behind if number is not None), None)

    # Every conversion is charged after all others are known.
    charges = {}
    for node in conversions:
        before, behind = producer(node.input[0]), reader(node.output[0])
        first, second = (behind, before) if _to_plain(node) else (before, behind)
        charged = second if first is None else first
        if charged is None:
            raise Unsupported(f"the layout conversion {node.name!r} of the optimised graph belongs to no operator")
        charges[node.name] = (charged, True)
    return {**owners, **charges}


def _converts_layout(node: onnx.NodeProto) -> bool:
    """Whether the runtime put a node in. A network's own transposes have the names that they were given."""
    return node.op_type in LAYOUT_CONVERSIONS or (node.op_type == "Transpose" and node_number(node.name) is None)


def _to_plain(node: onnx.NodeProto) -> bool:
    """Whether plain maps come out of a conversion."""
    if node.op_type == "Transpose":
        return list(onnx.helper.get_node_attr_value(node, "perm")) != CHANNELS_LAST
    return node.op_type == "ReorderOutput"


def _owner_of(node: onnx.NodeProto, network: Network) -> int:
    """Some fused nodes get a name that says nothing; what they make keeps its name."""
    try:
        return owner(node.name, network)
    except Unsupported:
        return owner(node.output[0], network)


def owners_by_name(events: Sequence[Mapping[str, Any]], network: Network) -> Owners | None:
    """The owners of all nodes that a profile names; None where it takes the optimised graph to know them."""
    owners = {}
    for event in events:
        if not _is_kernel(event):
            continue
        if event.get("args", {}).get("op_name") in LAYOUT_CONVERSIONS:
            return None
        name = event["name"].removesuffix(KERNEL)
        try:
            owners[name] = (owner(name, network), False)
        except Unsupported:
            return None
    return owners


def elsewhere(events: Sequence[Mapping[str, Any]], provider: str) -> list[str]:
    """The nodes of a profile that are not the provider's, each with its type and whose it is; and copies between
    devices, which are its own but stand at the border to another."""
    found = []
    for event in events:
        if not _is_kernel(event):
            continue
        kind, whose = event["args"].get("op_name", ""), event["args"].get("provider", "an unknown provider")
        if whose != provider or kind in COPIES:
            found.append(f"{event['name'].removesuffix(KERNEL)} ({kind}) on {whose}")
    return list(dict.fromkeys(found))


def kernels_by_run(events: Sequence[Mapping[str, Any]]) -> list[list[tuple[str, float]]]:
    """The kernels of each run in the order of running: the node's name, and how many ticks it took.

    Raises Unsupported where the profile holds no run.
    """
    runs: list[list[tuple[str, float]]] = []
    current: list[tuple[str, float]] = []
    for event in events:
        if _is_kernel(event):
            current.append((event["name"].removesuffix(KERNEL), event["dur"]))
        elif event.get("cat") == "Session" and event["name"] == "model_run":
            runs.append(current)
            current = []
    if not runs:
        raise Unsupported("the profile holds no run")
    return runs


def charge(name: str, owners: Owners) -> tuple[int, bool]:
    """The network's node that a kernel is charged to, and whether it converts a layout. Raises Unsupported."""
    if name not in owners:
        raise Unsupported(f"the profile names a node {name!r} that the optimised graph does not have")
    return owners[name]


def node_times(events: Sequence[Mapping[str, Any]], owners: Owners, nodes: int) -> NodeTimes:
    """Adds up a profile's events, run by run. Durations in a profile are whole microseconds."""
    runs = kernels_by_run(events)
    total_ms, layout_ms = np.zeros((len(runs), nodes)), np.zeros((len(runs), nodes))
    for run, kernels in enumerate(runs):
        for name, ticks in kernels:
            number, layout = charge(name, owners)
            total_ms[run, number] += ticks * TICK_MS
            if layout:
                layout_ms[run, number] += ticks * TICK_MS
    events_by_node = np.bincount([number for number, _ in owners.values()], minlength=nodes)
    return NodeTimes(total_ms=total_ms, layout_ms=layout_ms, events=events_by_node, tick_ms=TICK_MS)


def _is_kernel(event: Mapping[str, Any]) -> bool:
    return event.get("cat") == "Node" and event["name"].endswith(KERNEL)
