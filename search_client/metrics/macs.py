"""Multiply-accumulates of one inference, in millions: convolutions, linear layers and squeeze-and-excite."""

from __future__ import annotations

from collections.abc import Sequence

from lut_db.networks import Network

UNIT = "M MACs"
NEEDS_SERVICE = False


def costs(networks: Sequence[Network], service: object = None) -> list[float | None]:
    return [network.macs / 1e6 for network in networks]
