"""SI constants, parsing and printing of quantities; the only place where GiB exists.

Everything inside the package is in SI base units (bytes, seconds, FLOP, watts). Text is parsed on the way in and
formatted on the way out.
"""

from __future__ import annotations

import math
import re

__all__ = [
    "GB",
    "GIB",
    "KB",
    "MB",
    "MIB",
    "TB",
    "counted",
    "format_bytes",
    "format_chance",
    "format_count",
    "format_seconds",
    "parse_bytes",
    "parse_count",
    "parse_seconds",
]

KB, MB, GB, TB = 1e3, 1e6, 1e9, 1e12
MIB, GIB = float(2**20), float(2**30)

_BYTES = {
    "b": 1.0, "kb": KB, "mb": MB, "gb": GB, "tb": TB, "pb": 1e15,
    "kib": 1024.0, "mib": MIB, "gib": GIB, "tib": 2.0**40,
}  # fmt: skip
_COUNT = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12, "p": 1e15, "q": 1e15}
_SECONDS = {
    "ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0,
    "d": 86400.0, "day": 86400.0, "days": 86400.0, "w": 604800.0,
}  # fmt: skip
_QUANTITY = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)\s*([a-zµ]*)\s*", re.IGNORECASE)


def counted(count: int, noun: str) -> str:
    """A number of things, in words that agree.

    >>> counted(1, "device"), counted(1024, "device")
    ('1 device', '1,024 devices')
    """
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def parse_bytes(text: str) -> float:
    """Bytes of ``"80 GiB"``, ``"512MB"`` or a plain number.

    Raises:
        ValueError: the text is no number with a byte unit.

    >>> parse_bytes("80 GiB")
    85899345920.0
    """
    return _parse(text, {"": 1.0, **_BYTES}, "a size such as '80 GiB'")


def parse_count(text: str) -> float:
    """A count with a decimal suffix: ``"15T"`` tokens, ``"1.5k"``, ``"4096"``.

    Raises:
        ValueError: the text is no number with a known suffix.

    >>> parse_count("15T")
    15000000000000.0
    """
    return _parse(text, _COUNT, "a count such as '15T'")


def parse_seconds(text: str) -> float:
    """Seconds of ``"23.4s"``, ``"30 days"`` or a plain number.

    Raises:
        ValueError: the text is no number with a time unit.

    >>> parse_seconds("2h")
    7200.0
    """
    return _parse(text, {"": 1.0, **_SECONDS}, "a duration such as '23.4s'")


def _parse(text: str, units: dict[str, float], expected: str) -> float:
    match = _QUANTITY.fullmatch(text)
    if match is None or match[2].lower() not in units:
        raise ValueError(f"{text!r} is not {expected}")
    value = float(match[1]) * units[match[2].lower()]
    if not math.isfinite(value):
        raise ValueError(f"{text!r} is not finite")
    return value


def format_bytes(value: float) -> str:
    """Bytes in GiB for a screen.

    >>> format_bytes(85899345920.0)
    '80.0 GiB'
    """
    return f"{value / GIB:.1f} GiB" if abs(value) >= 0.1 * GIB else f"{value / MIB:.1f} MiB"


def format_seconds(value: float) -> str:
    """A duration with the unit that leaves three significant digits.

    >>> format_seconds(0.00123)
    '1.23 ms'
    """
    for limit, scale, unit in ((1e-6, 1e9, "ns"), (1e-3, 1e6, "µs"), (1.0, 1e3, "ms"), (600.0, 1.0, "s")):
        if abs(value) < limit:
            return f"{value * scale:.3g} {unit}"
    if abs(value) < 3600.0:
        return f"{value / 60:.1f} min"
    return f"{value / 3600:.2f} h" if value < 2 * 86400 else f"{value / 86400:.1f} days"


def format_chance(probability: float | None) -> str:
    """A probability in percent, nothing claimed below one of a hundred.

    >>> format_chance(0.123), format_chance(1e-9), format_chance(0.9999), format_chance(None)
    ('12%', '<1%', '>99%', '-')
    """
    if probability is None:
        return "-"
    if probability < 0.01:
        return "<1%"
    return ">99%" if probability > 0.99 else f"{probability:.0%}"


def format_count(value: float) -> str:
    """A count with a decimal suffix.

    >>> format_count(405853388800), format_count(178483)
    ('405.9B', '178.5k')
    """
    for limit, scale, unit in (
        (1e15, 1e15, "P"),
        (1e12, 1e12, "T"),
        (1e9, 1e9, "B"),
        (1e6, 1e6, "M"),
        (1e4, 1e3, "k"),
    ):
        if abs(value) >= limit:
            return f"{value / scale:.1f}{unit}"
    return f"{value:g}"
