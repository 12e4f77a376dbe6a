"""Law P10 of docs/laws.md: gradients that leave behind the backward pass, one after the other on one channel."""

from __future__ import annotations

from itertools import accumulate

import pytest
from clusters import cluster_of, framework_of, layers, program_of, wire, workers
from hypothesis import given
from hypothesis import strategies as st

from clustersim.layout.layout import Mesh
from clustersim.program.program import Collective, Compute, Op
from clustersim.simulate.simulate import simulate
from clustersim.timeline import OpId

# (forward, backward, communication) of each layer, first to last
Times = list[tuple[int, int, int]]
TIMES = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 20)), min_size=1, max_size=7)


def step_s(times: Times) -> float:
    """Two ranks on two nodes: all layers forward, then backward, each followed by the allreduce of its gradients, which
    takes its bytes over the wire's one byte a second."""
    ops: list[Op] = []
    works = []
    for layer, (forward, _, _) in enumerate(times):
        ops.append(Compute(id=OpId(0, 0, 0, "forward", f"L{layer}", "compute"), after=(), work=len(works)))
        works.append(layers(forward))
    for layer, (_, backward, size) in reversed(list(enumerate(times))):
        ops.append(Compute(id=OpId(0, 0, 0, "backward", f"L{layer}", "compute"), after=(), work=len(works)))
        works.append(layers(0, backward))
        ops.append(
            Collective(
                id=OpId(0, -1, 0, "synchronise", f"L{layer}", "all-reduce"), stream="collective",
                after=((0, len(ops) - 1),), kind="all_reduce", group="dp", algorithm="ring", bytes=size,
            )
        )  # fmt: skip
    program = program_of(Mesh(dp=2, tp=1, pp=1), [ops], works=tuple(works))
    cluster = cluster_of(workers(2, far=wire(1.0)))
    return simulate(program, cluster, framework_of(pass_s=1.0)).makespan_s


@given(TIMES)
def test_p10_first_in_first_out_on_one_channel(times: Times) -> None:
    """The channel takes buckets as they become ready: T is what the recurrence says, and no less than either of
    computing everything, and of sending everything once the last gradients of the last layer are there."""
    computed = sum(forward for forward, _, _ in times)
    sent = 0.0
    ready = accumulate((backward for _, backward, _ in reversed(times)), initial=computed)
    next(ready)
    for done, (_, _, size) in zip(ready, reversed(times), strict=True):
        sent = max(sent, done) + size
    last = times[-1][1]
    assert step_s(times) == pytest.approx(sent, rel=1e-9)
    everything = sum(forward + backward for forward, backward, _ in times)
    channel = last + sum(size for _, _, size in times) + min(forward for forward, _, _ in times)
    assert step_s(times) >= max(everything, channel) * (1.0 - 1e-9)


@given(TIMES)
def test_p10_bound_by_communication(times: Times) -> None:
    """Where every transfer takes longer than the pass beside it, nothing but the first pass and the forward passes is
    seen besides: T = b_L + sum c + sum f."""
    bound = [(forward, backward, size + 9) for forward, backward, size in times]
    total = bound[-1][1] + sum(size for _, _, size in bound) + sum(forward for forward, _, _ in bound)
    assert step_s(bound) == pytest.approx(total, rel=1e-9)
