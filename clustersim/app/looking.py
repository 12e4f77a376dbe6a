"""`topo`, `schema` and `init`: the commands that show what there is, and start a scenario."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from clustersim.app import screen
from clustersim.errors import InputError, UsageError

if TYPE_CHECKING:
    from pydantic.json_schema import GenerateJsonSchema

    from clustersim.cluster.cluster import Cluster


def add_to(app: typer.Typer) -> None:
    """Add this file's commands to `app`."""
    app.command("topo")(topo_command)
    app.command("schema")(schema_command)
    app.command("init")(init_command)


def topo_command(
    what: Annotated[str, typer.Argument(metavar="SCENARIO|NODE", help="A scenario, or a node profile by name.")],
    image: Annotated[Path | None, typer.Option("--image", help="Draw it here: an .svg or .png file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every node and link of the graph as JSON.")] = False,
) -> None:
    """Show a cluster as a tree, and as a picture file."""
    from clustersim import files

    files.check_writable(image)
    cluster, name = _cluster(what)
    if image is not None:
        from clustersim.report import drawing, topo_picture

        drawing.write(topo_picture.picture(cluster, name), image)
    if as_json:
        screen.show_json(_graph_document(cluster, name))
        return
    from clustersim.report.topo_text import tree

    screen.show(tree(cluster, name))
    if image is not None:
        screen.show(f"Picture written to {image}")


def _cluster(what: str) -> tuple[Cluster, str]:
    """The cluster of a scenario, or of one node."""
    from clustersim import files
    from clustersim.scenario.load import load_scenario

    if Path(what).suffix in (".yaml", ".yml", ".json") or what in set(files.scenario_names()):
        question = load_scenario(what)
        return question.cluster, question.scenario.name
    known = files.profile_names("nodes")
    if what not in known:
        import difflib

        close = difflib.get_close_matches(what, sorted(known | set(files.scenario_names())), n=1)
        mend = f"did you mean {close[0]!r}?" if close else f"nodes: {', '.join(sorted(known))}"
        raise InputError(f"{what!r} is neither a scenario nor a node profile; {mend}")
    return _one_node(what), what


def _one_node(name: str) -> Cluster:
    from clustersim.cluster.cluster import Cluster
    from clustersim.cluster.fabric import Fabric
    from clustersim.cluster.load import load_machine

    alone = (load_machine(name),)
    computes = alone[0].node.devices > 0
    return Cluster(workers=alone if computes else (), servers=() if computes else alone, fabric=Fabric())


def _graph_document(cluster: Cluster, name: str) -> dict[str, Any]:
    import math

    from clustersim.cluster.graph import graph

    wires = graph(cluster)
    return {
        "schema_version": 1,
        "name": name,
        "nodes": [{"name": key, **attributes} for key, attributes in wires.nodes(data=True)],
        # JSON has no infinity: a link without a limit has no rate.
        "links": [
            {"from": a, "to": b, "rate_bytes_per_s": rate if math.isfinite(rate) else None}
            for a, b, rate in wires.edges(data="rate_bytes_per_s")
        ],
    }


class FileKind(StrEnum):
    """What `clustersim schema` describes."""

    scenario = "scenario"
    plan = "plan"
    run = "run"
    device = "device"
    node = "node"
    link = "link"
    framework = "framework"
    fabric = "fabric"
    reliability = "reliability"


def schema_command(
    kind: Annotated[FileKind, typer.Argument(help="The kind of file.")] = FileKind.scenario,
) -> None:
    """Print the JSON schema of a kind of file, for editors: clustersim schema > scenario.schema.json."""
    screen.show_json(json_schema(kind))


def json_schema(kind: FileKind) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a kind of file; quantities are described with an example of their unit."""
    from clustersim.cluster.fabric import Fabric
    from clustersim.cluster.node import Node
    from clustersim.cluster.reliability import FailureProfile
    from clustersim.compare import Run
    from clustersim.files import adapter
    from clustersim.hardware.device import Device
    from clustersim.hardware.framework import Framework
    from clustersim.hardware.link import Link
    from clustersim.plan import Plan
    from clustersim.scenario.scenario import Scenario

    types: dict[FileKind, Any] = {
        FileKind.scenario: Scenario, FileKind.plan: Plan, FileKind.run: Run, FileKind.device: Device,
        FileKind.node: Node, FileKind.link: Link, FileKind.framework: Framework, FileKind.fabric: Fabric,
        FileKind.reliability: FailureProfile,
    }  # fmt: skip
    found = adapter(types[kind]).json_schema(by_alias=True, schema_generator=_schema_writer())
    found.pop("title", None)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"clustersim {kind.value} file",
        **found,
    }


def _schema_writer() -> type[GenerateJsonSchema]:
    from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
    from pydantic_core import core_schema

    class Writer(GenerateJsonSchema):
        """Writes the default of a quantity as a file has it: with its unit."""

        def default_schema(self, schema: core_schema.WithDefaultSchema) -> JsonSchemaValue:
            writer = schema["schema"].get("serialization")
            if isinstance(schema.get("default"), float) and writer is not None and writer["type"] == "function-plain":
                function = cast(Callable[[float], object], writer["function"])
                schema = {**schema, "default": function(schema["default"])}
            return super().default_schema(schema)

    return Writer


def init_command(
    output: Annotated[Path, typer.Option("-o", "--output", help="Where the scenario goes; - prints it.")] = Path(
        "scenario.yaml"
    ),
) -> None:
    """Write a commented starter scenario for this machine, and the schema that editors complete it with."""
    import json

    from clustersim import files
    from clustersim.app.starter import starter_scenario

    text = starter_scenario()
    if str(output) == "-":
        screen.show_text(text)
        return
    if output.exists():
        raise UsageError(f"{output} exists already; name another file with -o, or remove it")
    schema = output.parent / "scenario.schema.json"
    files.check_writable(output, schema)
    files.write_text(output, text)
    if not schema.exists():
        files.write_text(schema, json.dumps(json_schema(FileKind.scenario), indent=1) + "\n")
    screen.show(f"Wrote {output} and {schema}. Next: clustersim profile (once), then clustersim plan {output}")
