"""Networks to search, one file each.

A plug-in is a module of this package with a function `describe(**options) -> Description` whose docstring shows its
options. The module's name is the network's name in a recipe.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

from lut_db.errors import InvalidInput
from search_client.description import Description


def names() -> list[str]:
    """The networks that exist."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def load(name: str, **options: Any) -> Description:
    """The description of a network by name.

    Raises InvalidInput, listing what exists, for an unknown name or an unknown option.
    """
    if name not in names():
        raise InvalidInput(f"there is no network {name!r}", field="network", remedy="one of " + ", ".join(names()))
    describe = importlib.import_module(f"{__name__}.{name}").describe
    known = inspect.signature(describe).parameters
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise InvalidInput(
            f"network {name!r} has no option {', '.join(map(repr, unknown))}",
            field="network", remedy="its options are " + ", ".join(known),
        )  # fmt: skip
    description: Description = describe(**options)
    return description
