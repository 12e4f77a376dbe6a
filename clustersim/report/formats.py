"""The file formats as Markdown, from the JSON schemas: `python -m clustersim.report.formats > docs/formats.md`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from clustersim.cluster.fabric import Fabric
from clustersim.cluster.node import Node
from clustersim.files import adapter
from clustersim.hardware.device import Device
from clustersim.hardware.framework import Framework
from clustersim.hardware.link import Link
from clustersim.scenario.scenario import Scenario

_KINDS: tuple[tuple[str, str, Any], ...] = (
    ("Scenario", "`scenarios/NAME.yaml`, or any path: what `plan` and `simulate` read.", Scenario),
    ("Device", "`hwprofiles/devices/NAME/device.yaml`, with its tables beside it.", Device),
    ("Node", "`hwprofiles/nodes/NAME/node.yaml`.", Node),
    ("Link", "`hwprofiles/links/NAME.yaml`.", Link),
    ("Fabric", "`hwprofiles/fabrics/NAME.yaml`, or the `fabric:` block of a scenario.", Fabric),
    ("Framework", "`hwprofiles/frameworks/NAME.yaml`.", Framework),
)

_HEAD = """# File formats

Generated from the JSON schemas (`clustersim schema KIND` prints them for editors) by
`python -m clustersim.report.formats`. Files are YAML 1.2. A quantity is a string with a unit: `400Gb/s` (bits) is not
`400GB/s` (bytes), `80GB` is not `80GiB`; all link rates are per direction. Unknown keys are errors.

Profiles are looked for in `./hwprofiles`, then in the user's folder (`$CLUSTERSIM_HOME/hwprofiles`, or
`~/.local/share/clustersim/hwprofiles`), then among the built-in ones. A plan (`clustersim schema plan`) and a run
(`clustersim schema run`) are JSON written by clustersim.

Tables are CSV with units in the header: `gemm.csv` `dtype,m,n,k,time_us`; `attention.csv`
`dtype,instances,sequence,group,head_dim,time_us` (instances: batch x heads; group: heads per key-value head; causal,
forward); `memory.csv` `op,bytes,time_us` (bytes read and written); a node's `collectives.csv`
`collective,ranks,bytes,time_us` (bytes as nccl-tests count them). Lines that start with `#` are comments.
"""


def markdown() -> str:
    """All formats as one page."""
    parts = [_HEAD]
    for name, where, type_ in _KINDS:
        schema = adapter(type_).json_schema(by_alias=True)
        parts.append(f"\n## {name}\n\n{where}\n")
        parts.extend(_block(schema, top=True))
        for inner, definition in sorted(schema.get("$defs", {}).items()):
            if definition.get("type") == "object":
                parts.append(f"\n### {name}: {inner}\n")
                parts.extend(_block(definition, top=False))
    return "\n".join(parts).rstrip() + "\n"


def _block(schema: Mapping[str, Any], *, top: bool) -> Iterator[str]:
    description = schema.get("description", "")
    if description and not description.startswith(schema.get("title", "\0") + "("):
        yield " ".join(description.split()) + "\n"
    required = set(schema.get("required", ()))
    yield "| key | value | default |"
    yield "|---|---|---|"
    for key, value in schema.get("properties", {}).items():
        default = "required" if key in required else _default(value)
        yield f"| `{key}` | {_value(value)} | {default} |"


def _default(value: Mapping[str, Any]) -> str:
    if "default" not in value:
        return "its own defaults"
    given = value["default"]
    if given is None:
        return "none"
    return f"`{str(given).lower() if isinstance(given, bool) else given}`"


def _value(value: Mapping[str, Any]) -> str:
    """The type of a value in words."""
    if "$ref" in value:
        return str(value["$ref"]).rsplit("/", 1)[-1]
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return " or ".join(f"`{item}`" for item in value["enum"])
    for union in ("anyOf", "oneOf"):
        if union in value:
            return " or ".join(dict.fromkeys(_value(item) for item in value[union]))
    if "description" in value and value.get("type") in ("string", ["string", "number"]):
        return str(value["description"])
    kind = value.get("type")
    if kind == "array":
        if "prefixItems" in value:
            return "[" + ", ".join(_value(item) for item in value["prefixItems"]) + "]"
        return f"list of {_value(value.get('items', {}))}"
    if kind == "object":
        inner = value.get("additionalProperties")
        return f"block of {_value(inner)}" if isinstance(inner, Mapping) else "block"
    words = {
        "integer": "whole number",
        "boolean": "true or false",
        "null": "none",
        "number": "number",
        "string": "text",
    }
    return words.get(str(kind), "any value")


if __name__ == "__main__":
    print(markdown(), end="")
