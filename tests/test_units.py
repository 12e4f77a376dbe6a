"""Unit strings: what is read, what is refused, and that writing loses nothing."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clustersim.units import (
    Bytes,
    BytesPerS,
    Count,
    Flops,
    Fraction,
    Positive,
    Quantity,
    Seconds,
    UsdPerHour,
    Watts,
    file_key,
    human_bytes,
    human_seconds,
)

_QUANTITIES: dict[str, Any] = {
    "Bytes": Bytes,
    "BytesPerS": BytesPerS,
    "Seconds": Seconds,
    "Flops": Flops,
    "Watts": Watts,
    "UsdPerHour": UsdPerHour,
    "Fraction": Fraction,
    "Count": Count,
    "Positive": Positive,
}


def _quantity(type_: Any) -> Quantity:
    quantity = get_args(type_)[1]
    assert isinstance(quantity, Quantity)
    return quantity


@pytest.mark.parametrize(
    ("type_", "text", "value"),
    [
        (BytesPerS, "400Gb/s", 50e9),
        (BytesPerS, "400 Gbit/s", 50e9),
        (BytesPerS, "50GB/s", 50e9),
        (BytesPerS, "1GiB/s", 2.0**30),
        (Bytes, "80GiB", 80 * 2.0**30),
        (Bytes, "80GB", 80e9),
        (Bytes, "1_000B", 1000.0),
        (Seconds, "5us", 5e-6),
        (Seconds, "5µs", 5e-6),
        (Seconds, "1.5h", 5400.0),
        (Flops, "312TFLOP/s", 312e12),
        (Watts, "6.5kW", 6500.0),
        (UsdPerHour, "$2.50/h", 2.5),
        (Fraction, "8%", 0.08),
        (Fraction, 0.08, 0.08),
        (Count, "300e9", 300e9),
    ],
)
def test_reads(type_: Any, text: object, value: float) -> None:
    assert _quantity(type_).parse(text) == pytest.approx(value, rel=1e-15)


@pytest.mark.parametrize(
    ("type_", "given_"),
    [
        (BytesPerS, 400),
        (BytesPerS, "400"),
        (BytesPerS, "400Gb"),
        (BytesPerS, "400GHz"),
        (BytesPerS, "0Gb/s"),
        (BytesPerS, "fast"),
        (BytesPerS, True),
        (BytesPerS, None),
        (BytesPerS, [1]),
        (BytesPerS, "-1GB/s"),
        (Bytes, "80 gigs"),
        (Bytes, "1e400GB"),
        (Seconds, "5"),
        (Seconds, "5 minutes"),
        (Seconds, "-1s"),
        (Fraction, math.nan),
        (Fraction, math.inf),
        (Positive, 0),
        (UsdPerHour, "2.50"),
        (Count, "three"),
        (Watts, 400),
    ],
)
def test_refuses_with_an_example(type_: Any, given_: object) -> None:
    quantity = _quantity(type_)
    with pytest.raises(ValueError, match="write e") as caught:
        quantity.parse(given_)
    assert quantity.example in str(caught.value)


@pytest.mark.parametrize("name", _QUANTITIES)
@given(value=st.floats(min_value=1e-15, max_value=1e30, allow_nan=False))
def test_writing_loses_nothing(name: str, value: float) -> None:
    quantity = _quantity(_QUANTITIES[name])
    assert quantity.parse(quantity.text(value)) == value


@pytest.mark.parametrize("name", _QUANTITIES)
def test_zero_survives_where_it_is_allowed(name: str) -> None:
    quantity = _quantity(_QUANTITIES[name])
    if not quantity.exclusive:
        assert quantity.parse(quantity.text(0.0)) == 0.0


@pytest.mark.parametrize(
    ("field", "key"),
    [
        ("rate_bytes_per_s", "rate"),
        ("memory_bytes", "memory"),
        ("alpha_s", "alpha"),
        ("power_w", "power"),
        ("layers", "layers"),
        ("hourly_usd_per_hour", "hourly"),
        ("_s", "_s"),
    ],
)
def test_keys_in_files_carry_no_unit(field: str, key: str) -> None:
    assert file_key(field) == key


def test_figures_for_people() -> None:
    assert [human_bytes(v) for v in (0, 999, 1.5e3, 80e9, 999.6e9)] == ["0 B", "999 B", "1.5 kB", "80 GB", "1 TB"]
    assert [human_seconds(v) for v in (0.0, 5e-6, 0.0451, 3.214, 600.0, 7200.0)] == [
        "0 s",
        "5 us",
        "45.1 ms",
        "3.21 s",
        "10.0 min",
        "2.0 h",
    ]
