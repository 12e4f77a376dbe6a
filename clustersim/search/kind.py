"""Which kind of case a prediction is, its interval, and in what it leaves the profiles and the validated runs."""

from __future__ import annotations

from clustersim.hardware.calibration import Calibration, find_calibration
from clustersim.hardware.cost import DeviceCosts, device_costs
from clustersim.hardware.framework import Framework
from clustersim.hardware.intervals import Feature, Interval, Kind, Outside, left_out_spread, load_intervals
from clustersim.layout.layout import Layout, family
from clustersim.program.program import Program
from clustersim.scenario.question import Question

# Of the kernel time: less of it from measured tables, or more of it priced beyond them, is said.
_MEASURED, _EXTRAPOLATED = 0.8, 0.05
# Twice (or half) the measured size, in log2.
_FAR = 1.0
_NEARLY_FULL = 0.95


def kind_of(question: Question) -> Kind:
    """What decides the error: where kernel times come from, how the framework runs a layer, one node or several."""
    devices = [machine.device for machine in question.cluster.workers if machine.device is not None]
    kernels: Feature = "measured kernels" if all(each.tables.gemm for each in devices) else "roofline kernels"
    if any(each.kind == "cpu" for each in devices):
        return kernels, "cpu ranks"
    nodes: Feature = "one node" if question.cluster.worker_nodes == 1 else "several nodes"
    return kernels, _layers_of(question.framework), nodes


def _layers_of(framework: Framework) -> Feature:
    if framework.attention == "unfused":
        return "unfused attention"
    return "fused layers" if framework.fused_elementwise else "flash attention"


def interval_of(question: Question) -> Interval:
    """The 90 % interval of a step time on the cluster of `question`, relative to the predicted one. That of a
    calibration counts where it has rows of this kind."""
    return load_intervals().interval(kind_of(question), _calibration(question))


def _calibration(question: Question) -> Calibration | None:
    """The one that the question's framework carries; None where it is as shipped."""
    found = find_calibration(question.scenario.cluster.nodes, question.framework.name)
    return found if found is not None and f"calibrations/{found.name}" in question.digests else None


def schemes_of(layout: Layout) -> tuple[str, ...]:
    """How a layout divides the work, in the words of `Intervals.schemes`."""
    mesh = layout.mesh
    degrees = {"tensor": mesh.tp, "pipeline": mesh.pp, "context": mesh.cp, "expert": mesh.ep}
    found = [f"{name} parallel" for name, degree in degrees.items() if degree > 1]
    # One replica has nothing to synchronise.
    return (*found, family(layout.scheme)) if mesh.replicas > 1 else tuple(found)


def outside_of(
    question: Question, layout: Layout, program: Program, *, memory_bytes: float, coverage: float
) -> tuple[Outside, ...]:
    """In what a prediction leaves what was measured or validated. O(distinct kernels)."""
    known = load_intervals()
    kind = kind_of(question)
    calibration = _calibration(question)
    known_here = calibration is not None and left_out_spread(calibration, kind) is not None
    capacity = min(m.device.memory_bytes for m in question.cluster.workers if m.device is not None)
    tests = {
        Outside.roofline_device: kind[0] == "roofline kernels",
        Outside.few_measured_kernels: kind[0] != "roofline kernels" and coverage < _MEASURED,
        Outside.extrapolated_kernels: _extrapolated(question, program) > _EXTRAPOLATED,
        Outside.unmeasured_collectives: _unmeasured_collectives(question, layout, program),
        Outside.estimated_framework: _estimated(question.framework, calibration),
        Outside.calibrated_on_one_node: "several nodes" in kind and _all_on(calibration, several_nodes=False),
        Outside.calibrated_on_several_nodes: "one node" in kind and _all_on(calibration, several_nodes=True),
        Outside.unvalidated_kind: not known_here and len(known.band(kind).kind) == 1,
        Outside.unvalidated_scheme: not set(schemes_of(layout)) <= set(known.schemes),
        Outside.more_ranks: question.cluster.devices > known.most_ranks,
        Outside.memory_nearly_full: _NEARLY_FULL * capacity < memory_bytes <= capacity,
        Outside.memory_beyond: memory_bytes > capacity,
    }
    return tuple(reason for reason, holds in tests.items() if holds)


def _estimated(framework: Framework, calibration: Calibration | None) -> bool:
    """Whether nobody measured or fitted the host's times, which rule small models."""
    constants = () if calibration is None else calibration.constants
    fitted = any(each.name.startswith("host.") and each.status == "fitted" for each in constants)
    return not fitted and framework.calibrated.get("host", framework.provenance).method == "estimate"


def _all_on(calibration: Calibration | None, *, several_nodes: bool) -> bool:
    """Whether all that a calibration learned from ran on several nodes, or all on one."""
    return calibration is not None and not calibration.left_out(several_nodes=not several_nodes)


def _costs(question: Question) -> list[DeviceCosts]:
    names = {machine.device.name for machine in question.cluster.workers if machine.device is not None}
    return [device_costs(name) for name in sorted(names)]


def _extrapolated(question: Question, program: Program) -> float:
    """The share of the time of measured kernels that lies beyond the sizes that were measured, on the worst device."""
    worst = 0.0
    for costs in _costs(question):
        total = far = 0.0
        for work in program.works:
            for kernel, count in work.kernels:
                cost = costs.cost(kernel)
                total += count * cost.seconds
                far += count * cost.seconds if cost.outside > _FAR else 0.0
        worst = max(worst, far / total if total > 0.0 else 0.0)
    return worst


def _unmeasured_collectives(question: Question, layout: Layout, program: Program) -> bool:
    """Whether a collective of a tensor-parallel group, inside a node, is of a size or a number of ranks that no table
    of the node holds."""
    ranks = layout.mesh.tp
    if ranks == 1 or ranks > question.cluster.devices_per_node:
        return False
    wanted = {(item.kind, item.bytes) for work in program.works for item in work.inner if item.group == "tp"}
    for machine in question.cluster.workers:
        table = machine.collectives
        for kind, size in wanted:
            sizes = [] if table is None else [at for key, (at, _) in table.curves.items() if key == (kind, ranks, 1)]
            if not sizes or not sizes[0][0] / 2.0 <= size <= 2.0 * sizes[0][-1]:
                return True
    return False
