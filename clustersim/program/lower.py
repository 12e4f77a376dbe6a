"""lower(): a layout as a program. The passes of every stage and the sends between stages."""

from __future__ import annotations

from dataclasses import dataclass, field

from clustersim.hardware.framework import Framework
from clustersim.layout.layout import Layout, ParameterServer, node_peers
from clustersim.layout.schedule import Turn, splits_backward, turns
from clustersim.program.buckets import buckets, chunk_span, server_shares
from clustersim.program.draft import Draft
from clustersim.program.program import Bucket, Position, Program, Ref, Stream, Transfer
from clustersim.program.reading import batch_read
from clustersim.program.synchronisation import Synchronisation
from clustersim.program.work import pass_work
from clustersim.timeline import OpId, Phase
from clustersim.workload.activations import boundary_bytes
from clustersim.workload.training import Workload


def peers_in_node(layout: Layout, devices_per_node: int) -> int:
    """Data-parallel peers that share a node (1: none)."""
    return node_peers(layout.mesh, layout.order, devices_per_node)


def lower(workload: Workload, layout: Layout, framework: Framework, devices_per_node: int) -> Program:
    """The ops of one step of `layout`, for every position. O(stages * micro-batches + buckets).

    `framework` decides which kernels exist (fused or not) and what waits for what; its times play no role here.
    """
    draft = Draft(workload=workload, layout=layout, framework=framework, stages=[[] for _ in range(layout.mesh.pp)])
    all_buckets = buckets(workload.model, layout)
    experts = {bucket.index - 1: bucket for bucket in all_buckets if bucket.params == "experts"}
    sync = Synchronisation(draft=draft, devices_per_node=devices_per_node, experts=experts)
    passes = _Passes(draft=draft, sync=sync, buckets=all_buckets)
    read = batch_read(workload, layout)
    if read is not None:
        # The first pass of the first stage needs the batch.
        draft.blocked = (draft.append(0, read),)
    for stage in range(layout.mesh.pp):
        passes.of_stage(stage)
    draft.connect()
    positions = [Position(role="worker", stage=stage, ops=tuple(ops)) for stage, ops in enumerate(draft.stages)]
    scheme = layout.scheme
    if isinstance(scheme, ParameterServer):
        positions.append(sync.servers(scheme, all_buckets))
    return Program(
        mesh=layout.mesh,
        order=layout.order,
        positions=tuple(positions),
        works=tuple(draft.works),
        buckets=all_buckets,
        servers=server_shares(layout),
        share_parts=scheme.parts if isinstance(scheme, ParameterServer) else 0,
    )


@dataclass(slots=True)
class _Passes:
    """Appends the passes of one stage after the other to a draft, and what they send."""

    draft: Draft
    sync: Synchronisation
    buckets: tuple[Bucket, ...]
    # (phase, layers, micro-batch size) -> number of the work: hashing a work costs more than building its op
    works: dict[tuple[Phase, range, int], int] = field(default_factory=dict)
    # buckets whose gradients wait for the end of the stage's backward passes
    held: list[Bucket] = field(default_factory=list)

    @property
    def count(self) -> int:
        """Micro-batches of a step."""
        return self.draft.layout.micro_batches(self.draft.workload.training.global_batch)

    def size(self, micro_batch: int) -> int:
        """Sequences in a micro-batch; the last one may have fewer."""
        layout = self.draft.layout
        of_rank = -(-self.draft.workload.training.global_batch // layout.mesh.dp)
        return min(layout.micro_batch, of_rank - micro_batch * layout.micro_batch)

    def of_stage(self, stage: int) -> None:
        """All turns of a stage, then the end of the step."""
        layout, sync, count = self.draft.layout, self.sync, self.count
        schedule, pp = layout.pipeline.schedule, layout.mesh.pp
        leaving: Phase = "weight-gradient" if splits_backward(schedule) else "backward"
        mine = [
            bucket for bucket in self.buckets if layout.stage_of(bucket.stage) == stage and bucket.params != "experts"
        ]
        gathered = sync.gather_first(stage, mine)
        synced: list[Ref] = []
        for turn in turns(schedule, pp, stage, count, layout.pipeline.virtual_stages):
            of_chunk = [bucket for bucket in mine if bucket.stage == turn.chunk]
            if turn.phase != "weight-gradient":
                self.draft.await_input(turn)
            if turn.phase == "forward":
                done = self._forward(stage, turn, of_chunk, gathered if turn.micro_batch == 0 else {})
            elif turn.phase == leaving:
                done = self._backward(stage, turn, of_chunk, synced)
            else:
                done = self._whole(stage, turn)
            self._send(stage, turn, done)
        # Without overlap, gradients leave once the whole backward pass of the stage is over, all chunks of it.
        for bucket in self.held:
            synced += sync.send(stage, count - 1, bucket, (done,))
        self.held.clear()
        sync.finish(stage, mine, synced)

    def _forward(self, stage: int, turn: Turn, of_chunk: list[Bucket], gathered: dict[int, Ref]) -> Ref:
        """A forward pass: in one op, or bucket by bucket where weights must be gathered first."""
        if not self.sync.gathers_weights and not gathered:
            return self._whole(stage, turn)
        previous: list[Ref] = []
        for bucket in reversed(of_chunk):
            if self.sync.gathers_weights:
                ready = self.sync.gather_forward(stage, turn.micro_batch, bucket, tuple(previous[-2:-1]))
            else:
                ready = gathered[bucket.index]
            previous.append(self._piece(stage, turn, bucket, (ready,)))
        return previous[-1]

    def _backward(self, stage: int, turn: Turn, of_chunk: list[Bucket], synced: list[Ref]) -> Ref:
        """A pass that leaves gradients of weights: bucket by bucket where they leave behind it."""
        sync, i = self.sync, turn.micro_batch
        final = i == self.count - 1
        if not final and not sync.every_micro_batch:
            return self._whole(stage, turn)
        pieces: list[tuple[Bucket, Ref]] = []
        reduced: list[Ref] = []
        gathered = [sync.gather_back(stage, i, of_chunk[0], ())] if sync.gathers_weights else []
        for number, bucket in enumerate(of_chunk):
            # The gather of the next bucket goes out before the reduction of this one: it is needed earlier.
            if sync.gathers_weights and number + 1 < len(of_chunk):
                held = tuple(ref for _, ref in pieces[-1:])
                gathered.append(sync.gather_back(stage, i, of_chunk[number + 1], held))
            done = self._piece(stage, turn, bucket, tuple(gathered[number : number + 1]))
            pieces.append((bucket, done))
            if sync.overlaps:
                reduced += sync.send(stage, i, bucket, (done,))
        if not sync.overlaps and sync.every_micro_batch:
            for bucket, _ in pieces:
                reduced += sync.send(stage, i, bucket, (pieces[-1][1],))
            self.draft.blocked = tuple(reduced)
        elif not sync.overlaps:
            self.held += of_chunk
        if final:
            synced += reduced
        return pieces[-1][1]

    def _whole(self, stage: int, turn: Turn) -> Ref:
        """A pass through a chunk in one op."""
        span = chunk_span(self.draft.workload.model, self.draft.layout, turn.chunk)
        return self._compute(stage, turn, "all", span, ())

    def _piece(self, stage: int, turn: Turn, bucket: Bucket, after: tuple[Ref, ...]) -> Ref:
        """A pass through the layers of a bucket."""
        layers = range(bucket.first_layer, bucket.last_layer + 1)
        return self._compute(stage, turn, f"B{bucket.index}", layers, after)

    def _compute(self, stage: int, turn: Turn, part: str, layers: range, after: tuple[Ref, ...]) -> Ref:
        draft = self.draft
        key = (turn.phase, layers, self.size(turn.micro_batch))
        work = self.works.get(key)
        if work is None:
            work = self.works[key] = draft.index(pass_work(draft.workload, draft.layout, draft.framework, *key))
        op = OpId(0, turn.micro_batch, turn.chunk, turn.phase, part, "compute")
        return draft.compute(stage, op, work, after)

    def _send(self, stage: int, turn: Turn, done: Ref) -> None:
        """Hand the result of a pass to the chunk that continues it, if another stage holds that."""
        draft, layout, framework = self.draft, self.draft.layout, self.draft.framework
        back = turn.phase == "backward"
        target = turn.chunk - 1 if back else turn.chunk + 1
        leads_nowhere = turn.phase == "weight-gradient" or not 0 <= target < layout.chunks
        if leads_nowhere or layout.stage_of(target) == stage:
            return
        workload = draft.workload
        tokens = workload.training.sequence // layout.mesh.cp * self.size(turn.micro_batch)
        whole = boundary_bytes(workload.model, tokens=tokens, dtype=layout.precision.compute)
        split = framework.scatter_gather or layout.sequence_parallel
        # On the way back through a V, a forward pass goes on at the stage before.
        returning = layout.pipeline.schedule == "zb-v" and turn.chunk >= layout.mesh.pp
        stream: Stream = "previous" if back != returning else "next"
        if not framework.overlap.pipeline_send:
            stream = "compute"
        send = draft.append(
            stage,
            Transfer(
                id=OpId(0, turn.micro_batch, turn.chunk, turn.phase, "all", "send"),
                stream=stream,
                after=(done,),
                to=layout.stage_of(target),
                bytes=-(-whole // layout.mesh.tp) if split else whole,
            ),
        )
        draft.arrives(turn._replace(chunk=target), send)
