"""Data sets, one file each.

A plug-in is a module of this package with a function `load(**options) -> Data` whose docstring shows its options.
The module's name is the data set's name in a recipe.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

from lut_db.errors import InvalidInput
from search_client.data.dataset import Data

__all__ = ["Data", "load", "names"]

_NOT_DATA_SETS = frozenset({"dataset"})


def names() -> list[str]:
    """The data sets that exist."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _NOT_DATA_SETS)


def load(name: str, **options: Any) -> Data:
    """A data set by name.

    Raises InvalidInput, listing what exists, for an unknown name or an unknown option.
    """
    if name not in names():
        raise InvalidInput(f"there is no data set {name!r}", field="data", remedy="one of " + ", ".join(names()))
    loader = importlib.import_module(f"{__name__}.{name}").load
    known = inspect.signature(loader).parameters
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise InvalidInput(
            f"data set {name!r} has no option {', '.join(map(repr, unknown))}",
            field="data", remedy="its options are " + ", ".join(known),
        )  # fmt: skip
    data: Data = loader(**options)
    return data
