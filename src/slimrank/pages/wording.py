"""Numbers as a reader wants them: few digits, and a unit."""

import math


def in_bytes(value: float | int) -> str:
    """Bytes, in the largest decimal unit that leaves a whole one.

    Examples
    --------
    >>> in_bytes(999), in_bytes(269_060_552), in_bytes(3.4e9)
    ('999 B', '269 MB', '3.40 GB')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{_three_digits(value / size)} {unit}"
    return f"{value:.0f} B"


def in_params(value: float | int) -> str:
    """Count parameters in millions, or in billions.

    Examples
    --------
    >>> in_params(800), in_params(134_515_008), in_params(6.7e9)
    ('800', '135 M', '6.70 B')
    """
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{_three_digits(value / size)} {unit}"
    return f"{value:.0f}"


def in_time(seconds: float | int) -> str:
    """Seconds, minutes or hours.

    Examples
    --------
    >>> in_time(0.0123), in_time(72.4), in_time(907), in_time(9000)
    ('0.0123 s', '72.4 s', '15.1 min', '2.50 h')
    """
    if seconds >= 2 * 3600:
        return f"{_three_digits(seconds / 3600)} h"
    if seconds >= 120:
        return f"{_three_digits(seconds / 60)} min"
    return f"{_three_digits(seconds)} s"


def in_percent(share: float | int) -> str:
    """Share of one.

    Examples
    --------
    >>> in_percent(0.7994), in_percent(0.008), in_percent(0)
    ('79.9 %', '0.80 %', '0 %')
    """
    percent = 100 * share
    if percent == 0:
        return "0 %"
    return f"{percent:.1f} %" if percent >= 0.995 else f"{percent:#.2g} %"


def in_short(value: float | None) -> str:
    """Three digits of any number, and a dash for none.

    Examples
    --------
    >>> in_short(203.4), in_short(8.0), in_short(0.0213), in_short(1.2e8), in_short(None)
    ('203', '8.00', '0.0213', '1.2e+08', '–')
    >>> in_short(float("inf"))
    '∞'
    """
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        return f"{value:.2g}"
    return _three_digits(value)


def _three_digits(value: float | int) -> str:
    if value == 0:
        return "0"
    whole = math.floor(math.log10(abs(value)) + 1e-9) + 1
    return f"{value:,.{max(0, 3 - whole)}f}"
