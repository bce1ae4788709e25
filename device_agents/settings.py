"""Reading a backend's settings, which come as text. All raise InvalidInput with the setting's name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

from lut_db.errors import InvalidInput

Choice = TypeVar("Choice", bound=str)


def choice(given: Mapping[str, str], name: str, choices: Sequence[Choice]) -> Choice:
    """One of the choices, the first by default."""
    value = given.get(name, choices[0])
    for known in choices:
        if known == value:
            return known
    raise InvalidInput(f"{value!r} is no {name}", field=f"settings.{name}", remedy=f"one of {', '.join(choices)}")


def switch(given: Mapping[str, str], name: str) -> bool:
    """On or off, off by default."""
    value = given.get(name, "off")
    if value not in ("on", "off"):
        raise InvalidInput(f"{value!r} is neither on nor off", field=f"settings.{name}", remedy="on or off")
    return value == "on"


def whole(given: Mapping[str, str], name: str, default: int | None = None) -> int | None:
    """A number of digits, `default` where it is not given."""
    if name not in given:
        return default
    if not (given[name].isascii() and given[name].isdigit()):
        raise InvalidInput(f"{given[name]!r} is no whole number", field=f"settings.{name}")
    return int(given[name])
