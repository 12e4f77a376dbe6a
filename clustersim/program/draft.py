"""A program while it is written: the op list of every stage, and the works that its ops name."""

from __future__ import annotations

from dataclasses import dataclass, field

from clustersim.hardware.framework import Framework
from clustersim.hardware.kernel import BYTES_OF, Dtype
from clustersim.layout.layout import AllReduce, Layout
from clustersim.layout.schedule import Turn
from clustersim.program.program import Bucket, Collective, CollectiveKind, Compute, Op, Ref, Work
from clustersim.timeline import OpId
from clustersim.workload.training import Workload


@dataclass(slots=True)
class Draft:
    """The op lists of all stages; what is appended can be referred to at once, from every stage.

    A pass needs its input from a stage whose list may not be written yet: `await_input` says so before the first op of
    the pass, `arrives` when the send that brings it is appended, and `connect` joins the two at the end.
    """

    workload: Workload
    layout: Layout
    framework: Framework
    stages: list[list[Op]]
    works: dict[Work, int] = field(default_factory=dict)
    # what the next compute op of a stage has to wait for besides, where reductions do not run beside compute
    blocked: tuple[Ref, ...] = ()
    _awaiting: Turn | None = None
    _pending: dict[Ref, Turn] = field(default_factory=dict)
    _arrivals: dict[Turn, Ref] = field(default_factory=dict)

    def next_ref(self, stage: int) -> Ref:
        """The op that will be appended next."""
        return (stage, len(self.stages[stage]))

    def append(self, stage: int, op: Op) -> Ref:
        """Any op but a Compute, which `compute` makes."""
        ref = self.next_ref(stage)
        self.stages[stage].append(op)
        return ref

    def await_input(self, turn: Turn) -> None:
        """The next compute op is the first of this turn, whose input another stage may send."""
        self._awaiting = turn

    def arrives(self, turn: Turn, send: Ref) -> None:
        """`send` brings the input of this turn."""
        self._arrivals[turn] = send

    def compute(self, stage: int, op: OpId, work: int, after: tuple[Ref, ...]) -> Ref:
        """A Compute of work number `work`."""
        ref = self.next_ref(stage)
        if self._awaiting is not None:
            self._pending[ref] = self._awaiting
            self._awaiting = None
        after, self.blocked = (*after, *self.blocked), ()
        return self.append(stage, Compute(id=op, after=after, work=work))

    def index(self, work: Work) -> int:
        """The number of a work."""
        return self.works.setdefault(work, len(self.works))

    def collective(
        self, stage: int, op: OpId, kind: CollectiveKind, bucket: Bucket, dtype: Dtype, after: tuple[Ref, ...]
    ) -> Ref:
        """A collective of one bucket's elements over the ranks that hold the same parameters."""
        scheme = self.layout.scheme
        return self.append(
            stage,
            Collective(
                id=op,
                stream="collective",
                after=after,
                kind=kind,
                group="expert-dp" if bucket.params == "experts" else "dp",
                algorithm=scheme.algorithm if isinstance(scheme, AllReduce) else "ring",
                bytes=bucket.elements * BYTES_OF[dtype],
            ),
        )

    def connect(self) -> None:
        """Make the first op of every pass wait for the send that brings its input."""
        for (stage, index), turn in self._pending.items():
            arrival = self._arrivals.get(turn)
            if arrival is not None:
                op = self.stages[stage][index]
                assert isinstance(op, Compute)
                self.stages[stage][index] = Compute(id=op.id, after=(arrival, *op.after), work=op.work)
