"""What `ibnetdiscover` prints, as a fabric.

Blocks of a switch or an adapter (`Switch`, `Ca`, `Rt`) with a line for each connected port, as infiniband-diags' manual
describes them: `[port] "peer"[peer's port](guid) # "peer's name" lid N 4xNDR`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from clustersim.errors import InputError
from clustersim.importing.ib_fabric import LANE_BITS_PER_S, Adapter, Cable, IbFabric, Switch

_HEAD = re.compile(r"\s*(Switch|Ca|Rt|CA)\s+(\d+)\s+\"([^\"]+)\"\s*(?:#\s*\"([^\"]*)\")?")
_PORT = re.compile(r"\s*\[(\d+)\](?:\[ext [^\]]*\])?(?:\([^)]*\))?\s*\"([^\"]+)\"\[(\d+)\](?:\[ext [^\]]*\])?(.*)$")
_SPEED = re.compile(r"\b(\d+)x([A-Z]DR(?:10)?)\b")
# SHARP's end of a switch, listed as an adapter that no host has.
_AGGREGATION = "Aggregation Node"
_WHOLE_GUID = re.compile(r"[SHR]-[0-9a-fA-F]{16}")


@dataclass(slots=True)
class _Reading:
    name: str
    switches: dict[str, Switch] = field(default_factory=dict)
    adapters: dict[str, Adapter] = field(default_factory=dict)
    ends: dict[tuple[str, int], tuple[str, int, str | None, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def read_ibnetdiscover(text: str, name: str) -> IbFabric:
    """The fabric of an `ibnetdiscover` listing. O(lines). InputError, one line with file and line, for text without a
    switch, a line that cannot be read, or an unknown link speed.

    Where identifiers were cut for publication, adapters are told apart by their descriptions. A cable that its two ends
    describe differently gets the lower rate, and a note.
    """
    reading = _Reading(name=name)
    here: str | None = None
    inside = sharp = 0
    for number, line in enumerate(text.splitlines(), start=1):
        head = _HEAD.match(line)
        if head and _AGGREGATION in line:
            inside, sharp = 1, sharp + 1
        elif head:
            here, inside = _block(reading, head), 0
        elif line.lstrip().startswith("[") and not inside and _AGGREGATION not in line:
            port = _PORT.match(line)
            if port is None or here is None:
                raise InputError(f'{name}:{number}: cannot read this port; write [port] "peer"[port] # "name" 4xNDR')
            _port(reading, here, port, number)
    if sharp:
        reading.notes.append(f"{sharp} aggregation nodes (SHARP) of switches are no hosts and are left out")
    if not reading.switches:
        raise InputError(f"{name}: lists no switch; save what `ibnetdiscover` prints")
    return IbFabric(
        file=name,
        switches=tuple(reading.switches.values()),
        adapters=tuple(reading.adapters.values()),
        cables=_cables(reading),
        notes=tuple(reading.notes),
    )


def _key(identifier: str, description: str) -> str:
    return identifier if _WHOLE_GUID.fullmatch(identifier) else f"{identifier} {description}".strip()


def _block(reading: _Reading, head: re.Match[str]) -> str:
    kind, ports, identifier, description = head.groups()
    key = _key(identifier, description or "")
    if kind == "Switch":
        reading.switches[key] = Switch(key=key, name=description or identifier, ports=int(ports))
    elif kind != "Rt":
        _adapter(reading, key, description or "")
    return key


def _adapter(reading: _Reading, key: str, description: str) -> None:
    """Descriptions are `host card` where the host set them; else they name the product, and hosts are not stated."""
    words = description.split()
    named = len(words) == 2 and re.fullmatch(r"(HCA-|mlx|ibp|hfi|qib|rocep)\S*", words[1]) is not None
    host, card = (words[0], words[1]) if named else (key, description)
    reading.adapters.setdefault(key, Adapter(key=key, host=host, card=card))


def _port(reading: _Reading, here: str, port: re.Match[str], number: int) -> None:
    mine, identifier, theirs, rest = port.groups()
    comment = rest.partition("#")[2]
    named = re.search(r"\"([^\"]*)\"", comment)
    description = named.group(1) if named else ""
    key = _key(identifier, description)
    if identifier.startswith("S") and key not in reading.switches:
        reading.switches[key] = Switch(key=key, name=description or identifier, ports=None)
    elif identifier.startswith("H"):
        _adapter(reading, key, description)
    speed = _SPEED.search(comment)
    if speed is not None and speed.group(2) not in LANE_BITS_PER_S:
        raise InputError(
            f"{reading.name}:{number}: the speed {speed.group(2)} is not known; known: {', '.join(LANE_BITS_PER_S)}"
        )
    reading.ends[here, int(mine)] = (key, int(theirs), speed.group() if speed else None, number)


def _rate(speed: str | None) -> float | None:
    if speed is None:
        return None
    lanes, generation = speed.split("x")
    return int(lanes) * LANE_BITS_PER_S[generation] / 8


def _cables(reading: _Reading) -> tuple[Cable, ...]:
    """Each cable once, though both its ends may list it."""
    cables = []
    for (here, mine), (there, theirs, speed, number) in reading.ends.items():
        other = reading.ends.get((there, theirs))
        if other is not None and other[:2] == (here, mine):
            if other[3] < number:
                continue
            if other[2] != speed and None not in (speed, other[2]):
                reading.notes.append(
                    f"lines {number} and {other[3]} call one cable {speed} and {other[2]}; the slower is taken"
                )
                speed = min(speed, other[2], key=lambda said: _rate(said) or 0.0)
            speed = speed or other[2]
        cables.append(Cable(a=here, a_port=mine, b=there, b_port=theirs, speed=speed, rate_bytes_per_s=_rate(speed)))
    return tuple(cables)
