"""Numbers as people read them, with no more digits than their uncertainty supports."""

from __future__ import annotations

import math


def decimals(uncertainty: float) -> int:
    """Decimal places (negative: zeros before the point) that an uncertainty supports: one digit of it, two below 3.55
    (the rule of the Particle Data Group)."""
    if uncertainty <= 0.0 or not math.isfinite(uncertainty):
        return 3
    exponent = math.floor(math.log10(uncertainty))
    leading = uncertainty / 10.0**exponent
    return -exponent + (1 if leading < 3.55 else 0)


def fixed(value: float, places: int) -> str:
    """`value` with `places` decimals; a negative number of them rounds before the point."""
    return f"{round(value, places):,.{max(0, places)}f}"


def with_interval(value: float, low: float, high: float) -> str:
    """A time in seconds with its interval, no digit more than that supports: `16 (13-21) s`, `45.1 (43.6-46.9) ms`."""
    unit, scale = _unit_of(value)
    if high <= low:
        return f"{significant(value / scale, 4)} {unit}"
    places = decimals((high - low) / 2.0 / scale)
    middle, least, most = (fixed(each / scale, places) for each in (value, low, high))
    return f"{middle} ({least}-{most}) {unit}"


def _unit_of(seconds: float) -> tuple[str, float]:
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(seconds) >= scale:
            return unit, scale
    return ("s", 1.0) if seconds == 0.0 else ("ns", 1e-9)


def supported(value: float, relative: float) -> str:
    """`value` with the digits that a relative uncertainty supports, thousands grouped: 103,000 at 2 %."""
    if value == 0.0 or not math.isfinite(value):
        return f"{value:g}"
    return fixed(value, decimals(abs(value) * relative) if relative > 0.0 else 3 - math.floor(math.log10(abs(value))))


def significant(value: float, digits: int) -> str:
    """`value` with `digits` significant digits, never in exponents."""
    if value == 0.0 or not math.isfinite(value):
        return f"{value:g}"
    return fixed(value, digits - 1 - math.floor(math.log10(abs(value))))


def counted(number: float) -> str:
    """A large number in three digits: 103k, 1.21M."""
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= scale:
            return f"{significant(number / scale, 3) if number < 100 * scale else round(number / scale)}{unit}"
    return significant(number, 3)


def percent(fraction: float) -> str:
    """A fraction in per cent: 42 %, 4.2 %, 0.4 %."""
    value = fraction * 100.0
    return f"{value:.0f} %" if abs(value) >= 10.0 else f"{value:.1f} %"


def signed_percent(fraction: float) -> str:
    """A relative difference in per cent, with its sign: +4.2 %, -12 %."""
    value = fraction * 100.0
    return f"{value:+.0f} %" if abs(value) >= 10.0 else f"{value:+.1f} %"
