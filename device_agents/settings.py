"""Reading a backend's settings, which come as text. All raise InvalidInput with the setting's name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lut_db.errors import InvalidInput


def choice(given: Mapping[str, str], name: str, choices: Sequence[str]) -> str:
    """One of the choices, the first by default."""
    value = given.get(name, choices[0])
    if value not in choices:
        raise InvalidInput(f"{value!r} is no {name}", field=f"settings.{name}", remedy=f"one of {', '.join(choices)}")
    return value


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
