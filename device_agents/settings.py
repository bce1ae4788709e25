"""Reading settings and options, which come as text. All raise InvalidInput with the field's name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

from lut_db.errors import InvalidInput

Choice = TypeVar("Choice", bound=str)
MAX_CORE = 4095


def choice(given: Mapping[str, str], name: str, choices: Sequence[Choice]) -> Choice:
    """One of the choices, the first by default."""
    value = given.get(name, choices[0])
    for known in choices:
        if known == value:
            return known
    raise InvalidInput(f"{value!r} is no {name}", field=f"settings.{name}", remedy=f"one of {', '.join(choices)}")


def switch(given: Mapping[str, str], name: str) -> bool:
    """On or off, off by default."""
    return bool(wish(given, name))


def wish(given: Mapping[str, str], name: str) -> bool | None:
    """On or off, None where it is not given: then what can be had decides."""
    value = given.get(name)
    if value not in (None, "on", "off"):
        raise InvalidInput(f"{value!r} is neither on nor off", field=f"settings.{name}", remedy="on or off")
    return None if value is None else value == "on"


def whole(given: Mapping[str, str], name: str, default: int | None = None) -> int | None:
    """A number of digits, `default` where it is not given."""
    if name not in given:
        return default
    if not (given[name].isascii() and given[name].isdigit()):
        raise InvalidInput(f"{given[name]!r} is no whole number", field=f"settings.{name}")
    return int(given[name])


def core_list(text: str, field: str) -> tuple[int, ...]:
    """Cores as `taskset` takes them: 2,3 or 4-7 or 0-6:2; none for any."""
    if text == "any":
        return ()
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4})(?::(\d{1,4}))?)?\s*", part, re.ASCII)
        first, last, step = (int(number or 0) for number in match.groups()) if match else (0, 0, 0)
        if match is None or (match[2] and last < first) or (match[3] and not step) or max(first, last) > MAX_CORE:
            raise InvalidInput(f"{text!r} is no list of cores", field=field, remedy="like 2,3 or 4-7 or 0-6:2, or any")
        found.update(range(first, max(first, last) + 1, step or 1))
    return tuple(sorted(found))
