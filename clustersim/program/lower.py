"""lower(): a layout as a program."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import assert_never

from clustersim.hardware.framework import Framework
from clustersim.hardware.kernel import BYTES_OF
from clustersim.layout.layout import AllReduce, Layout, ParameterServer, Sharded, node_peers
from clustersim.program.buckets import buckets, chunk_span, server_shares
from clustersim.program.program import (
    Bucket,
    Collective,
    Compute,
    Exchange,
    Gate,
    Op,
    Position,
    Program,
    Ref,
    Stream,
    Transfer,
    Update,
    Work,
)
from clustersim.program.schedule import Turn, turns
from clustersim.program.work import pass_work
from clustersim.timeline import OpId, Phase
from clustersim.workload.activations import boundary_bytes
from clustersim.workload.layer_kernels import (
    optimizer_kernels,
)
from clustersim.workload.model import vocab_per_rank
from clustersim.workload.training import STATE_TENSORS, Workload


def peers_in_node(layout: Layout, devices_per_node: int) -> int:
    """Data-parallel peers that share a node (1: none)."""
    return node_peers(layout.mesh, layout.order, devices_per_node)


def lower(workload: Workload, layout: Layout, framework: Framework, devices_per_node: int) -> Program:
    """The ops of one step of `layout`, for every position. O(stages * micro-batches + buckets).

    `framework` decides which kernels exist (fused or not) and what waits for what; its times play no role here.
    """
    lowering = _Lowering(workload, layout, framework, devices_per_node)
    return lowering.program()


@dataclass(slots=True)
class _Stage:
    """The op list of one worker stage while it is built."""

    index: int
    ops: list[Op] = field(default_factory=list)

    def ref(self) -> Ref:
        """The op that will be appended next."""
        return (self.index, len(self.ops))


@dataclass(slots=True)
class _Lowering:
    workload: Workload
    layout: Layout
    framework: Framework
    devices_per_node: int
    works: dict[Work, int] = field(default_factory=dict)
    # (phase, layers, micro-batch size) -> index of the work: hashing a work costs more than building its op
    pass_works: dict[tuple[Phase, range, int], int] = field(default_factory=dict)
    # (micro-batch, chunk, backward) -> the op that brings the pass its input from another stage
    arrivals: dict[tuple[int, int, bool], Ref] = field(default_factory=dict)
    # the pass whose first op comes next; and the ops that still lack the arrival of their input
    awaiting: tuple[int, int, bool] | None = None
    pending: dict[Ref, tuple[int, int, bool]] = field(default_factory=dict)
    pushes: dict[int, list[Ref]] = field(default_factory=dict)
    # what the next compute op has to wait for besides, where reductions do not run beside compute
    blocked: tuple[Ref, ...] = ()
    # buckets whose gradients wait for the end of the stage's backward pass
    held: list[Bucket] = field(default_factory=list)

    # -------------------------------------------------------------------------------------------------- sizes

    @property
    def per_rank_batch(self) -> int:
        return -(-self.workload.training.global_batch // self.layout.mesh.dp)

    def micro_batch_size(self, micro_batch: int) -> int:
        left = self.per_rank_batch - micro_batch * self.layout.micro_batch
        return min(self.layout.micro_batch, left)

    def program(self) -> Program:
        layout, training = self.layout, self.workload.training
        count = layout.micro_batches(training.global_batch)
        all_buckets = buckets(self.workload.model, layout)
        stages = [_Stage(index) for index in range(layout.mesh.pp)]
        orders = [
            turns(layout.pipeline.schedule, layout.mesh.pp, stage.index, count, layout.pipeline.virtual_stages)
            for stage in stages
        ]
        for stage, order in zip(stages, orders, strict=True):
            mine = [bucket for bucket in all_buckets if bucket.stage % layout.mesh.pp == stage.index]
            self._stage(stage, order, mine, count)
        self._connect(stages)
        positions = [Position(role="worker", stage=stage.index, ops=tuple(stage.ops)) for stage in stages]
        if isinstance(layout.scheme, ParameterServer):
            positions = self._with_servers(positions, all_buckets)
        return Program(
            mesh=layout.mesh,
            order=layout.order,
            positions=tuple(positions),
            works=tuple(self.works),
            buckets=all_buckets,
            servers=server_shares(layout),
            share_parts=layout.scheme.parts if isinstance(layout.scheme, ParameterServer) else 0,
        )

    # -------------------------------------------------------------------------------------------------- stages

    def _connect(self, stages: list[_Stage]) -> None:
        """Make the first op of every pass wait for the send that brings its input."""
        for (stage, index), key in self.pending.items():
            arrival = self.arrivals.get(key)
            if arrival is not None:
                op = stages[stage].ops[index]
                assert isinstance(op, Compute)
                stages[stage].ops[index] = Compute(id=op.id, after=(arrival, *op.after), work=op.work)

    def _stage(self, stage: _Stage, order: list[Turn], mine: list[Bucket], count: int) -> None:
        pp = self.layout.mesh.pp
        scheme = self.layout.scheme
        gathered = self._gather_first(stage, mine) if isinstance(scheme, Sharded) and scheme.stage < 3 else {}
        synced: list[Ref] = []
        for turn in order:
            chunk = turn.virtual * pp + stage.index
            of_chunk = [bucket for bucket in mine if bucket.stage == chunk]
            if pp > 1:
                self.awaiting = (turn.micro_batch, chunk, turn.backward)
            if turn.backward:
                final = turn.micro_batch == count - 1
                done = self._backward(stage, turn.micro_batch, chunk, of_chunk, final, synced)
            else:
                needs = gathered if turn.micro_batch == 0 else {}
                done = self._forward(stage, turn.micro_batch, chunk, of_chunk, needs)
            self._send(stage, turn, chunk, done)
        # Without overlap, gradients leave once the whole backward pass of the stage is over, all chunks of it.
        for bucket in self.held:
            synced += self._synchronise(stage, count - 1, bucket, (done,))
        self.held.clear()
        self._finish(stage, mine, synced, count)

    def _forward(
        self,
        stage: _Stage,
        i: int,
        chunk: int,
        of_chunk: list[Bucket],
        gathered: dict[int, Ref],
    ) -> Ref:
        """The forward pass of micro-batch `i`: in one op, or bucket by bucket where weights must be gathered first."""
        scheme = self.layout.scheme
        size = self.micro_batch_size(i)
        span = chunk_span(self.workload.model, self.layout, chunk)
        by_bucket = isinstance(scheme, Sharded) and scheme.stage == 3
        if not by_bucket and not gathered:
            return self._compute(stage, i, chunk, "forward", "all", span, size, ())
        done = stage.ref()
        previous: list[Ref] = []
        for bucket in reversed(of_chunk):
            if by_bucket:
                ready = self._collective(
                    stage, OpId(0, i, chunk, "forward", f"B{bucket.index}", "all-gather"), "all_gather", bucket,
                    BYTES_OF[self.layout.precision.compute], after=tuple(previous[-2:-1]),
                )  # fmt: skip
            else:
                ready = gathered[bucket.index]
            layers = range(bucket.first_layer, bucket.last_layer + 1)
            done = self._compute(stage, i, chunk, "forward", f"B{bucket.index}", layers, size, (ready,))
            previous.append(done)
        return done

    def _backward(
        self,
        stage: _Stage,
        i: int,
        chunk: int,
        of_chunk: list[Bucket],
        final: bool,
        synced: list[Ref],
    ) -> Ref:
        """The backward pass of micro-batch `i`: bucket by bucket where gradients leave behind it."""
        scheme = self.layout.scheme
        size = self.micro_batch_size(i)
        every = isinstance(scheme, Sharded) and scheme.stage >= 2
        if not final and not every:
            span = chunk_span(self.workload.model, self.layout, chunk)
            return self._compute(stage, i, chunk, "backward", "all", span, size, ())
        pieces: list[tuple[Bucket, Ref]] = []
        reduced: list[Ref] = []
        gather_again = isinstance(scheme, Sharded) and scheme.stage == 3
        gathered = [self._gather_back(stage, i, chunk, of_chunk[0], ())] if gather_again else []
        for number, bucket in enumerate(of_chunk):
            # The gather of the next bucket goes out before the reduction of this one: it is needed earlier.
            if gather_again and number + 1 < len(of_chunk):
                held = tuple(ref for _, ref in pieces[-1:])
                gathered.append(self._gather_back(stage, i, chunk, of_chunk[number + 1], held))
            needs = tuple(gathered[number : number + 1])
            layers = range(bucket.first_layer, bucket.last_layer + 1)
            done = self._compute(stage, i, chunk, "backward", f"B{bucket.index}", layers, size, needs)
            pieces.append((bucket, done))
            if self._overlaps():
                reduced += self._synchronise(stage, i, bucket, (done,))
        if not self._overlaps() and every:
            for bucket, _ in pieces:
                reduced += self._synchronise(stage, i, bucket, (pieces[-1][1],))
            self.blocked = tuple(reduced)
        elif not self._overlaps():
            self.held += of_chunk
        if final:
            synced += reduced
        return pieces[-1][1]

    def _gather_back(self, stage: _Stage, i: int, chunk: int, bucket: Bucket, after: tuple[Ref, ...]) -> Ref:
        op = OpId(0, i, chunk, "backward", f"B{bucket.index}", "all-gather")
        element_bytes = BYTES_OF[self.layout.precision.compute]
        return self._collective(stage, op, "all_gather", bucket, element_bytes, after)

    def _send(self, stage: _Stage, turn: Turn, chunk: int, done: Ref) -> None:
        """Hand the result of a pass to the chunk that continues it, if another stage holds that."""
        target = chunk - 1 if turn.backward else chunk + 1
        pp = self.layout.mesh.pp
        if not 0 <= target < self.layout.chunks or pp == 1:
            return
        training = self.workload.training
        dtype_bytes = BYTES_OF[self.layout.precision.compute]
        whole = boundary_bytes(
            self.workload.model, training.sequence, self.micro_batch_size(turn.micro_batch), dtype_bytes
        )
        split = self.framework.scatter_gather or self.layout.sequence_parallel
        size = -(-whole // self.layout.mesh.tp) if split else whole
        stream: Stream = "previous" if turn.backward else "next"
        if not self.framework.overlap.pipeline_send:
            stream = "compute"
        self.arrivals[turn.micro_batch, target, turn.backward] = stage.ref()
        phase: Phase = "backward" if turn.backward else "forward"
        stage.ops.append(
            Transfer(
                id=OpId(0, turn.micro_batch, chunk, phase, "all", "send"),
                stream=stream,
                after=(done,),
                to=target % pp,
                bytes=size,
            )
        )

    # -------------------------------------------------------------------------------------------------- ops

    def _compute(
        self,
        stage: _Stage,
        i: int,
        chunk: int,
        phase: Phase,
        part: str,
        layers: range,
        size: int,
        after: tuple[Ref, ...],
    ) -> Ref:
        key = (phase, layers, size)
        work = self.pass_works.get(key)
        if work is None:
            work = self.pass_works[key] = self._index(
                pass_work(self.workload, self.layout, self.framework, phase, layers, size)
            )
        return self._append(stage, OpId(0, i, chunk, phase, part, "compute"), work, after)

    def _append(self, stage: _Stage, op: OpId, work: int, after: tuple[Ref, ...]) -> Ref:
        ref = stage.ref()
        if self.awaiting is not None:
            # The first op of a pass needs its input, which a stage that is not emitted yet may send.
            self.pending[ref] = self.awaiting
            self.awaiting = None
        after, self.blocked = (*after, *self.blocked), ()
        stage.ops.append(Compute(id=op, after=after, work=work))
        return ref

    def _index(self, work: Work) -> int:
        return self.works.setdefault(work, len(self.works))

    def _collective(
        self,
        stage: _Stage,
        op: OpId,
        kind: str,
        bucket: Bucket,
        element_bytes: int,
        after: tuple[Ref, ...],
    ) -> Ref:
        ref = stage.ref()
        scheme = self.layout.scheme
        stage.ops.append(
            Collective(
                id=op,
                stream="collective",
                after=after,
                kind=kind,  # type: ignore[arg-type]
                group="dp",
                algorithm=scheme.algorithm if isinstance(scheme, AllReduce) else "ring",
                bytes=bucket.elements * element_bytes,
            )
        )
        return ref

    def _overlaps(self) -> bool:
        scheme = self.layout.scheme
        return self.framework.overlap.gradient_reduce and (isinstance(scheme, ParameterServer) or scheme.overlap)

    def _synchronise(self, stage: _Stage, i: int, bucket: Bucket, after: tuple[Ref, ...]) -> list[Ref]:
        """Send the gradients of one bucket off; the refs are what the optimizer waits for."""
        scheme = self.layout.scheme
        element_bytes = BYTES_OF[self.layout.precision.gradient]
        part = f"B{bucket.index}"
        match scheme:
            case AllReduce():
                if self.layout.mesh.replicas == 1:
                    return list(after[:1])
                op = OpId(0, -1, bucket.stage, "synchronise", part, "all-reduce")
                return [self._collective(stage, op, "all_reduce", bucket, element_bytes, after)]
            case Sharded():
                micro_batch = i if scheme.stage >= 2 else -1
                op = OpId(0, micro_batch, bucket.stage, "synchronise", part, "reduce-scatter")
                return [self._collective(stage, op, "reduce_scatter", bucket, element_bytes, after)]
            case ParameterServer():
                return self._exchange(stage, bucket, element_bytes, after)
            case _:
                assert_never(scheme)

    def _exchange(self, stage: _Stage, bucket: Bucket, element_bytes: int, after: tuple[Ref, ...]) -> list[Ref]:
        """Push a bucket, pull it back; ranks of one node first sum among themselves, and each carries its part."""
        scheme = self.layout.scheme
        assert isinstance(scheme, ParameterServer)
        peers = self._reducing_peers()
        whole = bucket.elements * element_bytes
        part = f"B{bucket.index}"
        if peers > 1:
            inner = stage.ref()
            stage.ops.append(
                Collective(
                    id=OpId(0, -1, bucket.stage, "synchronise", part, "reduce-scatter"), stream="collective",
                    after=after, kind="reduce_scatter", group="node-dp", algorithm="ring", bytes=whole,
                )
            )  # fmt: skip
            after = (inner,)
        push = stage.ref()
        stage.ops.append(
            Exchange(
                id=OpId(0, -1, bucket.stage, "synchronise", part, "push"),
                stream="push", after=after, direction="push", bytes=-(-whole // peers),
                partitions=self._partitions(whole // peers),
            )
        )  # fmt: skip
        self.pushes.setdefault(bucket.index, []).append(push)
        weights = scheme.optimizer_at == "server"
        back = bucket.elements * BYTES_OF[self.layout.precision.compute] if weights else whole
        pull = stage.ref()
        server = self.layout.mesh.pp
        stage.ops.append(
            Exchange(
                id=OpId(0, -1, bucket.stage, "synchronise", part, "pull"),
                stream="pull", after=((server, bucket.index),), direction="pull", bytes=-(-back // peers),
                partitions=self._partitions(whole // peers),
            )
        )  # fmt: skip
        if peers == 1:
            return [pull]
        gathered = stage.ref()
        stage.ops.append(
            Collective(
                id=OpId(0, -1, bucket.stage, "synchronise", part, "all-gather"), stream="gather",
                after=(pull,), kind="all_gather", group="node-dp", algorithm="ring", bytes=back,
            )
        )  # fmt: skip
        return [gathered]

    def _partitions(self, size: int) -> int:
        scheme = self.layout.scheme
        assert isinstance(scheme, ParameterServer)
        return max(1, math.ceil(size / scheme.partition_bytes))

    def _reducing_peers(self) -> int:
        return peers_in_node(self.layout, self.devices_per_node) if self.layout.sync[0].reduce_in_node else 1

    def _finish(self, stage: _Stage, mine: list[Bucket], synced: list[Ref], count: int) -> None:
        """Tied embeddings, the optimizer, the gathering of updated shards, the gate."""
        layout, model, scheme = self.layout, self.workload.model, self.layout.scheme
        ends = {0, layout.mesh.pp - 1}
        if model.tied and layout.mesh.pp > 1 and stage.index in ends:
            ref = stage.ref()
            size = (
                vocab_per_rank(model.vocab, layout.mesh.tp, padded=False)
                * model.hidden
                * BYTES_OF[layout.precision.gradient]
            )
            stage.ops.append(
                Collective(
                    id=OpId(0, -1, -1, "synchronise", "embedding", "all-reduce"), stream="collective",
                    after=tuple(synced), kind="all_reduce", group="embedding", algorithm="ring", bytes=size,
                )
            )  # fmt: skip
            synced = [*synced, ref]
        elements = sum(bucket.elements for bucket in mine)
        chunk = stage.index
        updated: tuple[Ref, ...] = tuple(synced)
        at_server = isinstance(scheme, ParameterServer) and scheme.optimizer_at == "server"
        if not at_server:
            shard = -(-elements // layout.mesh.replicas) if isinstance(scheme, Sharded) else elements
            kernels = optimizer_kernels(shard, layout.precision.compute, self.workload.training.optimizer)
            work = Work(kernels=kernels, inner=(), forward_layers=0, backward_layers=0)
            op = OpId(0, -1, chunk, "update", "all", "compute")
            updated = (self._append(stage, op, self._index(work), tuple(synced)),)
        if isinstance(scheme, Sharded) and scheme.stage < 3 and not self.framework.overlap.parameter_gather:
            for bucket in reversed(mine):
                op = OpId(0, -1, bucket.stage, "update", f"B{bucket.index}", "all-gather")
                self._collective(stage, op, "all_gather", bucket, BYTES_OF[layout.precision.compute], updated)
        if isinstance(scheme, ParameterServer):
            stage.ops.append(Gate(id=OpId(0, -1, chunk, "synchronise", "all", "gate"), after=updated, staleness=0))

    def _gather_first(self, stage: _Stage, mine: list[Bucket]) -> dict[int, Ref]:
        """Weights sharded by the optimizer are gathered beside the first forward pass, where the framework can."""
        if not self.framework.overlap.parameter_gather:
            return {}
        found: dict[int, Ref] = {}
        for bucket in sorted(mine, key=lambda b: (b.stage, -b.index)):
            op = OpId(0, -1, bucket.stage, "forward", f"B{bucket.index}", "all-gather")
            found[bucket.index] = self._collective(
                stage, op, "all_gather", bucket, BYTES_OF[self.layout.precision.compute], ()
            )
        return found

    def _with_servers(self, workers: list[Position], all_buckets: tuple[Bucket, ...]) -> list[Position]:
        layout, scheme = self.layout, self.layout.scheme
        assert isinstance(scheme, ParameterServer)
        element_bytes = BYTES_OF[layout.precision.gradient]
        peers = self._reducing_peers()
        state = 0
        if scheme.optimizer_at == "server":
            width = BYTES_OF[layout.precision.optimizer]
            tensors = 1 + STATE_TENSORS[self.workload.training.optimizer]
            state = 2 * width * tensors + element_bytes + BYTES_OF[layout.precision.compute]
        ops = tuple(
            Update(
                id=OpId(0, -1, -1, "update", f"B{bucket.index}", "update"),
                after=tuple(self.pushes[bucket.index]),
                pushes=layout.mesh.replicas // peers,
                bytes=bucket.elements * element_bytes * layout.mesh.tp,
                state_bytes=bucket.elements * layout.mesh.tp * state,
                partitions=self._partitions(bucket.elements * element_bytes // peers),
            )
            for bucket in all_buckets
        )
        return [*workers, Position(role="server", stage=-1, ops=ops)]
