"""A fabric profile from a listed InfiniBand fabric."""

from __future__ import annotations

from clustersim.cluster.fabric import Fabric
from clustersim.errors import ProfileError
from clustersim.hardware.provenance import Provenance
from clustersim.importing.ib_fabric import IbFabric


def fabric_profile(
    fabric: IbFabric, nodes_per_leaf: int | None, oversubscription: float | None, provenance: Provenance
) -> Fabric:
    """The profile of the fabric, of which the listing may leave two figures to the user. Unequal leaves: the fullest
    and the most oversubscribed. ProfileError, one line, where the kind of fabric is not stated."""
    kind = fabric.kind
    if kind == "not stated":
        raise ProfileError(
            f"{fabric.file}: is neither one switch nor leaves below spines, so that no fabric profile fits; list the "
            "whole fabric, or write the profile by hand"
        )
    if kind == "one-switch":
        return Fabric(kind=kind, provenance=provenance)
    hosts = {len(below) for below in fabric.hosts_of_leaves().values()}
    found = fabric.oversubscription()
    share = oversubscription or (max(found.values()) if found else None)
    if share is None:
        raise ProfileError(f"{fabric.file}: does not state the rates of all links of a leaf; give --oversubscription")
    if len(hosts) > 1 and nodes_per_leaf is None:
        raise ProfileError(
            f"{fabric.file}: leaves have {min(hosts)} to {max(hosts)} hosts; give --nodes-per-leaf, e.g. {max(hosts)}"
        )
    # Fewer downlinks than uplinks: the leaf is not full yet, and nothing is oversubscribed.
    return Fabric(
        kind=kind, nodes_per_leaf=nodes_per_leaf or max(hosts), oversubscription=max(1.0, share), provenance=provenance
    )
