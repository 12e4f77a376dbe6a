"""Quantities at the file edge: unit strings in files, SI floats inside.

A field of a type that files hold is named with its unit (`rate_bytes_per_s`) and annotated with one of the quantities
below (`BytesPerS`); the key in the file is the name without the unit (`rate`), and its value is a string with a unit
(`400Gb/s`). Bare numbers are refused where a unit decides the meaning: `400` is neither bits nor bytes.

Bits and bytes differ (`Gb/s` is an eighth of `GB/s`), and so do decimal and binary prefixes (`GB`, `GiB`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

_DECIMAL: Final = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_BINARY: Final = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40, "Pi": 2.0**50}
# In base units: what lies beyond would overflow in products, and is a mistake.
_LEAST: Final = 1e-30
_MOST: Final = 1e30
_NUMBER: Final = re.compile(r"\s*([+-]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*(.*?)\s*")


def _prefixed(unit: str, *, binary: bool = False, scale: float = 1.0) -> dict[str, float]:
    """Every spelling of `unit` with an SI (and, on request, a binary) prefix, mapped to its size in base units."""
    prefixes = {**_DECIMAL, **_BINARY} if binary else _DECIMAL
    return {prefix + unit: factor * scale for prefix, factor in prefixes.items()}


@dataclass(frozen=True, slots=True, eq=False)
class Quantity:
    """A physical quantity as files spell it; pydantic metadata of a `float` field.

    `units` maps each accepted spelling to its size in the base unit; `bare` tells whether a number without a unit is
    accepted (only where there is one conceivable unit); `shown` lists the spellings used for writing, largest first.
    """

    noun: str
    base: str
    units: Mapping[str, float]
    example: str
    shown: tuple[str, ...] = ()
    bare: bool = False
    minimum: float = 0.0
    exclusive: bool = False

    def parse(self, value: object) -> float:
        """The SI float of `value` (a string with a unit); ValueError with the mend where it is not one."""
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError(f"{value!r} is not {self.noun}; write e.g. {self.example}")
        if isinstance(value, str):
            match = _NUMBER.fullmatch(value)
            if match is None:
                raise ValueError(f"{value!r} is not {self.noun}; write e.g. {self.example}")
            text, unit = match.groups()
            if unit == "" and not self.bare:
                raise ValueError(f"{value!r} has no unit; write e.g. {self.example}")
            if unit not in self.units and not (unit == "" and self.bare):
                raise ValueError(f"{value!r} is not {self.noun}; write e.g. {self.example}")
            number = float(text.replace("_", "")) * self.units.get(unit, 1.0)
        elif not self.bare:
            raise ValueError(f"bare number {value!r} has no unit; write e.g. {self.example}")
        else:
            number = float(value)
        if not math.isfinite(number):
            raise ValueError(f"{value!r} is not a finite number; write e.g. {self.example}")
        if number != 0.0 and not _LEAST <= abs(number) <= _MOST:
            raise ValueError(f"{value!r} is beyond everything that there is; write e.g. {self.example}")
        if number < self.minimum or (self.exclusive and number == self.minimum):
            bound = "more than" if self.exclusive else "at least"
            raise ValueError(f"{value!r} must be {bound} {self.minimum:g}; write e.g. {self.example}")
        return number

    def text(self, value: float) -> float | str:
        """A string that `parse` turns back into exactly `value`."""
        if self.bare:
            return value
        for unit in self.shown:
            short = f"{value / self.units[unit]:.12g}{unit}"
            if value / self.units[unit] >= 1.0 and self.parse(short) == value:
                return short
        return f"{value!r}{self.base}"

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def validate(value: object) -> float:
            try:
                return self.parse(value)
            except ValueError as error:
                raise PydanticCustomError("quantity", "{reason}", {"reason": str(error)}) from None

        return core_schema.no_info_plain_validator_function(
            validate, serialization=core_schema.plain_serializer_function_ser_schema(self.text)
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        kinds = ["string", "number"] if self.bare else ["string"]
        return {"type": kinds if self.bare else kinds[0], "description": f"{self.noun}, e.g. {self.example}"}


_BYTES: Final = _prefixed("B", binary=True)
_RATE: Final = {
    **{f"{u}/s": f for u, f in _BYTES.items()},
    **{f"{u}/s": f for u, f in _prefixed("b", scale=0.125).items()},
    **{f"{u}it/s": f for u, f in _prefixed("b", scale=0.125).items()},
}
_TIME: Final = {
    "ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0,
}  # fmt: skip
_DOLLARS_PER_H: Final = {"$/h": 1.0, "usd/h": 1.0, "USD/h": 1.0}


class _Price(Quantity):
    """`$2.50/h`: the sign stands before the number."""

    __slots__ = ()

    def parse(self, value: object) -> float:
        if isinstance(value, str):
            match = re.fullmatch(r"\s*\$\s*([\d._eE+-]+)\s*/\s*h\s*", value)
            if match is not None:
                return Quantity.parse(self, match.group(1) + "$/h")
        return Quantity.parse(self, value)

    def text(self, value: float) -> float | str:
        return f"${value!r}/h"


Bytes = Annotated[float, Quantity("a size", "B", _BYTES, "80GiB", ("GiB", "MiB", "KiB", "GB", "MB", "kB", "B"))]
BytesPerS = Annotated[
    float,
    Quantity("a rate", "B/s", _RATE, "400Gb/s or 50GB/s", ("TB/s", "GB/s", "MB/s", "kB/s", "B/s"), exclusive=True),
]
Seconds = Annotated[float, Quantity("a time", "s", _TIME, "5us", ("s", "ms", "us", "ns"))]
Flops = Annotated[
    float,
    Quantity(
        "an arithmetic rate", "FLOP/s", {**_prefixed("FLOP/s"), **_prefixed("OP/s")}, "312TFLOP/s",
        ("TFLOP/s", "GFLOP/s", "FLOP/s"), exclusive=True,
    ),
]  # fmt: skip
Watts = Annotated[float, Quantity("a power", "W", _prefixed("W"), "400W", ("W",))]
UsdPerHour = Annotated[float, _Price("a price", "$/h", _DOLLARS_PER_H, "$2.50/h")]
Fraction = Annotated[float, Quantity("a fraction", "", {"%": 0.01}, "8% or 0.08", bare=True)]
Count = Annotated[float, Quantity("a number", "", {}, "300e9", bare=True)]
Positive = Annotated[float, Quantity("a positive number", "", {}, "1.3", bare=True, exclusive=True)]

_SUFFIXES: Final = ("_bytes_per_s", "_usd_per_hour", "_flops", "_bytes", "_usd", "_s", "_w", "_j")


def file_key(name: str) -> str:
    """The key in a file of the field `name`: the name without its unit."""
    for suffix in _SUFFIXES:
        if name.endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)]
    return name


# `__pydantic_config__ = FILE` in every dataclass that files hold: unknown keys are errors, keys have no units.
FILE: Final = {"extra": "forbid", "alias_generator": file_key, "arbitrary_types_allowed": False}


def human_bytes(value: float) -> str:
    """`value` bytes for people, in decimal units: 12.3 GB."""
    return _human(value, (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)), "B")


def human_seconds(value: float) -> str:
    """`value` seconds for people: 3.21 s, 45.0 ms, 12.0 us."""
    if value >= 120.0:
        return f"{value / 60.0:.1f} min" if value < 7200.0 else f"{value / 3600.0:.1f} h"
    return _human(value, (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)), "s" if value == 0.0 else "ns", 1e-9)


def human_days(value: float) -> str:
    """`value` seconds of a long run for people: 45.1 days; under two of them as `human_seconds` has it."""
    days = value / 86400.0
    if days < 2.0:
        return human_seconds(value)
    return f"{days:.4g} days" if days < 1000.0 else f"{days:,.0f} days"


def _human(value: float, scales: tuple[tuple[str, float], ...], base: str, base_size: float = 1.0) -> str:
    for unit, size in scales:
        # What three digits round up to 1000 is one of the next unit.
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g} {unit}" if abs(value) < 1000 * size else f"{value / size:.0f} {unit}"
    return f"{value / base_size:.3g} {base}"
